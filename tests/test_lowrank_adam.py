"""Low-rank Adam: against AdamW, exact truncation in float64, and everything else."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash.lowrank import _factors, _subspace
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")

STRATEGIES = {"randomized": 1, "periodic": 5, "online": 1}
EPS = float(jnp.finfo(jnp.float32).eps)
FACTORS = ("mu_left", "mu_right", "nu_left", "nu_right")
IN_FLOAT32 = dict.fromkeys(FACTORS)


@pytest.fixture(params=quick(["randomized"], STRATEGIES), name="make")
def make_fixture(request):
    """The transformation as a function of its rank, for each strategy."""
    return functools.partial(
        optax_flash.scale_by_lowrank_adam,
        strategy=request.param,
        refresh_every=STRATEGIES[request.param],
    )


@pytest.fixture(params=quick(["randomized"], STRATEGIES), name="alias")
def alias_fixture(request):
    return functools.partial(
        optax_flash.lowrank_adamw,
        1e-2,
        rank=8,
        strategy=request.param,
        refresh_every=STRATEGIES[request.param],
    )


def stream(steps, shape=(64, 96), rank=None, noise=0.0, seed=0):
    """Gradients from fixed spaces of columns and rows, with noise; of full rank."""
    rng = np.random.default_rng(seed)
    *batch, p, q = shape
    if rank is not None:
        left, right = rng.normal(size=(*batch, p, rank)), rng.normal(size=(rank, q))
    for _ in range(steps):
        g = rng.normal(size=shape)
        if rank is not None:
            # None close to zero: one gradient shows the whole space.
            signs = rng.choice([-1, 1], size=rank) * rng.uniform(0.5, 1.5, size=rank)
            g = noise * g + (left * signs) @ right / math.sqrt(rank)
        yield jnp.asarray(g, jnp.float32)


def run(tx, grads, params=None):
    grads = list(grads)
    params = jax.tree.map(jnp.zeros_like, grads[0]) if params is None else params
    state, updates = tx.init(params), []
    update = jax.jit(tx.update)
    for g in grads:
        u, state = update(g, state, params)
        updates.append(u)
    return updates, state


def moment(state, field="mu"):
    left, right = (optax.tree.get(state, f"{field}_{x}") for x in ("left", "right"))
    return np.asarray(_factors.product(left, right), np.float64)


def average(grads, decay, power=1):
    m = 0.0
    for g in grads:
        m = decay * m + (1 - decay) * np.asarray(g, np.float64) ** power
    return m


def truncated(x, rank):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def relative_error(x, exact):
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


class TestOracles:
    @pytest.mark.parametrize("shape", [(64, 96), (96, 64)], ids=str)
    def test_full_rank_is_adam(self, make, shape):
        """At each element to what rounding allows.

        Each step rounds both moments to some units in the last place of their norm,
        which the two averages add up; an element's update divides by its own root.
        """
        steps = 30
        grads = list(stream(steps, shape))
        updates, _ = run(make(rank=64), grads)
        stock, _ = run(optax.scale_by_adam(), grads)
        for t, (u, exact) in enumerate(zip(updates, stock, strict=True), start=1):
            m, v = average(grads[:t], 0.9), average(grads[:t], 0.999, 2)
            m_error = t * EPS * np.linalg.norm(m, 2)
            v_error = t * EPS * np.linalg.norm(v, 2)
            c1, c2 = 1 - 0.9**t, 1 - 0.999**t
            root = np.sqrt(np.maximum(v - v_error, v_error) / c2)
            bound = (m_error / c1) / root + np.abs(m / c1) * v_error / c2 / root**3
            assert np.all(np.abs(u - np.asarray(exact)) <= bound + 8 * EPS)
        assert relative_error(updates[-1], np.asarray(stock[-1])) < 1e-5

    def test_alias_at_full_rank_is_adamw(self):
        params, grads = jnp.ones((64, 64)), list(stream(10, (64, 64)))
        tx = optax_flash.lowrank_adamw(
            1e-2, rank=1.0, weight_decay=0.1, codecs=IN_FLOAT32
        )
        updates, _ = run(tx, grads, params)
        expected, _ = run(optax.adamw(1e-2, weight_decay=0.1), grads, params)
        assert relative_error(np.asarray(updates), np.asarray(expected)) < 1e-4

    @pytest.mark.parametrize("codecs", [None, IN_FLOAT32])
    def test_factors_are_in_codes_where_a_basis_is_renewed(self, alias, codecs):
        """All but "periodic" find one at each step."""
        state = alias(codecs=codecs).init(jnp.ones((512, 640)))
        renewed = codecs is None and alias.keywords["strategy"] != "periodic"
        for field in FACTORS:
            x = optax.tree.get(state, field)
            assert x.dtype == (jnp.uint8 if renewed else jnp.float32)

    @pytest.mark.parametrize("shape", [(64, 96), (96, 64), (3, 64, 64)], ids=str)
    def test_exact_where_gradients_have_the_rank(self, make, shape):
        """The first moment; squares of them have a higher one."""
        grads = list(stream(20, shape, rank=4))
        _, state = run(make(rank=6), grads)
        assert relative_error(moment(state), average(grads, 0.9)) < 1e-5

    @pytest.mark.full
    @pytest.mark.parametrize(
        "strategy, mu_factor, nu_factor",
        quick(
            [("randomized", 1.1, 1.2)],
            [("randomized", 1.1, 1.2), ("online", 1.1, 1.4), ("periodic", 1.6, 4.5)],
        ),
    )
    def test_near_exact_truncation(self, strategy, mu_factor, nu_factor):
        """Low rank and noise: close to the same steps with an exact decomposition.

        No rank-8 matrix is closer to the average than its own truncation (Eckart and
        Young). A basis that is kept for five steps misses what comes in between.
        """
        tx = optax_flash.scale_by_lowrank_adam(
            rank=8, strategy=strategy, refresh_every=STRATEGIES[strategy]
        )
        grads = list(stream(60, rank=4, noise=0.3))
        _, state = run(tx, grads)
        stepwise = 0.0
        for g in grads:
            g = np.asarray(g, np.float64)
            stepwise = truncated(0.9 * stepwise + 0.1 * g, 8)
        exact = average(grads, 0.9)
        best = relative_error(truncated(exact, 8), exact)
        assert best < relative_error(stepwise, exact) < 1.1 * best
        assert best < relative_error(moment(state), exact) < mu_factor * best
        exact = average(grads, 0.999, 2)
        best = relative_error(truncated(exact, 8), exact)
        assert best < relative_error(moment(state, "nu"), exact) < nu_factor * best

    def test_scale_of_the_gradients_does_not_matter(self, make):
        """Powers of two scale without rounding."""
        grads = list(stream(6, rank=4, noise=0.3))
        expected, _ = run(make(rank=8, eps=0.0), grads)
        for scale in (2.0**-20, 2.0**10):
            updates, _ = run(make(rank=8, eps=0.0), [g * scale for g in grads])
            chex.assert_trees_all_close(updates, expected, rtol=1e-6)

    def test_no_update_is_longer_than_adams_could_be(self, make):
        """Rows that are mostly zero: truncation leaves negative second moments."""
        rng = np.random.default_rng(1)
        rows = [jnp.asarray(rng.random((64, 1)) < 0.1, jnp.float32) for _ in range(40)]
        grads = [g * r for g, r in zip(stream(40), rows, strict=True)]
        updates, _ = run(make(rank=4), grads)
        # sum (1 - b1) b1^k g_k <= longest * sqrt(sum (1 - b2) b2^k g_k^2)
        longest = 0.1 / math.sqrt(0.001 * (1 - 0.9**2 / 0.999))
        for t, u in enumerate(updates, start=1):
            corrected = longest * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            assert np.max(np.abs(u)) <= corrected * (1 + 1e-3)


@pytest.mark.full
class TestUnsoundSketch:
    """Averaging the factors of successive decompositions, as one might think of it."""

    @staticmethod
    def decomposition(x, rank, rotation):
        """One of the many: a rotation of equal singular values, signs for others."""
        u, s, v = np.linalg.svd(x, full_matrices=False)
        u, s, v = u[:, :rank] @ rotation, s[:rank], rotation.T @ v[:rank]
        np.testing.assert_allclose(u * s @ v, x, atol=1e-9)
        return u, s, v

    @pytest.mark.parametrize("kind", ["signs", "rotations"])
    def test_factors_of_decompositions_do_not_average(self, kind):
        rng = np.random.default_rng(0)
        u, _ = np.linalg.qr(rng.normal(size=(64, 4)))
        v, _ = np.linalg.qr(rng.normal(size=(96, 4)))
        values = np.array([4.0, 3, 2, 1]) if kind == "signs" else np.ones(4)
        g = u * values @ v.T
        averages = [0.0, 0.0, 0.0]
        for _ in range(100):
            if kind == "signs":
                rotation = np.diag(rng.choice([-1.0, 1.0], size=4))
            else:
                rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
            found = self.decomposition(g, 4, rotation)
            averages = [0.9 * a + 0.1 * x for a, x in zip(averages, found, strict=True)]
        left, middle, right = averages
        # The gradient never changed: its average is itself.
        assert relative_error(left * middle @ right, g) > 0.5
        _, state = run(
            optax_flash.scale_by_lowrank_adam(rank=4),
            [jnp.asarray(g, jnp.float32)] * 100,
        )
        assert relative_error(moment(state), g * (1 - 0.9**100)) < 1e-5


class TestState:
    def test_bytes(self, make):
        params = {
            "kernel": jnp.zeros((64, 128)),
            "stack": jnp.zeros((3, 128, 64)),
            "bias": jnp.zeros(128),
        }
        state = jax.eval_shape(make(rank=0.125).init, params)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert size == 4 * (2 * 8 * (64 + 128) * (1 + 3) + 2 * 128 + 1)

    @pytest.mark.parametrize("shape", [(64, 96), (96, 64)], ids=str)
    def test_basis_is_orthonormal_on_the_shorter_side(self, make, shape):
        _, state = run(make(rank=8), stream(7, shape))
        side = "left" if shape[0] < shape[1] else "right"
        for field in ("mu", "nu"):
            basis = np.asarray(getattr(state, f"{field}_{side}"), np.float64)
            np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=2e-6)

    @pytest.mark.parametrize(
        "shape, kwargs, expected",
        [
            ((64, 64), {}, True),
            ((2, 64, 64), {}, True),
            ((64, 6400), {}, True),
            ((64, 6401), {}, False),
            ((63, 64), {}, False),
            ((63, 64), {"min_dim": 1}, True),
            ((7, 64), {"min_dim": 1}, False),
            ((8, 64), {"min_dim": 1}, True),
            ((64,), {}, False),
            ((), {}, False),
            ((0, 64), {"min_dim": 0}, False),
            ((64, 64), {"where": lambda path: path == "a/b"}, True),
            ((64, 64), {"where": lambda path: path != "a/b"}, False),
        ],
    )
    def test_which_leaves_are_factored(self, shape, kwargs, expected):
        tx = optax_flash.scale_by_lowrank_adam(rank=8, **kwargs)
        params = {"a": {"b": jnp.zeros(shape)}}
        state = jax.eval_shape(tx.init, params)
        assert isinstance(state.mu["a"]["b"], optax.MaskedNode) == expected
        assert isinstance(state.nu_left["a"]["b"], optax.MaskedNode) != expected

    def test_leaves_that_do_not_fit_are_adams(self, make):
        grads = [{"bias": g[0], "small": g[:8, :8]} for g in stream(5)]
        updates, _ = run(make(rank=8), grads)
        expected, _ = run(optax.scale_by_adam(), grads)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)

    def test_seed_and_path_decide_the_sketch(self):
        grads = [{"a": g, "b": g} for g in stream(3)]
        make = optax_flash.scale_by_lowrank_adam
        _, state = run(make(rank=8), grads)
        _, again = run(make(rank=8), grads)
        _, other = run(make(rank=8, seed=1), grads)
        chex.assert_trees_all_equal(state, again)
        assert np.any(state.mu_left["a"] != state.mu_left["b"])
        assert np.any(state.mu_left["a"] != other.mu_left["a"])

    def test_periodic_keeps_its_basis_between_refreshes(self):
        tx = optax_flash.scale_by_lowrank_adam(
            rank=8, strategy="periodic", refresh_every=3
        )
        grads, bases = list(stream(7)), []
        state = tx.init(grads[0])
        for g in grads:
            _, state = jax.jit(tx.update)(g, state)
            bases.append(np.asarray(state.mu_left))
        same = [np.array_equal(x, y) for x, y in zip(bases, bases[1:], strict=False)]
        assert same == [True, True, False, True, True, False]


class TestSubspace:
    @pytest.mark.parametrize("k, n", [(8, 64), (136, 300), (64, 64)])
    def test_rows_of_any_condition_become_orthonormal(self, k, n):
        rng = np.random.default_rng(0)
        of = {
            "independent": rng.normal(size=(k, n)),
            "rank 3": rng.normal(size=(k, 3)) @ rng.normal(size=(3, n)),
            "equal": np.ones((k, 1)) * rng.normal(size=n),
            "tiny to huge": np.logspace(-30, 30, k)[:, None] * rng.normal(size=(k, n)),
        }
        rows = np.stack(list(of.values())).astype(np.float32)
        basis = np.asarray(jax.jit(_subspace.orthonormal_rows)(rows), np.float64)
        np.testing.assert_allclose(
            basis @ basis.swapaxes(1, 2), [np.eye(k)] * len(of), atol=1e-5
        )
        for name, x, b in zip(of, of.values(), basis, strict=True):
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
            assert relative_error(x @ b.T @ b, x) < 2e-6, name

    def test_zeros_stay_zeros_and_nans_nans(self):
        assert not np.any(_subspace.orthonormal_rows(jnp.zeros((4, 16))))
        rows = jnp.ones((4, 16)).at[0, 0].set(jnp.nan)
        assert np.all(np.isnan(_subspace.orthonormal_rows(rows)))


class TestBadInput:
    @pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, None, "8"])
    def test_ranks_that_are_none(self, rank):
        with pytest.raises(ValueError, match="lowrank_adam: rank is"):
            optax_flash.scale_by_lowrank_adam(rank=rank)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"strategy": "svd"}, "strategy is 'svd'. Choose one of 'randomized'"),
            ({"refresh_every": 0}, "refresh_every is 0"),
            ({"refresh_every": 10}, "no meaning for strategy 'randomized'"),
            ({"strategy": "online", "refresh_every": 2}, "no meaning for .*'online'"),
            ({"oversampling": -1}, "oversampling is -1"),
            ({"power_iterations": 0.5}, "power_iterations is 0.5"),
        ],
    )
    def test_settings_that_are_none(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            optax_flash.scale_by_lowrank_adam(rank=8, **kwargs)

    def test_another_tree_of_gradients(self, make):
        params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros(4)}
        state = make(rank=8).init(params)
        with pytest.raises(ValueError, match="lowrank_adam: the gradients: 'a' is mis"):
            make(rank=8).update({"b": params["b"]}, state)

    def test_integer_params(self):
        """What is not real floating has Adam's own moments, as in stock optax."""
        params = {"a": jnp.arange(64 * 64).reshape(64, 64)}
        tx, stock = optax_flash.scale_by_lowrank_adam(rank=8), optax.scale_by_adam()
        updates, _ = tx.update(params, tx.init(params), params)
        expected, _ = stock.update(params, stock.init(params), params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)

    def test_zero_gradients_give_zero_updates_and_no_harm(self, make):
        """Gradients that begin later than training are remembered all the same."""
        later = list(stream(8, rank=4))
        grads = [jnp.zeros_like(later[0])] * 3 + later
        updates, state = run(make(rank=8), grads)
        assert not np.any(updates[:3])
        assert relative_error(moment(state), average(later, 0.9)) < 1e-5

    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
    def test_what_is_not_finite_shows(self, make, bad):
        grads = list(stream(3))
        grads[1] = grads[1].at[3, 5].set(bad)
        updates, state = run(make(rank=8), grads)
        assert not np.isfinite(updates[1][3, 5])
        # A basis that is kept keeps other columns clean.
        assert np.all(np.isnan(updates[2][:, 5]))
        assert np.all(np.isnan(state.mu_right[:, 5]))

    def test_half_precision_gradients(self, make):
        grads = [g.astype(jnp.bfloat16) for g in stream(4, rank=4, noise=0.3)]
        updates, state = run(make(rank=8), grads)
        wide, wide_state = run(make(rank=8), [g.astype(jnp.float32) for g in grads])
        assert {u.dtype for u in updates} == {jnp.dtype(jnp.bfloat16)}
        assert {x.dtype for x in jax.tree.leaves(state)[1:]} == {jnp.dtype("float32")}
        chex.assert_trees_all_close(moment(state), moment(wide_state), atol=1e-5)
        found = np.asarray(jnp.stack(updates), np.float64)
        assert relative_error(found, np.asarray(jnp.stack(wide))) < 2**-8


