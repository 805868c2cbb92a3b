"""What codecs compute with, in forms that XLA keeps exact and puts in vectors."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Rounding to the nearer code, where errors are made up for elsewhere.

    Attributes:
      most: the largest magnitudes that may be stored. # float32
    """

    most: jax.Array

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "Nearest":
        """The same for values that a function gives another shape."""
        return Nearest(function(self.most))


Bits = jax.Array | Nearest | None
"""What decides the rounding: random bits, limits, or None for plain to-nearest."""


def in_groups(bits: Bits, function: Callable[[jax.Array], jax.Array]) -> Bits:
    """Bits of values that a function puts in groups."""
    if bits is None:
        return None
    return bits.map(function) if isinstance(bits, Nearest) else function(bits)


def noise(bits: Bits) -> jax.Array | np.float32:
    """How much of the way to the upper code rounding forgives, in (0, 1)."""
    if bits is None or isinstance(bits, Nearest):
        return np.float32(0.5)
    low = (bits & np.uint32(2**16 - 1)).astype(jnp.int32)
    return low.astype(jnp.float32) * np.float32(2**-16) + np.float32(2**-17)


def plus_noise(start: float, bits: Bits) -> jax.Array | np.float32:
    """A whole number plus noise in [0, 1), as many bits of it as a float32 holds."""
    first = np.float32(start).view(np.int32)
    if bits is None or isinstance(bits, Nearest):
        return np.float32(start + 0.5)
    places = 23 - (math.frexp(start)[1] - 1)
    low = (bits & np.uint32((1 << places) - 1)).astype(jnp.int32)
    return lax.bitcast_convert_type(low | first, jnp.float32)


def below(x: float) -> np.float32:
    """``x > 0`` in float32 and not above it: by that, no code exceeds its scale."""
    rounded = np.float32(x)
    return np.nextafter(rounded, np.float32(0)) if float(rounded) > x else rounded


def magnitude_bits(x: jax.Array) -> jax.Array:
    """int32 in the order of magnitudes, NaN last."""
    return lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)


def ordered_bits(x: jax.Array) -> jax.Array:
    """int32 in the order of the values; those of positive ones are their bits."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


@jax.jit
def round_up_bf16(x: jax.Array) -> jax.Array:
    """The smallest bfloat16 that is no less than ``x >= 0``; NaN if not finite."""
    up = lax.bitcast_convert_type(x, jnp.uint32) + np.uint32(0xFFFF)
    # At most 2**126, larger values saturate: reciprocals would be subnormal, which
    # are flushed to zero.
    finite = jnp.minimum(up >> np.uint32(16), np.uint32(0x7E80))
    up = jnp.where(up > np.uint32(0x7F80FFFE), np.uint32(0x7FC0), finite)
    return lax.bitcast_convert_type(up.astype(jnp.uint16), jnp.bfloat16)


@jax.jit
def round_up_to_power(x: jax.Array) -> jax.Array:
    """The smallest power of two that is no less than ``x >= 0``, as a bfloat16.

    0 for 0, 2**-126 to 2**126 for others, NaN if not finite.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    up = (bits + np.uint32(0x7FFFFF)) >> np.uint32(16) & np.uint32(0x7F80)
    up = jnp.minimum(up, np.uint32(0x7E80))
    up = jnp.where(bits > np.uint32(0x7F7FFFFF), np.uint32(0x7FC0), up)
    return lax.bitcast_convert_type(up.astype(jnp.uint16), jnp.bfloat16)


@jax.jit
def reciprocal_of_power(scale: jax.Array) -> jax.Array:
    """``1 / scale`` in float32, for scales of :func:`round_up_to_power`.

    2**126 for 0; for NaN anything.
    """
    bits = lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.int32)
    bits = jnp.minimum(np.int32(254 << 23) - bits, np.int32(253 << 23))
    return lax.bitcast_convert_type(bits, jnp.float32)


@jax.jit
def reciprocal(scale: jax.Array) -> jax.Array:
    """``1 / scale`` in float32, for bfloat16 scales: 0 or 2**-126 to 2**126.

    2**126 for 0. Integers and three steps of Newton's instead of a division, for which
    XLA's CPU backend would make a loop of its own.
    """
    bits = lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.int32)
    power = reciprocal_of_power(
        lax.bitcast_convert_type(bits & np.int32(0x7F800000), jnp.float32)
    )
    mantissa = (bits & np.int32(0x007FFFFF)) | np.int32(0x3F800000)
    m = lax.bitcast_convert_type(mantissa, jnp.float32)
    r = np.float32(24 / 17) - np.float32(8 / 17) * m
    for _ in range(3):
        r = r * (2.0 - m * r)
    return power * r


def to_bytes(k: jax.Array) -> jax.Array:
    """The nearest whole numbers of -128 to 255 as bytes; two's complement below 0."""
    # In a float of this size the last bit counts ones, so the sum rounds. A conversion
    # would first have to see to NaN and to what is out of range.
    shifted = lax.bitcast_convert_type(k + np.float32(1.5 * 2**23), jnp.int32)
    return shifted.astype(jnp.uint8)


def from_signed_bytes(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)


def from_unsigned_bytes(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.int32).astype(jnp.float32)


def is_outermost_byte(codes: jax.Array, signed: bool) -> jax.Array:
    """Which codes are the largest of either sign."""
    if signed:
        return jnp.abs(from_signed_bytes(codes)) == 127
    return codes == 255
