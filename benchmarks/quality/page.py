"""The summary as a Markdown page and as a chart."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.statistics import CONFIDENCE

from .comparison import MARGIN, REFERENCE

Row = Mapping[str, Any]

NOTE = f"""\
A seed decides the first weights and the data, the same for all conditions, so runs are
compared in pairs. Loss: held out, in nats, mean over the seeds ± their standard
deviation. Difference: to float32 of the same optimizer, mean of the pairs as a share of
the float32 loss, with its {CONFIDENCE:.0%} interval of Student's t. "float32, nudged"
is float32 again from weights moved by one unit in the last place: what it differs by is
what rounding anywhere does to a training that amplifies it. Bytes: live params and
state, for each parameter, gradients not counted."""

COLORS = {
    "float32": "black",
    "float32, nudged": "tab:gray",
    "bfloat16": "tab:red",
    "flashoptim": "tab:orange",
    "8 bits": "tab:blue",
    "4 bits": "tab:green",
    "4 bits, no error feedback": "tab:brown",
    "4 bits for m, 8 for v": "tab:olive",
    "8 bits for m, 4 for v": "tab:cyan",
}


def markdown(content: Mapping[str, Any]) -> str:
    """The whole page."""
    summary = content["summary"]
    parts = [
        "# Training with compressed states",
        f"`{content['command']}`: {content['machine']}, jax {content['jax']}.",
        NOTE,
    ]
    for workload in dict.fromkeys(row["workload"] for row in summary):
        rows = [row for row in summary if row["workload"] == workload]
        parts += [heading(workload, content["runs"]), table(rows)]
    return "\n\n".join(parts) + "\n"


def heading(workload: str, runs: Sequence[Row]) -> str:
    runs = [run for run in runs if run["workload"] == workload]
    steps = {run["steps"] for run in runs}
    rates = {run["optimizer"]: run["learning_rate"] for run in runs}
    return (
        f"## {workload}\n\n"
        f"{', '.join(map(str, sorted(steps)))} steps, learning rates "
        f"{', '.join(f'{rate:g} ({name})' for name, rate in rates.items())}."
    )


def table(rows: Sequence[Row]) -> str:
    accuracy = any("accuracy" in row for row in rows)
    head = ["optimizer", "storage", "bytes", "seeds", "loss"]
    head += ["accuracy"] if accuracy else []
    head += ["difference, % of the loss", "0 in the interval"]
    head += ["mean within 0.5 %", "interval within 0.5 %"]
    align = ["---", "---", "---:", "---:", "---:"] + ["---:"] * accuracy + ["---:"]
    lines = [head, align + [":---:"] * 3]
    for row in rows:
        cells = [row["optimizer"], row["storage"], f"{row['bytes_per_parameter']:.2f}"]
        cells.append(str(len(row["seeds"])))
        cells.append(f"{row['loss']:.4f} ± {_number(row['loss_spread'], '.4f')}")
        if accuracy:
            cells.append(f"{100 * row['accuracy']:.2f} %")
        if "loss_relative" in row:
            cells.append(_percent(row["loss_relative"]))
            names = ("indistinguishable", "mean_within", "interval_within")
            cells += ["yes" if row[name] else "**no**" for name in names]
        else:
            cells += [""] * 4
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(x: float, form: str) -> str:
    return "?" if math.isnan(x) else format(x, form)


def _percent(relative: Mapping[str, float]) -> str:
    mean, low, high = (
        _number(100 * relative[name], "+.2f") for name in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"


def draw(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """For each workload AdamW's training losses, and all differences."""
    workloads = list(dict.fromkeys(row["workload"] for row in content["summary"]))
    figure = Figure(figsize=(13, 5.5 * len(workloads)), layout="constrained")
    grid = figure.subplots(
        len(workloads), 2, squeeze=False, gridspec_kw={"width_ratios": [3, 4]}
    )
    for (curves, differences), workload in zip(grid, workloads, strict=True):
        runs = [run for run in content["runs"] if run["workload"] == workload]
        rows = [row for row in content["summary"] if row["workload"] == workload]
        _draw_curves(curves, runs, workload)
        _draw_differences(differences, rows, workload)
    figure.savefig(path, dpi=110)


def _draw_curves(axes: Axes, runs: Sequence[Row], workload: str) -> None:
    first = runs[0]["optimizer"]
    runs = [run for run in runs if run["optimizer"] == first]
    for storage in dict.fromkeys(run["storage"] for run in runs):
        curves = [run["curve"] for run in runs if run["storage"] == storage]
        mean = np.mean(curves, axis=0)
        steps = np.linspace(0, runs[0]["steps"], len(mean) + 1)[1:]
        axes.plot(steps, mean, color=COLORS[storage], label=storage, linewidth=1.5)
    axes.set_yscale("log")
    axes.set_title(f"{workload}, {first}: training loss, mean of the seeds")
    axes.set_xlabel("step")
    axes.set_ylabel("nats")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def _draw_differences(axes: Axes, rows: Sequence[Row], workload: str) -> None:
    rows = [row for row in rows if "loss_relative" in row]
    margin = 100 * MARGIN
    axes.axvspan(-margin, margin, color="tab:green", alpha=0.1)
    axes.axvline(0, color="black", linewidth=1)
    for i, row in enumerate(rows):
        relative = {k: 100 * v for k, v in row["loss_relative"].items()}
        mean, color = relative["mean"], COLORS[row["storage"]]
        if not math.isnan(relative["low"]):
            axes.plot([relative["low"], relative["high"]], [i, i], color=color, lw=3)
        axes.plot([mean], [i], "o", color=color, markersize=9)
    axes.set_yticks(
        range(len(rows)), [f"{row['optimizer']}, {row['storage']}" for row in rows]
    )
    axes.invert_yaxis()
    # Linear within a percent, as the worst conditions are far off.
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlabel(
        f"held-out loss: difference to {REFERENCE}, %, {CONFIDENCE:.0%} interval"
    )
    axes.set_title(f"{workload}: green, within {margin:g} % of the loss")
    axes.grid(alpha=0.3, axis="x")
