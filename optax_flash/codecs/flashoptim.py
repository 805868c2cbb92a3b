"""The published FlashOptim format."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from optax_flash.codecs import arithmetic
from optax_flash.codecs.base import Codec


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashOptim8(Codec):
    r"""The published FlashOptim format, bit for bit.

    With ``s`` the group's largest magnitude (at least 1e-12), ``n = |x| / s`` and
    float16 scales:

    .. math::
      \text{signed:}\quad k = \lfloor 127 \tfrac{2 n}{1 + n} + \tfrac12 \rfloor
      \qquad
      \text{unsigned:}\quad k = \lfloor 255 \sqrt{x} / s + \tfrac12 \rfloor

    For comparison with published results; the default, :class:`Companded8`, costs the
    same bytes. Rounding to nearest freezes slow averages and float16 scales lose
    gradients below 1e-7 and above 6e4.

    The publication groups the flattened array; here groups follow the last axis. Both
    agree where rows are multiples of 32.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import FlashOptim8
      >>> codes, scales = FlashOptim8().encode(jnp.array([1.0, -1.0, 0.5]))
      >>> codes.view(jnp.int8)
      Array([ 127, -127,   85], dtype=int8)

    References:
      FlashOptim, arXiv 2602.23349, section 3.2.
    """

    name: ClassVar[str] = "flashoptim"
    scale_dtype: ClassVar[DTypeLike] = jnp.float16

    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return (self._divisor(maxima).astype(jnp.float16),)

    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: arithmetic.Bits,
    ) -> jax.Array:
        del scales, bits  # Divides before the scale is rounded; is deterministic.
        magnitude = jnp.abs(x) if self.signed else jnp.sqrt(x)
        # XLA would divide by a bare broadcast through its reciprocal, which is another
        # last bit for a quarter of the values and another code for one in a million.
        divisor = self._divisor(maxima)[..., None]
        divisor = jnp.where(magnitude == 0, 1.0, divisor)
        if self.signed:
            y = x / divisor
            z = 2.0 * y / (1.0 + jnp.abs(y))
            return arithmetic.to_bytes(jnp.floor(127.0 * z + 0.5))
        return arithmetic.to_bytes(jnp.floor(255.0 * (magnitude / divisor) + 0.5))

    def _divisor(self, maxima: tuple[jax.Array, ...]) -> jax.Array:
        largest = lax.bitcast_convert_type(maxima[0], jnp.float32)
        largest = largest if self.signed else jnp.sqrt(largest)
        # Not a maximum of floats, which could lose a NaN.
        return jnp.where(largest < 1e-12, np.float32(1e-12), largest)

    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        s = scales[0].astype(jnp.float32)[..., None]
        # XLA multiplies by the reciprocal where it is asked to divide by 127 or 255.
        # These forms round less often, and stay within 3 ulp of the published order.
        if self.signed:
            k = arithmetic.from_signed_bytes(codes)
            return k / (254.0 - jnp.abs(k)) * s
        k = arithmetic.from_unsigned_bytes(codes)
        return jnp.square(k) * (jnp.square(s) * np.float32(1 / 255**2))

    def outermost(self, codes: jax.Array) -> jax.Array:
        return arithmetic.is_outermost_byte(codes, self.signed)
