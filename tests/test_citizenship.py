"""Every alias against everything that consumes an optax transformation."""

import functools
import inspect
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")

# 4096 elements: the smallest that is compressed by default.
SHAPES = {"kernel": (32, 128), "bias": (32,), "scalar": ()}

OPTIMIZERS = {
    "adamw8": functools.partial(optax_flash.adamw8, 0.01, weight_decay=0.01),
    "adam8": functools.partial(optax_flash.adam8, 0.01),
    "lion8": functools.partial(optax_flash.lion8, 0.003),
    "sgd8": functools.partial(optax_flash.sgd8, 0.05, momentum=0.9),
    "sgd8_nesterov": functools.partial(
        optax_flash.sgd8, 0.05, momentum=0.9, nesterov=True
    ),
    "scale_by_adam8": optax_flash.scale_by_adam8,
    "scale_by_lion8": optax_flash.scale_by_lion8,
    "trace8": functools.partial(optax_flash.trace8, 0.9),
    "adamw8_flashoptim": functools.partial(
        optax_flash.adamw8, 0.01, codecs="flashoptim"
    ),
    "tamed_adamw8": functools.partial(optax_flash.tamed_adamw8, 0.01, threshold=0.5),
    "adamw4": functools.partial(optax_flash.adamw4, 0.01, weight_decay=0.01),
    "adam4_mixed": functools.partial(
        optax_flash.adam4, 0.01, codecs={"mu": "companded4", "nu": "companded8"}
    ),
    "lion4": functools.partial(optax_flash.lion4, 0.003),
    "sgd4": functools.partial(optax_flash.sgd4, 0.05, momentum=0.9),
    "adamw8_affine8": functools.partial(optax_flash.adamw8, 0.01, codecs="affine8"),
    # Additive: finished params have no place in most of these wrappers.
    "master_weights_24": lambda: optax_flash.master_weights(
        optax_flash.adamw8(0.01), finished=False
    ),
    "master_weights_32": lambda: optax_flash.master_weights(
        optax_flash.lion8(0.003), 32, finished=False, track_params=True
    ),
    "master_weights_flashoptim": lambda: optax_flash.master_weights(
        optax_flash.adamw8(0.01, codecs="flashoptim"),
        codec="flashoptim",
        finished=False,
    ),
}
LOW_RANK = {
    "lora_pre_adamw": functools.partial(optax_flash.lora_pre_adamw, 0.01, rank=4),
    "lora_pre_muon": functools.partial(optax_flash.lora_pre_muon, 0.01, rank=4),
    "lowrank_adamw": functools.partial(
        optax_flash.lowrank_adamw, 0.01, rank=4, min_dim=8
    ),
}
ALL = OPTIMIZERS | LOW_RANK
# What must not follow or wrap a residual has no row for master_weights.
INNER = {name: tx for name, tx in ALL.items() if "master" not in name}
DTYPES = ("float32", "bfloat16", "float16")
WITHOUT_ADAM = (
    *("sgd8", "sgd8_nesterov", "sgd4", "trace8"),
    *("lion8", "lion4", "scale_by_lion8", "master_weights_32"),
)
REPRESENTATIVES = (
    "adamw8",
    "lion8",
    "sgd8_nesterov",
    "adamw4",
    "master_weights_24",
    "lora_pre_adamw",
)


def make_params(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in SHAPES.items()
    }


def assert_same_avals(tree, other):
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, other)
    chex.assert_trees_all_equal_structs(tree, other)
    weak = jax.tree.map(lambda x: jax.typeof(x).weak_type, tree)
    assert weak == jax.tree.map(lambda x: jax.typeof(x).weak_type, other)


@pytest.fixture(params=quick(REPRESENTATIVES, ALL), name="make")
def make_fixture(request):
    """Every alias: for rows that depend on its arithmetic and its fields."""
    return ALL[request.param]


@pytest.fixture(params=REPRESENTATIVES, name="make_typical")
def make_typical_fixture(request):
    """One of each kind of state: for rows that depend on the wrapper."""
    return ALL[request.param]


@pytest.fixture(params=quick(REPRESENTATIVES, OPTIMIZERS), name="make_dense")
def make_dense_fixture(request):
    """Of states that are zeros, shaped like the params."""
    return OPTIMIZERS[request.param]


@pytest.fixture(params=[x for x in REPRESENTATIVES if x in INNER], name="make_inner")
def make_inner_fixture(request):
    return INNER[request.param]


