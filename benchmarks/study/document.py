"""What a study's JSON says: who is compared with whom, what was planned, what ran.

A document is the parsed study.json: "study", "preset", "machine" and "runs".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Document = Mapping[str, Any]
Run = Mapping[str, Any]

EXACT = ("parameters", "bytes.", "bytes_per_parameter")
EXACT += ("peak_bytes.live", "peak_bytes.compiled")
"""Metrics that arithmetic decides: one seed is enough."""
EVENTS = ("diverged", "nonfinite")
"""Metrics where each run counts, not their mean."""
QUALITY = ("train_loss", "val_loss", "metrics.", "gradient_norm")
"""Metrics that a run which broke down fails."""
BROKEN = ("diverged", "aborted")
"""States of a run that broke down."""


def seeds(document: Document) -> list[int]:
    """The seeds of the document's preset."""
    return list(document["study"]["presets"][document["preset"]].get("seeds", [0]))


def models(document: Document) -> list[str]:
    return list(document["study"]["models"])


def conditions(document: Document, model: str) -> list[str]:
    """The conditions that a model is trained under, in the study's order."""
    found = document["study"]["conditions"]
    return [name for name in found if model in found[name].get("models", [model])]


def reference(document: Document, condition: str) -> str | None:
    """What a condition is compared with.

    A condition that others are compared with has no reference itself, unless its own
    table names one.
    """
    study = document["study"]
    everyones = study.get("reference")
    named = {name: c.get("reference") for name, c in study["conditions"].items()}
    own = named[condition]
    if own is None and condition not in {everyones, *named.values()}:
        own = everyones
    return None if own == condition else own


def planned(document: Document) -> list[tuple[str, str, int]]:
    """Model, condition and seed of every run that the study asks for."""
    return [
        (model, condition, seed)
        for model in models(document)
        for condition in conditions(document, model)
        for seed in seeds(document)
    ]


def finished(document: Document) -> list[Run]:
    """The planned runs that were made, whatever their end, in the planned order."""
    found = {
        (run["model"], run["condition"], run["seed"]): run for run in _runs(document)
    }
    return [found[key] for key in planned(document) if key in found]


def group(document: Document, model: str, condition: str | None) -> dict[int, Run]:
    """The finished runs of a model under a condition, by seed."""
    return {
        run["seed"]: run
        for run in finished(document)
        if (run["model"], run["condition"]) == (model, condition)
    }


def title(document: Document, kind: str, name: str) -> str:
    """The title of one of the study's "models" or "conditions"."""
    return document["study"][kind][name].get("title", name)


def value(run: Run, metric: str) -> float | None:
    """A number of a run's summary.

    Args:
      run: of a study.
      metric: a dotted path, as in "peak_bytes.live".

    Returns:
      None where the run does not know it; NaN and infinities as they are.
    """
    found: Any = run.get("summary")
    for part in metric.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else None


def is_any(metric: str, names: Sequence[str]) -> bool:
    """Whether a metric is one of the names, or inside of one that ends in a dot."""
    return any(
        metric == name or (name.endswith(".") and metric.startswith(name))
        for name in names
    )


def broken(run: Run) -> bool:
    """Whether a run diverged or was aborted."""
    summary = run.get("summary") or {}
    return run.get("status") in BROKEN or bool(summary.get("diverged"))


def whole(runs: Mapping[int, Run]) -> dict[int, Run]:
    """Without those that broke down."""
    return {seed: run for seed, run in runs.items() if not broken(run)}


def compared(run: Run, base: Run | None, metric: str, compare: str) -> float | None:
    """A run's number as a criterion compares it.

    Args:
      run: of the condition.
      base: of the reference, same model and seed; unused for "value".
      metric: a dotted path into the summary.
      compare: "relative", (x - r) / r; "difference", x - r; "ratio", x / r; "value".

    Returns:
      None where one of the two does not know the metric, or the reference is 0 and
      divides.
    """
    own = value(run, metric)
    if own is None or compare == "value":
        return own
    other = None if base is None else value(base, metric)
    if other is None:
        return None
    if compare == "difference":
        return own - other
    if other == 0:
        return None
    return own / other - (1 if compare == "relative" else 0)


def known(values: Sequence[float | None]) -> list[float]:
    """The finite ones."""
    return [x for x in values if x is not None and math.isfinite(x)]


def _runs(document: Document) -> Sequence[Run]:
    return document.get("runs") or []


def plain(numbers: NamedTuple) -> dict[str, float | None]:
    """A tuple of numbers for JSON, which knows no NaN."""
    return {
        name: number if math.isfinite(number) else None
        for name, number in numbers._asdict().items()
    }
