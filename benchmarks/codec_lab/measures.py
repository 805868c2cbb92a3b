"""How far what codes make of an average, or of the update, is from float32.

Sums are taken over each leaf, so that leaves can be pooled by their kind afterwards.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .streams import Leaf

EPS = np.float32(1e-8)
COMPRESSED_FROM = 4096  # optax_flash leaves smaller leaves in float32


class LeafSums(NamedTuple):
    """Sums over the elements of each leaf, of x and its reference r; all (leaves,)."""

    error: np.ndarray  # of (x - r)**2
    product: np.ndarray  # of x r
    square: np.ndarray  # of x**2
    reference: np.ndarray  # of r**2
    ratio: np.ndarray  # the sum of |x| over that of |r|
    largest: np.ndarray  # the maximum of |x|


class Measured(NamedTuple):
    """Figures of some leaves taken together.

    Attributes:
      error: the norm of x - r over the norm of r.
      nmse: the mean over leaves of |x - r|**2 / |r|**2.
      cosine: between x and r.
      rms_ratio: the norm of x over the norm of r.
      mean_ratio: the mean over leaves of mean(|x|) / mean(|r|).
      worst_cosine: the lowest of a leaf.
      worst_leaf: its path.
      largest: the largest |x|.
    """

    error: float
    nmse: float
    cosine: float
    rms_ratio: float
    mean_ratio: float
    worst_cosine: float
    worst_leaf: str
    largest: float


@functools.partial(jax.jit, static_argnames=("sizes",))
def _leaf_sums(x, reference, sizes):
    sums, start = [], 0
    for size in sizes:
        a, r = x[..., start : start + size], reference[..., start : start + size]
        start += size
        sums.append(
            jnp.stack(
                [
                    jnp.sum(jnp.square(a - r)),
                    jnp.sum(a * r),
                    jnp.sum(jnp.square(a)),
                    jnp.sum(jnp.square(r)),
                    jnp.sum(jnp.abs(a)) / jnp.sum(jnp.abs(r)),
                    jnp.max(jnp.abs(a)),
                ]
            )
        )
    return jnp.stack(sums, axis=1)


def leaf_sums(x, reference, sizes: tuple[int, ...]) -> LeafSums:
    """Sums of float32 arrays (..., N), whose leaves of `sizes` follow each other."""
    return LeafSums(*np.asarray(_leaf_sums(x, reference, sizes), np.float64))


@jax.jit
def adam(m, v, correction1, correction2) -> jax.Array:
    """Adam's update m_hat / (sqrt(v_hat) + eps) of averages (checkpoints, N).

    The corrections, (checkpoints, 1), are 1 - b1**t and 1 - b2**t.
    """
    return (m / correction1) / (jnp.sqrt(v / correction2) + EPS)


def pool(sums: LeafSums, leaves: Sequence[Leaf]) -> dict[str, Measured]:
    """Figures by kind, and of "all" leaves large enough to be compressed."""
    large = [np.prod(leaf.shape) >= COMPRESSED_FROM for leaf in leaves]
    scopes = {"all": np.array(large)}
    for kind in dict.fromkeys(leaf.kind for leaf in leaves):
        scopes[kind] = np.array([leaf.kind == kind for leaf in leaves])
    return {
        scope: _measured(sums, leaves, chosen)
        for scope, chosen in scopes.items()
        if chosen.any()
    }


def _measured(sums: LeafSums, leaves: Sequence[Leaf], chosen: np.ndarray) -> Measured:
    part = LeafSums(*(x[chosen] for x in sums))
    cosines = part.product / np.sqrt(part.square * part.reference)
    worst = int(np.argmin(cosines))
    total = LeafSums(*(x.sum() for x in part))
    return Measured(
        error=float(np.sqrt(total.error / total.reference)),
        nmse=float(np.mean(part.error / part.reference)),
        cosine=float(total.product / np.sqrt(total.square * total.reference)),
        rms_ratio=float(np.sqrt(total.square / total.reference)),
        mean_ratio=float(np.mean(part.ratio)),
        worst_cosine=float(cosines[worst]),
        worst_leaf=[leaf.path for leaf, c in zip(leaves, chosen, strict=True) if c][
            worst
        ],
        largest=float(part.largest.max()),
    )
