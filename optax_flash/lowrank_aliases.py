"""The optimizers of low-rank moments, by name."""

from typing import Any

import optax

from optax_flash.aliases import Mask, Scalar, _number, _rate
from optax_flash.transforms._factors import Rank, Where
from optax_flash.transforms.compress import Codecs, compress
from optax_flash.transforms.lowrank_adam import scale_by_lowrank_adam


def lowrank_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    *,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    refresh_every: int = 1,
    strategy: str = "randomized",
    oversampling: int = 8,
    power_iterations: int = 1,
    min_dim: int = 64,
    max_aspect: float = 100,
    where: Where = None,
    seed: int = 0,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with moments of low rank, and 8-bit ones where a leaf does not fit.

    :func:`scale_by_lowrank_adam`, weight decay and the learning rate, under
    :func:`compress`. A factored p by q matrix keeps ``2 * rank * (p + q)`` numbers of
    the ``2 * p * q`` of AdamW's moments.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule.
      rank: components of each moment, or a share of a matrix's smaller side.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added outside of the square root.
      eps_root: added inside of it.
      weight_decay: :math:`\lambda`, multiplied by the learning rate.
      mask: which params decay, as in :func:`adamw8`.
      refresh_every: see :func:`scale_by_lowrank_adam`, as the next seven.
      strategy: how a basis is found.
      oversampling: of the random sketch.
      power_iterations: of the random sketch.
      min_dim: smallest side of a factored matrix.
      max_aspect: largest ratio of its sides.
      where: which params may be factored, a predicate on their paths.
      seed: of the sketches.
      codecs: of the dense moments, see :func:`compress`.
      implementation: see :func:`compress`.

    Returns:
      The transformation.

    Raises:
      ValueError: a decay rate in half precision, and what
        :func:`scale_by_lowrank_adam` raises.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flash
      >>> f = lambda x: jnp.sum(x ** 2)
      >>> params = jnp.ones((64, 64))
      >>> tx = optax_flash.lowrank_adamw(0.1, rank=4)
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Loss: {f(params):.0f}")
      Loss: 3318
      Loss: 2624
      Loss: 2016
      Loss: 1494
      Loss: 1057

    References:
      MLorc, arXiv 2506.01897.
    """
    extra: dict[str, Any] = dict(
        refresh_every=refresh_every,
        strategy=strategy,
        oversampling=oversampling,
        power_iterations=power_iterations,
        min_dim=min_dim,
        max_aspect=max_aspect,
        where=where,
        seed=seed,
    )
    return compress(
        optax.chain(
            scale_by_lowrank_adam(
                rank,
                _rate("b1", b1),
                _rate("b2", b2),
                _number(eps),
                _number(eps_root),
                **extra,
            ),
            optax.add_decayed_weights(_number(weight_decay), mask),
            optax.scale_by_learning_rate(_number(learning_rate)),
        ),
        codecs,
        implementation=implementation,
    )
