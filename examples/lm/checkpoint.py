"""The folder of a run: orbax checkpoints, metrics.jsonl and summary.json.

An optimizer's codes are bytes, and bytes of one codec can be read as those of another
without any complaint. So every checkpoint also says which codecs wrote it, and a run
that resumes compares before it reads.
"""

import json
import pathlib
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

import optax_flash


class RunFolder:
    """Opens a new folder for a run, or with resume=True the folder to go on in."""

    def __init__(self, folder, *, resume: bool = False, keep: int = 2):
        self.path = pathlib.Path(folder).absolute()
        self._metrics = self.path / "metrics.jsonl"
        # Saving is synchronous: the next train step donates, that is overwrites, the
        # arrays that an asynchronous save might still be reading.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(
            self.path / "checkpoints", options=options
        )
        self.latest = self._manager.latest_step()
        if resume and self.latest is None:
            raise FileNotFoundError(f"no checkpoint to resume from in {self.path}")
        if not resume and self.latest is not None:
            raise FileExistsError(
                f"{self.path} holds checkpoints of an earlier run: pass --resume to go "
                "on from the newest, or choose another --out"
            )
        if not resume:
            self._metrics.write_text("")

    def save(self, step: int, state: TrainState) -> None:
        codecs = optax_flash.state_format(state.tx, state.params)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), codecs=ocp.args.JsonSave(codecs)
            ),
        )

    def restore(self, state: TrainState) -> TrainState:
        """The newest state saved. `state` gives the structure, shapes and dtypes.

        Raises an error if the checkpoint was written under other codecs than those of
        state.tx.
        """
        args = ocp.args.Composite(codecs=ocp.args.JsonRestore())
        codecs = self._manager.restore(self.latest, args=args)["codecs"]
        optax_flash.check_format(codecs, state.tx, state.params)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(self.latest, args=args)["state"]

    def log(self, rows: Sequence[dict]) -> None:
        """Appends rows to metrics.jsonl, one JSON object a line."""
        with self._metrics.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def restore_log(self) -> list[dict]:
        """The rows up to the newest checkpoint; later ones will be logged once more."""
        rows = map(json.loads, self._metrics.read_text().splitlines())
        rows = [row for row in rows if row["step"] <= self.latest]
        self._metrics.write_text("")
        self.log(rows)
        return rows

    def close(self, summary: dict) -> None:
        (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self._manager.close()
