"""A program: the elementwise part of an update for one kind of leaf."""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_flash.codecs.base import Codec
from optax_flash.fusion import jaxprs
from optax_flash.fusion.jaxprs import (
    CALLS,
    CASTS,
    Jaxpr,
    JaxprEqn,
    as_fun,
    callee,
    is_variable,
)
from optax_flash.fusion.ops import Decode, Encode, Op, Round, Tile, op_p


class Role(NamedTuple):
    """What an operand or a result of a program is.

    Attributes:
      kind: ``"scalar"``, ``"full"`` (an array of the leaf's shape), ``"codes"`` or
        ``"scales"``.
      codec: of codes and scales.
    """

    kind: str
    codec: Codec | None = None


SCALAR, FULL = Role("scalar"), Role("full")


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What one kernel computes: a jaxpr of elementwise equations and :class:`Op`.

    Attributes:
      shape: of the leaf.
      jaxpr: a ``Jaxpr``, without constants. An :class:`Op`'s literals are
        operands.
      inputs: a role for each operand.
      outputs: a role for each result.
      donors: for each result the operand whose buffer it takes over, or None.
      key: equal for equal programs.
    """

    shape: tuple[int, ...]
    jaxpr: Any
    inputs: tuple[Role, ...]
    outputs: tuple[Role, ...]
    donors: tuple[int | None, ...]
    key: Any

    def __repr__(self) -> str:
        return f"Program({list(self.shape)}, {len(self.jaxpr.eqns)} equations)"

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Program) and self.key == other.key

    @property
    def size(self) -> int:
        """Elements of the leaf."""
        return math.prod(self.shape)

    @property
    def lanes(self) -> int:
        """Neighbours that a tile must hold together: whole groups of every codec."""
        codecs = {role.codec for role in (*self.inputs, *self.outputs) if role.codec}
        return math.lcm(*(codec.group for codec in codecs)) if codecs else 1

    @functools.cached_property
    def family(self) -> Any:
        """Equal for programs that differ in the leaf's shape alone."""
        number: dict[Any, int] = {}

        def name(x: Any) -> Any:
            dtype = x.aval.dtype
            if not is_variable(x):
                return str(x.val), dtype
            return number.setdefault(x, len(number)), dtype

        operands = tuple(name(x) for x in self.jaxpr.invars)
        equations = [
            (
                eqn.primitive,
                _without_shapes(eqn.params),
                tuple(map(name, eqn.invars)),
                tuple(map(name, eqn.outvars)),
            )
            for eqn in self.jaxpr.eqns
        ]
        results = tuple(name(x) for x in self.jaxpr.outvars)
        return operands, tuple(equations), results, self.inputs, self.donors


def whole(program: Program) -> Any:
    """The program as a function of whole arrays: plain JAX, the reference."""
    return lambda *args: as_fun(program.jaxpr)(*args)


def misfit(eqn: Any) -> str | None:
    """Why an equation that makes an array cannot be a part of a program, in words."""
    name = eqn.primitive.name
    if eqn.primitive is op_p or name in CASTS:
        return None
    if name == "broadcast_in_dim":
        shape = eqn.invars[0].aval.shape
        if shape and shape != eqn.outvars[0].aval.shape:
            return f"an array of shape {list(shape)} is broadcast to the leaf"
        return None
    if called := callee(eqn):
        return _misfit_of_call(called.jaxpr)
    if name not in ELEMENTWISE:
        return WORDS.get(name, f"{name!r} is not elementwise")
    shape = eqn.outvars[0].aval.shape
    for x in (*eqn.invars, *eqn.outvars):
        if x.aval.shape not in ((), shape):
            return f"arrays of shapes {list(x.aval.shape)} and {list(shape)} meet"
        if x.aval.dtype == np.float64:
            return "float64 is computed on"
    if name == "bitcast_convert_type":
        widths = {x.aval.dtype.itemsize for x in (eqn.invars[0], eqn.outvars[0])}
        return None if len(widths) == 1 else "a bitcast changes the width"
    return None


ELEMENTWISE = frozenset(
    "abs add add_any and atan2 bitcast_convert_type cbrt ceil clamp "
    "convert_element_type copy copy_p cos div eq erf exp exp2 expm1 floor ge gt "
    "integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem "
    "round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign "
    "sin sqrt square stop_gradient sub tan tanh xor".split()
)
"""Primitives that compute each element of the result from one of each operand."""

