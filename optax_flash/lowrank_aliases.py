"""Optimizers with low-rank moments, by name, their states in codes."""

from typing import Any

import jax
import optax

from optax_flash.aliases import Mask, Scalar, number, rate, with_decay
from optax_flash.lowrank._factors import Rank, Where, check_rank
from optax_flash.lowrank.adam import LowRankAdamState, scale_by_lowrank_adam
from optax_flash.lowrank.lora_pre import DAMPING, scale_by_lora_pre
from optax_flash.lowrank.lora_pre_muon import NS_COEFFS, scale_by_lora_pre_muon
from optax_flash.transforms import _mirror
from optax_flash.transforms._arguments import check_no_dtype, check_only
from optax_flash.transforms.compress import Codecs, compress


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
    A matrix (p, q) takes 2 rank (p + q) codes in the place of 2 p q; ``codecs`` that
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
        with_decay(
            scale_by_lora_pre(
                rank,
                rate("b1", b1),
                rate("b2", b2),
                number(eps),
                number(eps_root),
                damping=number(damping),
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

    muon = with_decay(
        scale_by_lora_pre_muon(
            rank,
            rate("beta", beta),
            nesterov=nesterov,
            ns_coeffs=ns_coeffs,
            ns_steps=ns_steps,
            eps=number(eps),
            consistent_rms=number(consistent_rms),
            damping=number(damping),
        ),
        learning_rate,
        weight_decay,
        weight_decay_mask,
    )
    adam = optax.adamw(
        number(adam_learning_rate),
        b1=rate("adam_b1", adam_b1),
        b2=rate("adam_b2", adam_b2),
        eps=number(eps),
        eps_root=number(adam_eps_root),
        weight_decay=number(adam_weight_decay),
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
    :func:`compress`. A factored p by q matrix keeps ``2 * rank * (p + q)`` codes in the
    place of ``2 * p * q``. With ``"periodic"`` factors stay in float32: between two
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
    fields = LowRankAdamState._fields[1:]
    check_no_dtype("lowrank_adamw", "mu_dtype", mu_dtype, *fields)
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
        codecs = dict.fromkeys(LowRankAdamState._fields[1:], "companded8")
    return compress(
        with_decay(
            scale_by_lowrank_adam(
                rank,
                rate("b1", b1),
                rate("b2", b2),
                number(eps),
                number(eps_root),
                **extra,
            ),
            learning_rate,
            weight_decay,
            mask,
        ),
        codecs,
        implementation=implementation,
    )
