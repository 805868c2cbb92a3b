"""The folder of a run: checkpoints, metrics.jsonl, TensorBoard's events, a summary."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from tensorboardX import SummaryWriter

import optax_flash


class RunFolder:
    """Opens a new folder for a run, or with resume=True the folder to go on in.

    A run that is killed can be resumed from its newest checkpoint, whenever it happens.
    A state has `tx` and `params`, as Flax's train states do.
    """

    def __init__(self, folder, state, *, resume=False, keep: int = 2):
        self.path = pathlib.Path(folder).absolute()
        self._metrics = self.path / "metrics.jsonl"
        self._checkpoints = optax_flash.Checkpoints(
            self.path / "checkpoints", state.tx, state.params, keep=keep
        )
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
        # On resuming, TensorBoard drops what came after the checkpoint.
        first = self.latest + 1 if resume else 1
        self._board = SummaryWriter(
            str(self.path / "tensorboard"),
            purge_step=first if resume else None,
            filename_suffix=f".from_{first}",
        )

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step."""
        return self._checkpoints.latest

    def save(self, step: int, state) -> None:
        self._checkpoints.save(step, state)

    def restore(self, state):
        """The newest state saved. `state` gives structure, shapes and devices."""
        return self._checkpoints.restore(state)

    def log(self, rows: Sequence[dict]) -> None:
        """Appends rows to metrics.jsonl, one JSON object a line, and to TensorBoard."""
        try:
            with self._metrics.open("a") as file:
                file.write(lines(rows))
        except OSError as error:
            raise OSError(
                f"metrics of step {rows[0]['step']} and later were not written to "
                f"{self._metrics}: {error}. The newest checkpoint is of step "
                f"{self.latest}: free some space and go on with --resume"
            ) from error
        for row in rows:
            for name, value in numbers(row):
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])

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

    @property
    def checkpoint_bytes(self) -> int | None:
        """The newest checkpoint's, on disk."""
        if self.latest is None:
            return None
        files = (self.path / "checkpoints" / str(self.latest)).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def close(self, summary: dict) -> None:
        (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self._board.close()
        self._checkpoints.close()


def lines(rows: Sequence[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbers(row: Mapping, prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a row by name, those of nested dicts as "outer/inner"."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
