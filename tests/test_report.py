"""The numerics report: shares by hand, through every wrapper, and what it warns of."""

import functools
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash import NumericsReport, compress, master_weights, numerics_report
from tests.tiers import quick

SHAPE = (64, 64)
NAN = float("nan")

pytestmark = pytest.mark.usefixtures("quick_compile")


def report(tx, state, params, grads, **extra_args):
    """As it is meant to be called."""
    look = jax.jit(functools.partial(numerics_report, tx))
    return look(state, params, grads, **extra_args)


def make_params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": SHAPE, "bias": (64,)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def after_steps(tx, params, steps=3):
    """Params and state after some steps, and the gradients of the next one."""
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, random_like(params, i))
    return params, state, random_like(params, steps)


def random_like(params, seed):
    rng = np.random.default_rng(100 + seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
    )


# --- codes


def with_codes(tx, codes, scales):
    """A state of one momentum with codes and scales set by hand."""
    state = tx.init({"w": jnp.zeros(SHAPE)})
    field = optax.TraceState(trace={"w": jnp.asarray(codes)})
    return state._replace(
        inner_state=field, scales={"trace_scales": {"w": jnp.asarray(scales)}}
    )


def trace(codec):
    return compress(optax.trace(0.9), codec)


def test_shares_of_codes():
    codes = np.full(SHAPE, 17, np.uint8)
    codes[0, :10] = 0
    codes[1, :3], codes[2, :4] = 127, 255  # the largest of both signs
    codes[3, :] = 128  # zero with a sign
    scales = np.ones((64, 2), jnp.bfloat16)
    scales[4, 1], scales[5, 0] = np.nan, np.inf
    zeros = {"w": jnp.zeros(SHAPE)}
    tx = trace("companded8")
    found = report(tx, with_codes(tx, codes, scales), zeros, zeros)
    assert found.zero["w/trace"] == np.float32(74 / 4096)
    assert found.saturated["w/trace"] == np.float32(7 / 4096)
    assert found.non_finite["w/trace"] == np.float32(2 / 128)


def test_shares_of_unsigned_codes():
    tx = optax_flash.scale_by_adam8()
    zeros = {"w": jnp.zeros(SHAPE)}
    state = tx.init(zeros)
    codes = np.full(SHAPE, 128, np.uint8)
    codes[0, :5], codes[1, :6], codes[2] = 0, 255, 127
    nu = state.inner_state._replace(nu={"w": jnp.asarray(codes)})
    scales = state.scales | {"nu_scales": {"w": jnp.ones((64, 2), jnp.bfloat16)}}
    found = report(tx, state._replace(inner_state=nu, scales=scales), zeros, zeros)
    assert found.zero["w/nu"] == 0  # no code is
    assert found.saturated["w/nu"] == np.float32(6 / 4096)
    assert found.zero["w/mu"] == 1 and found.saturated["w/mu"] == 0


def test_a_zero_point_is_a_zero():
    codes = np.full(SHAPE, 77, np.uint8)
    codes[:, :32] = 100  # the zero point
    codes[0, 40:45], codes[1, 40:46] = 0, 255
    scales = np.ones((64, 2), jnp.bfloat16)
    scales[:, 1] = 100
    scales[7, 0] = np.nan
    tx = trace("affine8")  # one group of 128 to a row
    zeros = {"w": jnp.zeros(SHAPE)}
    found = report(tx, with_codes(tx, codes, scales), zeros, zeros)
    assert found.zero["w/trace"] == np.float32((64 - 1) * 32 / 4096)
    assert found.saturated["w/trace"] == np.float32(11 / 4096)
    assert found.non_finite["w/trace"] == np.float32(1 / 64)


@pytest.mark.parametrize("codec", ["companded8", "flashoptim", "affine8"])
def test_real_codes_agree_with_what_they_decode_to(codec):
    tx = compress(optax.trace(0.9), codec)
    params, state, grads = after_steps(tx, {"w": make_params()["kernel"]})
    x = np.asarray(jnp.where(jnp.abs(grads["w"]) > 1, grads["w"], 0))
    _, state = tx.update({"w": jnp.asarray(x)}, tx.init(params), params)
    found = report(tx, state, params, grads)
    assert found.zero["w/trace"] == np.float32(np.mean(x == 0))
    if codec == "flashoptim":
        # In each group the largest, but for ties; elsewhere scales are rounded up.
        np.testing.assert_allclose(found.saturated["w/trace"], 1 / 32, rtol=0.1)


