"""A sharded run is the single-device run, without communication."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash

SPECS = [P("fsdp"), P(None, "fsdp"), P("fsdp", "tp"), P(("fsdp", "tp"), None)]
OPTIMIZERS = {
    "adamw8": lambda: optax_flash.adamw8(1e-3),
    "lion8": lambda: optax_flash.lion8(1e-3),
    "adamw8_24": lambda: optax_flash.master_weights(optax_flash.adamw8(1e-3)),
    "adamw4_24": lambda: optax_flash.master_weights(optax_flash.adamw4(1e-3)),
    "adamw8_32": lambda: optax_flash.master_weights(optax_flash.adamw8(1e-3), 32),
}
COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute")


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str, name="mesh")
def mesh_fixture(request):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: tests/conftest.py asks for them on CPU")
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(request.param,) * 2)


@pytest.fixture(params=SPECS, ids=str, name="sharding")
def sharding_fixture(request, mesh):
    return NamedSharding(mesh, request.param)


@pytest.fixture(params=OPTIMIZERS, name="tx")
def tx_fixture(request):
    return OPTIMIZERS[request.param]()


def make(seed):
    rng = np.random.default_rng(seed)
    return {"kernel": jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16)}


def test_eager_init_is_sharded_like_the_params(tx, sharding):
    params = jax.device_put(make(0), sharding)
    for leaf in jax.tree.leaves(tx.init(params)):
        if leaf.shape == (64, 256):
            assert leaf.sharding.is_equivalent_to(sharding, 2)


def test_eager_init_stays_on_the_device_of_the_params(tx):
    device = jax.devices()[-1]
    state = tx.init(jax.device_put(make(0), device))
    assert {d for x in jax.tree.leaves(state) for d in x.devices()} == {device}


def test_sharded_run_equals_single_device_run(tx, sharding):
    update = jax.jit(tx.update)

    def run(params, place):
        params = jax.tree.map(place, params)
        state = tx.init(params)
        for seed in range(3):
            grads = jax.tree.map(place, make(seed + 1))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    alone = run(make(0), lambda x: x)
    sharded = run(make(0), lambda x: jax.device_put(x, sharding))
    chex.assert_trees_all_equal(sharded, alone)


def test_update_communicates_nothing(tx, sharding):
    params = jax.device_put(make(0), sharding)
    state = tx.init(params)
    compiled = jax.jit(tx.update).lower(params, state, params).compile()
    assert not COLLECTIVE.findall(compiled.as_text())
