"""Adam whose moments are kept as products of two thin factors."""

import functools
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flash import meshes
from optax_flash.lowrank import _factors, _subspace
from optax_flash.lowrank._factors import Rank, Where
from optax_flash.transforms import _arguments, _boxes, _dtypes, _init, _mirror

PyTree = Any
Scalar = jax.typing.ArrayLike
Factors = tuple[jax.Array, jax.Array]

STRATEGIES = ("randomized", "periodic", "online")


class ScaleByLowrankAdamState(NamedTuple):
    """State of :func:`scale_by_lowrank_adam`.

    The trees mirror the params. A param is either in ``mu`` and ``nu`` or in the four
    others; where it is not there is a MaskedNode.

    Attributes:
      count: updates so far. # shape=(), dtype=int32
      mu: first moments of leaves that are not factored. # shape of the param, float32
      nu: their second moments. # shape of the param, float32
      mu_left: with p <= q, an orthonormal basis for the columns of the first moment;
        otherwise the first moment in the basis that is on the right.
        # (*batch, rank, p), float32
      mu_right: the first moment in the basis on the left; with p > q an orthonormal
        basis for its rows. # (*batch, rank, q), float32
      nu_left: the same of the second moment. # (*batch, rank, p), float32
      nu_right: # (*batch, rank, q), float32
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: PyTree
    nu: PyTree
    mu_left: PyTree
    mu_right: PyTree
    nu_left: PyTree
    nu_right: PyTree


def scale_by_lowrank_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
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
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with both moments stored as factors of low rank.

    Each step rebuilds the moments, lets the whole gradient in, takes Adam's step with
    what comes out, and only then cuts it down to ``rank`` again:

    .. math::
      M_t &= \beta_1 L_{t-1}^\top R_{t-1} + (1 - \beta_1)\, g_t \\
      V_t &= \beta_2 \left[\tilde L_{t-1}^\top \tilde R_{t-1}\right]_+
             + (1 - \beta_2)\, g_t^2 \\
      u_t &= \frac{M_t / (1 - \beta_1^t)}
             {\sqrt{V_t / (1 - \beta_2^t) + \bar\varepsilon} + \varepsilon} \\
      L_t &= \mathrm{basis}(M_t), \quad R_t = L_t M_t, \qquad
      \tilde L_t = \mathrm{basis}(V_t), \quad \tilde R_t = \tilde L_t V_t

    in float32, for :math:`p \le q`; taller matrices are transposed, so that the basis
    is on the shorter side. Truncation leaves negative second moments:
    :math:`[\cdot]_+` lifts all below it to the mean magnitude of the negative ones.
    And :math:`V_t` is no less than exact Adam's could be beside :math:`M_t`:

    .. math::
      V_t \ge \frac{(1 - \beta_2)(1 - \beta_1^2 / \beta_2)}{(1 - \beta_1)^2} M_t^2

    At full rank the step is Adam's, except for rounding.

    Factored are leaves of two axes or more, as batches of matrices over the leading
    ones, if the rank is no larger than the smaller side, that side no smaller than
    ``min_dim``, the larger one no more than ``max_aspect`` times it, and ``where`` says
    so. All others have dense moments.

    The basis is found, for every leaf and moment,

    - ``"randomized"``: at each step by a randomised singular value decomposition;
    - ``"periodic"``: by the same every ``refresh_every`` steps, and kept in between;
    - ``"online"``: at each step by one power iteration from the last one. No random
      numbers except the first basis, which ``seed`` does not change.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added outside of the square root.
      eps_root: added inside of it.
      rank: a number of components, or a float in (0, 1], a share of the smaller side.
      refresh_every: steps between two bases of ``"periodic"``; 1 for the others.
      strategy: ``"randomized"``, ``"periodic"`` or ``"online"``.
      oversampling: directions that the random sketch has over the rank.
      power_iterations: of the sketch. More bring the error closer to the least.
      min_dim: smallest side of a factored matrix.
      max_aspect: largest ratio of its sides.
      where: a predicate on a param's path, such as ``"decoder/kernel"``.
      seed: of the sketches. They depend on it, the path and the step alone.

    Returns:
      The transformation, with a :class:`ScaleByLowrankAdamState`. Updates have the
      wider dtype of the gradient's and the param's.

    Raises:
      ValueError: a rank, strategy or count that is none, ``refresh_every`` beside
        another strategy than ``"periodic"``, gradients of another structure than
        init's.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> params = {"kernel": jnp.ones((128, 256)), "bias": jnp.zeros(256)}
      >>> tx = optax.chain(
      ...     optax_flash.scale_by_lowrank_adam(rank=8), optax.scale(-1e-3)
      ... )
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> optax.tree.get(state, "mu_left")["kernel"].shape
      (8, 128)
      >>> optax.tree.get(state, "mu_right")["kernel"].shape
      (8, 256)

    References:
      MLorc, arXiv 2506.01897; Halko, Martinsson and Tropp, arXiv 0909.4061; for
      ``"online"`` LDAdam, arXiv 2410.16103, and PowerSGD, arXiv 1905.13727.
    """
    _check(rank, refresh_every, strategy, oversampling, power_iterations)

    def is_factored(path: str, p: jax.Array) -> bool:
        shape = p.shape
        if len(shape) < 2 or not _mirror.is_real(p):
            return False
        short, long = sorted(shape[-2:])
        return (
            short >= max(min_dim, 1, _factors.rank_of(shape, rank))
            and long <= max_aspect * short
            and (where is None or where(path))
        )

    def init(params: optax.Params) -> PyTree:
        _mirror.check_arrays(params, "scale_by_lowrank_adam")
        params = _init.as_arrays(params)
        rows = []
        for path, p in zip(
            _mirror.leaf_paths(params), jax.tree.leaves(params), strict=True
        ):
            row: dict[str, Any] = dict.fromkeys(FIELDS, optax.MaskedNode())
            if is_factored(path, p):
                for field in ("mu", "nu"):
                    row[f"{field}_left"], row[f"{field}_right"] = first_factors(
                        path, field, p
                    )
            else:
                row["mu"] = jnp.zeros_like(p, dtype=_init.float32_of(p))
                row["nu"] = jnp.zeros_like(p, dtype=jnp.float32)
            rows.append(row)
        return _state(jnp.zeros([], jnp.int32), params, rows)

    def first_factors(path: str, field: str, p: jax.Array) -> Factors:
        count = _factors.rank_of(p.shape, rank)
        left, right = (_factors.zeros(p, axis, count) for axis in (-2, -1))
        if strategy == "online":
            # A power iteration has to start somewhere. The product is zero even so.
            if _is_tall(p):
                right = right + _basis(path, field, right.shape)
            else:
                left = left + _basis(path, field, left.shape)
        return left, right

    def factored_step(
        path: str,
        g: jax.Array,
        mu_left: jax.Array,
        mu_right: jax.Array,
        nu_left: jax.Array,
        nu_right: jax.Array,
        **scalars: Any,
    ) -> tuple[jax.Array, ...]:
        b1, b2, count = scalars["b1"], scalars["b2"], scalars["count"]
        mu = b1 * _factors.product(mu_left, mu_right) + (1 - b1) * g
        nu = _above_error(_factors.product(nu_left, nu_right))
        nu = b2 * nu + (1 - b2) * g * g
        nu = jnp.maximum(nu, _least_ratio(b1, b2) * mu * mu)
        return (
            _direction(mu, nu, **scalars),
            *factors(f"{path}/mu", count, mu, mu_left, mu_right),
            *factors(f"{path}/nu", count, nu, nu_left, nu_right),
        )

    def factors(
        name: str, count: Any, moment: jax.Array, left: jax.Array, right: jax.Array
    ) -> Factors:
        """New factors of a moment, with their basis on its shorter side."""
        if _is_tall(moment):
            lying = jnp.swapaxes(moment, -2, -1)
            right, left = factors_of_lying(name, count, lying, right, left)
            return left, right
        return factors_of_lying(name, count, moment, left, right)

    # Not by recursion: a function in its own closure is a cycle, and Equinox walks
    # the closures of the transformations that it is given.
    def factors_of_lying(
        name: str, count: Any, moment: jax.Array, left: jax.Array, right: jax.Array
    ) -> Factors:
        """The same of one that is no taller than wide."""
        if strategy == "online":
            return _subspace.tracked(moment, left)
        *batch, p, q = moment.shape
        components = left.shape[-2]

        def refreshed() -> Factors:
            key = jax.random.fold_in(jax.random.key(seed), count)
            key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            shape = (*batch, min(components + oversampling, p), q)
            sketch = jax.random.normal(key, shape, jnp.float32)
            return _subspace.randomised(moment, components, sketch, power_iterations)

        if refresh_every == 1:
            return refreshed()
        # A moment that was zero has no basis yet.
        due = ((count - 1) % refresh_every == 0) | ~jnp.any(right != 0)
        return jax.lax.cond(
            due, refreshed, lambda: (left, _factors.onto_rows(left, moment))
        )

    def update(
        updates: optax.Updates,
        state: PyTree,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PyTree]:
        del extra_args
        _arguments.check_made_by_init(
            ScaleByLowrankAdamState, state, "scale_by_lowrank_adam"
        )
        # Every param is in one of the two.
        whole = jax.tree.map(
            lambda dense, left: left if _is_absent(dense) else dense,
            *(state.mu, state.mu_left),
            is_leaf=_is_absent,
        )
        _mirror.check_mirrors(whole, updates, "scale_by_lowrank_adam: the gradients")
        updates = _init.as_arrays(updates)
        count = optax.safe_increment(state.count)

        scalars = dict(count=count, b1=b1, b2=b2, eps=eps, eps_root=eps_root)

        def step(path: str, g: jax.Array, row: dict[str, Any]) -> Any:
            g32 = _init.in_float32(g)
            if not _is_absent(row["mu"]):
                mu = b1 * row["mu"] + (1 - b1) * g32
                nu = b2 * row["nu"] + jnp.real((1 - b2) * g32 * jnp.conj(g32))
                u = _direction(mu, nu, **scalars)
                row = row | {"mu": mu, "nu": nu}
            else:
                factored = functools.partial(factored_step, path)
                u, *factors = meshes.auto_sharded(
                    factored, [g32, *(row[field] for field in FACTORS)], scalars
                )
                row = row | dict(zip(FACTORS, factors, strict=True))
            return u, row

        columns = [_mirror.entries(getattr(state, field), updates) for field in FIELDS]
        like = _init.as_arrays(_factors.beside(params, updates))
        ranks = [
            _factors.rank_of(p.shape, rank) if is_factored(path, p) else None
            for path, p in zip(
                _mirror.leaf_paths(like), jax.tree.leaves(like), strict=True
            )
        ]
        of_factors = columns[-len(FACTORS) :]
        _factors.check_ranks("scale_by_lowrank_adam", like, ranks, of_factors)
        stepped = [
            step(path, g, dict(zip(FIELDS, row, strict=True)))
            for path, g, *row in zip(
                _mirror.leaf_paths(updates),
                jax.tree.leaves(updates),
                *columns,
                strict=True,
            )
        ]
        structure = jax.tree.structure(updates)
        new_updates = structure.unflatten([u for u, _ in stepped])
        new_updates = _dtypes.cast_updates(new_updates, updates, params)
        return new_updates, _state(count, updates, [row for _, row in stepped])

    return _boxes.taken(optax.GradientTransformationExtraArgs(init, update))


