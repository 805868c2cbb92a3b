"""Trains two workloads under every condition, over seeds: `make quality`.

    python -m benchmarks.quality [--only "adamw, *" ...] [--out FOLDER]

Writes runs/quality/runs.json after every run, and goes on from there when called again;
then the summary: quality.json, quality.md and quality.png in benchmarks/results. With
--out all of them are in that folder.
"""

import argparse
import fnmatch
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import workloads
from benchmarks.summaries import RESULTS, RUNS
from benchmarks.workloads import Workload

from .comparison import summarize
from .conditions import LEARNING_RATES, Condition, conditions, fitting
from .page import draw, markdown
from .results import Results
from .training import Trainer, study

STEPS = {"gpt": 800, "image": 1200}
SEEDS = {
    "gpt": {"adamw, float32": 8, "adamw, 4 bits": 8},
    "image": {
        "adamw, float32": 32,
        "adamw, float32, nudged": 32,
        "adamw, 8 bits": 32,
        "adamw, 4 bits": 32,
        "adamw, 4 bits, no error feedback": 32,
        "adamw, *": 8,
    },
}
"""How many, of the first pattern that fits; else 3. More where runs of one seed differ
most, as those from nudged weights show, and where a claim rests on it."""
WORKLOADS = {"gpt": workloads.gpt, "image": workloads.image}


def trainers(
    models: Sequence[Workload],
    chosen: Sequence[Condition],
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
) -> Iterator[Trainer]:
    """A trainer for each condition on each workload.

    Args:
      models: "gpt", "image" or both.
      chosen: the conditions.
      steps: of each run; None for STEPS.
      learning_rate: None for LEARNING_RATES.
    """
    for workload in models:
        for condition in chosen:
            rate = LEARNING_RATES[workload.name][condition.optimizer]
            yield Trainer(
                workload,
                condition,
                learning_rate or rate,
                steps or STEPS[workload.name],
            )


def seeds(trainer: Trainer) -> range:
    """The seeds that a trainer runs from, if nothing else is said."""
    for pattern, count in SEEDS[trainer.workload].items():
        if fnmatch.fnmatchcase(trainer.name, pattern):
            return range(count)
    return range(3)


def write(results: Results, folder: pathlib.Path, command: str) -> None:
    """The summary, the page and the chart into a folder."""
    order = [condition.name for condition in conditions()]

    def place(run: dict[str, Any]) -> tuple[Any, ...]:
        name = f"{run['optimizer']}, {run['storage']}"
        return run["workload"], order.index(name), run["seed"]

    results.runs.sort(key=place)
    results.describe(command, summarize(results.runs))
    page = markdown(results.content)
    results.summarize(folder / "quality.json")
    (folder / "quality.md").write_text(page)
    draw(results.content, folder / "quality.png")
    print(page)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--seeds", type=int, nargs="+", help="else 3, 8 or 32")
    parser.add_argument("--steps", type=int, help=f"of a run; else {STEPS}")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help='conditions, as in "lion, *"'
    )
    parser.add_argument("--learning-rate", type=float, help="to search for the best")
    parser.add_argument("--out", type=pathlib.Path, help="folder of everything")
    options = parser.parse_args(args)
    chosen = fitting(conditions(), options.only)
    if not chosen:
        names = "; ".join(condition.name for condition in conditions())
        parser.error(f"no condition fits --only {options.only}; there are: {names}")
    results = Results((options.out or RUNS / "quality") / "runs.json")
    models = [WORKLOADS[name]() for name in options.workload]
    settings = dict(steps=options.steps, learning_rate=options.learning_rate)
    for trainer in trainers(models, chosen, **settings):
        study(results, [trainer], options.seeds or seeds(trainer))
    given = sys.argv[1:] if args is None else args
    write(
        results,
        options.out or RESULTS,
        shlex.join(["python", "-m", "benchmarks.quality", *given]),
    )


if __name__ == "__main__":
    main()
