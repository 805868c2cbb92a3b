"""Split weights: what params and residuals do over steps, and from outside."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from optax_flash import master_params, master_weights

# But where stock Adam is run, which raises Python's floats to the power of a count.
strict = pytest.mark.usefixtures("strict_types")

KEY = jax.random.key(0)


def constant_step(size):
    """A transformation that adds the same number to every weight."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda g: size + 0 * g, updates)
    )


def run(tx, params, grads, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return carry


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [24, 32])
def test_equals_float32_training(dtype, bits):
    """With 32 bits the weights are float32 weights; with 24 almost."""
    weights = jax.random.normal(KEY, (64, 64)).astype(dtype).astype(jnp.float32)
    grads = jax.random.normal(jax.random.key(1), (64, 64))
    inner = optax.adamw(1e-3)
    expected, _ = run(inner, weights, grads, 50)
    params, state = run(master_weights(inner, bits), weights.astype(dtype), grads, 50)
    assert params.dtype == dtype
    got = master_params(state, params)
    if bits == 32 and dtype == "bfloat16":
        # An update in float32 is exact but for its own last bit.
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-7)
    else:
        # 50 roundings of up to a code, of weights up to 50 steps away.
        reach = np.abs(expected) + 50 * 1e-3
        assert np.all(np.abs(got - expected) <= 50 * 2**-15 * reach)
        assert abs(np.mean(np.asarray(got) - np.asarray(expected))) < 1e-5


@strict
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("size", [1e-6, 5e-6, 1e-5])
def test_small_steps_are_not_lost(size, finished):
    """Steps of a thirtieth of a code and more move a weight near 1 in the mean."""
    params = jnp.linspace(1.0, 1.98, 64 * 64).astype(jnp.bfloat16).reshape(64, 64)
    start = params.astype(jnp.float32)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.zeros_like(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    tx = master_weights(constant_step(size), finished=finished)
    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=1000)
    moved = np.mean(np.asarray(master_params(state, params) - start))
    np.testing.assert_allclose(moved, 1000 * size, rtol=0.05)


@strict
def test_published_residual_loses_them():
    """Why rounding is stochastic: FlashOptim's residual stands still."""
    params = jnp.full((64, 64), 1.5, jnp.bfloat16)
    tx = master_weights(constant_step(1e-5), codec="flashoptim")
    params, state = run(tx, params, jnp.zeros_like(params), 1000)
    np.testing.assert_array_equal(master_params(state, params), 1.5)


class TestAdditiveUpdates:
    @pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("relative_step", [1e-4, 1e-2, 1.0])
    def test_residual_belongs_to_the_applied_param(
        self, dtype, grad_dtype, relative_step
    ):
        """In another jit, where XLA cannot keep excess precision, too."""
        weights = jax.random.normal(KEY, (64, 64))
        params = weights.astype(dtype)
        step = relative_step * jax.random.normal(jax.random.key(1), weights.shape)
        step = (step * weights).astype(grad_dtype)
        tx = master_weights(optax.scale(1.0), bits=32, finished=False)
        updates, state = jax.jit(tx.update)(step, tx.init(params), params)
        assert updates.dtype == (dtype if dtype == grad_dtype else "float32")
        applied = jax.jit(optax.apply_updates)(params, updates)
        wanted = np.asarray(params, np.float64) + np.asarray(step, np.float64)
        got = np.asarray(master_params(state, applied), np.float64)
        # Where the param is within half a unit of the weight, the residual makes it
        # exact (to float32's last bit, or float16's 2**-37); elsewhere it halves the
        # miss at least.
        target = np.asarray(jnp.asarray(wanted, jnp.float32).astype(dtype))
        hit = np.asarray(applied) == target
        exact = np.abs(got - wanted) <= np.abs(wanted) * 2**-23 + 2**-36
        assert np.mean(exact[hit]) > 0.999
        missed = np.abs(np.asarray(applied, np.float64) - wanted)
        assert np.all(np.abs(got - wanted)[~hit] < missed[~hit])
        if relative_step <= 1e-2 or grad_dtype == "float32":
            # The rest are ties, which go up here and to even there.
            assert np.mean(hit) > 0.95

    @strict
    def test_in_one_jit_equals_in_two(self):
        params = jax.random.normal(KEY, (64, 64)).astype(jnp.bfloat16)
        grads = jax.random.normal(jax.random.key(1), (64, 64)).astype(jnp.bfloat16)
        # A power of two: no product is rounded, so no compiler can fuse it away.
        tx = master_weights(optax.sgd(0.25), finished=False)

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        together = jax.jit(step)(params, state, grads)
        updates, new_state = jax.jit(tx.update)(grads, state, params)
        apart = jax.jit(optax.apply_updates)(params, updates), new_state
        chex.assert_trees_all_equal(together, apart)
        with jax.disable_jit():
            chex.assert_trees_all_equal(together, step(params, state, grads))


