"""The default codecs: companded codes, rounded without bias."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from optax_flash.codecs import arithmetic
from optax_flash.codecs.base import Codec
from optax_flash.codecs.curves import CURVES, Curve
from optax_flash.codecs.octaves import Octaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Companded8(Codec):
    r"""The default: companded 8-bit codes, rounded without bias.

    With ``s`` the group's largest magnitude, rounded **up** to a bfloat16 or, for
    second moments, to a power of two, and ``k`` a code:

    .. math::
      \text{signed:}\quad |x| = s\,
        \frac{c_2(k + 2) - c_2(2)}{c_2(129) - c_2(2)},\; k \in 0..127
      \qquad
      \text{unsigned:}\quad x = s\,
        \frac{c_4(k + 4)}{c_4(259)},\; k \in 0..255

    where :math:`c_n` runs like the n-th power, in straight lines from one power of two
    to the next, so that its inverse is a shift of a float's bits (``octaves.py``):

    .. math::
      c_n\left(2^h \left(1 + \frac{j + f}{n}\right)\right) = 2^{n h + j} (1 + f),
      \qquad j \in 0..n - 1,\; 0 \le f < 1

    A value takes the upper of the codes around it with the probability that makes the
    *decoded* value right in the mean. Rounding the scale up and dividing by what is
    stored means that nothing clips and the scale adds no error.

    Unsigned codes have no zero: what is less than the smallest value, 5.7e-8 of ``s``,
    becomes the smallest, and zero too, unless the group is all zeros. So
    ``1 / sqrt(v)`` stays bounded beside an outlier.

    A second moment moves by a thousandth in a step, its scale in bfloat16 by nearly a
    hundredth, and whenever a scale moves, all codes of its group are rounded again:
    that is more noise than the moment's own steps make. A power of two seldom moves.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import Companded8
      >>> codec = Companded8(signed=False)
      >>> codes, scales = codec.encode(jnp.array([1.0, 0.25, 1e-9, 0.0]))
      >>> codes
      Array([255, 190,   0,   0], dtype=uint8)
      >>> scales
      Array([1], dtype=bfloat16)

    References:
      A scale for 32 neighbours and companding are FlashOptim's (arXiv 2602.23349);
      curves, rounding and scales are not. docs/numerics.md has the measurements behind
      them.
    """

    name: ClassVar[str] = "companded8"
    scale_dtype: ClassVar[DTypeLike] = jnp.bfloat16

    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return (_scale(maxima[0], power_of_two=not self.signed),)

    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: arithmetic.Bits,
    ) -> jax.Array:
        del maxima
        curve, reach = self._curve
        if not self.signed:
            stretch = arithmetic.reciprocal_of_power(scales[0]) * reach
            y = jnp.maximum(jnp.abs(x) * stretch[..., None], curve.bottom)
            return (curve.codes(y, bits) >> curve.places).astype(jnp.uint8)
        stretch = arithmetic.reciprocal(scales[0]) * reach
        y = jnp.abs(x) * stretch[..., None] + curve.bottom
        # The sign is the bit above the code, so that a kernel takes the byte as it is.
        sign = lax.bitcast_convert_type(x, jnp.int32) >> (24 - curve.places)
        word = curve.codes(y, bits) | sign & (128 << curve.places)
        return (word >> curve.places).astype(jnp.uint8)

    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        curve, reach = self._curve
        codes = codes.astype(jnp.int32)
        shrink = arithmetic.below(1 / float(reach))
        s = (scales[0].astype(jnp.float32) * shrink)[..., None]
        if not self.signed:
            return curve.values(codes) * s
        x = (curve.values(codes & np.int32(127)) - curve.bottom) * s
        sign = (codes & np.int32(128)) << 24
        return lax.bitcast_convert_type(
            lax.bitcast_convert_type(x, jnp.int32) | sign, jnp.float32
        )

    def outermost(self, codes: jax.Array) -> jax.Array:
        return (codes & 127) == 127 if self.signed else codes == 255

    @property
    def _curve(self) -> tuple[Octaves, np.float32]:
        """The curve, and how much of it the codes reach over."""
        if self.signed:
            return _SQUARE, _SQUARE.top - _SQUARE.bottom
        return _FOURTH, _FOURTH.top


_SQUARE = Octaves(shift=1, codes=128, first=2)
_FOURTH = Octaves(shift=2, codes=256, first=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Companded4(Codec):
    r"""Companded 4-bit codes, two in a byte, rounded without bias.

    With ``s`` the group's largest magnitude, rounded up, and :math:`c(k)` a curve from
    0 to 1:

    .. math::
      \text{signed:}\quad |x| = s\, c(k),\; k \in 0..7
      \qquad
      \text{unsigned:}\quad x = s\, c(k + 1),\; k \in 0..15

    A signed code has the sign in its upper bit. Values take one of the two codes around
    them with the probability that makes the decoded value right in the mean. Unsigned
    codes have no zero: what is less than the smallest becomes the smallest, and zero
    too, unless the group is all zeros. With that ``1 / sqrt(v)`` stays bounded.

    ``"float"`` and ``"log"`` have powers of two as scales, under which the same values
    return: no code is rounded again because a scale moved.

    Attributes:
      signed_curve: of momenta, one of ``"linear"``, ``"square"``, ``"fourth"``,
        ``"softsign"``, ``"log"`` (powers of the square root of 2), ``"float"`` (one
        mantissa bit) and ``"dynamic"`` (the map of arXiv 2309.01507).
      unsigned_curve: of second moments: all of these but ``"dynamic"``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import Companded4
      >>> codec = Companded4(signed_curve="linear")
      >>> codes, scales = codec.encode(jnp.array([1.0, -1.0, 0.0, 0.4]))
      >>> codes
      Array([247,  48], dtype=uint8)
      >>> codec.unpack(codes)
      Array([ 7, 15,  0,  3], dtype=uint8)

    References:
      Li, Chen and Zhu, "Memory Efficient Optimizers with 4-bit States", arXiv
      2309.01507: 4 bits, and second moments without a zero. Curves, rounding and scales
      differ.
    """

    signed_curve: str = "square"
    unsigned_curve: str = "float"

    name: ClassVar[str] = "companded4"
    bits: ClassVar[int] = 4
    scale_dtype: ClassVar[DTypeLike] = jnp.bfloat16

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, known in _CURVES.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"Companded4: unknown {field} {getattr(self, field)!r}. Known "
                    f"names: {', '.join(known)}."
                )

    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return (_scale(maxima[0], power_of_two=self._curve[0].lattice),)

    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: arithmetic.Bits,
    ) -> jax.Array:
        del maxima
        curve, first, top = self._curve
        inverse = arithmetic.reciprocal(scales[0])[..., None]
        y = jnp.abs(x) * inverse
        k = jnp.floor(curve.place(y, top))
        k = jnp.minimum(jnp.maximum(k, np.float32(first)), np.float32(top - 1))
        below, above = curve.value(k, top, 1.0), curve.value(k + 1.0, top, 1.0)
        upper = (1.0 - arithmetic.noise(bits)) * (above - below) < y - below
        if isinstance(bits, arithmetic.Nearest):
            upper &= np.float32(_NEAR) * above <= y
            upper &= above <= bits.most * inverse
        k = jnp.where(upper, k + 1.0, k) - np.float32(first)
        if self.signed:
            k = jnp.where(x < 0, k + 8.0, k)
        return arithmetic.to_bytes(k)

    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        curve, first, top = self._curve
        s = scales[0].astype(jnp.float32)[..., None]
        codes = codes.astype(jnp.int32)
        if self.signed:
            x = curve.value((codes & 7).astype(jnp.float32), top, s)
            return jnp.where(codes > 7, -x, x)
        return curve.value(codes.astype(jnp.float32) + np.float32(first), top, s)

    def outermost(self, codes: jax.Array) -> jax.Array:
        return (codes & 7) == 7 if self.signed else codes == 15

    @property
    def _curve(self) -> tuple[Curve, int, int]:
        """The curve, and its first and last places."""
        if self.signed:
            return CURVES[self.signed_curve], 0, 7
        return CURVES[self.unsigned_curve], 1, 16


_NEAR = 0.8
"""Rounded to nearest, a value below this share of the upper code takes the lower one.

So no value grows by more than a quarter. Otherwise a momentum at the lowest code, where
to nearest may double it, would keep its code, and grow, while its group's scale grows.
"""

_CURVES = {
    "signed_curve": tuple(CURVES),
    "unsigned_curve": tuple(name for name in CURVES if name != "dynamic"),
}


def _scale(maximum: jax.Array, power_of_two: bool) -> jax.Array:
    """A group's scale from the maximum of its magnitudes' bits."""
    largest = lax.bitcast_convert_type(maximum, jnp.float32)
    if power_of_two:
        return arithmetic.round_up_to_power(largest)
    return arithmetic.round_up_bf16(largest)
