"""The plots of a study's page: one question each, readable alone on a phone."""

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import document as doc
from .document import Document, Run
from .statistics import CONFIDENCE
from .wording import SHARES, label, number

COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f4fbf",
    "#8c6d31",
)  # fmt: skip
"""Tell apart without red against green."""
BYTES = ("weights", "residual", "optimizer state", "gradients")
SHADES = ("#1f4e79", "#6fa8dc", "#e69f00", "#c9c9c9")
FAVOURITES = ("perplexity", "accuracy", "sharpe")
LESS_IS_BETTER = ("metrics.perplexity", "val_loss")
PARTS = 40
"""Of a curve as it is drawn."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",  # the same data makes the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}

Row = Mapping[str, Any]


class Plot(NamedTuple):
    """A picture and what it shows, in words.

    Attributes:
      title: a heading.
      note: how to read it.
      alt: for those who cannot see it.
      svg: the picture.
    """

    title: str
    note: str
    alt: str
    svg: str


class Curve(NamedTuple):
    """Numbers over steps: their mean, least and greatest over seeds."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def plots(document: Document, model: str, rows: Sequence[Row]) -> list[Plot]:
    """The plots of a model that have something to show.

    Args:
      document: a study's JSON.
      model: one of the study's.
      rows: of :func:`comparisons.comparisons`.
    """
    rows = [row for row in rows if row["model"] == model]
    with matplotlib.rc_context(STYLE):
        found = [
            _losses(document, model),
            _validation(document, model),
            _quality(document, model, rows),
            _gradient_norms(document, model),
            _memory(document, model),
            _throughput(document, model, rows),
        ]
    return [plot for plot in found if plot is not None]


def styles(document: Document) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each condition, the same in all plots of a study."""
    names = list(document["study"]["conditions"])
    dashes = itertools.chain(
        ["-"] * len(COLORS), ["--"] * len(COLORS), itertools.repeat(":")
    )
    looks = zip(itertools.cycle(COLORS), dashes, strict=False)
    everyones = document["study"].get("reference")
    return {
        name: {"color": "black", "linestyle": "-"}
        if name == everyones
        else dict(zip(("color", "linestyle"), next(looks), strict=True))
        for name in names
    }


def curve(runs: Iterable[Run], kind: str, key: str) -> Curve | None:
    """Curves of seeds as one; steps that a seed did not reach are of the others.

    A long curve is drawn by the means of PARTS parts: of single batches none is seen.

    Args:
      runs: of one condition.
      kind: "curve" or "validation".
      key: what is drawn, as in "loss".

    Returns:
      None where no run has a finite value.
    """
    curves = [_known(run.get(kind) or {}, key) for run in runs]
    steps = {step for found in curves for step in found}
    width = math.ceil(max(steps, default=0) / PARTS) if len(steps) > PARTS else 1
    at: dict[int, list[float]] = {}
    for found in curves:
        parts: dict[int, list[float]] = {}
        for step, value in found.items():
            parts.setdefault(width * math.ceil(step / width), []).append(value)
        for step, values in parts.items():
            at.setdefault(step, []).append(float(np.mean(values)))
    if not at:
        return None
    steps = sorted(at)
    each = [at[step] for step in steps]
    return Curve(
        np.asarray(steps),
        np.asarray([np.mean(values) for values in each]),
        np.asarray([min(values) for values in each]),
        np.asarray([max(values) for values in each]),
    )


def _curves(document: Document, model: str, kind: str, key: str) -> dict[str, Curve]:
    found = {
        name: curve(doc.group(document, model, name).values(), kind, key)
        for name in doc.conditions(document, model)
    }
    return {name: lines for name, lines in found.items() if lines is not None}


def _losses(document: Document, model: str) -> Plot | None:
    return _over_steps(
        document,
        _curves(document, model, "curve", "loss"),
        "Train loss",
        "Mean over seeds; bands from the least to the greatest seed.",
    )


def _validation(document: Document, model: str) -> Plot | None:
    return _over_steps(
        document,
        _curves(document, model, "validation", "loss"),
        "Validation loss",
        "Held-out data; mean over seeds, bands from the least to the greatest.",
        marker="o",
    )


def _gradient_norms(document: Document, model: str) -> Plot | None:
    """Each run's norms over those of its reference, same seed and step."""
    ratios = {}
    for name in doc.conditions(document, model):
        bases = doc.group(document, model, doc.reference(document, name))
        runs = [
            {"curve": _ratio(run, bases[seed])}
            for seed, run in doc.group(document, model, name).items()
            if seed in bases
        ]
        found = curve(runs, "curve", "grad_norm")
        if found is not None:
            ratios[name] = found
    return _over_steps(
        document,
        ratios,
        "Gradient norm, over the reference's",
        "1: as large as in the reference's run of the same seed.",
        line=1.0,
        label="ratio",
    )