WORDS = {
    "dot_general": "a matrix product",
    "conv_general_dilated": "a convolution",
    "optax_flash_batched_op": "it is under jax.vmap inside of another update",
    "cond": "lax.cond chooses between computations",
    "while": "a loop",
    "scan": "a loop",
    "pure_callback": "a host callback",
    "io_callback": "a host callback",
    "threefry2x32": "random numbers",
    "random_bits": "random numbers",
    "random_unwrap": "random numbers",
    "random_wrap": "random numbers",
    "reshape": "an array is reshaped",
    "concatenate": "arrays are concatenated",
    "iota": "values depend on the place in the leaf",
    "transpose": "an array is transposed",
    "gather": "elements are looked up",
    "reduce_sum": "a sum along an axis",
    "reduce_max": "a maximum along an axis",
}


def _misfit_of_call(jaxpr: Any) -> str | None:
    for eqn in jaxpr.eqns:
        if any(x.aval.shape for x in eqn.outvars) and (reason := misfit(eqn)):
            return reason
        # A scalar made inside the call must not come from an array.
        scalar = not any(x.aval.shape for x in eqn.outvars)
        if scalar and any(x.aval.shape for x in eqn.invars):
            name = eqn.primitive.name
            return WORDS.get(name, f"{name!r} inside a call")
    return None


def _without_shapes(params: dict[str, Any]) -> Any:
    named = []
    for key, value in params.items():
        if key in ("shape", "sharding", "broadcast_dimensions"):
            continue
        if isinstance(value, Decode | Encode | Round):
            value = dataclasses.replace(value, shape=())
        elif key in CALLS.values():
            # Shapes are inside of it, so text is compared that has none of them.
            value = re.sub(r"\[[\d,]*\]", "", str(value))
        named.append((key, value))
    return tuple(named)


def evaluate(jaxpr: Jaxpr, tile: Tile, args: list[Any], consts: Any = ()) -> list[Any]:
    """A jaxpr of elementwise equations on a tile."""
    rule = functools.partial(_evaluate_equation, tile)
    return jaxprs.evaluate(jaxpr, args, rule, consts)


def _evaluate_equation(tile: Tile, eqn: Any, args: list[Any]) -> Any:
    name, params = eqn.primitive.name, eqn.params
    if eqn.primitive is op_p:
        op: Op = params["op"]
        return op.tile(tile, *args)
    if called := callee(eqn):
        return evaluate(called.jaxpr, tile, args, called.consts)
    x = args[0]
    scalar = not eqn.outvars[0].aval.shape
    if name == "broadcast_in_dim":
        return (x if scalar or jnp.ndim(x) else jnp.broadcast_to(x, tile.shape),)
    if name == "convert_element_type":
        return (lax.convert_element_type(x, params["new_dtype"]),)
    if name in ("copy", "copy_p", "stop_gradient"):
        return (x,)
    if name in CASTS and tile.shape:
        return (x,)
    if name == "square":
        return (x * x,)
    if name == "add_any":  # of derivatives
        return (x + args[1],)
    if name == "integer_pow":
        return (lax.integer_pow(x, params["y"]),)
    args = _same_rank(eqn, tile, args, scalar)
    out = eqn.primitive.bind(*args, **params)
    return out if eqn.primitive.multiple_results else (out,)


def _same_rank(eqn: JaxprEqn, tile: Tile, args: list[Any], scalar: bool) -> list[Any]:
    """Scalars as tiles, where an equation on tiles is given both."""
    if scalar:
        return args
    return [
        x
        if jnp.ndim(x) or (eqn.primitive.name == "select_n" and i == 0)
        else jnp.broadcast_to(x, tile.shape)
        for i, x in enumerate(args)
    ]


def roles(
    eqns: list[JaxprEqn], operands: list[Any], results: list[Any]
) -> tuple[tuple[Role, ...], tuple[Role, ...]]:
    """The roles of a program's operands and results, from the ops that use them."""
    stored: dict[Any, Role] = {}
    for eqn in eqns:
        op = eqn.params["op"] if eqn.primitive is op_p else None
        if not isinstance(op, Decode | Encode):
            continue
        both = eqn.invars if isinstance(op, Decode) else eqn.outvars
        n = len(op.codecs)
        rows = zip(op.codecs, both[:n], both[n : 2 * n], strict=True)
        for codec, codes, scales in rows:
            stored[codes] = Role("codes", codec)
            stored[scales] = Role("scales", codec)

    def role(x: Any) -> Role:
        if not is_variable(x) or not x.aval.shape:
            return SCALAR
        return stored.get(x, FULL)

    return tuple(map(role, operands)), tuple(map(role, results))


def leaf_shape(eqns: list[Any]) -> tuple[int, ...] | None:
    """The shape on which all equations work; None where they do not agree."""
    shapes = set()
    for eqn in eqns:
        op = eqn.params["op"] if eqn.primitive is op_p else None
        if isinstance(op, Decode | Encode):
            shapes.add(op.shape)
        else:
            shapes.update(x.aval.shape for x in eqn.outvars if x.aval.shape)
    return shapes.pop() if len(shapes) == 1 else None
