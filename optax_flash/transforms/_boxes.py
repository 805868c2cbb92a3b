"""Boxes: nodes that hold one array and notes on it, such as the names of its axes.

Variables of Flax's nnx, the boxes of linen's partitioning and the named arrays of
haliax. An optimizer computes with what is in them. A state's arrays come in the boxes
of their params, with those names that fit their own shapes, so that trainers which
shard a state by its names need not know ours. The libraries may not be installed.

So a state's boxes may say other things than those of its params, and then are other
nodes to JAX. Whatever lays the one beside the other takes both out of their boxes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from optax_flash import meshes
from optax_flash.transforms import _init, _mirror, _shardings

PyTree = Any


def is_box(node: Any) -> bool:
    """Whether a node is a box."""
    return _mirror.is_box(type(node))


def has_boxes(tree: PyTree) -> bool:
    """Whether a tree has boxes in it."""
    return any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box)))


def unboxed(tree: PyTree) -> PyTree:
    """The tree with what the boxes hold in their places."""
    if not has_boxes(tree):
        return tree
    return jax.tree.map(lambda x: _held(x) if is_box(x) else x, tree, is_leaf=is_box)


def like(tree: PyTree, boxed: PyTree) -> PyTree:
    """A tree in the boxes of another one.

    Args:
      tree: has the structure of ``unboxed(boxed)``; anything in the place of a None.
      boxed: the tree whose boxes it gets.
    """
    if not has_boxes(boxed):
        return tree
    nodes, structure = jax.tree.flatten(boxed, is_leaf=lambda x: x is None or is_box(x))
    held = structure.flatten_up_to(tree)
    return structure.unflatten(
        [
            _with_held(node, x) if is_box(node) else x
            for node, x in zip(nodes, held, strict=True)
        ]
    )


def taken(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """A transformation of arrays that takes them in boxes, too.

    Args:
      tx: whose state may have arrays of other shapes than the params', such as factors.
    """

    def init(params: optax.Params) -> optax.OptState:
        params = _init.as_arrays(params)
        return fitted(tx.init(unboxed(params)), params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        extra_args = with_boxed_params(extra_args, params)
        new_updates, new_state = tx.update(
            *map(unboxed, (updates, state, params)), **extra_args
        )
        return like(new_updates, updates), like(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def with_boxed_params(extra_args: dict[str, Any], params: PyTree) -> dict[str, Any]:
    """Extra arguments whose functions of params, such as ``obj_fn``, get them in boxes.

    Args:
      extra_args: of ``update``.
      params: as ``update`` got them.
    """
    if not has_boxes(params):
        return extra_args
    structure = jax.tree.structure(unboxed(params))

    def boxed(x: Any) -> Any:
        return like(x, params) if jax.tree.structure(x) == structure else x

    def with_boxes(function: Any) -> Any:
        return lambda *args, **kwargs: function(*map(boxed, args), **kwargs)

    def is_function(x: Any) -> bool:
        # A model may be called, too, but it is a tree.
        return callable(x) and jax.tree_util.all_leaves([x])

    return {k: with_boxes(x) if is_function(x) else x for k, x in extra_args.items()}


def fitted(state: PyTree, params: PyTree) -> PyTree:
    """A new state in the boxes of its params, with the names that fit its arrays.

    A name stays where the state's axis divides by as many shards as the param's does.
    Where no mesh is known, that is as many as the number of devices allows.

    Args:
      state: of arrays.
      params: in their boxes; without any, the state is returned as it is.
    """
    return _in_boxes(state, params, _fitted)


def as_stock(state: PyTree, params: PyTree) -> PyTree:
    """A state in the boxes of its params, with all that they say, as stock optax's is.

    Args:
      state: of arrays.
      params: in their boxes; without any, the state is returned as it is.
    """
    return _in_boxes(
        state, params, lambda _, __, box, x: _with_held(box, x) if is_box(box) else x
    )


def _in_boxes(
    state: PyTree, params: PyTree, put: Callable[[str, str | None, Any, Any], Any]
) -> PyTree:
    """A state in boxes: ``put`` takes a field, a side, a boxed param and an array."""
    if not has_boxes(params):
        return state
    nodes = jax.tree.leaves(params, is_leaf=is_box)
    # Of a param that is masked the box holds nothing.
    boxes = [x for x in nodes if jax.tree.leaves(x)]
    plain = unboxed(params)
    parts, join = _mirror.split_state(state, plain)
    sides = _shardings.sides_of(state, plain)

    def in_boxes(part: _mirror.Mirror) -> PyTree:
        rows = zip(sides(part), boxes, part.entries, strict=True)
        return part.rebuild([put(part.name, *row) for row in rows])

    return join([in_boxes(x) if isinstance(x, _mirror.Mirror) else x for x in parts])


def _held(box: Any) -> Any:
    leaves = jax.tree.leaves(box)
    return leaves[0] if leaves else optax.MaskedNode()


def _with_held(box: Any, x: Any) -> Any:
    if _mirror.is_absent(x):
        # A box of what is masked stays: masks that were made of the params have it.
        return x if jax.tree.leaves(box) else box
    return jax.tree.structure(box).unflatten([x])


def _fitted(field: str, side: str | None, box: Any, x: Any) -> Any:
    """An array of a state in the box of its param."""
    if not is_box(box) or _mirror.is_absent(x):
        return x
    shape = _held(box).shape
    if _mirror.class_name(type(box)) == "haliax.NamedArray":
        return _with_axes(field, side, box, shape, x)
    if hasattr(box, "get_metadata"):
        return _variable(side, box, shape, x)
    names = getattr(box, "names", None)
    boxed = _with_held(box, x)
    if not isinstance(names, tuple):
        return boxed
    kept = _kept(side, names, shape, x.shape, _mesh_of(box))
    return dataclasses.replace(boxed, names=kept)


def _variable(side: str | None, variable: Any, shape: tuple[int, ...], x: Any) -> Any:
    """An array in a variable of nnx, whose optimizers read ``optimizer_sharding``."""
    metadata = variable.get_metadata()
    names = metadata.get("out_sharding")
    boxed = _with_held(variable, x)
    is_names = isinstance(names, tuple | jax.sharding.PartitionSpec)
    if not is_names or "optimizer_sharding" in metadata:
        return boxed
    kept = _kept(side, names, shape, x.shape, _mesh_of(variable))
    return boxed.replace(x, optimizer_sharding=kept)


def _with_axes(
    field: str, side: str | None, array: Any, shape: tuple[int, ...], x: Any
) -> Any:
    """An array in a named one; axes that are not the param's have names of their own.

    Haliax has a name for each axis, so one that does not divide is named after the
    field and the axis that it lies along, which no rule of sharding knows.
    """
    names = [axis.name for axis in array.axes]
    kept = _kept(side, names, shape, x.shape, None)
    along = _shardings.along(side, names, shape, x.shape)
    axes = [
        dataclasses.replace(
            array.axes[0],
            name=name or f"{field}_{source or ''}_{i}",
            size=size,
        )
        for i, (name, source, size) in enumerate(zip(kept, along, x.shape, strict=True))
    ]
    return dataclasses.replace(array, array=x, axes=tuple(axes))


def _kept(
    side: str | None,
    names: Any,
    shape: tuple[int, ...],
    state_shape: tuple[int, ...],
    mesh: Any,
) -> tuple[Any, ...]:
    """The names of a state's array: of its axes along the param's, where they divide.

    Args:
      side: of a factor, see :func:`_shardings.sides_of`.
      names: of the param's axes: axes of the mesh, or logical ones.
      shape: the param's.
      state_shape: the array's.
      mesh: None where it is not known.
    """
    names = [*names, *[None] * (len(shape) - len(names))]
    axes = _shardings.along(side, range(len(shape)), shape, state_shape)

    def kept(size: int, axis: int | None) -> Any:
        if axis is None:
            return None
        shards = (
            meshes.shards(mesh, names[axis])
            if _names_axes(mesh, names[axis])
            else math.gcd(shape[axis], jax.device_count())
        )
        return None if size % shards else names[axis]

    return tuple(map(kept, state_shape, axes))


def _names_axes(mesh: Any, entry: Any) -> bool:
    """Whether an entry of a spec is made of axes of a mesh."""
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    return mesh is not None and not mesh.empty and mesh.shape.keys() >= set(names)


def _mesh_of(box: Any) -> Any:
    metadata = box.get_metadata() if hasattr(box, "get_metadata") else {}
    mesh = metadata.get("mesh") or getattr(box, "mesh", None)
    return mesh or jax.sharding.get_abstract_mesh()