def _known(part: Mapping[str, Any], key: str) -> dict[int, float]:
    """The finite values of a curve by step."""
    pairs = zip(part.get("step", ()), part.get(key, ()), strict=False)
    return {step: value for step, value in pairs if doc.known([value])}


def _ratio(run: Run, base: Run) -> dict[str, list[float]]:
    own, other = (_known(x.get("curve") or {}, "grad_norm") for x in (run, base))
    steps = [step for step in own if other.get(step)]
    return {"step": steps, "grad_norm": [own[step] / other[step] for step in steps]}


def _over_steps(
    document: Document,
    curves: Mapping[str, Curve],
    title: str,
    note: str,
    *,
    line: float | None = None,
    marker: str = "",
    label: str = "loss",
) -> Plot | None:
    if not curves:
        return None
    figure, axes = _figure()
    looks = styles(document)
    for name, found in curves.items():
        look = looks[name]
        few = len(found.steps) < 30
        axes.plot(
            found.steps,
            found.mean,
            label=name,
            linewidth=1.4,
            marker=marker if few else "",
            markersize=3,
            **look,
        )
        axes.fill_between(
            found.steps, found.low, found.high, color=look["color"], alpha=0.15, lw=0
        )
    if line is not None:
        axes.axhline(line, color="black", linewidth=0.8)
    _focus(axes, curves)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    figure.legend(loc="outside lower center", ncols=_columns(curves), frameon=False)
    last = ", ".join(f"{n} {number(found.mean[-1])}" for n, found in curves.items())
    return Plot(
        title, note, f"{title} over steps. At the last step: {last}.", _svg(figure)
    )


