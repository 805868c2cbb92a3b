"""Extra arguments reach what takes them, under whatever type of optax's it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_flash
import optax_flash.flax

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
LOSS = 1.0
"""Never gets better, so reduce_on_plateau has something to do."""


def plateau():
    return optax.chain(
        optax.adam(1e-2), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    )


def accumulating(kind):
    steps = optax.MultiSteps(plateau(), every_k_schedule=2)
    return steps if kind == "object" else steps.gradient_transformation()


def run(tx, params, steps=8):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params, value=LOSS)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return params, optax.tree.get(state, "scale")


@pytest.mark.parametrize("kind", ["object", "transformation"])
def test_a_value_reaches_reduce_on_plateau_in_multi_steps(kind):
    expected, scale = run(accumulating(kind), PARAMS)
    assert scale < 0.5
    for wrap in (optax_flash.compress, optax_flash.master_weights):
        params, found = run(wrap(accumulating(kind)), PARAMS)
        assert found == scale, wrap
        np.testing.assert_allclose(params["w"], expected["w"], rtol=1e-6)


def test_optimizers_of_flax_hand_a_value_on():
    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.state(model, nnx.Param), value=LOSS)

    def trained(make):
        model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        optimizer = make(model)
        for _ in range(8):
            step(model, optimizer)
        return model

    stock = trained(lambda m: nnx.Optimizer(m, accumulating("object"), wrt=nnx.Param))
    for make in (
        lambda m: nnx.Optimizer(
            m, optax_flash.compress(accumulating("object")), wrt=nnx.Param
        ),
        lambda m: optax_flash.flax.Optimizer(
            m, accumulating("object"), wrt=nnx.Param, param_dtype=jnp.float32
        ),
    ):
        model = trained(make)
        np.testing.assert_allclose(
            model.kernel[...], stock.kernel[...], rtol=1e-5, atol=1e-6
        )


def test_reports_hand_a_value_on():
    tx = optax_flash.compress(accumulating("transformation"))
    state = tx.init(PARAMS)
    explained = optax_flash.explain(tx, PARAMS, value=LOSS)
    assert explained.paths
    report = jax.jit(
        lambda: optax_flash.numerics_report(tx, state, PARAMS, PARAMS, value=LOSS)
    )()
    assert report


def test_a_transformation_that_takes_none_is_not_handed_any():
    def update(updates, state, params=None):
        return updates, state

    tx = optax_flash.compress(
        optax.GradientTransformation(optax.identity().init, update)
    )
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=LOSS)
    np.testing.assert_array_equal(updates["w"], PARAMS["w"])
