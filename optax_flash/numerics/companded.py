"""The default codecs: companded codes, rounded without bias."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from optax_flash.numerics import arithmetic
from optax_flash.numerics.codecs import Codec
from optax_flash.numerics.curves import CURVES, Curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Companded8(Codec):
    r"""The default: companded 8-bit codes, rounded without bias.

    With ``s`` the group's largest magnitude, rounded **up** to bfloat16, and ``k`` an
    integer code:

    .. math::
      \text{signed:}\quad |x| = s \frac{k}{254 - k},\; k \in 0..127
      \qquad
      \text{unsigned:}\quad x = \left(s \frac{k}{255}\right)^2,\; k \in 0..255

    (unsigned, ``s`` is the largest square root). The value lies between two codes and
    takes the upper one with the probability that makes the *decoded* value right in
    the mean. Rounding the scale up and dividing by what is stored means that nothing
    clips and the scale adds no error. A positive unsigned value never takes code 0,
    so that ``1 / sqrt(v)`` stays bounded beside an outlier.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import Companded8
      >>> codec = Companded8(signed=False)
      >>> codes, scales = codec.encode(jnp.array([1.0, 0.25, 1e-9, 0.0]))
      >>> codes
      Array([255, 127,   1,   0], dtype=uint8)
      >>> scales
      Array([1], dtype=bfloat16)

    References:
      The curves are FlashOptim's (arXiv 2602.23349); rounding, scales and the guarded
      zero differ.
    """

    name: ClassVar[str] = "companded8"
    scale_dtype: ClassVar[DTypeLike] = jnp.bfloat16

    def keys(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return (arithmetic.magnitude_bits(x),)

    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest = lax.bitcast_convert_type(maxima[0], jnp.float32)
        return (
            arithmetic.round_up_bf16(largest if self.signed else jnp.sqrt(largest)),
        )

    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: jax.Array | None,
    ) -> jax.Array:
        del maxima
        inverse = arithmetic.reciprocal(scales[0])[..., None]
        noise = arithmetic.noise(bits)
        if self.signed:
            # y has the real-valued code t = 254 y / (1 + y) = 254 - 254 / w. With noise
            # n, the value lies in the last n-th of the way between two values where
            # t + n, less what the curve bends in between, reaches the upper code. The
            # code is its floor, and that the nearest whole number to a half less.
            w = 1.0 + jnp.abs(x) * inverse
            bend = noise * (np.float32(1 / 254) - np.float32(1 / 254) * noise)
            k = (253.5 - 254.0 / w) + (noise - bend * w)
            return arithmetic.to_bytes(jnp.copysign(jnp.minimum(k, 127.25), x))
        y = jnp.minimum(jnp.sqrt(x) * (255.0 * inverse), 255.0)
        k = jnp.floor(y)
        # (y**2 - k**2) / ((k + 1)**2 - k**2), the way from one value to the next.
        upper = (1.0 - noise) * (2.0 * k + 1.0) < (y - k) * (y + k)
        k = jnp.where(upper, k + 1.0, k)
        return arithmetic.to_bytes(jnp.where(x > 0, jnp.maximum(k, 1.0), k))

    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        s = scales[0].astype(jnp.float32)[..., None]
        if self.signed:
            k = arithmetic.from_signed_bytes(codes)
            return s * (k / (254.0 - jnp.abs(k)))
        return jnp.square(arithmetic.from_unsigned_bytes(codes) * (s * _BELOW_1_255TH))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Companded4(Codec):
    r"""Companded 4-bit codes, two in a byte, rounded without bias.

    With ``s`` the group's largest magnitude, rounded up to bfloat16, and :math:`c(k)` a
    curve from 0 to 1:

    .. math::
      \text{signed:}\quad |x| = s\, c(k),\; k \in 0..7
      \qquad
      \text{unsigned:}\quad x = s^2\, c(k + 1),\; k \in 0..15

    (unsigned, ``s`` is the largest square root). A signed code has the sign in its
    upper bit. Values take one of the two codes around them with the probability that
    makes the decoded value right in the mean. Unsigned codes have no zero: what is less
    than the smallest becomes the smallest, and zero too, unless the group is all zeros.
    With that ``1 / sqrt(v)`` stays bounded.

    Attributes:
      signed_curve: of momenta: ``"linear"``, ``"square"``, ``"fourth"``,
        ``"softsign"``, ``"log"`` (factors of the square root of 2) or ``"dynamic"``
        (the map of arXiv 2309.01507).
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
      2309.01507: 4 bits, and second moments without a zero. Rounding and scales differ.
    """

    signed_curve: str = "softsign"
    unsigned_curve: str = "fourth"

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

    def keys(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return (arithmetic.magnitude_bits(x),)

    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest = lax.bitcast_convert_type(maxima[0], jnp.float32)
        largest = largest if self.signed else jnp.sqrt(largest)
        return (arithmetic.round_up_bf16(largest),)

    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: jax.Array | None,
    ) -> jax.Array:
        del maxima
        curve, first, top = self._curve
        inverse = arithmetic.reciprocal(scales[0])[..., None]
        y = jnp.abs(x) * inverse if self.signed else x * inverse * inverse
        k = jnp.floor(curve.place(y, top))
        k = jnp.minimum(jnp.maximum(k, np.float32(first)), np.float32(top - 1))
        below, above = curve.value(k, top, 1.0), curve.value(k + 1.0, top, 1.0)
        upper = (1.0 - arithmetic.noise(bits)) * (above - below) < y - below
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
        k = codes.astype(jnp.float32) + np.float32(first)
        return curve.value(k, top, jnp.square(s * _BELOW_1))

    @property
    def _curve(self) -> tuple[Curve, int, int]:
        """The curve, and its first and last places."""
        if self.signed:
            return CURVES[self.signed_curve], 0, 7
        return CURVES[self.unsigned_curve], 1, 16


_CURVES = {
    "signed_curve": tuple(CURVES),
    "unsigned_curve": tuple(name for name in CURVES if name != "dynamic"),
}

_BELOW_1 = np.nextafter(np.float32(1), np.float32(0))
"""Keeps the square of the largest scale finite."""

_BELOW_1_255TH = np.nextafter(np.float32(1 / 255), np.float32(0))
"""Rounded down, so that no code exceeds the scale: encoding again keeps the scale."""