FACTORS = ("mu_left", "mu_right", "nu_left", "nu_right")
FIELDS = ("mu", "nu", *FACTORS)


def _state(
    count: Any, params: PyTree, rows: list[dict[str, Any]]
) -> ScaleByLowrankAdamState:
    unflatten = jax.tree.structure(params).unflatten
    return ScaleByLowrankAdamState(
        count, **{field: unflatten([row[field] for row in rows]) for field in FIELDS}
    )


def _above_error(nu: jax.Array) -> jax.Array:
    """A rebuilt second moment, nowhere below the mean magnitude of its negatives.

    They are as large as the error of the truncation. Zero in their place would claim to
    know better: the next small gradient there makes a step that is far too long.
    """
    negative = nu < 0
    total = jnp.sum(jnp.where(negative, -nu, 0), axis=(-2, -1), keepdims=True)
    number = jnp.sum(negative, axis=(-2, -1), keepdims=True)
    return jnp.maximum(nu, total / jnp.maximum(number, 1))


def _least_ratio(b1: Scalar, b2: Scalar) -> jax.Array:
    """The least that Adam's second moment can be of its first one's square.

    By Cauchy and Schwarz on the two sums over past gradients; 0 if b1 ** 2 >= b2.
    """
    b1, b2 = jnp.asarray(b1, jnp.float32), jnp.asarray(b2, jnp.float32)
    above = (1 - b2) * jnp.maximum(b2 - b1 * b1, 0)
    return above / jnp.maximum(b2 * (1 - b1) ** 2, jnp.finfo(jnp.float32).tiny)


