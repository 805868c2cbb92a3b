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
def fold(step: jax.typing.ArrayLike, salt: jax.typing.ArrayLike) -> jax.Array:
    """The seed of one leaf at one step: scalar uint32 from two scalars."""
    step = jnp.asarray(step).astype(jnp.uint32)
    return mix(mix(step + np.uint32(0x9E3779B9)) ^ jnp.asarray(salt, jnp.uint32))


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


@functools.partial(jax.jit, static_argnums=1)
def uniform(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 in [0, 1), multiples of 2**-24; arguments as :func:`bits`."""
    # Through int32: CPUs convert signed integers to floats in vectors.
    top = (bits(seed, shape) >> np.uint32(8)).astype(jnp.int32)
    return top.astype(jnp.float32) * np.float32(2**-24)