# --- steps

# By storage: params, transformation around the steps, half a code at weights from 1 to
# 2, and whether steps below it are lost.
STORAGE = {
    "float32": (jnp.float32, None, 2**-24, True),
    "bfloat16": (jnp.bfloat16, None, 2**-8, True),
    "float16": (jnp.float16, None, 2**-11, True),
    "bfloat16_24": (jnp.bfloat16, dict(bits=24), 2**-16, False),
    "bfloat16_32": (jnp.bfloat16, dict(bits=32), 2**-24, True),
    "float16_24": (jnp.float16, dict(bits=24), 2**-19, False),
    "float16_32": (jnp.float16, dict(bits=32), 2**-24, True),
    "published_24": (
        jnp.bfloat16,
        dict(bits=24, codec="flashoptim"),
        2**-9 / 127,
        True,
    ),
    "published_float16": (
        jnp.float16,
        dict(bits=24, codec="flashoptim"),
        2**-12 / 127,
        True,
    ),
    "finished": (jnp.bfloat16, dict(bits=24), 2**-16, False),
    "finished_32": (jnp.bfloat16, dict(bits=32), 2**-24, True),
}


@pytest.mark.parametrize("dtype, storage, half, lost", STORAGE.values(), ids=STORAGE)
def test_shares_of_small_steps(dtype, storage, half, lost):
    """Of weights 1.5 * 2**e, with steps of known multiples of half a code."""
    multiples = np.array([0.0, 1e-3, 0.5, 0.98, 1.02, 2.0, 100.0, -0.9, -1.1, -3.0])
    exponents = np.arange(-8, 8)[:, None]
    shape = (16, 10)
    params = {"w": jnp.asarray(np.broadcast_to(1.5 * 2.0**exponents, shape), dtype)}
    steps = (multiples * half * 2.0**exponents).astype(np.float32)
    inner = optax.identity()
    tx = inner if storage is None else master_weights(inner, **storage)
    # Without a residual the update has the gradient's dtype, so they come in float32.
    found = report(tx, tx.init(params), params, {"w": jnp.asarray(steps)})
    small = found.lost if lost else found.noisy
    assert not (found.noisy if lost else found.lost)
    assert small["w"] == np.float32(4 / 10)
    expected = half * np.mean(2.0**exponents)
    np.testing.assert_allclose(found.half_code["w"], expected, rtol=1e-6)
    expected = np.sqrt(np.mean(np.square(steps.astype(np.float64))))
    np.testing.assert_allclose(found.update_rms["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bits", [24, 32])
def test_steps_are_those_that_the_weights_take(dtype, bits):
    """And each is known before it is rounded, whatever the params are kept in."""
    tx = master_weights(optax_flash.adamw8(1e-3), bits, finished=False)
    params, state, grads = after_steps(tx, make_params(dtype))
    found = report(tx, state, params, grads)
    updates, new_state = jax.jit(tx.update)(grads, state, params)
    before = optax_flash.master_params(state, params)
    params = optax.apply_updates(params, updates)
    after = optax_flash.master_params(new_state, params)
    for path in params:
        moved = np.asarray(after[path], np.float64) - np.asarray(before[path])
        size = np.sqrt(np.mean(np.square(moved)))
        # Rounding to 24 bits adds noise of a code, 3 % of these steps.
        rtol = 1e-2 if bits == 24 and dtype == jnp.bfloat16 else 1e-3
        np.testing.assert_allclose(found.update_rms[path], size, rtol=rtol)


# --- wrappers


def inner():
    return optax_flash.adamw8(1e-3)


WRAPPED = {
    "chain": lambda: optax.chain(optax.identity(), inner()),
    "named_chain": lambda: optax.named_chain(("a", optax.identity()), ("b", inner())),
    "partition": lambda: optax.partition(
        {"a": inner(), "b": inner()}, {"kernel": "a", "bias": "b"}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        optax_flash.adamw8, hyperparam_dtype=jnp.float32
    )(1e-3),
    "apply_if_finite": lambda: optax.apply_if_finite(inner(), 3),
    "multi_steps": lambda: optax.MultiSteps(inner(), 1),
    "multi_steps_tx": lambda: optax.MultiSteps(inner(), 1).gradient_transformation(),
    "interpret": lambda: optax_flash.adamw8(1e-3, implementation="interpret"),
}
OUTSIDE = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax.masked(tx, {"kernel": True, "bias": True}),
    "partition": lambda tx: optax.partition({"a": tx}, {"kernel": "a", "bias": "a"}),
}


