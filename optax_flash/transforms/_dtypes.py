"""Dtypes of what an update returns: of updates, and of a state that keeps its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def wider(grad: Any, param: Any = None) -> np.dtype:
    """The dtype of an update: the wider of its gradient's and its param's.

    So a float32 param gets a float32 update of a float16 gradient, as in stock optax,
    whose moments have the params' dtype. Of float16 and bfloat16 neither holds the
    other: float32.

    Args:
      grad: has a dtype.
      param: the same; anything without a floating dtype counts as no param.
    """
    dtype = np.dtype(grad.dtype)
    other = np.dtype(getattr(param, "dtype", dtype))
    if dtype == other or not _are_floating(dtype, other):
        return dtype
    if dtype.itemsize == other.itemsize:
        return np.dtype(np.float32)
    return max(dtype, other, key=lambda d: d.itemsize)


def of_updates(grads: PyTree, params: PyTree) -> list[np.dtype]:
    """The dtype of each leaf's update, see :func:`wider`.

    Args:
      grads: a tree of arrays.
      params: None, or params; those of another structure do not count.
    """
    leaves, treedef = jax.tree.flatten(grads)
    try:
        beside = treedef.flatten_up_to(params)
    except (ValueError, TypeError, KeyError):
        beside = [None] * len(leaves)
    return [wider(g, p) for g, p in zip(leaves, beside, strict=True)]


def cast_updates(updates: PyTree, grads: PyTree, params: PyTree) -> PyTree:
    """Updates, a tree like ``grads``, in the dtypes of :func:`of_updates`.

    Those of gradients that are whole numbers stay as they are, as in optax.
    """
    leaves, treedef = jax.tree.flatten(grads)
    rows = zip(
        treedef.flatten_up_to(updates), leaves, of_updates(grads, params), strict=True
    )
    return treedef.unflatten(
        [
            as_dtype(u, dtype) if jnp.issubdtype(g.dtype, jnp.inexact) else u
            for u, g, dtype in rows
        ]
    )


def kept(new: PyTree, old: PyTree) -> PyTree:
    """A state whose floating arrays have the dtypes that they had.

    A gradient that is wider than its param makes optax's moments wider, and no scan
    carries them.

    Args:
      new: what ``update`` returned.
      old: what it was given. Where the structure is another, nothing is cast.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        return new

    def keep(x: Any, before: Any) -> Any:
        known = hasattr(x, "dtype") and hasattr(before, "dtype")
        if not known or not _are_floating(x.dtype, before.dtype):
            return x
        return as_dtype(x, before.dtype)

    return jax.tree.map(keep, new, old)


def as_dtype(x: Any, dtype: Any) -> Any:
    """An array in a dtype. Not through jnp, which takes longer to trace."""
    same = getattr(x, "dtype", None) == dtype
    return x if same else jax.lax.convert_element_type(x, dtype)


def _are_floating(*dtypes: Any) -> bool:
    return all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
