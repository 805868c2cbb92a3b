"""An average held as two thin factors, kept up to date by Newton steps.

The average ``m <- b * m + (1 - b) * g`` is a step of size ``1 - b`` down the gradient
of ``|m - g|**2 / 2``. With ``m = left.T @ right`` each factor takes a damped Newton
step on the same function, of size ``gain = 1 - sqrt(b)``, so that their product decays
by ``b``. See :func:`optax_flash.scale_by_lora_pre`.

``left`` is ``(*batch, rank, p)`` and ``right`` is ``(*batch, rank, q)``, float32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_flash.lowrank import _factors

Scalar = jax.typing.ArrayLike

# TensorFloat-32 on a GPU, three passes of bfloat16 on a TPU, float32 on a CPU. It is
# enough for products with a gradient, which are 12 of every 13 operations: the factors
# are orthonormalised before, so that its error is not magnified after.
HIGH = jax.lax.Precision.HIGH

ROUNDING = 8 * float(jnp.finfo(jnp.float32).eps)
"""Times the rank: the damping below which parallel rows break Cholesky in float32."""
SMALLEST = 1e-15
"""A row that is not longer than this counts as zero: its square may underflow."""


def init_factors(
    param: jax.Array, rank: int, path: str, field: str
) -> tuple[jax.Array, jax.Array]:
    """Zeros on the left, N(0, 0.02**2) on the right, sharded like the param's axes."""
    left, right = (_factors.zeros(param, axis, rank) for axis in (-2, -1))
    return left, right + 0.02 * _factors.normal(path, field, right.shape)


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """``left.T @ right``: (*batch, p, q)."""
    return _factors.product(left, right, HIGH)


def newton_step(
    left: jax.Array,
    right: jax.Array,
    target: jax.Array,
    decay: Scalar,
    damping: Scalar,
) -> tuple[Any, Any]:
    r"""Moves both factors toward a target, each by what the other was before.

    .. math::
      L &\leftarrow (1 - \gamma) L + \gamma (G_R + d\,\mathrm{diag}\,G_R)^{-1}
        R\,T^\top, \qquad G_R = R R^\top \\
      R &\leftarrow (1 - \gamma) R + \gamma (G_L + d\,\mathrm{diag}\,G_L)^{-1}
        L\,T, \qquad G_L = L L^\top

    A row of R that is multiplied by s, and L's divided by s, are so after the step too:
    only the product counts. So right's rows are given unit length first. Left alone
    then has the size of the average, and right keeps its directions while targets are
    zero.

    Args:
      left: L. # (*batch, rank, p)
      right: R. # (*batch, rank, q)
      target: T. # (*batch, p, q)
      decay: :math:`1 - \gamma`, the square root of the product's decay.
      damping: d, at least ``ROUNDING * rank``.

    Returns:
      The new factors.
    """
    gain = 1 - decay
    damping = jnp.maximum(damping, ROUNDING * left.shape[-2])
    gram = _factors.gram(right)
    lengths = jnp.sqrt(_diagonal(gram))
    right, left = right / lengths, left * lengths
    gram = gram / lengths / jnp.swapaxes(lengths, -1, -2)

    basis, back = _orthonormal(right, gram, damping)
    projected = _factors.onto_columns(basis, target, HIGH)
    left_step = gain * _factors.mix(back, projected)

    gram = _factors.gram(left)
    basis, back = _orthonormal(left, gram, damping)
    projected = _factors.onto_rows(basis, target, HIGH)
    right_step = gain * _factors.mix(back, projected)
    return decay * left + left_step, decay * right + _bounded(right_step, 1 / gain)


