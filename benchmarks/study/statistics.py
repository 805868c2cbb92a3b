"""Paired statistics over few seeds: intervals, effect sizes, tests, corrections."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special  # jax depends on it
import scipy.stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and where it lies with :data:`CONFIDENCE`.

    Attributes:
      mean: of the values.
      spread: their standard deviation; NaN for one value.
      low: where the interval begins; NaN for one value.
      high: where it ends.
    """

    mean: float
    spread: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    r"""Student's interval for a mean.

    .. math:: \bar d \pm t_{0.975,\,n-1} \frac{s_d}{\sqrt n}

    Args:
      values: independent ones, at least one.

    Raises:
      ValueError: no values.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    mean, spread = float(np.mean(values)), sample_spread(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan, math.nan)
    half = _half_width(spread, len(values))
    return Interval(mean, spread, mean - half, mean + half)


def difference(reference: Sequence[float], other: Sequence[float]) -> Interval:
    """The interval of ``other - reference`` over pairs.

    Args:
      reference: a number for each pair.
      other: the numbers that they pair with, in the same order.

    Raises:
      ValueError: other lengths, or nothing to compare.
    """
    return interval([y - x for x, y in zip(reference, other, strict=True)])


def effect_size(differences: Sequence[float]) -> float:
    r"""Cohen's :math:`d_z` of paired differences, with Hedges' correction.

    .. math::
      J(n-1)\,\frac{\bar d}{s_d},\qquad
      J(\nu) = \frac{\Gamma(\nu/2)}{\sqrt{\nu/2}\;\Gamma((\nu-1)/2)}

    Returns:
      the effect in standard deviations of the differences; NaN for less than three
      pairs, where no correction exists, and for differences without a spread.
    """
    degrees = len(differences) - 1
    spread = sample_spread(differences)
    if degrees < 2 or _are_equal(differences):
        return math.nan
    gammas = scipy.special.gammaln([degrees / 2, (degrees - 1) / 2])
    correction = math.exp(gammas[0] - gammas[1]) / math.sqrt(degrees / 2)
    return correction * float(np.mean(differences)) / spread


def p_value(differences: Sequence[float]) -> float:
    """The paired t-test, two-sided: how likely means this far from 0 are by chance.

    Returns:
      NaN for one pair, and for equal differences other than 0, which a test that
      learns the noise from the spread cannot judge; 1 where all differences are 0.
    """
    count, spread = len(differences), sample_spread(differences)
    mean = float(np.mean(differences))
    if _are_equal(differences):
        return 1.0 if mean == 0 else math.nan
    statistic = abs(mean) / (spread / math.sqrt(count))
    return float(2 * scipy.stats.t.sf(statistic, count - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Holm's correction: p-values that hold for all comparisons together.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)})

    Args:
      p_values: one for each comparison. NaN is not counted and stays NaN.
    """
    values = np.asarray(p_values, np.float64)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted = values.copy()
    adjusted[order] = np.maximum.accumulate(np.minimum(1, factors * values[order]))
    return adjusted.tolist()


def seeds_to_decide(found: Interval, bound: float, most: int = 1000) -> int | None:
    """How many seeds would leave the bound outside, were mean and spread to stay.

    Args:
      found: from the seeds at hand, two or more.
      bound: what the mean is compared with.
      most: where to stop looking.

    Returns:
      None where more than ``most`` would be needed.
    """
    distance = abs(found.mean - bound)
    for count in range(2, most + 1):
        if _half_width(found.spread, count) < distance:
            return count
    return None


def sample_spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample; NaN for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _are_equal(values: Sequence[float]) -> bool:
    """Whether arithmetic alone tells the values apart."""
    return float(np.ptp(values)) <= 1e-12 * float(np.max(np.abs(values)))


def _half_width(spread: float, count: int) -> float:
    quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return float(quantile) * spread / math.sqrt(count)
