"""Schedules that compute with NumPy: outside of jit they run, as they do in optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from tests.tiers import quick


def in_numpy(count):
    return float(np.interp(count, [0, 3], [1e-2, 1e-3]))


def in_jax(count):
    return jnp.interp(count, jnp.asarray([0.0, 3.0]), jnp.asarray([1e-2, 1e-3]))


def branching(count):
    return 1e-2 if count < 2 else 1e-3


def by_index(count):
    return [1e-2, 1e-3, 1e-4, 1e-5][int(count)]


def inside(schedule):
    """inject_hyperparams calls its schedules in init already."""
    inject = optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32)
    return optax_flash.compress(inject(schedule))


MAKE = {
    "adamw8": optax_flash.adamw8,
    "lion8": optax_flash.lion8,
    "low rank": lambda schedule: optax_flash.lora_pre_adamw(schedule, rank=4),
    "master_weights": lambda schedule: optax_flash.master_weights(
        optax_flash.adamw8(schedule)
    ),
    "inject_hyperparams": inside,
}


def random(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(64, 128)), dtype), "b": jnp.ones(8)}


def train(tx, update):
    params = random(0)
    state = tx.init(params)
    for seed in range(3):
        updates, state = update(random(seed + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


def eager(tx):
    def update(grads, state, params):
        with pytest.warns(UserWarning, match="slow.*np.interp.*jnp.interp") as found:
            result = tx.update(grads, state, params)
        assert len(found) == 1
        return result

    return update


@pytest.mark.parametrize("name", quick(["adamw8", "master_weights"], MAKE))
def test_numpy_runs_outside_of_jit(name):
    make = MAKE[name]
    tx, expected = make(in_numpy), make(in_jax)
    found = train(tx, eager(tx))
    # Rounding at random by the same bits; only XLA's order of operations differs.
    chex.assert_trees_all_close(found, train(expected, expected.update), atol=2e-3)
    if name == "adamw8":
        stock = train(optax.adamw(in_numpy), optax.adamw(in_numpy).update)
        chex.assert_trees_all_close(found, stock, atol=2e-3)


@pytest.mark.parametrize("schedule", [branching, by_index])
def test_python_runs_outside_of_jit(schedule):
    stock, tx = optax.adamw(schedule), optax_flash.adamw8(schedule)
    expected = train(stock, stock.update)
    chex.assert_trees_all_close(train(tx, eager(tx)), expected, atol=2e-3)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("schedule", [in_numpy, branching, by_index])
def test_under_jit_the_error_says_what_to_do(make, schedule):
    tx = make(schedule)
    params = random(0)
    state = tx.init(params)
    with pytest.raises(TypeError, match="cannot be traced: a schedule.*jax.numpy"):
        jax.jit(tx.update)(params, state, params)


def test_a_kernel_that_was_asked_for_is_not_replaced():
    tx = optax_flash.adamw8(in_numpy, implementation="interpret")
    params = random(0)
    with pytest.raises(TypeError, match="implementation='interpret' does not fit"):
        tx.update(params, tx.init(params), params)


def limited(updates, params):
    del params
    largest = max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(updates))
    return jax.tree.map(lambda u: u / max(1.0, largest), updates)


def test_what_is_computed_has_no_value_in_a_trace_around_the_update():
    tx = optax_flash.compress(
        optax.chain(optax.trace(0.9), optax.stateless(limited), optax.scale(-0.1))
    )
    params = random(0)
    state = tx.init(params)
    stock = optax.chain(optax.trace(0.9), optax.stateless(limited), optax.scale(-0.1))
    expected = train(stock, stock.update)
    chex.assert_trees_all_close(train(tx, eager(tx)), expected, atol=2e-3)
    with pytest.raises(TypeError, match="cannot be traced"):
        jax.jit(lambda: tx.update(params, state, params)[0])()


def test_other_errors_are_left_alone():
    def broken(count):
        raise TypeError("of the schedule's own")

    tx = optax_flash.adamw8(broken)
    params = random(0)
    with pytest.raises(TypeError, match="of the schedule's own"):
        tx.update(params, tx.init(params), params)


def test_error_feedback_is_left_out_and_the_warning_says_so():
    in_codes = optax_flash.compress(optax.adamw(in_numpy), error_feedback=True)
    for tx in (optax_flash.adamw4(in_numpy), in_codes):
        with pytest.warns(UserWarning, match="without error feedback, one operation"):
            found = train(tx, tx.update)
        stock = optax.adamw(in_numpy)
        expected = train(stock, stock.update)
        chex.assert_trees_all_close(found, expected, atol=1e-2)
    plain = optax_flash.compress(optax.adamw(in_numpy), error_feedback=False)
    with pytest.warns(UserWarning) as warned:
        chex.assert_trees_all_equal(found, train(plain, plain.update))
    assert not any("feedback" in str(x.message) for x in warned)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_explain_says_that_the_update_cannot_be_traced(make):
    tx = make(in_numpy)
    if make is inside:
        with pytest.raises(TypeError, match="traced update, and this one cannot"):
            optax_flash.explain(tx, random(0))
        return
    (w, b) = optax_flash.explain(tx, random(0)).paths[::-1]
    assert (w.params, b.params) == (("w",), ("b",))
    assert w.implementation == "xla"
    assert "cannot be traced" in w.reason and "not under jit" in w.reason
