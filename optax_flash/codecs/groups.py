"""Groups of neighbours along the last axis, which share a scale.

A group never crosses a row, so a leaf's PartitionSpec fits its scales too, as long as
a shard of the last axis holds whole groups.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from optax_flash import meshes


def num_groups(n: int, group: int) -> int:
    """``ceil(n / group)``: how many groups a row of ``n`` elements has."""
    return -(-n // group)


def split(x: jax.Array, group: int) -> jax.Array:
    """``(..., n)`` to ``(..., ceil(n / group), group)``; the last group is zero padded.

    A 0-d array counts as one row of one element.
    """
    if x.ndim == 0:
        x = x[None]
    n = x.shape[-1]
    padding = -n % group
    if padding:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], num_groups(n, group), group)


def with_whole_groups(x: jax.Array, group: int) -> jax.Array:
    """``x``, its last axis gathered where shards end within a group.

    Only on a mesh of explicit axes, where an array's type tells how it is sharded and a
    reshape has to fit it; elsewhere XLA sees to it.
    """
    if not _is_explicit(x) or not x.ndim:
        return x
    sharding = jax.typeof(x).sharding
    mesh, spec = sharding.mesh, sharding.spec
    if x.shape[-1] % (meshes.shards(mesh, spec[-1]) * group) == 0:
        return x
    return reshard(x, NamedSharding(mesh, PartitionSpec(*spec[:-1], None)))


def sharded_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """``x`` sharded as ``other``, of its rank, along the axes where that divides.

    Likewise only on a mesh of explicit axes.
    """
    if not _is_explicit(other):
        return x
    sharding = jax.typeof(other).sharding
    spec = meshes.fitted(sharding.mesh, sharding.spec, x.shape)
    return reshard(x, NamedSharding(sharding.mesh, spec))


def _is_explicit(x: jax.Array) -> bool:
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def merge(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``(..., groups, group)`` to ``shape``; the inverse of :func:`split`."""
    if not shape:
        return x[0, 0]
    x = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    return x if x.shape[-1] == shape[-1] else x[..., : shape[-1]]