# Every optimizer with one dtype, but the first with both.
TYPICAL_AND_DTYPE = pytest.mark.parametrize(
    "make_typical, dtype",
    [
        ("adamw8", "float32"),
        *(
            (name, ("bfloat16", "float32")[i % 2])
            for i, name in enumerate(REPRESENTATIVES)
        ),
    ],
    indirect=["make_typical"],
)


class TestContract:
    """Rows that hold for one transformation by itself."""

    def test_preserves_dtypes_shapes_and_state(self, make):
        self.check_update(make, "bfloat16")

    @pytest.mark.full
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_preserves_other_dtypes(self, make_typical, dtype):
        self.check_update(make_typical, dtype)

    def check_update(self, make, dtype):
        tx, params = make(), make_params(dtype)
        grads = make_params(dtype, seed=1)
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(grads, state, params)
        assert_same_avals(updates, grads)
        assert_same_avals(new_state, state)
        chex.assert_tree_all_finite(updates)
        assert_same_avals(optax.apply_updates(params, updates), params)

    # Adam's bias correction is optax's, which raises Python's floats to the power of a
    # count.
    @pytest.mark.usefixtures("strict_types")
    @pytest.mark.parametrize("dtype", quick(["bfloat16"], ["float32", "bfloat16"]))
    @pytest.mark.parametrize("name", WITHOUT_ADAM)
    def test_nothing_is_promoted_unasked(self, name, dtype):
        self.check_update(OPTIMIZERS[name], dtype)

    def test_moments_are_bytes(self, make_dense):
        params = make_params()
        state = make_dense().init(params)
        *rows, n = SHAPES["kernel"]
        big = [
            x
            for x in jax.tree.leaves(state)
            if x.shape in ((*rows, n), (*rows, n // 2))
        ]
        assert big
        assert {x.dtype for x in big} <= {jnp.dtype("uint8")}

    def test_accepts_unknown_extra_args(self, make_typical):
        tx, params = make_typical(), make_params()
        tx.update(params, tx.init(params), params, value=1.0, unknown=None)
        assert isinstance(tx, optax.GradientTransformationExtraArgs)

    def test_forwards_extra_args(self):
        seen = {}

        def update(updates, state, params=None, **extra_args):
            seen.update(extra_args)
            return updates, state

        inner = optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(), update
        )
        params = make_params()
        tx = optax_flash.master_weights(optax_flash.compress(inner))
        tx.update(params, tx.init(params), params, value=3.0)
        assert seen == {"value": 3.0}

    def test_init_abstract_jitted_and_eager_agree(self, make_dense):
        tx, params = make_dense(), make_params("bfloat16")
        abstract = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params
        )
        state = tx.init(params)
        assert_same_avals(
            jax.eval_shape(tx.init, params), jax.eval_shape(lambda: state)
        )
        from_shapes = tx.init(abstract)
        assert_same_avals(from_shapes, state)
        if getattr(state, "digest", None) is None:
            chex.assert_trees_all_equal(from_shapes, jax.jit(tx.init)(params))
        with jax.disable_jit():
            chex.assert_trees_all_equal(tx.init(params), state)

    def test_second_call_does_not_recompile(self, make):
        chex.clear_trace_counter()
        tx, params = make(), make_params()
        update = jax.jit(chex.assert_max_traces(tx.update, n=1))
        state = tx.init(params)
        for _ in range(3):
            updates, state = update(params, state, params)

    def test_cond_and_scan_keep_the_carry(self, make):
        self.check_carry(make, "bfloat16")

    @pytest.mark.full
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_cond_and_scan_keep_the_carry_of_other_dtypes(self, make_typical, dtype):
        self.check_carry(make_typical, dtype)

    def check_carry(self, make, dtype):
        tx, params = make(), make_params(dtype)
        grads = make_params(dtype, seed=1)

        def body(carry, take):
            state, params = carry

            def step():
                updates, new_state = tx.update(grads, state, params)
                return new_state, optax.apply_updates(params, updates)

            return jax.lax.cond(take, step, lambda: (state, params)), None

        carry = (tx.init(params), params)
        (state, new_params), _ = jax.lax.scan(body, carry, jnp.array([True, False]))
        assert_same_avals((state, new_params), carry)

    @pytest.mark.parametrize(
        "make_typical",
        quick(["adamw8", "master_weights_24"], REPRESENTATIVES),
        indirect=True,
    )
    def test_vmap(self, make_typical):
        """A stack of models: each gets what it would get alone."""
        tx = make_typical()
        many = [make_params(seed=seed) for seed in range(2)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
        # Not fused: in fused loops XLA puts multiply-adds in other places of each.
        jit = functools.partial(
            jax.jit, compiler_options={"xla_disable_hlo_passes": "fusion"}
        )
        update = jit(tx.update)
        updates, state = jit(jax.vmap(tx.update))(
            stacked, jax.vmap(tx.init)(stacked), stacked
        )
        for i, params in enumerate(many):
            alone, state_alone = update(params, tx.init(params), params)
            take = functools.partial(jax.tree.map, lambda x, i=i: x[i])
            chex.assert_trees_all_close(take(updates), alone, rtol=1e-6)
            codes = jax.tree.leaves(state_alone), jax.tree.leaves(take(state))
            for x, y in zip(*codes, strict=True):
                if x.dtype == jnp.uint8:
                    # A last bit of fp32 may move a value to the next code.
                    assert np.mean(np.asarray(x) != np.asarray(y)) < 1e-3

    @TYPICAL_AND_DTYPE
    def test_donation_aliases_every_buffer(self, make_typical, dtype):
        tx, params = make_typical(), make_params(dtype)
        state = tx.init(params)

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step, donate_argnums=(0, 1))
        text = step.lower(params, state, params).compile().as_text()
        header = text[: text.index("entry_computation_layout")]
        # What is only written, jit drops: the old digest, the old count of elements.
        names = [path[-1] for path, _ in optax.tree.get_all_with_path(state, "clipped")]
        unread = (getattr(state, "digest", None) is not None) + bool(names)
        buffers = len(jax.tree.leaves((params, state))) - unread
        assert header.count("may-alias") + header.count("must-alias") == buffers

    def test_tree_get_and_set(self, make_typical):
        tx, params = make_typical(), make_params()
        _, state = tx.update(params, tx.init(params), params)
        names = {path[-1] for path, _ in optax.tree.get_all_with_path(state, "count")}
        if names:
            state = optax.tree.set(state, count=jnp.asarray(7, jnp.int32))
            assert optax.tree.get(state, "count") == 7
            assert_same_avals(state, tx.init(params))

    def test_none_leaves(self, make_typical):
        tx = make_typical()
        params = make_params() | {"absent": None}
        updates, _ = tx.update(params, tx.init(params), params)
        assert updates["absent"] is None
        assert optax.apply_updates(params, updates)["absent"] is None

    @TYPICAL_AND_DTYPE
    def test_empty_leaves(self, make_typical, dtype):
        tx = make_typical()
        params = {"a": jnp.zeros((0, 4), dtype), "b": jnp.zeros((0,), dtype), "c": ()}
        updates, state = tx.update(params, tx.init(params), params)
        assert_same_avals(updates, params)
        assert_same_avals(state, tx.init(params))

    def test_a_single_array(self, make_typical):
        tx, params = make_typical(), make_params()["kernel"]
        state = tx.init(params)
        updates, new_state = tx.update(params, state, params)
        assert_same_avals(updates, params)
        assert_same_avals(new_state, state)


