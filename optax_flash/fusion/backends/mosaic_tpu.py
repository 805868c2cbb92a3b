"""Programs as Pallas kernels for TPUs, lowered through Mosaic.

A block is some rows of a leaf and up to 4,096 columns. Groups lie along the lanes of
its vectors, where nothing can be reshaped, so each lane holds what is of its group:
a maximum goes around the group in five rotations, and scales, and two codes in a byte,
come and go through the matrix unit, multiplied by matrices of zeros and ones.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optax_flash.codecs import hashing
from optax_flash.codecs.base import Codec
from optax_flash.fusion.backends import int32
from optax_flash.fusion.backends.base import Target, unsupported_by_kernels
from optax_flash.fusion.jaxprs import callee, evaluate, flat_equations
from optax_flash.fusion.launch import on_one_unit, once_a_family
from optax_flash.fusion.ops import Decode, Elementwise, Encode, Within, op_p
from optax_flash.fusion.program import Program, Role
from optax_flash.fusion.tiles import Shard

GROUP = 32
"""The only size of groups that there are blocks for."""

COLUMNS = 128 * GROUP
"""Of a block, where rows are longer: its scales then are whole vectors."""

ELEMENTS = 2**17
"""Of a block, about: some dozens of arrays of it must fit into 16 MB."""


def absent() -> None:
    """Pallas is a part of JAX."""


def unsupported(program: Program, target: Target | None) -> str | None:
    """Why it cannot run a program; None if it can."""
    del target
    return unsupported_by_kernels(program) or _unlowerable(program)


@once_a_family
def _unlowerable(program: Program) -> str | None:
    """Why Pallas cannot lower a program to Mosaic; None if it can."""
    codecs = {role.codec for role in program.inputs if role.codec}
    if not codecs:
        return "nothing is in codes, and XLA alone makes one kernel of it"
    for codec in codecs:
        if codec.group != GROUP:
            return f"groups of {codec.group}, and TPU kernels have groups of {GROUP}"
        if codec.scale_dtype != jnp.bfloat16 or codec.scales_per_group != 1:
            return f"TPU kernels have one bfloat16 scale a group, not {codec.name}'s"
    function, args = on_one_unit(program)
    for eqn in flat_equations(jax.make_jaxpr(function)(*args).jaxpr):
        if misfit := int32.misfit(eqn):
            return misfit
    return None


def run(shards: list[Shard], target: Target) -> list[list[jax.Array]]:
    """The results of programs, each on a shard of its leaf."""
    del target
    return [launched(shard) for shard in shards]


def launched(shard: Shard, interpret: bool = False) -> list[jax.Array]:
    """The results of one kernel; in XLA on any platform to ``interpret``: for tests."""
    program, n = shard.program, shard.shape[-1]
    m = math.prod(shard.shape[:-1])
    # Whole vectors of 128, of bytes with two codes too.
    columns = min(COLUMNS, -(-n // 256) * 256)
    rows = min(m, ELEMENTS // columns // 32 * 32)
    offsets = shard.place.offsets or (0,) * len(shard.shape)

    def kernel(offset_ref: Any, *refs: Any) -> None:
        inputs, outputs = refs[: len(program.inputs)], refs[len(program.inputs) :]
        block = _Block.of(
            shard, (rows, columns), [offset_ref[i] for i in range(len(offsets))]
        )
        args = [
            _read(block, role, ref, x.aval.dtype)
            for role, ref, x in zip(
                program.inputs, inputs, program.jaxpr.invars, strict=True
            )
        ]
        results = block.evaluate(program.jaxpr, args)
        for role, ref, x in zip(program.outputs, outputs, results, strict=True):
            _write(block, role, ref, x)

    def spec(role: Role) -> Any:
        if role.kind == "scalar":
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        width = columns
        if role.codec:
            codes = role.kind == "codes"
            width = columns // role.codec.codes_per_byte if codes else 128
        return pl.BlockSpec((rows, width), lambda i, j: (i, j))

    def operand(role: Role, x: Any) -> jax.Array:
        if role.kind != "scalar":
            return x.reshape(m, -1)
        x = int32.hold(jnp.asarray(x))
        return x.astype(jnp.int32 if x.dtype == jnp.bool_ else x.dtype).reshape(1)

    shapes = shard.result_shapes()
    results = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, rows), pl.cdiv(n, columns)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *map(spec, program.inputs)],
        out_specs=list(map(spec, program.outputs)),
        out_shape=[jax.core.ShapedArray((m, x.shape[-1]), x.dtype) for x in shapes],
        input_output_aliases={
            1 + donor: i for i, donor in enumerate(program.donors) if donor is not None
        },
        interpret=interpret,
        name="optax_flash",
    )(
        jnp.stack([jnp.asarray(x, jnp.int32) for x in offsets]),
        *map(operand, program.inputs, shard.operands),
    )
    return [x.reshape(like.shape) for x, like in zip(results, shapes, strict=True)]


def _read(block: "_Block", role: Role, ref: Any, dtype: Any) -> Any:
    """An operand's part of a block, as blocks hold it."""
    if role.kind == "scalar":
        return ref[0] != 0 if dtype == jnp.bool_ else ref[0]
    x = int32.hold(ref[...])
    if role.codec and role.kind == "scales":
        return _spread(x, block.shape[1])
    return _unpack(x) if role.codec and role.codec.bits == 4 else x


