"""Leaves that are not float32 or half precision, and params that are frozen.

What stock optax does with them is what is expected.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen import fp8_ops

import optax_flash
from optax_flash import master_params, master_weights
from optax_flash.flax import Optimizer, TrainState
from tests.tiers import quick

OWG = fp8_ops.OVERWRITE_WITH_GRADIENT
FLOAT8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)


def normal(seed, shape=(64, 64), dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def run(tx, params, grads, steps=3):
    """The params after some steps of the same gradients, and the last state."""
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


class TestNumbersOfPython:
    params = {"w": normal(0), "scale": 1.5}
    grads = {"w": normal(1), "scale": 0.5}

    @pytest.mark.parametrize("finished", [None, False, True])
    def test_steps_are_stocks(self, finished):
        expected, _ = run(optax.adamw(1e-2), self.params, self.grads)
        tx = optax_flash.adamw8(1e-2)
        if finished is not None:
            tx = master_weights(tx, finished=finished, track_params=True)
        found, state = run(tx, self.params, self.grads)
        np.testing.assert_allclose(found["scale"], expected["scale"], rtol=1e-6)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=0.02, atol=1e-3)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(self.params))

    def test_reports_and_conversions_take_them(self, tmp_path):
        tx = master_weights(optax_flash.adamw8(1e-2), finished=True)
        state = tx.init(self.params)
        report = optax_flash.memory_report(tx, self.params)
        assert report.params == 64 * 64 + 1
        assert "scale" in str(optax_flash.explain(tx, self.params))
        numerics = optax_flash.numerics_report(tx, state, self.params, self.grads)
        assert numerics.update_rms["scale"] == pytest.approx(1e-2, rel=0.01)
        weights, plain = optax_flash.to_optax_state(tx, state, self.params)
        assert weights["scale"] == 1.5
        _, again = optax_flash.from_optax_state(tx, plain, weights, like=self.params)
        chex.assert_trees_all_equal_structs(again, state)
        optax_flash.check_format(
            optax_flash.state_format(tx, self.params), tx, self.params
        )
        path = tmp_path / "model.safetensors"
        optax_flash.save_safetensors(path, self.params, state)
        assert optax_flash.load_safetensors(path, self.params)["scale"] == 1.5
        mesh = jax.make_mesh((1,), ("x",))
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        optax_flash.state_sharding(tx, self.params, where)
        with optax_flash.Checkpoints(tmp_path, tx, self.params) as checkpoints:
            checkpoints.save(1, (self.params, state))
            restored, _ = checkpoints.restore((self.params, state))
        assert restored["scale"] == 1.5

    def test_a_train_state_takes_them(self):
        state = TrainState.create(
            apply_fn=None, params=self.params, tx=optax_flash.adamw8(1e-2)
        )
        state = state.apply_gradients(grads=self.grads)
        expected, _ = run(optax.adamw(1e-2), self.params, self.grads, steps=1)
        np.testing.assert_allclose(
            state.fp32_params()["scale"], expected["scale"], rtol=1e-4
        )


COMPLEX = normal(2) + 1j * normal(3)
MIXED = {"w": normal(0), "c": COMPLEX, "i": jnp.arange(4096, dtype=jnp.int32)}
MIXED_GRADS = {"w": normal(1), "c": COMPLEX[::-1], "i": jnp.ones(4096, jnp.int32)}


@pytest.mark.parametrize(
    "name, codecs",
    quick(
        [("adamw", "companded8"), ("sgd", "companded4")],
        [
            *(("adamw", codecs) for codecs in ("companded8", "companded4")),
            *((name, "companded4") for name in ("adam", "lion", "sgd", "rmsprop")),
        ],
    ),
)
def test_complex_and_integer_leaves_are_stocks(name, codecs):
    """Beside a leaf in codes, with and without error feedback, jitted and not."""
    settings = {"momentum": 0.9} if name in ("sgd", "rmsprop") else {}
    stock = getattr(optax, name)(1e-2, **settings)
    tx = optax_flash.compress(stock, codecs)
    state, stock_state = tx.init(MIXED), stock.init(MIXED)
    for update in (tx.update, jax.jit(tx.update)):
        updates, state = update(MIXED_GRADS, state, MIXED)
        expected, stock_state = stock.update(MIXED_GRADS, stock_state, MIXED)
        for leaf in "ci":
            assert updates[leaf].dtype == expected[leaf].dtype
            np.testing.assert_allclose(updates[leaf], expected[leaf], rtol=1e-5)
    # Field by field, the state of such a leaf is stock's own.
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(state.inner_state),
        jax.tree.leaves(stock_state),
        strict=True,
    ):
        if getattr(path[-1], "key", None) in ("c", "i"):
            np.testing.assert_allclose(x, y, rtol=1e-5, err_msg=str(path))
        elif getattr(path[-1], "key", None) == "w":
            assert x.dtype == jnp.uint8


def test_kernels_leave_complex_params_to_xla():
    params = {"w": MIXED["w"], "c": MIXED["c"]}
    tx = optax_flash.compress(optax.sgd(1e-2, 0.9), implementation="interpret")
    with pytest.raises(ValueError, match="'c': an operand is complex64"):
        tx.update(params, tx.init(params), params)
    for tx, reason in (
        (optax_flash.sgd8(1e-2, 0.9), "complex64"),
        (optax_flash.adam8(1e-3), "'real' is not elementwise"),
    ):
        text = str(optax_flash.explain(tx, params, platform="cuda"))
        (line,) = [x for x in text.splitlines() if " c " in x]
        assert reason in line and "xla" in line
        (line,) = [x for x in text.splitlines() if " w " in x]
        assert "pallas" in line


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.bool])
def test_bytes_of_params_are_not_taken_for_codes(dtype):
    """Adam keeps moments of uint8 params in uint8, as codes are."""
    params = {"w": normal(0), "bytes": jnp.ones((64, 64), dtype)}
    frozen = optax.partition(
        {"train": optax_flash.adamw8(1e-2), "keep": optax.set_to_zero()},
        {"w": "train", "bytes": "keep"},
    )
    for tx in (optax_flash.adam8(1e-2), frozen, optax_flash.sgd8(1e-2, 0.9)):
        state = tx.init(params)
        zeros = params | {"bytes": jnp.zeros((64, 64), dtype)}
        for _ in range(3):
            updates, state = tx.update(zeros, state, params)
            found = optax.apply_updates(params, updates)
            assert found["bytes"].dtype == dtype
            np.testing.assert_array_equal(found["bytes"], params["bytes"])


@pytest.mark.parametrize(
    "name", quick(["tamed"], ["tamed", "lora_pre", "lowrank", "muon"])
)
def test_complex_params_of_our_own_mathematics(name):
    """What is not factored is Adam's, and Adam takes complex numbers."""
    tx = {
        "tamed": optax_flash.scale_by_tamed_adam(threshold=1e9, b2=0.95),
        "lora_pre": optax_flash.scale_by_lora_pre(rank=4),
        "lowrank": optax_flash.scale_by_lowrank_adam(rank=4, b2=0.95),
        "muon": optax_flash.lora_pre_muon(1.0, rank=4, adam_b2=0.95),
    }[name]
    params = {"w": normal(0), "c": COMPLEX}
    grads = {"w": normal(1), "c": COMPLEX[::-1]}
    stock = optax.scale_by_adam(b2=0.95)
    scale = 1
    if name == "muon":
        stock, scale = optax.adamw(1.0, b2=0.95, weight_decay=0.0), 1
        params["c"] = jnp.zeros_like(COMPLEX)
    state, stock_state = tx.init(params), stock.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        expected, stock_state = stock.update(grads, stock_state, params)
    np.testing.assert_allclose(updates["c"], scale * expected["c"], rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_what_is_not_real_is_not_factored(dtype):
    """Its state is Adam's own, and abstract params make the state that arrays make."""
    params = {"w": normal(0), "odd": jnp.ones((64, 64), dtype)}
    stock = optax.scale_by_adam().init(params)
    state = optax_flash.scale_by_lora_pre(rank=4).init(params)
    assert state.mu_left["odd"] == optax.MaskedNode()
    chex.assert_trees_all_equal(state.mu["odd"], stock.mu["odd"])
    shapes = jax.eval_shape(lambda: params)
    for tx in (
        optax_flash.scale_by_lora_pre(rank=4),
        optax_flash.scale_by_lowrank_adam(rank=4),
        optax_flash.scale_by_tamed_adam(1.0),
        optax_flash.adamw4(1e-3),
        master_weights(optax_flash.adamw8(1e-3), finished=True),
    ):
        abstract, state = tx.init(shapes), tx.init(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)


class TestWholeNumbersUnderMasterWeights:
    """int8 weights of a quantized base, frozen by optax.partition."""

    params = {"base": jnp.arange(-64, 64, dtype=jnp.int8), "w": normal(0)}
    labels = {"base": "frozen", "w": "trained"}

    def tx(self, finished):
        tx = optax.partition(
            {"frozen": optax.set_to_zero(), "trained": optax_flash.adamw8(1e-2)},
            self.labels,
        )
        return master_weights(tx, finished=finished, track_params=True)

    @pytest.mark.parametrize("finished", [False, True])
    @pytest.mark.parametrize("jitted", [False, True])
    def test_zeros_of_whole_numbers(self, finished, jitted):
        params = self.params | {"w": self.params["w"].astype(jnp.bfloat16)}
        grads = {"base": jnp.ones(128, jnp.int8), "w": jnp.ones_like(params["w"])}
        tx = self.tx(finished)

        def step(params, state):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        new, after = (jax.jit(step) if jitted else step)(params, state)
        assert new["base"].dtype == jnp.int8
        np.testing.assert_array_equal(new["base"], params["base"])
        assert np.all(new["w"] < params["w"])
        assert master_params(after, new)["base"].dtype == jnp.int8
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        assert optax_flash.changed_params(after, new) == []

    def test_gradients_without_values(self):
        """jax.grad(allow_int=True) makes float0 of them; finished params take them."""

        def loss(params):
            return jnp.sum(params["w"] ** 2) * jnp.sum(params["base"] != 0)

        grads = jax.grad(loss, allow_int=True)(self.params)
        assert grads["base"].dtype == jax.dtypes.float0
        for finished in (True, False):
            tx = self.tx(finished)
            updates, _ = tx.update(grads, tx.init(self.params), self.params)
            if not finished:  # as in stock optax, whose apply_updates refuses them
                assert updates["base"].dtype == jax.dtypes.float0
                continue
            new = optax.apply_updates(self.params, updates)
            np.testing.assert_array_equal(new["base"], self.params["base"])
            assert np.all(new["w"] != self.params["w"])

    def test_a_train_state_with_a_quantized_base(self, tmp_path):
        tx = optax.partition(
            {"frozen": optax.set_to_zero(), "trained": optax_flash.adamw8(1e-2)},
            self.labels,
        )
        state = TrainState.create(apply_fn=None, params=self.params, tx=tx)
        grads = {"base": jnp.zeros(128, jnp.int8), "w": jnp.ones((64, 64))}
        state = jax.jit(lambda s: s.apply_gradients(grads=grads))(state)
        weights = state.fp32_params()
        np.testing.assert_array_equal(weights["base"], self.params["base"])
        path = tmp_path / "model.safetensors"
        optax_flash.save_safetensors(path, state.params, state.opt_state)
        loaded = optax_flash.load_safetensors(path, state.params)
        assert loaded["base"].dtype == np.int8
        chex.assert_trees_all_equal(loaded, weights)


# The first with both.
@pytest.mark.parametrize(
    "name, dtype",
    quick(
        [("sgd", FLOAT8[0])],
        [*(("sgd", x) for x in FLOAT8), ("adam", FLOAT8[0]), ("adamw", FLOAT8[1])],
    ),
)
def test_float8_params_are_stocks(name, dtype):
    """The sum of param and update, in float32, rounded to nearest."""
    params = {"w": normal(0).astype(dtype), "half": normal(1, dtype=jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    inner = getattr(optax, name)(0.25)
    in_float32 = {"w": params["w"].astype(jnp.float32)}
    update, _ = inner.update(
        {"w": jnp.ones((64, 64))}, inner.init(in_float32), in_float32
    )
    expected = (in_float32["w"] + update["w"]).astype(dtype)
    additive = (in_float32["w"] + update["w"].astype(dtype).astype(jnp.float32)).astype(
        dtype
    )
    tx = master_weights(inner, finished=True)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    new = optax.apply_updates(params, updates)
    assert new["w"].dtype == dtype
    np.testing.assert_array_equal(new["w"], expected)
    assert master_params(state, new)["w"].dtype == dtype
    for tx in (master_weights(inner, finished=False), optax_flash.compress(inner)):
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        assert updates["w"].dtype == dtype
        found = optax.apply_updates(params, updates)["w"]
        np.testing.assert_array_equal(found, additive)


def test_float8_params_in_reports_and_files(tmp_path):
    params = {"w": normal(0).astype(FLOAT8[0])}
    tx = master_weights(optax_flash.adamw8(1e-2), finished=True)
    state = tx.init(params)
    report = optax_flash.memory_report(tx, params)
    assert report.component_bytes["weights"] == 4096
    assert report.component_bytes["codes"] == 2 * 4096
    numerics = optax_flash.numerics_report(tx, state, params, params)
    assert np.isfinite(numerics.half_code["w"]) and "w" in numerics.lost
    weights, plain = optax_flash.to_optax_state(tx, state, params)
    assert weights["w"].dtype == jnp.float32
    again, _ = optax_flash.from_optax_state(tx, plain, weights, like=params)
    chex.assert_trees_all_equal(again, params)
    with optax_flash.Checkpoints(tmp_path, tx, params) as checkpoints:
        checkpoints.save(1, (params, state))
        chex.assert_trees_all_equal(
            checkpoints.restore((params, state)), (params, state)
        )


class TestFrozen:
    """Frozen params: no residual, no state, and not a bit of them changes."""

    labels = {"base": "frozen", "w": "trained"}

    def frozen(self, trained, labels=None):
        return optax.partition(
            {"frozen": optax.set_to_zero(), "trained": trained}, labels or self.labels
        )

    WAYS = {
        "alone": lambda self, tx: self.frozen(tx),
        "after": lambda self, tx: optax.chain(optax.clip(1.0), self.frozen(tx)),
        "before": lambda self, tx: optax.chain(self.frozen(tx), optax.scale(0.5)),
        "masked": lambda self, tx: optax.chain(
            tx, optax.masked(optax.set_to_zero(), {"base": True, "w": False})
        ),
        "finite": lambda self, tx: optax.apply_if_finite(self.frozen(tx), 3),
        "MultiSteps": lambda self, tx: optax.MultiSteps(self.frozen(tx), 2),
        "injected": lambda self, tx: optax.inject_hyperparams(
            lambda learning_rate: self.frozen(optax_flash.adamw8(learning_rate)),
            hyperparam_dtype=jnp.float32,
        )(1e-2),
    }

    @pytest.mark.parametrize("finished", [False, True])
    @pytest.mark.parametrize("way", quick(["alone"], WAYS))
    def test_no_residual(self, way, finished):
        params = {
            "base": normal(0, dtype=jnp.bfloat16),
            "w": normal(1, dtype=jnp.bfloat16),
        }
        tx = master_weights(
            self.WAYS[way](self, optax_flash.adamw8(1e-2)),
            finished=finished,
            track_params=True,
        )
        state = tx.init(params)
        assert state.residual["base"] == optax.MaskedNode()
        grads = jax.tree.map(jnp.ones_like, params)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        new, after = params, state
        for _ in range(4):
            new, after = step(new, after)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        np.testing.assert_array_equal(new["base"], params["base"])
        assert np.mean(new["w"] < params["w"]) > 0.9
        weights = master_params(after, new)
        assert weights["base"].dtype == jnp.float32
        np.testing.assert_array_equal(weights["base"], params["base"])
        assert optax_flash.changed_params(after, new) == []
        other = new | {"w": 2 * new["w"]}
        assert optax_flash.changed_params(after, other) == ["w"]
        again = optax_flash.set_master_params(after, new, weights)
        chex.assert_trees_all_equal(master_params(again, new), weights)

    def test_what_is_trained_has_its_residual(self):
        """Masks that pass gradients through do not freeze, nor do two optimizers."""
        params = {
            "base": normal(0, dtype=jnp.bfloat16),
            "w": normal(1, dtype=jnp.bfloat16),
        }
        mask = {"base": False, "w": True}
        for inner in (
            optax.masked(optax_flash.adamw8(1e-2), mask),
            optax_flash.adamw8(1e-2, weight_decay=0.1, mask=mask),
            optax.sgd(0.1),
            # add_decayed_weights moves what set_to_zero would have kept
            optax.chain(self.frozen(optax.sgd(0.1)), optax.add_decayed_weights(0.1)),
        ):
            state = master_weights(inner, finished=True).init(params)
            assert state.residual["base"].dtype == jnp.uint8

    def test_reports_know_it(self, tmp_path):
        params = {
            "base": normal(0, dtype=jnp.bfloat16),
            "w": normal(1, dtype=jnp.bfloat16),
        }
        tx = master_weights(self.frozen(optax_flash.adamw8(1e-2)), finished=True)
        state = tx.init(params)
        report = optax_flash.memory_report(tx, params)
        assert report.component_bytes["residual"] == 4096
        assert set(optax_flash.state_format(tx, params)["leaves"]) == {
            "w/mu",
            "w/nu",
            "w/residual",
        }
        numerics = optax_flash.numerics_report(tx, state, params, params)
        assert numerics.update_rms["base"] == 0 and numerics.update_rms["w"] > 0
        weights, plain = optax_flash.to_optax_state(tx, state, params)
        assert weights["base"].dtype == jnp.float32
        again = optax_flash.from_optax_state(tx, plain, weights, like=params)
        chex.assert_trees_all_equal(again[0], params)
        chex.assert_trees_all_equal_shapes_and_dtypes(again[1], state)
        with optax_flash.Checkpoints(tmp_path, tx, params) as checkpoints:
            checkpoints.save(1, (params, state))
            chex.assert_trees_all_equal(
                checkpoints.restore((params, state)), (params, state)
            )
        path = tmp_path / "model.safetensors"
        optax_flash.save_safetensors(path, params, state)
        chex.assert_trees_all_equal(optax_flash.load_safetensors(path, params), weights)
        mesh = jax.make_mesh((1,), ("x",))
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        shardings = optax_flash.state_sharding(tx, params, where)
        chex.assert_trees_all_equal_structs(shardings, state)
        assert jax.eval_shape(tx.init, params) == jax.eval_shape(lambda: state)
        mapped = optax.tree.map_params(tx, lambda x: x, state)
        chex.assert_trees_all_equal(mapped, state)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_linen(self, dtype):
        """They stay as they are given; the others are cast, and have residuals."""
        params = {"base": normal(0).astype(dtype), "w": normal(1)}
        state = TrainState.create(
            apply_fn=None, params=params, tx=self.frozen(optax_flash.adamw8(1e-2))
        )
        assert state.params["base"].dtype == dtype
        assert state.params["w"].dtype == jnp.bfloat16
        grads = jax.tree.map(jnp.ones_like, state.params)
        state = jax.jit(lambda s: s.apply_gradients(grads=grads))(state)
        residual = state.opt_state.residual
        assert residual["w"].shape == (64, 64)
        assert getattr(residual["base"], "size", 0) <= 64
        np.testing.assert_array_equal(state.params["base"], params["base"])
        np.testing.assert_array_equal(state.fp32_params()["base"], params["base"])
        for _, mu in optax.tree.get_all_with_path(state.opt_state, "mu"):
            assert mu["base"] == optax.MaskedNode()

    def test_linen_with_nothing_to_train(self):
        params = {"w": normal(0)}
        state = TrainState.create(apply_fn=None, params=params, tx=optax.set_to_zero())
        state = state.apply_gradients(grads=params)
        chex.assert_trees_all_equal(state.fp32_params(), params)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_nnx(self, dtype):
        model = nnx.Linear(64, 64, param_dtype=dtype, rngs=nnx.Rngs(0))
        kernel = jnp.copy(model.kernel[...])

        def labels(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: "frozen" if "kernel" in str(path) else "trained", params
            )

        tx = self.frozen(optax_flash.adamw8(1e-2), labels)
        optimizer = Optimizer(model, tx, wrt=nnx.Param)
        assert model.kernel[...].dtype == dtype
        assert model.bias[...].dtype == jnp.bfloat16

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda m: jnp.mean(m(jnp.ones((2, 64)))))(model)
            optimizer.update(model, grads)

        for _ in range(2):
            step(model, optimizer)
        np.testing.assert_array_equal(model.kernel[...], kernel)
        weights = optimizer.fp32_params(model)
        np.testing.assert_array_equal(weights["kernel"], kernel)
        assert np.all(np.asarray(weights["bias"]) < 0)

    def test_nnx_by_its_filter(self):
        model = nnx.LoRALinear(64, 64, lora_rank=4, rngs=nnx.Rngs(0))
        kernel = model.kernel[...]
        optimizer = Optimizer(model, optax_flash.adamw8(1e-2), wrt=nnx.LoRAParam)
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        grads = nnx.grad(lambda m: jnp.mean(m(jnp.ones((2, 64)))), argnums=wrt)(model)
        optimizer.update(model, grads)
        assert model.kernel[...] is kernel
        assert len(jax.tree.leaves(optimizer.fp32_params(model))) == 2


class TestFp8Layers:
    """linen's FP8 layers keep scales in a collection that gradients overwrite."""

    def make(self, train_state, **kwargs):
        model = nn.Dense(64, dot_general_cls=nn.Fp8DirectDotGeneralOp)
        x = normal(5, (16, 64))
        variables = model.init(jax.random.key(0), x)
        assert OWG in variables
        state = train_state.create(apply_fn=model.apply, params=variables, **kwargs)

        @jax.jit
        def step(state):
            def loss(params):
                return jnp.mean((state.apply_fn(params, x) - x) ** 2)

            return state.apply_gradients(grads=jax.grad(loss)(state.params))

        return state, variables, step

    def test_a_train_state_is_stocks(self):
        from flax.training import train_state

        ours, variables, step = self.make(
            TrainState, tx=optax.adamw(1e-3), param_dtype=jnp.float32
        )
        stock, _, _ = self.make(train_state.TrainState, tx=optax.adamw(1e-3))
        chex.assert_trees_all_equal(ours.fp32_params(), variables)
        for _ in range(3):
            ours, stock = step(ours), step(stock)
        chex.assert_trees_all_equal_structs(ours.params, stock.params)
        chex.assert_trees_all_close(ours.params, stock.params, rtol=1e-6, atol=1e-9)
        assert any(np.any(x != 0) for x in jax.tree.leaves(ours.params[OWG]))
        chex.assert_trees_all_equal(ours.fp32_params(), ours.params)

    def test_the_collection_stays_in_float32(self, tmp_path):
        state, variables, step = self.make(TrainState, tx=optax_flash.adamw8(1e-3))
        state = step(state)
        assert state.params["params"]["kernel"].dtype == jnp.bfloat16
        chex.assert_trees_all_equal_shapes_and_dtypes(state.params[OWG], variables[OWG])
        chex.assert_trees_all_equal(state.fp32_params()[OWG], state.params[OWG])
        mesh = jax.make_mesh((1,), ("x",))
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        given = jax.tree.map(lambda _: where, state.params)
        for sharding in (where, given):
            chex.assert_trees_all_equal_structs(state.state_sharding(sharding), state)
        trained = state.params["params"]
        with optax_flash.Checkpoints(tmp_path, state.tx, trained) as checkpoints:
            checkpoints.save(1, state)
            restored = checkpoints.restore(state)
        chex.assert_trees_all_equal(restored.params, state.params)
        with pytest.raises(ValueError, match=OWG):
            state.release_gradients(None)