class TestMapParams:
    """``optax.tree_map_params``, the sharding recipe among its uses."""

    def test_identity(self, make_typical):
        tx, params = make_typical(), make_params("bfloat16")
        state = tx.init(params)
        mapped = optax.tree_map_params(tx, lambda x: x, state)
        chex.assert_trees_all_equal(mapped, state)

    def test_with_a_tree_of_specs(self, make_dense):
        tx, params = make_dense(), make_params("bfloat16")
        specs = {"kernel": P("fsdp", None), "bias": P("fsdp"), "scalar": P()}
        state = jax.eval_shape(tx.init, params)
        mapped = optax.tree_map_params(
            tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
        )
        # One spec stands for all scales: which params have some only init knows.
        whole = jax.tree.broadcast(mapped, state, is_leaf=lambda x: isinstance(x, P))
        rows = [*zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True)]
        assert all(isinstance(spec, P) and len(spec) <= x.ndim for x, spec in rows)
        of_kernel = [x for x, spec in rows if spec == specs["kernel"]]
        assert of_kernel and all(x.shape[0] == 32 for x in of_kernel)


class TestWrappers:
    """What optax wraps around a transformation."""

    def test_chain_equals_stock_chain(self, make_inner):
        params, grads = make_params(), make_params(seed=1)
        tx = optax.chain(optax.clip_by_global_norm(0.5), make_inner(), optax.scale(0.5))
        alone = make_inner()
        clipped, _ = optax.clip_by_global_norm(0.5).update(grads, None)
        expected, _ = alone.update(clipped, alone.init(params), params)
        expected = jax.tree.map(lambda u: 0.5 * u, expected)
        updates, _ = tx.update(grads, tx.init(params), params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)

    def test_masked(self, make_inner):
        params, grads = make_params(), make_params(seed=1)
        mask = {"kernel": True, "bias": False, "scalar": False}
        tx = optax.masked(make_inner(), mask)
        state = tx.init(params)
        _, new_state = tx.update(grads, state, params)
        assert_same_avals(new_state, state)
        updates, _ = tx.update(grads, new_state, params)
        np.testing.assert_array_equal(updates["bias"], grads["bias"])
        assert not np.array_equal(updates["kernel"], grads["kernel"])

    def test_partition_inside_and_outside(self, make_inner):
        params, grads = make_params(), make_params(seed=1)
        labels = {"kernel": "matrix", "bias": "rest", "scalar": "rest"}
        outside = optax.partition(
            {"matrix": make_inner(), "rest": optax.sgd(0.1)}, labels
        )
        inside = optax_flash.compress(
            optax.partition({"matrix": optax.adam(0.1), "rest": optax.sgd(0.1)}, labels)
        )
        for tx in (outside, inside):
            state = tx.init(params)
            updates, new_state = jax.jit(tx.update)(grads, state, params)
            assert_same_avals(new_state, state)
            codes = [x for x in jax.tree.leaves(state) if x.dtype == jnp.uint8]
            # Factors of this kernel are too small to be in codes.
            assert codes or optax.tree.get(state, "mu_left") is not None
            chex.assert_trees_all_close(
                updates["bias"], jax.tree.map(lambda g: -0.1 * g, grads["bias"])
            )

    @pytest.mark.parametrize(
        "inner",
        [
            optax.masked(optax.adam(0.1), {"kernel": True, "frozen": False}),
            optax.partition(
                {"on": optax.adam(0.1), "off": optax.set_to_zero()},
                {"kernel": "on", "frozen": "off"},
            ),
        ],
        ids=["masked", "partition"],
    )
    def test_a_prefix_masks_a_subtree_inside(self, inner):
        """One MaskedNode stands for all params of the subtree."""
        params = {"kernel": make_params()["kernel"], "frozen": make_params()}
        tx = optax_flash.compress(inner)
        state = tx.init(params)
        assert optax.tree.get(state, "mu")["kernel"].dtype == jnp.uint8
        updates, new_state = jax.jit(tx.update)(params, state, params)
        assert_same_avals(new_state, state)
        expected, _ = inner.update(params, inner.init(params), params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)

    @pytest.mark.parametrize(
        "name, dtype",
        quick(
            [("adamw8", "bfloat16"), ("lion8", "float32")],
            [
                ("adamw8", "float32"),
                ("adamw8", "bfloat16"),
                ("adam8", "float32"),
                ("lion8", "float32"),
                ("lion8", "bfloat16"),
                ("sgd8", "bfloat16"),
            ],
        ),
    )
    def test_inject_hyperparams(self, name, dtype):
        """Half-precision params too, with hyperparameters kept in float32."""
        factory = getattr(optax_flash, name)
        schedule = optax.linear_schedule(0.1, 0.05, 10)
        extra = {"momentum": 0.9} if name == "sgd8" else {}
        tx = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)(
            learning_rate=schedule, codecs="companded8", **extra
        )
        plain = factory(learning_rate=schedule, **extra)
        params = make_params(dtype)
        state, plain_state = tx.init(params), plain.init(params)
        for step in range(3):
            # Other gradients each time: with equal ones all updates are nearly equal,
            # and where one is rounded to the next bfloat16 they all are.
            grads = make_params(dtype, seed=step + 1)
            updates, new_state = jax.jit(tx.update)(grads, state, params)
            expected, plain_state = jax.jit(plain.update)(grads, plain_state, params)
            assert_same_avals(new_state, state)
            state = new_state
            # 1 - b2 in float32 differs from Python's by 1e-5, which takes a few of the
            # moments to the next code: 2 % of their value at the most.
            for u, e in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
                u, e = np.asarray(u, np.float32), np.asarray(e, np.float32)
                assert np.linalg.norm(u - e) < 5e-3 * np.linalg.norm(e)
        chex.assert_tree_all_finite(updates)

    def test_inject_hyperparams_without_float32_says_what_to_do(self):
        tx = optax.inject_hyperparams(optax_flash.adamw8)(learning_rate=1e-3)
        with pytest.raises(ValueError, match="hyperparam_dtype=jnp.float32"):
            tx.init(make_params("bfloat16"))

    @pytest.mark.full
    @pytest.mark.parametrize("dtype", quick(["bfloat16"], ["float32", "bfloat16"]))
    def test_multi_steps(self, make_inner, dtype):
        """Two half batches make the step of their mean."""
        tx = optax.MultiSteps(make_inner(), every_k_schedule=2)
        params = make_params(dtype)
        grads = [make_params(dtype, seed=seed) for seed in (1, 2)]
        state = tx.init(params)
        update = jax.jit(tx.update)
        first, middle = update(grads[0], state, params)
        second, end = update(grads[1], middle, params)
        assert_same_avals(end, state)
        assert all(not np.any(u) for u in jax.tree.leaves(first))
        mean = jax.tree.map(
            lambda a, b: (a.astype(jnp.float32) + b.astype(jnp.float32)) / 2, *grads
        )
        mean = jax.tree.map(lambda m, g: m.astype(g.dtype), mean, grads[0])
        plain = make_inner()
        expected, _ = plain.update(mean, plain.init(params), params)
        to32 = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
        rtol = 1e-5 if dtype == "float32" else 2e-2
        # Lion's sign may differ where the mean is almost zero.
        for u, e in zip(
            *map(jax.tree.leaves, (to32(second), to32(expected))), strict=True
        ):
            assert np.mean(~np.isclose(u, e, rtol=rtol, atol=1e-6)) < 0.01

    @TYPICAL_AND_DTYPE
    def test_apply_if_finite(self, make_typical, dtype):
        """The recipe against NaN: state and weights stay as they were, bit for bit."""
        tx = optax.apply_if_finite(make_typical(), max_consecutive_errors=5)
        params, grads = make_params(dtype), make_params(dtype, seed=1)

        @jax.jit
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = step(params, tx.init(params), grads)
        broken = grads | {"kernel": grads["kernel"].at[0, 0].set(jnp.nan)}
        after, state_after = step(params, state, broken)
        chex.assert_trees_all_equal(after, params)
        chex.assert_trees_all_equal(state_after.inner_state, state.inner_state)
        assert not state_after.last_finite
        healed, _ = step(after, state_after, grads)
        chex.assert_tree_all_finite(healed)
        assert not np.array_equal(healed["kernel"], params["kernel"])

    @pytest.mark.full
    def test_lookahead(self, make_inner):
        for reset in (False, True):
            tx = optax.lookahead(make_inner(), 2, 0.5, reset_state=reset)
            params = optax.LookaheadParams.init_synced(make_params())
            state = tx.init(params)
            for seed in range(3):
                grads = make_params(seed=seed)
                updates, new_state = jax.jit(tx.update)(grads, state, params)
                assert_same_avals(new_state, state)
                params = optax.apply_updates(params, updates)
                state = new_state
            chex.assert_tree_all_finite(params)


