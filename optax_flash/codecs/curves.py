"""Curves of 4-bit codes: which value a code stands for, as a share of the largest.

A curve rises from place 0, which is 0, to place ``top``, which is 1. Signed codes use
the places 0 to 7, unsigned ones 1 to 16, so that they have no zero.
"""

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_flash.codecs import arithmetic


class Curve(abc.ABC):
    """A rising function of places.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash.codecs.curves import Power
      >>> Power(2).value(jnp.arange(0.0, 17.0, 4.0), 16, 1.0)
      Array([0.    , 0.0625, 0.25  , 0.5625, 1.    ], dtype=float32)

    Attributes:
      lattice: whether a value times a power of two is a value again, within range.
    """

    lattice: ClassVar[bool] = False

    @abc.abstractmethod
    def value(self, place: jax.Array, top: int, scale: Any) -> jax.Array:
        """``scale`` times the value at whole places of 0 to ``top``; float32.

        Not above ``scale``, in the order in which XLA multiplies.
        """

    @abc.abstractmethod
    def place(self, value: jax.Array, top: int) -> jax.Array:
        """The place of values in ``[0, 1]``, about; where it is not whole, in between.

        Only its floor counts, and an error of one place costs no more than an exact
        draw between two neighbours.
        """


@dataclasses.dataclass(frozen=True)
class Power(Curve):
    r""":math:`(k / top)^{exponent}` for an exponent of 1, 2 or 4."""

    exponent: int

    def value(self, place: jax.Array, top: int, scale: Any) -> jax.Array:
        if self.exponent == 1:
            return place * (scale * arithmetic.below(1 / top))
        share = place * arithmetic.below(1 / top)
        for _ in range(self.exponent.bit_length() - 1):
            share = share * share
        return scale * share

    def place(self, value: jax.Array, top: int) -> jax.Array:
        for _ in range(self.exponent.bit_length() - 1):
            value = jnp.sqrt(value)
        return value * np.float32(top)


@dataclasses.dataclass(frozen=True)
class Softsign(Curve):
    r""":math:`k / (2\,top - k)`."""

    def value(self, place: jax.Array, top: int, scale: Any) -> jax.Array:
        return scale * (place / (np.float32(2 * top) - place))

    def place(self, value: jax.Array, top: int) -> jax.Array:
        return np.float32(2 * top) - np.float32(2 * top) / (1.0 + value)


@dataclasses.dataclass(frozen=True)
class Float(Curve):
    r"""Floats of one mantissa bit: 1, 3/4, 1/2, 3/8, ...; 0 at place 0.

    Neighbours are never further apart than a half of the larger. The values under all
    scales are one lattice, so that a new scale moves nothing that is stored.
    """

    lattice = True

    def value(self, place: jax.Array, top: int, scale: Any) -> jax.Array:
        # A place is one in the only bit of the mantissa, counted from the bits of 1.
        bits = (place.astype(jnp.int32) - top) * _HALF + _ONE
        x = lax.bitcast_convert_type(bits, jnp.float32)
        return scale * jnp.where(place < 0.5, 0.0, x)

    def place(self, value: jax.Array, top: int) -> jax.Array:
        bits = lax.bitcast_convert_type(value, jnp.int32) - _ONE
        return ((bits >> 22) + top).astype(jnp.float32)


_HALF, _ONE = np.int32(1 << 22), np.int32(127 << 23)


@dataclasses.dataclass(frozen=True)
class Log(Curve):
    r""":math:`2^{-octaves\,(top - k)}`; 0 at place 0."""

    octaves: float

    lattice = True

    def value(self, place: jax.Array, top: int, scale: Any) -> jax.Array:
        power = jnp.exp2((place - np.float32(top)) * np.float32(self.octaves))
        return scale * jnp.where(place < 0.5, 0.0, power)

    def place(self, value: jax.Array, top: int) -> jax.Array:
        return np.float32(top) + jnp.log2(value) * np.float32(1 / self.octaves)


@dataclasses.dataclass(frozen=True)
class Table(Curve):
    """The value of each place, one by one; ``top`` must be the last."""

    values: tuple[float, ...]

    def value(self, place: jax.Array, top: int, scale: Any) -> jax.Array:
        del top
        x = jnp.zeros_like(place)
        for i, value in enumerate(self.values):
            x = jnp.where(place == i, np.float32(value), x)
        return scale * x

    def place(self, value: jax.Array, top: int) -> jax.Array:
        del top
        reached = [jnp.where(value >= np.float32(x), 1.0, 0.0) for x in self.values[1:]]
        return sum(reached, jnp.zeros_like(value))


# Midpoints of tenths, in decades: create_dynamic_map(signed=True, 3, 4) of
# "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507), but for the 1 that
# its positive half has alone.
_DYNAMIC = (0.0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)

CURVES: Mapping[str, Curve] = MappingProxyType(
    {
        "linear": Power(1),
        "square": Power(2),
        "fourth": Power(4),
        "softsign": Softsign(),
        "log": Log(0.5),
        "float": Float(),
        "dynamic": Table(tuple(x / _DYNAMIC[-1] for x in _DYNAMIC)),
    }
)
"""Every curve by its name."""
