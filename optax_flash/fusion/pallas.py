"""Programs as Pallas kernels, lowered through Triton: the default on NVIDIA GPUs.

One kernel for a leaf reads every operand once and writes every result once, in place.
jax 0.11 deprecates this way of lowering; ``triton`` does without it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from optax_flash.fusion.ops import Tile
from optax_flash.fusion.program import Program, Role, on_tile
from optax_flash.fusion.tiles import Layout, Place, Where
from optax_flash.fusion.tuning import Config


def update(
    program: Program,
    place: Place,
    shape: tuple[int, ...],
    operands: list[jax.Array],
    config: Config,
    interpret: bool = False,
) -> list[jax.Array]:
    """The results of a program on a shard.

    Args:
      program: what to compute.
      place: where the shard lies in its leaf.
      shape: the shard's.
      operands: the shard's.
      config: the size of tiles and of blocks of threads.
      interpret: run in XLA on any platform, for tests.
    """
    layout = Layout.of(program, shape, place)
    units = max(1, config.elements // layout.lanes)
    offsets = list(place.offsets or ())
    flat = [
        _scalar(x) if role.kind == "scalar" else x.reshape(-1)
        for role, x in zip(program.inputs, operands, strict=True)
    ] + [_scalar(x) for x in offsets]
    results = [
        jax.ShapeDtypeStruct(_shape(program, role, x.aval.shape, shape), x.aval.dtype)
        for role, x in zip(program.outputs, program.jaxpr.outvars, strict=True)
    ]

    def kernel(*refs: Any) -> None:
        inputs, shifts = refs[: len(operands)], refs[len(operands) : len(flat)]
        first = pl.program_id(0) * units
        here = place._replace(
            offsets=tuple(ref[0] for ref in shifts) if offsets else None
        )
        elements = layout.elements(first, units)
        tile = Tile(
            elements.index.shape, layout.places(here, first, units), elements.mask
        )
        args = [
            _load(layout, first, units, role, ref, x.aval.dtype)
            for role, ref, x in zip(
                program.inputs, inputs, program.jaxpr.invars, strict=True
            )
        ]
        outputs = on_tile(program, tile, args)
        for role, ref, x in zip(
            program.outputs, refs[len(flat) :], outputs, strict=True
        ):
            _store(layout, first, units, role, ref, x)

    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(layout.units, units),),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(flat),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(results),
        out_shape=[jax.ShapeDtypeStruct((x.size,), x.dtype) for x in results],
        input_output_aliases={
            donor: i for i, donor in enumerate(program.donors) if donor is not None
        },
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="optax_flash",
    )(*flat)
    return [x.reshape(like.shape) for x, like in zip(out, results, strict=True)]


def _load(
    layout: Layout, first: Any, count: int, role: Role, ref: Any, dtype: Any
) -> Any:
    if role.kind == "scalar":
        x = ref[0]
        return x != 0 if dtype == jnp.bool_ else x
    if role.kind == "scales":
        return tuple(
            _read(ref, layout.scales(role.codec, plane, first, count))
            for plane in range(role.codec.scales_per_group)
        )
    return _read(ref, layout.elements(first, count))


def _store(
    layout: Layout, first: Any, count: int, role: Role, ref: Any, x: Any
) -> None:
    if role.kind == "scales":
        for plane, values in enumerate(x):
            _write(ref, layout.scales(role.codec, plane, first, count), values)
    else:
        where = layout.elements(first, count)
        _write(ref, where, jnp.broadcast_to(x, where.index.shape).astype(ref.dtype))


def _read(ref: Any, where: Where) -> jax.Array:
    other = None if where.mask is None else jnp.zeros([], ref.dtype)
    return plgpu.load(ref.at[where.index], mask=where.mask, other=other)


def _write(ref: Any, where: Where, x: jax.Array) -> None:
    plgpu.store(ref.at[where.index], x, mask=where.mask)


def _scalar(x: Any) -> jax.Array:
    """A scalar as kernels take it: one element in memory, no bool."""
    x = jnp.asarray(x)
    x = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
    return x.reshape(1)


def _shape(
    program: Program, role: Role, whole: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of a shard of a result."""
    if role.kind == "scales":
        return role.codec.scales_shape(shape)
    return role.codec.codes_shape(shape) if role.codec else shape
