"""``Checkpoints``: train states on disk, saved whole or not at all, checked when read.

Orbax writes the arrays. Beside them lies what they do not say: how codes are stored,
which leaves there are, and a digest of each, for a flipped bit on a disk would go
unnoticed.
"""

import pathlib
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flash import formats
from optax_flash.numerics import hashing

PyTree = Any


class Checkpoints:
    """The checkpoints of one run, in a folder.

    A checkpoint appears under its step when all of it is written, so whenever a process
    dies, the newest one is whole. Saving is synchronous: when :meth:`save` returns, the
    checkpoint is on disk, and what went wrong is raised by the save that it happened
    to.

    Attributes:
      folder: where they are; each is a folder named by its step.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax_flash
      >>> params = {"w": jnp.ones((64, 64))}
      >>> tx = optax_flash.adamw8(1e-3)
      >>> state = tx.init(params)
      >>> folder = tempfile.mkdtemp()
      >>> with optax_flash.Checkpoints(folder, tx, params) as checkpoints:
      ...     checkpoints.save(10, (params, state))
      ...     params, state = checkpoints.restore((params, state))
      ...     checkpoints.latest
      10
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        tx: optax.GradientTransformation,
        params: optax.Params,
        *,
        keep: int | None = 2,
    ):
        """Opens a folder, and makes it where there is none.

        What a killed process left of an unfinished save is removed, so no two processes
        may save into one folder (those of one ``jax.distributed`` run save together).

        Args:
          folder: on a file system, not in a bucket.
          tx: the transformation that makes the states; a Flax train state's ``tx``.
          params: arrays or ``jax.ShapeDtypeStruct``, as ``tx`` gets them.
          keep: how many checkpoints stay, the newest; None for all. There is room for
            one more while it is written.
        """
        ocp = _orbax()
        self.folder = pathlib.Path(folder).absolute()
        self._format = formats.state_format(tx, params)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Writes a checkpoint, then removes the oldest beyond ``keep``.

        Args:
          step: higher than all before.
          tree: of arrays and numbers: a train state, ``(params, state)``, or any more.

        Raises:
          ValueError: a step that is not higher, a leaf that is no array.
          OSError: it could not be written, for example on a full disk. Earlier
            checkpoints are as they were, and a later save may succeed.
        """
        ocp = _orbax()
        if self.latest is not None and step <= self.latest:
            raise ValueError(
                f"Step {step} cannot be saved: {self.folder} holds a checkpoint of "
                f"step {self.latest}. Save a later step, or delete that folder."
            )
        leaves = {
            path: _as_array(path, x) for path, x in formats.named_leaves(tree).items()
        }
        digests = jax.device_get({path: _digest(x) for path, x in leaves.items()})
        description = {
            "format": self._format,
            "leaves": {path: formats.describe_leaf(x) for path, x in leaves.items()},
            "digests": {path: int(digest) for path, digest in digests.items()},
        }
        # Orbax refuses arrays without elements; there is nothing to write of them.
        arrays = {path: x for path, x in leaves.items() if x.size}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays),
                    description=ocp.args.JsonSave(description),
                ),
                force=True,
            )
        except Exception as error:
            if jax.process_index() == 0:
                for unfinished in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(
                f"Step {step} was not saved to {self.folder}: {_first_line(error)} "
                f"Checkpoints that are there and whole: {self.steps}."
            ) from error

    def restore(self, target: PyTree, step: int | None = None) -> PyTree:
        """Reads a checkpoint, onto whatever devices the target says.

        Args:
          target: gives structure, shapes, dtypes and shardings: a fresh state, or
            ``jax.ShapeDtypeStruct`` leaves, which go to the default device unless they
            have a sharding. The mesh need not be the one that was saved from.
          step: which; None for the newest.

        Returns:
          A tree like the target; numbers have become arrays.

        Raises:
          FileNotFoundError: no such checkpoint.
          ValueError: it was written by another transformation, for other params, or in
            other formats, and the message names the first leaf; or it is damaged.
        """
        ocp = _orbax()
        step = self._find(step)
        try:
            args = ocp.args.Composite(description=ocp.args.JsonRestore())
            saved = self._manager.restore(step, args=args)["description"]
            stored, found, digests = (
                dict(saved[key]) for key in ("format", "leaves", "digests")
            )
        except Exception as error:
            raise self._damaged(step, _first_line(error)) from error
        formats.compare(stored, self._format)
        leaves = {
            path: _as_struct(path, x)
            for path, x in formats.named_leaves(target).items()
        }
        expected = {path: formats.describe_leaf(x) for path, x in leaves.items()}
        formats.check_leaves(found, expected, f"The checkpoint of step {step}")
        arrays = {path: x for path, x in leaves.items() if x.size}
        try:
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(arrays))
            restored = dict(self._manager.restore(step, args=args)["arrays"])
        except Exception as error:
            raise self._damaged(step, _first_line(error)) from error
        for path, x in leaves.items():
            if not x.size:
                restored[path] = jnp.zeros(x.shape, x.dtype, device=x.sharding)
        actual = jax.device_get({path: _digest(restored[path]) for path in leaves})
        for path in leaves:
            if actual[path] != digests.get(path):
                raise self._damaged(
                    step, f"the numbers of {path!r} are not those saved"
                )
        return jax.tree.structure(target).unflatten([restored[path] for path in leaves])

    def close(self) -> None:
        """Frees what the folder's manager holds."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _find(self, step: int | None) -> int:
        if self.latest is None:
            raise FileNotFoundError(f"There is no checkpoint in {self.folder}.")
        if step is None:
            return self.latest
        if step not in self.steps:
            raise FileNotFoundError(
                f"There is no checkpoint of step {step} in {self.folder}, which has "
                f"{self.steps}."
            )
        return step

    def _damaged(self, step: int, why: str) -> ValueError:
        earlier = [other for other in self.steps if other < step]
        advice = (
            f"Delete that folder to go on from step {earlier[-1]}."
            if earlier
            else "There is no earlier one."
        )
        return ValueError(
            f"The checkpoint {self.folder / str(step)} is damaged: {why} {advice}"
        )


def _orbax() -> types.ModuleType:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "Checkpoints are written by orbax, which is not installed: "
            'pip install "optax_flash[checkpoint]".'
        ) from error
    return orbax.checkpoint


def _as_array(path: str, x: Any) -> jax.Array:
    """A leaf as a jax array; refuses what JAX would change or cannot hold."""
    if isinstance(x, jax.Array):
        return x
    try:
        array = jnp.asarray(x)
    except TypeError as error:
        raise ValueError(
            f"{path!r} is a {type(x).__name__}. A checkpoint holds arrays and numbers; "
            "keep other things out of the tree."
        ) from error
    if hasattr(x, "dtype") and x.dtype != array.dtype:
        raise ValueError(
            f"{path!r} is {x.dtype}, of which JAX would keep {array.dtype}. Cast it, "
            "or enable jax_enable_x64."
        )
    return array


def _as_struct(path: str, x: Any) -> jax.ShapeDtypeStruct:
    """A leaf's shape, dtype and sharding."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        x = _as_array(path, x)
    # Without any, orbax would look for the devices that the array was saved from.
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _digest(x: jax.Array) -> jax.Array:
    """See :func:`hashing.digest`; of any dtype."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype.itemsize == 8:
        x = jax.lax.bitcast_convert_type(x, np.uint32)
    return hashing.digest(x)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
