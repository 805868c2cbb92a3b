"""The folder of a run: checkpoints, metrics.jsonl and summary.json."""

import json
import os
import pathlib
from collections.abc import Sequence

from flax.training.train_state import TrainState

import optax_flash


class RunFolder:
    """Opens a new folder for a run, or with resume=True the folder to go on in.

    A run that is killed can be resumed from its newest checkpoint, whenever it happens.
    """

    def __init__(self, folder, state: TrainState, *, resume=False, keep: int = 2):
        self.path = pathlib.Path(folder).absolute()
        self._metrics = self.path / "metrics.jsonl"
        self._checkpoints = optax_flash.Checkpoints(
            self.path / "checkpoints", state.tx, state.params, keep=keep
        )
        self.latest = self._checkpoints.latest
        if resume and self.latest is None:
            raise FileNotFoundError(
                f"no checkpoint to resume from in {self.path}: start without --resume"
            )
        if not resume and self.latest is not None:
            raise FileExistsError(
                f"{self.path} holds checkpoints of an earlier run: pass --resume to go "
                "on from the newest, or choose another --out"
            )
        if not resume:
            self._metrics.write_text("")

    def save(self, step: int, state: TrainState) -> None:
        self._checkpoints.save(step, state)

    def restore(self, state: TrainState) -> TrainState:
        """The newest state saved. `state` gives structure, shapes and devices."""
        return self._checkpoints.restore(state)

    def log(self, rows: Sequence[dict]) -> None:
        """Appends rows to metrics.jsonl, one JSON object a line."""
        with self._metrics.open("a") as file:
            file.write(lines(rows))

    def restore_log(self) -> list[dict]:
        """The rows up to the newest checkpoint; later ones will be logged once more."""
        rows = []
        for line in self._metrics.read_text().splitlines():
            # Rows are written before their checkpoint, so only a later one may be torn.
            row = json.loads(line)
            rows.append(row)
            if row["step"] == self.latest:
                break
        shorter = self._metrics.with_suffix(".tmp")
        shorter.write_text(lines(rows))
        os.replace(shorter, self._metrics)  # at once: the process may die here, too
        return rows

    def close(self, summary: dict) -> None:
        (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self._checkpoints.close()


def lines(rows: Sequence[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
