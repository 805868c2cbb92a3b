"""How the arrays of an optimizer state are sharded: like their params, where they fit.

The one place that decides it, from shapes, field names and what codes stand for.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from optax_flash import meshes
from optax_flash.lowrank import _factors
from optax_flash.transforms import _mirror
from optax_flash.transforms._stored import StateCodecs

PyTree = Any


def own(params: PyTree) -> list[NamedSharding] | None:
    """Each param's own sharding; None where no param is on a mesh.

    A param that is on no mesh, beside others that are, counts as replicated.
    """
    shardings = [getattr(p, "sharding", None) for p in jax.tree.leaves(params)]
    found = [s for s in shardings if isinstance(s, NamedSharding)]
    if not found:
        return None
    replicated = NamedSharding(found[0].mesh, PartitionSpec())
    return [s if isinstance(s, NamedSharding) else replicated for s in shardings]


def of_tree(
    tree: PyTree, params: PyTree, param_shardings: Sequence[NamedSharding], mesh: Any
) -> PyTree:
    """A sharding for every array of a tree: its param's, fitted, where it has one.

    Args:
      tree: an optimizer state, or anything else that holds trees like the params;
        shapes are enough.
      params: shapes are enough.
      param_shardings: of the params' leaves.
      mesh: for what belongs to no param.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    parts, join = _mirror.split_state(tree, params)
    sides = sides_of(tree, params)

    def fitted(part: _mirror.Mirror) -> PyTree:
        rows = zip(
            jax.tree.leaves(params),
            param_shardings,
            part.entries,
            sides(part),
            strict=True,
        )
        return part.rebuild(
            [
                _fitted(sharding, side, p.shape, x.shape) if hasattr(x, "shape") else x
                for p, sharding, x, side in rows
            ]
        )

    return join(
        [fitted(x) if isinstance(x, _mirror.Mirror) else replicated for x in parts]
    )


def sides_of(
    tree: PyTree, params: PyTree
) -> Callable[[_mirror.Mirror], list[str | None]]:
    """Of each part of a tree, for each param, on which side of a product it stands.

    That is ``"left"`` or ``"right"`` for factors and their codes and scales; None for
    all else.

    Args:
      tree: see :func:`of_tree`.
      params: shapes are enough.
    """

    def is_codecs(node: Any) -> bool:
        return isinstance(node, StateCodecs)

    nodes = jax.tree.leaves(tree, is_leaf=is_codecs)
    # Codes and scales do not have the shape of what they stand for.
    known = {
        (entry.path, _kind(entry.field)): entry.factor
        for node in filter(is_codecs, nodes)
        for entry in node.leaves
    }
    paths, leaves = _mirror.leaf_paths(params), jax.tree.leaves(params)

    def sides(part: _mirror.Mirror) -> list[str | None]:
        side, kind = _factors.side_of(part.name), _kind(part.name)
        rows = zip(paths, leaves, part.entries, strict=True)
        return [
            side
            if side
            and hasattr(x, "shape")
            and known.get(
                (path, kind),
                _factors.is_factor(part.name, part.owner, x.shape, p.shape),
            )
            else None
            for path, p, x in rows
        ]

    return sides


def _kind(field: str) -> str:
    """A field's name as the state has it."""
    return re.sub(r"(_\d+)?(_scales)?$", "", field)


def along(
    side: str | None, spec: Any, shape: tuple[int, ...], state_shape: Any
) -> list[Any]:
    """What of a param's spec each axis of a state leaf has, whether it divides or not.

    Args:
      side: of a factor, see :func:`sides_of`.
      spec: the param's, or the names of its axes.
      shape: the param's.
      state_shape: the leaf's.
    """
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    axes = _axes(side, shape, tuple(state_shape))
    return [None if axis is None else entries[axis] for axis in axes]


def _fitted(
    sharding: NamedSharding,
    side: str | None,
    shape: tuple[int, ...],
    state_shape: tuple[int, ...],
) -> NamedSharding:
    """A param's sharding for a state leaf; axes that do not divide are replicated."""
    spec = along(side, sharding.spec, shape, state_shape)
    return NamedSharding(
        sharding.mesh,
        meshes.fitted(sharding.mesh, spec, state_shape),
        memory_kind=sharding.memory_kind,
    )


def _axes(
    side: str | None, shape: tuple[int, ...], state_shape: tuple[int, ...]
) -> Sequence[int | None]:
    """The axis of the param along which each axis of a state leaf lies, or None."""
    n, more = len(shape), len(state_shape) - len(shape)
    if side and n > 1 and not more:
        # (*batch, rank, p) or (*batch, rank, q) of (*batch, p, q), and their scales.
        return [*range(n - 2), None, n - 2 if side == "left" else n - 1]
    if more >= 0 and state_shape[more:-1] == shape[:-1]:
        # Rows like the param's: an array like it, its codes or its scales.
        return [*[None] * more, *range(n)]
    # Some axes were reduced, but equal ones cannot be told apart.
    kept = [
        axes
        for axes in itertools.combinations(range(n), len(state_shape))
        if tuple(shape[axis] for axis in axes) == state_shape
    ]
    return kept[0] if len(kept) == 1 else [None] * len(state_shape)
