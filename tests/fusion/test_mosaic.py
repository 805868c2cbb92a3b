"""TPU kernels, interpreted: the same bits as XLA's, whatever the shape of the leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash.fusion import fuse
from optax_flash.fusion.backends import Target, choose, mosaic_tpu
from optax_flash.fusion.program import whole
from optax_flash.fusion.tiles import Origin, Shard
from tests.tiers import quick

# Not fused: in fused loops XLA puts multiply-adds in other places of each program.
NO_FUSION = {"xla_disable_hlo_passes": "fusion"}
jit = functools.partial(jax.jit, compiler_options=NO_FUSION)

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "lion": lambda: optax.lion(1e-3),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda: optax.rmsprop(1e-2),
    "ademamix": lambda: optax.contrib.ademamix(1e-2),
    "amsgrad": lambda: optax.amsgrad(1e-2),
}
CASES = [
    ((64, 256), None, "companded4"),
    ((5, 200), 24, "companded8"),
    ((3, 7, 96), None, "companded4"),
    # More columns than a block has.
    ((4100,), 24, "companded8"),
    ((2, 4290), None, "companded4"),
    ((40, 96), 32, "companded8"),
]
"""Shapes, bits of the weights (None: float32), codecs of the state."""


def program_of(tx, shape, bits=None, codec="companded8"):
    """What runs on a leaf of this shape."""
    tx = optax_flash.compress(tx, codecs=codec, min_size=1)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16 if bits else jnp.float32)}
    if bits:
        tx = optax_flash.master_weights(tx, bits)

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with fuse.watch() as leaves:
        jax.eval_shape(step, params, jax.eval_shape(tx.init, params), params)
    ((leaf, _),) = leaves
    return leaf.program


def operands_of(program, seed=0):
    """Any numbers: codes of every kind, scales that are powers of two."""
    rng = np.random.default_rng(seed)

    def operand(role, x):
        if role.kind == "scales":
            return 2.0 ** rng.integers(-3, 3, x.shape)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return rng.normal(size=x.shape) if x.shape else rng.uniform(0.5, 1.5)
        if x.dtype == jnp.int32 and not x.shape:
            return 0  # by which error feedback keeps products apart
        return rng.integers(0, min(1000, jnp.iinfo(x.dtype).max + 1), x.shape)

    return [
        jnp.asarray(operand(role, x.aval), x.aval.dtype)
        for role, x in zip(program.inputs, program.jaxpr.invars, strict=True)
    ]


def on_tpu(program, operands, shape=None, offsets=None):
    shape = shape or program.shape
    place = Origin(program.shape, offsets)

    def run(*operands):
        shard = Shard(program, place, shape, list(operands))
        return mosaic_tpu.launched(shard, interpret=True)

    return jit(run)(*operands)


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        width = f"uint{8 * a.dtype.itemsize}"
        bits = (np.asarray(x).view(width) for x in (a, b))
        np.testing.assert_array_equal(*bits)


@pytest.mark.parametrize(
    "shape, bits, codec",
    quick([((5, 200), 24, "companded8")], CASES),
    ids=str,
)
def test_equals_xla_on_any_shape(shape, bits, codec):
    program = program_of(optax.adamw(1e-2), shape, bits, codec)
    assert mosaic_tpu.unsupported(program, None) is None
    operands = operands_of(program)
    expected = jit(whole(program))(*operands)
    assert_same_bits(on_tpu(program, operands), expected)


@pytest.mark.full
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_xla_for_any_optimizer(name):
    program = program_of(OPTIMIZERS[name](), (9, 300), 24)
    assert mosaic_tpu.unsupported(program, None) is None
    operands = operands_of(program)
    expected = jit(whole(program))(*operands)
    assert_same_bits(on_tpu(program, operands), expected)


@pytest.mark.full
def test_a_shard_draws_the_bits_of_its_place():
    program = program_of(optax.adamw(1e-2), (4, 16, 256), 24)
    operands = operands_of(program)
    expected = jit(whole(program))(*operands)

    def part(role, x):
        if role.kind == "scalar":
            return x
        half = x.shape[-1] // 2
        return x[1:3, 8:, half:]

    cut = [part(*x) for x in zip(program.inputs, operands, strict=True)]
    found = on_tpu(program, cut, (2, 8, 128), (1, 8, 128))
    rows = zip(program.outputs, expected, strict=True)
    assert_same_bits(found, [part(*x) for x in rows])


@pytest.mark.full
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_group(bad):
    program = program_of(optax.adamw(1e-2), (32, 256))
    operands = operands_of(program)
    grad = next(
        i
        for i, (role, x) in enumerate(zip(program.inputs, operands, strict=True))
        if role.kind == "full" and i in program.aliases
    )
    operands[grad] = operands[grad].at[3, 40].set(bad)
    expected = jit(whole(program))(*operands)
    found = on_tpu(program, operands)
    for role, a, b in zip(program.outputs, found, expected, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        if role.kind == "scales":
            assert list(zip(*np.nonzero(np.isnan(np.asarray(a))), strict=True)) == [
                (3, 1)
            ]


REASONS = {
    "nothing is in codes": functools.partial(
        program_of, optax.adam(1e-3), (64, 64), codec={"mu": None, "nu": None}
    ),
    "groups of 64": functools.partial(
        program_of,
        optax.adam(1e-3),
        (64, 64),
        codec=optax_flash.Companded8(group=64),
    ),
    "not flashoptim's": functools.partial(
        program_of, optax.adam(1e-3), (64, 64), codec="flashoptim"
    ),
    "no 'cbrt'": functools.partial(
        program_of,
        optax.chain(
            optax.trace(0.9), optax.stateless(lambda u, _: jax.tree.map(jnp.cbrt, u))
        ),
        (64, 64),
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_the_rest_goes_to_xla_and_says_why(reason):
    backend, why = choose(REASONS[reason](), None, Target("tpu"))
    assert backend.name == "xla" and reason in why


def lowered(tx, platform="tpu", shape=(64, 128), sharding=None):
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
    state = jax.eval_shape(tx.init, {"w": jnp.zeros(shape)})
    traced = jax.jit(tx.update).trace(params, state, params)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_one_device_gets_a_kernel(implementation):
    tx = optax_flash.adamw8(1e-3, implementation=implementation)
    assert lowered(tx).count("tpu_custom_call") == 1


def test_one_by_name_that_does_not_fit_raises():
    tx = optax_flash.adamw8(1e-3, codecs="flashoptim", implementation="pallas")
    with pytest.raises(ValueError, match="shape \\[64, 128\\].*not flashoptim's"):
        lowered(tx)


def test_several_devices_need_explicit_axes():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("fsdp"))
    for implementation in (None, "xla"):
        tx = optax_flash.adamw8(1e-3, implementation=implementation)
        assert "tpu_custom_call" not in lowered(tx, sharding=sharding)
    tx = optax_flash.adamw8(1e-3, implementation="pallas")
    with pytest.raises(ValueError, match="a mesh of explicit axes"):
        lowered(tx, sharding=sharding)
