"""The optimizers people ask for by name: optax's own, with an 8- or 4-bit state."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_flash.transforms._arguments import check_no_dtype
from optax_flash.transforms.compress import Codecs, compress
from optax_flash.transforms.tame import tame

Mask = Any | Callable[[optax.Params], Any] | None
Scalar = jax.typing.ArrayLike


def adamw8(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: None = None,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with 8-bit moments: ``compress(optax.adamw(...))`` and nothing more.

    .. math::
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
      u_t &= -\alpha_t \left(\frac{m_t / (1 - \beta_1^t)}
             {\sqrt{v_t / (1 - \beta_2^t) + \bar\varepsilon} + \varepsilon}
             + \lambda p_t\right)

    in float32, with :math:`m` and :math:`v` stored in codes between two steps.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added outside of the square root.
      eps_root: added inside of it.
      mu_dtype: None; it stands where optax has it. ``codecs`` say how the momentum is
        stored.
      weight_decay: :math:`\lambda`, multiplied by the learning rate.
      mask: tree of booleans, or a function of the params that gives one: which params
        decay.
      nesterov: use Nesterov momentum.
      codecs: see :func:`optax_flash.compress`.
      implementation: see :func:`optax_flash.compress`.

    Returns:
      The transformation.

    Raises:
      ValueError: a decay rate in half precision, where 0.999 is 1; a ``mu_dtype``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flash
      >>> f = lambda x: jnp.sum(x ** 2)
      >>> params = jnp.ones((64, 64))
      >>> tx = optax_flash.adamw8(learning_rate=0.1)
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
      Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
    """
    check_no_dtype("adamw8", "mu_dtype", mu_dtype, "mu")
    return compress(
        optax.adamw(
            number(learning_rate),
            b1=rate("b1", b1),
            b2=rate("b2", b2),
            eps=number(eps),
            eps_root=number(eps_root),
            weight_decay=number(weight_decay),
            mask=mask,
            nesterov=nesterov,
        ),
        codecs,
        implementation=implementation,
    )


