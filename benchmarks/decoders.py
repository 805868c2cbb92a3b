"""A Llama, and the GPT-2 of ``examples/lm``: what ``llama_memory.py`` compiles.

Params are a dictionary, as ``optax_flash.plan`` has it: ``"embed"``, ``"blocks"``
(every layer stacked along a first axis, run by ``lax.scan``) and ``"head"``.
Activations are bfloat16, whatever the params are in.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples.lm.decoders import Block, DecoderConfig, Embed, Head
from optax_flash import release

Params = Any


@dataclasses.dataclass(frozen=True)
class Llama:
    """RMSNorm, rotary positions, grouped queries, a gated MLP.

    Attributes:
      heads: of queries.
      kv_heads: of keys and values.
      tied: whether the head is the embedding.
    """

    heads: int
    kv_heads: int
    tied: bool

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        return params["embedding"][tokens]

    def block(self, params: Params, x: jax.Array) -> jax.Array:
        y = _rms_norm(x, params["attention_norm"])
        query = _rotate(_heads(y @ params["query"], self.heads))
        key = _rotate(_heads(y @ params["key"], self.kv_heads))
        value = _heads(y @ params["value"], self.kv_heads)
        x = x + _attention(query, key, value) @ params["out"]
        y = _rms_norm(x, params["mlp_norm"])
        gate = jax.nn.silu(y @ params["gate"])
        return x + (gate * (y @ params["up"])) @ params["down"]

    def cross_entropy(
        self, params: Params, x: jax.Array, targets: jax.Array
    ) -> jax.Array:
        """Sum over all tokens; params of the head, and of the embedding if tied."""
        if not self.tied:
            x = _rms_norm(x, params["norm"])
            return _cross_entropy(x @ params["kernel"], targets)
        x = _rms_norm(x, params["head"]["norm"])
        return _cross_entropy(x @ params["embed"]["embedding"].T, targets)


@dataclasses.dataclass(frozen=True)
class GPT2:
    """That of ``examples/lm``, part by part."""

    config: DecoderConfig
    tied: bool = dataclasses.field(default=True, init=False)

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        return Embed(self.config).apply({"params": params}, tokens)

    def block(self, params: Params, x: jax.Array) -> jax.Array:
        return Block(self.config).apply({"params": params}, x)

    def cross_entropy(
        self, params: Params, x: jax.Array, targets: jax.Array
    ) -> jax.Array:
        """Sum over all tokens; params of the head and of the embedding."""
        head, embedding = params["head"], params["embed"]["embedding"]
        logits = Head(self.config).apply({"params": head}, x, embedding)
        return _cross_entropy(logits, targets)


def sequence(
    model: Llama | GPT2, *, chunks: int = 1, mesh: Mesh | None = None
) -> release.Sequence:
    """The mean cross entropy of predicting each token from those before it.

    A function of params and tokens, (batch, length + 1) int32, of which the backward
    pass keeps each layer's input only.

    Args:
      model: what the params are of.
      chunks: pieces of the length whose float32 logits are made one after the other.
      mesh: over which the batch is divided, and the params are; each layer's are
        gathered where it runs.
    """

    def gathered(params: Params) -> Params:
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return _constrain(mesh, params, PartitionSpec())

    def split(x: jax.Array) -> jax.Array:
        return _constrain(mesh, x, PartitionSpec(mesh and mesh.axis_names))

    def embed(params: Params, tokens: jax.Array) -> jax.Array:
        return split(model.embed(gathered(params), tokens[:, :-1]))

    def block(params: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return split(model.block(gathered(params), x))

    def head(params: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
        params, targets = gathered(params), tokens[:, 1:]

        def add(total: jax.Array, xs: tuple[jax.Array, jax.Array]):
            return total + model.cross_entropy(params, *xs), None

        def pieces(x: jax.Array) -> jax.Array:
            x = x.reshape(x.shape[0], chunks, -1, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0)

        if chunks == 1:
            return model.cross_entropy(params, x, targets) / targets.size
        add = jax.checkpoint(add, prevent_cse=False)
        total, _ = jax.lax.scan(add, jnp.float32(0), (pieces(x), pieces(targets)))
        return total / targets.size

    return release.sequence(
        release.layer("embed", embed),
        release.scan("blocks", block),
        release.layer(("head", "embed") if model.tied else "head", head),
    )


def without_remat(model: release.Sequence, params: Params, tokens: jax.Array):
    """The loss, with a backward pass that keeps all that it needs."""
    embed, blocks, head = (segment.function for segment in model.segments)

    def layer(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        return blocks(params, x, tokens), None

    x, _ = jax.lax.scan(layer, embed(params["embed"], tokens), params["blocks"])
    tied = not model.segments[-1].alone
    return head(params if tied else params["head"], x, tokens)


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sum over all tokens."""
    logits = logits.astype(jnp.float32)
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


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * scale


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of (batch, length, heads, width)."""
    half = x.shape[-1] // 2
    rates = 500_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
