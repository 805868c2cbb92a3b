"""Triton source from a jaxpr: one assignment for each equation.

Every value in the text has the dtype that it has in the jaxpr, constants too, so that
none of Triton's own promotions applies.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_flash.fusion.jaxprs import (
    CALLS,
    Jaxpr,
    callee,
    evaluate,
    is_variable,
    slice_equations,
    variables,
)

HEADER = """\
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def divide(a, b):
    return tl.inline_asm_elementwise(
        "div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
    )


@triton.jit
def sqrt(a):
    return tl.inline_asm_elementwise(
        "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [a], tl.float32, True, 1
    )


@triton.jit
def rsqrt(a):
    return tl.inline_asm_elementwise(
        "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [a], tl.float32, True, 1
    )


"""
"""What kernels reduce and divide with.

Triton's own extrema pass over NaN, and XLA's do not. A division or a root is one
instruction of the special-function unit where subnormal numbers are zero, as on XLA's
CPUs; forms that keep them take four.
"""


Equation = Any
"""A ``JaxprEqn``, whose type does not know that arrays have shapes and dtypes."""


class Unsupported(NotImplementedError):
    """An equation has no form in Triton; the message says which."""


class Writer:
    """Text of a kernel's body.

    Attributes:
      lines: written so far.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._depth = 1
        self._names = 0

    def line(self, text: str) -> None:
        """Writes a statement."""
        self.lines.append("    " * self._depth + text)

    @contextlib.contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Writes what follows under a line such as ``else:``."""
        self.line(head)
        self._depth += 1
        yield
        self._depth -= 1

    def assign(self, expression: str) -> str:
        """Writes an assignment to a new name, and gives the name."""
        name = f"v{self._names}"
        self._names += 1
        self.line(f"{name} = {expression}")
        return name

    def call(self, function: Callable[..., Any], args: Any, names: Any) -> Any:
        """Writes a function of arrays.

        Args:
          function: plain JAX.
          args: its arguments' shapes and dtypes, a list of trees.
          names: the same tree of names.

        Returns:
          The tree of its results, with names in place of arrays.
        """
        trees = []

        def flat(*leaves: Any) -> list[Any]:
            out = function(*jax.tree.unflatten(treedef, leaves))
            results, out_treedef = jax.tree.flatten(out)
            trees.append(out_treedef)
            return results

        leaves, treedef = jax.tree.flatten(args)
        closed = jax.make_jaxpr(flat)(*leaves)
        results = self._jaxpr(closed.jaxpr, closed.consts, jax.tree.leaves(names))
        return jax.tree.unflatten(trees[0], results)

    def _jaxpr(self, jaxpr: Jaxpr, consts: Any, names: list[str]) -> list[str]:
        known = {*jaxpr.constvars, *jaxpr.invars}
        needed = slice_equations(jaxpr.eqns, variables(jaxpr.outvars), known)
        return evaluate(
            jaxpr.replace(eqns=needed),
            names,
            self._equation,
            [constant(c, x.aval) for c, x in zip(consts, jaxpr.constvars, strict=True)],
            literal=lambda x: constant(x.val, x.aval),
        )

    def _equation(self, eqn: Equation, args: list[str]) -> list[str]:
        if called := callee(eqn):
            return self._jaxpr(called.jaxpr, called.consts, args)
        if eqn.primitive.name in _SAME:
            return args
        return [self.assign(_expression(eqn, args))]


def dtype_name(dtype: Any) -> str:
    """What Triton calls a dtype."""
    name = np.dtype(dtype).name
    return f"tl.{'int1' if name == 'bool' else name}"


def constant(value: Any, aval: Any) -> str:
    """A typed scalar. Triton would take a bare 3000000000 for an int64."""
    if aval.shape:
        raise Unsupported(f"a constant of shape {list(aval.shape)} in a kernel")
    x = np.asarray(value)
    if x.dtype == np.bool_ or jnp.issubdtype(aval.dtype, jnp.integer):
        return f"tl.full([], {x.item()}, {dtype_name(aval.dtype)})"
    number = float(x)
    text = repr(abs(number)) if np.isfinite(number) else f'float("{abs(number)}")'
    text = f"tl.full([], {text}, {dtype_name(aval.dtype)})"
    # Negated outside, for the sake of -0.0.
    return f"(-{text})" if np.signbit(number) else text


def _expression(eqn: Equation, args: list[str]) -> str:
    name = eqn.primitive.name
    if name in _MOVES:
        return _MOVES[name](eqn, *args)
    if name not in _RULES:
        raise Unsupported(f"{name!r} has no form in Triton")
    # 16-bit floats are computed on in float32 and rounded after each equation, as XLA
    # does; many of Triton's functions take nothing else.
    wide = [
        f"{text}.to(tl.float32)" if _is_narrow(x.aval.dtype) else text
        for text, x in zip(args, eqn.invars, strict=True)
    ]
    rule = _RULES[name]
    text = rule.format(*wide) if isinstance(rule, str) else rule(eqn, *wide)
    dtype = eqn.outvars[0].aval.dtype
    return f"({text}).to({dtype_name(dtype)})" if _is_narrow(dtype) else text


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.aval.dtype, jnp.floating)


def _shape(shape: Any) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _convert(eqn: Equation, x: str) -> str:
    dtype = eqn.params["new_dtype"]
    return f"{x} != 0" if dtype == np.bool_ else f"{x}.to({dtype_name(dtype)})"


def _bitcast(eqn: Equation, x: str) -> str:
    old, new = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
    if old.itemsize != new.itemsize:
        raise Unsupported("a bitcast changes the width")
    return f"{x}.to({dtype_name(new)}, bitcast=True)"


def _broadcast(eqn: Equation, x: str, *_: str) -> str:
    shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    before = eqn.invars[0].aval.shape
    if before and len(before) != len(shape):
        kept = (":" if axis in axes else "None" for axis in range(len(shape)))
        x = f"{x}[{', '.join(kept)}]"
        lengths = dict(zip(axes, before, strict=True))
        before = tuple(lengths.get(axis, 1) for axis in range(len(shape)))
    return x if before == shape else f"tl.broadcast_to({x}, {_shape(shape)})"


def _reshape(eqn: Equation, x: str, *_: str) -> str:
    return f"tl.reshape({x}, {_shape(eqn.outvars[0].aval.shape)})"


def _select(eqn: Equation, which: str, *cases: str) -> str:
    if eqn.invars[0].aval.dtype == np.bool_:
        return f"tl.where({which}, {cases[1]}, {cases[0]})"
    text = cases[-1]
    for i, case in reversed(list(enumerate(cases[:-1]))):
        text = f"tl.where({which} == {i}, {case}, {text})"
    return text


def _iota(eqn: Equation) -> str:
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    if shape[axis] & (shape[axis] - 1):
        raise Unsupported(f"an iota of {shape[axis]}, which is no power of two")
    # An arange keeps it known to the compiler which addresses are neighbours: without
    # that there are no 16-byte loads.
    text = f"tl.arange(0, {shape[axis]})"
    if len(shape) > 1:
        at = (":" if i == axis else "None" for i in range(len(shape)))
        text = f"{text}[{', '.join(at)}]"
    if any(n != 1 for i, n in enumerate(shape) if i != axis):
        text = f"tl.broadcast_to({text}, {_shape(shape)})"
    return f"{text}.to({dtype_name(eqn.params['dtype'])})"


def _reduce(function: str) -> Callable[..., str]:
    def rule(eqn: Equation, x: str) -> str:
        axes, rank = eqn.params["axes"], len(eqn.invars[0].aval.shape)
        if tuple(axes) != (rank - 1,):
            raise Unsupported(f"a reduction over axes {list(axes)} of {rank}")
        return f"tl.reduce({x}, {rank - 1}, {function})"

    return rule


def _divide(eqn: Equation, x: str, y: str) -> str:
    # 2 ulp, as XLA's on GPUs; a quotient by more than 2**126 is zero.
    return f"divide({x}, {y})" if _is_float(eqn.outvars[0]) else f"{x} // {y}"


def _remainder(eqn: Equation, x: str, y: str) -> str:
    return f"libdevice.fmod({x}, {y})" if _is_float(eqn.outvars[0]) else f"{x} % {y}"


def _power(eqn: Equation, x: str, y: str) -> str:
    if not _is_float(eqn.invars[0]):
        raise Unsupported("a power of integers")
    return f"libdevice.pow({x}, {y}.to(tl.float32))"


def _integer_power(eqn: Equation, x: str) -> str:
    # The powers of two that make up the exponent, in XLA's order.
    exponent = abs(eqn.params["y"])
    factors = []
    while exponent:
        if exponent & 1:
            factors.append(x)
        x = f"({x} * {x})"
        exponent >>= 1
    text = " * ".join(factors)
    return f"1.0 / ({text})" if eqn.params["y"] < 0 else text


def _round(eqn: Equation, x: str) -> str:
    to_even = eqn.params["rounding_method"] == jax.lax.RoundingMethod.TO_NEAREST_EVEN
    return f"libdevice.{'rint' if to_even else 'round'}({x})"


def _sign(eqn: Equation, x: str) -> str:
    dtype = eqn.invars[0].aval.dtype
    if _is_float(eqn.invars[0]):
        # NaN and both zeros are their own.
        return f"tl.where({x} > 0, 1.0, tl.where({x} < 0, -1.0, {x}))"
    name = dtype_name(dtype)
    return f"({x} > 0).to({name}) - ({x} < 0).to({name})"


def _shift(operator: str, signed: bool | None) -> Callable[..., str]:
    def rule(eqn: Equation, x: str, y: str) -> str:
        # Triton shifts signed integers arithmetically and others logically.
        dtype = eqn.invars[0].aval.dtype
        bits, own = dtype.itemsize * 8, dtype_name(dtype)
        other = own if signed is None else f"tl.{'' if signed else 'u'}int{bits}"
        amount = _as(y, own, f"tl.uint{bits}")
        text = f"{_as(x, own, other)} {operator} {_as(y, own, other)}"
        text = _as(text, other, own)
        if not is_variable(eqn.invars[1]):
            return text
        # By all bits or more, Triton leaves the result open and XLA shifts all out.
        most = "0"
        if signed:
            most = _as(f"{_as(x, own, other)} >> {bits - 1}", other, own)
        return f"tl.where({amount} < {bits}, {text}, {most})"

    return rule


def _as(x: str, old: str, new: str) -> str:
    return x if old == new else f"({x}).to({new}, bitcast=True)"


_SAME = frozenset({"copy", "copy_p", "stop_gradient", "optimization_barrier"})

_MOVES: dict[str, Callable[..., str]] = {
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "iota": _iota,
    "reshape": _reshape,
    "select_n": _select,
    "squeeze": _reshape,
}
"""How values are moved, whatever their dtype."""

_MAXIMUM = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_MINIMUM = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"

_RULES: dict[str, str | Callable[..., str]] = {
    "abs": "tl.abs({0})",
    "add": "{0} + {1}",
    "add_any": "{0} + {1}",
    "and": "{0} & {1}",
    # What XLA calls, too, is in libdevice. Triton's own exp and log are coarser.
    "atan2": "libdevice.atan2({0}, {1})",
    "cbrt": "libdevice.cbrt({0})",
    "ceil": "tl.ceil({0})",
    "clamp": _MINIMUM.format(_MAXIMUM.format("{1}", "{0}"), "{2}"),
    "cos": "libdevice.cos({0})",
    "div": _divide,
    "eq": "{0} == {1}",
    "erf": "libdevice.erf({0})",
    "exp": "libdevice.exp({0})",
    "exp2": "libdevice.exp2({0})",
    "expm1": "libdevice.expm1({0})",
    "floor": "tl.floor({0})",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "integer_pow": _integer_power,
    "is_finite": 'tl.abs({0}) < float("inf")',
    "le": "{0} <= {1}",
    "log": "libdevice.log({0})",
    "log1p": "libdevice.log1p({0})",
    # A primitive since jax 0.11.
    "log2": "libdevice.log2({0})",
    "logistic": "1.0 / (1.0 + libdevice.exp(-{0}))",
    "lt": "{0} < {1}",
    "max": _MAXIMUM,
    "min": _MINIMUM,
    "mul": "{0} * {1}",
    "ne": "{0} != {1}",
    "neg": "-{0}",
    "not": "~{0}",
    "or": "{0} | {1}",
    "pow": _power,
    "reduce_max": _reduce("maximum"),
    "reduce_min": _reduce("minimum"),
    "reduce_sum": _reduce("add"),
    "rem": _remainder,
    "round": _round,
    "rsqrt": "rsqrt({0})",
    "shift_left": _shift("<<", None),
    "shift_right_arithmetic": _shift(">>", True),
    "shift_right_logical": _shift(">>", False),
    "sign": _sign,
    "sin": "libdevice.sin({0})",
    "sqrt": "sqrt({0})",
    "square": "{0} * {0}",
    "sub": "{0} - {1}",
    "tan": "libdevice.tan({0})",
    "tanh": "libdevice.tanh({0})",
    "xor": "{0} ^ {1}",
}
"""How values are computed: text with places for the operands, or a rule for it."""

KNOWN = frozenset({*CALLS, *_SAME, *_MOVES, *_RULES})
"""The primitives that can be written."""