def tamed_adamw8(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: None = None,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    *,
    threshold: Scalar,
    relative: bool = False,
    nesterov: bool = False,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """:func:`adamw8` whose momentum sees clipped gradients: :func:`tame` in codes.

    Args:
      learning_rate: a number or a schedule.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added outside of the square root.
      eps_root: added inside of it.
      mu_dtype: None, as in :func:`adamw8`.
      weight_decay: multiplied by the learning rate.
      mask: which params decay, as in :func:`adamw8`.
      threshold: see :func:`tame`; infinity for :func:`adamw8`.
      relative: whether it is in units of the root of the second moment.
      nesterov: use Nesterov momentum.
      codecs: see :func:`compress`.
      implementation: see :func:`compress`.

    Returns:
      The transformation.

    Raises:
      ValueError: a decay rate in half precision; a threshold that is not positive; a
        ``mu_dtype``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> params = jnp.ones((64, 64))
      >>> tx = optax_flash.tamed_adamw8(1e-3, threshold=2.5, relative=True)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> optax.tree.get(state, "clipped")
      Array(0., dtype=float32)
    """
    check_no_dtype("tamed_adamw8", "mu_dtype", mu_dtype, "mu")
    return compress(
        with_decay(
            tame(
                number(threshold),
                b1=rate("b1", b1),
                b2=rate("b2", b2),
                eps=number(eps),
                eps_root=number(eps_root),
                relative=relative,
                nesterov=nesterov,
            ),
            learning_rate,
            weight_decay,
            mask,
        ),
        codecs,
        implementation=implementation,
    )


def adam8(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: None = None,
    *,
    nesterov: bool = False,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with 8-bit moments: ``compress(optax.adam(...))``.

    :func:`adamw8` without weight decay; arguments, returns and errors as there.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> state = optax_flash.adam8().init(jnp.ones((64, 64)))
      >>> state.inner_state[0].mu.dtype
      dtype('uint8')

    References:
      Kingma and Ba, "Adam", arXiv 1412.6980.
    """
    check_no_dtype("adam8", "mu_dtype", mu_dtype, "mu")
    return compress(
        optax.adam(
            number(learning_rate),
            b1=rate("b1", b1),
            b2=rate("b2", b2),
            eps=number(eps),
            eps_root=number(eps_root),
            nesterov=nesterov,
        ),
        codecs,
        implementation=implementation,
    )


def lion8(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: None = None,
    weight_decay: Scalar = 1e-3,
    mask: Mask = None,
    *,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with an 8-bit momentum: ``compress(optax.lion(...))``.

    .. math::
      u_t &= -\alpha_t \left(\mathrm{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t)
             + \lambda p_t\right) \\
      m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule; a third to a tenth of
        Adam's.
      b1: decay rate of the momentum that the sign is taken of.
      b2: decay rate of the momentum that is stored.
      mu_dtype: None, as in :func:`adamw8`.
      weight_decay: :math:`\lambda`, multiplied by the learning rate.
      mask: which params decay, as in :func:`adamw8`.
      codecs: see :func:`optax_flash.compress`.
      implementation: see :func:`optax_flash.compress`.

    Returns:
      The transformation.

    Raises:
      ValueError: a decay rate in half precision; a ``mu_dtype``.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> state = optax_flash.lion8(1e-4).init(jnp.ones((64, 64)))
      >>> state.inner_state[0].mu.dtype
      dtype('uint8')

    References:
      Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.
    """
    check_no_dtype("lion8", "mu_dtype", mu_dtype, "mu")
    return compress(
        optax.lion(
            number(learning_rate),
            b1=rate("b1", b1),
            b2=rate("b2", b2),
            weight_decay=number(weight_decay),
            mask=mask,
        ),
        codecs,
        implementation=implementation,
    )


def sgd8(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    accumulator_dtype: None = None,
    *,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with an 8-bit momentum: ``compress(optax.sgd(...))``.

    .. math:: t_t = g_t + \mu t_{t-1}, \qquad u_t = -\alpha_t t_t

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule.
      momentum: :math:`\mu`; with None, as in optax, there is no state to store.
      nesterov: use Nesterov momentum.
      accumulator_dtype: None; it stands where optax has it. ``codecs`` say how the
        momentum is stored.
      codecs: see :func:`optax_flash.compress`.
      implementation: see :func:`optax_flash.compress`.

    Returns:
      The transformation.

    Raises:
      ValueError: a momentum in half precision; an ``accumulator_dtype``.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> state = optax_flash.sgd8(0.1, momentum=0.9).init(jnp.ones((64, 64)))
      >>> state.inner_state[0].trace.dtype
      dtype('uint8')

    References:
      Sutskever et al., "On the importance of initialization and momentum in deep
      learning", 2013.
    """
    check_no_dtype("sgd8", "accumulator_dtype", accumulator_dtype, "trace")
    if momentum is not None:
        momentum = rate("momentum", momentum)
    return compress(
        optax.sgd(number(learning_rate), momentum=momentum, nesterov=nesterov),
        codecs,
        implementation=implementation,
    )


def adamw4(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: None = None,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    codecs: Codecs = "companded4",
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with 4-bit moments: ``compress(optax.adamw(...), "companded4")``.

    1.125 bytes a parameter for both moments. :func:`adamw8` with other codecs, and with
    error feedback, see :func:`compress`; arguments, returns and errors as there.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> state = optax_flash.adamw4().init(jnp.ones((64, 64)))
      >>> state.inner_state[0].nu.shape
      (64, 32)

      With a second moment of 8 bits:

      >>> codecs = {"mu": "companded4", "nu": "companded8"}
      >>> state = optax_flash.adamw4(codecs=codecs).init(jnp.ones((64, 64)))
      >>> state.inner_state[0].nu.shape
      (64, 64)

    References:
      Li, Chen and Zhu, "Memory Efficient Optimizers with 4-bit States", arXiv
      2309.01507.
    """
    check_no_dtype("adamw4", "mu_dtype", mu_dtype, "mu")
    return adamw8(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        weight_decay=weight_decay,
        mask=mask,
        nesterov=nesterov,
        codecs=codecs,
        implementation=implementation,
    )


def adam4(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: None = None,
    *,
    nesterov: bool = False,
    codecs: Codecs = "companded4",
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with 4-bit moments: :func:`adam8` with other codecs.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> state = optax_flash.adam4().init(jnp.ones((64, 64)))
      >>> state.inner_state[0].mu.shape
      (64, 32)
    """
    check_no_dtype("adam4", "mu_dtype", mu_dtype, "mu")
    return adam8(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        nesterov=nesterov,
        codecs=codecs,
        implementation=implementation,
    )


def lion4(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: None = None,
    weight_decay: Scalar = 1e-3,
    mask: Mask = None,
    *,
    codecs: Codecs = "companded4",
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion with a 4-bit momentum: :func:`lion8` with other codecs.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> state = optax_flash.lion4(1e-4).init(jnp.ones((64, 64)))
      >>> state.inner_state[0].mu.shape
      (64, 32)
    """
    check_no_dtype("lion4", "mu_dtype", mu_dtype, "mu")
    return lion8(
        learning_rate,
        b1,
        b2,
        weight_decay=weight_decay,
        mask=mask,
        codecs=codecs,
        implementation=implementation,
    )


def sgd4(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    accumulator_dtype: None = None,
    *,
    codecs: Codecs = "companded4",
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with a 4-bit momentum: :func:`sgd8` with other codecs.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> state = optax_flash.sgd4(0.1, momentum=0.9).init(jnp.ones((64, 64)))
      >>> state.inner_state[0].trace.shape
      (64, 32)
    """
    check_no_dtype("sgd4", "accumulator_dtype", accumulator_dtype, "trace")
    return sgd8(
        learning_rate,
        momentum,
        nesterov,
        codecs=codecs,
        implementation=implementation,
    )


def scale_by_adam8(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: None = None,
    *,
    nesterov: bool = False,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``compress(optax.scale_by_adam(...))``; see :func:`adamw8`.

    Example:
      >>> import optax, optax_flash
      >>> tx = optax.chain(optax_flash.scale_by_adam8(), optax.scale(-1e-3))
    """
    check_no_dtype("scale_by_adam8", "mu_dtype", mu_dtype, "mu")
    return compress(
        optax.scale_by_adam(
            b1=rate("b1", b1),
            b2=rate("b2", b2),
            eps=number(eps),
            eps_root=number(eps_root),
            nesterov=nesterov,
        ),
        codecs,
        implementation=implementation,
    )


def scale_by_lion8(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: None = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: float = 1.0,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``compress(optax.scale_by_lion(...))``; see :func:`lion8`.

    ``mode`` and ``smooth_beta`` are optax's.

    Example:
      >>> import optax, optax_flash
      >>> tx = optax.chain(optax_flash.scale_by_lion8(), optax.scale(-1e-4))
    """
    check_no_dtype("scale_by_lion8", "mu_dtype", mu_dtype, "mu")
    return compress(
        optax.scale_by_lion(
            b1=rate("b1", b1),
            b2=rate("b2", b2),
            mode=mode,
            smooth_beta=smooth_beta,
        ),
        codecs,
        implementation=implementation,
    )


def trace8(
    decay: Scalar,
    nesterov: bool = False,
    accumulator_dtype: None = None,
    *,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``compress(optax.trace(...))``: momentum; see :func:`sgd8`.

    Example:
      >>> import optax, optax_flash
      >>> tx = optax.chain(optax_flash.trace8(0.9), optax.scale(-0.1))
    """
    check_no_dtype("trace8", "accumulator_dtype", accumulator_dtype, "trace")
    return compress(
        optax.trace(rate("decay", decay), nesterov=nesterov),
        codecs,
        implementation=implementation,
    )


def with_decay(
    scale_by: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    mask: Mask,
) -> optax.GradientTransformation:
    """A direction, decoupled weight decay and the learning rate, as in AdamW."""
    return optax.chain(
        scale_by,
        optax.add_decayed_weights(number(weight_decay), mask),
        optax.scale_by_learning_rate(number(learning_rate)),
    )


def number(x: Any) -> Any:
    """A hyperparameter in float32, where it came as a half-precision array."""
    return x.astype(jnp.float32) if _is_half(x) else x


def rate(name: str, x: Any) -> Any:
    """A decay rate, which half precision would have spoiled already."""
    if _is_half(x):
        raise ValueError(
            f"{name} arrived in {x.dtype}, where 0.999 is {x.dtype.type(0.999)}. "
            "optax.inject_hyperparams casts hyperparameters to the dtype of the "
            "params: pass hyperparam_dtype=jnp.float32 to it."
        )
    return x


def _is_half(x: Any) -> bool:
    return (
        hasattr(x, "dtype")
        and jnp.issubdtype(x.dtype, jnp.floating)
        and x.dtype.itemsize < 4
    )
