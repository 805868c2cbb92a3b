"""Error feedback: what rounding adds to momenta does not add up in the params."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_flash
from tests.tiers import quick

SHAPE = (64, 64)
CODEC = optax_flash.Companded4(signed=True)


@jax.jit
def gradients(step, spread=1.0):
    """Noise around a mean, of another size in each place of a group."""
    sizes = jnp.tile(spread ** jnp.linspace(-1, 0, 32), 2)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), SHAPE)
    return sizes * (0.3 + noise)


@functools.partial(jax.jit, static_argnums=0)
def train(tx, steps, spread=1.0):
    """Params, from ones, and state after as many steps."""

    def step(i, carry):
        params, state = carry
        updates, state = tx.update(gradients(i, spread), state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.ones(SHAPE)
    return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))


@functools.cache
def sgd(decay, nesterov):
    """Compiled once for all lengths of a run."""
    return optax_flash.compress(optax.sgd(1.0, decay, nesterov), CODEC)


def decoded(state, field):
    codec = dataclasses.replace(CODEC, signed=field != "nu")
    scales = optax.tree.get(state, f"{field}_scales")
    return codec.decode(optax.tree.get(state, field), scales, SHAPE)


def one_update(inner, steps=3, **options):
    """The last of some updates, and the state after it."""
    tx = optax_flash.compress(inner, CODEC, **options)
    update = jax.jit(tx.update)
    params = jnp.ones(SHAPE)
    updates, state = None, tx.init(params)
    for i in range(steps):
        updates, state = update(gradients(i), state, params)
    return updates, state


@settings(max_examples=20, deadline=None)
@given(
    decay=st.sampled_from([0.5, 0.9, 0.99]),
    nesterov=st.booleans(),
    spread=st.sampled_from([1.0, 100.0]),
    steps=st.integers(1, 60),
)
def test_sgd_lacks_only_what_its_momentum_holds(decay, nesterov, spread, steps):
    """All gradients over (1 - decay), however the momentum was rounded."""
    params, state = train(sgd(decay, nesterov), steps, spread)
    total = sum(np.float64(gradients(i, spread)) for i in range(steps))
    held = np.float64(decoded(state, "trace")) * decay ** (2 if nesterov else 1)
    exact = 1 - (total - held) / (1 - decay)
    largest = np.abs(exact).max() + np.abs(held).max() / (1 - decay)
    np.testing.assert_allclose(params, exact, atol=1e-6 * steps * largest)


@pytest.mark.parametrize(
    "inner, spread",
    [
        (optax.adam(1e-3), 10.0),
        pytest.param(optax.adam(1e-3), 1.0, marks=pytest.mark.full),
        pytest.param(optax.nadam(1e-3), 10.0, marks=pytest.mark.full),
    ],
    ids=["adam, spread", "adam", "nadam, spread"],
)
def test_errors_do_not_add_up(inner, spread):
    """After 400 steps params are at least twice as near to those of float32."""
    exact, _ = train(inner, 400, spread)
    codecs = {"mu": CODEC, "nu": None}

    def distance(error_feedback):
        tx = optax_flash.compress(inner, codecs, error_feedback=error_feedback)
        return jnp.linalg.norm(train(tx, 400, spread)[0] - exact)

    assert distance(True) < 0.5 * distance(False)


@pytest.mark.parametrize("normed", [False, True])
def test_an_update_makes_up_for_all_later_ones(normed):
    """By Adam's formulas in float64; where elements mix, norms count as given."""
    b1, b2, eps, steps = 0.9, 0.999, 1e-8, 3
    inner = optax.scale_by_adam(b1, b2, eps)
    if normed:
        inner = optax.chain(inner, optax.scale_by_trust_ratio())
    found, state = one_update(inner, steps)
    _, before = one_update(inner, steps - 1)
    g = np.float64(gradients(steps - 1))
    m = b1 * np.float64(decoded(before, "mu")) + (1 - b1) * g
    v = b2 * np.float64(decoded(before, "nu")) + (1 - b2) * g**2
    next_v = b2 * np.float64(decoded(state, "nu")) + (1 - b2) * g**2
    error = np.float64(decoded(state, "mu")) - m

    def divisor(v, step):
        return (1 - b1**step) * (np.sqrt(v / (1 - b2**step)) + eps)

    now = b1 / divisor(v, steps)
    later = np.minimum(b1 / divisor(next_v, steps + 1), now)
    with_time = np.minimum(b1 / divisor(v, steps + 1), now)
    gain = later / (1 - b1 * with_time / now)
    exact = m / divisor(v, steps)
    ratio = np.linalg.norm(np.ones(SHAPE)) / np.linalg.norm(exact) if normed else 1
    largest = np.abs(exact).reshape(-1, 32).max(-1).repeat(32).reshape(SHAPE)
    expected = ratio * np.clip(exact - gain * error, -2 * largest, 2 * largest)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def by_element_nowhere():
    """Transformations whose updates depend on no momentum element by element."""
    return {
        "lion": optax.lion(1e-3),
        "muon": optax.contrib.muon(1e-3),
        "cond": optax.apply_if_finite(optax.sgd(1e-3, 0.9), 3),
        "undamped": optax.sgd(1e-3, 1.0),
    }


