"""The table and the picture of a test."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from examples.common.plots import COLORS
from examples.trading.backtest import Episode

DISCLAIMER = (
    "A check that optimizer storage does not change an agent. NOT advice: the stocks "
    "are survivors, chosen with hindsight, and prices are adjusted closes."
)

FORMS = {
    "sharpe": ("Sharpe ratio", "{:.2f}"),
    "annual_return": ("annual return", "{:.1%}"),
    "max_drawdown": ("maximum drawdown", "{:.1%}"),
    "turnover": ("traded a year, portfolios", "{:.1f}"),
}


def table(metrics: Mapping[str, Any]) -> Table:
    """The figures of `backtest.compare` with their 95 % intervals, a row a policy."""
    result = Table(title="Test years, after costs, with 95 % intervals")
    result.add_column()
    for title, _ in FORMS.values():
        result.add_column(title, justify="right")

    def row(name, values, intervals, **kwargs):
        cells = []
        for key, (_, form) in FORMS.items():
            low, high = (form.format(bound) for bound in intervals[key])
            cells.append(f"{form.format(values[key])} ({low} to {high})")
        result.add_row(name, *cells, **kwargs)

    row("agent", metrics, metrics["intervals"], style="bold")
    for name, values in metrics["baselines"].items():
        row(name, values, values["intervals"])
    result.add_section()
    for name, values in metrics["baselines"].items():
        row(f"agent - {name}", values["difference"], values["difference_intervals"])
    return result


def draw_wealth(
    episodes: Mapping[str, Episode], path: pathlib.Path, *, title: str
) -> None:
    """Wealth by day, and below it the loss since the last peak."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for i, (name, episode) in enumerate(episodes.items()):
        log_wealth = np.cumsum(episode.rewards)
        peaks = np.maximum(np.maximum.accumulate(log_wealth), 0)
        style = {"color": COLORS[i], "linewidth": 1, "zorder": 3 - i / 10}
        top.plot(episode.dates, np.exp(log_wealth), label=name, **style)
        bottom.plot(episode.dates, np.expm1(log_wealth - peaks), **style)
    top.set_yscale("log")
    for formatter in (top.yaxis.set_major_formatter, top.yaxis.set_minor_formatter):
        formatter("{x:g}")
    top.set_ylabel("wealth, 1 at the start")
    bottom.set_ylabel("loss since the peak")
    bottom.yaxis.set_major_formatter("{x:.0%}")
    top.set_title(title)
    top.legend()
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.text(0.5, -0.02, DISCLAIMER, ha="center", fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
