"""Runs studies, and makes their pages.

    python -m benchmarks.study run benchmarks/study/studies/momentum.toml
    python -m benchmarks.study run FILE.toml --list
    python -m benchmarks.study report runs/studies/momentum_small

A study is a TOML file: a question, conditions, models, and criteria that were written
before the runs. study.json is written after every run and the same command goes on from
there; index.html is made at the end. Both lie in runs/studies, which git ignores. A
summary goes to benchmarks/results/studies: verdicts and means as Markdown, the numbers
of all runs as JSON.
"""

import argparse
import fnmatch
import pathlib
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.study.definition import DefinitionError, Run, Study, read
from benchmarks.study.results import Results, ResultsError, count
from benchmarks.study.runner import Runner, going_on
from benchmarks.summaries import RESULTS, RUNS

STUDIES = RUNS / "studies"
INTERRUPTED = 130  # what shells say of a process that Ctrl-C ended


class Stopped(Exception):
    """No further study is to be run: what to say, and the exit status."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def main(args: Sequence[str] | None = None) -> int:
    """0 if every run has a result, 1 if some failed, 2 if the question is wrong."""
    options = _parser().parse_args(args)
    console = Console()
    try:
        if options.command == "report":
            return _report(options.folder, console)
        if options.out and len(options.files) > 1:
            raise DefinitionError("--out is for one study; leave it out for several")
        studies = _read(options.files, options.preset)
        if options.list:
            for study in studies:
                _list(study, _chosen(study, options.only), console)
            return 0
        pairs = zip(studies, options.files, strict=True)
        return max([_run(study, file, options, console) for study, file in pairs])
    except (DefinitionError, ResultsError) as error:
        Console(stderr=True).print(str(error), markup=False, soft_wrap=True)
        return 2
    except Stopped as stopped:
        console.print(str(stopped), markup=False, soft_wrap=True)
        return stopped.code


def _read(files: Sequence[pathlib.Path], preset: str) -> list[Study]:
    """The studies of these files, or the mistakes of all of them."""
    studies, mistakes = [], []
    for file in files:
        try:
            studies.append(read(file, preset))
        except DefinitionError as error:
            mistakes.append(str(error))
    if mistakes:
        raise DefinitionError("\n".join(mistakes))
    return studies


def _run(study: Study, file: pathlib.Path, options, console: Console) -> int:
    """Makes a study's runs and its page.

    Raises:
      Stopped: the disk is full, or somebody pressed Ctrl-C.
    """
    name = f"{study.name}_{study.preset}"
    folder = options.out or STUDIES / name
    work = folder / "work"
    command = ["python", "-m", "benchmarks.study", "run", str(file)]
    command += ["--preset", study.preset]
    results = Results(folder, study, shlex.join(command))
    chosen = {run.name for run in _chosen(study, options.only)}
    if options.retry:
        results.forget_failed()
    pending = [run for run in results.pending() if run.name in chosen]
    try:
        Runner(study, results, work, console).run(pending)
        results.save()
    except KeyboardInterrupt:
        raise Stopped(f"Interrupted. {going_on(results)}", INTERRUPTED) from None
    except OSError as error:
        raise Stopped(f"{error}. {going_on(results)}", 1) from error
    console.print(f"{study.name}: {count(results.runs)}", soft_wrap=True)
    failed = sum(entry["status"] == "failed" for entry in results.runs)
    if failed:
        console.print(f"{failed} failed; --retry makes them once more.")
    return max(_report(folder, console), 1 if failed else 0)


def _report(folder: pathlib.Path, console: Console) -> int:
    """Makes the page and the summary of a study's folder."""
    from benchmarks.study.page import report  # it imports matplotlib

    kept = folder.resolve().parent == STUDIES
    summary = RESULTS / f"studies/{folder.name}.md" if kept else folder / "summary.md"
    try:
        report(folder, summary)
    except OSError as error:
        console.print(
            f"{folder / 'index.html'} was not made: {error}. "
            f"python -m benchmarks.study report {folder} makes it from study.json.",
            markup=False,
            soft_wrap=True,
        )
        return 1
    for path in (folder / "index.html", summary):
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def _chosen(study: Study, patterns: Sequence[str]) -> list[Run]:
    """The runs whose name, as in "gpt/adamw8/0", fits one of the patterns."""
    chosen = [
        run
        for run in study.runs
        if any(fnmatch.fnmatchcase(run.name, pattern) for pattern in patterns)
    ]
    if not chosen:
        names = "\n".join(run.name for run in study.runs)
        raise DefinitionError(
            f"no run of {study.name} fits --only {shlex.join(patterns)}; there are\n"
            + names
        )
    return chosen


def _list(study: Study, runs: Sequence[Run], console: Console) -> None:
    table = Table(title=f"{study.content['title']}: {len(runs)} runs")
    for column in ("model", "condition", "seeds", "optimizer", "weights", "steps"):
        table.add_column(column, overflow="fold")
    for model, condition in dict.fromkeys((run.model, run.condition) for run in runs):
        same = [x for x in runs if (x.model, x.condition) == (model, condition)]
        config = same[0].config
        weights = config["param_dtype"]
        if weights != "float32" and config["master_bits"]:
            weights += f", {config['master_bits']} bits"
        seeds = " ".join(str(run.seed) for run in same)
        steps = str(config["steps"])
        table.add_row(model, condition, seeds, config["optimizer"], weights, steps)
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=(__doc__ or "").split("\n")[0],
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs of studies, then their pages")
    run.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE.toml")
    run.add_argument("--preset", default="small", help="one of the file's [presets.*]")
    run.add_argument(
        "--out",
        type=pathlib.Path,
        help="folder; runs/studies/NAME_PRESET if left out",
    )
    run.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help='runs, as in "gpt/adamw8/*"',
    )
    run.add_argument("--list", action="store_true", help="check, show the runs, stop")
    run.add_argument("--retry", action="store_true", help="make failed runs once more")
    report = commands.add_parser("report", help="make a page again from its study.json")
    report.add_argument("folder", type=pathlib.Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
