"""Train states for linen and nnx: precision, equality with the plain update, jit."""

import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_flash
from optax_flash.flax import Optimizer, TrainState, is_norm

X = jax.random.normal(jax.random.key(1), (16, 64))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, name="dense")(x)
        return nn.Dense(64)(nn.LayerNorm()(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.head = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.dense(x)))


def linen_state(**kwargs):
    model = Linen()
    params = model.init(jax.random.key(0), X)["params"]
    kwargs = {"tx": optax_flash.adamw8(1e-3)} | kwargs
    return TrainState.create(apply_fn=model.apply, params=params, **kwargs), params


def linen_loss(params, apply_fn):
    return jnp.mean(jnp.square(apply_fn({"params": params}, X) - X))


@jax.jit
def linen_step(state):
    loss, grads = jax.value_and_grad(linen_loss)(state.params, state.apply_fn)
    return state.apply_gradients(grads=grads), loss


class TestLinen:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_norms_stay_float32(self, dtype):
        state, _ = linen_state(param_dtype=dtype)
        assert state.params["dense"]["kernel"].dtype == dtype
        assert state.params["LayerNorm_0"]["scale"].dtype == jnp.float32

    def test_keep_float32_is_the_users(self):
        state, _ = linen_state(keep_float32=lambda path, _: path == "dense/kernel")
        assert state.params["dense"]["kernel"].dtype == jnp.float32
        assert state.params["LayerNorm_0"]["scale"].dtype == jnp.bfloat16

    @pytest.mark.parametrize("bits, lost", [(24, 2**-15), (32, 0)])
    def test_starts_from_the_weights_it_was_given(self, bits, lost):
        state, weights = linen_state(bits=bits)
        for got, given in zip(
            jax.tree.leaves(state.fp32_params()), jax.tree.leaves(weights), strict=True
        ):
            np.testing.assert_allclose(got, given, rtol=lost, atol=0)

    def test_upper_24_bits_survive(self):
        """float32 weights whose low byte is zero come back exactly."""
        model = Linen()
        params = model.init(jax.random.key(0), X)["params"]
        params = jax.tree.map(
            lambda p: jax.lax.bitcast_convert_type(
                jax.lax.bitcast_convert_type(p, jnp.uint32) & np.uint32(0xFFFFFF00),
                jnp.float32,
            ),
            params,
        )
        state = TrainState.create(
            apply_fn=model.apply, params=params, tx=optax_flash.adamw8()
        )
        chex.assert_trees_all_equal(state.fp32_params(), params)

    def test_trains_like_float32_adamw(self):
        state, params = linen_state(tx=optax_flash.adamw8(1e-2), bits=24)
        stock = optax.adamw(1e-2)
        opt_state = stock.init(params)
        apply_fn = Linen().apply

        @jax.jit
        def stock_step(params, opt_state):
            loss, grads = jax.value_and_grad(linen_loss)(params, apply_fn)
            updates, opt_state = stock.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        first = None
        for _ in range(100):
            state, loss = linen_step(state)
            params, opt_state, stock_loss = stock_step(params, opt_state)
            first = loss if first is None else first
        assert stock_loss < 0.1 * first
        assert abs(loss - stock_loss) < 0.02 * first

    def test_equals_update_and_apply_updates(self):
        """Finished params and their residuals are those of the plain transformation."""
        state, _ = linen_state()
        grads = jax.tree.map(jnp.ones_like, state.params)
        stepped = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, grads)
        additive = optax_flash.master_weights(optax_flash.adamw8(1e-3), finished=False)
        to32 = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, opt_state = jax.jit(additive.update)(
            to32, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        chex.assert_trees_all_equal(params, stepped.params)
        chex.assert_trees_all_equal(opt_state, stepped.opt_state)

    def test_does_not_recompile_and_donates(self):
        chex.clear_trace_counter()
        step = jax.jit(chex.assert_max_traces(n=1)(_apply_ones), donate_argnums=0)
        state, _ = linen_state()
        for _ in range(3):
            state = step(state)
        assert state.step == 3


def _apply_ones(state):
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))


