"""LoRA-Pre: Adam whose moments are products of thin factors."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flash import meshes
from optax_flash.lowrank import _factors, _newton
from optax_flash.lowrank._factors import Rank, Where
from optax_flash.transforms import _arguments, _boxes, _dtypes, _init, _mirror

PyTree = Any
Scalar = jax.typing.ArrayLike

DAMPING = 1e-4
BIAS_CORRECTIONS = ("matched", "paper")


class ScaleByLoraPreState(NamedTuple):
    """State of :func:`scale_by_lora_pre`.

    Every tree mirrors the params and has ``optax.MaskedNode()`` for those that it does
    not concern.

    Attributes:
      count: updates so far. # shape=(), dtype=int32
      mu: first moments of the leaves that are not factored. # float32
      nu: their second moments.
      mu_left: of factored leaves (*batch, p, q), the first moment is ``mu_left.T @
        mu_right``. # shape=(*batch, rank, p), dtype=float32
      mu_right: # shape=(*batch, rank, q)
      nu_left: the second moment is the square of ``nu_left.T @ nu_right``.
      nu_right: # shape=(*batch, rank, q)
    """

    count: Any  # Not as jax.typing has it: a tuple has a method of that name.
    mu: PyTree
    nu: PyTree
    mu_left: PyTree
    mu_right: PyTree
    nu_left: PyTree
    nu_right: PyTree


def scale_by_lora_pre(
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    *,
    rank: Rank,
    damping: Scalar = DAMPING,
    bias_correction: str = "matched",
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's rescaling, with both moments of a matrix held as products of factors.

    .. math::
      m_t &= \beta_1 L_{t-1}^\top R_{t-1} + (1 - \beta_1) g_t \\
      v_t &= \beta_2 (\bar L_{t-1}^\top \bar R_{t-1})^2 + (1 - \beta_2) g_t^2 \\
      u_t &= \frac{m_t / c_1(t)}{\sqrt{v_t / c_2(t) + \bar\varepsilon} + \varepsilon}

    Then all factors take a damped Newton step at once, those of the first moment toward
    :math:`g_t`, those of the second toward :math:`|g_t|`:

    .. math::
      L_t &= (1 - \gamma) L_{t-1} + \gamma (G_R + d\,\mathrm{diag}\,G_R)^{-1} R_{t-1}
        g_t^\top, \qquad G_R = R_{t-1} R_{t-1}^\top \\
      R_t &= (1 - \gamma) R_{t-1} + \gamma (G_L + d\,\mathrm{diag}\,G_L)^{-1} L_{t-1}
        g_t, \qquad G_L = L_{t-1} L_{t-1}^\top

    with :math:`1 - \gamma = \beta_1^{1/2}` and, for the second moment,
    :math:`\beta_2^{1/4}`. There is no SVD and no projection to refresh.

    Factored are leaves of two axes or more whose smaller side is over the rank; leading
    axes are a batch of matrices. All others are exactly ``optax.scale_by_adam``'s.

    Args:
      b1: :math:`\beta_1`, decay rate of the first moment.
      b2: :math:`\beta_2`, decay rate of the second moment.
      eps: :math:`\varepsilon`, added outside of the square root.
      eps_root: :math:`\bar\varepsilon`, added inside of it.
      rank: a whole number, or a float in (0, 1], a share of each matrix's smaller side.
        Under ``optax.inject_hyperparams`` name it in ``static_args``.
      damping: d, relative to the squared length of each of a factor's rows, so that the
        size of the gradients does not matter. No less is taken than float32 needs,
        9.6e-7 times the rank.
      bias_correction: ``"matched"`` divides by what the moments have of a constant
        gradient of rank 1; ``"paper"`` by :math:`1 - \beta^t`, which makes the first
        updates up to five times too large.
      where: which leaves may be factored, by their path such as
        ``"block_0/qkv/kernel"``. None: all.

    Returns:
      A transformation with a :class:`ScaleByLoraPreState`. It computes in float32;
      updates have the wider dtype of the gradient's and the param's.

    Raises:
      ValueError: a rank that is neither, an unknown bias correction, a leaf that is no
        array or number, gradients of another structure than init saw.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> tx = optax_flash.scale_by_lora_pre(rank=4)
      >>> state = tx.init({"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)})
      >>> state.mu_left["kernel"].shape, state.mu_right["kernel"].shape
      ((4, 64), (4, 32))
      >>> state.mu["kernel"], state.mu["bias"].shape
      (MaskedNode(), (32,))

    References:
      "Taming Momentum", arXiv 2602.24283, which has no public code. Damping, bound on
      the step and matched correction are ours; docs/low_rank.md says why.
    """
    _factors.check_rank("scale_by_lora_pre", rank)
    if bias_correction not in BIAS_CORRECTIONS:
        raise ValueError(
            f"scale_by_lora_pre: bias_correction is {bias_correction!r}; known are "
            f"{', '.join(map(repr, BIAS_CORRECTIONS))}."
        )
    adam: Any = optax.scale_by_adam(b1, b2, eps, eps_root)

    def init(params: optax.Params) -> ScaleByLoraPreState:
        _mirror.check_arrays(params, "scale_by_lora_pre")
        params = _init.as_arrays(params)
        factored = factored_leaves(params, rank, where)
        dense: Any = adam.init(without(params, factored))
        mu_left, mu_right = init_factor_trees(params, factored, rank, "mu")
        nu_left, nu_right = init_factor_trees(params, factored, rank, "nu")
        return ScaleByLoraPreState(
            dense.count, dense.mu, dense.nu, mu_left, mu_right, nu_left, nu_right
        )

    def update(
        updates: optax.Updates,
        state: PyTree,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PyTree]:
        del extra_args
        _arguments.check_made_by_init(ScaleByLoraPreState, state, "scale_by_lora_pre")
        updates = _init.as_arrays(updates)
        _mirror.check_mirrors(
            state.mu_left, updates, "scale_by_lora_pre: the gradients"
        )
        columns = [_mirror.entries(field, updates) for field in state[3:]]
        check_ranks("scale_by_lora_pre", updates, params, columns, rank, where)
        grads, treedef = jax.tree.flatten(updates)
        factored = [hasattr(left, "shape") for left in columns[0]]
        scalars = {
            "b1": b1,
            "b2": b2,
            "eps": eps,
            "eps_root": eps_root,
            "damping": damping,
        }
        dense_updates, dense = adam.update(
            without(updates, factored),
            optax.ScaleByAdamState(state.count, state.mu, state.nu),
        )
        results = treedef.flatten_up_to(dense_updates)
        for i, g in enumerate(grads):
            if factored[i]:
                results[i], *factors = meshes.auto_sharded(
                    functools.partial(_update_leaf, bias_correction=bias_correction),
                    [g.astype(jnp.float32), *(column[i] for column in columns)],
                    scalars | {"count": dense.count},
                )
                for column, factor in zip(columns, factors, strict=True):
                    column[i] = factor
        dense_mu, dense_nu = _dtypes.kept((dense.mu, dense.nu), (state.mu, state.nu))
        new_updates = _dtypes.cast_updates(treedef.unflatten(results), updates, params)
        return new_updates, ScaleByLoraPreState(
            dense.count, dense_mu, dense_nu, *map(treedef.unflatten, columns)
        )

    return _boxes.taken(optax.GradientTransformationExtraArgs(init, update))


