"""Gradients where their params are, before they meet the optimizer's state.

XLA gives each gradient the sharding that its backward pass suggests. Where that is not
its param's, an update of both would move the state there and back. In linen the boxes
that hold the names see to it.
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_flash import meshes


def placed(grads: Any, params: Any) -> Any:
    """Gradients constrained to the shardings that the names of their params say.

    On meshes of explicit axes types see to it already, and inside of jax.shard_map
    gradients are local. Params without names tell nothing.

    Args:
      grads: a tree of arrays or Variables.
      params: of Variables, otherwise like ``grads``.
    """
    variables = {
        _key(path): x
        for path, x in jax.tree.leaves_with_path(params, is_leaf=_is_variable)
        if _is_variable(x)
    }
    if not variables:
        return grads
    return jax.tree.map_with_path(
        lambda path, x: _placed(x, variables.get(_key(path))),
        grads,
        is_leaf=_is_variable,
    )


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _key(path: Any) -> tuple[str, ...]:
    return tuple(map(str, path))


def _placed(grad: Any, param: nnx.Variable | None) -> Any:
    array = grad.get_value() if isinstance(grad, nnx.Variable) else grad
    shape = getattr(array, "shape", None)
    sharding = None if param is None else _sharding_of(param)
    if shape is None or sharding is None or len(sharding.spec) > len(shape):
        return grad
    spec = meshes.fitted(sharding.mesh, sharding.spec, shape)
    moved = jax.lax.with_sharding_constraint(array, NamedSharding(sharding.mesh, spec))
    return grad.replace(moved) if isinstance(grad, nnx.Variable) else moved


def _sharding_of(param: nnx.Variable) -> NamedSharding | None:
    """What a param's names say of automatic axes; None where they say nothing."""
    metadata = param.get_metadata()
    names = metadata.get("out_sharding")
    mesh = metadata.get("mesh") or jax.sharding.get_abstract_mesh()
    if not isinstance(names, tuple | PartitionSpec) or mesh.empty:
        return None
    if {*mesh.axis_types} != {AxisType.Auto}:
        return None
    # The names of the mesh's axes, where those of the param are logical.
    spec = nnx.get_partition_spec(param).get_value()
    entries = [x if isinstance(x, tuple) else (x,) for x in spec if x is not None]
    if not {name for entry in entries for name in entry} <= {*mesh.axis_names}:
        return None
    return NamedSharding(mesh, spec)