def nnx_loss(model):
    return jnp.mean(jnp.square(model(X) - X))


@nnx.jit
def nnx_step(model, optimizer):
    loss, grads = nnx.value_and_grad(nnx_loss)(model)
    optimizer.update(model, grads)
    return loss


class TestNnx:
    def test_casts_the_model_but_its_norms(self):
        model = Nnx(nnx.Rngs(0))
        Optimizer(model, optax_flash.adamw8(1e-3))
        assert model.dense.kernel[...].dtype == jnp.bfloat16
        assert model.norm.scale[...].dtype == jnp.float32

    def test_starts_from_the_weights_it_found(self):
        model = Nnx(nnx.Rngs(0))
        weights = nnx.as_pure(nnx.state(model, nnx.Param))
        weights = jax.tree.map(jnp.copy, weights)
        optimizer = Optimizer(model, optax_flash.adamw8(1e-3), bits=32)
        chex.assert_trees_all_equal(optimizer.fp32_params(model), weights)

    def test_equals_linen(self):
        """The same weights and gradients make the same steps, bit for bit."""
        model = Nnx(nnx.Rngs(0))
        weights = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.Param)))
        optimizer = Optimizer(model, optax_flash.adamw8(1e-3))
        state = TrainState.create(
            apply_fn=None, params=nnx.to_pure_dict(weights), tx=optax_flash.adamw8(1e-3)
        )

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(
                model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
            )

        for _ in range(3):
            step(model, optimizer)
            state = jax.jit(_apply_ones)(state)
        got = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param)))
        chex.assert_trees_all_equal(got, state.params)

    def test_trains(self):
        model = Nnx(nnx.Rngs(0))
        optimizer = Optimizer(model, optax_flash.adamw8(1e-2), wrt=nnx.Param)
        losses = [nnx_step(model, optimizer) for _ in range(100)]
        assert losses[-1] < 0.15 * losses[0]

    def test_plain_nnx_optimizer_takes_our_transformations(self):
        model = Nnx(nnx.Rngs(0))
        tx = optax_flash.adamw8(1e-2, codecs={"*head*": None})
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        losses = [nnx_step(model, optimizer) for _ in range(50)]
        assert losses[-1] < losses[0]
        adam = nnx.as_pure(optimizer.opt_state).inner_state[0]
        assert adam.mu["dense"]["kernel"].dtype == jnp.uint8
        assert adam.mu["head"]["kernel"].dtype == jnp.float32

    def test_sharding_metadata_reaches_the_state(self):
        if jax.device_count() < 8:
            pytest.skip("needs 8 devices: tests/conftest.py asks for them on CPU")
        mesh = jax.make_mesh(
            (4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
        )
        with jax.set_mesh(mesh):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("a", "b"))
            model = nnx.Linear(64, 64, kernel_init=init, rngs=nnx.Rngs(0))
            optimizer = nnx.Optimizer(model, optax_flash.adamw8(1e-3), wrt=nnx.Param)
            codes = nnx.as_pure(optimizer.opt_state).inner_state[0].mu["kernel"]
            assert codes.sharding.is_equivalent_to(model.kernel[...].sharding, 2)


@pytest.mark.parametrize(
    "path, ndim, expected",
    [
        ("decoder/LayerNorm_0/bias", 1, True),
        ("block_3/ln_1/scale", 1, True),
        ("bn/scale", 1, True),
        ("backbone/BatchNorm_0/bias", 1, True),
        ("RMSNorm_0/scale", 1, True),
        ("attention/scale", 1, True),
        ("attention/kernel", 2, False),
        ("colnet/kernel", 2, False),
        ("embedding/scale", 2, False),
    ],
)
def test_is_norm(path, ndim, expected):
    assert is_norm(path, jnp.zeros((4,) * ndim)) is expected


def test_without_flax_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("optax_flash.flax")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(optax_flash, "flax")
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match=r"pip install \"optax_flash\[flax\]\""):
        _ = optax_flash.flax
