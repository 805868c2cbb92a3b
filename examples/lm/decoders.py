"""GPT-2 and Llama as sequences of segments: plain, rematerialized or released.

    bytes -> embed -> depth x block (attention, MLP) -> head -> mean cross entropy

All layers are one stack of params, run by a scan, so that a model of 48 layers compiles
as fast as one of two. Shapes in comments: B batch, T time, D width, H heads, K = D / H.

Benchmarks measure this GPT-2, too, whose params are laid out as in `optax_flash.plan`.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from examples.lm.model import check_heads, rotate
from optax_flash import release


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes, and how attention is computed.

    Attributes:
      architecture: "gpt2" (LayerNorm, learned positions, biases, GELU, a head tied to
        the embedding) or "llama" (RMSNorm, rotary positions, no biases, SwiGLU).
      depth: layers.
      width: features; a multiple of 32 * heads, so that rows have whole groups.
      heads: of attention.
      seq_len: positions that GPT-2 knows.
      vocab: of tokens; bytes are the first 256.
      attention: "plain", with all scores in memory; "fused", by the best kernel of the
        device that is there; "cudnn", for a GPU that need not be.
      compute_dtype: of activations. Weights of any dtype are converted to it.
    """

    architecture: str
    depth: int
    width: int
    heads: int
    seq_len: int
    vocab: int = 256
    attention: str = "fused"
    compute_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        check_heads(self.width, self.heads)

    @property
    def hidden(self) -> int:
        """Features inside of the MLP; three matrices cost what GPT-2's two do."""
        if self.architecture == "gpt2":
            return 4 * self.width
        return 32 * round(8 * self.width / 3 / 32)


def attend(config: DecoderConfig, q, k, v):  # each (B, T, H, K) -> (B, T, H, K)
    """Causal attention."""
    if config.attention != "plain":
        # cuDNN's kernel, which takes half precision only; elsewhere XLA's own way.
        half = config.compute_dtype != jnp.float32
        cudnn = half and jax.default_backend() == "gpu" or config.attention == "cudnn"
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn" if cudnn else None
        )
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k).astype(jnp.float32)
    scores /= jnp.sqrt(q.shape[-1])
    time = q.shape[1]
    causal = jnp.tril(jnp.ones((time, time), bool))
    shares = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqs,bshk->bqhk", shares.astype(v.dtype), v)


class LayerNorm(nn.Module):
    """As Flax's, which keeps one more float32 array like x for the backward pass."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        y = x.astype(jnp.float32)
        y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)
        return (y * scale + bias).astype(self.dtype)


def norm(config: DecoderConfig, name: str):
    if config.architecture == "gpt2":
        return LayerNorm(config.compute_dtype, name=name)
    return nn.RMSNorm(epsilon=1e-5, dtype=config.compute_dtype, name=name)


class Embed(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens):  # (B, T) integers -> (B, T, D)
        config, small = self.config, nn.initializers.normal(0.02)
        shape = config.vocab, config.width
        x = self.param("embedding", small, shape)[tokens]
        if config.architecture == "gpt2":
            positions = self.param("positions", small, (config.seq_len, config.width))
            x = x + positions[: tokens.shape[1]]
        return x.astype(config.compute_dtype)


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to its input."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):  # (B, T, D) -> (B, T, D)
        config = self.config
        gpt2 = config.architecture == "gpt2"

        def dense(name, features, spread=0.02):
            return nn.Dense(
                features,
                use_bias=gpt2,
                dtype=config.compute_dtype,
                kernel_init=nn.initializers.normal(spread),
                name=name,
            )

        # Layers that add to x do so 2 * depth times; GPT-2 keeps the sum's size.
        adding = 0.02 / (2 * config.depth) ** 0.5

        y = norm(config, "attention_norm")(x)
        shape = *x.shape[:-1], config.heads, -1
        if gpt2:  # one matrix, as in published weights
            qkv = jnp.split(dense("qkv", 3 * config.width)(y), 3, axis=-1)
        else:
            qkv = [dense(name, config.width)(y) for name in ("q", "k", "v")]
        q, k, v = (z.reshape(shape) for z in qkv)
        if not gpt2:
            q, k = rotate(q), rotate(k)
        y = attend(config, q, k, v).reshape(x.shape)
        x = x + dense("out", config.width, adding)(y)

        y = norm(config, "mlp_norm")(x)
        up = dense("up", config.hidden)(y)
        if gpt2:
            y = nn.gelu(up)
        else:
            y = nn.silu(dense("gate", config.hidden)(y)) * up
        return x + dense("down", config.width, adding)(y)


class Head(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, embedding=None):  # (B, T, D) -> (B, T, vocab) float32
        config = self.config
        x = norm(config, "norm")(x)
        if embedding is not None:
            return (x @ embedding.T.astype(x.dtype)).astype(jnp.float32)
        logits = nn.Dense(
            config.vocab,
            use_bias=False,
            dtype=config.compute_dtype,
            kernel_init=nn.initializers.normal(0.02),
            name="kernel",
        )
        return logits(x).astype(jnp.float32)


def decoder(config: DecoderConfig) -> release.Sequence:
    """The mean loss of each next byte: a function (params, tokens) -> nats.

    tokens are (B, T + 1) integers. A backward pass keeps each layer's input only.
    """
    embed, block, head = Embed(config), Block(config), Head(config)

    def embed_fn(params, tokens):
        return embed.apply({"params": params}, tokens[:, :-1])

    def block_fn(params, x, tokens):
        return block.apply({"params": params}, x)

    def head_fn(params, x, tokens):
        embedding = None
        if config.architecture == "gpt2":
            params, embedding = params["head"], params["embed"]["embedding"]
        logits = head.apply({"params": params}, x, embedding)
        targets = tokens[:, 1:].astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    tied = config.architecture == "gpt2"
    return release.sequence(
        release.layer("embed", embed_fn),
        release.scan("blocks", block_fn),
        release.layer(("head", "embed") if tied else "head", head_fn),
    )


def without_remat(model: release.Sequence) -> Callable[..., jax.Array]:
    """The same function, with a backward pass that keeps all that it needs."""
    embed, blocks, head = model.segments

    def loss(params, tokens):
        def layer(x, layer_params):
            return blocks.function(layer_params, x, tokens), None

        x = embed.function(params["embed"], tokens)
        x, _ = jax.lax.scan(layer, x, params["blocks"])
        return head.function(params["head"] if head.alone else params, x, tokens)

    return loss


def init(config: DecoderConfig, key: jax.Array):
    """Float32 weights: "embed", "blocks" with an axis of layers before all, "head"."""
    keys = jax.random.split(key, 3)
    tokens = jnp.zeros((1, config.seq_len), jnp.int32)
    embed = Embed(config).init(keys[0], tokens)["params"]
    x = jnp.zeros((1, config.seq_len, config.width), config.compute_dtype)
    layers = jax.random.split(keys[1], config.depth)
    blocks = jax.vmap(Block(config).init, (0, None))(layers, x)["params"]
    embedding = embed["embedding"] if config.architecture == "gpt2" else None
    head = Head(config).init(keys[2], x, embedding)["params"]
    return {"embed": embed, "blocks": blocks, "head": head}