@strict
class TestFromOutside:
    params = {"a": jnp.ones((8, 32), jnp.bfloat16), "b": jnp.ones(8, jnp.float32)}

    def test_new_values_count(self):
        """Params changed between steps: off by half a unit in the last place."""
        tx = master_weights(optax.sgd(0.01))
        params, state = run(tx, self.params, self.params, 10)
        params = jax.tree.map(lambda p: 3 * p, params)
        weights = master_params(state, params)
        error = np.abs(np.asarray(weights["a"]) - np.asarray(params["a"], np.float32))
        assert np.max(error / np.abs(weights["a"])) <= 2**-8
        np.testing.assert_array_equal(weights["b"], params["b"])

    @pytest.mark.parametrize("finished", [False, True])
    def test_changed_params_notices(self, finished):
        tx = master_weights(optax.sgd(0.01), track_params=True, finished=finished)
        # float32 gradients of which the updates of "b" keep every bit
        params, state = run(tx, self.params, self.params, 3)
        assert optax_flash.changed_params(state, params) == []
        other = params["a"].at[3, 5].multiply(2.0)
        assert optax_flash.changed_params(state, params | {"a": other}) == ["a"]
        swapped = params["b"].at[0].set(0.5).at[1].set(0.25)
        again = params["b"].at[1].set(0.5).at[0].set(0.25)
        both = master_weights(optax.sgd(0.01), track_params=True)
        state = both.init(params | {"b": swapped})
        assert optax_flash.changed_params(state, params | {"b": again}) == ["b"]

    def test_set_master_params(self):
        """Sets weights anew, to float32's last bit, inside any wrapper."""
        tx = optax.apply_if_finite(master_weights(optax.sgd(0.01), 32), 3)
        weights = {"a": jax.random.normal(KEY, (8, 32)), "b": self.params["b"]}
        params = optax_flash.cast_params(
            weights, jnp.bfloat16, keep_float32=lambda path, _: path == "b"
        )
        state = optax_flash.set_master_params(tx.init(params), params, weights)
        chex.assert_trees_all_equal(master_params(state, params), weights)


def test_float32_params_are_untouched_by_it():
    params = {"w": jax.random.normal(KEY, (64, 64))}
    grads = {"w": jax.random.normal(jax.random.key(1), (64, 64))}
    expected, _ = run(optax.adam(1e-3), params, grads, 5)
    got, state = run(master_weights(optax.adam(1e-3)), params, grads, 5)
    chex.assert_trees_all_equal(got, expected)
    assert state.residual["w"] == optax.MaskedNode()


@strict
def test_schedule_free_starts_from_the_weights():
    """An inner state that copies the params sees float32 weights."""
    tx = master_weights(optax.contrib.schedule_free_sgd(0.1))
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    state = tx.init(params)
    assert state.inner_state.z["w"].dtype == jnp.float32
    params, state = run(tx, params, params, 5)
    assert np.all(np.asarray(master_params(state, params)["w"]) < 1.0)


def test_a_learning_rate_inside_trains_as_stock_optax_does():
    """Where it belongs: behind it, it raises, or with additive updates harms."""
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=(64, 64)), jnp.float32) for _ in range(2))

    def loss(weights):
        return jnp.mean((x @ weights - x @ target) ** 2)

    def train(tx, params, weights_of):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(loss)(weights_of(state, params)).astype(params.dtype)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, (params, tx.init(params)), length=300)
        params, state = carry
        return float(loss(weights_of(state, params)))

    zeros = jnp.zeros((64, 64))
    rate = optax.scale_by_learning_rate(0.01)
    stock = train(optax.chain(optax.scale_by_adam(), rate), zeros, lambda _, p: p)
    adam8, half = optax_flash.scale_by_adam8(), zeros.astype(jnp.bfloat16)
    inside = train(master_weights(optax.chain(adam8, rate)), half, master_params)
    assert abs(inside / stock - 1) < 0.05, (inside, stock)
    additive = optax.chain(master_weights(adam8, finished=False), rate)
    assert train(additive, half, master_params) > 2 * stock
    with pytest.raises(TypeError, match="outermost"):
        train(optax.chain(master_weights(adam8), rate), half, master_params)