def share_reached(decay: Scalar, steps: jax.Array, share: float) -> jax.Array:
    r"""How much of a constant target of rank 1 the product has after some steps.

    Were each step exact, it would be :math:`1 - (1 - \gamma)^{2n}`. But left begins at
    zero, so that right's first step does nothing, and right has but a part of the
    target's direction to begin with. For the first steps this is the recursion itself,
    for a left of one row of length l and a right of one row w:

    .. math::
      l \leftarrow (1 - \gamma) l + \gamma \langle w, b\rangle / |w|^2, \qquad
      w \leftarrow (1 - \gamma) w + \gamma b / l

    Args:
      decay: :math:`1 - \gamma`.
      steps: n. # shape=()
      share: of the target's energy in the span of the first right: rank / q where that
        is random.

    Returns:
      :math:`l \langle w, b\rangle`, 1 at the end.
    """
    gain = 1 - decay
    # After one step; along and size are <w, b> and |w|**2.
    left, along, size = gain, decay * share, decay**2 * share
    reached = jnp.where(steps > 0, left * along, 0.0)
    exact = 8
    for n in range(2, exact + 1):
        left, along, size = (
            decay * left + gain * along / size,
            decay * along + gain / left,
            decay**2 * size + 2 * gain * decay * along / left + (gain / left) ** 2,
        )
        reached = jnp.where(steps >= n, left * along, reached)
    later = jnp.maximum(steps - exact, 0)
    return 1 - (1 - reached) * decay ** (2 * later)


def _orthonormal(
    factor: jax.Array, gram: jax.Array, damping: Scalar
) -> tuple[jax.Array, jax.Array]:
    """``basis, back``: (gram + damping * diag(gram))^-1 @ factor is back @ basis.

    The basis has orthonormal rows, but for the damping. (The solution in one piece
    would square the condition number of what multiplies the gradient.)
    """
    rank = factor.shape[-2]
    lengths: Any = _root(_diagonal(gram))
    # Written so that NaN is not taken for zero, and the derivative is not NaN.
    absent: Any = lengths <= SMALLEST
    inverse = jnp.where(absent, 0.0, 1 / jnp.where(absent, 1.0, lengths))
    eye = jnp.eye(rank, dtype=jnp.float32)
    unit = gram * inverse * jnp.swapaxes(inverse, -1, -2)
    cholesky = jax.lax.linalg.cholesky(unit + damping * eye, symmetrize_input=False)
    inverse_cholesky = jax.lax.platform_dependent(
        cholesky, cpu=_inverse_in_halves, default=_factors.inverse_of_lower
    )
    basis = _factors.mix(inverse_cholesky, inverse * factor)
    return basis, inverse * jnp.swapaxes(inverse_cholesky, -1, -2)


def _inverse_in_halves(c: jax.Array) -> jax.Array:
    """The same inverse by products of halves: on CPUs a large solve takes longest."""
    if c.shape[-1] <= 32:
        return _factors.inverse_of_lower(c)
    half = c.shape[-1] // 2
    top = _inverse_in_halves(c[..., :half, :half])
    bottom = _inverse_in_halves(c[..., half:, half:])
    corner = _factors.mix(c[..., half:, :half], top)
    corner = -_factors.mix(bottom, corner)
    upper = jnp.concatenate([top, jnp.zeros_like(c[..., :half, half:])], axis=-1)
    lower = jnp.concatenate([corner, bottom], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def _bounded(step: Any, limit: Any) -> Any:
    """Shortens rows to a length.

    Both steps together add a term of second order, ``gain**2 * g * g / m`` for numbers.
    It is small while targets change slowly, and would be huge where the average is much
    smaller than its target: after a row of zero gradients, or at a spike. With right's
    step at most 1 / gain, the product ends at most a share of gain beyond its target.
    """
    length = _root(jnp.sum(step * step, axis=-1, keepdims=True))
    return step * jnp.minimum(1.0, limit / jnp.maximum(length, SMALLEST))


def _root(x: Any) -> Any:
    """The square root; its derivative at zero counts as zero, where it is infinite."""
    is_zero = x == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, x)))


def _diagonal(matrix: jax.Array) -> jax.Array:
    """The diagonal as a column: (*batch, rank, 1)."""
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    return jnp.sum(matrix * eye, axis=-1, keepdims=True)
