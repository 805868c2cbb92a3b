"""Codecs that exist only in the lab: a sorted book of values, and a way to scale.

    value = scale * book[code],    book ascending, in [-1, 1] or [0, 1]

A candidate only *quantizes*, float32 to the float32 that its codes would stand for:
which codes they are does not matter to the lab. Rounding is to the nearest value; or
unbiased, between the neighbours a <= x < b, to b with probability (x - a) / (b - a); or
unbiased only where the nearest is what is stored already, which else stays for ever.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_flash import Codec
from optax_flash.codecs import groups, hashing

SCALE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "power of two": 1}


def linear(bits: int) -> np.ndarray:
    """Signed: k / K, with K = 2**(bits - 1) - 1 the largest code."""
    return signed_power(bits, 1)


def signed_power(bits: int, power: float) -> np.ndarray:
    """Signed: (k / K)**power with the sign of k."""
    return _mirrored((_signed_codes(bits) / _signed_codes(bits)[-1]) ** power)


def softsign(bits: int) -> np.ndarray:
    """Signed: k / (2 K - k), FlashOptim's curve for momenta."""
    k = _signed_codes(bits)
    return _mirrored(k / (2 * k[-1] - k))


def power(bits: int, power: float, *, zero: bool) -> np.ndarray:
    """Unsigned: (k / K)**power, k in 0..K; without zero ((k + 1) / (K + 1))**power."""
    codes = np.arange(2**bits) + (not zero)
    return (codes / codes[-1]) ** power


def log(bits: int, octaves: float, *, zero: bool) -> np.ndarray:
    """Unsigned: even steps of the logarithm from 2**-octaves to 1, and maybe zero."""
    values = 2.0 ** -np.linspace(octaves, 0, 2**bits - zero)
    return np.concatenate([[0.0], values]) if zero else values


def floating(bits: int, mantissa: int) -> np.ndarray:
    """Unsigned: the largest floats up to 1 with so many bits of mantissa; no zero."""
    from_top = np.arange(2**bits)
    octave, place = np.divmod(from_top, 2**mantissa)
    return (2.0**-octave * (1 - place / 2 ** (mantissa + 1)))[::-1]


def dynamic(bits: int, exponents: int, *, signed: bool) -> np.ndarray:
    """The dynamic map of Dettmers et al., "8-bit Optimizers via Block-wise
    Quantization": a decade for each exponent, and the finer within it the larger."""
    n = bits - 1
    values = [0.0, 1.0]
    for i in range(exponents):
        points = 2 ** (i + n - exponents + (not signed)) + 1
        edges = np.linspace(0.1, 1.0, points)
        decade = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i + 1 - exponents)
        values += [*decade, *(-decade if signed else [])]
    return np.sort(values)


def _signed_codes(bits: int) -> np.ndarray:
    return np.arange(2 ** (bits - 1)).astype(float)


