"""The five failures of 8-bit optimizers, each against fp32 optax on the same gradients.

A deterministic rounding undoes every change below half a code, so averages freeze; a
float16 scale loses tiny gradients; one outlier makes its neighbours' variance zero;
weights stand still under small steps. The default must have none of these. That the
published format has them shows that these tests can fail.

    python tests/test_failures.py

prints what was measured, for the table in docs/numerics.md.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from tests.tiers import quick

SHAPE = (64, 64)  # 4,096 elements, the smallest leaf that is compressed
KEY = jax.random.key(0)


class Bounds(NamedTuple):
    """How far a codec may be from fp32."""

    moments: float = 0.10  # of v and m, in the mean
    m_left: float = 1e-3  # of a momentum that is over, by its group's largest
    rms: float = 0.10  # of the update
    rms_beside_outlier: float = 0.20
    largest_beside_outlier: float = 3.0
    movement: float = 0.05  # of weights under small steps


CODECS = {
    "companded8": Bounds(),
    # Codes of 4 bits reach down 7 octaves, and the outlier's v is 16 octaves higher:
    # its neighbours' steps are too small there, never too large.
    "companded4": Bounds(
        rms=0.4, rms_beside_outlier=0.8, largest_beside_outlier=1.0, movement=0.06
    ),
}
PUBLISHED = ("flashoptim", "xla")


@pytest.fixture(params=CODECS, name="codec")
def codec_fixture(request):
    return request.param


@pytest.fixture(name="bounds")
def bounds_fixture(codec):
    return CODECS[codec]


@pytest.fixture(params=quick(["xla"], ["xla", "interpret"]), name="implementation")
def implementation_fixture(request):
    """Plain JAX, and the kernel in an interpreter."""
    return request.param


def in_groups(first, others):
    """One value in the first place of each group of 32, another in the others."""
    x = np.full(SHAPE, others, np.float32)
    x[:, ::32] = first
    return jnp.asarray(x)


OTHERS = np.asarray(in_groups(0.0, 1.0)) == 1


@functools.cache
def adam(codec, implementation, b1):
    """Adam's direction; in fp32, by optax, where the codec is None.

    It is the one that the state tells: without what updates make up for, which says
    nothing by itself (tests/test_error_feedback.py).
    """
    inner = optax.scale_by_adam(b1=b1)
    if codec is None:
        return inner
    return optax_flash.compress(
        inner, codec, error_feedback=False, implementation=implementation
    )


@functools.partial(jax.jit, static_argnums=0)
def advance(tx, state, steps, constant, noise):
    """The state after as many steps, and the last update.

    Args:
      tx: the transformation.
      state: its state.
      steps: the first step and the one after the last.
      constant: what all gradients have in common.
      noise: the standard deviation of what they do not.
    """

    def step(i, carry):
        grads = constant + noise * jax.random.normal(jax.random.fold_in(KEY, i), SHAPE)
        updates, state = tx.update(grads, carry[0])
        return state, updates

    return jax.lax.fori_loop(*steps, step, (state, jnp.zeros(SHAPE)))


def run(codec, implementation, phases, b1=0.9):
    """``(update, m, v)`` after phases of ``(steps, constant, noise)``."""
    tx = adam(codec, implementation, b1)
    state = tx.init(jnp.zeros(SHAPE))
    update, start = None, 0
    for steps, *gradients in phases:
        state, update = advance(tx, state, (start, start + steps), *gradients)
        start += steps
    return tuple(map(np.asarray, (update, *(moment(codec, state, x) for x in MOMENTS))))


MOMENTS = ("mu", "nu")


def moment(codec, state, field):
    x = optax.tree.get(state, field)
    if codec is None:
        return x
    codec = dataclasses.replace(optax_flash.get_codec(codec), signed=field == "mu")
    return codec.decode(x, optax.tree.get(state, f"{field}_scales"), SHAPE)


def rms(x):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64)))


# --- v


@functools.cache
def after_a_shift(codec, implementation):
    """Gradients shrink tenfold but for one in each group; 4,000 steps later."""
    zero = jnp.zeros(SHAPE)
    phases = [(1000, zero, in_groups(1, 1)), (4000, zero, in_groups(1, 0.1))]
    update, _, v = run(codec, implementation, phases)
    return rms(update[OTHERS]), np.mean(v[OTHERS])


def test_v_decays(codec, bounds, implementation):
    update, v = after_a_shift(codec, implementation)
    expected_update, expected_v = after_a_shift(None, None)
    assert abs(v / expected_v - 1) < bounds.moments
    assert abs(update / expected_update - 1) < bounds.rms


def test_the_published_v_does_not():
    update, v = after_a_shift(*PUBLISHED)
    expected_update, expected_v = after_a_shift(None, None)
    assert v > 5 * expected_v
    assert update < 0.5 * expected_update


# --- m


@functools.cache
def after_the_end(codec, implementation, b1):
    """Gradients become zero but for one in each group; 300 steps later.

    Returns:
      How much of m is left, its sign counted, and the largest m of all.
    """
    sign = np.where(np.random.default_rng(0).random(SHAPE) < 0.5, -1, 1)
    zero = jnp.zeros(SHAPE)
    phases = [
        (1000, sign * in_groups(1, 1), zero),
        (300, sign * in_groups(1, 0), zero),
    ]
    _, m, _ = run(codec, implementation, phases, b1)
    return np.mean((m * sign)[OTHERS]), np.max(np.abs(m))


def test_m_decays_to_nothing(codec, bounds, implementation):
    left, largest = after_the_end(codec, implementation, 0.9)
    assert abs(left) < bounds.m_left * largest


def test_m_decays_slowly(codec, bounds, implementation):
    left, _ = after_the_end(codec, implementation, 0.99)
    expected, _ = after_the_end(None, None, 0.99)
    assert abs(left / expected - 1) < bounds.moments


def test_the_published_m_does_not():
    left, largest = after_the_end(*PUBLISHED, 0.9)
    assert left > 0.01 * largest
    left, _ = after_the_end(*PUBLISHED, 0.99)
    assert left > 5 * after_the_end(None, None, 0.99)[0]


# --- sizes of gradients


@functools.cache
def of_size(codec, implementation, size):
    phases = [(300, jnp.zeros(SHAPE), in_groups(size, size))]
    return rms(run(codec, implementation, phases)[0])


@pytest.mark.parametrize("size", [1e-7, 1e4])
def test_tiny_and_huge_gradients(codec, bounds, implementation, size):
    found, expected = (
        of_size(*x, size) for x in ((codec, implementation), (None,) * 2)
    )
    assert abs(found / expected - 1) < bounds.rms


def test_the_published_scale_loses_tiny_gradients():
    """And nothing at 1e4: float16 ends at 6.5e4."""
    assert of_size(*PUBLISHED, 1e-7) > 5 * of_size(None, None, 1e-7)


# --- outliers


@functools.cache
def beside_an_outlier(codec, implementation):
    """One gradient in each group is 300 times as large."""
    phases = [(1000, jnp.zeros(SHAPE), in_groups(300, 1))]
    update = run(codec, implementation, phases)[0]
    return rms(update), np.max(np.abs(update))


def test_an_outlier_leaves_its_neighbours_alone(codec, bounds, implementation):
    update, largest = beside_an_outlier(codec, implementation)
    expected, _ = beside_an_outlier(None, None)
    assert abs(update / expected - 1) < bounds.rms_beside_outlier
    assert largest < bounds.largest_beside_outlier


def test_beside_an_outlier_the_published_v_is_zero():
    update, largest = beside_an_outlier(*PUBLISHED)
    expected, _ = beside_an_outlier(None, None)
    assert update > 100 * expected and largest > 1000


# --- small steps


@functools.cache
def movement(codec, implementation, size, residual="exact"):
    """How far weights between 1 and 2 get in 1,000 equal steps, in the mean."""
    tx = optax_flash.master_weights(
        optax_flash.adamw8(size, weight_decay=0.0, codecs=codec),
        codec=residual,
        implementation=implementation,
    )
    params = jnp.linspace(1.0, 1.98, 64 * 64).reshape(SHAPE).astype(jnp.bfloat16)

    @jax.jit
    def train(params):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(-jnp.ones_like(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 1000, step, (params, tx.init(params)))

    after, state = train(params)
    weights = optax_flash.master_params(state, after)
    return np.mean(np.asarray(weights, np.float64) - np.asarray(params, np.float64))


@pytest.mark.parametrize("size", [1e-6, 1e-5])
def test_small_steps_move_weights(codec, bounds, implementation, size):
    exact = 1000 * size
    assert abs(movement(codec, implementation, size) / exact - 1) < bounds.movement


def test_the_published_residual_stands_still():
    assert movement(*PUBLISHED, 1e-5, residual="flashoptim") == 0


def main():
    """What is measured, in fp32 and by each codec."""
    columns = {"fp32": (None, None), "flashoptim": PUBLISHED}
    columns |= {codec: (codec, "xla") for codec in CODECS}
    residuals = {"flashoptim": "flashoptim"}
    _, v = after_a_shift(None, None)
    slow, _ = after_the_end(None, None, 0.99)
    for name, column in columns.items():
        update, of_v = after_a_shift(*column)
        left, largest = after_the_end(*column, 0.9)
        print(name)
        print(f"  v decays: v / fp32 {of_v / v:.3g}, update RMS {update:.3g}")
        print(f"  m decays: left, of the largest {left / largest:.3g}")
        print(
            f"  m decays slowly: m / fp32 {after_the_end(*column, 0.99)[0] / slow:.3g}"
        )
        for size in (1e-7, 1e4):
            print(f"  gradients of {size:g}: update RMS {of_size(*column, size):.3g}")
        update, largest = beside_an_outlier(*column)
        print(f"  outlier: update RMS {update:.3g}, largest {largest:.3g}")
        if name != "fp32":
            for size in (1e-6, 1e-5):
                moved = movement(*column, size, residuals.get(name, "exact"))
                print(f"  1,000 steps of {size:g}: weights move by {moved:.3g}")


if __name__ == "__main__":
    main()
