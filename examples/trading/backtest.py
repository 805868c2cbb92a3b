"""What a policy earns in the environment, and how sure that is.

Intervals are those of the stationary bootstrap of Politis and Romano (1994): days are
drawn again in blocks of random, geometric length, so that what hangs together over days
stays together. Two policies are compared on the same drawn days.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np

DAYS = 252  # trading days of a year

Policy = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]
"""(observation, info) -> action."""


class Episode(NamedTuple):
    """A run through a market, by day of the decision.

    Attributes:
      dates: (days,) datetime64[D].
      rewards: (days,) log returns until the next close, costs included.
      turnovers: (days,) traded on the close, as fractions of the portfolio.
    """

    dates: np.ndarray
    rewards: np.ndarray
    turnovers: np.ndarray


def rollout(env: gymnasium.Env, policy: Policy) -> Episode:
    """Lets the policy act until the market ends."""
    observation, info = env.reset()
    dates, rewards, turnovers, over = [], [], [], False
    while not over:
        dates.append(info["date"])
        action = policy(observation, info)
        observation, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        turnovers.append(info["turnover"])
        over = terminated or truncated
    return Episode(np.array(dates), np.array(rewards), np.array(turnovers))


# --- what an agent has to be compared with


def equal_weight_daily(observation, info):
    return np.full_like(info["held"], 1 / info["held"].size)


class EqualWeightMonthly:
    """Equal weights on the first trading day of a month, then whatever they become."""

    def __init__(self):
        self._month = None

    def __call__(self, observation, info):
        month = info["date"].astype("datetime64[M]")
        if month == self._month:
            return info["held"]
        self._month = month
        return equal_weight_daily(observation, info)


class BuyAndHold:
    """Equal weights on the first day, and no trade ever after."""

    def __init__(self):
        self._bought = False

    def __call__(self, observation, info):
        if self._bought:
            return info["held"]
        self._bought = True
        return equal_weight_daily(observation, info)


BASELINES: dict[str, Callable[[], Policy]] = {
    "buy and hold": BuyAndHold,
    "equal weight, monthly": EqualWeightMonthly,
    "equal weight, daily": lambda: equal_weight_daily,
}


# --- figures, of log returns whose last axis is days


def annual_return(rewards: np.ndarray) -> np.ndarray:
    """Growth in a year, compounded."""
    return np.expm1(DAYS * np.mean(rewards, axis=-1))


def sharpe(rewards: np.ndarray) -> np.ndarray:
    """Mean over standard deviation of simple returns, a year's; cash earns nothing.

    0 where nothing moves.
    """
    returns = np.expm1(rewards)
    mean, deviation = returns.mean(axis=-1), returns.std(axis=-1, ddof=1)
    still = deviation < 1e-12
    return np.where(still, 0.0, np.sqrt(DAYS) * mean / np.where(still, 1.0, deviation))


def max_drawdown(rewards: np.ndarray) -> np.ndarray:
    """The largest loss since a peak of wealth, the start among the peaks; 0 to 1."""
    log_wealth = np.cumsum(rewards, axis=-1)
    peaks = np.maximum(np.maximum.accumulate(log_wealth, axis=-1), 0.0)
    return -np.expm1(np.min(log_wealth - peaks, axis=-1))


FIGURES = {
    "sharpe": sharpe,
    "annual_return": annual_return,
    "max_drawdown": max_drawdown,
}


def stationary_bootstrap(
    days: int, block: float, resamples: int, seed: int
) -> np.ndarray:
    """Days drawn in blocks, (resamples, days) indices.

    A block begins anywhere, has a geometric length with mean `block`, and goes on with
    the first day after the last.
    """
    rng = np.random.default_rng(seed)
    begins = rng.random((resamples, days)) < 1 / block
    begins[:, 0] = True
    at = np.arange(days)
    latest = np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    start = rng.integers(days, size=(resamples, days))
    return (np.take_along_axis(start, latest, axis=1) + at - latest) % days


def interval(samples: np.ndarray) -> list[float]:
    """The middle 95 %."""
    return [float(x) for x in np.quantile(samples, (0.025, 0.975))]


def compare(
    agent: Episode,
    baselines: Mapping[str, Episode],
    *,
    block: float = 20,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The agent's figures, with 95 % intervals, beside those of the baselines.

    Args:
      agent: through the same days as the baselines.
      baselines: by name.
      block: mean length of the bootstrap's blocks, in days.
      resamples: number of times that the days are drawn.
      seed: of the draws.

    Returns:
      FIGURES and "turnover" of the agent by name; their "intervals"; the same for each
      of the "baselines", with the agent's "difference" from it and its interval.
    """
    drawn = stationary_bootstrap(len(agent.rewards), block, resamples, seed)

    def samples(episode):
        rewards = episode.rewards[drawn]
        found = {name: figure(rewards) for name, figure in FIGURES.items()}
        return found | {"turnover": DAYS * episode.turnovers[drawn].mean(axis=-1)}

    def figures(episode):
        found = {name: float(f(episode.rewards)) for name, f in FIGURES.items()}
        return found | {"turnover": float(DAYS * episode.turnovers.mean())}

    def intervals(found):
        return {name: interval(values) for name, values in found.items()}

    own, own_samples = figures(agent), samples(agent)
    result = own | {"intervals": intervals(own_samples), "baselines": {}}
    for name, episode in baselines.items():
        theirs, their_samples = figures(episode), samples(episode)
        result["baselines"][name] = theirs | {
            "intervals": intervals(their_samples),
            "difference": {key: own[key] - theirs[key] for key in own},
            "difference_intervals": intervals(
                {key: own_samples[key] - their_samples[key] for key in own}
            ),
        }
    return result
