"""Kernels on sharded leaves equal one kernel on one device, without communication."""

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

COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute")


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str, name="mesh")
def mesh_fixture(request):
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(request.param,) * 2)


def make_tx(implementation="interpret"):
    return optax_flash.master_weights(
        optax_flash.adamw8(1e-3), finished=False, implementation=implementation
    )


def random(shape, seed):
    x = np.random.default_rng(seed).normal(size=shape)
    return {"kernel": jnp.asarray(x, jnp.bfloat16)}


def run(tx, shape, place):
    """Params and state after three steps, and the text of the compiled update."""
    params = jax.tree.map(place, random(shape, 0))
    state = tx.init(params)
    update = jax.jit(tx.update)
    text = update.lower(params, state, params).compile().as_text()
    for seed in range(3):
        grads = jax.tree.map(place, random(shape, seed + 1))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, text


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((64, 256), P("fsdp")),
        ((64, 256), P(None, "fsdp")),
        ((64, 256), P("fsdp", "tp")),
        ((64, 256), P(("fsdp", "tp"), None)),
        ((8, 16, 64), P("tp", "fsdp")),
        ((8, 16, 64), P(None, "fsdp", "tp")),
        ((16, 300), P("fsdp")),
        ((8192,), P(("fsdp", "tp"))),
    ],
    ids=str,
)
def test_sharded_equals_single_device(mesh, shape, spec):
    *alone, _ = run(make_tx(), shape, lambda x: x)
    sharding = NamedSharding(mesh, spec)
    *sharded, text = run(make_tx(), shape, lambda x: jax.device_put(x, sharding))
    chex.assert_trees_all_equal(sharded, alone)
    assert not COLLECTIVE.findall(text)


@pytest.mark.parametrize(
    "shape, spec",
    # Shards of 16 columns, and of 75, hold no whole groups of 32.
    [((64, 128), P(None, ("fsdp", "tp"))), ((64, 300), P(None, "fsdp"))],
    ids=str,
)
def test_shards_that_end_within_a_group_are_gathered(mesh, shape, spec):
    *alone, _ = run(make_tx(), shape, lambda x: x)
    sharding = NamedSharding(mesh, spec)
    *sharded, text = run(make_tx(), shape, lambda x: jax.device_put(x, sharding))
    chex.assert_trees_all_equal(sharded, alone)
    assert "all-gather" in text


def test_small_leaves_with_shardings_of_their_own(mesh):
    """They share a kernel, in which each has its own offsets."""
    specs = {"a": P("fsdp"), "b": P(None, "tp"), "c": P("tp", "fsdp"), "d": P()}
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=(64, 128)), jnp.bfloat16) for name in specs
    }
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx = make_tx()

    def step(params):
        state = tx.init(params)
        updates, state = jax.jit(tx.update)(params, state, params)
        return updates, state

    alone = step(params)
    sharded = step(jax.device_put(params, shardings))
    chex.assert_trees_all_equal(sharded, alone)


def test_inside_shard_map(mesh):
    """There arrays are local, and so are the places that decide the rounding."""
    tx = make_tx()
    params = random((64, 256), 0)
    local = {"kernel": params["kernel"][:16]}
    expected, _ = jax.jit(tx.update)(local, tx.init(local), local)

    def step(params):
        updates, _ = tx.update(params, tx.init(params), params)
        return updates

    specs = P("fsdp")
    sharded = jax.device_put(params, NamedSharding(mesh, specs))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False
    )
    found = jax.jit(mapped)(sharded)
    first_shard = np.asarray(found["kernel"])[:16]
    chex.assert_trees_all_equal(first_shard, np.asarray(expected["kernel"]))
