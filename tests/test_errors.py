"""Bad input: each error names the leaf, what was found and the way out."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_flash
import optax_flash.flax
from optax_flash import Affine8, Companded8, compress, master_weights

PARAMS = {"layer": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}


@pytest.mark.parametrize("wrap", [compress, master_weights])
@pytest.mark.parametrize("leaf", ["text", jnp.tanh, object()])
def test_params_that_are_no_arrays(wrap, leaf):
    params = PARAMS | {"other": {"steps": leaf}}
    with pytest.raises(ValueError, match=r"'other/steps' is a .*optax\.masked"):
        wrap(optax.adam(1e-3)).init(params)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool])
def test_matrices_that_cannot_be_orthogonalised(dtype):
    params = {"other": {"steps": jnp.zeros((4, 4), dtype)}}
    with pytest.raises(ValueError, match=r"'other/steps'.*optax\.masked"):
        optax_flash.scale_by_lora_pre_muon(rank=2).init(params)


def test_complex_params_can_be_split():
    tx = optax.contrib.split_real_and_imaginary(optax_flash.adam8(1e-3))
    params = {"w": jnp.ones((64, 64), jnp.complex64)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.complex64


@pytest.mark.parametrize(
    "make",
    [
        lambda: compress(optax.adam(1e-3), "int3"),
        lambda: compress(optax.adam(1e-3), {"mu": "int3"}),
        lambda: optax_flash.adamw8(codecs="int3"),
    ],
)
def test_unknown_codec(make):
    with pytest.raises(ValueError, match="int3.*companded8.*flashoptim.*affine8"):
        make()


def test_codecs_of_a_wrong_type():
    with pytest.raises(ValueError, match="Unknown codec 8.*Known names"):
        compress(optax.adam(1e-3), 8)


def test_unknown_field():
    tx = compress(optax.adam(1e-3), {"momentum": "affine8"})
    with pytest.raises(ValueError, match="'momentum'.*'mu', 'nu'"):
        tx.init(PARAMS)


@pytest.mark.parametrize("bits", [8, 16, 23, "24"])
def test_bits(bits):
    with pytest.raises(ValueError, match=f"24.*32.*{bits}"):
        master_weights(optax.adam(1e-3), bits)


def test_unknown_residual_codec():
    with pytest.raises(ValueError, match="'kahan'.*exact, flashoptim"):
        master_weights(optax.adam(1e-3), codec="kahan")


@pytest.mark.parametrize("wrap", [compress, master_weights])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"layer": {"kernel": p["layer"]["kernel"]}}, "'layer/bias' is mis"),
        (lambda p: p | {"new": p["layer"]["bias"]}, "'new' is not in the state"),
        (lambda p: {"layer": list(p["layer"].values())}, "is missing"),
    ],
)
def test_another_tree(wrap, change, message):
    tx = wrap(optax.adam(1e-3))
    other = change(PARAMS)
    with pytest.raises(ValueError, match=message):
        tx.update(other, tx.init(PARAMS), other)


def test_gradients_unlike_the_params():
    tx = master_weights(optax.sgd(1e-3))
    grads = {"layer": {"kernel": jnp.ones((64, 64))}}
    with pytest.raises(ValueError, match="gradients: 'layer/bias' is missing"):
        tx.update(grads, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("wrap", [compress, master_weights])
def test_a_foreign_state(wrap):
    inner = optax.adam(1e-3)
    with pytest.raises(ValueError, match="tuple"):
        wrap(inner).update(PARAMS, inner.init(PARAMS), PARAMS)


def test_no_params():
    tx = master_weights(optax.sgd(1e-3))
    with pytest.raises(ValueError, match="update needs the params"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    "made_with, read_with",
    [
        (None, "flashoptim"),
        (None, "affine8"),
        (None, Companded8(group=64)),
        ("affine8", Affine8(group=64)),
        ({"*kernel*": None}, None),
        (None, {"*kernel*": None}),
    ],
)
def test_a_state_of_other_codecs(made_with, read_with):
    params = {"layer": {"kernel": jnp.ones((64, 256))}}
    state = compress(optax.adam(1e-3), made_with).init(params)
    tx = compress(optax.adam(1e-3), read_with)
    with pytest.raises(ValueError, match=r"layer/kernel/mu.*other codecs"):
        tx.update(params, state, params)


def test_a_state_with_other_fields_in_codes():
    state = compress(optax.adam(1e-3), {"nu": None}).init(PARAMS)
    with pytest.raises(ValueError, match="other codecs"):
        compress(optax.adam(1e-3)).update(PARAMS, state, PARAMS)


def test_a_state_of_other_bits():
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    state = master_weights(optax.sgd(1e-3), 32).init(params)
    with pytest.raises(ValueError, match=r"'w'.*uint16.*bits"):
        master_weights(optax.sgd(1e-3), 24).update(params, state, params)


class TestCheckpointFormat:
    """What shapes and dtypes do not tell is kept beside the arrays."""

    def test_equal_formats_pass(self):
        saved = optax_flash.state_format(optax_flash.adamw8(1e-3), PARAMS)
        optax_flash.check_format(saved, optax_flash.adamw8(1e-4), PARAMS)

    def test_it_is_plain_data(self):
        import json

        tx = optax.chain(optax.clip(1.0), master_weights(optax_flash.adamw8(1e-3)))
        params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
        saved = optax_flash.state_format(tx, params)
        assert json.loads(json.dumps(saved)) == saved
        assert set(saved["leaves"]) == {"w/mu", "w/nu", "w/residual"}

    @pytest.mark.parametrize(
        "other",
        [
            optax_flash.adamw8(codecs="flashoptim"),
            optax_flash.adamw8(codecs={"mu": Companded8(group=16)}),
            optax_flash.adamw8(codecs={"*kernel*": None}),
            compress(optax.adamw(1e-3), min_size=5000),
            optax.adamw(1e-3),
        ],
    )
    def test_other_formats_do_not(self, other):
        saved = optax_flash.state_format(optax_flash.adamw8(1e-3), PARAMS)
        with pytest.raises(ValueError, match="layer/kernel/mu.*checkpoint's codecs"):
            optax_flash.check_format(saved, other, PARAMS)

    def test_other_bits_do_not(self):
        params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
        saved = optax_flash.state_format(master_weights(optax.sgd(1.0)), params)
        for other in (
            master_weights(optax.sgd(1.0), 32),
            master_weights(optax.sgd(1.0), codec="flashoptim"),
        ):
            with pytest.raises(ValueError, match="'w/residual'"):
                optax_flash.check_format(saved, other, params)

    def test_another_version_does_not(self):
        saved = optax_flash.state_format(optax_flash.adamw8(1e-3), PARAMS)
        with pytest.raises(ValueError, match="version 0"):
            optax_flash.check_format(
                saved | {"version": 0}, optax_flash.adamw8(1e-3), PARAMS
            )


class TestFinishedParams:
    """Only apply_updates may use what ``master_weights`` emits."""

    params = {"w": jnp.ones((64, 64), jnp.bfloat16), "norm": jnp.ones(64)}

    def assert_explained(self, use, name):
        """``use`` raises an error that says what to do."""
        with pytest.raises((TypeError, ValueError)) as raised:
            use()
            pytest.fail(f"{name} computes")
        assert "outermost transformation" in str(raised.value), (name, raised.value)

    @pytest.mark.parametrize(
        "after",
        [
            optax.scale(0.5),
            optax.scale_by_learning_rate(0.1),
            optax.scale_by_schedule(optax.constant_schedule(0.1)),
            optax.clip_by_global_norm(1.0),
            optax.clip(1.0),
            optax.adaptive_grad_clip(1.0),
            optax.add_decayed_weights(0.1),
            optax.trace(0.9),
            optax.scale_by_adam(),
            optax.ema(0.9),
            optax.apply_every(2),
            optax.zero_nans(),
            optax.set_to_zero(),
            optax.keep_params_nonnegative(),
            optax.contrib.reduce_on_plateau(),
            compress(optax.adam(1e-3)),
            optax_flash.scale_by_adam8(),
            master_weights(optax.sgd(0.1)),
        ],
    )
    def test_a_transformation_after_it(self, after):
        tx = optax.chain(master_weights(optax_flash.scale_by_adam8()), after)
        state = jax.eval_shape(tx.init, self.params)

        def update(params, state):
            return tx.update(params, state, params, value=1.0)[1]

        self.assert_explained(
            lambda: jax.eval_shape(update, self.params, state), "what is behind it"
        )

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda tx: optax.MultiSteps(tx, 2),
            lambda tx: optax.apply_if_finite(tx, 2),
            lambda tx: optax.conditionally_transform(tx, lambda step: step > 0),
            lambda tx: optax.flatten(tx),
        ],
    )
    def test_a_wrapper_that_computes_with_updates(self, wrap):
        tx = wrap(master_weights(optax.sgd(0.1)))
        state = jax.eval_shape(tx.init, self.params)

        def update(params, state):
            return tx.update(params, state, params)[1]

        self.assert_explained(
            lambda: jax.eval_shape(update, self.params, state), "the wrapper"
        )

    def test_lookahead(self):
        tx = optax.lookahead(master_weights(optax.sgd(0.1)), 2, 0.5)
        pair = optax.LookaheadParams.init_synced(self.params)
        state = tx.init(pair)
        self.assert_explained(lambda: tx.update(self.params, state, pair), "lookahead")

    def test_what_jax_does_with_updates(self):
        tx = master_weights(optax.sgd(0.1))
        params, state = self.params, tx.init(self.params)

        def updates(params):
            return tx.update(params, state, params)[0]

        stacked = jax.tree.map(lambda p: jnp.stack([p, p]), params)
        emitted = updates(params)
        skip = jnp.bool_(True)
        uses = {
            "cond": lambda: jax.lax.cond(skip, lambda: emitted, lambda: params),
            "scan": lambda: jax.lax.scan(lambda x, _: (x, emitted), 0, length=2),
            "a carry": lambda: jax.lax.fori_loop(0, 1, lambda _, x: x, emitted),
            "out of jit": lambda: jax.jit(updates)(params),
            "into jit": lambda: jax.jit(lambda x: None)(emitted),
            "out of vmap": lambda: jax.vmap(updates)(stacked),
            "out of eval_shape": lambda: jax.eval_shape(updates, params),
            "out of checkpoint": lambda: jax.checkpoint(updates)(params),
            "device_put": lambda: jax.device_put(emitted),
            "stop_gradient": lambda: jax.lax.stop_gradient(emitted),
        }
        for name, use in uses.items():
            self.assert_explained(use, name)

    def test_arithmetic(self):
        tx = master_weights(optax.sgd(0.1))
        params = self.params
        updates, _ = tx.update(params, tx.init(params), params)
        # Of the dtypes of the params: nothing but identity tells them apart.
        zeros = jax.tree.map(jnp.zeros_like, params)
        u, tree = updates["w"], optax.tree
        uses = {
            "tree.norm": lambda: tree.norm(updates),
            "tree.add": lambda: tree.add(updates, zeros),
            "tree.add, accumulated": lambda: tree.add(zeros, updates),
            "tree.sub": lambda: tree.sub(updates, zeros),
            "tree.sub, reversed": lambda: tree.sub(zeros, updates),
            "tree.scale": lambda: tree.scale(0.5, updates),
            "tree.add_scale": lambda: tree.add_scale(zeros, 0.5, updates),
            "tree.update_moment": lambda: tree.update_moment(updates, zeros, 0.9, 1),
            "tree.sum": lambda: tree.sum(updates),
            "tree.where": lambda: tree.where(True, updates, zeros),
            "tree.zeros_like": lambda: tree.zeros_like(updates),
            "tree.cast": lambda: tree.cast(updates, jnp.float32),
            "an average of it": lambda: optax.incremental_update(updates, zeros, 0.1),
            "applied twice": lambda: optax.apply_updates(
                optax.apply_updates(params, updates), updates
            ),
            "sum": lambda: sum(jax.tree.leaves(updates)),
            "in place": lambda: np.ones((64, 64)).__iadd__(u),
            "numpy.add": lambda: np.add(np.ones((64, 64)), u),
            "numpy.abs": lambda: np.abs(u),
            "numpy.asarray": lambda: np.asarray(u),
            "jnp.abs": lambda: jnp.abs(u),
            "jnp.asarray": lambda: jnp.asarray(u),
            "jnp.where": lambda: jnp.where(True, u, 0.0),
            "jnp.isfinite": lambda: jnp.isfinite(u),
            "a scalar times it": lambda: jnp.float32(0.1) * u,
            "a NumPy scalar times it": lambda: np.float32(0.1) * u,
            "a tenth": lambda: u / 10,
            "negated": lambda: -u,
            "compared": lambda: u == 0,
            "as a condition": lambda: bool(u),
            "as a number": lambda: float(u),
            "its length": lambda: len(u),
            "its elements": lambda: list(u),
            "its shape": lambda: u.shape,
            "its mean": lambda: u.mean(),
        }
        for name, use in uses.items():
            self.assert_explained(use, name)

    def test_what_only_passes_updates_on_may_follow(self):
        """Identity, masks, partitions, names; and what reads the params they make."""

        def new_params(updates, params):
            made.append(optax.apply_updates(params, updates))
            return updates

        made = []
        inner = master_weights(optax.sgd(0.5))
        wraps = [
            optax.chain(inner, optax.identity()),
            optax.chain(inner, optax.stateless(lambda updates, params: updates)),
            optax.chain(inner, optax.stateless(new_params)),
            optax.chain(inner, optax.masked(optax.clip(1.0), False)),
            optax.named_chain(("weights", inner)),
            optax.masked(inner, True),
            optax.partition({"all": inner}, "all"),
        ]
        for tx in wraps:
            updates, _ = tx.update(self.params, tx.init(self.params), self.params)
            new = optax.apply_updates(self.params, updates)
            assert all(np.all(np.asarray(x) == 0.5) for x in jax.tree.leaves(new))
        np.testing.assert_array_equal(made[0]["w"], new["w"])

    def test_params_of_numpy(self):
        params = {"w": np.ones((64, 64), np.float32)}
        tx = master_weights(optax.sgd(0.5))
        updates, _ = tx.update(params, tx.init(params), params)
        assert np.all(np.asarray(optax.apply_updates(params, updates)["w"]) == 0.5)

    def test_other_params(self):
        tx = master_weights(optax.sgd(0.1))
        params = {"w": self.params["w"]}
        updates, _ = tx.update(params, tx.init(params), params)
        for other in (np.ones((64, 64), np.float32), jnp.ones((64, 64), jnp.bfloat16)):
            found = rf"another {other.dtype}\[64, 64\].*params that update saw"
            with pytest.raises(TypeError, match=found):
                optax.apply_updates({"w": other}, updates)


def test_master_params_of_a_state_without_residuals():
    with pytest.raises(ValueError, match="0 MasterWeightsStates"):
        optax_flash.master_params(optax.adam(1e-3).init(PARAMS), PARAMS)


def test_changed_params_without_a_digest():
    state = master_weights(optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match="track_params=True"):
        optax_flash.changed_params(state, PARAMS)


def swapped_calls(folder):
    """Each with what the error says to call."""
    float32 = {"w": jnp.ones((64, 64))}
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    tx, stock = master_weights(optax_flash.adamw8(1e-3)), optax.adam(1e-3)
    state, stock_state = tx.init(params), stock.init(float32)
    of, path = optax_flash, folder / "weights"
    create = optax_flash.flax.TrainState.create
    call = "TrainState.create(apply_fn=..., params=params, tx=tx)"
    yield call, lambda: create(apply_fn=None, params=tx, tx=params)
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    call = "Optimizer(model, tx, wrt=...)"
    yield call, lambda: optax_flash.flax.Optimizer(stock, model)
    yield "compress(inner, codecs)", lambda: of.compress("affine8", stock)
    yield "master_weights(inner, bits)", lambda: of.master_weights(24, stock)
    with of.Checkpoints(folder, tx, params) as checkpoints:
        yield "master_params(state, params)", lambda: of.master_params(params, state)
        yield "changed_params(state, params)", lambda: of.changed_params(params, state)
        call = "set_master_params(state, params, new_weights)"
        yield call, lambda: of.set_master_params(params, state, float32)
        yield call, lambda: of.set_master_params(params, float32, state)
        yield call, lambda: of.set_master_params(state, float32, params)
        yield "cast_params(params, dtype)", lambda: of.cast_params("bfloat16", params)
        yield "cast_params(params, dtype)", lambda: of.cast_params(jnp.float16, params)
        call = "numerics_report(tx, state, params, grads)"
        yield call, lambda: of.numerics_report(tx, params, state, params)
        yield call, lambda: of.numerics_report(tx, params, params, state)
        yield call, lambda: of.numerics_report(state, tx, params, params)
        yield "memory_report(tx, params)", lambda: of.memory_report(params, tx)
        yield "memory_report(tx, params)", lambda: of.memory_report(tx, state)
        yield "explain(tx, params)", lambda: of.explain(params, tx)
        yield "explain(tx, params)", lambda: of.explain(tx, state)
        for alone in (tx, optax_flash.adamw8(1e-3)):
            call, its_state = "tx.update(grads, state, params)", alone.init(params)
            yield call, functools.partial(alone.update, params, params, its_state)
            yield call, functools.partial(alone.update, its_state, params, params)
        call = "differentiable(tx, state, params)"
        yield call, lambda: of.differentiable(tx, params, state)
        yield call, lambda: of.differentiable(state, tx, params)
        model = of.release.sequence(of.release.layer("w", lambda w: jnp.sum(w)))
        call = "train_step(model, tx)"
        yield call, lambda: of.release.train_step(stock, model)
        step = of.release.train_step(model, stock)
        yield "step(params, opt_state, *batch)", lambda: step(stock_state, float32)
        call = "layer(names, function)"
        yield call, lambda: of.release.layer(jnp.sum, "w")
        yield "scan(name, function)", lambda: of.release.scan(jnp.sum, "w")
        yield "plan(model, optimizer)", lambda: of.plan.plan(stock, float32)
        yield "plan(model, optimizer)", lambda: of.plan.plan(stock, "gpt2-124m")
        call = "to_optax_state(tx, state, params)"
        yield call, lambda: of.to_optax_state(tx, params, state)
        yield call, lambda: of.to_optax_state(params, state, tx)
        call = "from_optax_state(tx, optax_state, weights, like)"
        yield call, lambda: of.from_optax_state(tx, float32, stock_state)
        yield call, lambda: of.from_optax_state(stock_state, tx, float32)
        yield "state_format(tx, params)", lambda: of.state_format(params, tx)
        call = "check_format(saved, tx, params)"
        yield call, lambda: of.check_format(tx, {"version": 1}, params)
        call = "state_sharding(tx, params, param_sharding)"
        yield call, lambda: of.state_sharding(params, tx)
        call = "save_safetensors(path, params, state)"
        yield call, lambda: of.save_safetensors(path, state, params)
        yield call, lambda: of.save_safetensors(path, state)
        yield call, lambda: of.save_safetensors(params, path)
        call = "load_safetensors(path, params)"
        yield call, lambda: of.load_safetensors(params, path)
        call = "Checkpoints(folder, tx, params)"
        yield call, lambda: of.Checkpoints(folder, params, tx)
        yield call, lambda: of.Checkpoints(tx, params, folder)
        yield "save(step, tree)", lambda: checkpoints.save((params, state), 1)
        yield "restore(target, step)", lambda: checkpoints.restore(1, (params, state))


def test_swapped_arguments(tmp_path):
    for call, swapped in swapped_calls(tmp_path):
        with pytest.raises(TypeError) as raised:
            swapped()
            pytest.fail(f"{call} takes swapped arguments")
        assert f"all {call}." in str(raised.value), (call, raised.value)


def test_arguments_stand_in_one_order():
    """tx, state, params, gradients; where a state may be left out, it is behind."""
    order = ("tx", "state", "optax_state", "params", "weights", "grads")
    for name, function in vars(optax_flash).items():
        if not inspect.isfunction(function) or name == "save_safetensors":
            continue
        found = [x for x in inspect.signature(function).parameters if x in order]
        assert found == sorted(found, key=order.index), name


def test_what_is_no_transformation():
    with pytest.raises(TypeError, match=r"type float, not .*memory_report\(tx, params"):
        optax_flash.memory_report(1e-3, PARAMS)


def test_platforms(monkeypatch):
    """What ``jax.default_backend()`` says, and what compilers say."""

    def runs_in(platform):
        explanation = optax_flash.explain(tx, params, platform=platform)
        (path,) = explanation.paths
        return explanation.platform, path.implementation

    tx, params = optax_flash.adamw8(1e-3), {"w": jnp.ones((512, 512))}
    assert runs_in("gpu") == runs_in("cuda") == ("cuda", "pallas")
    assert runs_in("tpu") == ("tpu", "pallas")
    assert runs_in("rocm") == ("rocm", "xla")
    assert runs_in("cpu") == ("cpu", "xla")
    for unknown in ("nvidia", "GPU", "", "metal"):
        with pytest.raises(ValueError, match="cpu, cuda, rocm, tpu, and gpu"):
            runs_in(unknown)
    for version, name in (("PJRT C API\ncuda 12090", "cuda"), ("rocm 60300", "rocm")):

        class Device:
            client = type("Client", (), {"platform_version": version})

        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            patch.setattr(jax, "devices", lambda: [Device])
            assert runs_in(None)[0] == name


def test_codecs_for_what_is_no_name():
    with pytest.raises(ValueError, match="codecs has the key 3. Keys are the names of"):
        compress(optax.adam(1e-3), {3: None})
