"""The summary as a Markdown page and as a chart of loss against bytes."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.study.statistics import CONFIDENCE

Row = Mapping[str, Any]

NOTE = f"""\
A seed decides the first weights and the data, the same for all. Loss: held out, in nats
a byte of text, mean over the seeds ± their standard deviation. Difference: to float32
AdamW, mean of the pairs of runs as a share of its loss, with its {CONFIDENCE:.0%}
interval of Student's t. Bytes: live params and state, for each parameter, gradients not
counted. All but the reference keep bfloat16 weights and an 8-bit residual."""


def markdown(content: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """The whole page.

    Args:
      content: of budget.json.
      timed: of budget_steps.json, if there is one.
    """
    steps_of = timed["steps"] if timed else {}
    runs = content["runs"]
    steps = sorted({run["steps"] for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    rates = {run["optimizer"]: run["learning_rate"] for run in runs}
    facts = (
        f"{', '.join(map(str, steps))} steps, seeds {', '.join(map(str, seeds))}, "
        "learning rates "
        + ", ".join(f"{rate:g} ({name})" for name, rate in rates.items())
        + "."
    )
    lines = [
        "| optimizer | storage | bytes | step | loss | difference, % of the loss |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in content["summary"]:
        step = steps_of.get(f"{row['optimizer']}, {row['storage']}")
        cells = [
            row["optimizer"],
            row["storage"],
            f"{row['bytes_per_parameter']:.2f}",
            f"{step['median_ratio']:.1f} x" if step else "",
            f"{row['loss']:.4f} ± {row['loss_spread']:.4f}",
            _percent(row["loss_relative"]) if "loss_relative" in row else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    parts = [
        "# Loss against bytes",
        f"`{content['command']}`: {content['machine']}, jax {content['jax']}.",
        NOTE,
        *([_about_steps(timed)] if timed else []),
        facts,
        "\n".join(lines),
    ]
    return "\n\n".join(parts) + "\n"


def _about_steps(timed: Mapping[str, Any]) -> str:
    return (
        "Step: update and apply_updates alone, without the model, over float32 AdamW's "
        f"(`{timed['command']}`: {timed['machine']}, jax {timed['jax']}, medians)."
    )


def _percent(relative: Mapping[str, float]) -> str:
    mean, low, high = (100 * relative[name] for name in ("mean", "low", "high"))
    if math.isnan(low):
        return f"{mean:+.2f}"
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def draw(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """Held-out loss over bytes per parameter, a color for each optimizer."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    rows = content["summary"]
    for i, name in enumerate(dict.fromkeys(row["optimizer"] for row in rows)):
        of_name = [row for row in rows if row["optimizer"] == name]
        nbytes = [row["bytes_per_parameter"] for row in of_name]
        losses = [row["loss"] for row in of_name]
        axes.plot(nbytes, losses, "o", color=f"C{i}", label=name, markersize=8)
        for row, x, y in zip(of_name, nbytes, losses, strict=True):
            axes.annotate(
                row["storage"], (x, y), (5, 4), textcoords="offset points", fontsize=7
            )
    axes.set_xlabel("bytes per parameter: weights and state")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