@pytest.mark.full
class TestCheckpoint:
    @TYPICAL_AND_DTYPE
    def test_orbax_round_trip(self, make_typical, dtype):
        tx, params = make_typical(), make_params(dtype)
        _, state = tx.update(params, tx.init(params), params)
        with tempfile.TemporaryDirectory() as folder:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(f"{folder}/state", state)
                checkpointer.wait_until_finished()
                target = jax.eval_shape(tx.init, params)
                restored = checkpointer.restore(f"{folder}/state", target)
        chex.assert_trees_all_equal(restored, state)
        jax.jit(tx.update)(params, restored, params)


CONVERGING = {
    "adamw8": (functools.partial(optax.adamw, weight_decay=0.0), 1e-2),
    "adam8": (optax.adam, 1e-2),
    "lion8": (functools.partial(optax.lion, weight_decay=0.0), 3e-3),
    "sgd8": (functools.partial(optax.sgd, momentum=0.9), 1e-3),
}
TARGETS = ("parabola", "rosenbrock")


class TestConvergence:
    """optax's own test functions: the parabola and Rosenbrock's valley."""

    # Every optimizer on both and in all dtypes; either in all dtypes, too.
    @pytest.mark.parametrize(
        "name, target, dtype",
        quick(
            [("adamw8", "rosenbrock", "bfloat16")],
            [
                (name, TARGETS[(i + j) % 2], dtype)
                for i, name in enumerate(CONVERGING)
                for j, dtype in enumerate(DTYPES)
            ],
        ),
    )
    def test_converges(self, name, target, dtype):
        inner, rate = CONVERGING[name]
        # What the aliases are, but with codes for two or three variables too.
        schedule = optax.cosine_decay_schedule(rate, 10_000)
        tx = optax_flash.compress(inner(schedule), min_size=1)
        tx = optax_flash.master_weights(tx)
        if target == "parabola":
            start, goal = jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0])

            def f(x):
                return jnp.sum(jnp.square(x.astype(jnp.float32) - goal))
        else:
            start, goal = jnp.zeros(2), jnp.ones(2)

            def f(x):
                a, b = x.astype(jnp.float32)
                return jnp.square(1.0 - a) + 100.0 * jnp.square(b - jnp.square(a))

        params = start.astype(dtype)

        @jax.jit
        def step(carry, _):
            params, state = carry
            weights = optax_flash.master_params(state, params)
            grads = jax.grad(f)(weights).astype(dtype)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        (params, state), _ = jax.lax.scan(step, carry, length=10_000)
        weights = optax_flash.master_params(state, params)
        np.testing.assert_allclose(weights, goal, atol=0.03)