@pytest.mark.parametrize("name", by_element_nowhere())
def test_nothing_is_taken_off(name):
    inner = by_element_nowhere()[name]
    chex.assert_trees_all_equal(
        one_update(inner), one_update(inner, error_feedback=False)
    )


@pytest.mark.parametrize(
    "codec, default", [("companded4", True), ("companded8", False)]
)
def test_default_is_for_four_bits(codec, default):
    def updates(error_feedback):
        tx = optax_flash.compress(
            optax.sgd(1e-3, 0.9), codec, error_feedback=error_feedback
        )
        return train(tx, 5)

    chex.assert_trees_all_equal(updates(None), updates(default))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(updates(None), updates(not default))


@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(1e-3),
        pytest.param(optax.sgd(1e-3, 0.9), marks=pytest.mark.full),
        pytest.param(optax.contrib.ademamix(1e-3), marks=pytest.mark.full),
    ],
    ids=["adamw", "sgd", "ademamix"],
)
def test_kernels_make_up_for_the_same(inner):
    plain, state = one_update(inner, implementation="xla")
    kernel, state_of_kernel = one_update(inner, implementation="interpret")
    chex.assert_trees_all_equal(state, state_of_kernel)
    np.testing.assert_allclose(kernel, plain, rtol=1e-5, atol=1e-9)


def test_master_weights_get_it():
    """With the residual, params in bfloat16 follow those in float32."""
    inner = optax_flash.compress(optax.sgd(1e-3, 0.9), CODEC)
    expected, _ = train(inner, 50)
    tx = optax_flash.master_weights(inner, bits=32, finished=False)
    params = jnp.ones(SHAPE, jnp.bfloat16)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(50):
        updates, state = update(gradients(i), state, params)
        params = optax.apply_updates(params, updates)
    found = optax_flash.master_params(state, params)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def decaying(inner, steps=20):
    """Weights at every step of decay through the optimizer, without gradients."""
    tx = optax.chain(optax.add_decayed_weights(0.1), inner)
    start = 0.1 * jax.random.normal(jax.random.key(0), (64, 128))

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            zeros = jnp.zeros_like(params)
            updates, state = tx.update(zeros, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1]

    return np.stack([start, *run(start)])


DECAYING = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(3e-3),
    "nadam": optax.nadam(3e-3),
    "adan": optax.adan(3e-3),
    "adabelief": optax.adabelief(3e-3),
    "amsgrad": optax.amsgrad(3e-3),
    "rmsprop": optax.rmsprop(1e-3, momentum=0.9),
}


@pytest.mark.parametrize(
    "name, codecs",
    quick(
        [("sgd", "companded4"), ("adam", "companded4")],
        [
            *((name, "companded4") for name in DECAYING),
            ("adam", {"mu": CODEC, "nu": "companded8"}),
            ("adam", "affine4"),
            ("sgd", "affine4"),
        ],
    ),
)
def test_decay_moves_no_weight_away_from_zero(name, codecs):
    """Of those that float32 brings nearer to zero in every step, never across."""
    exact = decaying(DECAYING[name])
    found = np.abs(decaying(optax_flash.compress(DECAYING[name], codecs)))
    stays = (np.sign(exact) == np.sign(exact[0])).all(0)
    shrinks = stays & (np.diff(np.abs(exact), axis=0) <= 0).all(0)
    assert np.mean(shrinks) > 0.1
    assert not np.any(found[:, shrinks] > found[0, shrinks] * (1 + 1e-6))


@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(1e-2),
        optax.adan(1e-2),
        optax.lion(1e-3),
        optax.rmsprop(1e-3, momentum=0.9),
    ],
    ids=["adamw", "adan", "lion", "rmsprop"],
)
@pytest.mark.parametrize("codecs", ["companded8", "companded4"])
@pytest.mark.full
def test_the_minimum_of_rosenbrock_is_found_and_kept(inner, codecs):
    """At a constant rate: in the median of the last 1,000 steps, and at last."""
    tx = optax_flash.compress(inner, codecs, min_size=1)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(rosenbrock)(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), jnp.abs(params - 1.0).max()

        return jax.lax.scan(step, (params, tx.init(params)), length=10_000)[1]

    distances = run(jnp.zeros(2))
    assert distances[-1] < 0.03 and np.median(distances[-1000:]) < 0.03


def rosenbrock(params):
    x, y = params
    return (1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2
