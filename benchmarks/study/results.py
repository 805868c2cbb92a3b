"""study.json: saved after each run, so that what was interrupted goes on."""

import dataclasses
import datetime
import importlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.definition import Run, Study
from benchmarks.study.files import finite, write_json

MACHINE = ("device", "platform", "jax")
"""What runs that are compared have to share."""


class ResultsError(ValueError):
    """Finished runs are not what is asked for."""


class Results:
    """The finished runs of a study, with what describes them.

    Args:
      folder: of study.json; an earlier one is gone on with.
      study: what is asked.
      command: that asks it.

    Raises:
      ResultsError: finished runs were made by another definition of theirs, or the
        file is damaged.
    """

    def __init__(self, folder: pathlib.Path, study: Study, command: str):
        self.path = folder / "study.json"
        self._study = study
        earlier = self._read()
        self.runs: list[dict[str, Any]] = earlier.get("runs", [])
        self.machine: dict[str, Any] | None = earlier.get("machine")
        self._changes = earlier.get("changes", [])
        self._check()
        if self.runs:
            self._changes += changes(earlier["study"], study.content, len(self.runs))
        self._command = command

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            return json.loads(self.path.read_text())
        except ValueError as error:
            raise ResultsError(f"{self.path} is damaged: {error}") from None

    def _check(self) -> None:
        """That finished runs are those of the matrix, under the same options."""
        wanted = {run.name: run for run in self._study.runs}
        for entry in self.runs:
            run = wanted.get(name(entry))
            if run is None:
                raise ResultsError(
                    f"{self.path} holds the run {name(entry)}, which the study does "
                    f"not have. {self._what_to_do()}"
                )
            if difference := differing(entry["config"], run):
                raise ResultsError(
                    f"{self.path} holds the run {name(entry)} with {difference}. "
                    f"{self._what_to_do()}"
                )

    def _what_to_do(self) -> str:
        return (
            f"Delete {self.path.parent} to start again, or write elsewhere with --out."
        )

    def check_machine(self, machine: dict[str, Any]) -> None:
        """That this is the machine of the finished runs, and has what they need.

        Raises:
          ResultsError: it is another, so that times could not be compared; or the
            preset needs a GPU, and there is none.
        """
        preset = self._study.preset
        needs = self._study.content["presets"][preset].get("needs")
        if needs and machine["platform"] != needs:
            raise ResultsError(
                f"the preset {preset!r} needs a {needs}; JAX has found "
                f"{machine['platform']} alone. Choose another --preset, or install "
                "jax for the device."
            )
        if self.machine is None or not self.runs:
            self.machine = machine
        for key in MACHINE:
            if self.machine[key] != machine[key]:
                raise ResultsError(
                    f"the runs in {self.path} were made with {key} "
                    f"{self.machine[key]!r}; here it is {machine[key]!r}, and times "
                    f"could not be compared. {self._what_to_do()}"
                )

    def pending(self) -> list[Run]:
        """Runs without an entry, in the study's order."""
        done = {name(entry) for entry in self.runs}
        return [run for run in self._study.runs if run.name not in done]

    def forget_failed(self) -> None:
        """So that failed runs are made once more."""
        self.runs = [entry for entry in self.runs if entry["status"] != "failed"]

    def add(self, entry: dict[str, Any]) -> None:
        """A finished run, in its place; and saves."""
        order = [run.name for run in self._study.runs]
        self.runs.append(entry)
        self.runs.sort(key=lambda entry: order.index(name(entry)))
        self.save()

    def save(self) -> None:
        """Writes the whole file, or leaves the old one as it is."""
        content = {
            "study": self._study.content,
            "preset": self._study.preset,
            "command": self._command,
            "machine": self.machine,
            "date": datetime.date.today().isoformat(),
            "changes": self._changes,
            "runs": self.runs,
        }
        write_json(self.path, content)


def name(entry: Mapping[str, Any]) -> str:
    """Of an entry's run."""
    return f"{entry['model']}/{entry['condition']}/{entry['seed']}"


def differing(config: Mapping[str, Any], run: Run) -> str | None:
    """What differs between the options of a finished run and those that are asked."""
    wanted = finite(run.config)
    for key in {**config, **wanted}:
        if key in ("out", "resume", "data_dir"):  # they change nothing of a run
            continue
        if key not in config and wanted[key] == defaults(run).get(key):
            continue  # an option that came later, and is not used
        if config.get(key) != wanted.get(key):
            return f"{key} {config.get(key)!r}, not {wanted.get(key)!r}"
    return None


def defaults(run: Run) -> dict[str, Any]:
    """Of the options of a run's trainer."""
    config = importlib.import_module(run.trainer).Config
    return {field.name: field.default for field in dataclasses.fields(config)}


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any], runs: int
) -> list[dict[str, Any]]:
    """Criteria that were changed after runs: a reader should know."""
    old, new = (
        {x["name"]: x for x in content.get("criteria", ())}
        for content in (before, after)
    )
    today = datetime.date.today().isoformat()
    found = []
    for criterion in {**old, **new}:
        if old.get(criterion) != new.get(criterion):
            found.append(
                {
                    "date": today,
                    "runs": runs,
                    "criterion": criterion,
                    "before": old.get(criterion),
                    "after": new.get(criterion),
                }
            )
    return found


def count(entries: Sequence[Mapping[str, Any]]) -> str:
    """Such as "7 done, 1 diverged"."""
    statuses = [entry["status"] for entry in entries]
    known = ("done", "diverged", "aborted", "failed")
    counts = [f"{statuses.count(x)} {x}" for x in known if x in statuses]
    return ", ".join(counts) or "no runs"
