"""Odd shapes and extreme numbers: the right result, or a loud one; never a silent one.

NaN and inf have tests of their own in test_nonfinite.py, codecs alone in codecs/.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from tests.tiers import quick

SHAPE = (64, 64)


@pytest.fixture(params=quick(["xla"], ["xla", "interpret"]), name="implementation")
def implementation_fixture(request):
    return request.param


def run(tx, grads, params=None):
    """The update after each of the gradients, and the last state."""
    params = jnp.zeros(grads[0].shape) if params is None else params
    update, state, updates = jax.jit(tx.update), tx.init(params), []
    for g in grads:
        u, state = update(jnp.asarray(g), state, params)
        updates.append(np.asarray(u))
    return updates, state


def adam(implementation, codecs=None):
    """Adam's direction as the codes tell it, without what updates make up for."""
    return optax_flash.compress(
        optax.scale_by_adam(),
        codecs,
        error_feedback=False,
        implementation=implementation,
    )


def assert_near_stock(grads, implementation, codecs=None):
    """Each update of Adam is optax's, but for what codes round."""
    # In 4 bits v is rounded by up to a factor of 3/2 a step. Averaged with what each
    # step adds, that makes 0.52 to 2.7 of it in the fifth, 0.61 to 1.39 of the root.
    rtol = 0.03 if optax_flash.get_codec(codecs or "companded8").bits == 8 else 0.4
    tx = adam(implementation, codecs)
    found, state = run(tx, grads)
    expected, _ = run(optax.scale_by_adam(), grads)
    for u, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(u, e, rtol=rtol, atol=1e-30)
    return found, state


def signs(shape=SHAPE):
    return np.where(np.random.default_rng(0).random(shape) < 0.5, -1, 1)


@pytest.mark.parametrize(
    "shape, codecs",
    quick(
        [((2048, 3), "companded4"), ((64, 80), optax_flash.Companded8(group=128))],
        [
            ((2048, 3), None),
            ((4096, 1), None),
            ((64, 80), optax_flash.Companded8(group=128)),
            ((4, 32, 33), optax_flash.Companded8(group=64)),
            ((100, 60), "affine8"),
            ((2048, 3), "companded4"),
            ((4096, 1), "companded4"),
            ((64, 81), optax_flash.Companded4(group=128)),
        ],
    ),
)
def test_groups_longer_than_the_row(shape, codecs, implementation):
    """Each row is a group by itself, as large as its largest element."""
    codec = optax_flash.get_codec(codecs or "companded8")
    rows = np.arange(1, 1 + np.prod(shape[:-1])).reshape(*shape[:-1], 1)
    grads = [(signs(shape) * rows).astype(np.float32)] * 3
    _, state = assert_near_stock(grads, implementation, codecs)
    assert state.inner_state.mu.shape == codec.codes_shape(shape)
    planes = 2 if codecs == "affine8" else 1
    assert state.scales["mu_scales"].shape == (*shape[:-1], planes)


@pytest.fixture(params=["companded8", "companded4"], name="codecs")
def codecs_fixture(request):
    return request.param


def test_constant_groups(implementation, codecs):
    """All of a group at its scale: neither clipped nor drifting."""
    sizes = 10.0 ** np.linspace(-9, 9, 128).repeat(32).reshape(SHAPE)
    grads = [(signs() * sizes).astype(np.float32)] * 5
    assert_near_stock(grads, implementation, codecs)


def test_all_zero_groups_wake_up(implementation, codecs):
    """Zeros move nothing, and leave no trace when gradients come."""
    some = signs().astype(np.float32)
    some[:, :32] = 0
    everywhere = signs().astype(np.float32)
    grads = [0 * some, some, some, everywhere, everywhere]
    found, _ = assert_near_stock(grads, implementation, codecs)
    assert np.all(found[0] == 0) and np.all(found[2][:, :32] == 0)


