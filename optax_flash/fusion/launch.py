"""What a kernel over one or several leaves is given, and where its tiles lie.

Leaves follow one another: the tiles of the first, those of the second, and so on. Each
block of threads has one tile and looks up whose it is.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from optax_flash.codecs.base import Codec
from optax_flash.fusion.ops import Tile
from optax_flash.fusion.program import Program, Role, evaluate
from optax_flash.fusion.tiles import Layout, MaskedIndices, Origin, Shard


class Config(NamedTuple):
    """How a kernel divides its leaf.

    Attributes:
      elements: of a tile, which one block of threads handles; a power of two.
      num_warps: of a block: 32 threads each.
    """

    elements: int
    num_warps: int

    @classmethod
    def of(cls, program: Program) -> "Config":
        """The one for a program, by what a thread keeps in registers.

        With 16 elements a thread, codes are read 16 bytes at once, the most there is,
        and what a group needs is computed by two threads. Two moments and a weight then
        take 96 registers, and leave room for 20 of an SM's 64 warps; with 8 elements
        64, and 32 warps. One moment takes 72 (``make kernel-cost``). Codes of 4 bits
        are not cut further: 8 elements are 4 bytes.
        """
        codes = [x.codec for x in program.outputs if x.codec and x.kind == "codes"]
        narrow = len(codes) > 1 and all(codec.bits == 8 for codec in codes)
        return cls(2048, 8 if narrow else 4)


class KernelLeaf(NamedTuple):
    """One leaf in a kernel.

    Attributes:
      shard: what and where it is.
      layout: of its tiles.
      operands: indices among the kernel's operands.
      offsets: likewise, of the shard's offsets; empty where it is the whole leaf.
      results: indices among the kernel's results.
    """

    shard: Shard
    layout: Layout
    operands: list[int]
    offsets: list[int]
    results: list[int]


class Launch(NamedTuple):
    """A kernel's operands and results, as flat buffers.

    Attributes:
      leaves: of one family.
      operands: scalars among them have one element.
      results: shapes as the leaves have them.
      aliases: for an operand the result that takes over its buffer.
      units: of a tile.
      starts: the first tile of each leaf, and the number of all tiles.
    """

    leaves: list[KernelLeaf]
    operands: list[jax.Array]
    results: list[jax.ShapeDtypeStruct]
    aliases: dict[int, int]
    units: int
    starts: list[int]

    @classmethod
    def of(cls, shards: list[Shard], config: Config) -> "Launch":
        """The launch of a kernel for shards whose programs are of one family."""
        operands: list[jax.Array] = []
        known: dict[int, int] = {}
        results: list[jax.ShapeDtypeStruct] = []
        aliases: dict[int, int] = {}

        def operand(x: Any, role: Role | None) -> int:
            # Most scalars are shared by all leaves.
            if id(x) not in known:
                known[id(x)] = len(operands)
                scalar = role is None or role.kind == "scalar"
                operands.append(_scalar(x) if scalar else x.reshape(-1))
            return known[id(x)]

        leaves = []
        for shard in shards:
            program = shard.program
            inputs = [
                operand(*x) for x in zip(shard.operands, program.inputs, strict=True)
            ]
            offsets = [operand(x, None) for x in shard.origin.offsets or ()]
            outputs = []
            for alias, shape in zip(
                program.aliases, shard.result_shapes(), strict=True
            ):
                if alias is not None:
                    aliases[inputs[alias]] = len(results)
                outputs.append(len(results))
                results.append(shape)
            layout = Layout.of(program, shard.shape, shard.origin)
            leaves.append(KernelLeaf(shard, layout, inputs, offsets, outputs))
        units = max(1, config.elements // leaves[0].layout.lanes)
        tiles = [-(-leaf.layout.units // units) for leaf in leaves]
        starts = [0, *itertools.accumulate(tiles)]
        return cls(leaves, operands, results, aliases, units, starts)

    def flat_results(self) -> list[jax.core.ShapedArray]:
        """Types of the results as the kernel writes them; they vary over no axis."""
        return [jax.core.ShapedArray((x.size,), x.dtype) for x in self.results]

    def by_leaf(self, out: list[jax.Array]) -> list[list[jax.Array]]:
        """What the kernel wrote, in the leaves' shapes."""
        shaped = [
            x.reshape(like.shape) for x, like in zip(out, self.results, strict=True)
        ]
        return [[shaped[i] for i in leaf.results] for leaf in self.leaves]