def params_of(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (64, 128), "bias": (4096,), "scale": ()}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


class TestComposes:
    @pytest.mark.full
    def test_under_wrappers(self, alias):
        """Structures and dtypes hold; what is dense is in codes."""
        params, grads = params_of(jnp.bfloat16), params_of(jnp.bfloat16, 1)
        for tx in (
            optax.chain(optax.clip_by_global_norm(1.0), alias()),
            optax_flash.master_weights(alias(), finished=False),
            optax.MultiSteps(alias(), every_k_schedule=2),
            optax.apply_if_finite(alias(), 3),
        ):
            state = tx.init(params)
            chex.assert_trees_all_equal_shapes_and_dtypes(
                jax.eval_shape(tx.init, params), state
            )
            mu = optax.tree.get_all_with_path(state, "mu")[0][1]
            assert mu["bias"].dtype == jnp.uint8
            assert isinstance(mu["kernel"], optax.MaskedNode)
            updates, new_state = jax.jit(tx.update, donate_argnums=1)(
                grads, state, params
            )
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
            chex.assert_trees_all_equal_shapes_and_dtypes(
                new_state, jax.eval_shape(tx.init, params)
            )
            chex.assert_tree_all_finite(updates)

    def test_masked_and_partition(self, make):
        params, grads = params_of(), params_of(seed=1)
        labels = {k: "on" if k == "kernel" else "off" for k in params}
        tx = optax.partition({"on": make(rank=8), "off": optax.sgd(0.1)}, labels)
        (updates,), state = run(tx, [grads], params)
        chex.assert_trees_all_close(updates["bias"], -0.1 * grads["bias"])
        assert optax.tree.get(state, "mu_left")["kernel"].shape == (8, 64)
        masked = optax.masked(make(rank=8), {k: k == "kernel" for k in params})
        (updates,), _ = run(masked, [grads], params)
        assert np.any(updates["kernel"] != grads["kernel"])
        chex.assert_trees_all_equal(updates["bias"], grads["bias"])

    def test_inject_hyperparams(self):
        """Integers would become arrays: inject what varies, close over the rest."""

        def tx(learning_rate, b1):
            return optax_flash.lowrank_adamw(learning_rate, rank=8, b1=b1)

        injected = optax.inject_hyperparams(tx)(
            optax.linear_schedule(1e-2, 1e-3, 4), b1=0.9
        )
        # Of a clear rank: b1 in float32 would turn the spaces of equal values.
        grads = list(stream(3, rank=2))
        updates, _ = run(injected, grads)
        expected, _ = run(tx(optax.linear_schedule(1e-2, 1e-3, 4), 0.9), grads)
        assert relative_error(np.asarray(updates), np.asarray(expected)) < 1e-4
        with pytest.raises(ValueError, match="rank is"):
            optax.inject_hyperparams(optax_flash.lowrank_adamw)(1e-2, rank=8).init(
                params_of()
            )

    def test_map_params(self, make):
        params = params_of()
        state = make(rank=8).init(params)
        mapped = optax.tree_map_params(make(rank=8), lambda x: x + 1, state)
        assert np.all(
            np.asarray(mapped.mu_right["kernel"]) == state.mu_right["kernel"] + 1
        )
        assert mapped.count == state.count

    def test_explains_itself(self, alias):
        explanation = optax_flash.explain(alias(), params_of(), platform="cuda")
        runs = {p.params[0]: p.implementation for p in explanation.paths}
        assert runs["bias"] == "pallas" and runs["kernel"] == "xla"


