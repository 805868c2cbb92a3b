"""An update over the devices of two processes is that of one, bit for bit."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from tests import processes

SPECS = {"a": P("fsdp"), "b": P(None, "fsdp"), "c": P("fsdp", "tp"), "d": P()}
OPTIMIZERS = [optax_flash.adamw8, optax_flash.lion8, optax_flash.adamw4]


def steps():
    """Params and states after two steps of each optimizer, sharded over all devices."""
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=auto)
    of_params = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}

    def make(seed):
        rng = np.random.default_rng(seed)
        tree = {}
        for name, sharding in of_params.items():
            x = rng.normal(size=(64, 256)).astype(jnp.bfloat16)
            tree[name] = jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        return tree

    for optimizer in OPTIMIZERS:
        tx = optax_flash.master_weights(optimizer(1e-3))
        params = make(0)
        shardings = (of_params, optax_flash.state_sharding(tx, params))

        @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=shardings)
        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.jit(tx.init, out_shardings=shardings[1])(params)
        for seed in (1, 2):
            params, state = step(params, state, make(seed))
        yield from jax.tree.leaves((params, state))


def to_bytes(x):
    return np.asarray(x).reshape(-1).view(np.uint8)


@pytest.mark.full
def test_two_processes(tmp_path):
    at = processes.address()
    processes.run(*([__file__, at, i, tmp_path / "leaves.npz"] for i in range(2)))
    found = np.load(tmp_path / "leaves.npz")
    expected = list(map(to_bytes, steps()))
    assert len(found) == len(expected) > 40
    for name, x in zip(found, expected, strict=True):
        np.testing.assert_array_equal(found[name], x)


def worker(address, index, path):
    from jax.experimental import multihost_utils

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(address, 2, int(index))
    assert len(jax.local_devices()) == 4 and jax.device_count() == 8
    leaves = [multihost_utils.process_allgather(x, tiled=True) for x in steps()]
    if jax.process_index() == 0:
        np.savez(path, *map(to_bytes, leaves))


if __name__ == "__main__":
    worker(*sys.argv[1:])
