"""Kernels on sharded leaves: every device runs its own shard, nothing is exchanged.

XLA's partitioner does not see into a kernel, so it is told: all operands of a leaf are
sharded alike, scales along with the groups that they belong to. Where the last axis has
shards that do not hold whole units, it is gathered, and the results are the same.

XLA may shard a leaf over a part of a mesh axis, which no PartitionSpec can say: 4 heads
of a param on a mesh of 8 devices become shards of 4 by 2. So its shardings are read on
a finer mesh, whose axes are of prime sizes.

Programs may also run on a slice of their leaves: one index of the first axis, which is
the first operand. What they compute depends on the place in the whole leaf, as ever.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from optax_flash import meshes
from optax_flash.fusion.jaxprs import Jaxpr
from optax_flash.fusion.program import Program, Role
from optax_flash.fusion.tiles import Origin, Shard
from optax_flash.fusion.unstable import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)

Programs = tuple[Program, ...]
Kernel = Callable[[list[Shard]], list[list[jax.Array]]]


def whole(
    programs: Programs, kernel: Kernel, sliced: bool = False
) -> Callable[..., list[jax.Array]]:
    """A kernel as a function of the operands of whole leaves, one after another.

    Args:
      programs: of the leaves.
      kernel: runs them on shards.
      sliced: the function's first operand is an index, int32, and the others are the
        leaves' slices at it, with a first axis of 1.
    """

    def run(*operands: jax.Array) -> list[jax.Array]:
        index, operands = _index(sliced, operands)
        shards = []
        for program, of_leaf in zip(programs, by_leaf(programs, operands), strict=True):
            shape = _shape(program, sliced)
            offsets = (index, *[0] * (len(shape) - 1)) if sliced else None
            shards.append(
                Shard(program, Origin(program.shape, offsets), shape, of_leaf)
            )
        return [x for results in kernel(shards) for x in results]

    return run


def partitioned(
    programs: Programs, kernel: Kernel, sliced: bool = False
) -> Callable[..., list[jax.Array]]:
    """The same as a function that XLA can partition over devices."""
    run = custom_partitioning(whole(programs, kernel, sliced))

    def shardings(mesh: Mesh, specs: list[PartitionSpec]) -> list[NamedSharding]:
        return [NamedSharding(mesh, spec) for spec in specs]

    def read(mesh: Mesh, arg_shapes: Any) -> tuple[Mesh, list[tuple[Any, ...]]]:
        mesh = mesh if mesh.empty else _finer(mesh)
        given = [_spec(mesh, x.sharding, len(x.shape)) for x in arg_shapes]
        return mesh, _specs(programs, mesh, given, sliced)

    def partition(mesh: Mesh, arg_shapes: Any, result_shapes: Any) -> Any:
        del result_shapes
        mesh, specs = read(mesh, arg_shapes)
        operands, results = _by_array(programs, specs, sliced)
        return (
            mesh,
            _on_shards(programs, kernel, mesh, specs, sliced),
            shardings(mesh, results),
            tuple(shardings(mesh, operands)),
        )

    def infer(mesh: Mesh, arg_shapes: Any, result_shapes: Any) -> Any:
        del result_shapes
        mesh, specs = read(mesh, arg_shapes)
        return shardings(mesh, _by_array(programs, specs, sliced)[1])

    run.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        # jax raises where a sharding is none of the mesh's axes.
        decode_shardings=False,
        sharding_rule=_rule(programs, sliced),
    )
    return run


def mapped(
    programs: Programs,
    kernel: Kernel,
    avals: Sequence[Any],
    out_avals: Sequence[Any] | None,
    sliced: bool = False,
) -> Callable[..., list[jax.Array]]:
    """The same on a mesh of explicit axes, where types tell how leaves are sharded.

    Args:
      avals: the operands' types.
      out_avals: the results'. Where a last axis was gathered, it is sharded again. None
        leaves it so.
    """
    mesh = explicit_mesh(avals)
    specs = _specs(programs, mesh, [x.sharding.spec for x in avals], sliced)
    operand_specs, result_specs = _by_array(programs, specs, sliced)
    given = [x.sharding.spec for x in out_avals] if out_avals else result_specs

    def run(*operands: jax.Array) -> list[jax.Array]:
        results = jax.shard_map(
            _on_shards(programs, kernel, mesh, specs, sliced),
            mesh=mesh,
            in_specs=tuple(operand_specs),
            out_specs=result_specs,
            # The types of a kernel's results do not say over which axes they vary.
            check_vma=False,
        )(*map(_reshard(mesh), operands, operand_specs))
        return list(map(_reshard(mesh), results, given))

    return run


def gathered(
    programs: Programs, kernel: Kernel, names: frozenset[Any], sliced: bool = False
) -> Callable[..., list[jax.Array]]:
    """The same inside of a jax.shard_map over some axes of a mesh of automatic ones.

    How leaves are sharded over the others cannot be known there: they are gathered.

    Args:
      names: the others.
    """

    def run(*operands: jax.Array) -> list[jax.Array]:
        return jax.shard_map(
            whole(programs, kernel, sliced),
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            axis_names=names,
            check_vma=False,
        )(*operands)

    return run


def explicit_mesh(avals: Sequence[Any]) -> Any:
    """The mesh of arrays whose types tell their sharding; None if theirs do not."""
    for x in avals:
        mesh = x.sharding.mesh
        if not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


@functools.cache
def asks_for_devices() -> Jaxpr:
    """What makes jax tell a lowering its devices, which partitioning needs.

    It does so only where it sees an equation that is known to need them, such as a
    custom_partitioning, also inside of an equation's parameters.
    """
    function = custom_partitioning(lambda x: x)
    function.def_partition(None, sharding_rule="i -> i")
    return jax.make_jaxpr(function)(jax.ShapeDtypeStruct((1,), "float32")).jaxpr


def by_leaf(programs: Programs, operands: Any) -> list[list[Any]]:
    """The operands of several programs, which follow one another, for each."""
    remaining = iter(operands)
    return [[next(remaining) for _ in program.inputs] for program in programs]


def _index(sliced: bool, operands: Any) -> tuple[Any, Any]:
    """The index of a slice, and the operands without it."""
    return (operands[0], operands[1:]) if sliced else (None, operands)


def _shape(program: Program, sliced: bool) -> tuple[int, ...]:
    """Of what a program runs on."""
    return (1, *program.shape[1:]) if sliced else program.shape


def _finer(mesh: Mesh) -> Mesh:
    """The mesh with each axis as several, of prime sizes, over the same devices."""
    finer = {
        f"{name}_{i}": prime
        for name, size in mesh.shape.items()
        for i, prime in enumerate(_primes(size))
    }
    return Mesh(mesh.devices.reshape(tuple(finer.values())), tuple(finer))


def _primes(n: int) -> Iterator[int]:
    """The prime factors of a number, the smallest first."""
    prime = 2
    while n > 1:
        while n % prime == 0:
            yield prime
            n //= prime
        prime += 1


def _spec(mesh: Mesh, sharding: Any, n_axes: int) -> PartitionSpec | None:
    """A sharding that XLA proposes, by names of the mesh; None where there is none.

    Args:
      mesh: of all of the program's devices, or empty.
      sharding: None, or any that says which indices of an array a device has.
      n_axes: of the array.
    """
    if sharding is None or mesh.empty:
        return None
    # A size that every number of shards divides, whatever that of the array.
    size = mesh.size
    try:
        indices = sharding.devices_indices_map((size,) * n_axes)
    except (AssertionError, NotImplementedError, ValueError):
        # Of a kind that jax has no indices for.
        return None
    entries = []
    for axis in range(n_axes):
        slices = [indices[device][axis].indices(size) for device in mesh.devices.flat]
        starts = np.asarray([start for start, _, _ in slices])
        names = _names(mesh, starts.reshape(mesh.devices.shape))
        if names is None:
            return None
        entries.append(names)
    return PartitionSpec(*entries)


def _names(mesh: Mesh, starts: np.ndarray) -> tuple[str, ...] | None:
    """The mesh's axes over which one axis of an array is sharded, the major one first.

    Args:
      mesh: its axes are all larger than 1.
      starts: where each device's shard begins, of an axis as long as there are devices.
    """
    origin = (0,) * starts.ndim
    strides = {}
    for axis, name in enumerate(mesh.axis_names):
        second = (*origin[:axis], 1, *origin[axis + 1 :])
        if starts[second] != starts[origin]:
            strides[name] = starts[second]
    names = sorted(strides, key=lambda name: -strides[name])
    # What these names mean, to be compared.
    expected = np.zeros_like(starts)
    length = mesh.size
    for name in names:
        length //= mesh.shape[name]
        along = [1] * starts.ndim
        along[mesh.axis_names.index(name)] = -1
        expected += np.arange(mesh.shape[name]).reshape(along) * length
    return tuple(names) if np.array_equal(starts, expected) else None


def _specs(
    programs: Programs,
    mesh: Any,
    given: Sequence[PartitionSpec | None],
    sliced: bool,
) -> list[tuple[Any, ...]]:
    """How each leaf is to be sharded: for each axis a name, several, or None.

    As the first of its arrays whose sharding is known: the others move there.
    """
    specs = []
    _, given = _index(sliced, given)
    for program, of_leaf in zip(programs, by_leaf(programs, given), strict=True):
        shape = _shape(program, sliced)
        spec: list[Any] = [None] * len(shape)
        for role, known in zip(program.inputs, of_leaf, strict=True):
            if role.kind in ("full", "codes") and known is not None:
                spec[: len(known)] = [entry or None for entry in known]
                break
        for axis, entry in enumerate(spec):
            # A group has one scale, so a shard of the last axis needs whole groups.
            multiple = program.lanes if axis == len(spec) - 1 else 1
            if shape[axis] % (meshes.shards(mesh, entry) * multiple):
                spec[axis] = None
        specs.append(tuple(spec))
    return specs


def _by_array(
    programs: Programs, specs: list[tuple[Any, ...]], sliced: bool
) -> tuple[list[PartitionSpec], list[PartitionSpec]]:
    """The specs of all operands and of all results, from those of the leaves."""

    def spec_of(role: Role, spec: tuple[Any, ...]) -> PartitionSpec:
        return PartitionSpec() if role.kind == "scalar" else PartitionSpec(*spec)

    pairs = list(zip(programs, specs, strict=True))
    return (
        [PartitionSpec()] * sliced
        + [spec_of(role, spec) for p, spec in pairs for role in p.inputs],
        [spec_of(role, spec) for p, spec in pairs for role in p.outputs],
    )


def _on_shards(
    programs: Programs,
    kernel: Kernel,
    mesh: Any,
    specs: list[tuple[Any, ...]],
    sliced: bool,
) -> Callable[..., list[jax.Array]]:
    """The kernel as a function of what one device has."""

    def run(*operands: jax.Array) -> list[jax.Array]:
        indices: dict[Any, jax.Array] = {}
        first, operands = _index(sliced, operands)
        shards = []
        rows = zip(programs, specs, by_leaf(programs, operands), strict=True)
        for program, spec, of_leaf in rows:
            shape = tuple(
                size // meshes.shards(mesh, entry)
                for size, entry in zip(_shape(program, sliced), spec, strict=True)
            )
            for entry in filter(None, spec):
                indices.setdefault(entry, lax.axis_index(entry))
            offsets = tuple(
                indices[entry] * size if entry else 0
                for entry, size in zip(spec, shape, strict=True)
            )
            if sliced:
                # An axis of 1 is never sharded.
                offsets = (first, *offsets[1:])
            origin = Origin(program.shape, offsets if sliced or any(spec) else None)
            shards.append(Shard(program, origin, shape, of_leaf))
        return [x for results in kernel(shards) for x in results]

    return run


def _reshard(mesh: Any) -> Callable[[jax.Array, PartitionSpec], jax.Array]:
    def reshard(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return reshard


def _rule(programs: Programs, sliced: bool) -> SdyShardingRule:
    """Which axes XLA's partitioner is to shard alike: those of one leaf.

    Columns of arrays and of scales are kept apart here: a factor common to both would
    let it split a mesh axis between groups and what is inside of them.
    """

    def mapping(leaf: int, program: Program, role: Role) -> ArrayMapping:
        if role.kind == "scalar":
            return ArrayMapping()
        rows = [f"leaf{leaf}_row{axis}" for axis in range(len(program.shape) - 1)]
        last = f"leaf{leaf}_columns"
        if role.codec and role.kind == "scales":
            last = f"leaf{leaf}_scales{role.codec.group}"
        elif role.codec and role.codec.codes_per_byte > 1:
            last = f"leaf{leaf}_codes{role.codec.bits}"
        return ArrayMapping(*rows, last)

    pairs = list(enumerate(programs))
    return SdyShardingRule(
        (ArrayMapping(),) * sliced
        + tuple(mapping(n, p, role) for n, p in pairs for role in p.inputs),
        tuple(mapping(n, p, role) for n, p in pairs for role in p.outputs),
    )
