"""A small decoder over tokenised bars, with two heads.

    tokens of a day, one a stock -> sum of embeddings -> depth x (attention, MLP)
        -> the logits of the next day's tokens, and today's portfolio

Pre-norm, rotary positions, squared-ReLU MLP, no bias anywhere. It is causal: what comes
out for a day knows that day and those before. Shapes in comments: B batch, T days, N
stocks, V bins, D width, H heads, K = D / H.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Sizes of the model, and the dtype it computes in; weights start in float32."""

    stocks: int
    bins: int
    depth: int
    width: int
    heads: int
    dropout: float
    compute_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if self.width % (32 * self.heads):
            raise ValueError(
                f"width {self.width} does not split into {self.heads} heads whose size "
                "is a multiple of 32; choose width = 32 * heads * n"
            )


def rotate(x):  # (B, T, H, K)
    """Rotary positions: products of queries and keys depend on their distance alone."""
    time, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(time)[:, None, None] * 1000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nn.Module):
    """Causal self-attention, then an MLP, each added to its input."""

    config: AgentConfig

    @nn.compact
    def __call__(self, x):  # (B, T, D) -> (B, T, D)
        config = self.config
        heads = (config.heads, config.width // config.heads)

        def dense(name, features, **kwargs):
            return nn.Dense(
                features,
                use_bias=False,
                dtype=config.compute_dtype,
                name=name,
                **kwargs,
            )

        zeros = nn.initializers.zeros  # the model begins without its layers
        y = nn.RMSNorm(dtype=config.compute_dtype)(x)
        q, k, v = jnp.split(dense("qkv", 3 * config.width)(y), 3, axis=-1)
        q, k, v = (z.reshape(*z.shape[:-1], *heads) for z in (q, k, v))  # (B, T, H, K)
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + dense("out", config.width, kernel_init=zeros)(y.reshape(x.shape))

        y = nn.RMSNorm(dtype=config.compute_dtype)(x)
        y = jnp.square(nn.relu(dense("up", 4 * config.width)(y)))  # (B, T, 4D)
        return x + dense("down", config.width, kernel_init=zeros)(y)


class Agent(nn.Module):
    """Tokens in; the next tokens' logits and the log weights of a portfolio out.

    The portfolio is a softmax over all stocks and, last, cash: long only, no debt. It
    starts at equal weights, because its layer starts at zero.
    """

    config: AgentConfig

    @nn.compact
    def __call__(self, tokens, training=False):
        # (B, T, N) integers -> (B, T, N, V) logits, (B, T, N + 1) log weights
        config = self.config
        dtype, vocab = config.compute_dtype, config.stocks * config.bins
        own = tokens.astype(jnp.int32) + config.bins * jnp.arange(config.stocks)
        x = nn.Embed(vocab, config.width, dtype=dtype, name="embed")(own)
        # Whole bars are dropped. Else the tokens of a day tell which day it is, and
        # what it earned is learned by heart.
        drop = nn.Dropout(config.dropout, broadcast_dims=(-1,))
        x = drop(x, deterministic=not training).sum(axis=-2)
        for i in range(config.depth):
            x = Block(config, name=f"block_{i}")(x)
        x = nn.RMSNorm(dtype=dtype)(x)
        logits = nn.Dense(vocab, use_bias=False, dtype=dtype, name="head")(x)
        portfolio = nn.Dense(
            config.stocks + 1,
            use_bias=False,
            dtype=dtype,
            kernel_init=nn.initializers.zeros,
            name="portfolio_head",
        )(x)
        return (
            logits.astype(jnp.float32).reshape(*tokens.shape, config.bins),
            jax.nn.log_softmax(portfolio.astype(jnp.float32)),
        )
