"""Adafactor with its momentum in codes, against optax's in float32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_flash import compress, master_weights
from optax_flash.codecs.registry import get_codec
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")

LEARNING_RATE, MOMENTUM = 0.01, 0.9
# optax factors the first, and keeps all of the second moment of the others.
SHAPES = {"kernel": (128, 256), "narrow": (64, 256), "norm": (128,)}
FACTORED = optax.adafactor(LEARNING_RATE, momentum=MOMENTUM)
# The widest gap between codes on square curves of 127 and of 7 steps, of the largest.
GAP = {"companded8": 2 / 127, "companded4": 13 / 49}


def make(seed, dtype=jnp.bfloat16):
    """The same numbers in every dtype that holds bfloat16."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(dtype)
        for name, shape in SHAPES.items()
    }


def run(tx, dtype, steps=20):
    params = make(0, dtype)
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(1, steps + 1):
        updates, state = update(make(seed, dtype), state, params)
    return updates, state


@pytest.fixture(
    params=quick(["companded4"], ["companded8", "companded4"]), name="codecs"
)
def codecs_fixture(request):
    return request.param


def decoded(codecs, state, field, name, signed):
    codec = get_codec(codecs)
    codec = type(codec)(signed=signed)
    codes = optax.tree.get(state, field)[name]
    scales = optax.tree.get(state, "scales")[f"{field}_scales"][name]
    return codec.decode(codes, scales, SHAPES[name])


@pytest.mark.parametrize(
    "wrap",
    [lambda tx: tx, lambda tx: master_weights(tx, finished=False)],
    ids=["", "master"],
)
def test_averages_of_rows_and_columns_are_those_of_float32(wrap, codecs):
    _, exact = run(FACTORED, jnp.float32)
    _, state = run(wrap(compress(FACTORED, codecs)), jnp.bfloat16)
    for field in ("v_row", "v_col"):
        expected = optax.tree.get(exact, field)["kernel"]
        x = optax.tree.get(state, field)["kernel"]
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, expected, rtol=1e-5)
    # Outside of them optax keeps what it gets: averages in bfloat16.
    assert FACTORED.init(make(0))[0].v_row["kernel"].dtype == jnp.bfloat16


def test_small_leaves_are_those_of_float32(codecs):
    updates, _ = run(compress(FACTORED, codecs), jnp.float32)
    expected, _ = run(FACTORED, jnp.float32)
    chex.assert_trees_all_close(updates["norm"], expected["norm"], rtol=1e-5)


def test_momentum_is_that_of_float32_but_for_rounding(codecs):
    _, exact = run(FACTORED, jnp.float32)
    _, state = run(compress(FACTORED, codecs), jnp.float32)
    expected = optax.tree.get(exact, "ema")["kernel"]
    error = decoded(codecs, state, "ema", "kernel", signed=True) - expected
    largest = jnp.max(jnp.abs(expected.reshape(-1, 32)), axis=-1)
    # A stochastic rounding has a variance of at most gap**2 / 4, and the average holds
    # each for sum(MOMENTUM**2k) of it.
    noise = GAP[codecs] / 2 * (1 - MOMENTUM**2) ** -0.5
    share = jnp.std(error.reshape(-1, 32), axis=-1) / largest
    assert jnp.sqrt(jnp.mean(share**2)) < noise
    # And it is no bias.
    bias = jnp.mean(error / jnp.repeat(largest, 32).reshape(error.shape))
    assert jnp.abs(bias) < 4 * noise / error.size**0.5


@pytest.mark.parametrize("name", ["kernel", "narrow"])
def test_steps_are_as_large_as_those_of_float32(name, codecs):
    def rms(x):
        return float(jnp.sqrt(jnp.mean(x**2)))

    # Those of the momentum: error feedback adds to a single step what it owes.
    tx = compress(FACTORED, codecs, error_feedback=False)
    updates, _ = run(tx, jnp.float32)
    expected, _ = run(FACTORED, jnp.float32)
    # Rounding in 4 bits adds noise to the momentum, and so to steps of mere noise.
    tolerance = {"companded8": 0.01, "companded4": 0.1}[codecs]
    assert rms(updates[name]) == pytest.approx(rms(expected[name]), rel=tolerance)
    # What enters the momentum is clipped to an RMS of 1, then scaled by the param's.
    scale = LEARNING_RATE * rms(make(0, jnp.float32)[name])
    assert rms(updates[name]) < scale


def test_a_zero_gradient_makes_no_step(codecs):
    tx, zeros = compress(FACTORED, codecs), jax.tree.map(jnp.zeros_like, make(0))
    state = tx.init(make(0))
    for _ in range(2):
        updates, state = jax.jit(tx.update)(zeros, state, make(0))
    chex.assert_trees_all_equal(updates, zeros)


def test_named_averages_are_unsigned():
    tx = compress(FACTORED, {"v_row": "companded8"}, min_size=1)
    updates, state = run(tx, jnp.float32)
    expected, exact = run(FACTORED, jnp.float32)
    x = optax.tree.get(state, "v_row")["kernel"]
    assert x.dtype == jnp.uint8
    scales = state.scales["v_row_scales"]["kernel"]
    row = type(get_codec("companded8"))(signed=False).decode(x, scales, (128,))
    # The unsigned curve has 255 steps of a fourth power: 4 / 255 at most.
    np.testing.assert_allclose(row, exact[0].v_row["kernel"], rtol=0.1)
    assert optax.tree.get(state, "v_col")["kernel"].dtype == jnp.float32