# Every wrapper alone or under master weights, and the first both.
@pytest.mark.parametrize(
    "wrapped, master",
    quick(
        [("chain", False), ("chain", True)],
        [("chain", True), *((name, i % 2 > 0) for i, name in enumerate(WRAPPED))],
    ),
)
def test_wrapped_it_is_the_same(wrapped, master):
    tx, dtype = WRAPPED[wrapped](), jnp.float32
    if master:
        tx, dtype = master_weights(tx), jnp.bfloat16
    found = report_after_steps(tx, make_params(dtype))
    assert_close(found, unwrapped(dtype, finished=True))


@pytest.mark.parametrize("outside", quick(["chain"], OUTSIDE))
@pytest.mark.parametrize("dtype", quick([jnp.bfloat16], [jnp.bfloat16, jnp.float16]))
def test_around_master_weights_it_is_the_same(outside, dtype):
    tx = OUTSIDE[outside](master_weights(inner(), finished=False))
    found = report_after_steps(tx, make_params(dtype))
    assert_close(found, unwrapped(dtype, finished=False))


@functools.cache
def unwrapped(dtype, finished):
    """The report of the bare optimizer, under master weights if params need them."""
    tx = inner() if dtype == jnp.float32 else master_weights(inner(), finished=finished)
    return report_after_steps(tx, make_params(dtype))


def report_after_steps(tx, params):
    params, state, grads = after_steps(tx, params)
    return report(tx, state, params, grads)


def assert_close(found, expected):
    assert set(found.zero) == {"kernel/mu", "kernel/nu"}
    assert set(found.update_rms) == {"kernel", "bias"}
    # A last bit may move a value to the next code.
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)


def test_masked_params_have_no_codes():
    params = {"a": make_params(), "b": make_params(seed=1)}
    for mask in (
        {"a": True, "b": False},
        {"a": {"kernel": True, "bias": True}, "b": False},
    ):
        tx = optax.masked(optax_flash.adamw8(1e-3), mask)
        state = tx.init(params)
        found = report(tx, state, params, params)
        assert set(found.zero) == {"a/kernel/mu", "a/kernel/nu"}
        # optax passes the gradients of masked params on as their updates.
        size = np.sqrt(np.mean(np.square(params["b"]["kernel"])))
        np.testing.assert_allclose(found.update_rms["b/kernel"], size, rtol=1e-6)


def test_partition_of_other_codecs():
    tx = optax.partition(
        {
            "z": compress(optax.adam(1e-3), "affine8"),
            "a": compress(optax.adam(1e-3), "flashoptim"),
            "m": optax.sgd(1e-3),
        },
        {"x": "z", "y": "a", "w": "m"},
    )
    params = {name: jnp.sign(make_params()["kernel"]) for name in "xyw"}
    _, state = tx.update(params, tx.init(params), params)
    found = report(tx, state, params, params)
    assert set(found.zero) == {"x/mu", "x/nu", "y/mu", "y/nu"}
    # Each was read by its own codec: no number is zero, and one codec is symmetric.
    assert set(map(float, found.zero.values())) == {0.0}
    assert found.saturated["y/mu"] == 1 and found.saturated["x/mu"] < 0.6


def test_two_fields_of_one_name():
    tx = optax.chain(optax_flash.trace8(0.9), optax_flash.trace8(0.9))
    params = make_params()
    found = report(tx, tx.init(params), params, params)
    assert set(found.zero) == {"kernel/trace", "kernel/trace_1"}


