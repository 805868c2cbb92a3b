"""A small decoder over tokenised bars, with two heads.

    tokens of a day, one a stock -> sum of embeddings -> depth x (attention, MLP)
        -> the logits of the next day's tokens, and today's portfolio

Its layers are those of examples/lm. It is causal: what comes out for a day knows that
day and those before. Shapes in comments: B batch, T days, N stocks, V bins, D width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

# Block takes any config of width, heads and compute_dtype.
from examples.lm.model import Block, check_heads


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
        check_heads(self.width, self.heads)


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
