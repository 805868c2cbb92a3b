"""Programs as Pallas kernels, lowered through Triton: the default on NVIDIA GPUs.

One kernel reads every operand of a leaf once and writes every result once, in place.
Small leaves share a kernel: each block of threads looks up whose tile it has.
jax 0.11 deprecates this way of lowering; ``triton`` does without it.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from optax_flash.fusion.ops import Tile
from optax_flash.fusion.plan import on_one_unit, once_a_family
from optax_flash.fusion.program import Program, Role, _flat, on_tile
from optax_flash.fusion.tiles import Layout, Place, Shard, Where
from optax_flash.fusion.tuning import Config

UNSUPPORTED = frozenset({"erf", "round"})
"""The elementwise primitives that Pallas cannot lower to Triton."""

UNSUPPORTED_IN_16_BITS = frozenset({"div", "logistic"})
"""Those that it cannot lower for bfloat16 and float16."""


@once_a_family
def reason(program: Program) -> str | None:
    """Why a program cannot run in a kernel of this kind; None if it can."""
    function, args = on_one_unit(program)
    for eqn in _flat(jax.make_jaxpr(function)(*args).jaxpr):
        name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
        if name in UNSUPPORTED:
            return f"Pallas has no {name!r} on GPUs"
        if name in UNSUPPORTED_IN_16_BITS and dtype.itemsize == 2:
            return f"Pallas has no {name!r} for {dtype} on GPUs"
    return None


class _Leaf(NamedTuple):
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


def update(
    shards: list[Shard], config: Config, interpret: bool = False
) -> list[list[jax.Array]]:
    """The results of programs of one family, each on a shard of its leaf.

    Args:
      shards: what to compute on.
      config: the size of tiles and of blocks of threads.
      interpret: run in XLA on any platform, for tests.
    """
    flat: list[jax.Array] = []
    known: dict[int, int] = {}
    out_shapes: list[jax.ShapeDtypeStruct] = []
    aliases: dict[int, int] = {}

    def operand(x: Any, role: Role | None) -> int:
        # Most scalars are shared by all leaves.
        if id(x) not in known:
            known[id(x)] = len(flat)
            scalar = role is None or role.kind == "scalar"
            flat.append(_scalar(x) if scalar else x.reshape(-1))
        return known[id(x)]

    leaves = []
    for shard in shards:
        program = shard.program
        operands = [
            operand(*x) for x in zip(shard.operands, program.inputs, strict=True)
        ]
        offsets = [operand(x, None) for x in shard.place.offsets or ()]
        results = []
        for i, shape in enumerate(shard.result_shapes()):
            if program.donors[i] is not None:
                aliases[operands[program.donors[i]]] = len(out_shapes)
            results.append(len(out_shapes))
            out_shapes.append(shape)
        layout = Layout.of(program, shard.shape, shard.place)
        leaves.append(_Leaf(shard, layout, operands, offsets, results))

    units = max(1, config.elements // leaves[0].layout.lanes)
    tiles = [pl.cdiv(leaf.layout.units, units) for leaf in leaves]
    starts = [0, *itertools.accumulate(tiles)]

    def kernel(*refs: Any) -> None:
        inputs, outputs = refs[: len(flat)], refs[len(flat) :]
        tile_id = pl.program_id(0)
        if len(leaves) == 1:
            whose: Any = 0
        else:
            whose = sum((tile_id >= x).astype(jnp.int32) for x in starts[1:-1])

        def load(i: int) -> Any:
            first = (tile_id - starts[i]) * units
            return _load_all(leaves[i], inputs, first, units, len(leaves) > 1)

        index, mask, args = _switch(whose, load, len(leaves))
        program = leaves[0].shard.program
        results = on_tile(program, Tile(index.shape, index, mask), args)
        results = [
            x if role.kind == "scales" else jnp.broadcast_to(x, index.shape)
            for role, x in zip(program.outputs, results, strict=True)
        ]

        def store(i: int) -> None:
            first = (tile_id - starts[i]) * units
            _store_all(leaves[i], outputs, results, first, units)

        _switch(whose, store, len(leaves))

    everywhere = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        kernel,
        grid=(starts[-1],),
        in_specs=[everywhere] * len(flat),
        out_specs=[everywhere] * len(out_shapes),
        out_shape=[jax.ShapeDtypeStruct((x.size,), x.dtype) for x in out_shapes],
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="optax_flash",
    )(*flat)
    out = [x.reshape(like.shape) for x, like in zip(out, out_shapes, strict=True)]
    return [[out[i] for i in leaf.results] for leaf in leaves]


def _switch(i: Any, branch: Any, n: int) -> Any:
    """``branch(i)`` for a traced ``i``; halving, so few comparisons are made."""

    def between(low: int, high: int) -> Any:
        if high - low == 1:
            return branch(low)
        middle = (low + high) // 2
        return lax.cond(
            i < middle, lambda: between(low, middle), lambda: between(middle, high)
        )

    return between(0, n)


def _load_all(leaf: _Leaf, refs: Any, first: Any, units: int, always_mask: bool) -> Any:
    """``(places, mask, operands)`` of a tile."""
    shard, layout = leaf.shard, leaf.layout
    offsets = tuple(refs[i][0] for i in leaf.offsets)
    place = Place(shard.place.shape, offsets or None)
    elements = layout.elements(first, units)
    mask = elements.mask
    if mask is None and always_mask:
        mask = elements.index >= 0
    args = []
    for role, i, x in zip(
        shard.program.inputs, leaf.operands, shard.program.jaxpr.invars, strict=True
    ):
        if role.kind == "scalar":
            value = refs[i][0]
            args.append(value != 0 if x.aval.dtype == jnp.bool_ else value)
        elif role.kind == "scales":
            planes = range(role.codec.scales_per_group)
            where = [layout.scales(role.codec, p, first, units) for p in planes]
            args.append(tuple(_read(refs[i], w) for w in where))
        else:
            args.append(_read(refs[i], elements))
    return layout.places(place, first, units), mask, args


def _store_all(leaf: _Leaf, refs: Any, results: Any, first: Any, units: int) -> None:
    roles = leaf.shard.program.outputs
    for role, i, x in zip(roles, leaf.results, results, strict=True):
        if role.kind == "scales":
            for plane, values in enumerate(x):
                where = leaf.layout.scales(role.codec, plane, first, units)
                _write(refs[i], where, values)
        else:
            _write(refs[i], leaf.layout.elements(first, units), x)


def _read(ref: Any, where: Where) -> jax.Array:
    other = None if where.mask is None else jnp.zeros([], ref.dtype)
    return plgpu.load(ref.at[where.index], mask=where.mask, other=other)


def _write(ref: Any, where: Where, x: jax.Array) -> None:
    plgpu.store(ref.at[where.index], x.astype(ref.dtype), mask=where.mask)


def _scalar(x: Any) -> jax.Array:
    """A scalar as kernels take it: one element in memory, no bool."""
    x = jnp.asarray(x)
    x = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
    return x.reshape(1)
