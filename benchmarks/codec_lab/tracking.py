"""An average that lives in codes: decode, average, encode, at every step.

    stored -> exact = decay * stored + (1 - decay) * input -> stored = quantize(exact)

The optimizer's step uses `exact`, and the next one finds `stored`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_flash.codecs import hashing


class Tracked(NamedTuple):
    """An average at some checkpoints of a window.

    Attributes:
      exact: float32 (checkpoints, ...), what the step used.
      stored: float32 (...), what the codes stand for after the last step.
      mean: float32 (...), of `exact` over the steps of the window.
    """

    exact: jax.Array
    stored: jax.Array
    mean: jax.Array


STOCHASTIC, NEAREST, UNSTICKING = "stochastic", "nearest", "unsticking"


@functools.partial(jax.jit, static_argnames=("rounding",))
def quantize(
    codec, x: jax.Array, stored: jax.Array, seed: jax.Array, *, rounding: str
) -> jax.Array:
    """What the codes of x stand for that replace stored ones.

    Rounding is "stochastic" by the bits of a seed, to "nearest", or "unsticking":
    stochastic only where the nearest code is the stored one.
    """
    if rounding == NEAREST:
        return codec.quantize(x, None)
    bits = hashing.bits(seed, x.shape)
    if rounding == UNSTICKING:
        return codec.quantize(x, bits, stored)
    return codec.quantize(x, bits)


@functools.partial(jax.jit, static_argnames=("square", "rounding", "checkpoints"))
def track(
    codec,
    start: jax.Array,
    grads: jax.Array,
    decay: jax.Array,
    *,
    square: bool,
    rounding: str,
    checkpoints: int,
) -> Tracked:
    """Averages gradients, or their squares, in the codes of a codec.

    Args:
      codec: has a method quantize(x, bits), see :class:`candidates.Table`.
      start: float32, the average before the first step, not in codes yet.
      grads: float32 (T, ...); T is a multiple of checkpoints.
      decay: b1 or b2.
      square: whether the input is the square of the gradient.
      rounding: see :func:`quantize`.
      checkpoints: how many, evenly spaced; the last is the last step.
    """
    salt = hashing.salt("v" if square else "m")

    def store(exact, stored, step):
        seed = hashing.fold(step, salt)
        return quantize(codec, exact, stored, seed, rounding=rounding)

    def advance(carry, grad):
        step, stored, _, total = carry
        new = jnp.square(grad) if square else grad
        exact = decay * stored + (1 - decay) * new
        return (step + 1, store(exact, stored, step), exact, total + exact), None

    def to_checkpoint(carry, grads):
        carry, _ = lax.scan(advance, carry, grads)
        return carry, carry[2]

    windows = grads.reshape(checkpoints, -1, *grads.shape[1:])
    zeros = jnp.zeros_like(start)
    carry = jnp.uint32(1), store(start, start, jnp.uint32(0)), zeros, zeros
    (_, stored, _, total), exact = lax.scan(to_checkpoint, carry, windows)
    return Tracked(exact, stored, total / len(grads))


class Layout:
    """How leaves that lie one after the other are laid out in rows of whole groups.

    Rows are padded with zeros to whole groups, as codecs do it: a group never crosses
    the last axis of its leaf.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], group: int):
        self.group = group
        positions, groups = [], 0
        for shape in shapes:
            n = shape[-1]
            rows = int(np.prod(shape[:-1]))
            wide = -(-n // group)
            row = (groups + np.arange(rows) * wide)[:, None] * group
            positions.append((row + np.arange(n)).reshape(-1))
            groups += rows * wide
        self._positions = np.concatenate(positions)
        self._groups = groups

    def pack(self, flat: np.ndarray) -> np.ndarray:
        """(..., N) to (..., groups, group)."""
        out = np.zeros((*flat.shape[:-1], self._groups * self.group), flat.dtype)
        out[..., self._positions] = flat
        return out.reshape(*flat.shape[:-1], self._groups, self.group)

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`pack`."""
        flat = np.asarray(packed).reshape(*packed.shape[:-2], -1)
        return flat[..., self._positions]


def by_leaf(function: Callable[..., Any], shapes: Sequence[tuple[int, ...]], *flat):
    """Calls a function with each leaf in its shape; the results are flat again.

    Args:
      function: of arrays (..., *shape), as many as there are in `flat`; the same number
        of leading axes, with any shape, in what it returns.
      shapes: of the leaves.
      flat: arrays (..., N), in which the leaves follow each other.
    """
    results, start = [], 0
    for shape in shapes:
        part = slice(start, start + math.prod(shape))
        start = part.stop
        leaves = (x[..., part].reshape(*x.shape[:-1], *shape) for x in flat)
        rank = len(shape)
        results.append(
            jax.tree.map(
                lambda x, rank=rank: np.reshape(x, (*x.shape[: x.ndim - rank], -1)),
                function(*leaves),
            )
        )
    return jax.tree.map(lambda *parts: np.concatenate(parts, -1), *results)