@pytest.mark.parametrize("size", [1e-40, 1e-38, 1e-30, 1e-20])
def test_gradients_near_and_below_the_smallest_normal(size, implementation, codecs):
    """Beside eps they are nothing, in stock optax too; nothing divides by zero."""
    grads = [(signs() * size).astype(np.float32)] * 3 + [signs().astype(np.float32)]
    tx = adam(implementation, codecs)
    found, state = run(tx, grads)
    for u in found[:3]:
        assert np.all(np.abs(u) <= 1.1 * size / 1e-8)
    expected, _ = run(optax.scale_by_adam(), grads)
    np.testing.assert_allclose(found[3], expected[3], rtol=0.03)
    for scales in jax.tree.leaves(state.scales):
        assert np.all(np.isfinite(np.asarray(scales, np.float32)))


def test_one_ordinary_gradient_among_subnormals(implementation):
    x = (signs() * 1e-40).astype(np.float32)
    x[:, ::32] = 1.0
    found, _ = run(optax_flash.scale_by_adam8(implementation=implementation), [x] * 3)
    for u in found:
        np.testing.assert_allclose(u[:, ::32], 1.0, rtol=0.03)
        assert np.max(np.abs(np.where(x == 1, 0, u))) < 1e-3


@pytest.mark.parametrize("size", [6e4, 1e5, 1e10, 1e18])
def test_gradients_beyond_float16(size, implementation, codecs):
    """Where a float16 scale is infinite."""
    grads = [(signs() * size).astype(np.float32)] * 3
    assert_near_stock(grads, implementation, codecs)


def test_a_square_beyond_float32_is_loud(implementation, codecs):
    """optax's element stands still from then on; here its group becomes NaN."""
    grads = signs().astype(np.float32)
    huge = grads.copy()
    huge[3, 40] = 1e20
    tx = adam(implementation, codecs)
    found, _ = run(tx, [huge, grads])
    group = np.zeros(SHAPE, bool)
    group[3, 32:64] = True
    np.testing.assert_array_equal(~np.isfinite(found[1]), group)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_element_spoils_its_group_in_a_kernel_too(dtype, bad):
    params = jnp.ones(SHAPE, dtype)
    good = jnp.asarray(signs(), dtype)
    tx = optax_flash.master_weights(
        optax_flash.adamw8(1e-2), finished=False, implementation="interpret"
    )
    found, _ = run(tx, [good.at[3, 40].set(bad), good], params)
    spoilt = np.zeros(SHAPE, bool)
    spoilt[3, 40] = True
    np.testing.assert_array_equal(~np.isfinite(found[0].astype(np.float32)), spoilt)
    spoilt[3, 32:64] = True
    np.testing.assert_array_equal(~np.isfinite(found[1].astype(np.float32)), spoilt)


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("finished", [False, True])
def test_float16_weights_that_overflow(bits, finished, implementation):
    """The param is infinite, as a float16 is; what has room stays as it was."""
    params = jnp.full(SHAPE, 65504.0, jnp.float16).at[:, 32:].set(1.0)
    tx = optax_flash.master_weights(
        optax.sgd(1.0), bits, finished=finished, implementation=implementation
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = jnp.full(SHAPE, -64.0, jnp.float16).at[:, 32:].set(-1.0)
    params, state = step(params, state, grads)
    assert np.all(np.isposinf(np.asarray(params[:, :32], np.float32)))
    weights = np.asarray(optax_flash.master_params(state, params))
    assert not np.any(np.isfinite(weights[:, :32]))
    np.testing.assert_array_equal(weights[:, 32:], 2.0)


@pytest.mark.parametrize("codecs", [None, "companded4", "affine8", "flashoptim"])
def test_params_of_a_single_number(codecs):
    params = {"scale": jnp.float32(2.0), "kernel": jnp.ones((4, 32))}
    tx = optax_flash.compress(optax.sgd(0.5, momentum=0.5), codecs, min_size=1)
    state = tx.init(params)
    assert state.inner_state[0].trace["scale"].dtype == jnp.uint8
    for expected in (-0.5, -0.75):
        updates, state = jax.jit(tx.update)(
            jax.tree.map(jnp.ones_like, params), state, params
        )
        # A number is the largest of its group, which every codec stores well.
        assert updates["scale"] == pytest.approx(expected, rel=0.01)
