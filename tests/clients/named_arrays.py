"""Named arrays as haliax has them: what an optimizer and a trainer see of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Axis:
    name: str
    size: int


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class NamedArray:
    """An array, and an axis with a name of its own for each of its dimensions."""

    array: Any
    axes: tuple[Axis, ...]

    def __post_init__(self):
        names = [axis.name for axis in self.axes]
        assert len(set(names)) == len(names), names
        if hasattr(self.array, "shape"):
            assert self.array.shape == tuple(axis.size for axis in self.axes)

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("array"), self.array),), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        # Without the checks: transformations put other things in an array's place.
        new = object.__new__(cls)
        object.__setattr__(new, "array", children[0])
        object.__setattr__(new, "axes", axes)
        return new


# Boxes are known by their class's package and name.
NamedArray.__module__ = "haliax.core"


def named(array, *names):
    axes = (Axis(*row) for row in zip(names, array.shape, strict=True))
    return NamedArray(array, tuple(axes))


def dot(x: jax.Array, y: NamedArray) -> jax.Array:
    return jnp.dot(x, y.array)


def is_named(x):
    return isinstance(x, NamedArray)


def shardings(tree, mapping, mesh):
    """By the names of axes; of what has none, on all devices."""

    def of(x):
        names = [axis.name for axis in x.axes] if is_named(x) else []
        return NamedSharding(mesh, P(*map(mapping.get, names)))

    return jax.tree.map(of, tree, is_leaf=is_named)


def shard(tree, mapping, mesh):
    """As ``hax.shard`` does it."""

    def place(x, sharding):
        return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), x)

    return jax.tree.map(place, tree, shardings(tree, mapping, mesh), is_leaf=is_named)
