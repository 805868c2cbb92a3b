"""The optimizer's state in pinned host memory between two steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")
OPTIMIZERS = {
    "adamw8": lambda: optax_flash.adamw8(1e-2),
    "adamw4": lambda: optax_flash.adamw4(1e-2),
    "master_weights": lambda: optax_flash.master_weights(optax_flash.adamw8(1e-2)),
}


def random(seed):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16),
        "b": jnp.ones(8),
    }


def on_host(tree):
    return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), tree)


def placements(tx, kind):
    """Shardings of the params and of the state, and where gradients are put."""
    if kind is None:
        params = jax.tree.map(
            lambda _: SingleDeviceSharding(jax.devices()[0]), random(0)
        )
        state = jax.tree.map(
            lambda _: SingleDeviceSharding(jax.devices()[0]),
            jax.eval_shape(tx.init, random(0)),
        )
        return params, state
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)
    params = {"w": NamedSharding(mesh, P("fsdp", "tp")), "b": NamedSharding(mesh, P())}
    return params, optax_flash.state_sharding(tx, random(0), params)


def train(tx, shardings, host):
    of_params, of_state = shardings
    kept = on_host(of_state) if host else of_state

    def step(params, state, grads):
        if host:
            state = jax.device_put(state, jax.memory.Space.Device)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, jax.device_put(state, jax.memory.Space.Host) if host else state

    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(of_params, kept))
    params = jax.device_put(random(0), of_params)
    state = jax.device_put(tx.init(params), kept)
    for seed in range(3):
        params, state = step(params, state, jax.device_put(random(seed + 1), of_params))
    return params, state


# Every optimizer with two, and each with every other.
@pytest.mark.parametrize(
    "name, kind",
    quick(
        [("master_weights", AxisType.Auto)],
        [
            ("adamw8", None),
            ("adamw8", AxisType.Explicit),
            ("adamw4", AxisType.Auto),
            ("adamw4", AxisType.Explicit),
            ("master_weights", None),
            ("master_weights", AxisType.Auto),
        ],
    ),
    ids=str,
)
def test_steps_are_those_of_a_state_on_the_device(name, kind):
    tx = OPTIMIZERS[name]()
    shardings = placements(tx, kind)
    expected = train(tx, shardings, host=False)
    found = train(tx, shardings, host=True)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(found[1])}
    assert kinds == {"pinned_host"}
    # Params stay where the model is.
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(found[0])}
    assert kinds == {x.sharding.memory_kind for x in jax.tree.leaves(expected[0])}
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected)
    )
