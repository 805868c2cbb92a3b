"""A sharded run is the single-device run, without communication."""

import functools
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
from tests.tiers import quick

OPTIMIZERS = {
    "adamw8": lambda: optax_flash.adamw8(1e-3),
    "adamw8_24": lambda: optax_flash.master_weights(optax_flash.adamw8(1e-3)),
    "lion8_24": lambda: optax_flash.master_weights(optax_flash.lion8(1e-3)),
    "adamw4_24": lambda: optax_flash.master_weights(optax_flash.adamw4(1e-3)),
}
COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute")


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str, name="mesh")
def mesh_fixture(request):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: tests/conftest.py asks for them on CPU")
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(request.param,) * 2)


@pytest.fixture(params=OPTIMIZERS, name="name")
def name_fixture(request):
    return request.param


@pytest.fixture(name="tx")
def tx_fixture(name):
    return OPTIMIZERS[name]()


def make(seed, shape=(64, 256)):
    rng = np.random.default_rng(seed)
    return {"kernel": jnp.asarray(rng.normal(size=shape), jnp.bfloat16)}


def train(tx, sharding=None, shape=(64, 256)):
    """Params and state after three donated steps, and the text of the compiled step.

    On one device, or on many with shardings to keep.
    """
    params = make(0, shape)
    kwargs = {}
    if sharding is not None:
        params = jax.device_put(params, sharding)
        of_state = optax_flash.state_sharding(tx, params)
        assert jax.tree.structure(of_state) == jax.tree.structure(tx.init(params))
        shardings = ({"kernel": sharding}, of_state)
        kwargs["in_shardings"] = (*shardings, shardings[0])
        kwargs["out_shardings"] = shardings

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    step = jax.jit(step, donate_argnums=(0, 1), **kwargs)
    step = step.lower(params, state, params).compile()
    for seed in range(3):
        old = (params, state)
        params, state = step(
            params, state, jax.device_put(make(seed + 1, shape), sharding)
        )
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    return (params, state), step.as_text()


@functools.cache
def trained_alone(name):
    return train(OPTIMIZERS[name]())[0]


def test_eager_init_stays_on_the_device_of_the_params(tx):
    device = jax.devices()[-1]
    state = tx.init(jax.device_put(make(0), device))
    assert {d for x in jax.tree.leaves(state) for d in x.devices()} == {device}


# Every optimizer with the spec that splits both axes, and every other spec once.
@pytest.mark.parametrize(
    "name, spec",
    quick(
        [("adamw8_24", P("fsdp")), ("adamw4_24", P(None, "fsdp"))],
        [
            *((name, P("fsdp", "tp")) for name in OPTIMIZERS),
            ("adamw4_24", P(None, "fsdp")),
            ("adamw8_24", P("fsdp")),
            ("lion8_24", P(("fsdp", "tp"), None)),
        ],
    ),
    ids=str,
)
def test_sharded_run_is_the_single_device_run_without_communication(mesh, name, spec):
    sharded, text = train(OPTIMIZERS[name](), NamedSharding(mesh, spec))
    chex.assert_trees_all_equal(sharded, trained_alone(name))
    assert not COLLECTIVE.findall(text)


# Shards of 75 and of 25 columns hold no whole groups of 32. Two codes of 4 bits a byte
# do not divide by 4 then; the scales of 300 columns, 10, do not, those of 100 do.
@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    "name, columns",
    quick(
        [("adamw4_24", 300)],
        [("adamw8_24", 300), ("adamw4_24", 300), ("adamw4_24", 100)],
    ),
)
def test_shards_that_cut_groups_change_nothing(mesh, name, columns):
    tx, shape = OPTIMIZERS[name](), (64, columns)
    with pytest.warns(UserWarning, match=rf"'kernel' \[64, {columns}\] .*groups of 32"):
        sharded, text = train(tx, NamedSharding(mesh, P(None, "fsdp")), shape)
    chex.assert_trees_all_equal(sharded, train(tx, None, shape)[0])
    assert "all-gather" in text
    codes, scales = (optax.tree.get(sharded[1], x) for x in ("mu", "mu_scales"))
    for x in (codes["kernel"], scales["kernel"]):
        assert x.sharding.is_fully_replicated == bool(x.shape[-1] % 4)