class Addresses(NamedTuple):
    """Where a tile's elements are.

    Attributes:
      global_index: of each element; see :class:`Tile`.
      mask: which are there at all; None where all are.
      operands: for each operand :class:`MaskedIndices`, for scales those of each plane;
        None for a scalar.
      results: likewise.
    """

    global_index: jax.Array
    mask: jax.Array | None
    operands: list[Any]
    results: list[Any]


def addresses(
    leaf: KernelLeaf, first: Any, units: int, offsets: list[Any], always_mask: bool
) -> Addresses:
    """The addresses of a tile.

    Args:
      leaf: whose tile it is.
      first: the tile's first unit.
      units: of the tile.
      offsets: the values of the shard's.
      always_mask: give a mask also where all elements are there.
    """
    layout, program = leaf.layout, leaf.shard.program
    elements = layout.elements(first, units)
    mask = elements.mask
    if mask is None and always_mask:
        mask = elements.indices >= 0

    def indices(role: Role) -> MaskedIndices | tuple[MaskedIndices, ...] | None:
        if role.kind == "scalar":
            return None
        if role.codec and role.kind == "scales":
            planes = range(role.codec.scales_per_group)
            return tuple(layout.scales(role.codec, p, first, units) for p in planes)
        return layout.codes(role.codec, first, units) if role.codec else elements

    origin = Origin(leaf.shard.origin.shape, tuple(offsets) or None)
    return Addresses(
        layout.global_index(origin, first, units),
        mask,
        [indices(role) for role in program.inputs],
        [indices(role) for role in program.outputs],
    )


def tile_operands(
    program: Program, shape: tuple[int, int], packed: bool = True
) -> list[Any]:
    """Shapes and dtypes of a program's operands on a tile; scales as planes."""

    def operand(role: Role, dtype: Any) -> Any:
        if role.codec and role.kind == "scales":
            plane = (shape[0] * shape[1] // role.codec.group,)
            planes = role.codec.scales_per_group
            return (jax.ShapeDtypeStruct(plane, dtype),) * planes
        if role.codec and packed:
            return jax.ShapeDtypeStruct(_codes_shape(role.codec, shape), dtype)
        return jax.ShapeDtypeStruct(() if role.kind == "scalar" else shape, dtype)

    return [
        operand(role, x.aval.dtype)
        for role, x in zip(program.inputs, program.jaxpr.invars, strict=True)
    ]


def computation(
    program: Program, shape: tuple[int, int], masked: bool
) -> tuple[Callable[..., list[Any]], tuple[Any, ...]]:
    """A program on a tile of ``shape``.

    Returns:
      A function of the tile's global index, its mask and its operands, and their
      shapes and dtypes. Scales come and go as tuples of planes.
    """

    def run(
        global_index: jax.Array, mask: jax.Array | None, args: list[Any]
    ) -> list[Any]:
        out = evaluate(program.jaxpr, Tile(shape, global_index, mask), args)
        rows = zip(program.outputs, program.jaxpr.outvars, out, strict=True)
        return [
            x if role.codec else jnp.broadcast_to(x, shape).astype(var.aval.dtype)
            for role, var, x in rows
        ]

    mask = jax.ShapeDtypeStruct(shape, jnp.bool_) if masked else None
    global_index = jax.ShapeDtypeStruct(shape, jnp.uint32)
    return run, (global_index, mask, tile_operands(program, shape))


def on_one_unit(program: Program) -> tuple[Callable[..., list[Any]], tuple[Any, ...]]:
    """The same on the smallest tile, to look at what is computed."""
    lanes = Layout.of(program, program.shape, Origin(program.shape)).lanes
    return computation(program, (1, lanes), masked=False)


def once_a_family(
    function: Callable[[Program], str | None],
) -> Callable[[Program], str | None]:
    """Remembers a function of programs for which leaves' shapes make no difference."""
    known: dict[Any, str | None] = {}

    @functools.wraps(function)
    def remembered(program: Program) -> str | None:
        if program.family not in known:
            known[program.family] = function(program)
        return known[program.family]

    return remembered


def _codes_shape(codec: Codec, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of a tile's codes as they are stored."""
    return shape[0], shape[1] // codec.codes_per_byte


def _scalar(x: Any) -> jax.Array:
    """A scalar as kernels take it: one element in memory, no bool."""
    x = jnp.asarray(x)
    x = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
    return x.reshape(1)