def _is_absent(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_tall(p: jax.Array) -> bool:
    return p.shape[-2] > p.shape[-1]


def _basis(path: str, field: str, shape: tuple[int, ...]) -> jax.Array:
    """Random rows, about orthonormal."""
    return _factors.normal(path, field, shape) / math.sqrt(shape[-1])


def _direction(
    mu: jax.Array,
    nu: jax.Array,
    *,
    count: Scalar,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
) -> jax.Array:
    mu = mu / (1 - jnp.asarray(b1, jnp.float32) ** count)
    nu = nu / (1 - jnp.asarray(b2, jnp.float32) ** count)
    return mu / (jnp.sqrt(nu + eps_root) + eps)


def _check(
    rank: Rank,
    refresh_every: int,
    strategy: str,
    oversampling: int,
    power_iterations: int,
) -> None:
    _factors.check_rank("scale_by_lowrank_adam", rank)
    if strategy not in STRATEGIES:
        raise ValueError(
            f"scale_by_lowrank_adam: strategy is {strategy!r}. Choose one of "
            f"{', '.join(map(repr, STRATEGIES))}."
        )
    for name, value, least in (
        ("refresh_every", refresh_every, 1),
        ("oversampling", oversampling, 0),
        ("power_iterations", power_iterations, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"scale_by_lowrank_adam: {name} is {value!r}. Give a whole number of "
                f"at least {least}; under optax.inject_hyperparams name it in "
                "static_args."
            )
    if refresh_every != 1 and strategy != "periodic":
        raise ValueError(
            f"scale_by_lowrank_adam: refresh_every={refresh_every} has no meaning for "
            f"strategy {strategy!r}, which finds a basis at every step. Use "
            "'periodic', or 1."
        )