WRAPPED = {
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax_flash.adamw8(1e-3), optax.trace(0.9)
    ),
    "masked": lambda: optax.masked(
        optax_flash.adamw4(1e-3), {"attention": True, "mlp": False}
    ),
    "partition": lambda: optax.partition(
        {"a": optax_flash.adamw8(1e-3), "b": optax_flash.lion8(1e-3)},
        {"attention": "a", "mlp": {"bias": "a", "kernel": "b"}},
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        optax_flash.adamw8, hyperparam_dtype=jnp.float32
    )(1e-3),
    "MultiSteps": lambda: optax.MultiSteps(optax_flash.sgd8(1e-3, 0.9), 2),
    "lookahead": lambda: optax.lookahead(optax_flash.adam8(1e-3), 2, 0.5),
    "master_weights": lambda: optax_flash.master_weights(
        optax_flash.compress(optax.adan(1e-3), "affine8")
    ),
    "low rank": lambda: optax_flash.master_weights(
        optax_flash.lora_pre_adamw(1e-3, rank=8)
    ),
    "factors of rows and columns": lambda: optax_flash.compress(
        optax.adafactor(1e-3, min_dim_size_to_factor=8)
    ),
}
SPEC_OF = {
    "attention": {"kernel": P("fsdp", "tp")},
    "mlp": {"bias": P(), "kernel": P("tp", "fsdp")},
}


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    "wrapper", quick(["chain", "master_weights", "low rank"], WRAPPED)
)
def test_every_wrapper(mesh, wrapper):
    """Shapes alone tell what init does with arrays, and an update keeps it."""
    tx = WRAPPED[wrapper]()
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPEC_OF)
    shapes = {
        "attention": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)},
        "mlp": {
            "bias": jax.ShapeDtypeStruct((256,), jnp.float32),
            "kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32),
        },
    }
    params = jax.device_put(jax.tree.map(jnp.ones_like, shapes), shardings)
    if wrapper == "lookahead":
        shapes = optax.LookaheadParams(shapes, shapes)
        params = optax.LookaheadParams.init_synced(params)
    found = optax_flash.state_sharding(tx, shapes, shardings)
    state = tx.init(params)

    def check(expected, x):
        # What optax makes by itself, such as counters, stays on one device.
        if isinstance(x.sharding, NamedSharding):
            assert x.sharding.is_equivalent_to(expected, x.ndim)

    jax.tree.map(check, found, state)
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(found))
    state = jax.jit(tx.init, out_shardings=found)(params)
    grads = params.fast if wrapper == "lookahead" else params

    def step(state, _):
        return tx.update(grads, state, params)[1], None

    with jax.set_mesh(mesh):
        # On an explicit mesh a scan takes no state whose shardings change.
        jax.eval_shape(lambda state: jax.lax.scan(step, state, length=2), state)


def test_specs_under_a_mesh_and_one_for_a_subtree(mesh):
    tx = optax_flash.lion8(1e-3)
    params = {"a": {"x": make(0)["kernel"], "y": make(1)["kernel"]}, "b": jnp.ones(8)}
    with jax.set_mesh(mesh):
        sharding = optax_flash.state_sharding(tx, params, {"a": P("fsdp"), "b": P()})
    mu = optax.tree.get(sharding, "mu")
    assert mu["a"]["y"] == NamedSharding(mesh, P("fsdp", None))
    assert mu["b"] == NamedSharding(mesh, P(None))


def test_a_mesh_of_devices_that_are_not_there():
    mesh = jax.sharding.AbstractMesh((1024,), ("fsdp",))
    params = {"w": jax.ShapeDtypeStruct((8192, 1024), jnp.bfloat16)}
    sharding = optax_flash.state_sharding(
        optax_flash.adamw4(1e-3), params, NamedSharding(mesh, P("fsdp"))
    )
    scales = sharding.scales["mu_scales"]["w"]
    assert scales.shard_shape((8192, 32)) == (8, 32)


BAD = {
    "'b' has": ({"a": P()}, "has nothing for 'b'"),
    "extra": ({"a": P(), "b": P(), "c": P()}, "has 'c', which is not a param"),
    "containers": ([P(), P()], "has nothing for 'a'"),
    "divide": (
        {"a": P(None, "fsdp"), "b": P()},
        r"'a' .*axis 1 does not divide into 4",
    ),
    "axes": ({"a": P(), "b": P(None, "fsdp")}, r"'b' has shape \[8\] .*for 2 axes"),
    "mesh": ({"a": P("data"), "b": P()}, "param 'a' .*data"),
    "type": ({"a": "fsdp", "b": P()}, "param 'a' .*'fsdp'. Pass a NamedSharding"),
    "none": (None, "param 'a' is on no mesh"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD)
def test_bad_param_sharding_names_the_leaf(given, message):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    params = {"a": jnp.ones((64, 66)), "b": jnp.ones(8)}
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        optax_flash.state_sharding(optax_flash.lion8(1e-3), params, given)


def test_specs_without_a_mesh():
    with pytest.raises(ValueError, match="'kernel' .*no mesh. Call .*set_mesh"):
        optax_flash.state_sharding(optax_flash.lion8(1e-3), make(0), P("fsdp"))
