"""How a leaf is cut into tiles, and where its operands lie in memory.

A kernel sees every operand as a flat buffer. A unit is ``lanes`` neighbours in a row,
whole groups of every codec; a tile is a number of consecutive units.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_flash.codecs import groups
from optax_flash.codecs.base import Codec
from optax_flash.fusion.program import Program, Role


class Origin(NamedTuple):
    """Where a shard lies in its leaf.

    Attributes:
      shape: of the whole leaf.
      offsets: the shard's first index along each axis, int32 scalars; None where the
        shard is all of the leaf.
    """

    shape: tuple[int, ...]
    offsets: tuple[Any, ...] | None = None


class Shard(NamedTuple):
    """What a kernel is given of one leaf.

    Attributes:
      program: what to compute.
      origin: where the shard lies in its leaf.
      shape: the shard's.
      operands: the shard's, one for each of the program's inputs.
    """

    program: Program
    origin: Origin
    shape: tuple[int, ...]
    operands: list[jax.Array]

    def result_shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the shard's results."""
        shapes = []
        for role, x in zip(
            self.program.outputs, self.program.jaxpr.outvars, strict=True
        ):
            shape = self.shape
            if role.codec and role.kind == "scales":
                shape = role.codec.scales_shape(shape)
            elif role.codec:
                shape = role.codec.codes_shape(shape)
            shapes.append(jax.ShapeDtypeStruct(shape, x.aval.dtype))
        return shapes


class MaskedIndices(NamedTuple):
    """Indices of a tile's elements in a flat buffer, and which of them exist."""

    indices: jax.Array
    mask: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The units of a leaf, or of a shard of one.

    Attributes:
      shape: of the leaf or shard.
      lanes: elements in a unit.
    """

    shape: tuple[int, ...]
    lanes: int

    @classmethod
    def of(cls, program: Program, shape: tuple[int, ...], origin: Origin) -> "Layout":
        """The layout of a program on a shard of its leaf."""
        if program.lanes > 1:
            return cls(shape, program.lanes)
        # Without groups rows only matter for the global indices of a shard.
        return cls(shape if origin.offsets else (math.prod(shape),), 32)

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def ragged(self) -> bool:
        """Whether rows end within a unit."""
        return self.columns % self.lanes != 0

    @property
    def units_per_row(self) -> int:
        return groups.num_groups(self.columns, self.lanes)

    @property
    def units(self) -> int:
        return math.prod(self.shape[:-1]) * self.units_per_row

    def elements(self, first: Any, count: int) -> MaskedIndices:
        """The elements of ``count`` units from unit ``first``: ``(count, lanes)``."""
        unit = first + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
        lane = lax.broadcasted_iota(jnp.int32, (1, self.lanes), 1)
        if not self.ragged:
            index = unit * self.lanes + lane
            return MaskedIndices(
                index, self._mask(count, jnp.broadcast_to(unit, index.shape))
            )
        row, column = self._row_and_column(unit, lane)
        mask = (column < self.columns) & (unit < self.units)
        return MaskedIndices(row * self.columns + column, mask)

    def codes(self, codec: Codec, first: Any, count: int) -> MaskedIndices:
        """The bytes that hold the codes of those units."""
        n = codec.codes_per_byte
        if n == 1:
            return self.elements(first, count)
        packed = Layout(codec.codes_shape(self.shape), self.lanes // n)
        return packed.elements(first, count)

    def scales(self, codec: Codec, plane: int, first: Any, count: int) -> MaskedIndices:
        """The scales of those units: ``(count * groups in a unit,)``."""
        n = self.lanes // codec.group
        group = first * n + lax.iota(jnp.int32, count * n)
        if not self.ragged:
            return MaskedIndices(
                group * codec.scales_per_group + plane, self._mask(count, group // n)
            )
        unit = group // n
        row = unit // self.units_per_row
        in_row = (unit - row * self.units_per_row) * n + group % n
        groups_per_row = groups.num_groups(self.columns, codec.group)
        index = (row * groups_per_row + in_row) * codec.scales_per_group + plane
        return MaskedIndices(index, (in_row < groups_per_row) & (unit < self.units))

    def global_index(self, origin: Origin, first: Any, count: int) -> jax.Array:
        """Row-major indices in the whole leaf: uint32 ``(count, lanes)``, wrapping."""
        if origin.offsets is None:
            return self.elements(first, count).indices.astype(jnp.uint32)
        unit = first + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
        lane = lax.broadcasted_iota(jnp.int32, (1, self.lanes), 1)
        row, column = self._row_and_column(unit, lane)
        index = (column + origin.offsets[-1]).astype(jnp.uint32)
        stride = origin.shape[-1]
        for axis in reversed(range(len(self.shape) - 1)):
            coordinate = row % self.shape[axis] + origin.offsets[axis]
            row = row // self.shape[axis]
            index = index + coordinate.astype(jnp.uint32) * np.uint32(stride % 2**32)
            stride *= origin.shape[axis]
        return index

    def _row_and_column(self, unit: Any, lane: Any) -> tuple[Any, Any]:
        row = unit // self.units_per_row
        return row, (unit - row * self.units_per_row) * self.lanes + lane

    def _mask(self, count: int, unit: Any) -> Any:
        return None if self.units % count == 0 else unit < self.units


def to_tile(layout: Layout, role: Role, x: Any) -> Any:
    """An operand as one tile, the whole shard; codes as stored, scales as planes."""
    if role.kind == "scalar":
        return jnp.asarray(x)
    lanes = layout.lanes
    if role.codec and role.kind == "scales":
        planes = role.codec.scales_per_group
        x = groups.split(x, lanes // role.codec.group * planes).reshape(-1, planes)
        return tuple(x[:, i] for i in range(planes))
    lanes //= role.codec.codes_per_byte if role.codec else 1
    return groups.split(x, lanes).reshape(-1, lanes)


def from_tile(role: Role, x: Any, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of :func:`to_tile`, for a result of ``shape``."""
    if role.codec and role.kind == "scales":
        x = jnp.stack(x, axis=-1)
    x = x.reshape(*shape[:-1], -1)
    return x if x.shape == shape else x[..., : shape[-1]]
