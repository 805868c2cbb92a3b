"""LoRA-Pre for Muon: an orthogonalised momentum held as the product of thin factors."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flash import meshes
from optax_flash.lowrank import _factors, _newton, lora_pre
from optax_flash.lowrank._factors import Rank, Where
from optax_flash.transforms import _arguments, _boxes, _dtypes, _init, _mirror

PyTree = Any
Scalar = jax.typing.ArrayLike

NS_COEFFS = (3.4445, -4.7750, 2.0315)


class ScaleByLoraPreMuonState(NamedTuple):
    """State of :func:`scale_by_lora_pre_muon`.

    Trees mirror the params and have ``optax.MaskedNode()`` for those that they do not
    concern.

    Attributes:
      mu: momenta of the matrices that are not factored. # float32
      mu_left: of factored leaves (*batch, p, q), the momentum is ``mu_left.T @
        mu_right``. # shape=(*batch, rank, p), dtype=float32
      mu_right: # shape=(*batch, rank, q)
    """

    mu: PyTree
    mu_left: PyTree
    mu_right: PyTree


def scale_by_lora_pre_muon(
    momentum: Scalar = 0.95,
    *,
    rank: Rank,
    nesterov: bool = False,
    ns_coeffs: tuple[float, float, float] = NS_COEFFS,
    ns_steps: int = 5,
    eps: Scalar = 1e-8,
    consistent_rms: Scalar | None = None,
    damping: Scalar = lora_pre.DAMPING,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon, with the momentum of a matrix held as a product of factors.

    .. math::
      m_t = \mu L_{t-1}^\top R_{t-1} + g_t, \qquad
      u_t = s\,\mathrm{NewtonSchulz}(m_t)

    Both factors then take the damped Newton step of
    :func:`optax_flash.scale_by_lora_pre` toward :math:`g_t / (1 - \mu)`, with
    :math:`1 - \gamma = \mu^{1/2}`. All params have to be matrices, or batches of them
    over their leading axes: for others see :func:`optax_flash.lora_pre_muon`. A matrix
    whose smaller side is not over the rank, or that ``where`` leaves out, keeps its
    whole momentum: :math:`m_t = \mu m_{t-1} + g_t`.

    Args:
      momentum: :math:`\mu`.
      rank: a whole number, or a float in (0, 1], a share of each matrix's smaller side.
      nesterov: orthogonalise :math:`\mu m_t + g_t` instead.
      ns_coeffs: of the Newton-Schulz iteration.
      ns_steps: how many iterations.
      eps: added to the norm that the iteration divides by.
      consistent_rms: None scales a matrix (p, q) by s = max(1, q / p) ** 0.5, a number
        by s = max(p, q) ** 0.5 times that, as in ``optax.contrib.muon``.
      damping: see :func:`optax_flash.scale_by_lora_pre`.
      where: which leaves may be factored, by their path. None: all.

    Returns:
      A transformation with a :class:`ScaleByLoraPreMuonState`. It computes in float32;
      updates have the wider dtype of the gradient's and the param's.

    Raises:
      ValueError: a rank that is neither, a param that is no matrix or not floating,
        gradients of another structure than init saw.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> tx = optax_flash.scale_by_lora_pre_muon(rank=0.25)
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state.mu_left["kernel"].shape, state.mu_right["kernel"].shape
      ((8, 64), (8, 32))

    References:
      "Taming Momentum", arXiv 2602.24283, and Jordan, "Muon", 2024.
    """
    _factors.check_rank("scale_by_lora_pre_muon", rank)
    # Without momentum of its own, optax's Muon is its Newton-Schulz iteration.
    newton_schulz = optax.contrib.scale_by_muon(
        ns_coeffs,
        ns_steps,
        beta=0.0,
        eps=eps,
        nesterov=False,
        weight_dimension_numbers=functools.partial(
            jax.tree.map, lambda _: optax.contrib.MuonDimensionNumbers(-2, -1)
        ),
    )

    def orthogonalize(momenta: PyTree) -> PyTree:
        return newton_schulz.update(momenta, newton_schulz.init(momenta))[0]

    def init(params: optax.Params) -> ScaleByLoraPreMuonState:
        _mirror.check_floating(params, "scale_by_lora_pre_muon")
        _check_matrices(params)
        factored = lora_pre.factored_leaves(params, rank, where)
        dense = lora_pre.without(params, factored)
        return ScaleByLoraPreMuonState(
            jax.tree.map(jnp.zeros_like, dense),
            *lora_pre.init_factor_trees(params, factored, rank, "mu"),
        )

    def update(
        updates: optax.Updates,
        state: PyTree,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PyTree]:
        del extra_args
        _arguments.check_made_by_init(
            ScaleByLoraPreMuonState, state, "scale_by_lora_pre_muon"
        )
        updates = _init.as_arrays(updates)
        _mirror.check_mirrors(
            state.mu_left, updates, "scale_by_lora_pre_muon: the gradients"
        )
        mus, lefts, rights = (_mirror.entries(field, updates) for field in state)
        lora_pre.check_ranks(
            "scale_by_lora_pre_muon", updates, params, [lefts, rights], rank, where
        )
        grads, treedef = jax.tree.flatten(updates)
        results = []
        for i, g in enumerate(grads):
            is_factored = hasattr(lefts[i], "shape")
            g = _dtypes.as_dtype(g, jnp.float32 if is_factored else mus[i].dtype)
            if is_factored:
                mu, lefts[i], rights[i] = meshes.auto_sharded(
                    _update_factored,
                    [g, lefts[i], rights[i]],
                    {"momentum": momentum, "damping": damping},
                )
            else:
                mu = mus[i] = momentum * mus[i] + g
            results.append(momentum * mu + g if nesterov else mu)

        def orthogonal(*leaves: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(
                treedef.flatten_up_to(orthogonalize(treedef.unflatten(leaves)))
            )

        scaled = jax.tree.map(
            lambda u: _shape_scale(u.shape, consistent_rms) * u,
            treedef.unflatten(meshes.auto_sharded(orthogonal, results)),
        )
        scaled = _dtypes.cast_updates(scaled, updates, params)
        return scaled, ScaleByLoraPreMuonState(
            *map(treedef.unflatten, (mus, lefts, rights))
        )

    return _boxes.taken(optax.GradientTransformationExtraArgs(init, update))


# Under jit, so that leaves of one shape are traced once.
@jax.jit
def _update_factored(
    g: jax.Array, left: jax.Array, right: jax.Array, momentum: Scalar, damping: Scalar
) -> tuple[Any, ...]:
    """The momentum, from its old factors, and the new ones."""
    mu = momentum * _newton.product(left, right) + g
    target = g / (1 - momentum)
    return mu, *_newton.newton_step(left, right, target, momentum**0.5, damping)


def _shape_scale(shape: tuple[int, ...], consistent_rms: Scalar | None) -> Scalar:
    p, q = shape[-2:]
    if consistent_rms is None:
        return math.sqrt(max(1, q / max(1, p)))
    return math.sqrt(max(p, q)) * consistent_rms


def _check_matrices(params: PyTree) -> None:
    for path, p in zip(
        _mirror.leaf_paths(params), jax.tree.leaves(params), strict=True
    ):
        if p.ndim < 2:
            raise ValueError(
                f"scale_by_lora_pre_muon: param {path!r} has the shape "
                f"{list(p.shape)}; only matrices can be orthogonalised. lora_pre_muon "
                "gives others to Adam; or keep them out with optax.partition."
            )
