"""Derivatives through updates go straight through codes and split weights."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optax_flash
from tests.tiers import quick

SHAPE = (32, 32)
KEYS = jax.random.split(jax.random.key(0), 4)
WEIGHT = jax.random.uniform(KEYS[0], SHAPE, minval=0.5, maxval=1.5)
TARGET = 2.0 * jnp.sign(jax.random.normal(KEYS[1], SHAPE))
MIX = jax.random.normal(KEYS[2], SHAPE) / 8
START = jax.random.normal(KEYS[3], SHAPE) / 8
STOCK = {
    "sgd": lambda lr: optax.sgd(lr, momentum=0.9),
    "nesterov": lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": lambda lr: optax.adamw(lr, weight_decay=0.1),
}


def compressed(name, bits=8):
    codecs = f"companded{bits}"
    return lambda lr: optax_flash.compress(STOCK[name](lr), codecs, min_size=256)


def weights(make, **kwargs):
    return lambda lr: optax_flash.master_weights(make(lr), **kwargs)


def flashoptim(lr):
    return optax_flash.master_weights(STOCK["sgd"](lr), codec="flashoptim")


CASES = {
    "sgd8": ("sgd", compressed("sgd"), jnp.float32),
    "nesterov8": ("nesterov", compressed("nesterov"), jnp.float32),
    "adam8": ("adam", compressed("adam"), jnp.float32),
    "adamw8": ("adamw", compressed("adamw"), jnp.float32),
    "sgd4": ("sgd", compressed("sgd", 4), jnp.float32),
    "adam4": ("adam", compressed("adam", 4), jnp.float32),
    "24 bits": ("sgd", weights(STOCK["sgd"]), jnp.bfloat16),
    "32 bits": ("adam", weights(STOCK["adam"], bits=32), jnp.bfloat16),
    "finished": (
        "adamw",
        weights(compressed("adamw"), finished=True),
        jnp.bfloat16,
    ),
    "finished, 32 bits": (
        "sgd",
        weights(compressed("sgd"), bits=32, finished=True),
        jnp.float16,
    ),
    "float16": ("adamw", weights(compressed("adamw")), jnp.float16),
    "flashoptim": ("sgd", flashoptim, jnp.bfloat16),
}


def inner_loss(params):
    p = params.astype(jnp.float32)
    return 0.5 * jnp.sum(WEIGHT * (p - TARGET) ** 2) + jnp.sum(jnp.cos(MIX @ p))


def outer_loss(params):
    # Adam moves params by the signs of their gradients; what moves must not cancel.
    p = jnp.sign(TARGET) * params.astype(jnp.float32)
    return jnp.sum(WEIGHT * jnp.sin(0.5 * p))


def step(tx, params, state):
    updates, state = tx.update(jax.grad(inner_loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def train(make, params, lr, steps=3):
    tx = make(lr)
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(tx, params, state)
    return outer_loss(params)


def straight_through(stock, make, params, lr):
    """The loss whose derivatives are stock optax's, at the values that ours has."""
    still = jax.lax.stop_gradient
    ours, tx = still(params), make(still(lr))
    state = tx.init(ours)
    weights, plain = params.astype(jnp.float32), stock(lr)
    plain_state = plain.init(weights)

    def move(x, to):
        return x + still(to - x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    for _ in range(3):
        weights, plain_state = step(plain, weights, plain_state)
        ours, state = step(tx, ours, state)
        values = optax_flash.to_optax_state(tx, state, ours)
        weights, plain_state = jax.tree.map(move, (weights, plain_state), values)
    return outer_loss(weights)


def gradient(loss, *args):
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(*args)


def distance(found, expected):
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def rate(name):
    return jnp.float32(1e-2)


@pytest.mark.parametrize("case", quick(["sgd8", "adam4", "finished"], CASES))
def test_they_are_those_of_stock_optax_within_one_percent(case):
    name, make, dtype = CASES[case]
    lr = rate(name)
    found, stock = (
        gradient(lambda p, lr, make=make: train(make, p, lr), start, lr)
        for make, start in ((make, START.astype(dtype)), (STOCK[name], START))
    )
    errors = [distance(*pair) for pair in zip(found, stock, strict=True)]
    # In 4 bits momenta lag, which error feedback makes up for in the values. So the
    # derivative by the rate, minus the sum of directions, is up to 3 % smaller.
    by_rate = 0.03 if case.endswith("4") else 0.01
    assert errors[0] <= 0.01 and errors[1] <= by_rate


@pytest.mark.full
def test_at_the_values_of_the_run_they_are_exact():
    failures = []
    for case in ("nesterov8", "adamw8", "sgd4", "adam4", "finished", "float16"):
        name, make, dtype = CASES[case]
        start = START.astype(dtype)
        found = gradient(lambda p, lr, make=make: train(make, p, lr), start, rate(name))
        expected = gradient(
            lambda p, lr, make=make, stock=STOCK[name]: straight_through(
                stock, make, p, lr
            ),
            *(start, rate(name)),
        )
        limit = 1e-5 if dtype == jnp.float32 else 1e-2
        errors = [distance(*pair) for pair in zip(found, expected, strict=True)]
        if max(errors) > limit:
            failures.append(f"{case}: {errors}")
    assert not failures, failures


@pytest.mark.parametrize("case", quick(["sgd8"], ["sgd8", "finished"]))
def test_forward_reverse_and_batched_agree(case):
    _, make, dtype = CASES[case]
    start = START.astype(dtype)
    batch = jnp.stack([start, 2 * start])

    def loss(params):
        return train(make, params, 1e-2)

    backward = jax.jit(jax.grad(loss))(start)
    toward = jnp.sign(TARGET).astype(dtype)
    _, forward = jax.jit(lambda p: jax.jvp(loss, (p,), (toward,)))(start)
    expected = jnp.sum((toward * backward).astype(jnp.float32))
    np.testing.assert_allclose(forward, expected, rtol=1e-2)
    of_each = jax.jit(jax.vmap(jax.grad(loss)))(batch)
    of_sum = jax.jit(jax.grad(lambda p: jnp.sum(jax.vmap(loss)(p))))(batch)
    limit = 1e-6 if dtype == jnp.float32 else 1e-2
    assert distance(of_each[0], backward) < limit
    assert distance(of_sum, of_each) < limit


@pytest.mark.full
def test_second_derivatives_are_those_of_stock_optax():
    def curvature(make):
        def slope(lr):
            return jax.grad(lambda lr: train(make, START, lr))(lr)

        return jax.jit(jax.grad(slope))(1e-2)

    expected = curvature(STOCK["nesterov"])
    np.testing.assert_allclose(curvature(compressed("nesterov")), expected, rtol=0.01)


def carrying(make):
    """Three steps in a scan, from a state that carries derivatives."""

    def loss(params, lr):
        tx = make(lr)
        state = optax_flash.differentiable(tx, tx.init(params), params)
        (params, state), _ = jax.lax.scan(
            lambda carry, _: (step(tx, *carry), None), (params, state), length=3
        )
        return outer_loss(params)

    return loss


@pytest.mark.parametrize("case", quick(["finished"], ["sgd8", "adam4", "finished"]))
def test_a_state_that_carries_them_works_inside_of_scan(case):
    name, make, dtype = CASES[case]
    start = START.astype(dtype), rate(name)
    found = gradient(carrying(make), *start)
    expected = gradient(lambda p, lr: train(make, p, lr), *start)
    for pair in zip(found, expected, strict=True):
        assert distance(*pair) < (1e-5 if dtype == jnp.float32 else 1e-2)


def test_a_state_that_carries_them_works_inside_of_multi_steps():
    def accumulating(make):
        return lambda lr: optax.MultiSteps(make(lr), 1).gradient_transformation()

    found = gradient(carrying(accumulating(compressed("sgd"))), START, 1e-2)
    expected = gradient(lambda p, lr: train(STOCK["sgd"], p, lr), START, 1e-2)
    for pair in zip(found, expected, strict=True):
        assert distance(*pair) < 0.01


def test_where_an_update_cannot_see_it_an_error_says_what_to_do():
    tx = compressed("sgd")(1e-2)
    state = tx.init(START)
    jitted = jax.jit(lambda params, state: step(tx, params, state))

    def loss(params, state=state):
        return outer_loss(jitted(params, state)[0])

    with pytest.raises(ValueError, match="jax.jit outside of jax.grad"):
        jax.grad(loss)(START)
    with pytest.raises(ValueError, match=r"optax_flash.differentiable\(tx, state, p"):
        jax.grad(loss)(START)
    carrying = optax_flash.differentiable(tx, state, START)
    assert (
        distance(
            jax.grad(lambda p: loss(p, carrying))(START),
            jax.grad(lambda p: train(compressed("sgd"), p, 1e-2, steps=1))(START),
        )
        < 1e-6
    )


@pytest.mark.full
def test_values_are_those_of_an_update_that_is_not_differentiated():
    for case in ("sgd8", "adam4", "finished"):
        _, make, dtype = CASES[case]
        start, tx = START.astype(dtype), make(1e-2)
        step_of = lambda p, s, tx=tx: step(tx, p, s)  # noqa: E731
        state = tx.init(start)
        for _ in range(2):
            params, new = jax.jit(step_of)(start, state)
            (moved_params, moved), _ = jax.jit(
                lambda p, s, f=step_of: jax.jvp(lambda p: f(p, s), (p,), (p,))
            )(start, state)
            moved = optax.tree.set(moved, carried=None)
            for a, b in zip(
                jax.tree.leaves((params, new)),
                jax.tree.leaves((moved_params, moved)),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b, err_msg=case)
            start, state = params, new


def test_without_derivatives_a_step_has_nothing_for_them():
    tx = weights(compressed("adamw"), finished=False)(1e-2)
    params = START.astype(jnp.bfloat16)
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(tx.update)(params, state, params)
    assert len(jaxpr.jaxpr.outvars) == 1 + len(jax.tree.leaves(state))
    assert optax.tree.get(tx.update(params, state, params)[1], "carried") is None
    text = str(jaxpr)
    for name in ("_look", "_zeros", "_first", "stop_gradient"):
        assert name not in text, name


def test_kernels_compute_the_values_and_xla_the_derivatives():
    def interpreted(lr):
        return optax_flash.compress(
            STOCK["sgd"](lr), min_size=256, implementation="interpret"
        )

    found = gradient(lambda p, lr: train(interpreted, p, lr, 2), START, 1e-2)
    expected = gradient(lambda p, lr: train(compressed("sgd"), p, lr, 2), START, 1e-2)
    for pair in zip(found, expected, strict=True):
        assert distance(*pair) < 1e-5


def test_params_without_gradients_are_no_hindrance():
    """Their state stays; the others' begins to carry derivatives at once."""

    def final(make):
        tx = optax.masked(make(0.05), {"moved": True, "still": False})

        def loss(scale):
            params = {"moved": scale * START, "still": scale * MIX}
            state = tx.init({"moved": START, "still": MIX})
            for _ in range(3):
                grads = jax.grad(lambda p: inner_loss(p["moved"]))(params)
                updates, state = tx.update(grads, state, params)
                moved = optax.apply_updates(params["moved"], updates["moved"])
                params = params | {"moved": moved}
            return outer_loss(params["moved"])

        return jax.grad(loss)(1.0)

    found, expected = final(compressed("adam")), final(STOCK["adam"])
    np.testing.assert_allclose(found, expected, rtol=0.01)


@pytest.mark.full
def test_factors_in_codes_carry_them_too():
    def low_rank(lr, min_size=64):
        adam = optax_flash.scale_by_lora_pre(rank=4)
        return optax.chain(
            optax_flash.compress(adam, min_size=min_size), optax.scale(-lr)
        )

    def uncompressed(lr):
        return low_rank(lr, min_size=10**9)

    found = gradient(lambda p, lr: train(low_rank, p, lr), START, 1e-2)
    expected = gradient(lambda p, lr: train(uncompressed, p, lr), START, 1e-2)
    assert distance(found[0], expected[0]) < 0.02


def test_rounding_to_half_precision_goes_straight_through():
    def loss(params):
        half = optax_flash.cast_params(params, jnp.bfloat16)
        state = optax_flash.master_weights(optax.sgd(0.1)).init(half)
        return jnp.sum(WEIGHT * optax_flash.master_params(state, half))

    assert distance(jax.grad(loss)(START), WEIGHT) < 1e-2


def test_a_state_that_carries_derivatives_is_a_state_like_any_other():
    tx = optax.chain(compressed("adamw")(1e-2), optax.identity())
    params = {"w": START, "b": jnp.ones(4)}
    plain = tx.init(params)
    state = optax_flash.differentiable(tx, plain, params)
    carried = state[0].carried
    assert set(carried) == {"mu_carried", "nu_carried"}
    assert carried["mu_carried"]["b"] is None
    np.testing.assert_array_equal(carried["nu_carried"]["w"], jnp.zeros(SHAPE))
    assert optax_flash.differentiable(tx, state, params) is not plain
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    dropped = optax.tree.set(state, carried=None)
    assert jax.tree.structure(dropped) == jax.tree.structure(plain)
    specs = optax.tree_map_params(
        tx,
        lambda _, spec: spec,
        plain,
        {"w": P("x"), "b": P()},
        transform_non_params=lambda _: P(),
    )
    assert specs[0].carried is None
    kept, inner = optax_flash.to_optax_state(tx, state, params)
    np.testing.assert_array_equal(kept["w"], params["w"])
    assert optax.tree.get(inner, "mu")["w"].dtype == jnp.float32
    with pytest.raises(ValueError, match="another structure"):
        optax_flash.differentiable(tx, (), params)
