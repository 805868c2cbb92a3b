"""Codecs with uniform codes and a zero point."""

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
class _Affine(Codec):
    """Uniform codes of any number of bits; see :class:`Affine8`."""

    group: int = 128

    scale_dtype: ClassVar[DTypeLike] = jnp.bfloat16
    scales_per_group: ClassVar[int] = 2

    def keys(self, x: jax.Array) -> tuple[jax.Array, ...]:
        # The third tells of a NaN, which has no place in the order of the others.
        return (
            arithmetic.ordered_bits(x),
            arithmetic.ordered_bits(-x),
            arithmetic.magnitude_bits(x),
        )

    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        high, negated_low = (
            lax.bitcast_convert_type(jnp.maximum(key, 0), jnp.float32)
            for key in maxima[:2]
        )
        # Less by more than rounding may add: what was decoded must keep its step.
        part = np.float32((1 - 2**-22) / (self._top - 1))
        step = high * part + negated_low * part
        # Adds nothing, but a NaN where the group is not finite.
        largest = lax.bitcast_convert_type(maxima[2], jnp.float32)
        step = arithmetic.round_up_bf16(step + 0.0 * largest)
        # A true division: what was decoded must find its zero point again.
        divisor = jnp.where(step == 0, 1.0, step.astype(jnp.float32))
        zero = jnp.ceil(negated_low / divisor)
        return step, zero.astype(jnp.bfloat16)

    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: arithmetic.Bits,
    ) -> jax.Array:
        del maxima
        step, zero = scales
        inverse = arithmetic.reciprocal(step)[..., None]
        origin = zero.astype(jnp.float32)[..., None]
        y = x * inverse + origin
        below = jnp.floor(y)
        k = jnp.where(1.0 - arithmetic.noise(bits) < y - below, below + 1.0, below)
        if isinstance(bits, arithmetic.Nearest):
            inner = jnp.where(x < 0, below + 1.0, below)
            k = jnp.where(jnp.abs(k - origin) <= bits.most * inverse, k, inner)
        k = jnp.minimum(jnp.maximum(k, 0.0), np.float32(self._top))
        if not self.signed:
            k = jnp.where(x > 0, jnp.maximum(k, 1.0), k)
        return arithmetic.to_bytes(k)

    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        step, zero = (s.astype(jnp.float32)[..., None] for s in scales)
        return step * (arithmetic.from_unsigned_bytes(codes) - zero)

    def outermost(self, codes: jax.Array) -> jax.Array:
        top = codes == self._top
        return top | (codes == 0) if self.signed else top

    @property
    def _top(self) -> int:
        return 2**self.bits - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine8(_Affine):
    r"""Uniform codes between the group's minimum and maximum.

    .. math:: x = s (k - z),\; k \in 0..255

    The range is widened to hold zero, ``s`` is a 254th of it rounded up to bfloat16
    and the zero point ``z`` is a whole code, so zero is exact and nothing clips.
    Rounding is stochastic. A positive unsigned value never takes code 0. ``scales``
    holds ``s`` and ``z`` of each group side by side.

    Uniform codes spend few levels on small values: prefer :class:`Companded8`,
    above all for second moments.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import Affine8
      >>> codec = Affine8()
      >>> codes, scales = codec.encode(jnp.array([-1.0, 0.0, 1.0, 0.5]))
      >>> codes
      Array([  1, 127, 253, 190], dtype=uint8)
      >>> scales
      Array([0.00793457, 127], dtype=bfloat16)
    """

    name: ClassVar[str] = "affine8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine4(_Affine):
    r"""Uniform codes of 4 bits: :class:`Affine8` with 16 levels.

    .. math:: x = s (k - z),\; k \in 0..15

    ``s`` is a 14th of the range. For comparison: :class:`Companded4` is better for
    both moments.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import Affine4
      >>> codec = Affine4()
      >>> codes, scales = codec.encode(jnp.array([-1.0, 0.0, 1.0, 0.5]))
      >>> codec.unpack(codes)
      Array([ 0,  7, 14, 10], dtype=uint8)
    """

    name: ClassVar[str] = "affine4"
    bits: ClassVar[int] = 4
