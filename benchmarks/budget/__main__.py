"""Trains a GPT with every optimizer of a lower budget, over seeds: `make budget`.

    python -m benchmarks.budget [--only "lora_pre, *" ...] [--out FOLDER]

Writes runs/budget/runs.json after every run, and goes on from there when called again;
then the summary: budget.json, budget.md and budget.png in benchmarks/results. With
--out all of them are in that folder. ``python -m benchmarks.budget.steps`` times the
steps for the page.
"""

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence

from benchmarks import workloads
from benchmarks.quality.comparison import summarize
from benchmarks.quality.conditions import fitting
from benchmarks.quality.results import Results
from benchmarks.quality.training import Trainer, study
from benchmarks.summaries import RESULTS, RUNS

from .conditions import LEARNING_RATES, conditions
from .page import draw, markdown


def write(results: Results, folder: pathlib.Path, command: str) -> None:
    """The summary, the page and the chart into a folder, which may have the steps."""
    order = [condition.name for condition in conditions()]
    results.runs.sort(
        key=lambda run: (
            order.index(f"{run['optimizer']}, {run['storage']}"),
            run["seed"],
        )
    )
    results.describe(command, summarize(results.runs, reference=("adamw", "float32")))
    steps = folder / "budget_steps.json"
    timed = json.loads(steps.read_text()) if steps.exists() else None
    page = markdown(results.content, timed)
    results.summarize(folder / "budget.json")
    (folder / "budget.md").write_text(page)
    draw(results.content, folder / "budget.png")
    print(page)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--depth", type=int, default=2, help="layers")
    parser.add_argument("--width", type=int, default=128, help="features")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help='conditions, as in "tamed, *"'
    )
    parser.add_argument("--learning-rate", type=float, help="to search for the best")
    parser.add_argument("--out", type=pathlib.Path, help="folder of everything")
    options = parser.parse_args(args)
    chosen = fitting(conditions(), options.only)
    if not chosen:
        names = "; ".join(condition.name for condition in conditions())
        parser.error(f"no condition fits --only {options.only}; there are: {names}")
    workload = workloads.gpt(depth=options.depth, width=options.width)
    results = Results((options.out or RUNS / "budget") / "runs.json")
    trainers = (
        Trainer(
            workload,
            condition,
            options.learning_rate or LEARNING_RATES[condition.optimizer],
            options.steps,
        )
        for condition in chosen
    )
    study(results, trainers, options.seeds)
    given = sys.argv[1:] if args is None else args
    write(
        results,
        options.out or RESULTS,
        shlex.join(["python", "-m", "benchmarks.budget", *given]),
    )


if __name__ == "__main__":
    main()
