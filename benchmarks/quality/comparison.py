"""Paired differences between runs of the same seeds, with confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats  # jax depends on it

REFERENCE = "float32"
CONFIDENCE = 0.95
MARGIN = 0.005
"""Of the loss: what 4 bits may cost."""


class Difference(NamedTuple):
    """The mean of paired differences.

    Attributes:
      mean: of ``other - reference`` over the pairs.
      spread: their standard deviation; NaN for one pair.
      low: where the interval of confidence begins; NaN for one pair.
      high: where it ends.
    """

    mean: float
    spread: float
    low: float
    high: float


def difference(reference: Sequence[float], other: Sequence[float]) -> Difference:
    r"""Student's interval for the mean of paired differences.

    .. math::
      \bar d \pm t_{0.975,\,n-1} \frac{s_d}{\sqrt n},\qquad d_i = y_i - x_i

    Args:
      reference: a number for each pair.
      other: the numbers that they pair with, in the same order.

    Raises:
      ValueError: other lengths, or nothing to compare.
    """
    pairs = [y - x for x, y in zip(reference, other, strict=True)]
    mean, spread = float(np.mean(pairs)), _spread(pairs)
    if len(pairs) == 1:
        return Difference(mean, math.nan, math.nan, math.nan)
    quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)
    half = float(quantile) * spread / math.sqrt(len(pairs))
    return Difference(mean, spread, mean - half, mean + half)


def summarize(
    runs: Sequence[Mapping[str, Any]], reference: tuple[str, str] | None = None
) -> list[dict[str, Any]]:
    """A row for each workload, optimizer and storage, in the order of the runs.

    Differences are over the seeds that both have, in nats and as shares of the
    reference's mean. "indistinguishable": the interval holds 0. "mean_within",
    "interval_within": the mean, or the whole interval, costs at most 0.5 % of the loss;
    being better is never held against a condition.

    Args:
      runs: of any conditions.
      reference: the optimizer and the storage that all are compared with; None for
        float32 of the same optimizer.
    """
    groups: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        key = run["workload"], run["optimizer"], run["storage"]
        groups.setdefault(key, {})[run["seed"]] = run
    rows = []
    for key, group in groups.items():
        workload, optimizer, _ = key
        other = (workload, *(reference or (optimizer, REFERENCE)))
        rows.append(_row(key, group, {} if key == other else groups.get(other, {})))
    return rows


def _row(
    key: tuple[str, str, str],
    group: Mapping[int, Mapping[str, Any]],
    reference: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    row: dict[str, Any] = dict(
        zip(("workload", "optimizer", "storage"), key, strict=True)
    )
    row["seeds"] = sorted(group)
    row["bytes_per_parameter"] = next(iter(group.values()))["bytes_per_parameter"]
    for measure in ("loss", "train_loss", "accuracy"):
        values = [run[measure] for run in group.values() if measure in run]
        if values:
            row[measure] = float(np.mean(values))
            row[f"{measure}_spread"] = _spread(values)
    shared = [seed for seed in group if seed in reference]
    if not shared:
        return row
    for measure in ("loss", "train_loss"):
        base = [reference[seed][measure] for seed in shared]
        found = difference(base, [group[seed][measure] for seed in shared])
        scale = float(np.mean(base))
        row[f"{measure}_difference"] = found._asdict()
        row[f"{measure}_relative"] = {k: v / scale for k, v in found._asdict().items()}
    relative = row["loss_relative"]
    row["indistinguishable"] = relative["low"] <= 0 <= relative["high"]
    row["mean_within"] = relative["mean"] <= MARGIN
    row["interval_within"] = relative["high"] <= MARGIN
    return row


def _spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample; NaN for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
