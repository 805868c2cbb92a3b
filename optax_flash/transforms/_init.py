"""Making an optimizer state without its uncompressed form ever being in memory."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_flash.transforms import _factors, _mirror

PyTree = Any


def compiled(init: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """Runs an init function under jit when it is given real arrays.

    Outside of jit a wrapped optimizer's float32 moments would all be made before the
    first is encoded: 8 bytes a parameter for Adam, at the moment when memory is
    scarcest. Under jit only the codes are. The state is sharded like the params, as
    ``jnp.zeros_like`` does outside of jit; factors are, along the axes that they share.
    """

    @functools.wraps(init)
    def wrapped(params: PyTree) -> PyTree:
        leaves = jax.tree.leaves(params)
        concrete = all(
            isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
            for x in leaves
        )
        if not leaves or not concrete:
            return init(params)
        mesh = _mesh(leaves)
        if mesh is None:
            # A state of zeros does not depend on the params, so jit would not follow.
            with jax.default_device(next(iter(leaves[0].devices()))):
                return jax.jit(init)(params)
        if any(kind == AxisType.Explicit for kind in mesh.axis_types):
            # There the sharding is part of an array's type and needs no help.
            with jax.set_mesh(mesh):
                return jax.jit(init)(params)
        shardings = _state_shardings(init, params, mesh)
        return jax.jit(init, out_shardings=shardings)(params)

    return wrapped


def like_float32(x: jax.Array) -> jax.Array | jax.ShapeDtypeStruct:
    """A param as the wrapped optimizer sees it: half precision becomes float32."""
    if jnp.dtype(x.dtype).itemsize >= 4:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
    # Not through jnp, which costs several times as much to trace.
    return jax.lax.convert_element_type(x, np.dtype(np.float32))


def not_constant(state: PyTree) -> PyTree:
    """The same state, of which the compiler does not know that it is zeros.

    XLA would encode the zeros while it compiles, element by element: seconds for a
    state that takes milliseconds to make.
    """
    zero = jax.lax.optimization_barrier(jnp.zeros([], jnp.float32))

    def add(x: Any) -> Any:
        # Scalars cost nothing, and may be weakly typed, which adding would change.
        large = getattr(x, "ndim", 0) > 0 and jnp.issubdtype(x.dtype, jnp.floating)
        return x + zero.astype(x.dtype) if large else x

    return jax.tree.map(add, state)


def stub(x: Any, dtype: jax.typing.DTypeLike) -> Any:
    """What stands beside a leaf that needs no scales or residual: zeros ``(*rows, 1)``.

    Every param has an array in every tree, or ``optax.tree_map_params`` with a tree of
    PartitionSpecs would find nothing to map one to.
    """
    if not hasattr(x, "shape"):
        return x
    # Made from x, so that the rows stay sharded as they are.
    zeros = jnp.zeros_like(x, dtype=dtype)
    zeros = zeros if zeros.ndim else zeros[None]
    return jnp.sum(zeros, axis=-1, keepdims=True, dtype=dtype)


def _mesh(leaves: list[jax.Array]) -> Any:
    """The mesh over which arrays are sharded; None for a single device."""
    for x in leaves:
        if isinstance(x.sharding, NamedSharding) and x.sharding.num_devices > 1:
            return x.sharding.mesh
    return None


def _state_shardings(
    init: Callable[[PyTree], PyTree], params: PyTree, mesh: Any
) -> PyTree:
    """A sharding for each array of the state: its param's, where there is one."""
    replicated = NamedSharding(mesh, PartitionSpec())
    state = jax.eval_shape(lambda p: init(p), params)
    parts, join = _mirror.split_state(state, params)

    def shardings(part: _mirror.Mirror) -> PyTree:
        fitted = [
            _fit(p.sharding, part.name, p.shape, x.shape) if hasattr(x, "shape") else x
            for p, x in zip(jax.tree.leaves(params), part.entries, strict=True)
        ]
        return part.rebuild(fitted)

    return join(
        [
            shardings(part) if isinstance(part, _mirror.Mirror) else replicated
            for part in parts
        ]
    )


def _fit(
    sharding: Any, field: str, shape: tuple[int, ...], state_shape: tuple[int, ...]
) -> Any:
    """A param's sharding for a state leaf; axes that do not divide are replicated."""
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    entries = []
    for size, axis in zip(state_shape, _axes(field, shape, state_shape), strict=True):
        entry = None if axis is None else spec[axis]
        names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        shards = math.prod(sharding.mesh.shape[name] for name in names)
        entries.append(None if size % shards else entry)
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def _axes(
    field: str, shape: tuple[int, ...], state_shape: tuple[int, ...]
) -> Sequence[int | None]:
    """The axis of the param along which each axis of a state leaf lies, or None."""
    n, more = len(shape), len(state_shape) - len(shape)
    side = _factors.side_of(field)
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