def test_held_back_updates_are_no_steps():
    tx = optax.MultiSteps(optax_flash.adamw8(1e-9), 2)
    params = make_params()
    state = tx.init(params)
    found = report(tx, state, params, params)
    assert found.update_rms["kernel"] == 0 == found.lost["kernel"]
    _, state = tx.update(params, state, params)
    found = report(tx, state, params, params)
    assert found.update_rms["kernel"] > 0 and found.lost["kernel"] > 0.9


def test_stock_optax_has_steps_and_no_codes():
    params = make_params(jnp.bfloat16)
    tx = optax.adamw(1e-5)
    found = report(tx, tx.init(params), params, params)
    assert found.zero == {} and set(found.lost) == set(params)
    assert found.lost["kernel"] > 0.9


def test_a_bare_array():
    params = make_params(jnp.bfloat16)["kernel"]
    tx = master_weights(optax_flash.adamw8(1e-3))
    found = report_after_steps(tx, params)
    assert set(found.zero) == {"params/mu", "params/nu"}
    assert set(found.noisy) == {"params"}


def test_what_is_not_floating_or_empty_is_left_out():
    params = {"w": jnp.ones(SHAPE), "n": jnp.zeros(4, jnp.int32), "e": jnp.ones((0, 4))}
    tx = optax.masked(optax_flash.adamw8(1e-3), {"w": True, "n": False, "e": True})
    found = report(tx, tx.init(params), params, params)
    assert set(found.update_rms) == {"w"}


def test_extra_args_reach_the_update():
    tx = optax.chain(
        optax_flash.adamw8(1e-3), optax.contrib.reduce_on_plateau(patience=1)
    )
    params = make_params()
    found = report(tx, tx.init(params), params, params, value=1.0)
    assert found.update_rms["kernel"] > 0


def test_vmap():
    """A stack of models has a stack of reports."""
    many = [make_params(seed=seed) for seed in range(2)]
    tx = optax_flash.adamw8(1e-3)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
    look = functools.partial(numerics_report, tx)
    found = jax.jit(jax.vmap(look))(jax.vmap(tx.init)(stacked), stacked, stacked)
    for i, params in enumerate(many):
        alone = report(tx, tx.init(params), params, params)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], found), alone)


@pytest.mark.parametrize(
    "kind, spec",
    quick(
        [(AxisType.Explicit, P("x", "y"))],
        [
            (AxisType.Auto, P("x", None)),
            (AxisType.Explicit, P(None, "y")),
            (AxisType.Auto, P("x", "y")),
            (AxisType.Explicit, P("x", "y")),
        ],
    ),
)
def test_sharded_it_is_the_same(kind, spec):
    tx = master_weights(inner())
    params = {"kernel": make_params(jnp.bfloat16)["kernel"]}
    expected = report(tx, tx.init(params), params, params)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, spec))
        found = report(tx, tx.init(params), params, params)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


# --- cost


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_it_makes_no_new_state(finished, implementation):
    """Nor anything else of the size of a leaf: scalars leave, few bytes are used."""
    jax.config.update("jax_disable_most_optimizations", False)
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)}
    tx = master_weights(
        optax_flash.adamw8(1e-3), finished=finished, implementation=implementation
    )
    state = jax.eval_shape(tx.init, params)
    look = jax.jit(functools.partial(numerics_report, tx))
    memory = look.lower(state, params, params).compile().memory_analysis()
    size = 1024 * 1024
    assert memory.output_size_in_bytes < 1024
    assert memory.temp_size_in_bytes < 0.1 * size


def test_it_is_traced_once():
    chex.clear_trace_counter()
    tx, params = optax_flash.adamw8(1e-3), make_params()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def look(state, params, grads):
        return numerics_report(tx, state, params, grads)

    state = tx.init(params)
    for _ in range(3):
        look(state, params, params)
        _, state = tx.update(params, state, params)


# --- for people


def test_it_prints_a_table():
    tx = master_weights(optax_flash.adamw8(1e-6))
    text = str(report_after_steps(tx, make_params(jnp.bfloat16)))
    assert re.search(r"^kernel +5\.\de-07 +\d\.\de-0\d +\d+\.\d\d% +noisy$", text, re.M)
    assert re.search(r"^kernel/mu( +\d+\.\d\d%){3}$", text, re.M)