def _focus(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """The first steps' heights are cut off, so that the rest can be told apart."""
    late = [found.high[len(found.high) // 20 :] for found in curves.values()]
    early = [found.low for found in curves.values()]
    heights = np.concatenate([*late, *early])
    low, high = np.min(heights), np.quantile(np.concatenate(late), 0.995)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _memory(document: Document, model: str) -> Plot | None:
    parts = {}
    for name in doc.conditions(document, model):
        for run in doc.group(document, model, name).values():
            found = {part: doc.value(run, f"bytes.{part}") for part in BYTES}
            if any(found.values()):
                parts[name] = {part: size or 0 for part, size in found.items()}
                break
    if not parts:
        return None
    largest = max(sum(sizes.values()) for sizes in parts.values())
    unit, scale = ("GiB", 2**30) if largest > 2**31 else ("MiB", 2**20)
    figure, axes = _bars(len(parts))
    places = np.arange(len(parts))
    left = np.zeros(len(parts))
    for part, shade in zip(BYTES, SHADES, strict=True):
        widths = np.asarray([sizes[part] / scale for sizes in parts.values()])
        if widths.any():
            axes.barh(places, widths, left=left, color=shade, label=part, height=0.7)
        left += widths
    _ends(axes, places, left, [f"{number(total, 3)} {unit}" for total in left])
    axes.set_yticks(places, list(parts))
    axes.set_xlabel(f"{unit}, live")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, columnspacing=1)
    alt = "; ".join(
        f"{name} {number(total, 3)} {unit}"
        for name, total in zip(parts, left, strict=True)
    )
    note = "What lives between steps, and the gradients; activations are not in it."
    return Plot("Memory", note, f"Live bytes: {alt}.", _svg(figure))


def _quality(document: Document, model: str, rows: Sequence[Row]) -> Plot | None:
    """What a byte less costs in quality."""
    metric = _favourite(rows)
    if metric is None:
        return None
    shares = metric in SHARES
    scale = 100 if shares else 1
    points = []
    for row in rows:
        if row["metric"] != metric:
            continue
        size = _bytes_per_parameter(document, model, row["condition"])
        if size is None:
            continue
        if row["reference"] is None:
            points.append((row["condition"], size, 0.0, None))
        elif row["difference"] is not None:
            found = row["difference"]
            ends = None if found["low"] is None else (found["low"], found["high"])
            points.append((row["condition"], size, found["mean"], ends))
    if len(points) < 2:
        return None
    figure, axes = _figure()
    looks = styles(document)
    axes.axhline(0, color="black", linewidth=0.8)
    for name, size, mean, ends in points:
        color = looks[name]["color"]
        if ends is not None:
            low, high = (scale * end for end in ends)
            axes.plot([size, size], [low, high], color=color, linewidth=1.6)
        face = color if looks[name]["linestyle"] == "-" else "white"
        axes.plot(
            size, scale * mean, "o", color=color, markerfacecolor=face, label=name
        )
    name = label(metric)
    unit = ", points" if shares else ""
    axes.set_xlabel("live bytes for each parameter")
    axes.set_ylabel(f"{name}, difference to reference{unit}")
    figure.legend(loc="outside lower center", ncols=_columns(points), frameon=False)
    better = "Less" if metric in LESS_IS_BETTER else "More"
    note = (
        f"Paired differences with their {100 * CONFIDENCE:.0f} % intervals. "
        f"{better} is better; further left is smaller."
    )
    alt = "; ".join(
        f"{n}: {number(size, 3)} bytes, {number(scale * mean, 3)}"
        for n, size, mean, _ in points
    )
    return Plot(f"{name} against bytes", note, f"{name}: {alt}.", _svg(figure))


def _favourite(rows: Sequence[Row]) -> str | None:
    known = [row["metric"] for row in rows]
    ordered = [f"metrics.{name}" for name in FAVOURITES] + ["val_loss"]
    return next((metric for metric in ordered if metric in known), None)


def _bytes_per_parameter(document: Document, model: str, name: str) -> float | None:
    for run in doc.group(document, model, name).values():
        size, count = doc.value(run, "peak_bytes.live"), doc.value(run, "parameters")
        if size and count:
            return size / count
    return None


def _throughput(document: Document, model: str, rows: Sequence[Row]) -> Plot | None:
    found = [row for row in rows if row["metric"] == "units_per_second"]
    if not found:
        return None
    figure, axes = _bars(len(found))
    places = np.arange(len(found))
    means = np.asarray([row["mean"] for row in found])
    spreads = [row["spread"] or 0 for row in found]
    axes.barh(places, means, xerr=spreads, color="#9db7d5", height=0.7, capsize=2)
    texts = [number(mean, 3) for mean in means]
    _ends(axes, places, means + np.asarray(spreads), texts)
    axes.set_yticks(places, [row["condition"] for row in found])
    unit = units(document, model)
    axes.set_xlabel(f"{unit} per second")
    alt = "; ".join(f"{r['condition']} {t}" for r, t in zip(found, texts, strict=True))
    note = "Mean over seeds, and their standard deviation; train steps alone."
    return Plot("Throughput", note, f"{unit} per second: {alt}.", _svg(figure))


def units(document: Document, model: str) -> str:
    """What a model's throughput counts."""
    for run in doc.finished(document):
        if run["model"] == model and (run.get("summary") or {}).get("units"):
            return run["summary"]["units"]
    return "units"


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.9))
    return figure, figure.subplots()


def _bars(count: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 1.5 + 0.3 * count))
    axes = figure.subplots()
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def _ends(
    axes: Axes, places: np.ndarray, ends: np.ndarray, texts: Sequence[str]
) -> None:
    """Numbers behind bars, with room for them."""
    for place, end, text in zip(places, ends, texts, strict=True):
        axes.annotate(
            text, (end, place), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_xlim(0, 1.28 * max(ends.max(), 1e-9))


def _columns(names: Iterable[Any]) -> int:
    longest = max(len(str(n[0] if isinstance(n, tuple) else n)) for n in names)
    return max(1, min(4, 60 // (longest + 6)))


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # A hundredth of a point is less than anyone sees, and half of the file.
    return re.sub(r"(\.\d\d)\d+", r"\1", buffer.getvalue())
