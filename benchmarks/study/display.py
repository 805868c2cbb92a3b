"""All runs on the screen: a bar for the study and a line for each worker."""

import time
from collections.abc import Mapping
from typing import Any

from rich import progress
from rich.console import Console

from benchmarks.study.definition import Run
from benchmarks.study.results import name

STYLES = {"done": "green", "diverged": "red", "aborted": "yellow", "failed": "red"}


class Display:
    """A live display on a terminal; elsewhere a line for each finished run.

    Args:
      console: where.
      title: of the study.
      total: runs of the whole matrix.
      finished: of them, before this call.
      workers: how many runs go at once.
    """

    def __init__(
        self, console: Console, title: str, total: int, finished: int, workers: int
    ):
        self._console = console
        self._total, self._finished = total, finished
        self._workers = workers
        self._seconds: dict[str, list[float]] = {}
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._whole = self._bars.add_task(
            title, total=total, completed=finished, note=""
        )
        self._lines = [
            self._bars.add_task("", visible=False, note="") for _ in range(workers)
        ]

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def started(self, worker: int, run: Run) -> None:
        self._bars.reset(
            self._lines[worker],
            description=run.name,
            total=run.config["steps"],
            note="compiling",
            visible=True,
        )

    def stepped(self, worker: int, event: Mapping[str, Any]) -> None:
        self._bars.update(
            self._lines[worker],
            completed=event["step"],
            note=f"loss {event['loss']:.4g}",
        )

    def ended(self, worker: int, entry: Mapping[str, Any], left: list[Run]) -> None:
        """A run of this worker came to an end; `left` are those still to start."""
        self._finished += 1
        self._seconds.setdefault(entry["model"], []).append(entry["wall_seconds"])
        remaining = self._remaining(left)
        note = f"about {duration(remaining)} left" if left else ""
        self._bars.update(self._whole, completed=self._finished, note=note)
        self._bars.update(self._lines[worker], visible=False)
        style = STYLES[entry["status"]]
        line = (
            f"[{self._finished}/{self._total}] {name(entry)}: "
            f"[{style}]{entry['status']}[/] in {duration(entry['wall_seconds'])}"
        )
        summary = entry["summary"]
        if summary and summary["train_loss"] is not None:
            line += f", loss {summary['train_loss']:.4g}"
        if summary and summary.get("val_loss") is not None:
            line += f", held out {summary['val_loss']:.4g}"
        if note:
            line += f"; {note}"
        self._console.print(line, highlight=False, soft_wrap=True)
        if entry["reason"]:
            self._console.print(
                f"    {entry['reason']}", markup=False, highlight=False, soft_wrap=True
            )

    def _remaining(self, left: list[Run]) -> float:
        """Seconds: each model's mean so far, or where there is none all models'."""
        every = [x for seconds in self._seconds.values() for x in seconds]
        total = 0.0
        for run in left:
            seconds = self._seconds.get(run.model, every)
            total += sum(seconds) / len(seconds)
        return total / self._workers


def duration(seconds: float) -> str:
    """Such as "42 s", "3 min" or "1 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def elapsed(since: float) -> str:
    """Since a time of time.monotonic()."""
    return duration(time.monotonic() - since)
