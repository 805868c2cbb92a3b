"""What a checkpoint must say of an optimizer state, and the check at restore."""

from typing import Any

import jax
import optax

from optax_flash.transforms import _records

VERSION = 1
"""Of the storage formats. It changes whenever old codes would decode differently."""


def describe(
    tx: optax.GradientTransformation, params: optax.Params
) -> tuple[optax.OptState, list[_records.Record]]:
    """The state's shapes and how each leaf in codes is stored; allocates nothing.

    Args:
      tx: any transformation, however deeply it wraps ours.
      params: arrays or ``jax.ShapeDtypeStruct``.
    """
    with _records.collect() as records:
        # A new function each time: a cached trace would not run init again.
        state = jax.eval_shape(lambda p: tx.init(p), params)
    return state, records


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
      ``{"version": int, "leaves": {"path/field": codec}}``, for ``json.dump``.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> params = {"w": jnp.ones((64, 64))}
      >>> optax_flash.state_format(optax_flash.lion8(1e-4), params)
      {'version': 1, 'leaves': {'w/mu': 'Companded8(signed=True, group=32)'}}
    """
    _, records = describe(tx, params)
    leaves = {f"{record.path}/{record.field}": record.codec for record in records}
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
    expected = state_format(tx, params)
    if saved.get("version") != VERSION:
        raise ValueError(
            f"The checkpoint has format version {saved.get('version')!r}, this "
            f"optax_flash reads {VERSION}. Use the release that wrote it."
        )
    names = [*expected["leaves"], *saved["leaves"]]
    for name in names:
        there = saved["leaves"].get(name, "no codes")
        here = expected["leaves"].get(name, "no codes")
        if there != here:
            raise ValueError(
                f"The checkpoint stores {name!r} as {there}, this transformation as "
                f"{here}. Make the transformation with the checkpoint's codecs, bits "
                "and min_size, or start from its params with a new state."
            )
