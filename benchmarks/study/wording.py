"""How numbers of a study are written: few digits, units that people read."""

import math
from collections.abc import Mapping
from typing import Any

LABELS = {
    "parameters": "Parameters",
    "bytes_per_parameter": "Bytes a parameter",
    "bytes.weights": "Weights",
    "bytes.residual": "Residual",
    "bytes.optimizer state": "Optimizer state",
    "bytes.gradients": "Gradients",
    "peak_bytes.live": "Live memory",
    "peak_bytes.compiled": "Step's memory, by the compiler",
    "peak_bytes.allocator": "Peak memory, by the allocator",
    "checkpoint_bytes": "Checkpoint",
    "seconds": "Train time",
    "step_seconds": "Step time",
    "units_per_second": "Throughput",
    "train_loss": "Train loss",
    "val_loss": "Validation loss",
    "gradient_norm": "Gradient norm",
    "nonfinite": "Steps with NaN or infinity",
    "diverged": "Diverged",
    "metrics.bits_per_byte": "Bits per byte",
}
SHARES = ("metrics.accuracy", "metrics.max_drawdown", "metrics.annual_return")
"""Metrics that are shares of 1 and read best in per cent."""
TIMES = ("seconds", "step_seconds")
MINUS, NARROW = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"


def label(metric: str) -> str:
    """A metric's name for readers."""
    last = metric.rsplit(".", 1)[-1].replace("_", " ")
    return LABELS.get(metric, last[:1].upper() + last[1:])


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; a dash for what is unknown."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e9:
        return f"{value:.{digits - 1}g}".replace("-", MINUS)
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    return f"{rounded:,.{max(0, decimals)}f}".replace("-", MINUS)


def percent(share: float | None, *, signed: bool = True) -> str:
    """A share of 1 in per cent."""
    if share is None or not math.isfinite(share):
        return number(share)
    decimals = 1 if abs(share) >= 0.0995 else 2
    text = f"{100 * share:{'+' if signed else ''}.{decimals}f}"
    if float(text) == 0:
        text = "0"
    return text.replace("-", MINUS) + f"{NARROW}%"


def size(count: float | None) -> str:
    """Bytes in a unit that leaves few digits."""
    if count is None or not math.isfinite(count):
        return number(count)
    sign, count = (MINUS if count < 0 else ""), abs(count)
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{sign}{number(count / 1024**power, 3)}{NARROW}{unit}"
    return f"{sign}{count:.0f}{NARROW}B"


def duration(seconds: float | None) -> str:
    """Milliseconds to hours."""
    if seconds is None or not math.isfinite(seconds):
        return number(seconds)
    if 0 < abs(seconds) < 1:
        return f"{number(1000 * seconds, 3)}{NARROW}ms"
    sign, seconds = (MINUS if seconds < 0 else ""), abs(seconds)
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{sign}{number(seconds / length, 3)}{NARROW}{unit}"
    return f"{sign}{number(seconds, 3)}{NARROW}s"


def amount(metric: str, value: float | None, units: str = "") -> str:
    """A metric's value in its unit.

    Args:
      metric: a dotted path.
      value: the number; None where unknown.
      units: what throughput counts, as in "tokens".
    """
    if value is None or not math.isfinite(value):
        return number(value)
    if _is_bytes(metric):
        return size(value)
    if metric in TIMES:
        return duration(value)
    if metric == "units_per_second":
        return f"{number(value, 3)}{NARROW}{units or 'units'}/s"
    if metric in SHARES:
        return percent(value, signed=False)
    if metric in ("parameters", "nonfinite", "diverged", "steps"):
        return f"{value:,.0f}" if value == int(value) else number(value, 3)
    return number(value)


def change(metric: str, compare: str, value: float | None) -> str:
    """A compared value, with its sign where it is a change."""
    if compare == "value" or value is None or not math.isfinite(value):
        return amount(metric, value)
    if compare == "relative":
        return percent(value)
    if compare == "ratio":
        return f"×{NARROW}{number(value, 3)}"
    sign = "+" if value > 0 else ""
    if metric in SHARES:
        return percent(value).replace(f"{NARROW}%", f"{NARROW}points")
    if _is_bytes(metric) or metric in TIMES:
        return sign + amount(metric, value)
    return sign + number(value, 3 if abs(value) >= 0.1 else 2)


def span(metric: str, compare: str, low: float, high: float) -> str:
    """An interval of a compared value, in brackets, its unit written once."""
    first, last = change(metric, compare, low), change(metric, compare, high)
    unit = first.partition(NARROW)[2]
    if unit and last.endswith(NARROW + unit):
        first = first.removesuffix(NARROW + unit)
    return f"[{first}, {last}]"


def _is_bytes(metric: str) -> bool:
    return metric.split(".")[0] in ("bytes", "peak_bytes", "checkpoint_bytes")


def bounds(criterion: Mapping[str, Any]) -> str:
    """What a criterion asks of its metric, as in "Live memory: at most −20 %"."""
    metric, compare = criterion["metric"], criterion.get("compare", "value")
    name = {"loss": "Loss", "grad_norm": "Gradient norm"}.get(metric, label(metric))
    asked = [
        f"{words} {_bound(metric, compare, criterion[key])}"
        for key, words in (("at_most", "at most"), ("at_least", "at least"))
        if key in criterion
    ]
    step = criterion.get("after_step")
    after = "" if step is None else f" after step {step:,}"
    return f"{name}: {' and '.join(asked)}{after}"


def _bound(metric: str, compare: str, value: float) -> str:
    """As it was written, without digits that nobody asked for."""
    if compare == "relative" or metric in SHARES:
        unit = "%" if compare in ("relative", "value") else "points"
        sign = "" if compare == "value" else "+"
        text = f"{100 * value:{sign}g}{NARROW}{unit}"
    elif compare == "ratio":
        text = f"×{NARROW}{value:g}"
    elif _is_bytes(metric) or metric in TIMES:
        text = amount(metric, value)
    else:
        text = f"{value:{'+' if compare == 'difference' else ''}g}"
    return text.replace("-", MINUS)


def listed(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
