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

from optax_flash.codecs import hashing
from optax_flash.io import formats
from optax_flash.transforms import _arguments

PyTree = Any

_UNFINISHED = ".orbax-checkpoint-tmp"
"""What orbax appends to the name of a folder while it writes to it."""


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

        Processes that only restore may open the folder of another's run. Those of one
        ``jax.distributed`` run save together; no others may save into one folder.

        Args:
          folder: on a file system, not in a bucket.
          tx: the transformation that makes the states; a Flax train state's ``tx``.
          params: arrays or ``jax.ShapeDtypeStruct``, as ``tx`` gets them.
          keep: how many checkpoints stay, the newest; None for all. While one is
            written there is one more.
        """
        ocp = _orbax()
        call = "Checkpoints(folder, tx, params)"
        _arguments.check_path(folder, call)
        _arguments.check_transformation(tx, (params,), call)
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}. Keep at least 1, or None for all.")
        self.folder = pathlib.Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._format = formats.state_format(tx, params)
        self._keep = keep
        self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(int(x.name) for x in self.folder.iterdir() if x.name.isdigit())

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step; None where there is none."""
        return max(self.steps, default=None)

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
        _arguments.check_step(step, "save(step, tree)")
        if self.latest is not None and step <= self.latest:
            raise ValueError(
                f"Step {step} cannot be saved: {self.folder} holds a checkpoint of "
                f"step {self.latest}. Save a later step, or delete that folder."
            )
        leaves = {
            path: _as_array(path, x) for path, x in formats.named_leaves(tree).items()
        }
        numbers = {path: _numbers(x) for path, x in leaves.items()}
        digests = {path: hashing.digest(x) for path, x in numbers.items()}
        digests = jax.device_get(digests)
        description = {
            "format": self._format,
            "leaves": {path: formats.describe_leaf(x) for path, x in leaves.items()},
            "digests": {path: int(digest) for path, digest in digests.items()},
        }
        arrays = {
            path: x if _is_placed(x) else np.asarray(x)
            for path, x in numbers.items()
            if x.size  # Orbax refuses arrays without elements, and needs none.
        }
        self._remove_unfinished()
        items = {"description": ocp.args.JsonSave(description)}
        if arrays:  # Orbax refuses an empty tree, too.
            items["arrays"] = ocp.args.StandardSave(arrays)
        try:
            self._checkpointer.save(
                self.folder / str(step), args=ocp.args.Composite(**items)
            )
        except Exception as error:
            self._remove_unfinished()
            raise OSError(
                f"Step {step} was not saved to {self.folder}: {_first_line(error)} "
                f"Checkpoints that are there and whole: {self.steps}."
            ) from error
        self._remove_old()

    def restore(self, target: PyTree, step: int | None = None) -> PyTree:
        """Reads a checkpoint, onto whatever devices the target says.

        Args:
          target: gives structure, shapes, dtypes and shardings: a fresh state, or
            ``jax.ShapeDtypeStruct`` leaves, which go to the default device if they have
            no sharding. The mesh need not be the one that was saved from.
          step: which; None for the newest.

        Returns:
          A tree like the target; numbers have become arrays.

        Raises:
          FileNotFoundError: no such checkpoint.
          ValueError: it was written by another transformation, for other params, or in
            other formats, and the message names the first leaf; or it is damaged.
        """
        ocp = _orbax()
        if step is not None:
            _arguments.check_step(step, "restore(target, step)")
        step = self._find(step)
        folder = self.folder / str(step)
        try:
            args = ocp.args.Composite(description=ocp.args.JsonRestore())
            saved = self._checkpointer.restore(folder, args=args)["description"]
            stored, found, digests = (
                dict(saved[key]) for key in ("format", "leaves", "digests")
            )
        except Exception as error:
            raise self._damaged(step, _first_line(error)) from error
        formats.compare(stored, self._format)
        targets = {
            path: x if isinstance(x, jax.ShapeDtypeStruct) else _as_array(path, x)
            for path, x in formats.named_leaves(target).items()
        }
        expected = {path: formats.describe_leaf(x) for path, x in targets.items()}
        formats.check_leaves(found, expected, f"The checkpoint of step {step}")
        numbers = {path: _numbers_like(x) for path, x in targets.items()}
        try:
            arrays = {path: x for path, x in numbers.items() if x.size}
            if arrays:
                args = ocp.args.Composite(arrays=ocp.args.StandardRestore(arrays))
                arrays = self._checkpointer.restore(folder, args=args)["arrays"]
        except Exception as error:
            raise self._damaged(step, _first_line(error)) from error
        restored = {
            path: jnp.asarray(arrays[path])
            if x.size
            else jnp.zeros(x.shape, x.dtype, device=getattr(x, "sharding", None))
            for path, x in numbers.items()
        }
        actual = {path: hashing.digest(x) for path, x in restored.items()}
        actual = jax.device_get(actual)
        for path in actual:
            if actual[path] != digests.get(path):
                why = f"the numbers of {path!r} are not those that were saved."
                raise self._damaged(step, why)
        leaves = [_from_numbers(restored[path], x) for path, x in targets.items()]
        return jax.tree.structure(target).unflatten(leaves)

    def close(self) -> None:
        """Ends orbax's threads."""
        self._checkpointer.close()

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

    def _remove_old(self) -> None:
        """Removes all but the newest checkpoints, each at once by a new name."""
        if self._keep is None or jax.process_index() != 0:
            return
        for step in self.steps[: -self._keep]:
            (self.folder / str(step)).rename(self.folder / f"{step}{_UNFINISHED}")
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Removes what is left of saves that failed, and of processes that died."""
        if jax.process_index() == 0:
            for unfinished in self.folder.glob(f"*{_UNFINISHED}*"):
                shutil.rmtree(unfinished, ignore_errors=True)

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


def _is_placed(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether somebody chose the devices of a leaf.

    Others go through the host, and are where JAX pleases afterwards, too: a counter on
    a device of its own would keep a step from running on a mesh.
    """
    return x.committed if isinstance(x, jax.Array) else x.sharding is not None


def _is_key(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _numbers(x: jax.Array) -> jax.Array:
    """An array as numbers; random keys are not, to JAX."""
    return jax.random.key_data(x) if _is_key(x) else x


def _numbers_like(x: jax.Array | jax.ShapeDtypeStruct) -> Any:
    """What tells orbax the shape, dtype and place of an array's numbers."""
    placed = _is_placed(x)
    if _is_key(x):
        x = jax.eval_shape(jax.random.key_data, x)
    if placed:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return np.empty(x.shape, x.dtype)


def _from_numbers(x: jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """The inverse of :func:`_numbers`."""
    if not _is_key(like):
        return x
    impls = []  # Traced, for a ShapeDtypeStruct does not say its own.
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(x, impl=impls[0])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