class TestExplicitMesh:
    """Shardings in types: init and update agree. Needs 8 devices."""

    # Either dtype with every optimizer, and with every spec.
    @pytest.mark.parametrize(
        "spec, dtype",
        quick(
            [(P("a", "b"), "bfloat16")],
            [
                (P("a", None), "float32"),
                (P(None, "b"), "bfloat16"),
                (P("a", "b"), "bfloat16"),
            ],
        ),
    )
    def test_init_and_update_agree(self, make_typical, spec, dtype):
        if jax.device_count() < 8:
            pytest.skip("needs 8 devices: tests/conftest.py asks for them on CPU")
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
        with jax.set_mesh(mesh):
            params = {
                "kernel": jax.device_put(
                    jnp.ones((32, 128), dtype), NamedSharding(mesh, spec)
                )
            }
            tx = make_typical()
            state = tx.init(params)
            updates, new_state = jax.jit(tx.update)(params, state, params)
            typeof = functools.partial(jax.tree.map, jax.typeof)
            assert typeof(new_state) == typeof(state)
            assert typeof(updates) == typeof(params)
            assert typeof(jax.jit(tx.init)(params)) == typeof(state)


def cycle(function, above=()):
    """Names of functions on a way from a function back to itself, by closures."""
    if function in above:
        return [x.__qualname__ for x in above[above.index(function) :]]
    cells = getattr(function, "__closure__", None) or ()
    for value in jax.tree.leaves([cell.cell_contents for cell in cells]):
        if inspect.isfunction(value) or inspect.ismethod(value):
            found = cycle(value, (*above, function))
            if found:
                return found
    return []


