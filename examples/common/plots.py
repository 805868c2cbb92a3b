"""Pictures of runs."""

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
LINES = ("-", "--", "-.", ":")


def draw_losses(
    histories: Mapping[str, Sequence[Mapping]],
    path: pathlib.Path,
    *,
    title: str,
    unit: str,
) -> None:
    """The losses of runs by name; train losses are averaged over a twentieth of a run.

    Args:
      histories: rows with "step", "loss" and at times "val_loss".
      path: of the PNG.
      title: of the picture.
      unit: of a loss.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for i, (name, history) in enumerate(histories.items()):
        style = {
            "color": COLORS[i % len(COLORS)],
            "linestyle": LINES[i % len(LINES)],
        }
        steps = [row["step"] for row in history]
        losses = [row["loss"] for row in history]
        span = math.ceil(len(losses) / 20)
        smooth = np.convolve(losses, np.ones(span) / span, mode="valid")
        axes.plot(steps[span - 1 :], smooth, alpha=0.5, label=f"train: {name}", **style)
        measured = [row for row in history if "val_loss" in row]
        if measured:
            last = measured[-1]["val_loss"]
            axes.plot(
                [row["step"] for row in measured],
                [row["val_loss"] for row in measured],
                marker="o",
                linewidth=2,
                label=f"validation: {name}, last {last:.3f}",
                **style,
            )
    axes.set_xlabel("step", fontsize=13)
    axes.set_ylabel(f"loss, {unit}", fontsize=13)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=11)
    figure.savefig(path, dpi=120)
