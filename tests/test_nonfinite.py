"""NaN and inf in gradients: loud, local to groups, and how to skip such a step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from optax_flash.flax import TrainState

GROUP = 32


@pytest.fixture(params=[np.nan, np.inf, -np.inf], name="bad")
def bad_fixture(request):
    return request.param


@pytest.fixture(params=["companded8", "companded4"], name="codec")
def codec_fixture(request):
    return optax_flash.get_codec(request.param)


def gradients(bad):
    grads = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    broken = grads.copy()
    broken[3, 40] = bad
    return jnp.asarray(grads), jnp.asarray(broken)


def test_a_bad_gradient_is_never_silent(bad, codec):
    """The update is not finite at once, and the group stays so: the loss will tell.

    With error feedback, which 4 bits have, the whole group's is not finite at once.
    """
    grads, broken = gradients(bad)
    params = jnp.ones_like(grads)
    tx = optax_flash.adamw8(1e-3, codecs=codec)
    update = jax.jit(tx.update)
    updates, state = update(broken, tx.init(params), params)
    group = np.zeros((64, 128), bool)
    group[3, GROUP : 2 * GROUP] = True
    assert not np.isfinite(updates[3, 40])
    assert np.all(np.isfinite(np.asarray(updates)[~group]))
    if codec.bits == 8:
        assert np.sum(~np.isfinite(updates)) == 1
    after, _ = update(grads, state, params)
    np.testing.assert_array_equal(~np.isfinite(np.asarray(after)), group)


def test_other_groups_do_not_notice(bad, codec):
    grads, broken = gradients(bad)
    params = jnp.ones_like(grads)
    tx = optax_flash.adamw8(1e-3, codecs=codec)
    update = jax.jit(tx.update)
    _, state = update(broken, tx.init(params), params)
    _, healthy = update(grads, tx.init(params), params)
    outside = np.ones((64, 128), bool)
    outside[3, GROUP : 2 * GROUP] = False
    for field in ("mu", "nu"):
        codes = [optax.tree.get(s, field) for s in (state, healthy)]
        np.testing.assert_array_equal(
            *(np.asarray(codec.unpack(c))[outside] for c in codes)
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda check, tx: check(optax_flash.master_weights(tx, finished=False)),
        # With finished params the check goes inside.
        lambda check, tx: optax_flash.master_weights(check(tx)),
    ],
    ids=["outside", "inside"],
)
def test_apply_if_finite_keeps_state_and_weights(bad, make):
    grads, broken = gradients(bad)
    params = jax.random.normal(jax.random.key(0), grads.shape).astype(jnp.bfloat16)
    check = functools.partial(optax.apply_if_finite, max_consecutive_errors=10)
    tx = make(check, optax_flash.adamw8(1e-3))

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params), grads)
    after, state_after = step(params, state, broken)
    chex.assert_trees_all_equal(after, params)
    chex.assert_trees_all_equal(
        optax_flash.master_params(state_after, after),
        optax_flash.master_params(state, params),
    )
    for field in ("mu", "nu", "count", "mu_scales", "nu_scales"):
        chex.assert_trees_all_equal(
            *(optax.tree.get(s, field) for s in (state_after, state))
        )
    healed, _ = step(after, state_after, grads)
    assert np.all(np.isfinite(np.asarray(healed, np.float32)))


def test_train_state_skips_with_the_check_inside(bad):
    """The recipe for ``optax_flash.flax.TrainState``."""
    tx = optax.apply_if_finite(optax_flash.adamw8(1e-3), max_consecutive_errors=10)
    params = {"w": jax.random.normal(jax.random.key(0), (64, 128))}
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda s, g: s.apply_gradients(grads={"w": g}))
    grads, broken = gradients(bad)
    state = step(state, grads.astype(jnp.bfloat16))
    after = step(state, broken.astype(jnp.bfloat16))
    chex.assert_trees_all_equal(after.fp32_params(), state.fp32_params())
    chex.assert_trees_all_equal(after.params, state.params)
    assert np.all(np.isfinite(step(after, grads).fp32_params()["w"]))