def everything():
    """Every transformation that the library exports, by name."""
    inner = optax.adamw(0.01)
    made = ALL | {
        "compress": lambda: optax_flash.compress(inner),
        "master_weights": lambda: optax_flash.master_weights(inner),
        "tame": lambda: optax_flash.tame(1.0),
        "scale_by_lowrank_adam": lambda: optax_flash.scale_by_lowrank_adam(rank=4),
        "scale_by_lora_pre": lambda: optax_flash.scale_by_lora_pre(rank=4),
        "scale_by_lora_pre_muon": lambda: optax_flash.scale_by_lora_pre_muon(rank=4),
    }
    return {name: make() for name, make in made.items()}


def test_no_function_is_in_its_own_closure():
    # Equinox, and Optimistix with it, walks the closures of what it is given.
    for name, tx in everything().items():
        assert not cycle(tx.init), name
        assert not cycle(tx.update), name


def test_optimistix_takes_low_rank_moments():
    optimistix = pytest.importorskip("optimistix")
    tx = optax_flash.lowrank_adamw(0.05, rank=4)
    solver = optimistix.OptaxMinimiser(tx, rtol=1e-3, atol=1e-3)
    start = jax.random.normal(jax.random.key(2), (64, 128))
    solution = optimistix.minimise(
        lambda y, args: jnp.mean((y - 1) ** 2), solver, start, max_steps=60, throw=False
    )
    assert jnp.mean((solution.value - 1) ** 2) < 0.5 * jnp.mean((start - 1) ** 2)