@pytest.mark.parametrize(
    "strategy, spec, kind",
    quick(
        [("randomized", P("a", "b"), AxisType.Explicit)],
        [
            ("randomized", P("a", "b"), AxisType.Auto),
            ("randomized", P("a", "b"), AxisType.Explicit),
            ("periodic", P("a", "b"), AxisType.Auto),
            ("periodic", P("a", "b"), AxisType.Explicit),
            ("online", P("a", "b"), AxisType.Auto),
            ("online", P(None, "b"), AxisType.Explicit),
            ("online", P(("a", "b")), AxisType.Auto),
        ],
    ),
    ids=str,
)
def test_sharded_equals_single_device(strategy, spec, kind):
    make = functools.partial(
        optax_flash.scale_by_lowrank_adam,
        strategy=strategy,
        refresh_every=STRATEGIES[strategy],
    )
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: tests/conftest.py asks for them on CPU")
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    # Well-separated spaces: where singular values are equal, any rotation will do.
    grads = list(stream(4, (64, 128), rank=4, noise=1e-3))
    updates, state = run(make(rank=4), grads)
    sharding = NamedSharding(mesh, spec)
    placed = [jax.device_put(g, sharding) for g in grads]
    sharded, sharded_state = run(make(rank=4), placed)
    assert relative_error(np.asarray(sharded), np.asarray(updates)) < 1e-4
    assert relative_error(moment(sharded_state), moment(state)) < 1e-5
    if kind == AxisType.Explicit:
        first = make(rank=4).init(placed[0])
        assert jax.tree.map(jax.typeof, first.mu_left) == jax.typeof(
            sharded_state.mu_left
        )
        assert sharded[0].sharding.is_equivalent_to(sharding, 2)
