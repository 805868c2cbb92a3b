"""``state_sharding``: where each array of an optimizer state goes on a mesh."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_flash import meshes
from optax_flash.lowrank import _factors
from optax_flash.transforms import (
    _arguments,
    _boxes,
    _init,
    _inside,
    _mirror,
    _shardings,
)
from optax_flash.transforms._stored import Stored

PyTree = Any


def state_sharding(
    tx: optax.GradientTransformation,
    params: optax.Params,
    param_sharding: PyTree = None,
) -> PyTree:
    """The sharding of every array of an optimizer state: its param's.

    For jit's ``in_shardings`` and ``out_shardings``, or to restore a checkpoint.
    Nothing is allocated. ``tx.init``, given sharded arrays, shards its state the same.

    Codes, scales, residuals and any other array with the rows of its param have the
    param's sharding, factors that of the axes which they share with it. An axis that
    does not divide over its shards is replicated, as are counters, and what belongs to
    no param.

    Args:
      tx: any transformation, however deeply it wraps ours.
      params: arrays or ``jax.ShapeDtypeStruct``.
      param_sharding: a tree like ``params`` of NamedShardings, or of PartitionSpecs
        under ``jax.set_mesh``; one of them may stand for a whole subtree, or for all.
        The mesh may be abstract. None for the sharding that each param has; a param on
        no mesh then counts as replicated.

    Returns:
      A tree like ``tx.init(params)`` of NamedShardings. Arrays that come in boxes, as
      with Flax's metadata, have theirs in the place of the box.

    Raises:
      ValueError: ``param_sharding`` is not a tree for these params, or gives one a
        sharding that its shape does not allow; no sharding or mesh is known. The
        message names the leaf.

    Warns:
      UserWarning: shards of a param's last axis end within groups of codes. Results are
        the same, but each update gathers that axis.

    Example:
      >>> import jax, jax.numpy as jnp, optax_flash
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",))
      >>> params = {"w": jax.ShapeDtypeStruct((1024, 256), jnp.float32)}
      >>> tx = optax_flash.lion8(1e-4)
      >>> sharding = optax_flash.state_sharding(
      ...     tx, params, NamedSharding(mesh, P("fsdp"))
      ... )
      >>> sharding.scales["mu_scales"]["w"].spec
      P('fsdp', None)
    """
    call = "state_sharding(tx, params, param_sharding)"
    _arguments.check_transformation(tx, (params, param_sharding), call)
    state = jax.eval_shape(lambda p: tx.init(p), shapes(_mirror.arrays_of(params)))
    return tree_sharding(state, tx, params, param_sharding)


def tree_sharding(
    tree: PyTree,
    tx: optax.GradientTransformation,
    params: optax.Params,
    param_sharding: PyTree,
) -> PyTree:
    """The same for any tree that holds a state of ``tx``, such as a train state."""
    params = _init.as_arrays(_mirror.arrays_of(params))
    # A mask or labels that init compares with the params may be in boxes, too.
    state = jax.eval_shape(lambda p: tx.init(p), shapes(params))
    params = _boxes.unboxed(params)
    entries = [
        entry for entry, _, scales in _inside.stored(state) if scales is not None
    ]
    if isinstance(params, optax.LookaheadParams):
        # The state mirrors one of the two copies.
        params = params.fast
        param_sharding = getattr(param_sharding, "fast", param_sharding)
    shardings = _of_params(params, param_sharding)
    _warn_of_cut_groups(entries, params, shardings)
    mesh = shardings[0].mesh if shardings else _mesh(param_sharding)
    return _shardings.of_tree(_boxes.unboxed(tree), params, shardings, mesh)


def shapes(params: PyTree) -> PyTree:
    """Shapes alone: the types of an explicit mesh would need its context in init."""
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params
    )


def _of_params(params: PyTree, given: PyTree) -> list[NamedSharding]:
    """The sharding of each leaf, checked against its shape."""
    paths = _mirror.leaf_paths(params)
    leaves = jax.tree.leaves(params)
    if not leaves:
        return []
    if given is None:
        shardings: Sequence[Any] | None = _shardings.own(params)
        if shardings is None:
            raise ValueError(
                f"state_sharding: param {paths[0]!r} is on no mesh, and no other is. "
                "Pass param_sharding, or params that are sharded by NamedShardings."
            )
    else:
        try:
            shardings = jax.tree.leaves(jax.tree.broadcast(given, params))
        except ValueError as error:
            raise ValueError(_difference(given, params)) from error
    rows = zip(paths, leaves, shardings, strict=True)
    return [_checked(path, p.shape, sharding) for path, p, sharding in rows]


def _mesh(given: PyTree) -> Any:
    """The mesh of a state that belongs to no params at all."""
    known = [x.mesh for x in jax.tree.leaves(given) if isinstance(x, NamedSharding)]
    mesh = known[0] if known else jax.sharding.get_mesh()
    if mesh.empty:
        raise ValueError(
            "state_sharding: there are no params, and so no mesh is known. Pass a "
            "NamedSharding, or call state_sharding under jax.set_mesh(mesh)."
        )
    return mesh


def _checked(path: str, shape: tuple[int, ...], sharding: Any) -> NamedSharding:
    """A param's sharding as a NamedSharding that its shape allows."""
    found = f"state_sharding: param {path!r} has shape {list(shape)} and"
    if isinstance(sharding, PartitionSpec):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(
                f"{found} {sharding}, but there is no mesh. Call state_sharding under "
                "jax.set_mesh(mesh), or pass NamedShardings."
            )
        try:
            sharding = NamedSharding(mesh, sharding)
        except ValueError as error:
            raise ValueError(f"{found} {sharding}: {error}") from error
    if not isinstance(sharding, NamedSharding):
        raise ValueError(
            f"{found} in param_sharding {sharding!r}. Pass a NamedSharding or a "
            "PartitionSpec."
        )
    spec = sharding.spec
    if len(spec) > len(shape):
        raise ValueError(f"{found} {spec}, which is for {len(spec)} axes.")
    for axis, entry in enumerate(spec):
        shards = meshes.shards(sharding.mesh, entry)
        if shape[axis] % shards:
            raise ValueError(
                f"{found} {spec}, but axis {axis} does not divide into {shards} "
                "shards. Shard another axis, replicate this one, or pad the param."
            )
    return sharding


