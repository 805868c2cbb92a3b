"""Updates inside of a user's own shard_map, with the checks that are its default."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash

SPECS = {"by_rows": P("x"), "by_columns": P(None, "y"), "bias": P(), "scalar": P()}


def third(updates, params):
    """Divides by a constant, which stays a division; a scalar's reciprocal is taken."""
    del params
    return jax.tree.map(lambda u: u / 3.0, updates)


SGD = optax.sgd(1e-2, momentum=0.9)
ADAM4 = optax_flash.compress(optax.adamw(1e-2), codecs="companded4", min_size=256)
TRANSFORMATIONS = {
    "adamw8": optax_flash.compress(optax.adamw(1e-2), min_size=256),
    "sgd8": optax_flash.compress(SGD, min_size=256),
    "constant": optax_flash.compress(
        optax.chain(optax.scale_by_rms(), optax.stateless(third)), min_size=256
    ),
    "weights": optax_flash.master_weights(optax.sgd(1e-2)),
    "finished weights of adamw4": optax_flash.master_weights(ADAM4, finished=True),
}


@pytest.fixture(scope="module")
def mesh():
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)


def make_params(dtype):
    shapes = {"by_rows": (16, 64), "by_columns": (8, 128), "bias": (512,), "scalar": ()}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def step(tx, params, state):
    # Where they are rounded must not depend on what XLA computes together.
    grads = jax.tree.map(lambda p: -p, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def two_steps(tx, params, state):
    def body(carry, _):
        return step(tx, *carry), None

    return jax.lax.scan(body, (params, state), length=2)[0]


def start_of(tx, name):
    params = make_params(jnp.bfloat16 if "weights" in name else jnp.float32)
    return params, tx.init(params)


def specs_of(tx, params, mesh):
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    state = optax_flash.state_sharding(tx, params, shardings)
    return SPECS, jax.tree.map(lambda x: x.spec, state)


def shard(x, spec, device):
    """What the device at a place of the mesh has of an array."""
    for axis, name in enumerate(spec):
        if name is not None:
            i, n = {"x": (device[0], 4), "y": (device[1], 2)}[name]
            x = np.split(x, n, axis=axis)[i]
    return x


@pytest.mark.full
def test_each_shard_is_updated_as_if_it_were_alone(mesh):
    """With the checks, replicated params must be known to stay replicated."""

    def step_all(starts):
        return {
            name: two_steps(TRANSFORMATIONS[name], *x) for name, x in starts.items()
        }

    starts = {name: start_of(tx, name) for name, tx in TRANSFORMATIONS.items()}
    specs = {
        name: specs_of(TRANSFORMATIONS[name], params, mesh)
        for name, (params, _) in starts.items()
    }
    mapped = jax.shard_map(step_all, mesh=mesh, in_specs=(specs,), out_specs=specs)
    found = jax.tree.map(np.asarray, jax.jit(mapped)(starts))
    alone = jax.jit(step_all)
    starts = jax.tree.map(np.asarray, starts)
    for device in np.ndindex(4, 2):
        local = [
            jax.tree.map(lambda x, spec, at=device: shard(x, spec, at), tree, specs)
            for tree in (starts, found)
        ]
        expected = alone(local[0])
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(local[1]),
            jax.tree.leaves(expected),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b, f"{device}: {path}")


@pytest.mark.parametrize("name", ["sgd8", "weights"])
def test_it_need_not_be_under_jit(mesh, name):
    tx = TRANSFORMATIONS[name]
    start = start_of(tx, name)
    specs = specs_of(tx, start[0], mesh)
    mapped = jax.shard_map(
        functools.partial(step, tx), mesh=mesh, in_specs=specs, out_specs=specs
    )
    for a, b in zip(
        jax.tree.leaves(mapped(*start)),
        jax.tree.leaves(jax.jit(mapped)(*start)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_factors_are_replicated_and_stay_so(mesh):
    tx = optax_flash.lora_pre_adamw(1e-2, rank=4)
    params = {"w": make_params(jnp.float32)["by_rows"]}

    def steps(params, state):
        return two_steps(tx, params, state)

    mapped = jax.shard_map(steps, mesh=mesh, in_specs=(P(), P()), out_specs=(P(), P()))
    state = tx.init(params)
    for a, b in zip(
        jax.tree.leaves(jax.jit(mapped)(params, state)),
        jax.tree.leaves(jax.jit(steps)(params, state)),
        strict=True,
    ):
        # XLA multiplies matrices in another order where there are several devices.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_kernels_run_on_local_arrays(mesh):
    params = {"w": make_params(jnp.float32)["by_rows"]}
    kernel, plain = (
        optax_flash.compress(SGD, min_size=256, implementation=name)
        for name in ("interpret", "xla")
    )
    state = plain.init(params)
    specs = {"w": P("x")}, jax.tree.map(lambda x: P("x") if x.ndim else P(), state)
    kernel_step, plain_step = (
        jax.jit(
            jax.shard_map(
                functools.partial(step, tx), mesh=mesh, in_specs=specs, out_specs=specs
            )
        )
        for tx in (kernel, plain)
    )
    for a, b in zip(
        jax.tree.leaves(kernel_step(params, state)),
        jax.tree.leaves(plain_step(params, state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
