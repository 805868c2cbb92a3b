"""Gradients and params of unlike dtypes: updates lose nothing, states keep theirs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from optax_flash import compress, master_weights
from tests.tiers import quick

SHAPES = {"kernel": (64, 64), "bias": (64,)}
NARROW = ("float16", "bfloat16")
FLOATS = ("float32", *NARROW)


def random(dtype, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * rng.normal(size=shape), dtype)
        for name, shape in SHAPES.items()
    }


def updates_of(tx, grads, params, steps=1):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(grads, state, params)
    return updates


def additive(inner, bits=24):
    return master_weights(inner, bits, finished=False)


def multi_steps(inner):
    return optax.MultiSteps(inner, 2).gradient_transformation()


class TestNarrowGradients:
    """float32 params with gradients in half precision, at tiny learning rates."""

    PAIRS = {
        "adam8": (optax_flash.adam8, optax.adam),
        "adamw8": (optax_flash.adamw8, optax.adamw),
        "lion8": (optax_flash.lion8, optax.lion),
        "sgd8": (
            functools.partial(optax_flash.sgd8, momentum=0.9),
            functools.partial(optax.sgd, momentum=0.9),
        ),
        "tamed_adamw8": (
            functools.partial(optax_flash.tamed_adamw8, threshold=1e6),
            optax.adamw,
        ),
        "compress(rmsprop)": (lambda lr: compress(optax.rmsprop(lr)), optax.rmsprop),
        "master_weights": (lambda lr: additive(optax.adam(lr)), optax.adam),
        "MultiSteps": (
            lambda lr: multi_steps(optax_flash.adam8(lr)),
            lambda lr: multi_steps(optax.adam(lr)),
        ),
    }

    # Every transformation with one dtype, but the first with both.
    @pytest.mark.parametrize(
        "name, dtype",
        quick(
            [
                ("adamw8", NARROW[0]),
                ("lion8", NARROW[0]),
                ("master_weights", NARROW[0]),
            ],
            [("adam8", NARROW[1])]
            + [(name, NARROW[i % 2]) for i, name in enumerate(PAIRS)],
        ),
    )
    def test_updates_are_those_of_stock_optax(self, name, dtype):
        ours, stock = self.PAIRS[name]
        params, grads = random("float32"), random(dtype, 1)
        exact = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        for rate in (1e-7, 1e-8):
            steps = 2 if name == "MultiSteps" else 1
            found = updates_of(ours(rate), grads, params, steps)
            expected = updates_of(stock(rate), exact, params, steps)
            for leaf in SHAPES:
                assert found[leaf].dtype == jnp.float32, (rate, leaf)
                np.testing.assert_allclose(
                    found[leaf], expected[leaf], rtol=1e-3, err_msg=f"{rate} {leaf}"
                )

    @pytest.mark.full
    def test_low_rank_updates_are_those_of_float32_gradients(self):
        params = random("float32")
        for make in (
            optax_flash.lora_pre_adamw,
            optax_flash.lora_pre_muon,
            functools.partial(optax_flash.lowrank_adamw, min_dim=8),
        ):
            tx, grads = make(1e-8, rank=4), random("float16", 1)
            exact = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            found, expected = (updates_of(tx, g, params) for g in (grads, exact))
            for leaf in SHAPES:
                assert np.max(np.abs(expected[leaf])) > 0
                np.testing.assert_allclose(found[leaf], expected[leaf], rtol=1e-5)

    @pytest.mark.full
    def test_without_params_the_gradient_decides(self):
        for tx in (
            optax_flash.scale_by_adam8(),
            optax_flash.scale_by_tamed_adam(0.5),
            optax_flash.scale_by_lora_pre(rank=4),
            optax_flash.scale_by_lowrank_adam(rank=4, min_dim=8),
        ):
            grads = random("float16")
            updates, _ = tx.update(grads, tx.init(random("float32")))
            assert {x.dtype for x in updates.values()} == {jnp.dtype("float16")}


def matrices(inner):
    return optax.partition(
        {"kernel": inner, "bias": optax_flash.scale_by_adam8()},
        {"kernel": "kernel", "bias": "bias"},
    )


EVERY = {
    "adamw8": lambda: optax_flash.adamw8(0.01),
    "adamw4": lambda: optax_flash.adamw4(0.01),
    "lion8": lambda: optax_flash.lion8(0.01),
    "sgd4": lambda: optax_flash.sgd4(0.1, momentum=0.9, nesterov=True),
    "flashoptim": lambda: optax_flash.adamw8(0.01, codecs="flashoptim"),
    "affine4": lambda: optax_flash.adamw8(0.01, codecs="affine4"),
    "tame": lambda: optax_flash.scale_by_tamed_adam(0.5, relative=True, nesterov=True),
    "lora_pre": lambda: optax_flash.scale_by_lora_pre(rank=4),
    "lora_pre_paper": lambda: optax_flash.scale_by_lora_pre(
        rank=4, bias_correction="paper"
    ),
    "lora_pre_muon": lambda: matrices(optax_flash.scale_by_lora_pre_muon(rank=4)),
    "dense_muon": lambda: matrices(
        optax_flash.scale_by_lora_pre_muon(rank=4, where=lambda path: False)
    ),
    "lowrank_adam": lambda: optax_flash.scale_by_lowrank_adam(rank=4, min_dim=8),
    "periodic": lambda: optax_flash.scale_by_lowrank_adam(
        rank=4, min_dim=8, strategy="periodic", refresh_every=2
    ),
    "online": lambda: optax_flash.scale_by_lowrank_adam(
        rank=4, min_dim=8, strategy="online"
    ),
    "master_24": lambda: additive(optax_flash.adamw8(0.01)),
    "master_32": lambda: additive(optax.adam(0.01), 32),
    "master_low_rank": lambda: additive(
        optax_flash.lowrank_adamw(0.01, rank=4, min_dim=8)
    ),
    "master_multi_steps": lambda: additive(multi_steps(optax_flash.adamw8(0.01))),
    "adagrad": lambda: compress(optax.adagrad(0.01)),
    "adan": lambda: compress(optax.adan(0.01)),
    "adafactor": lambda: compress(optax.adafactor(0.01)),
    "amsgrad": lambda: compress(optax.amsgrad(0.01)),
    "lamb": lambda: compress(optax.lamb(0.01)),
    "nadam": lambda: compress(optax.nadam(0.01)),
    "rmsprop": lambda: compress(optax.rmsprop(0.01, momentum=0.9)),
    "muon": lambda: compress(optax.contrib.muon(0.01)),
    "schedule_free": lambda: compress(optax.contrib.schedule_free_sgd(0.01)),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax_flash.adamw8(0.01)
    ),
    "injected": lambda: optax.inject_hyperparams(
        optax_flash.adamw8, hyperparam_dtype=jnp.float32
    )(0.01),
    "multi_steps": lambda: multi_steps(optax_flash.adamw8(0.01)),
}


@pytest.mark.parametrize("name", quick(["adamw8", "lora_pre"], EVERY))
def test_a_state_keeps_its_dtypes_and_an_update_has_the_wider(name):
    """Of gradient and param; with float64 and without."""

    def avals(tree):
        return [
            (jax.tree_util.keystr(path), x.shape, x.dtype, x.weak_type)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        ]

    for x64 in (False, True):
        dtypes = (*FLOATS, "float64") if x64 else FLOATS
        with jax.enable_x64(x64):
            for of_params, of_grads in itertools.product(dtypes, dtypes):
                case = f"{of_grads} gradients of {of_params} params, x64={x64}"
                params, grads = jax.eval_shape(
                    lambda a=of_params, b=of_grads: (random(a), random(b))
                )
                tx = EVERY[name]()
                state = jax.eval_shape(tx.init, params)
                updates, new_state = jax.eval_shape(tx.update, grads, state, params)
                assert avals(new_state) == avals(state), case
                wider = jnp.promote_types(of_params, of_grads)
                assert {x.dtype for x in updates.values()} == {wider}, case


class TestFloat64:
    @pytest.mark.full
    @pytest.mark.parametrize("name", ["lora_pre", "lora_pre_muon", "lowrank_adam"])
    def test_low_rank_factors_are_carried_by_scan(self, name):
        """Their arithmetic is float32's, whatever the params are."""

        def directions(dtype):
            tx, params = EVERY[name](), random(dtype)
            grads = random("float32", 1)
            grads = jax.tree.map(lambda g: g.astype(dtype), grads)

            def step(state, _):
                updates, state = tx.update(grads, state, params)
                return state, updates

            return jax.lax.scan(step, tx.init(params), length=3)[1]

        expected = directions("float32")
        with jax.enable_x64(True):
            found = directions("float64")
            for leaf in SHAPES:
                assert found[leaf].dtype == jnp.float64
                scale = np.max(np.abs(expected[leaf]))
                np.testing.assert_allclose(
                    found[leaf], expected[leaf], rtol=1e-3, atol=1e-3 * scale
                )

    def test_updates_are_those_of_stock_optax(self):
        with jax.enable_x64(True):
            params = random("float64")
            grads = jax.tree.map(lambda g: 1e-3 * g, random("float64", 1))
            for ours in (optax_flash.adam8, lambda lr: additive(optax_flash.adam8(lr))):
                found = updates_of(ours(0.1), grads, params, steps=3)
                expected = updates_of(optax.adam(0.1), grads, params, steps=3)
                # The bias is small, so its moments are whole.
                np.testing.assert_allclose(found["bias"], expected["bias"], rtol=1e-12)
                error = found["kernel"] - expected["kernel"]
                assert jnp.std(error) < 0.03 * jnp.std(expected["kernel"])

    def test_master_weights_of_float64_params_and_narrow_gradients(self):
        with jax.enable_x64(True):
            params = random("float64")
            for dtype in NARROW:
                grads = random(dtype, 1)
                tx = master_weights(optax.sgd(1e-9))
                updates, _ = tx.update(grads, tx.init(params), params)
                found = optax.apply_updates(params, updates)["kernel"]
                g = np.asarray(grads["kernel"], np.float64)
                expected = np.asarray(params["kernel"]) - 1e-9 * g
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)
