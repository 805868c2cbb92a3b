"""What runs cost: seconds of this device, and dollars where an hour has a price."""

import math
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from . import document as doc
from .document import Document
from .statistics import interval

PRICES = pathlib.Path(__file__).with_name("costs.toml")


def costs(
    document: Document, prices: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The cost of every condition's run, and of the whole study.

    A run costs the time of its train steps: compilation, evaluation and checkpoints
    are paid for in the study's total, its wall time. Runs that broke down are in the
    total alone.

    Args:
      document: a study's JSON.
      prices: as in costs.toml; None for that file.

    Returns:
      "dollars_per_hour" (None without a price, then "why" says so), "assumption",
      "study" with "seconds" and "dollars", and "conditions": for each model and
      condition "seconds" and "dollars" of a run, and "saved", the share of the
      reference's time as "mean", "low" and "high", None where unknown.
    """
    if prices is None:
        prices = tomllib.loads(PRICES.read_text())
    machine = document.get("machine") or {}
    price, why = _price(machine, prices["dollars_per_hour"])
    total = math.fsum(run.get("wall_seconds") or 0 for run in doc.finished(document))
    return {
        "dollars_per_hour": price,
        "why": why,
        "assumption": prices.get("note", "") if price is not None else None,
        "study": {"seconds": total, "dollars": _dollars(total, price)},
        "conditions": [
            _condition(document, model, condition, price)
            for model in doc.models(document)
            for condition in doc.conditions(document, model)
        ],
    }


def _price(
    machine: Mapping[str, Any], prices: Mapping[str, float]
) -> tuple[float | None, str | None]:
    device = machine.get("device") or "an unknown device"
    if machine.get("platform", "cpu") == "cpu":
        return None, (
            "Dollars are not testable here: no GPU. Time saved is time of this CPU "
            "and says little about a GPU's."
        )
    fitting = [name for name in prices if name.lower() in device.lower()]
    if not fitting:
        return None, f"Dollars are unknown: costs.toml has no price for {device}."
    return prices[max(fitting, key=len)], None


def _dollars(seconds: float | None, price: float | None) -> float | None:
    return None if seconds is None or price is None else seconds / 3600 * price


def _condition(
    document: Document, model: str, condition: str, price: float | None
) -> dict[str, Any]:
    # Runs that were stopped took less time for no good reason.
    runs = doc.whole(doc.group(document, model, condition))
    reference = doc.reference(document, condition)
    bases = doc.whole(doc.group(document, model, reference))
    spent = doc.known([doc.value(run, "seconds") for run in runs.values()])
    mean = math.fsum(spent) / len(spent) if spent else None
    shares = doc.known(
        [
            doc.compared(run, bases.get(seed), "seconds", "relative")
            for seed, run in runs.items()
        ]
    )
    saved = interval([-share for share in shares]) if shares else None
    return {
        "model": model,
        "condition": condition,
        "reference": reference,
        "seeds": len(spent),
        "seconds": mean,
        "dollars": _dollars(mean, price),
        "saved": saved and doc.plain(saved),
    }
