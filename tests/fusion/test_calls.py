"""JAX's primitives that call a jaxpr are known by name, whatever the version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.extend.core import primitives

from optax_flash.fusion import program, simplify
from optax_flash.fusion.jaxprs import CALLS, flat_equations
from optax_flash.fusion.ops import Tile

# What runs otherwise than its jaxpr says, and is left to XLA.
LEFT = {"remat2"}
# Of all functions of JAX none makes this one any more.
UNUSED = {"call"}


@jax.custom_jvp
def custom_jvp(x):
    return 2 * x


custom_jvp.defjvp(lambda x, t: (custom_jvp(*x), 2 * t[0]))


@jax.custom_vjp
def custom_vjp(x):
    return 2 * x


custom_vjp.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

CALLERS = {
    "jit": jax.jit(lambda x: 2 * x),
    "nested jit": jax.jit(jax.jit(lambda x: 2 * x)),
    "checkpoint": jax.checkpoint(lambda x: 2 * x),
    "named_call": jax.named_call(lambda x: 2 * x),
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "grad": jax.grad(lambda x: jnp.sum(jax.jit(lambda x: x * x)(x))),
    "jvp of custom_jvp": lambda x: jax.jvp(custom_jvp, (x,), (x,))[1],
    "grad of custom_vjp": jax.grad(lambda x: jnp.sum(custom_vjp(x))),
    "linearize": lambda x: jax.linearize(jax.jit(jnp.sin), x)[1](x),
    "closure_convert": lambda x: jax.closure_convert(lambda y: 2 * y, x)[0](x),
    "vmap": jax.vmap(jax.jit(lambda x: 2 * x)),
}


def jaxprs(eqn):
    """Those among an equation's parameters."""
    return [x for x in eqn.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


@pytest.mark.parametrize("name", CALLERS)
def test_what_calls_in_a_trace_is_known(name):
    jaxpr = jax.make_jaxpr(CALLERS[name])(jnp.ones(3)).jaxpr
    found = {eqn.primitive.name for eqn in flat_equations(jaxpr) if jaxprs(eqn)}
    unknown = found - set(CALLS) - LEFT
    assert not unknown, f"add {unknown} to CALLS of fusion/jaxprs.py"


def test_what_jax_lists_is_known():
    listed = {
        getattr(primitives, name).name
        for name in dir(primitives)
        if name.endswith(("jit_p", "call_p", "remat_p"))
    }
    assert {"jit", "custom_jvp_call", "custom_vjp_call"} <= listed
    unknown = listed - set(CALLS) - LEFT - UNUSED
    assert not unknown, f"add {unknown} to CALLS of fusion/jaxprs.py"


def test_inlined_calls_are_calls_of_programs():
    assert set(simplify.INLINED) <= set(CALLS)
    assert primitives.jit_p.name in simplify.INLINED
    assert primitives.closed_call_p.name in simplify.INLINED


def with_closed_call(f, *args):
    """The jaxpr of ``f``, its call of jit as the call that JAX's own loops make."""
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    eqns = [
        eqn.replace(
            primitive=primitives.closed_call_p,
            params={"call_jaxpr": eqn.params["jaxpr"]},
        )
        if eqn.primitive is primitives.jit_p
        else eqn
        for eqn in jaxpr.eqns
    ]
    assert len(eqns) == 2
    return jaxpr.replace(eqns=eqns)


def test_a_closed_call_is_looked_into():
    inner = jax.jit(lambda x, y: (jnp.sin(x) * y, y + 1))
    x, y = jnp.arange(8.0)[None], jnp.ones((1, 8))
    jaxpr = with_closed_call(lambda x, y: (3 * x, *inner(x, y)), x, y)
    names = [eqn.primitive.name for eqn in flat_equations(jaxpr)]
    assert {"sin", "add"} <= set(names)
    call = next(eqn for eqn in jaxpr.eqns if jaxprs(eqn))
    assert program.misfit(call) is None
    inlined = simplify.inline(jaxpr)
    assert not any(map(jaxprs, inlined.eqns)) and len(inlined.eqns) == 4
    tile = Tile((1, 8), jnp.arange(8, dtype=jnp.uint32)[None], None)
    for each in (jaxpr, inlined):
        found = program.evaluate(each, tile, [x, y])
        for a, b in zip(found, [3 * x, *inner(x, y)], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_sum_in_a_closed_call_is_no_part_of_a_program():
    inner = jax.jit(lambda x: x * jnp.sum(x))
    jaxpr = with_closed_call(lambda x: inner(3 * x), jnp.ones(8))
    call = next(eqn for eqn in jaxpr.eqns if jaxprs(eqn))
    assert isinstance(call, core.JaxprEqn)
    assert "sum" in program.misfit(call)
