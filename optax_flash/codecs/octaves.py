"""Curves whose inverse is a shift of a float's bits.

The bits of a float, read as an integer, rise evenly within an octave and by as much
in every octave. Shifted to the right and read as a float again they still rise evenly,
and double only every ``2**shift`` octaves: like the square root of the value for a
shift of 1, like the fourth root for 2.

So a code is such a float counted in units, and costs little more than a cast. Where
every octave begins at a code, the values between two codes are on a straight line, and
a code that is rounded by its fraction is right in the mean.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_flash.codecs import arithmetic


class Octaves:
    """Values up to a little more than 2, and their codes.

    Attributes:
      bottom: the value of code 0.
      top: the value of the last code.
      places: how far a code is shifted to the left by :meth:`codes`.
    """

    def __init__(self, shift: int, codes: int, first: int) -> None:
        """The curve of which code ``k`` is place ``k + first``.

        Args:
          shift: how far bits are shifted.
          codes: how many, a power of two; also the place of the value 2.
          first: the place of code 0: not less than ``2**shift``, or the lowest octaves
            would begin between two codes.
        """
        self._shift, self._codes, self._first = shift, codes, first
        # The exponent of 2 is 128 in the bits, so its shifted half is whole.
        self._unit = np.int32(128 << (23 - shift)).view(np.float32) / np.float32(codes)
        self.bottom, self.top = self._value(0), self._value(codes - 1)
        self.places = 23 - int(math.log2(codes))

    def codes(self, value: jax.Array, bits: arithmetic.Bits) -> jax.Array:
        """The code below a value or the one above it.

        Args:
          value: from :attr:`bottom` up; above :attr:`top` it becomes the last code.
            # float32
          bits: what decides.

        Returns:
          int32 with the code in :attr:`places`; other bits have no meaning.
        """
        # So little below the top that no rounding comes to a code after the last.
        value = jnp.minimum(value, self.top - np.float32(2**-21))
        shifted = lax.bitcast_convert_type(value, jnp.int32) >> self._shift
        place = lax.bitcast_convert_type(shifted, jnp.float32) * (1 / self._unit)
        # In floats from `codes` to twice of it, whole numbers have fixed places in the
        # word. The sum puts the code there, and the fraction decides below it.
        place += arithmetic.plus_noise(self._codes - self._first, bits)
        return lax.bitcast_convert_type(place, jnp.int32)

    def values(self, codes: jax.Array) -> jax.Array:
        """The values of codes, int32; float32."""
        # In a float of 2**23 the last bits count ones. All of this is exact.
        counted = lax.bitcast_convert_type(codes | _COUNTING, jnp.float32)
        offset = np.float32(2**23 - self._first) * self._unit
        shifted = counted * self._unit - offset
        bits = lax.bitcast_convert_type(shifted, jnp.int32) << self._shift
        return lax.bitcast_convert_type(bits, jnp.float32)

    def _value(self, code: int) -> np.float32:
        shifted = np.float32(code + self._first) * self._unit
        return (shifted.view(np.int32) << np.int32(self._shift)).view(np.float32)


_COUNTING = np.float32(2**23).view(np.int32)
