"""Orthonormal bases for the columns of a matrix, from products and small factors.

Nothing here takes a singular value decomposition or a QR of more than rank x rank
numbers: all that is as long as the matrix goes through matrix products, which run at
full speed and which XLA shards.
"""

import math

import jax
import jax.numpy as jnp

from optax_flash.lowrank import _factors

PASSES = 4
"""Of Cholesky QR: each makes what the shift held back some hundred times longer. Four
do it for rows that are linearly dependent, as many of them as there are columns."""
POLISHES = 2


def orthonormal_rows(rows: jax.Array) -> jax.Array:
    r"""Rows that span what the given ones span, by shifted Cholesky QR.

    Four times, and then two steps of Newton and Schulz, each of which squares what is
    left of a difference between :math:`R R^\top` and the identity:

    .. math::
      R \leftarrow \mathrm{chol}(R R^\top + \sigma I)^{-1} R, \qquad
      R \leftarrow \tfrac12 (3 I - R R^\top) R

    Rows of a lower rank are completed by directions of rounding noise; rows of zeros
    stay zeros. Unlike a Householder QR it is all products and (k, k) matrices.

    Args:
      rows: (*batch, k, n) with k <= n, float32, of any magnitude.

    Returns:
      (*batch, k, n).

    References:
      Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
      ill-conditioned matrices", arXiv 1809.11085.
    """
    k = rows.shape[-2]
    eye = jnp.eye(k, dtype=rows.dtype)
    # Over the rounding errors of the Gram matrix, which would make it indefinite.
    shift = 16 * math.sqrt(k) * jnp.finfo(rows.dtype).eps
    for _ in range(PASSES):
        rows = unit_rows(rows)
        lower = jax.lax.linalg.cholesky(
            _factors.gram(rows) + shift * eye, symmetrize_input=False
        )
        # The inverse, and not a solve for all of the rows: products can be sharded.
        rows = _factors.mix(_factors.inverse_of_lower(lower), rows)
    for _ in range(POLISHES):
        rows = _factors.mix(1.5 * eye - 0.5 * _factors.gram(rows), rows)
    return rows


def unit_rows(rows: jax.Array) -> jax.Array:
    """Rows of length one, also where squares would overflow; zeros stay zeros."""
    rows = _divide(rows, jnp.max(jnp.abs(rows), axis=-1, keepdims=True))
    return _divide(rows, jnp.sqrt(jnp.sum(rows * rows, axis=-1, keepdims=True)))


def randomised(
    matrix: jax.Array, rank: int, sketch: jax.Array, power_iterations: int
) -> tuple[jax.Array, jax.Array]:
    r"""The leading part of a matrix, from products with a random one.

    Args:
      matrix: (*batch, p, q), float32.
      rank: rows of each factor.
      sketch: (*batch, k, q), standard normal, rank <= k <= min(p, q).
      power_iterations: how often the sketch goes back and forth, which turns it
        towards the leading directions.

    Returns:
      ``(left, right)``, (*batch, rank, p) orthonormal and (*batch, rank, q) with
      ``right = left @ matrix``.

    References:
      Halko, Martinsson and Tropp, "Finding structure with randomness", arXiv 0909.4061.
    """
    k = sketch.shape[-2]
    rows = _factors.onto_columns(sketch, matrix)
    if k == min(matrix.shape[-2:]):
        # They span all there is.
        power_iterations = 0
    for _ in range(power_iterations):
        rows = back_and_forth(orthonormal_rows(rows), matrix)
    left = orthonormal_rows(rows)
    right = _factors.onto_rows(left, matrix)
    if k == rank:
        return left, right
    size = jnp.max(jnp.abs(right), axis=(-2, -1), keepdims=True)
    _, vectors = jnp.linalg.eigh(_factors.gram(_divide(right, size)))
    leading = jnp.swapaxes(vectors[..., -rank:], -2, -1)
    return _factors.mix(leading, left), _factors.mix(leading, right)


def tracked(matrix: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by one power iteration from the basis of the step before.

    A unit in the last place of the old basis is kept in the new one: a matrix of low
    rank, or of zeros, takes no direction away.

    Args:
      matrix: (*batch, p, q), float32.
      left: (*batch, rank, p), with rows that are about orthonormal.

    Returns:
      ``(left, right)`` as :func:`randomised`.

    References:
      Vogels, Karimireddy and Jaggi, "PowerSGD", arXiv 1905.13727.
    """
    rows = unit_rows(back_and_forth(left, matrix))
    left = orthonormal_rows(rows + jnp.finfo(rows.dtype).eps * left)
    return left, _factors.onto_rows(left, matrix)


def back_and_forth(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """``rows @ matrix @ matrix.T``, but for the lengths of the rows."""
    return _factors.onto_columns(unit_rows(_factors.onto_rows(rows, matrix)), matrix)


def _divide(x: jax.Array, size: jax.Array) -> jax.Array:
    return x / jnp.where(size == 0, 1, size)