def _mirrored(magnitudes: np.ndarray) -> np.ndarray:
    """Values of codes -K..K from those of 0..K."""
    return np.concatenate([-magnitudes[:0:-1], magnitudes])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["book"],
    meta_fields=["scale", "root", "guard", "group"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Codes of a book, one scale for each group along the last axis.

    The scale is stored for |x|**(1/root) and rounded up, so that nothing clips. A root
    keeps the squares of small gradients within the range of the scale's format. Under
    scales that are powers of two the values of some books form one lattice, which stays
    where it is when a scale changes: floats do, and logs with a factor of 2**root
    between neighbours.

    Attributes:
      book: float32, ascending; 16 values of 4 bits, or 256. The last may repeat.
      scale: "bf16", "fp16", "fp32" or "power of two", an exponent of one byte.
      root: 1 for the magnitude itself.
      guard: a positive value never becomes zero: for unsigned books with a zero.
      group: how many neighbours share a scale; None for rank-1 scales of a matrix,
        the smaller of a row's and a column's largest magnitude (over every axis of a
        kernel of more axes; a vector has one scale).
    """

    book: Any
    scale: str = "bf16"
    root: float = 1
    guard: bool = False
    group: int | None = 32

    def quantize(
        self,
        x: jax.Array,
        bits: jax.Array | None,
        stored: jax.Array | None = None,
    ) -> jax.Array:
        """What the codes of x stand for.

        Args:
          x: float32 of shape (..., group), or a whole leaf for rank-1 scales.
          bits: uint32 like x for unbiased rounding; None rounds to nearest.
          stored: float32 like x, what the codes stand for that x is to replace; bits
            then decide only where the nearest code is the same. None: everywhere.

        Returns:
          float32 like x.
        """
        scale = self._scales(jnp.abs(x))
        inverse = jnp.where(scale > 0, 1.0 / scale, 0.0)
        y = _rounded(x * inverse, self.book, bits)
        if stored is not None:
            nearest = _rounded(x * inverse, self.book, None)
            stuck = nearest == _rounded(stored * inverse, self.book, None)
            y = jnp.where(stuck, y, nearest)
        if self.guard:
            y = jnp.where(x > 0, jnp.maximum(y, self.book[1]), y)
        return scale * y

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the codes and scales of a leaf of this shape."""
        *rows, n = shape
        bits = (self.book.size - 1).bit_length()
        codes = math.prod(rows) * math.ceil(n * bits / 8)
        if self.group:
            scales = math.prod(rows) * groups.num_groups(n, self.group)
        else:
            scales = sum(shape) if len(shape) > 1 else 1
        return codes + scales * SCALE_BYTES[self.scale]

    def _scales(self, magnitude: jax.Array) -> jax.Array:
        if self.group:
            return self._stored(jnp.max(magnitude, axis=-1, keepdims=True))
        if magnitude.ndim < 2:
            return self._stored(jnp.max(magnitude))
        axes = range(magnitude.ndim)
        maxima = (
            self._stored(jnp.max(magnitude, [b for b in axes if b != a], keepdims=True))
            for a in axes
        )
        return functools.reduce(jnp.minimum, maxima)

    def _stored(self, largest: jax.Array) -> jax.Array:
        """The scale as it is after a round trip through its format."""
        if self.scale == "power of two":
            # What is a power of two but for rounding errors stays one.
            exponent = jnp.ceil(jnp.log2(largest) / self.root - np.float32(1e-3))
            return jnp.exp2(exponent * self.root)
        root = largest if self.root == 1 else largest ** np.float32(1 / self.root)
        if self.scale == "bf16":
            root = _round_up(root, jnp.bfloat16)
        elif self.scale == "fp16":
            root = _round_up(root, jnp.float16)
        return root**self.root


def _round_up(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The smallest of a 16-bit format that is no less than x >= 0, in float32."""
    near = x.astype(dtype)
    bits = lax.bitcast_convert_type(near, jnp.uint16)
    bits = bits + (near.astype(jnp.float32) < x).astype(jnp.uint16)
    return lax.bitcast_convert_type(bits, dtype).astype(jnp.float32)


def _rounded(y: jax.Array, book: jax.Array, bits: jax.Array | None) -> jax.Array:
    """The nearest values of a book, or by bits one of the neighbours."""
    lower, upper = neighbours(y, book)
    noise = 0.5 if bits is None else hashing.uniform(bits)
    return jnp.where(noise * (upper - lower) < y - lower, upper, lower)


def neighbours(y: jax.Array, book: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values of an ascending book around each y: lower <= y < upper.

    Outside of the book both are its first value, or both its last.
    """
    last = book.size - 1
    if book.size > 16:
        index = jnp.searchsorted(book, y, side="right", method="scan_unrolled")
        return book[jnp.maximum(index - 1, 0)], book[jnp.minimum(index, last)]
    # Vectorises, which a search does not.
    lower = jnp.full_like(y, book[0])
    upper = jnp.full_like(y, book[last])
    for i in range(1, book.size):
        lower = jnp.where(y >= book[i], book[i], lower)
    for i in reversed(range(last)):
        upper = jnp.where(y < book[i], book[i], upper)
    return lower, upper


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=["codec"]
)
@dataclasses.dataclass(frozen=True)
class Library:
    """A codec of optax_flash behind the interface of :class:`Table`."""

    codec: Codec

    @property
    def group(self) -> int:
        return self.codec.group

    def quantize(self, x: jax.Array, bits: jax.Array | None) -> jax.Array:
        codes, scales = self.codec.encode(x, bits)
        return self.codec.decode(codes, scales, x.shape)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        scale = np.dtype(self.codec.scale_dtype).itemsize
        scales = math.prod(self.codec.scales_shape(shape)) * scale
        return math.prod(self.codec.codes_shape(shape)) + scales


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Exact:
    """Float32, for reference."""

    group: int = 32

    def quantize(self, x: jax.Array, bits: jax.Array | None) -> jax.Array:
        del bits
        return x

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return 4 * math.prod(shape)
