"""Codecs: how an array is stored in codes of 8 or 4 bits and a scale for each group.

``encode`` turns a float array into ``(codes, scales)`` and ``decode`` turns them back.
Both are pure, elementwise except for the group's scale, and work along the last axis,
so codes keep the rows of the array and scales its rank.
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_flash.codecs import arithmetic, groups, nibbles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec(abc.ABC):
    """A storage format for one array: codes in uint8 and a scale for each group.

    Invariants, for an array ``x`` of shape ``(*rows, n)``:

    - ``codes`` is uint8 of ``codes_shape(x.shape)``: ``x.shape`` for 8 bits, and
      ``(*rows, ceil(n / 2))`` for 4 bits, the first of two neighbours in the low half;
    - ``scales`` has shape ``(*rows, ceil(n / group) * scales_per_group)``;
    - a 0-d array is stored like an array of shape ``(1,)``, with 0-d codes;
    - zero decodes to exactly zero, and the sign of what decodes is the sign of ``x``;
      unsigned companded codes alone have no zero, except in a group of zeros;
    - a group that holds a NaN or an infinity decodes to nothing finite.

    Codecs are frozen and not callable, so that ``optax.inject_hyperparams`` passes
    them through and equal codecs share one compiled function.

    Attributes:
      signed: whether values may be negative. Momenta are signed, second moments are
        not; :func:`optax_flash.compress` sets this by the state field.
      group: how many neighbours along the last axis share a scale.
    """

    signed: bool = True
    group: int = 32

    name: ClassVar[str]
    bits: ClassVar[int] = 8
    scale_dtype: ClassVar[DTypeLike]
    scales_per_group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.group, int) or self.group < 1:
            raise ValueError(
                f"{type(self).__name__}: group must be a positive int, got "
                f"{self.group!r}. Pass for example group=32."
            )
        if self.group % self.codes_per_byte:
            raise ValueError(
                f"{type(self).__name__}: two codes share a byte, so group must be "
                f"even, got {self.group}. Pass for example group=32."
            )

    def encode(
        self, x: jax.Array, bits: arithmetic.Bits = None
    ) -> tuple[jax.Array, jax.Array]:
        """Stores an array.

        Args:
          x: float array of any shape; computed on in float32.
          bits: uint32 array of the same shape that decides the stochastic rounding,
            see :func:`optax_flash.codecs.hashing.bits`; None rounds to nearest, and
            ``arithmetic.Nearest`` too, within limits.

        Returns:
          ``(codes, scales)``.
        """
        whole = groups.with_whole_groups(x, self.group)
        x32 = groups.split(whole.astype(jnp.float32), self.group)
        bits = arithmetic.in_groups(
            bits,
            lambda y: groups.split(groups.with_whole_groups(y, self.group), self.group),
        )
        codes, planes = self.encode_groups(x32, bits)
        scales = jnp.stack(planes, axis=-1).reshape(self.scales_shape(x.shape))
        codes = groups.merge(self.pack(codes), self.codes_shape(x.shape))
        if whole is not x:
            codes, scales = (groups.sharded_like(y, x) for y in (codes, scales))
        return codes, scales

    def decode(
        self, codes: jax.Array, scales: jax.Array, shape: tuple[int, ...]
    ) -> jax.Array:
        """The float32 array of ``shape`` that ``(codes, scales)`` stand for."""
        width = self.group // self.codes_per_byte
        whole = groups.with_whole_groups(codes, width)
        if codes.ndim:
            # Where groups are cut, scales are not sharded along with them.
            scales = groups.sharded_like(scales, whole)
        pairs = groups.split(scales, self.scales_per_group)
        planes = tuple(pairs[..., i] for i in range(self.scales_per_group))
        x = self.decode_groups(self.unpack(groups.split(whole, width)), planes)
        x = groups.merge(x, shape)
        return x if whole is codes else groups.sharded_like(x, codes)

    def encode_groups(
        self, x: jax.Array, bits: arithmetic.Bits
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Stores groups: what :meth:`encode` and every kernel do with a tile.

        Args:
          x: float32 of shape ``(..., group)``.
          bits: uint32 of the same shape, or a rule of rounding.

        Returns:
          Codes, uint8 of the shape of ``x`` and not packed, and ``scales_per_group``
          arrays of shape ``(...,)``.
        """
        maxima = tuple(jnp.max(key, axis=-1) for key in self.keys(x))
        scales = self.scales_from(maxima)
        return self.codes(x, scales, maxima, bits), scales

    def keys(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """int32 arrays like ``x`` whose maxima over a group make its scales.

        Where nothing else is said, the magnitudes. Integers, as XLA's CPU backend loses
        NaN in a maximum of floats, and computes one of integers in vectors.
        """
        return (arithmetic.magnitude_bits(x),)

    @abc.abstractmethod
    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The scales of groups from the maxima of their :meth:`keys`."""

    @abc.abstractmethod
    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: arithmetic.Bits,
    ) -> jax.Array:
        """The codes of groups whose scales and maxima are known."""

    @abc.abstractmethod
    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        """The inverse of :meth:`encode_groups`, float32."""

    @abc.abstractmethod
    def outermost(self, codes: jax.Array) -> jax.Array:
        """Which codes, not packed, are the largest of either sign; bool."""

    def saturated(self, codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Which elements have an outermost code.

        Args:
          codes: of an array of ``shape``, as they are stored.
          shape: the array's.

        Returns:
          bool of ``shape``.
        """
        *_, n = shape or (1,)
        unpacked = self.unpack(jnp.atleast_1d(codes))[..., :n]
        return self.outermost(unpacked).reshape(shape)

    @property
    def codes_per_byte(self) -> int:
        return 8 // self.bits

    def pack(self, codes: jax.Array) -> jax.Array:
        """Codes ``(..., n)`` as they are stored, ``(..., n / codes_per_byte)``."""
        return codes if self.bits == 8 else nibbles.pack(codes)

    def unpack(self, stored: jax.Array) -> jax.Array:
        """The inverse of :meth:`pack`."""
        return stored if self.bits == 8 else nibbles.unpack(stored)

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes of an array of ``shape``."""
        if not shape:
            return shape
        *rows, n = shape
        return *rows, groups.num_groups(n, self.codes_per_byte)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of an array of ``shape``."""
        *rows, n = shape or (1,)
        return *rows, groups.num_groups(n, self.group) * self.scales_per_group