def warned(found, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found.warn(**kwargs)
    return [str(warning.message) for warning in caught]


def steps_of(size, tx_of, dtype=jnp.bfloat16):
    """The report of equal steps on weights near 1, and on some near 1e-4."""
    near_1 = jnp.full((8, 32), 1.25, dtype)
    params = {"block": {"scale": near_1, "kernel": 1e-4 * near_1}}
    tx = tx_of(optax.identity())
    grads = jax.tree.map(lambda p: jnp.full_like(p, size), params)
    return report(tx, tx.init(params), params, grads)


def test_the_warning_names_the_leaf_whose_steps_are_lost():
    published = functools.partial(master_weights, codec="flashoptim")
    (message,) = warned(steps_of(1e-5, published))
    assert "'block/scale'" in message and "learning rate" in message
    assert "100% of their steps (RMS 1.0e-05)" in message
    assert "half a code (1.5e-05)" in message and "lost" in message
    assert "bits=32" in message
    # FlashOptim's own check would still have warned here.
    assert warned(steps_of(1.6e-5, published)) == []


def test_the_warning_tells_noise_from_loss():
    (message,) = warned(steps_of(1e-6, master_weights))
    assert "'block/scale'" in message and "lost" not in message
    assert "noise" in message and "31 equal steps" in message  # 2**-15 / 1e-6
    assert warned(steps_of(1e-6, functools.partial(master_weights, bits=32))) == []


def test_the_warning_about_bare_bfloat16():
    (message,) = warned(steps_of(3e-3, lambda tx: tx))
    assert "'block/scale'" in message and "lost" in message


def test_how_many_small_steps_are_worth_a_warning():
    empty = dict.fromkeys(NumericsReport._fields, {})
    some = {"w": np.float32(0.3)}
    sizes = {"update_rms": {"w": np.float32(1.0)}, "half_code": {"w": np.float32(1.0)}}
    found = NumericsReport(**empty | sizes | {"lost": some})
    assert warned(found) == []
    assert len(warned(found, share=0.2)) == 1


def test_the_warning_names_the_leaf_that_is_poisoned():
    tx, params = optax_flash.adamw8(1e-3), make_params()
    grads = params | {"kernel": params["kernel"].at[3, 4].set(NAN)}
    _, state = tx.update(grads, tx.init(params), params)
    found = report(tx, state, params, params)
    assert found.non_finite["kernel/mu"] == np.float32(1 / 128)
    assert np.isnan(found.update_rms["kernel"]) and np.isfinite(
        found.update_rms["bias"]
    )
    mu, nu = warned(found)
    assert "'kernel/mu'" in mu and "0.78%" in mu and "'kernel/nu'" in nu


# --- errors


@pytest.mark.parametrize(
    "tx, message",
    [
        (optax.adamw(1e-3), "another structure"),
        (optax.chain(optax.identity(), optax_flash.adamw8(1e-3)), "another structure"),
        (optax_flash.adamw8(1e-3, codecs="flashoptim"), "kernel/mu.*other codecs"),
    ],
)
def test_a_state_of_another_transformation(tx, message):
    params = make_params()
    state = optax_flash.adamw8(1e-3).init(params)
    with pytest.raises(ValueError, match=message):
        numerics_report(tx, state, params, params)
    if not isinstance(tx.init(params), optax_flash.CompressState):
        with pytest.raises(ValueError, match="another structure"):
            numerics_report(optax_flash.adamw8(), tx.init(params), params, params)


def test_gradients_of_another_tree():
    params = make_params()
    tx = optax_flash.adamw8(1e-3)
    with pytest.raises(ValueError, match="gradients: 'bias' is missing"):
        numerics_report(tx, tx.init(params), params, {"kernel": params["kernel"]})


def test_a_jitted_update():
    tx = inner()._replace(update=jax.jit(inner().update))
    found = report_after_steps(tx, make_params())
    assert_close(found, unwrapped(jnp.float32, finished=True))


def test_a_jitted_init():
    """A state says its codecs itself, also where a cached trace made it."""
    tx = optax_flash.adamw8(1e-3)
    jitted = tx._replace(init=jax.jit(tx.init))
    params = make_params()
    state = jitted.init(params)
    got, expected = (numerics_report(x, state, params, params) for x in (jitted, tx))
    chex.assert_trees_all_equal(got._asdict(), expected._asdict())
    assert got.zero
