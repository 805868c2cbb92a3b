"""Params on a mesh of explicit axes, where nobody has called jax.set_mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash

pytestmark = pytest.mark.usefixtures("quick_compile")

MAKE = {
    "adamw8": lambda: optax_flash.adamw8(1e-2),
    "adamw4": lambda: optax_flash.adamw4(1e-2),
    "master_weights": lambda: optax_flash.master_weights(
        optax_flash.adamw4(1e-2), finished=False
    ),
    "lora_pre_adamw": lambda: optax_flash.lora_pre_adamw(1e-2, rank=4),
    "lora_pre_muon": lambda: optax_flash.lora_pre_muon(1e-2, rank=4),
    "lowrank_adamw": lambda: optax_flash.lowrank_adamw(1e-2, rank=4),
    "scale_by_lora_pre": lambda: optax_flash.scale_by_lora_pre(rank=4),
}


def random(seed):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(64, 256)), jnp.float32)}


def step(tx, params, wrapped):
    assert jax.sharding.get_abstract_mesh().empty
    return wrapped(tx.update)(params, tx.init(params), params)[0]


@pytest.fixture(name="sharded")
def sharded_fixture():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    return jax.device_put(random(0), NamedSharding(mesh, P("x", "y")))


@pytest.mark.parametrize("name", MAKE)
def test_updates_are_those_of_one_device(name, sharded):
    tx = MAKE[name]()
    expected = step(tx, random(0), jax.jit)
    for wrapped in (jax.jit, lambda update: update):
        found = step(tx, sharded, wrapped)
        assert found["w"].sharding == sharded["w"].sharding
        # Sums over shards have another order.
        chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-6)
    if name == "adamw8":
        stock = step(optax.adamw(1e-2), random(0), jax.jit)
        chex.assert_trees_all_close(expected, stock, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_reports_are_those_of_one_device(name, sharded):
    tx = MAKE[name]()
    reports = [
        optax_flash.numerics_report(tx, tx.init(params), params, params)
        for params in (random(0), sharded)
    ]
    alone, found = jax.device_get(reports)
    chex.assert_trees_all_close(found.update_rms, alone.update_rms, rtol=1e-4)
    implementations = [
        [(path.params, path.shape) for path in optax_flash.explain(tx, params).paths]
        for params in (random(0), sharded)
    ]
    assert implementations[0] == implementations[1]