# Under jit, so that leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnames="bias_correction")
def _update_leaf(
    g: jax.Array,
    mu_left: jax.Array,
    mu_right: jax.Array,
    nu_left: jax.Array,
    nu_right: jax.Array,
    count: jax.Array,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    damping: Scalar,
    *,
    bias_correction: str,
) -> tuple[Any, ...]:
    """The update of a factored leaf, from its old factors, and the new ones."""
    decay1, decay2 = b1**0.5, b2**0.25
    if bias_correction == "paper":
        c1, c2 = 1 - b1**count, 1 - b2**count
    else:
        rank, q = mu_right.shape[-2:]
        c1 = (1 - b1) + b1 * _newton.share_reached(decay1, count - 1, rank / q)
        c2 = (1 - b2) + b2 * _newton.share_reached(decay2, count - 1, rank / q) ** 2
    mu = b1 * _newton.product(mu_left, mu_right) + (1 - b1) * g
    nu = b2 * _newton.product(nu_left, nu_right) ** 2 + (1 - b2) * g**2
    update = (mu / c1) / (jnp.sqrt(nu / c2 + eps_root) + eps)
    return (
        update,
        *_newton.newton_step(mu_left, mu_right, g, decay1, damping),
        *_newton.newton_step(nu_left, nu_right, jnp.abs(g), decay2, damping),
    )


def factored_leaves(params: PyTree, rank: Rank, where: Where) -> list[bool]:
    """For each leaf, whether it is held as factors."""
    return [
        p.ndim >= 2
        and _mirror.is_real(p)
        and min(p.shape[-2:]) > _factors.rank_of(p.shape, rank)
        and (where is None or bool(where(path)))
        for path, p in zip(
            _mirror.leaf_paths(params), jax.tree.leaves(params), strict=True
        )
    ]


def check_ranks(
    what: str,
    updates: PyTree,
    params: PyTree,
    columns: list[list[Any]],
    rank: Rank,
    where: Where,
) -> None:
    """Raises a ValueError where the state's factors are not of this rank."""
    like = _init.as_arrays(_factors.beside(params, updates))
    rows = zip(jax.tree.leaves(like), factored_leaves(like, rank, where), strict=True)
    ranks = [_factors.rank_of(p.shape, rank) if yes else None for p, yes in rows]
    _factors.check_ranks(what, like, ranks, columns)


def without(tree: PyTree, factored: list[bool]) -> PyTree:
    """The tree in float32, without its factored leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        [
            optax.MaskedNode() if is_factored else _init.like_float32(x)
            for x, is_factored in zip(leaves, factored, strict=True)
        ]
    )


def init_factor_trees(
    params: PyTree, factored: list[bool], rank: Rank, field: str
) -> tuple[PyTree, PyTree]:
    """The trees of left and of right factors of one moment."""
    leaves, treedef = jax.tree.flatten(params)
    pairs = [
        _newton.init_factors(p, _factors.rank_of(p.shape, rank), path, field)
        if is_factored
        else (optax.MaskedNode(), optax.MaskedNode())
        for p, is_factored, path in zip(
            leaves, factored, _mirror.leaf_paths(params), strict=True
        )
    ]
    return (
        treedef.unflatten([left for left, _ in pairs]),
        treedef.unflatten([right for _, right in pairs]),
    )
