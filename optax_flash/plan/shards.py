"""Bytes on each device, of params and optimizer state."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from optax_flash import sharding
from optax_flash.transforms import _inside

PyTree = Any

AXES = ("data", "fsdp")
"""Mesh axes that the planner knows. Both divide the batch, fsdp divides params too."""

STATE = ("residual", "codes", "scales", "other state")
"""Kinds of optimizer state, as in :func:`optax_flash.memory_report`."""


def make_mesh(axes: Mapping[str, int]) -> AbstractMesh:
    """A mesh that needs no devices.

    Raises:
      ValueError: an axis that is not in :data:`AXES`, or a size below 1.
    """
    for name, size in axes.items():
        if name not in AXES:
            raise ValueError(
                f"Mesh axis {name!r} is not known; these are: {', '.join(AXES)}. For "
                "another layout give params with shardings."
            )
        if size < 1:
            raise ValueError(f"Mesh axis {name!r} has {size} devices; give 1 or more.")
    return AbstractMesh(tuple(axes.values()), tuple(axes))


def place(params: PyTree, mesh: AbstractMesh) -> PyTree:
    """Params with a sharding for each: FSDP, along the first axis that divides.

    The layers' axis of stacked blocks is not divided, nor are vectors.
    """
    shards = mesh.shape.get("fsdp", 1)

    def spec(path: tuple[Any, ...], x: Any) -> PartitionSpec:
        stacked = _parts_name(path) == "blocks"
        for axis in range(int(stacked), x.ndim):
            if x.ndim > 1 + stacked and x.shape[axis] % shards == 0 and shards > 1:
                return PartitionSpec(*[None] * axis, "fsdp")
        return PartitionSpec()

    def placed(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, spec(path, x))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(placed, params)


def nbytes(tree: PyTree) -> int:
    """Bytes on each device."""
    return sum(_nbytes(x, x.sharding) for x in jax.tree.leaves(tree))


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> dict[str, int]:
    """Bytes of an optimizer state on each device, by :data:`STATE`.

    Args:
      tx: the transformation.
      params: as :func:`place` gives them.
    """
    state = jax.eval_shape(lambda p: tx.init(p), sharding.shapes(params))
    shardings = sharding.state_sharding(tx, params)
    counts = Counter({kind: 0 for kind in STATE})

    rows = zip(
        _inside.kinds(state),
        jax.tree.leaves(state),
        jax.tree.leaves(shardings),
        strict=True,
    )
    for kind, x, placed in rows:
        counts[kind] += _nbytes(x, placed)
    return dict(counts)


def _parts_name(path: tuple[Any, ...]) -> Any:
    return getattr(path[0], "key", None) if path else None


def _nbytes(x: Any, placed: NamedSharding) -> int:
    return math.prod(placed.shard_shape(x.shape)) * x.dtype.itemsize
