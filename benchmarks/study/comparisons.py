"""Every metric of every condition beside its reference's, paired by seed."""

import math
from typing import Any

from . import document as doc
from .document import Document
from .statistics import effect_size, holm, interval, p_value, sample_spread

METRICS = (
    "peak_bytes.live",
    "peak_bytes.compiled",
    "peak_bytes.allocator",
    "checkpoint_bytes",
    "units_per_second",
    "step_seconds",
    "seconds",
    "train_loss",
    "val_loss",
    "gradient_norm",
)
"""Of all trainers; the "metrics" of each, and those of criteria, come after them."""


def metrics(document: Document, model: str) -> list[str]:
    """The metrics that some run of a model knows, in the order they are shown."""
    runs = [run for run in doc.finished(document) if run["model"] == model]
    own = [
        f"metrics.{name}"
        for run in runs
        for name in ((run.get("summary") or {}).get("metrics") or {})
    ]
    asked = [
        criterion["metric"]
        for criterion in document["study"].get("criteria", [])
        if criterion.get("kind") != "abort"
        and not doc.is_any(criterion["metric"], doc.EVENTS)
    ]
    names = dict.fromkeys([*METRICS, *own, *asked])
    return [name for name in names if doc.known([doc.value(run, name) for run in runs])]


def comparisons(document: Document) -> list[dict[str, Any]]:
    """A row for each model, metric and condition, those without values left out.

    Args:
      document: a study's JSON.

    Returns:
      rows with "seeds" and "mean" and "spread" over them; for conditions that have a
      reference "pairs", "difference" and "relative" (mean, spread, low, high),
      "effect" (d_z, corrected), "p" of the paired t-test and "p_adjusted" by Holm over
      all rows. Broken runs are compared by bytes and throughput alone.
    """
    rows = [
        row
        for model in doc.models(document)
        for metric in metrics(document, model)
        for condition in doc.conditions(document, model)
        if (row := _row(document, model, condition, metric)) is not None
    ]
    adjusted = holm([math.nan if row["p"] is None else row["p"] for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        row["p_adjusted"] = None if math.isnan(p) else p
    return rows


def _row(
    document: Document, model: str, condition: str, metric: str
) -> dict[str, Any] | None:
    reference = doc.reference(document, condition)
    runs = doc.group(document, model, condition)
    bases = doc.group(document, model, reference)
    if metric == "seconds" or doc.is_any(metric, doc.QUALITY):
        runs, bases = doc.whole(runs), doc.whole(bases)
    values = doc.known([doc.value(run, metric) for run in runs.values()])
    if not values:
        return None
    spread = sample_spread(values)
    row: dict[str, Any] = {
        "model": model,
        "condition": condition,
        "reference": reference,
        "metric": metric,
        "seeds": len(values),
        "mean": math.fsum(values) / len(values),
        "spread": None if math.isnan(spread) else spread,
        **dict.fromkeys(("difference", "relative", "effect", "p", "p_adjusted")),
    }
    exact = doc.is_any(metric, doc.EXACT)
    for compare in ("relative", "difference"):
        pairs = doc.known(
            [doc.compared(r, bases.get(s), metric, compare) for s, r in runs.items()]
        )
        row["pairs"] = len(pairs)
        if pairs:
            found = interval(pairs)
            if exact:
                found = found._replace(low=min(pairs), high=max(pairs))
            row[compare] = doc.plain(found)
    if row["difference"] and not exact:
        effect, p = effect_size(pairs), p_value(pairs)
        row["effect"] = None if math.isnan(effect) else effect
        row["p"] = None if math.isnan(p) else p
    return row