def _write(block: "_Block", role: Role, ref: Any, x: Any) -> None:
    x = jnp.broadcast_to(x, block.shape)
    if role.codec and role.kind == "scales":
        x = _gather(x)
    elif role.codec and role.codec.bits == 4:
        x = _pack(x)
    if ref.dtype == jnp.uint32:
        ref[...] = lax.bitcast_convert_type(x, jnp.uint32)
    else:
        ref[...] = x.astype(ref.dtype)


class _Block(NamedTuple):
    """Where a block lies.

    Attributes:
      shape: ``(rows, columns)``.
      places: row-major place of each element in the whole leaf, wrapping. # int32
      mask: which elements are there at all; None where all columns are. # bool
    """

    shape: tuple[int, int]
    places: jax.Array
    mask: jax.Array | None

    @classmethod
    def of(cls, shard: Shard, shape: tuple[int, int], offsets: list[Any]) -> "_Block":
        """The block of this run of a kernel; ``offsets`` are the shard's."""
        row = lax.broadcasted_iota(jnp.int32, shape, 0) + pl.program_id(0) * shape[0]
        column = lax.broadcasted_iota(jnp.int32, shape, 1) + pl.program_id(1) * shape[1]
        n = shard.shape[-1]
        mask = column < n if n % GROUP else None
        places, stride = column + offsets[-1], shard.place.shape[-1]
        for axis in reversed(range(len(shard.shape) - 1)):
            coordinate = row
            if axis:
                size = np.int32(shard.shape[axis])
                coordinate, row = lax.rem(row, size), lax.div(row, size)
            wrapped = np.uint32(stride % 2**32).view(np.int32)
            places = places + (coordinate + offsets[axis]) * wrapped
            stride *= shard.place.shape[axis]
        return cls(shape, places, mask)

    def evaluate(self, jaxpr: Any, args: list[Any]) -> list[Any]:
        """A program on this block, all values as :mod:`int32` holds them."""
        return evaluate(jaxpr, args, self._equation, literal=int32.hold_literal)

    def _equation(self, eqn: Any, args: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if eqn.primitive is op_p:
            return self._op(eqn, args)
        if called := callee(eqn):
            return self.evaluate(called.jaxpr, args)
        if name == "reduce_max":
            return [_group_maximum(args[0])]
        return [int32.apply(eqn, args, self.shape)]

    def _op(self, eqn: Any, args: list[Any]) -> list[Any]:
        op = eqn.params["op"]
        if isinstance(op, Decode):
            n = len(op.codecs)
            rows = zip(op.codecs, args[:n], args[n:], strict=True)
            return [self.evaluate(_decoding(codec), of)[0] for codec, *of in rows]
        dtypes = tuple(x.aval.dtype for x in eqn.invars)
        if isinstance(op, Elementwise):
            return self.evaluate(_elementwise(op.function, op.static, dtypes), args)
        if isinstance(op, Within):
            x, y = args
            y = y if self.mask is None else jnp.where(self.mask, y, 0.0)
            return self.evaluate(_within(op), [x, y])
        start, salt, *arrays = args
        (seed,) = self.evaluate(_seed(), [start, salt])
        (bits,) = self.evaluate(_mix(), [self.places ^ seed])
        if not isinstance(op, Encode):
            function = _elementwise(op.function, op.static, (np.uint32, *dtypes[2:]))
            return self.evaluate(function, [bits, *arrays])
        arrays, most = arrays[: len(op.codecs)], arrays[len(op.codecs) :]
        if self.mask is not None:
            # Past the end of a row there may be anything.
            arrays = [jnp.where(self.mask, x, 0.0) for x in arrays]
        stored = [
            self.evaluate(_encoding(op, i), [x, bits, *most])
            for i, x in enumerate(arrays)
        ]
        codes, scales = zip(*stored, strict=True)
        decoded = [
            self.evaluate(_decoding(op.codecs[i]), [codes[i], scales[i]])[0]
            for i in op.errors
        ]
        errors = [x - arrays[i] for x, i in zip(decoded, op.errors, strict=True)]
        return [*codes, *scales, *errors]


# What ops do, as equations of elements and of groups.


def _element(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, GROUP), dtype)


def _jaxpr(function: Callable[..., Any], *avals: Any) -> Any:
    closed = jax.make_jaxpr(function)(*avals)
    assert not closed.consts
    return closed.jaxpr


