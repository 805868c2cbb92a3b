"""Kernels on sharded leaves equal one kernel on one device, without communication."""

import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash.fusion import partition
from tests.tiers import quick

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
    quick(
        [((64, 256), P("fsdp", "tp"))],
        [
            ((64, 256), P(None, "fsdp")),
            ((64, 256), P("fsdp", "tp")),
            ((64, 256), P(("fsdp", "tp"), None)),
            ((8, 16, 64), P("tp", "fsdp")),
            ((16, 300), P("fsdp")),
            ((8192,), P(("fsdp", "tp"))),
        ],
    ),
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
    quick(
        [((64, 300), P(None, "fsdp"))],
        [((64, 128), P(None, ("fsdp", "tp"))), ((64, 300), P(None, "fsdp"))],
    ),
    ids=str,
)
def test_shards_that_end_within_a_group_are_gathered(mesh, shape, spec):
    *alone, _ = run(make_tx(), shape, lambda x: x)
    sharding = NamedSharding(mesh, spec)
    *sharded, text = run(make_tx(), shape, lambda x: jax.device_put(x, sharding))
    chex.assert_trees_all_equal(sharded, alone)
    assert "all-gather" in text


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.fixture(name="line")
def line_fixture():
    return jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def train(tx, params, grads_of, data):
    """Params and state after three steps of gradients that a function makes in jit."""

    @jax.jit
    def step(params, state, data):
        updates, state = tx.update(grads_of(params, data), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, data)
    return params, state


IMPLEMENTATIONS = [None, "xla", "interpret"]
PARTS = {
    # 8 shards of the flat gradients become 4 by 2, and 4 by 2 by 1.
    "flat": ((4, 4096), P(None, "fsdp")),
    "flat, 3 axes": ((4, 16, 256), P(None, "fsdp")),
    "flat, two codes a byte": ((2, 8192), P(None, "fsdp")),
}


# Every case with two implementations, and every implementation with two cases.
@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    "case, implementation",
    quick(
        [("flat", "interpret"), ("flat", None)],
        [
            ("flat", "interpret"),
            ("flat", None),
            ("flat, 3 axes", "xla"),
            ("flat, 3 axes", "interpret"),
            ("flat, two codes a byte", None),
            ("flat, two codes a byte", "xla"),
        ],
    ),
)
def test_a_part_of_a_mesh_axis(line, case, implementation):
    """XLA shards leaves as it can, also as no PartitionSpec says."""
    shape, spec = PARTS[case]
    make = optax_flash.adamw4 if shape[0] == 2 else optax_flash.adamw8
    tx = make(1e-3, implementation=implementation)

    def grads_of(params, flat):
        return flat.reshape(params.shape)

    params, flat = normal(shape, 0), normal(np.prod(shape), 1)
    expected = train(tx, params, grads_of, flat)
    params = jax.device_put(params, NamedSharding(line, spec))
    flat = jax.device_put(flat, NamedSharding(line, P("fsdp")))
    chex.assert_trees_all_equal(train(tx, params, grads_of, flat), expected)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("implementation", quick(["interpret"], IMPLEMENTATIONS))
def test_fewer_heads_than_devices(line, implementation):
    tx = optax_flash.adamw8(1e-3, implementation=implementation)

    def grads_of(params, x):
        # Whole numbers: their sums are the same in every order.
        def features(w):
            heads = jnp.einsum("bd,dhk->bhk", x, w.reshape(256, 4, 64))
            return jnp.sum(heads * jnp.arange(1.0, 5)[:, None])

        return jax.tree.map(jax.grad(features), params)

    params = {"w": normal((256, 256), 0)}
    x = jnp.round(normal((8, 256), 1) * 4)
    expected = train(tx, params, grads_of, x)
    sharding = NamedSharding(line, P(None, "fsdp"))
    params = jax.device_put(params, sharding)
    x = jax.device_put(x, NamedSharding(line, P("fsdp")))
    chex.assert_trees_all_equal(train(tx, params, grads_of, x), expected)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("implementation", quick([None], IMPLEMENTATIONS))
def test_shard_map_over_one_of_two_axes(implementation):
    """Where the other axis is left to XLA, types do not tell how leaves are sharded."""
    mesh = jax.make_mesh((4, 2), ("data", "tp"), axis_types=(AxisType.Auto,) * 2)
    tx = optax_flash.adamw8(1e-3, implementation=implementation)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        axis_names={"data"},
        check_vma=False,
    )
    params = normal((16, 512), 0)
    expected = jax.jit(step)(params, tx.init(params))
    params = jax.device_put(params, NamedSharding(mesh, P("tp")))
    found = jax.jit(mapped)(params, tx.init(params))
    chex.assert_trees_all_equal(found, expected)


MESHES = [(8,), (4, 2), (2, 4), (2, 2, 2), (1, 8), (3, 2)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_shardings_are_read_on_the_finer_mesh(sizes):
    """What is read says of every device what the sharding said."""
    names = "abc"[: len(sizes)]
    devices = np.asarray(jax.devices()[: np.prod(sizes)])
    mesh = Mesh(devices.reshape(sizes), tuple(names))
    finer = partition._finer(mesh)
    assert list(finer.devices.flat) == list(mesh.devices.flat)
    assert all(size in (2, 3) for size in finer.shape.values())
    entries = [
        order
        for n in range(len(names) + 1)
        for order in itertools.permutations(names, n)
    ]
    shape = (48, 48)
    for first, second in itertools.product(entries, entries):
        if set(first) & set(second):
            continue
        sharding = NamedSharding(mesh, P(first, second))
        found = NamedSharding(finer, partition._spec(finer, sharding, 2))
        assert found.devices_indices_map(shape) == sharding.devices_indices_map(shape)


def test_shardings_of_parts_of_axes_are_read():
    mesh = Mesh(np.asarray(jax.devices()), ("fsdp",))
    finer = partition._finer(mesh)
    parts = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("x", "y"))
    for spec in (P("x", "y"), P("y", "x"), P(None, "y"), P(("y", "x"))):
        sharding = NamedSharding(parts, spec)
        found = NamedSharding(finer, partition._spec(finer, sharding, 2))
        assert found.devices_indices_map((8, 8)) == sharding.devices_indices_map((8, 8))


def test_devices_in_another_order_have_no_names():
    mesh = partition._finer(Mesh(np.asarray(jax.devices()), ("fsdp",)))
    backwards = Mesh(np.asarray(jax.devices())[::-1], ("fsdp",))
    assert partition._spec(mesh, NamedSharding(backwards, P("fsdp")), 1) is None
    assert partition._spec(mesh, None, 1) is None
