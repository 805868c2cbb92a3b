"""Kernels on sharded leaves: every device runs its own shard, nothing is exchanged.

XLA's partitioner does not see into a kernel, so it is told: all operands of a leaf are
sharded alike, scales along with the groups that they belong to. Where the last axis has
shards that do not hold whole units, it is gathered, and the results are the same.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import NamedSharding, PartitionSpec

from optax_flash.fusion.program import Program, Role
from optax_flash.fusion.tiles import Place

Kernel = Callable[[Place, tuple[int, ...], list[jax.Array]], list[jax.Array]]


def partitioned(program: Program, kernel: Kernel) -> Callable[..., list[jax.Array]]:
    """A kernel as a function of whole leaves that XLA can partition.

    Args:
      program: what the kernel computes.
      kernel: ``(place, shape of the shard, operands) -> results``.
    """

    @custom_partitioning
    def run(*operands: jax.Array) -> list[jax.Array]:
        return kernel(Place(program.shape), program.shape, list(operands))

    def shardings(mesh: Any, spec: tuple[Any, ...]) -> tuple[Any, Any]:
        def sharding(role: Role) -> NamedSharding:
            entries = () if role.kind == "scalar" else spec
            return NamedSharding(mesh, PartitionSpec(*entries))

        return (
            [sharding(role) for role in program.outputs],
            tuple(sharding(role) for role in program.inputs),
        )

    def partition(mesh: Any, arg_shapes: Any, result_shapes: Any) -> Any:
        del result_shapes
        spec = _spec(program, mesh, arg_shapes)
        shape = tuple(
            size // _shards(mesh, entry)
            for size, entry in zip(program.shape, spec, strict=True)
        )

        def run_shard(*operands: jax.Array) -> list[jax.Array]:
            offsets = tuple(
                lax.axis_index(entry) * size if entry else 0
                for entry, size in zip(spec, shape, strict=True)
            )
            place = Place(program.shape, offsets if any(spec) else None)
            return kernel(place, shape, list(operands))

        return mesh, run_shard, *shardings(mesh, spec)

    def infer(mesh: Any, arg_shapes: Any, result_shapes: Any) -> Any:
        del result_shapes
        return shardings(mesh, _spec(program, mesh, arg_shapes))[0]

    run.def_partition(
        partition, infer_sharding_from_operands=infer, sharding_rule=_rule(program)
    )
    return run


def _spec(program: Program, mesh: Any, arg_shapes: Any) -> tuple[Any, ...]:
    """How the leaf is sharded: for each axis a name, a tuple of names, or None."""
    spec: list[Any] = [None] * len(program.shape)
    for role, x in zip(program.inputs, arg_shapes, strict=True):
        if role.kind in ("full", "codes") and isinstance(x.sharding, NamedSharding):
            spec[: len(x.sharding.spec)] = x.sharding.spec
            break
    for axis, entry in enumerate(spec):
        last = axis == len(spec) - 1
        multiple = program.lanes if last else 1
        if program.shape[axis] % (_shards(mesh, entry) * multiple):
            spec[axis] = None
    return tuple(spec)


def _shards(mesh: Any, entry: Any) -> int:
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    shards = 1
    for name in names:
        shards *= mesh.shape[name]
    return shards


def _rule(program: Program) -> SdyShardingRule:
    """The same in the terms of XLA's partitioner: which axes go together."""
    rows = [f"row_{axis}" for axis in range(len(program.shape) - 1)]
    lanes, columns = program.lanes, program.shape[-1]
    whole_units = columns % lanes == 0
    sizes: dict[str, int] = {}
    replicated: set[str] = set()

    def last(role: Role) -> Any:
        if not whole_units:
            # Shards would end within a group.
            name = f"columns_{role.codec.group}" if role.kind == "scales" else "columns"
            replicated.add(name)
            return name
        inner = lanes
        if role.kind == "scales":
            inner = lanes // role.codec.group * role.codec.scales_per_group
        if inner == 1:
            return "units"
        name = f"in_unit_{inner}"
        sizes[name] = inner
        return CompoundFactor("units", name)

    def mapping(role: Role) -> ArrayMapping:
        if role.kind == "scalar":
            return ArrayMapping()
        return ArrayMapping(*rows, last(role))

    operands = tuple(mapping(role) for role in program.inputs)
    results = tuple(mapping(role) for role in program.outputs)
    if sizes and not any("units" in tuple(m) for m in (*operands, *results)):
        # Only where no whole axis tells it.
        sizes["units"] = columns // lanes
    return SdyShardingRule(
        operands,
        results,
        need_replication_factors=tuple(sorted(replicated)),
        **sizes,
    )
