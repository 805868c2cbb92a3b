"""Adam whose momentum no single gradient can run away with."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flash.transforms import _arguments, _dtypes, _init, _mirror

PyTree = Any
Scalar = jax.typing.ArrayLike


class ScaleByTamedAdamState(NamedTuple):
    """State of :func:`scale_by_tamed_adam`.

    Attributes:
      count: updates so far. # shape=(), dtype=int32
      mu: first moments, of clipped gradients. # shape of the param, float32
      nu: second moments, of whole gradients. # shape of the param, float32
      clipped: how many elements the last update clipped, in all leaves together.
        # shape=(), dtype=float32, as int32 would end at 2 ** 31
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates
    nu: optax.Updates
    clipped: jax.typing.ArrayLike


def scale_by_tamed_adam(
    threshold: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    *,
    relative: bool = False,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with a first moment of clipped gradients and a second of whole ones.

    .. math::
      v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
      \hat v_t = v_t / (1 - \beta_2^t) \\
      c_t &= \mathrm{clip}(g_t, -\tau_t, \tau_t) \\
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) c_t \\
      u_t &= \frac{m_t / (1 - \beta_1^t)}
             {\sqrt{\hat v_t + \bar\varepsilon} + \varepsilon}

    elementwise and in float32. The bound :math:`\tau_t` is the threshold, or with
    ``relative`` :math:`\sqrt{\hat v_t}` times it, which does not depend on the scale
    of the gradients. An outlier then moves the momentum by a bounded amount, and still
    lengthens the denominator: the step there becomes shorter.

    The relative bound counts this step's gradient in. So it is there from the first
    step on, is zero only where all gradients were, and
    :math:`|g_t| \le \tau_t / (\theta \sqrt{1 - \beta_2})` always: thresholds
    :math:`\theta` over :math:`1 / \sqrt{1 - \beta_2}` (32) clip nothing.

    NaNs and infinities are not clipped: they show in the update, as in stock Adam.

    Args:
      threshold: a positive number; infinity for stock Adam. In units of the gradient,
        or of the root of the second moment.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added outside of the square root.
      eps_root: added inside of it.
      relative: whether the threshold is in units of the root of the second moment.
      nesterov: use Nesterov momentum, of clipped gradients too.

    Returns:
      The transformation, with a :class:`ScaleByTamedAdamState`. Updates have the wider
      dtype of the gradient's and the param's.

    Raises:
      ValueError: a threshold that is not positive, where it is a Python number;
        gradients of another structure than init's.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> tx = optax.chain(
      ...     optax_flash.scale_by_tamed_adam(threshold=1.0), optax.scale(-1e-3)
      ... )
      >>> params = jnp.zeros(4)
      >>> grads = jnp.array([0.5, -0.5, 0.5, 50.0])
      >>> updates, state = tx.update(grads, tx.init(params))
      >>> optax.tree.get(state, "clipped")
      Array(1., dtype=float32)
      >>> jnp.round(optax.tree.get(state, "mu"), 3)
      Array([ 0.05, -0.05,  0.05,  0.1 ], dtype=float32)
    """
    if isinstance(threshold, int | float) and not threshold > 0:
        raise ValueError(
            f"scale_by_tamed_adam: threshold is {threshold!r}. Give a positive number; "
            "math.inf clips nothing."
        )

    def init(params: optax.Params) -> PyTree:
        _mirror.check_arrays(params, "scale_by_tamed_adam")
        params = _init.as_arrays(params)
        return ScaleByTamedAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(
                lambda p: jnp.zeros_like(p, dtype=_init.float32_of(p)), params
            ),
            nu=optax.tree.zeros_like(params, dtype=jnp.float32),
            clipped=jnp.zeros([], jnp.float32),
        )

    def update(
        updates: optax.Updates,
        state: PyTree,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PyTree]:
        del extra_args
        _arguments.check_made_by_init(
            ScaleByTamedAdamState, state, "scale_by_tamed_adam"
        )
        _mirror.check_mirrors(state.mu, updates, "scale_by_tamed_adam: the gradients")
        count = optax.safe_increment(state.count)
        updates = _init.as_arrays(updates)
        grads = jax.tree.map(_init.in_float32, updates)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        nu_hat = optax.tree.bias_correction(nu, b2, count)
        bounds = jax.tree.map(
            lambda v: threshold * jnp.sqrt(v) if relative else threshold, nu_hat
        )
        beyond = jax.tree.map(_is_beyond, grads, bounds)
        tamed = jax.tree.map(
            lambda g, bound, out: jnp.where(out, jnp.sign(g) * bound, g),
            *(grads, bounds, beyond),
        )
        mu = optax.tree.update_moment(tamed, state.mu, b1, 1)
        if nesterov:
            mu_hat = jax.tree.map(
                lambda m, g: b1 * m + (1 - b1) * g,
                optax.tree.bias_correction(mu, b1, optax.safe_increment(count)),
                optax.tree.bias_correction(tamed, b1, count),
            )
        else:
            mu_hat = optax.tree.bias_correction(mu, b1, count)
        new_updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v + eps_root) + eps), mu_hat, nu_hat
        )
        new_updates = _dtypes.cast_updates(new_updates, updates, params)
        return new_updates, ScaleByTamedAdamState(count, mu, nu, _total(beyond))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_beyond(g: jax.Array, bound: Scalar) -> jax.Array:
    """Which elements to clip; none where the bound is a NaN, infinity times zero."""
    size = jnp.abs(g)
    return (size > bound) & (size < math.inf)


def _total(beyond: PyTree) -> jax.Array:
    """How many are true. Whole numbers within a leaf: float32 stops at 2 ** 24."""
    counts = [jnp.sum(x, dtype=jnp.int32) for x in jax.tree.leaves(beyond)]
    return sum(
        (x.astype(jnp.float32) for x in counts), start=jnp.zeros([], jnp.float32)
    )
