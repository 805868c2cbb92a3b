"""Llama and GPT-2 in plain JAX: what ``llama_memory.py`` compiles.

Params are a dictionary: ``"embed"``, ``"blocks"`` (every layer stacked along a first
axis, run by ``lax.scan``) and ``"head"``. A head without a kernel is tied to the
embedding. Activations are bfloat16, whatever the params are in.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Params = Any


@dataclasses.dataclass(frozen=True)
class Llama:
    """RMSNorm, rotary positions, grouped queries, a gated MLP.

    Attributes:
      vocabulary: rows of the embedding.
      width: of the residual stream.
      hidden: of the MLP.
      layers: how many blocks.
      heads: of queries.
      kv_heads: of keys and values.
      tied: whether the head is the embedding.
    """

    vocabulary: int = 128_256
    width: int = 4_096
    hidden: int = 14_336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    tied: bool = False

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        return params["embedding"].astype(jnp.bfloat16)[tokens]

    def block(self, params: Params, x: jax.Array) -> jax.Array:
        y = _rms_norm(x, params["attention_norm"])
        query = _rotate(_heads(y @ params["query"], self.heads))
        key = _rotate(_heads(y @ params["key"], self.kv_heads))
        value = _heads(y @ params["value"], self.kv_heads)
        x = x + _attention(query, key, value) @ params["out"]
        y = _rms_norm(x, params["mlp_norm"])
        gate = jax.nn.silu(y @ params["gate"])
        return x + (gate * (y @ params["up"])) @ params["down"]

    def last_norm(self, params: Params, x: jax.Array) -> jax.Array:
        return _rms_norm(x, params["norm"].astype(jnp.bfloat16))


@dataclasses.dataclass(frozen=True)
class GPT2:
    """LayerNorm, learned positions, biases, GELU, a head tied to the embedding."""

    width: int = 1_600
    layers: int = 48
    heads: int = 25

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return params["embedding"][tokens] + params["positions"][: tokens.shape[1]]

    def block(self, params: Params, x: jax.Array) -> jax.Array:
        y = _layer_norm(x, params["attention_norm"])
        qkv = _heads(_dense(params["qkv"], y), 3 * self.heads)
        y = _attention(*jnp.split(qkv, 3, axis=2))
        x = x + _dense(params["out"], y)
        y = _dense(params["up"], _layer_norm(x, params["mlp_norm"]))
        return x + _dense(params["down"], jax.nn.gelu(y))

    def last_norm(self, params: Params, x: jax.Array) -> jax.Array:
        norm = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["norm"])
        return _layer_norm(x, norm)


def loss(
    model: Llama | GPT2,
    params: Params,
    tokens: jax.Array,
    *,
    remat: bool = True,
    chunks: int = 1,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Mean cross entropy of predicting each token from those before it.

    Args:
      model: what the params are of.
      params: float32 or bfloat16.
      tokens: (batch, length + 1), int32.
      remat: keep only the input of each layer for the backward pass.
      chunks: pieces of the length whose float32 logits are made one after the other.
      mesh: over which the batch is divided, and the params are; each layer's are
        gathered where it runs.
    """

    def layer(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        params = _constrain(mesh, params, PartitionSpec())
        return split(model.block(params, x)), None

    def split(x: jax.Array) -> jax.Array:
        return _constrain(mesh, x, PartitionSpec(mesh and mesh.axis_names))

    if remat:
        layer = jax.checkpoint(layer, prevent_cse=False)
    ends = _constrain(mesh, (params["embed"], params["head"]), PartitionSpec())
    x = split(model.embed(ends[0], tokens[:, :-1]))
    x, _ = jax.lax.scan(layer, x, params["blocks"])
    kernel = ends[1]["kernel"] if "kernel" in ends[1] else ends[0]["embedding"].T

    def add(total: jax.Array, xs: tuple[jax.Array, jax.Array]):
        x = model.last_norm(ends[1], xs[0])
        return total + _cross_entropy(kernel.astype(jnp.bfloat16), x, xs[1]), None

    def pieces(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], chunks, -1, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    targets = tokens[:, 1:]
    if chunks == 1:
        total, _ = add(jnp.float32(0), (x, targets))
    else:
        add = jax.checkpoint(add, prevent_cse=False)
        total, _ = jax.lax.scan(add, jnp.float32(0), (pieces(x), pieces(targets)))
    return total / targets.size


def _cross_entropy(kernel: jax.Array, x: jax.Array, targets: jax.Array) -> jax.Array:
    """Sum over all tokens."""
    logits = (x @ kernel).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked)


def _constrain(mesh: Mesh | None, tree: Any, spec: PartitionSpec) -> Any:
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))


def _heads(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, -1)


def _attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention that keeps no scores, heads joined: (batch, length, width)."""
    y = jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation="cudnn"
    )
    return y.reshape(*y.shape[:2], -1)


def _dense(params: Params, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * scale


def _layer_norm(x: jax.Array, params: Params) -> jax.Array:
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    return _rms_norm(y, params["scale"]).astype(x.dtype) + params["bias"]


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of (batch, length, heads, width)."""
    half = x.shape[-1] // 2
    rates = 500_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
