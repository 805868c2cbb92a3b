"""Elementwise equations where vectors hold 32 bits a number, as on TPUs.

Integers of 8 and 16 bits are held in int32, extended as their type says; so are uint32,
by their bits. A bfloat16 is held in float32. Results are those of the equation in its
own types, bit for bit.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_flash.fusion.jaxprs import CASTS, Literal, constant

DTYPES = frozenset("float32 bfloat16 int32 uint32 int16 uint16 int8 uint8 bool".split())
"""Those that can be held."""

UNSUPPORTED = frozenset("cbrt expm1".split())
"""The elementwise primitives that Pallas cannot lower to Mosaic."""

_UINT32 = np.dtype(np.uint32)
_LOWEST = np.int32(-(2**31))
_COMPARISONS = frozenset("eq ne lt le gt ge".split())
_SAME = CASTS.union("copy copy_p expand_dims reshape squeeze stop_gradient".split())


def hold(x: Any) -> Any:
    """A number or an array as it is held."""
    name = np.dtype(x.dtype).name
    if name == "uint32":
        return lax.bitcast_convert_type(x, jnp.int32)
    if name in ("float32", "int32", "bool"):
        return x
    return x.astype(jnp.float32 if name == "bfloat16" else jnp.int32)


def hold_literal(x: Literal) -> Any:
    """The same of a literal, as NumPy's: a kernel has no constants of its own."""
    value = constant(x)
    if value.dtype == _UINT32:
        return value.view(np.int32)
    if value.dtype.kind in "iu":
        return np.int32(value)
    return np.float32(value) if _is_float(value.dtype) else value


def misfit(eqn: Any) -> str | None:
    """Why an equation cannot be evaluated, in words; None if it can."""
    name = eqn.primitive.name
    dtypes = {x.aval.dtype for x in (*eqn.invars, *eqn.outvars)}
    for dtype in dtypes:
        if dtype.name not in DTYPES:
            return f"there is no {dtype} on TPUs"
    if name in UNSUPPORTED:
        return f"Pallas has no {name!r} on TPUs"
    if _UINT32 in dtypes and name in ("div", "rem"):
        return f"there is no {name!r} of uint32 on TPUs"
    if name == "convert_element_type" and eqn.invars[0].aval.dtype == _UINT32:
        return "uint32 become floats" if _is_float(eqn.outvars[0].aval.dtype) else None
    return None


def apply(eqn: Any, args: list[Any], shape: tuple[int, ...]) -> Any:
    """An elementwise equation of numbers, and of arrays of ``shape``."""
    name, out, params = eqn.primitive.name, eqn.outvars[0].aval, eqn.params
    x, before, after = args[0], eqn.invars[0].aval.dtype, out.dtype
    if name in _SAME:
        return x
    if name == "broadcast_in_dim":
        return x if jnp.ndim(x) or not out.shape else jnp.broadcast_to(x, shape)
    if name == "convert_element_type":
        return _converted(x, before, after)
    if name == "bitcast_convert_type":
        return _bitcast(x, before, after)
    if name == "select_n" and out.shape:
        which, *cases = args
        no, yes = (jnp.broadcast_to(case, shape) for case in cases)
        return jnp.where(which, yes, no)
    if any(map(jnp.ndim, args)):
        args = [a if jnp.ndim(a) else jnp.broadcast_to(a, shape) for a in args]
    if before == _UINT32 and name in _COMPARISONS - {"eq", "ne"}:
        return eqn.primitive.bind(*(a ^ _LOWEST for a in args))
    if after == _UINT32 and name in ("max", "min"):
        return eqn.primitive.bind(*(a ^ _LOWEST for a in args), **params) ^ _LOWEST
    if name == "square":
        y = x * x
    elif name == "add_any":
        y = x + args[1]
    elif name == "integer_pow":
        y = lax.integer_pow(x, params["y"])
    elif name == "sign" and _is_float(after):
        y = jnp.where(x > 0, 1.0, jnp.where(x < 0, -1.0, x))
    else:
        y = eqn.primitive.bind(*args, **params)
    return _rounded(y, after) if _is_float(after) else _extended(y, after)


def _converted(x: Any, before: np.dtype, after: np.dtype) -> Any:
    if before == jnp.bool_:
        return jnp.where(x, 1, 0).astype(jnp.float32 if _is_float(after) else jnp.int32)
    if after == jnp.bool_:
        return x != 0
    if _is_float(after):
        return _rounded(x.astype(jnp.float32), after)
    return _extended(x.astype(jnp.int32), after)


def _bitcast(x: Any, before: np.dtype, after: np.dtype) -> Any:
    bits = x
    if _is_float(before):
        bits = lax.bitcast_convert_type(x, jnp.int32)
        bits = bits if before.itemsize == 4 else bits >> np.int32(16)
    if _is_float(after):
        bits = bits if after.itemsize == 4 else bits << np.int32(16)
        return lax.bitcast_convert_type(bits, jnp.float32)
    return _extended(bits, after)


def _extended(x: Any, dtype: np.dtype) -> Any:
    """The low bits of an int32 as an integer of ``dtype`` is held."""
    if dtype == jnp.bool_ or dtype.itemsize == 4:
        return x
    bits = 8 * dtype.itemsize
    if dtype.kind == "u":
        return x & np.int32(2**bits - 1)
    return (x << np.int32(32 - bits)) >> np.int32(32 - bits)


def _rounded(x: Any, dtype: np.dtype) -> Any:
    """A float32 as a float of ``dtype`` is held."""
    return x if dtype.itemsize == 4 else x.astype(dtype).astype(jnp.float32)


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)
