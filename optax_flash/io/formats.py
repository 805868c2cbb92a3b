"""What a checkpoint must say of an optimizer state, and the check at restore."""

from typing import Any

import jax
import optax

from optax_flash.transforms import _arguments, _inside, _mirror
from optax_flash.transforms._stored import VERSION, compare


def state_format(
    tx: optax.GradientTransformation, params: optax.Params
) -> dict[str, Any]:
    """How a transformation stores its state, as plain data to keep in a checkpoint.

    Codes of one format have the shapes and dtypes of another's, so a checkpoint that
    holds only arrays can be read wrongly without an error.

    Args:
      tx: the transformation.
      params: arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      ``{"version": int, "leaves": {"path/field": codec}}``, for ``json.dump``. With
      the codec of a low-rank factor comes its shape.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> params = {"w": jnp.ones((64, 64))}
      >>> optax_flash.state_format(optax_flash.lion8(1e-4), params)
      {'version': 3, 'leaves': {'w/mu': 'Companded8(signed=True, group=32)'}}
    """
    _arguments.check_transformation(tx, (params,), "state_format(tx, params)")
    params = _mirror.arrays_of(params)
    state = jax.eval_shape(lambda p: tx.init(p), params)
    leaves = {entry.name: entry.describe() for entry, _, _ in _inside.stored(state)}
    return {"version": VERSION, "leaves": leaves}


def check_format(
    saved: dict[str, Any], tx: optax.GradientTransformation, params: optax.Params
) -> None:
    """Compares a checkpoint's :func:`state_format` with a transformation.

    Args:
      saved: what ``state_format`` returned when the checkpoint was written.
      tx: the transformation that is to read the state.
      params: arrays or ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: they differ. The message names the first leaf and both formats.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> params = {"w": jnp.ones((64, 64))}
      >>> saved = optax_flash.state_format(optax_flash.adamw8(), params)
      >>> optax_flash.check_format(saved, optax_flash.adamw8(1e-4), params)
    """
    call = "check_format(saved, tx, params)"
    _arguments.check_transformation(tx, (saved, params), call)
    compare(saved, state_format(tx, params))


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as ``"opt_state/0/mu/kernel"``, in order."""
    leaves: dict[str, Any] = {}
    for name, leaf in zip(_mirror.leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        if name in leaves:
            raise ValueError(
                f"Two leaves have the path {name!r}. Rename one; a '/' inside of a key "
                "may be the cause."
            )
        leaves[name] = leaf
    return leaves


def describe_leaf(x: Any) -> str:
    """An array's dtype and shape, such as ``"float32[64, 64]"``."""
    return f"{x.dtype}{list(x.shape)}"


def check_leaves(found: dict[str, str], expected: dict[str, str], what: str) -> None:
    """Raises a ValueError that names the first leaf in which two trees differ.

    Args:
      found: what there is, by path, see :func:`describe_leaf`.
      expected: what there should be.
      what: has what was found, and begins the message.
    """
    for path in [*expected, *found]:
        there, here = found.get(path, "nothing"), expected.get(path, "nothing")
        if there != here:
            raise ValueError(
                f"{what} has {there} at {path!r} where {here} is expected. It is of "
                "another transformation, or of other params."
            )
