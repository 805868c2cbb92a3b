"""A portfolio of stocks: a gymnasium environment, and its rewards as a JAX function.

A day is one step. On the close of day t the agent sees the bars up to t and names the
weights that it wants; it trades at that close and pays for it; the portfolio then earns
the returns from t to t + 1.

    reward_t = log(1 - cost * turnover_t) + log(1 + w_t . r_{t+1})

The sum of the rewards is the log of the wealth. What is not in stocks is cash, which
earns nothing. `rewards` is the same for whole sequences, under jit, with gradients.
"""

from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from examples.trading.data import Market


class TradingEnv(gymnasium.Env):
    """Daily trading of the stocks of a market, from cash, until its last day.

    Observation: (context, stocks) tokens of the last days, today's last.
    Action: (stocks,) weights of the portfolio, from 0 to 1. The rest is cash; weights
    that sum to more than 1 are scaled down to 1.
    Reward: the portfolio's log return until the next close, costs included.
    Info: "date" of the observation, "held" weights before the next trade, "turnover" of
    the last trade, "wealth" (1 at the start).

    Args:
      market: days before the first decision, `context - 1` of them, then the others.
      context: days in an observation.
      bins: number of tokens.
      cost: of a trade, as a fraction of what is bought or sold.
    """

    metadata = {"render_modes": []}

    def __init__(self, market: Market, *, context: int, bins: int, cost: float):
        days, stocks = market.tokens.shape
        if days <= context:
            raise ValueError(
                f"{days} days from {market.dates[0]} on are too few for an observation "
                f"of {context} days and a day to earn on"
            )
        self._market, self._context, self._cost = market, context, cost
        self._day = days - 1
        self.observation_space = gymnasium.spaces.MultiDiscrete(
            np.full((context, stocks), bins), dtype=np.uint8
        )
        self.action_space = gymnasium.spaces.Box(0.0, 1.0, (stocks,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self._day = self._context - 1
        self._held = np.zeros(self.action_space.shape)
        self._wealth = 1.0
        return self._observation(), self._info(turnover=0.0)

    def step(self, action):
        if self._day == len(self._market.dates) - 1:
            raise ValueError(
                f"the market ends on {self._market.dates[-1]}: call reset before step"
            )
        weights = target_weights(action, self._held.shape)
        turnover = np.abs(weights - self._held).sum()
        self._day += 1
        returns = self._market.returns[self._day].astype(np.float64)
        growth = 1 + weights @ returns
        reward = np.log1p(-self._cost * turnover) + np.log(growth)
        self._held = weights * (1 + returns) / growth
        self._wealth *= np.exp(reward)
        over = self._day == len(self._market.dates) - 1
        return (
            self._observation(),
            float(reward),
            False,
            over,  # truncated: time is up, nothing has failed
            self._info(turnover),
        )

    def _observation(self) -> np.ndarray:
        return self._market.tokens[self._day + 1 - self._context : self._day + 1].copy()

    def _info(self, turnover: float) -> dict[str, Any]:
        return {
            "date": self._market.dates[self._day],
            "held": self._held.copy(),
            "turnover": float(turnover),
            "wealth": float(self._wealth),
        }


def target_weights(action, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of the stocks that an action asks for.

    Raises:
      ValueError: not of the shape, negative or not finite.
    """
    weights = np.asarray(action, np.float64)
    if weights.shape != shape:
        raise ValueError(f"the action is {weights.shape}; weights are {shape}")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(
            f"weight {weights.min()} in an action; weights are finite and not negative"
        )
    return weights / max(1.0, weights.sum())


def rewards(weights, returns, cost: float) -> tuple[jax.Array, jax.Array]:
    """The environment's rewards of weights in a row, from cash.

    What is held before a trade depends on the trade of the day before alone, and so
    all days are computed at once.

    Args:
      weights: (..., days, stocks), each summing to 1 at most.
      returns: of the same shape; returns[t] is what weights[t] earn.
      cost: of a trade, as a fraction of what is bought or sold.

    Returns:
      Rewards and turnovers, each (..., days).
    """
    growth = 1 + jnp.sum(weights * returns, axis=-1)
    drifted = weights * (1 + returns) / growth[..., None]
    cash = jnp.zeros_like(drifted[..., :1, :])
    held = jnp.concatenate([cash, drifted[..., :-1, :]], axis=-2)
    turnover = jnp.abs(weights - held).sum(axis=-1)
    return jnp.log1p(-cost * turnover) + jnp.log(growth), turnover
