"""How many shards an axis has, what of a spec an array can have, and known meshes."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.core
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def shards(mesh: Any, entry: Any) -> int:
    """The number of shards of an axis with an entry of a spec: None, a name, several.

    Args:
      mesh: a mesh, also an abstract one.
      entry: of a PartitionSpec.
    """
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    return math.prod(mesh.shape[name] for name in names)


def fitted(mesh: Any, spec: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """A spec for an array of ``shape``: axes that do not divide are replicated."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    return PartitionSpec(
        *[
            None if size % shards(mesh, entry) else entry
            for size, entry in zip(shape, entries, strict=True)
        ]
    )


def context(mesh: Any) -> contextlib.AbstractContextManager[Any]:
    """In which explicit axes are known; arrays made from none of them are not."""
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


def context_of(arrays: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """In which one operation after another runs on arrays that are on a mesh.

    On explicit axes a new array has the type of those that it is like, and outside of
    jit jax does not find the devices for it. Nothing where the mesh is known already,
    as under ``jax.set_mesh`` or jit.
    """
    mesh = None
    for x in arrays:
        if isinstance(x, jax.core.Tracer):
            return contextlib.nullcontext()
        sharding = getattr(x, "sharding", None)
        if mesh is None and isinstance(sharding, NamedSharding):
            mesh = sharding.mesh
    if mesh is None or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    try:
        return context(mesh)
    except ValueError:
        # Something around is traced, and no mesh can be set.
        return contextlib.nullcontext()


def auto_sharded(
    function: Callable[..., tuple[Any, ...]],
    arrays: Sequence[jax.Array],
    scalars: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Any, ...]:
    """A function's results on arrays that may be on explicit axes.

    There each product over a sharded axis would have to say what becomes of it. Here
    the results do, and XLA decides how to share the work.

    Args:
      function: of the arrays, and of scalars by name. Its results are like the arrays,
        in number, shape and sharding.
      arrays: its operands.
      scalars: Python's numbers, or arrays of shape ().
    """
    types = [jax.typeof(x) for x in arrays]
    mesh = next((x.sharding.mesh for x in types if not x.sharding.mesh.empty), None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return function(*arrays, **scalars)
    # Python's numbers stay what they are: 1 - 0.999 is another number in float32.
    traced = {k: x for k, x in scalars.items() if isinstance(x, jax.Array)}
    sharded: Any = jax.sharding.auto_axes(
        lambda arrays, traced: function(*arrays, **{**scalars, **traced}),
        out_sharding=tuple(NamedSharding(mesh, x.sharding.spec) for x in types),
    )
    return sharded(list(arrays), traced)
