"""The optimizers people ask for by name, their states in codes of 8 or 4 bits."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_flash.lowrank._factors import Rank, Where, check_rank
from optax_flash.lowrank.adam import FIELDS, scale_by_lowrank_adam
from optax_flash.lowrank.lora_pre import DAMPING, scale_by_lora_pre
from optax_flash.lowrank.lora_pre_muon import NS_COEFFS, scale_by_lora_pre_muon
from optax_flash.transforms import _mirror
from optax_flash.transforms._arguments import check_no_dtype, check_only
from optax_flash.transforms.compress import Codecs, compress
from optax_flash.transforms.tamed_adam import scale_by_tamed_adam

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
            _number(learning_rate),
            **_rates(b1=b1, b2=b2),
            **_numbers(eps=eps, eps_root=eps_root, weight_decay=weight_decay),
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
    """:func:`adamw8` whose momentum sees clipped gradients.

    :func:`scale_by_tamed_adam`, weight decay and the learning rate, in codes.

    Args:
      learning_rate: a number or a schedule.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added outside of the square root.
      eps_root: added inside of it.
      mu_dtype: None, as in :func:`adamw8`.
      weight_decay: multiplied by the learning rate.
      mask: which params decay, as in :func:`adamw8`.
      threshold: see :func:`scale_by_tamed_adam`; infinity for :func:`adamw8`.
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
        _with_decay(
            scale_by_tamed_adam(
                _number(threshold),
                **_rates(b1=b1, b2=b2),
                **_numbers(eps=eps, eps_root=eps_root),
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
            _number(learning_rate),
            **_rates(b1=b1, b2=b2),
            **_numbers(eps=eps, eps_root=eps_root),
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
            _number(learning_rate),
            **_rates(b1=b1, b2=b2),
            weight_decay=_number(weight_decay),
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
        momentum = _rate("momentum", momentum)
    return compress(
        optax.sgd(_number(learning_rate), momentum=momentum, nesterov=nesterov),
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
    return adamw8(**locals())


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
    return adam8(**locals())


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
    return lion8(**locals())


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
    return sgd8(**locals())


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
            **_rates(b1=b1, b2=b2),
            **_numbers(eps=eps, eps_root=eps_root),
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
            **_rates(b1=b1, b2=b2),
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
        optax.trace(_rate("decay", decay), nesterov=nesterov),
        codecs,
        implementation=implementation,
    )


def lora_pre_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: None = None,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    *,
    rank: Rank,
    damping: Scalar = DAMPING,
    bias_correction: str = "matched",
    where: Where = None,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with low-rank moments for matrices, and all of its state in 8-bit codes.

    ``compress(chain(scale_by_lora_pre, add_decayed_weights, scale_by_learning_rate))``.
    A matrix (p, q) takes 2 rank (p + q) codes instead of 2 p q; ``codecs`` that
    give None for ``"mu_left"``, ``"mu_right"``, ``"nu_left"`` and ``"nu_right"`` keep
    factors in float32. So do factors under 4,096 elements.

    Args:
      learning_rate: a number or a schedule.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added outside of the square root.
      eps_root: added inside of it.
      mu_dtype: None, as in :func:`adamw8`.
      weight_decay: multiplied by the learning rate.
      mask: tree of booleans, or a function of the params that gives one: which params
        decay.
      rank: a whole number, or a float in (0, 1], a share of each matrix's smaller side.
      damping: see :func:`scale_by_lora_pre`.
      bias_correction: see :func:`scale_by_lora_pre`.
      where: which leaves may be factored, by their path. The paper leaves embeddings
        and the head to Adam: ``lambda path: "embed" not in path``.
      codecs: see :func:`optax_flash.compress`.
      implementation: see :func:`optax_flash.compress`.

    Returns:
      The transformation.

    Raises:
      ValueError: see :func:`scale_by_lora_pre`; a decay rate in half precision; a
        ``mu_dtype``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flash
      >>> f = lambda x: jnp.sum(x ** 2)
      >>> params = jnp.ones((64, 64))
      >>> tx = optax_flash.lora_pre_adamw(0.1, rank=8)
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Loss: {f(params):.0f}")
      Loss: 3318
      Loss: 2620
      Loss: 2019
      Loss: 1385
      Loss: 851

    References:
      "Taming Momentum", arXiv 2602.24283.
    """
    fields = ("mu_left", "mu_right")
    check_no_dtype("lora_pre_adamw", "mu_dtype", mu_dtype, *fields)
    return compress(
        _with_decay(
            scale_by_lora_pre(
                rank=rank,
                **_rates(b1=b1, b2=b2),
                **_numbers(eps=eps, eps_root=eps_root),
                damping=_number(damping),
                bias_correction=bias_correction,
                where=where,
            ),
            learning_rate,
            weight_decay,
            mask,
        ),
        codecs,
        implementation=implementation,
    )


def lora_pre_muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: tuple[float, float, float] = NS_COEFFS,
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: None = None,
    *,
    rank: Rank,
    nesterov: bool = False,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: Scalar = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: None = None,
    consistent_rms: Scalar | None = None,
    damping: Scalar = DAMPING,
    where: Where = None,
    codecs: Codecs = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with a low-rank momentum for matrices; AdamW with 8-bit moments for others.

    A matrix (p, q) takes rank (p + q) codes; ``codecs`` that give None for
    ``"mu_left"`` and ``"mu_right"`` keep them in float32. One too small for the rank is
    still Muon's, with its whole momentum in codes. Leaves of more than two axes are
    batches of matrices; ``optax.contrib.muon`` gives those to Adam.

    Args:
      learning_rate: a number or a schedule.
      ns_coeffs: of the Newton-Schulz iteration; see :func:`scale_by_lora_pre_muon`.
      ns_steps: how many iterations.
      beta: decay rate of the momentum.
      eps: for the norm of a momentum, and for Adam.
      weight_decay: of Muon's leaves, multiplied by the learning rate.
      weight_decay_mask: which of Muon's leaves decay.
      mu_dtype: None, as in :func:`adamw8`.
      rank: a whole number, or a float in (0, 1], a share of each matrix's smaller side.
      nesterov: use Nesterov momentum; the default is not that of optax.
      adaptive: False; optax's other choice is not there.
      preconditioning: "frobenius"; optax's other choices are not there.
      adam_b1: decay rate of Adam's first moment.
      adam_b2: decay rate of its second.
      adam_eps_root: added inside of its square root.
      adam_weight_decay: of Adam's leaves.
      adam_learning_rate: None takes ``learning_rate``.
      muon_weight_dimension_numbers: None; ``where`` says which leaves are Muon's.
      consistent_rms: see :func:`scale_by_lora_pre_muon`.
      damping: see :func:`scale_by_lora_pre`.
      where: which leaves of two axes or more are Muon's, by their path; None: all. Keep
        embeddings and the head out of it.
      codecs: see :func:`optax_flash.compress`.
      implementation: see :func:`optax_flash.compress`.

    Returns:
      The transformation.

    Raises:
      ValueError: see :func:`scale_by_lora_pre_muon`; a decay rate in half precision;
        an argument of ``optax.contrib.muon`` that has no meaning here.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> tx = optax_flash.lora_pre_muon(0.02, rank=8)
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "mu_left")["kernel"].shape
      (8, 64)

    References:
      "Taming Momentum", arXiv 2602.24283, and Jordan, "Muon", 2024.
    """
    check_rank("lora_pre_muon", rank)
    check_no_dtype("lora_pre_muon", "mu_dtype", mu_dtype, "mu_left", "mu_right")
    only = "Only False is possible: the update is scaled as in plain Muon"
    check_only("lora_pre_muon", "adaptive", adaptive, False, only)
    only = "Only 'frobenius' is possible: a momentum is divided by its Frobenius norm"
    check_only("lora_pre_muon", "preconditioning", preconditioning, "frobenius", only)
    given = muon_weight_dimension_numbers
    only = "Leave it out, and say by where=, of paths, which leaves are Muon's"
    check_only("lora_pre_muon", "muon_weight_dimension_numbers", given, None, only)
    if adam_learning_rate is None:
        adam_learning_rate = learning_rate

    def label(path: str, x: jax.Array) -> str:
        matrix = x.ndim >= 2 and _mirror.is_real(x)
        chosen = matrix and (where is None or where(path))
        return "muon" if chosen else "adam"

    muon = _with_decay(
        scale_by_lora_pre_muon(
            _rate("beta", beta),
            rank=rank,
            nesterov=nesterov,
            ns_coeffs=ns_coeffs,
            ns_steps=ns_steps,
            eps=_number(eps),
            consistent_rms=_number(consistent_rms),
            damping=_number(damping),
        ),
        learning_rate,
        weight_decay,
        weight_decay_mask,
    )
    adam = optax.adamw(
        _number(adam_learning_rate),
        b1=_rate("adam_b1", adam_b1),
        b2=_rate("adam_b2", adam_b2),
        **_numbers(eps=eps, eps_root=adam_eps_root, weight_decay=adam_weight_decay),
    )
    return compress(
        optax.partition(
            {"muon": muon, "adam": adam},
            lambda params: _mirror.map_with_path(label, params),
        ),
        codecs,
        implementation=implementation,
    )


def lowrank_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: None = None,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    *,
    rank: Rank,
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
    r"""AdamW with moments of low rank, and all of its state in 8-bit codes.

    :func:`scale_by_lowrank_adam`, weight decay and the learning rate, under
    :func:`compress`. A factored p by q matrix keeps ``2 * rank * (p + q)`` codes
    instead of ``2 * p * q``. With ``"periodic"`` factors stay in float32: between two
    refreshes a basis is not made orthonormal again.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added outside of the square root.
      eps_root: added inside of it.
      mu_dtype: None, as in :func:`adamw8`.
      weight_decay: :math:`\lambda`, multiplied by the learning rate.
      mask: which params decay, as in :func:`adamw8`.
      rank: components of each moment, or a share of a matrix's smaller side.
      refresh_every: see :func:`scale_by_lowrank_adam`, as the next seven.
      strategy: how a basis is found.
      oversampling: of the random sketch.
      power_iterations: of the random sketch.
      min_dim: smallest side of a factored matrix.
      max_aspect: largest ratio of its sides.
      where: which params may be factored, a predicate on their paths.
      seed: of the sketches.
      codecs: see :func:`compress`; None stores factors in codes too, a mapping those
        that it names.
      implementation: see :func:`compress`.

    Returns:
      The transformation.

    Raises:
      ValueError: a decay rate in half precision, a ``mu_dtype``, and what
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
    check_no_dtype("lowrank_adamw", "mu_dtype", mu_dtype, *FIELDS)
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
    if codecs is None and strategy != "periodic":
        codecs = dict.fromkeys(FIELDS, "companded8")
    return compress(
        _with_decay(
            scale_by_lowrank_adam(
                rank=rank,
                **_rates(b1=b1, b2=b2),
                **_numbers(eps=eps, eps_root=eps_root),
                **extra,
            ),
            learning_rate,
            weight_decay,
            mask,
        ),
        codecs,
        implementation=implementation,
    )


def _with_decay(
    scale_by: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    mask: Mask,
) -> optax.GradientTransformation:
    """A direction, decoupled weight decay and the learning rate, as in AdamW."""
    return optax.chain(
        scale_by,
        optax.add_decayed_weights(_number(weight_decay), mask),
        optax.scale_by_learning_rate(_number(learning_rate)),
    )


def _number(x: Any) -> Any:
    """A hyperparameter in float32, where it came as a half-precision array."""
    return x.astype(jnp.float32) if _is_half(x) else x


def _rate(name: str, x: Any) -> Any:
    """A decay rate, which half precision would have spoiled already."""
    if _is_half(x):
        raise ValueError(
            f"{name} arrived in {x.dtype}, where 0.999 is {x.dtype.type(0.999)}. "
            "optax.inject_hyperparams casts hyperparameters to the dtype of the "
            "params: pass hyperparam_dtype=jnp.float32 to it."
        )
    return x


def _numbers(**given: Any) -> dict[str, Any]:
    """Hyperparameters by name, each as :func:`_number` gives it."""
    return {name: _number(x) for name, x in given.items()}


def _rates(**given: Any) -> dict[str, Any]:
    """Decay rates by name, each as :func:`_rate` gives it."""
    return {name: _rate(name, x) for name, x in given.items()}


def _is_half(x: Any) -> bool:
    return (
        hasattr(x, "dtype")
        and jnp.issubdtype(x.dtype, jnp.floating)
        and x.dtype.itemsize < 4
    )
