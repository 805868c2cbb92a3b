"""Which programs the GPU backends take; needs neither a GPU nor their compilers."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.interpreters import ad

import optax_flash
from optax_flash.fusion import fuse
from optax_flash.fusion.backends import (
    Target,
    choose,
    gpu,
    jax_triton,
    pallas_triton,
    unsupported,
)
from optax_flash.fusion.backends.triton_source import KNOWN, Unsupported, Writer
from optax_flash.fusion.program import ELEMENTWISE

# These are no primitives, or none that reaches a backend.
DROPPED = {"copy", "copy_p", "stop_gradient"}
UNLIKE_THEIR_NAME = {
    "add_any": ad.add_jaxvals,
    "and": lambda x, y: lax.bitwise_and(*_ints(x, y)),
    "bitcast_convert_type": lambda x: lax.bitcast_convert_type(
        x, f"uint{x.dtype.itemsize * 8}"
    ),
    "clamp": lambda x: lax.clamp(x, x, x),
    "convert_element_type": lambda x: lax.convert_element_type(x, jnp.int32),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "not": lambda x: lax.bitwise_not(*_ints(x)),
    "or": lambda x, y: lax.bitwise_or(*_ints(x, y)),
    "select_n": lambda x: lax.select_n(x > 0, x, x),
    "shift_left": lambda x, y: lax.shift_left(*_ints(x, y)),
    "shift_right_arithmetic": lambda x, y: lax.shift_right_arithmetic(*_ints(x, y)),
    "shift_right_logical": lambda x, y: lax.shift_right_logical(*_ints(x, y)),
    "xor": lambda x, y: lax.bitwise_xor(*_ints(x, y)),
}
OF_TWO = set(
    "add add_any and atan2 div eq ge gt le lt max min mul ne or pow rem shift_left "
    "shift_right_arithmetic shift_right_logical sub xor".split()
)


def _ints(*arrays):
    return [x.astype(jnp.int32) for x in arrays]


def primitive_as_function(name):
    function = UNLIKE_THEIR_NAME.get(name) or getattr(lax, name)
    return (lambda x: function(x, x)) if name in OF_TWO else function


def pallas_lowers(name, dtype):
    def kernel(x, out):
        out[...] = primitive_as_function(name)(x[...]).astype(out.dtype)

    def call(x):
        return pl.pallas_call(
            kernel,
            out_shape=x,
            compiler_params=plgpu.CompilerParams(num_warps=1),
        )(x)

    x = jax.ShapeDtypeStruct((64,), dtype)

    def kernel_call(x):
        types = [jax.core.ShapedArray(x.shape, x.dtype)]
        around = functools.partial(pallas_triton.compiling, gpu.PRESUMED)
        return gpu.call(lambda x: [call(x)], [x], types, around)

    try:
        jax.jit(kernel_call).trace(x).lower(lowering_platforms=("cuda",))
    except NotImplementedError:
        return False
    return True


@pytest.mark.full
def test_what_pallas_lacks_is_known_exactly():
    names = ELEMENTWISE - DROPPED
    for name in names:
        x = jnp.ones(64)
        eqns = jax.make_jaxpr(primitive_as_function(name))(x).eqns
        assert eqns[-1].primitive.name == name
    lacking = {name for name in names if not pallas_lowers(name, jnp.float32)}
    assert lacking == pallas_triton.UNSUPPORTED
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = {name for name in names if not pallas_lowers(name, dtype)}
        assert narrow - lacking == pallas_triton.UNSUPPORTED_IN_16_BITS


def test_the_triton_backend_knows_every_elementwise_primitive():
    assert ELEMENTWISE <= KNOWN


class State(NamedTuple):
    mu: optax.Updates


def momentum(function):
    """An optimizer that has a function of its momentum in it."""

    def update(updates, state, params=None):
        mu = jax.tree.map(lambda m, g: function(0.9 * m + g), state.mu, updates)
        return mu, State(mu)

    return optax.GradientTransformation(
        lambda params: State(jax.tree.map(jnp.zeros_like, params)), update
    )


def program_of(tx, shape=(512, 512), dtype=jnp.float32):
    params = jax.ShapeDtypeStruct(shape, dtype)
    state = jax.eval_shape(tx.init, params)
    with fuse.watch() as leaves:
        jax.eval_shape(tx.update, params, state, params)
    ((leaf, _),) = leaves
    return leaf.program


@pytest.mark.parametrize(
    "function, reason",
    [
        (jnp.tanh, None),
        (jnp.round, "'round'"),
        (lambda x: jnp.where(x > 0, jnp.round(x), x), "'round'"),
        (lambda x: x.astype(jnp.bfloat16) / x.astype(jnp.bfloat16), "'div' for bfloat"),
    ],
    ids=["tanh", "round", "round_in_a_call", "div_in_16_bits"],
)
def test_what_pallas_lacks_is_left_to_xla(function, reason, monkeypatch):
    monkeypatch.setattr(jax_triton, "absent", lambda: "jax-triton is not installed")

    def in_float32(x):
        return function(x).astype(jnp.float32)

    program = program_of(optax_flash.compress(momentum(in_float32)))
    backend, because = choose(program, None, Target("cuda", gpu.PRESUMED))
    assert backend.name == ("xla" if reason else "pallas")
    assert reason is None or reason in because
    assert unsupported(program, "interpret") is None


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tx = optax_flash.compress(optax.adam(1e-3), implementation="triton")
    params = jnp.ones((64, 64))
    with pytest.raises(ValueError, match=r"jax-triton is not installed"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_what_has_no_form_in_triton_is_a_reason(monkeypatch):
    monkeypatch.setattr(jax_triton, "absent", lambda: None)
    program = program_of(optax_flash.compress(optax.adam(1e-3)))
    assert jax_triton.unsupported(program, None) is None
    x = jax.ShapeDtypeStruct((4, 32), jnp.float32)
    for function in (lambda x: lax.cumsum(x, 1), lambda x: x.max(0), lambda x: x[:, 1]):
        with pytest.raises(Unsupported):
            Writer().call(function, [x], ["x"])
