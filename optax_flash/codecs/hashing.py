"""Counter-based random bits for stochastic rounding.

A hash of (seed, element index) replaces a stored random key: nothing is added to
the state, a resumed run repeats bit for bit, and a sharded run equals a
single-device run because the index is the element's global position in its leaf.

The mixer is the two-multiply 32-bit finalizer found by exhaustive search in
C. Wellons, "Prospecting for Hash Functions" (2018), public domain.

Functions are jitted so that callers trace each of them once for a shape.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def mix(x: jax.Array) -> jax.Array:
    """Scrambles 32 bits: a bijection on uint32 in which every bit affects every bit."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def salt(name: str) -> np.uint32:
    """The number that stands for a state leaf in the hash, from the leaf's name."""
    return np.uint32(zlib.crc32(name.encode()))


@jax.jit
def start(step: jax.typing.ArrayLike) -> jax.Array:
    """What all leaves share at one step: scalar uint32, see :func:`seed`."""
    return mix(jnp.asarray(step).astype(jnp.uint32) + np.uint32(0x9E3779B9))


def seed(start: jax.Array, salt: jax.typing.ArrayLike) -> jax.Array:
    """The seed of one leaf at one step, from :func:`start` and :func:`salt`."""
    return mix(start ^ salt)


@jax.jit
def fold(step: jax.typing.ArrayLike, salt: jax.typing.ArrayLike) -> jax.Array:
    """The seed of one leaf at one step: scalar uint32 from two scalars."""
    return seed(start(step), jnp.asarray(salt, jnp.uint32))


@functools.partial(jax.jit, static_argnums=1)
def bits(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32, one for each element of a leaf.

    Args:
      seed: scalar uint32, see :func:`fold`.
      shape: the leaf's global shape.

    Returns:
      uint32 array of ``shape``: ``mix(seed ^ row-major element index)``. The index
      is built from one iota per axis, so it shards like the leaf itself.
    """
    if not shape:
        return mix(seed)
    index = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    stride = shape[-1]
    for axis in reversed(range(len(shape) - 1)):
        iota = lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index + iota * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return mix(index ^ seed)


def for_field(bits: jax.Array, field: int) -> jax.Array:
    """The bits by which one of a leaf's state fields is rounded.

    One hash serves a whole leaf, and what rounds by it takes the lowest bits: weights
    8 of them, the first field 17, of which the upper 9 decide all but one rounding in
    500. The second field takes the upper half of the hash first; every further pair of
    fields mixes once more. So no two see the same leading bits, and each one's own are
    exactly as random as the hash.
    """
    for _ in range(field // 2):
        bits = mix(bits)
    return (bits << np.uint32(16)) | (bits >> np.uint32(16)) if field % 2 else bits


@jax.jit
def digest(x: jax.Array) -> jax.Array:
    """A number that depends on all bits of an array and on their places.

    Args:
      x: any shape and dtype of numbers or booleans.

    Returns:
      Scalar uint32, the same however the array is sharded. A change of one element
      always changes it, any other goes unnoticed with a probability of 2**-32.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize == 8:
        x = lax.bitcast_convert_type(x, jnp.uint32)
    words = lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}"))
    words = jnp.atleast_1d(words)
    place = bits(jnp.uint32(0), words.shape)
    return jnp.sum(mix(words.astype(jnp.uint32) ^ place), dtype=jnp.uint32)


def uniform(bits: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1), multiples of 2**-24, from uint32."""
    # Through int32: CPUs convert signed integers to floats in vectors.
    top = (bits >> np.uint32(8)).astype(jnp.int32)
    return top.astype(jnp.float32) * np.float32(2**-24)
