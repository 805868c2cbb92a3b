"""Paired differences between runs of the same seeds, with confidence intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.study.statistics import difference, sample_spread

REFERENCE = "float32"
MARGIN = 0.005
"""Of the loss: what 4 bits may cost."""


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
            row[f"{measure}_spread"] = sample_spread(values)
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
