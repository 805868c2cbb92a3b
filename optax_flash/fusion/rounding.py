"""Arithmetic that gives the same bits however a compiler fuses it.

A compiler may compute ``x * y + z`` with one rounding or with two, and ``x / y / z`` as
``x / (y * z)``. Which it does depends on what surrounds the expression, so a leaf, a
slice of it and a tile in a kernel may differ in the last bit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_flash.fusion import jaxprs, ops
from optax_flash.fusion.jaxprs import ClosedJaxpr, slice_equations
from optax_flash.fusion.simplify import inline

PRODUCTS = frozenset("mul div integer_pow square".split())
"""Primitives whose results a compiler may merge into what uses them."""


def zero_of(step: jax.Array) -> jax.Array:
    """A zero of which compilers do not know that it is one.

    Args:
      step: a count that is not negative. # shape=(), dtype=int32
    """
    return lax.shift_right_logical(step, jnp.int32(31))


def apart(function: Callable[..., Any], zero: jax.Array) -> Callable[..., Any]:
    """The same function; every product and quotient in it is rounded by itself.

    Args:
      function: of arrays.
      zero: of :func:`zero_of`.
    """

    def wrapped(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = evaluate(closed, jax.tree.leaves(args), zero)
        return jax.tree.structure(shapes).unflatten(results)

    return wrapped


def evaluate(
    closed: ClosedJaxpr, args: list[Any], zero: jax.Array, as_they_are: int = 0
) -> list[Any]:
    """The results of a jaxpr, in which products are rounded by themselves.

    Args:
      closed: the jaxpr.
      args: its operands.
      zero: of :func:`zero_of`.
      as_they_are: so many of the first results, with all that they are made of but
        the other results, are left to the compiler.
    """
    jaxpr = inline(closed.jaxpr, every=True)
    known = {*jaxpr.constvars, *jaxpr.invars}
    left = slice_equations(jaxpr.eqns, jaxpr.outvars[:as_they_are], known)
    others = jaxpr.outvars[as_they_are:]
    left = {x for eqn in left for x in eqn.outvars if x not in others}

    def rule(eqn: Any, values: list[Any]) -> list[Any]:
        results = jaxprs.bind(eqn, values)
        if eqn.outvars[0] in left or not _is_product(eqn):
            return results
        return [alone(results[0], zero)]

    return jaxprs.evaluate(jaxpr, args, rule, closed.consts)


def alone(x: jax.Array, zero: jax.Array) -> jax.Array:
    """A product that a compiler does not merge into what uses it.

    Args:
      x: anything; what is not float32 stays as it is. Its derivative does, too.
      zero: of :func:`zero_of`.
    """
    if jax.typeof(x).dtype != jnp.float32:
        return x
    return ops.Elementwise(_changed, None, _unchanged)(x, zero)[0]


def _changed(static: None, x: jax.Array, zero: jax.Array) -> tuple[jax.Array]:
    """By nothing, of which compilers do not know."""
    del static
    bits = lax.bitcast_convert_type(x, jnp.int32) ^ zero
    return (lax.bitcast_convert_type(bits, jnp.float32),)


def _unchanged(static: None, x: jax.Array, zero: jax.Array) -> tuple[jax.Array]:
    del static, zero
    return (x,)


def _is_product(eqn: Any) -> bool:
    dtype = eqn.outvars[0].aval.dtype
    return eqn.primitive.name in PRODUCTS and dtype == jnp.float32
