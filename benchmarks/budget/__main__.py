"""Trains a GPT with every optimizer of a lower budget, over seeds: `make budget`.

    PYTHONPATH=benchmarks python -m budget [--only "lora_pre, *" ...] [--out FOLDER]

Writes budget.json after every run, and goes on from there when called again; then
budget.md and budget.png. ``python -m budget.steps`` times the steps for the page.
"""

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence

import workloads
from quality.comparison import summarize
from quality.conditions import fitting
from quality.results import Results
from quality.training import Trainer, study

from .conditions import LEARNING_RATES, conditions
from .page import draw, markdown

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results"


def write(results: Results, command: str) -> None:
    """The summary into the results' file, and the page and the chart beside it."""
    order = [condition.name for condition in conditions()]
    results.runs.sort(
        key=lambda run: (
            order.index(f"{run['optimizer']}, {run['storage']}"),
            run["seed"],
        )
    )
    results.describe(command, summarize(results.runs, reference=("adamw", "float32")))
    steps = results.path.with_name("budget_steps.json")
    timed = json.loads(steps.read_text()) if steps.exists() else None
    page = markdown(results.content, timed)
    results.path.with_suffix(".md").write_text(page)
    draw(results.content, results.path.with_suffix(".png"))
    print(page)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--depth", type=int, default=2, help="layers")
    parser.add_argument("--width", type=int, default=128, help="features")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help='conditions, as in "tamed, *"'
    )
    parser.add_argument("--learning-rate", type=float, help="to search for the best")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(args)
    chosen = fitting(conditions(), options.only)
    if not chosen:
        names = "; ".join(condition.name for condition in conditions())
        parser.error(f"no condition fits --only {options.only}; there are: {names}")
    workload = workloads.gpt(depth=options.depth, width=options.width)
    results = Results(options.out / "budget.json")
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
    write(results, shlex.join(["python", "-m", "budget", *given]))


if __name__ == "__main__":
    main()