@functools.cache
def _decoding(codec: Codec) -> Any:
    scales = jax.ShapeDtypeStruct((1,), codec.scale_dtype)
    return _jaxpr(
        lambda codes, s: codec.decode_groups(codes, (s,)), _element(jnp.uint8), scales
    )


@functools.cache
def _encoding(op: Encode, field: int) -> Any:
    def encode(
        x: jax.Array, bits: jax.Array, *most: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        codec = op.codecs[field]
        codes, (scales,) = codec.encode_groups(x, op.bits(field, bits, most))
        return codes, scales

    limits = [_element(jnp.float32) for _ in op.nearest]
    return _jaxpr(encode, _element(jnp.float32), _element(jnp.uint32), *limits)


@functools.cache
def _within(op: Within) -> Any:
    return _jaxpr(op.of_groups, *[_element(jnp.float32)] * 2)


@functools.lru_cache(maxsize=4096)
def _elementwise(function: Any, static: Any, dtypes: tuple[Any, ...]) -> Any:
    return _jaxpr(functools.partial(function, static), *map(_element, dtypes))


@functools.cache
def _seed() -> Any:
    scalar = jax.ShapeDtypeStruct((), jnp.uint32)
    return _jaxpr(hashing.seed, scalar, scalar)


@functools.cache
def _mix() -> Any:
    return _jaxpr(hashing.mix, _element(jnp.uint32))


# What moves along lanes.


def _group_maximum(x: jax.Array) -> jax.Array:
    """The maximum over each group, in all of its lanes."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    for i in range(GROUP.bit_length() - 1):
        distance = 1 << i
        above = pltpu.roll(x, x.shape[1] - distance, 1)
        below = pltpu.roll(x, distance, 1)
        x = jnp.maximum(x, jnp.where((lane & distance) == 0, above, below))
    return x


def _spread(scales: jax.Array, columns: int) -> jax.Array:
    """Each group's scale to all of its lanes. # (rows, 128) to (rows, columns)"""
    group = lax.broadcasted_iota(jnp.int32, (128, columns), 0)
    lane = lax.broadcasted_iota(jnp.int32, (128, columns), 1)
    matrix = _ones((lane >> 5) == group)
    high, low = _bytes(scales)
    return _from_bytes(_dot(high, matrix), _dot(low, matrix))


def _gather(x: jax.Array) -> jax.Array:
    """The inverse of :func:`_spread`."""
    lane = lax.broadcasted_iota(jnp.int32, (x.shape[1], 128), 0)
    group = lax.broadcasted_iota(jnp.int32, (x.shape[1], 128), 1)
    matrix = _ones(lane == group * GROUP)
    high, low = _bytes(x)
    return _from_bytes(_dot(high, matrix), _dot(low, matrix))


def _unpack(x: jax.Array) -> jax.Array:
    """Two codes of 4 bits from each byte: ``(rows, n / 2)`` to ``(rows, n)``."""
    byte = lax.broadcasted_iota(jnp.int32, (128, 256), 0)
    lane = lax.broadcasted_iota(jnp.int32, (128, 256), 1)
    matrix = _ones((lane >> 1) == byte)
    parts = [
        _dot(x[:, i : i + 128], matrix).astype(jnp.int32)
        for i in range(0, x.shape[1], 128)
    ]
    spread = jnp.concatenate(parts, axis=1)
    lane = lax.broadcasted_iota(jnp.int32, spread.shape, 1)
    return jnp.where((lane & 1) == 0, spread & 15, spread >> 4)


def _pack(x: jax.Array) -> jax.Array:
    """The inverse of :func:`_unpack`."""
    lane = lax.broadcasted_iota(jnp.int32, (256, 128), 0)
    byte = lax.broadcasted_iota(jnp.int32, (256, 128), 1)
    weight = jnp.where((lane & 1) == 0, 1.0, 16.0)
    matrix = jnp.where((lane >> 1) == byte, weight, 0.0).astype(jnp.bfloat16)
    parts = [
        _dot(x[:, i : i + 256], matrix).astype(jnp.int32)
        for i in range(0, x.shape[1], 256)
    ]
    return jnp.concatenate(parts, axis=1)


def _ones(where: jax.Array) -> jax.Array:
    return jnp.where(where, 1.0, 0.0).astype(jnp.bfloat16)


def _dot(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """A product with a matrix that adds nothing up; whole numbers to 256 are exact."""
    x = x.astype(jnp.float32).astype(jnp.bfloat16)
    return jnp.dot(x, matrix, preferred_element_type=jnp.float32)


def _bytes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both bytes of bfloat16 numbers. A NaN itself would spread through a product."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return (bits >> 24) & 255, (bits >> 16) & 255


def _from_bytes(high: jax.Array, low: jax.Array) -> jax.Array:
    bits = (high.astype(jnp.int32) << 24) | (low.astype(jnp.int32) << 16)
    return lax.bitcast_convert_type(bits, jnp.float32)
