"""What is kept of a run: an entry of study.json."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.definition import Run

POINTS = 200


def record(
    run: Run,
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    wall_seconds: float,
) -> dict[str, Any]:
    """The entry of a run that came to an end by itself or by a criterion."""
    # The options are the run's already; where its folder is means nothing elsewhere.
    summary = {name: x for name, x in summary.items() if name != "config"}
    steps = summary.get("steps")
    summary["step_seconds"] = summary["seconds"] / steps if steps else None
    live = summary["peak_bytes"]["live"]
    summary["bytes_per_parameter"] = live / summary["parameters"]
    if broken := [row["step"] for row in history if _broken(row)]:
        status = "diverged"
        reason = f"loss or gradient norm is not finite at step {broken[0]}"
    elif summary["stopped"] is not None:
        status, reason = "aborted", summary["stopped"]
    elif summary["diverged"]:
        status = "diverged"
        first, last = history[0]["loss"], summary["train_loss"]
        reason = f"the last losses are {last:.4g}, the first {first:.4g}"
    else:
        status, reason = "done", None
    return {
        **_identity(run),
        "status": status,
        "reason": reason,
        "config": dict(run.config),
        "summary": summary,
        "curve": curve(history),
        "validation": {
            "step": [row["step"] for row in history if "val_loss" in row],
            "loss": [row["val_loss"] for row in history if "val_loss" in row],
        },
        "wall_seconds": wall_seconds,
    }


def failure(run: Run, reason: str, wall_seconds: float) -> dict[str, Any]:
    """The entry of a run that ended by an error or a signal."""
    empty: dict[str, list[Any]] = {"step": [], "loss": []}
    return {
        **_identity(run),
        "status": "failed",
        "reason": reason,
        "config": dict(run.config),
        "summary": None,
        "curve": empty | {"grad_norm": []},
        "validation": empty,
        "wall_seconds": wall_seconds,
    }


def curve(history: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Steps, losses and gradient norms: means of at most POINTS equal parts."""
    size = math.ceil(len(history) / POINTS) or 1
    parts = [history[i : i + size] for i in range(0, len(history), size)]
    return {
        key: [_mean([row[key] for row in part if key in row]) for part in parts]
        for key in ("step", "loss", "grad_norm")
    }


def stop_reason(
    criteria: Sequence[Mapping[str, Any]], row: Mapping[str, Any]
) -> str | None:
    """Why a run should end after this row of its history, None if it should not."""
    if _broken(row):
        return f"loss or gradient norm is not finite at step {row['step']}"
    for criterion in criteria:
        metric = criterion["metric"]
        if metric not in row or row["step"] <= criterion.get("after_step", 0):
            continue
        value = row[metric]
        low = criterion.get("at_least", -math.inf)
        high = criterion.get("at_most", math.inf)
        if not low <= value <= high:
            side, bound = ("below", low) if value < low else ("above", high)
            return (
                f"{criterion['name']}: {metric} is {value:.4g} at step {row['step']}, "
                f"{side} {bound:g}"
            )
    return None


def _identity(run: Run) -> dict[str, Any]:
    return {"model": run.model, "condition": run.condition, "seed": run.seed}


def _broken(row: Mapping[str, Any]) -> bool:
    values = (row.get("loss"), row.get("grad_norm"))
    return any(value is not None and not math.isfinite(value) for value in values)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
