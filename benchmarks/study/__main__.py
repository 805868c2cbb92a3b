"""Runs studies, and makes their pages.

    python -m benchmarks.study run benchmarks/study/studies/momentum.toml
    python -m benchmarks.study run FILE.toml --list
    python -m benchmarks.study report benchmarks/results/studies/momentum_small

A study is a TOML file: a question, conditions, models, and criteria that were written
before the runs. study.json is written after every run and the same command goes on from
there; index.html is made at the end.
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
from benchmarks.study.runner import ROOT, Runner, going_on

INTERRUPTED = 130  # what shells say of a process that Ctrl-C ended


def main(args: Sequence[str] | None = None) -> int:
    """0 if every run has a result, 1 if some failed, 2 if the question is wrong."""
    options = _parser().parse_args(args)
    console = Console()
    given = sys.argv[1:] if args is None else args
    command = shlex.join(["python", "-m", "benchmarks.study", *given])
    try:
        if options.command == "report":
            _report(options.folder, console)
            return 0
        if options.out and len(options.files) > 1:
            raise DefinitionError("--out is for one study; leave it out for several")
        studies = [read(file, options.preset) for file in options.files]
        if options.list:
            for study in studies:
                _list(study, _chosen(study, options.only), console)
            return 0
        return max(_run(study, options, command, console) for study in studies)
    except (DefinitionError, ResultsError) as error:
        Console(stderr=True).print(str(error), markup=False, soft_wrap=True)
        return 2


def _run(study: Study, options, command: str, console: Console) -> int:
    """Makes a study's runs and its page."""
    name = f"{study.name}_{study.preset}"
    folder = options.out or ROOT / "benchmarks/results/studies" / name
    work = options.out / "work" if options.out else ROOT / "runs/studies" / name
    results = Results(folder, study, command)
    chosen = {run.name for run in _chosen(study, options.only)}
    if options.retry:
        results.forget_failed()
    pending = [run for run in results.pending() if run.name in chosen]
    try:
        Runner(study, results, work, console).run(pending)
        results.save()
        _report(folder, console)
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. {going_on(results)}", soft_wrap=True)
        return INTERRUPTED
    except OSError as error:
        console.print(f"{error}. {going_on(results)}", markup=False, soft_wrap=True)
        return 1
    console.print(f"{study.name}: {count(results.runs)}; {folder / 'index.html'}")
    failed = sum(entry["status"] == "failed" for entry in results.runs)
    if failed:
        console.print(f"{failed} failed; --retry makes them once more.")
    return 1 if failed else 0


def _report(folder: pathlib.Path, console: Console) -> None:
    from benchmarks.study.page import report  # imports matplotlib

    report(folder)


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
    for column in ("run", "optimizer", "weights", "steps"):
        table.add_column(column)
    for run in runs:
        weights = run.config["param_dtype"]
        if weights != "float32" and run.config["master_bits"]:
            weights += f", {run.config['master_bits']} bits"
        steps = str(run.config["steps"])
        table.add_row(run.name, run.config["optimizer"], weights, steps)
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
        help="folder; benchmarks/results/studies/NAME_PRESET if left out",
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