def _difference(given: PyTree, params: PyTree) -> str:
    """What to say of a tree of shardings that does not fit the params."""
    paths, prefixes = _mirror.leaf_paths(params), _mirror.leaf_paths(given)

    def is_below(path: str, prefix: str) -> bool:
        return path == prefix or path.startswith(f"{prefix}/")

    missing = [p for p in paths if not any(is_below(p, x) for x in prefixes)]
    extra = [x for x in prefixes if not any(is_below(p, x) for p in paths)]
    if missing:
        difference = f"has nothing for {missing[0]!r}"
    elif extra:
        difference = f"has {extra[0]!r}, which is not a param"
    else:
        difference = (
            f"has other containers, {jax.tree.structure(given)} for "
            f"{jax.tree.structure(params)}"
        )
    return (
        f"state_sharding: param_sharding {difference}. Give every param a sharding, or "
        "a whole subtree one."
    )


def _warn_of_cut_groups(
    entries: list[Stored], params: PyTree, shardings: list[NamedSharding]
) -> None:
    """Warns of codes whose groups do not lie on one device each."""
    rows = zip(
        _mirror.leaf_paths(params), jax.tree.leaves(params), shardings, strict=True
    )
    by_path = {path: (p.shape, sharding) for path, p, sharding in rows}
    cut = {}
    for entry in entries:
        if entry.path not in by_path or not entry.shape:
            continue
        shape, sharding = by_path[entry.path]
        side = _factors.side_of(entry.field) if entry.factor else None
        *_, axes = _shardings.along(side, sharding.spec, shape, entry.shape)
        shards = meshes.shards(sharding.mesh, axes)
        group = entry.codec.group
        if shards > 1 and entry.shape[-1] % (shards * group):
            cut[entry.path] = (
                f"  {entry.path!r} {list(shape)} under {sharding.spec}: "
                f"{entry.shape[-1]} columns in {shards} shards, groups of {group}"
            )
    if cut:
        lines = [*cut.values()]
        rest = [f"  and {len(lines) - 3} more"] if len(lines) > 3 else []
        warnings.warn(
            "state_sharding: shards end within groups of codes, so each update gathers "
            "these params' last axes:\n"
            + "\n".join(lines[:3] + rest)
            + "\nShard another axis, or make it a multiple of shards times group.",
            stacklevel=4,
        )
