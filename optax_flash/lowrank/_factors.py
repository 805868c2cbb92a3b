"""Moments held as products of two thin factors: which leaves, and the arithmetic.

A moment of shape ``(*batch, p, q)`` is ``left.T @ right`` with ``left`` of shape
``(*batch, rank, p)`` and ``right`` of shape ``(*batch, rank, q)``. The rank comes
first, so that codecs group neighbours of one component, which are of one size, and so
that a factor's last axis is sharded like one axis of its param.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_flash.transforms import _mirror

PyTree = Any
Rank = int | float
Where = Callable[[str], bool] | None

STATES = frozenset(
    {
        "optax_flash.ScaleByLoraPreState",
        "optax_flash.ScaleByLoraPreMuonState",
        "optax_flash.ScaleByLowrankAdamState",
    }
)
"""Classes in which a field that is named after a side has factors of whatever shape."""

HIGHEST = jax.lax.Precision.HIGHEST


def check_rank(name: str, rank: Rank) -> None:
    """Raises a ValueError where a rank is neither a count nor a share of a side.

    Args:
      name: of the transformation, which begins the message.
      rank: an int of at least 1, or a float in (0, 1].
    """
    is_count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    is_share = isinstance(rank, float) and 0 < rank <= 1
    if not (is_count or is_share):
        raise ValueError(
            f"{name}: rank is {rank!r}. Give a whole number of at least 1, or a float "
            "in (0, 1], a share of a matrix's smaller side."
        )


def rank_of(shape: tuple[int, ...], rank: Rank) -> int:
    """The rank for a leaf of two axes or more: a count, or a share of the smaller."""
    return max(1, round(rank * min(shape[-2:]))) if isinstance(rank, float) else rank


def check_ranks(
    what: str, params: PyTree, ranks: list[int | None], columns: list[list[Any]]
) -> None:
    """Raises a ValueError that names the first leaf with factors of another rank.

    They are factors like others, with which an update would go on.

    Args:
      what: the transformation, which begins the message.
      params: or gradients, if there are no params.
      ranks: of the leaves' factors; None where a leaf has none.
      columns: of the state, for the leaves: left and right factors in turn.
    """
    rows = zip(
        _mirror.leaf_paths(params),
        jax.tree.leaves(params),
        ranks,
        zip(*columns, strict=True),
        strict=True,
    )
    for path, p, rank, factors in rows:
        found = [x.shape for x in factors if hasattr(x, "shape")]
        expected = [] if rank is None else _shapes(p.shape, rank, len(factors))
        if found != expected:
            raise ValueError(
                f"{what}: the state has {_listed(found)} of {path!r}, whose shape is "
                f"{list(p.shape)}, where this transformation has {_listed(expected)}. "
                "The state was made with another rank, with other settings for which "
                "leaves have factors, or for other shapes: pass those, or call init "
                "again."
            )


def _shapes(shape: tuple[int, ...], rank: int, count: int) -> list[tuple[int, ...]]:
    """Of so many factors of a leaf, left and right ones in turn."""
    *batch, p, q = shape
    return [(*batch, rank, (p, q)[i % 2]) for i in range(count)]


def _listed(shapes: list[tuple[int, ...]]) -> str:
    # Two moments of a leaf have factors of the same shapes.
    found = " and ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
    return f"factors {found}" if shapes else "no factors"


def beside(params: PyTree, updates: PyTree) -> PyTree:
    """The params of the updates; where there are none, the updates themselves."""
    params = _mirror.narrowed(params, updates)
    alike = jax.tree.structure(params) == jax.tree.structure(updates)
    return params if alike else updates


def side_of(field: str) -> str | None:
    """``"left"`` or ``"right"`` where a field, or its scales, is named after a side.

    So ``"mu_left"`` is, and ``"nu_right_1_scales"``.
    """
    found = re.search(r"_(left|right)(_\d+)?(_scales)?$", field)
    return found and found[1]


def is_factor(field: str, owner: type, shape: Any, of_param: Any) -> bool:
    """Whether an array of a state is a factor of its param's moment.

    By its field's name. Other states may have such names for arrays like the params; in
    ours a factor may have its param's shape.

    Args:
      field: see :func:`side_of`.
      owner: the class of the state.
      shape: of the array.
      of_param: the shape of the param.
    """
    ours = _mirror.class_name(owner) in STATES
    return side_of(field) is not None and (ours or tuple(shape) != tuple(of_param))


def product(
    left: jax.Array, right: jax.Array, precision: jax.lax.Precision = HIGHEST
) -> jax.Array:
    """``left.T @ right``: (*batch, p, q), of (*batch, rank, p), (*batch, rank, q)."""
    return jnp.einsum("...rp,...rq->...pq", left, right, precision=precision)


def gram(factor: jax.Array) -> jax.Array:
    """``factor @ factor.T``: (*batch, rank, rank) of (*batch, rank, n)."""
    return jnp.einsum("...rn,...sn->...rs", factor, factor, precision=HIGHEST)


def onto_rows(
    left: jax.Array, matrix: jax.Array, precision: jax.lax.Precision = HIGHEST
) -> jax.Array:
    """``left @ matrix``: (*batch, rank, q), of (*batch, rank, p), (*batch, p, q)."""
    return jnp.einsum("...rp,...pq->...rq", left, matrix, precision=precision)


def onto_columns(
    right: jax.Array, matrix: jax.Array, precision: jax.lax.Precision = HIGHEST
) -> jax.Array:
    """``right @ matrix.T``: (*batch, rank, p), of (*batch, rank, q), (*batch, p, q)."""
    return jnp.einsum("...rq,...pq->...rp", right, matrix, precision=precision)


def zeros(param: jax.Array, axis: int, rank: int) -> jax.Array:
    """Zeros (*batch, rank, n) for an axis of a param, -2 or -1, sharded as it is."""
    # A sum of zeros made from the param keeps the sharding of the axes that remain.
    dense = jnp.zeros_like(param, dtype=jnp.float32)
    one = jnp.sum(dense, axis=-3 - axis)[..., None, :]
    return jnp.broadcast_to(one, (*one.shape[:-2], rank, one.shape[-1]))


def inverse_of_lower(triangle: jax.Array) -> jax.Array:
    """The inverse of lower triangles (*batch, k, k)."""
    eye = jnp.eye(triangle.shape[-1], dtype=triangle.dtype)
    return jax.lax.linalg.triangular_solve(
        triangle, jnp.broadcast_to(eye, triangle.shape), left_side=True, lower=True
    )


def normal(path: str, field: str, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 numbers that depend on a leaf's path and field alone."""
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(f"{path}/{field}".encode()))
    return jax.random.normal(key, shape, jnp.float32)


def mix(weights: jax.Array, factor: jax.Array) -> jax.Array:
    """``weights @ factor``: (*batch, k, n), of (*batch, k, rank), (*batch, rank, n)."""
    return jnp.einsum("...kr,...rn->...kn", weights, factor, precision=HIGHEST)
