"""Two codes of 4 bits in a byte: neighbours, the first in the low half.

In forms that kernels take as well: a shift by the place in a pair, and a sum over it.
"""

import jax
import jax.numpy as jnp
from jax import lax


def pack(codes: jax.Array) -> jax.Array:
    """``(..., 2 n)`` codes as ``(..., n)`` bytes; their upper 4 bits are left out."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    pairs = (pairs.astype(jnp.int32) & 15) << _places(pairs.shape)
    return jnp.sum(pairs, axis=-1, dtype=jnp.int32).astype(jnp.uint8)


def unpack(stored: jax.Array) -> jax.Array:
    """``(..., n)`` bytes as ``(..., 2 n)`` codes."""
    shape = (*stored.shape, 2)
    pairs = jnp.broadcast_to(stored.astype(jnp.int32)[..., None], shape)
    codes = (pairs >> _places(shape)) & 15
    return codes.reshape(*stored.shape[:-1], 2 * stored.shape[-1]).astype(jnp.uint8)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """How far to shift a code of 4 bits: 0 or 4."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) << 2
