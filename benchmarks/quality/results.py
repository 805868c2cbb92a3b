"""The file of all runs: saved after each, so that what was interrupted goes on."""

import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

from benchmarks import summaries

IDENTITY = ("workload", "optimizer", "storage", "seed")


class Results:
    """Runs in a JSON file, with whatever else describes them.

    Args:
      path: of the file; an earlier one is gone on with.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.content: dict[str, Any] = {"runs": []}
        if path.exists():
            self.content = json.loads(path.read_text())

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.content["runs"]

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Whether a run of these settings was made.

        Raises:
          ValueError: that run was made, with other steps, learning rate or codecs.
        """
        for run in self.runs:
            if any(run[name] != settings[name] for name in IDENTITY):
                continue
            for name, value in settings.items():
                if run[name] != value:
                    what = ", ".join(str(settings[name]) for name in IDENTITY)
                    raise ValueError(
                        f"{self.path} holds the run ({what}) with {name} "
                        f"{run[name]!r}, not {value!r}. Delete the file to start "
                        "again, or write elsewhere with --out."
                    )
            return True
        return False

    def add(self, run: Mapping[str, Any]) -> None:
        self.runs.append(dict(run))
        self.save()

    def describe(self, command: str, summary: list[dict[str, Any]]) -> None:
        """Saves beside the runs what made them and what they come to."""
        self.content |= {
            "command": command,
            "machine": f"{platform.machine()} CPU, {jax.device_count()} device",
            "jax": jax.__version__,
            "summary": summary,
        }
        self.save()

    def summarize(self, path: pathlib.Path) -> None:
        """Writes all but the curves to another file, which is small."""
        runs = summaries.without(self.runs, "curve", "format", "seconds")
        summaries.write(path, self.content | {"runs": runs})

    def save(self) -> None:
        """Writes the whole file, or leaves the old one as it is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".json.new")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(new, self.path)
