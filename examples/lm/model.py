"""A small GPT over bytes: `--architecture gpt`, the model of the demo.

    bytes -> embedding -> depth x (attention, MLP) -> RMSNorm -> logits

Pre-norm, rotary positions, squared-ReLU MLP, no bias anywhere, head not tied to the
embedding. The last axis of every matrix is a multiple of 32, so whole groups of 32
codes fit into each row. Shapes in comments: B batch, T time, D width, H heads,
K = D / H.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp


def check_heads(width: int, heads: int) -> None:
    """Raises a ValueError where a head's rows would not have whole groups of codes."""
    if width % (32 * heads):
        raise ValueError(
            f"width {width} does not split into {heads} heads whose size is a multiple "
            "of 32; choose width = 32 * heads * n"
        )


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model, and the dtype it computes in.

    Weights are initialised in float32. They may be stored in less: each layer converts
    them to `compute_dtype` where it uses them, so a gradient has its weight's dtype.
    The default computes in float32 because CPUs multiply bfloat16 matrices slowly; on
    an accelerator choose bfloat16.
    """

    depth: int = 4
    width: int = 256
    heads: int = 4
    vocab: int = 256  # one token per byte
    compute_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        check_heads(self.width, self.heads)


def rotate(x):
    """Rotary positions: turns pairs of features by angles that grow with time.

    The product of a rotated query and a rotated key then depends on how far apart they
    are and not on where they are. x and the result are (B, T, H, K).
    """
    time, half = x.shape[1], x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half) / half)  # (K/2,)
    angle = jnp.arange(time)[:, None, None] * frequency  # (T, 1, K/2)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nn.Module):
    """One layer: causal self-attention, then an MLP, each added to its input."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x):  # (B, T, D) -> (B, T, D)
        config = self.config
        dtype = config.compute_dtype
        heads = (config.heads, config.width // config.heads)

        def dense(name, features, **kwargs):
            return nn.Dense(features, use_bias=False, dtype=dtype, name=name, **kwargs)

        # The two layers that write into x start at zero: the model begins as the
        # identity, and depth does not have to be scaled away.
        zeros = nn.initializers.zeros

        y = nn.RMSNorm(dtype=dtype)(x)
        q, k, v = jnp.split(dense("qkv", 3 * config.width)(y), 3, axis=-1)
        q, k, v = (z.reshape(*z.shape[:-1], *heads) for z in (q, k, v))  # (B, T, H, K)
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + dense("out", config.width, kernel_init=zeros)(y.reshape(x.shape))

        y = nn.RMSNorm(dtype=dtype)(x)
        y = jnp.square(nn.relu(dense("up", 4 * config.width)(y)))  # (B, T, 4D)
        return x + dense("down", config.width, kernel_init=zeros)(y)


class GPT(nn.Module):
    """Bytes in, the logits of each next byte out."""

    config: GPTConfig

    @nn.compact
    def __call__(self, tokens):  # (B, T) integers -> (B, T, vocab) float32
        config = self.config
        dtype = config.compute_dtype
        x = nn.Embed(config.vocab, config.width, dtype=dtype, name="embed")(tokens)
        for i in range(config.depth):
            x = Block(config, name=f"block_{i}")(x)
        x = nn.RMSNorm(dtype=dtype)(x)
        logits = nn.Dense(config.vocab, use_bias=False, dtype=dtype, name="head")(x)
        return logits.astype(jnp.float32)
