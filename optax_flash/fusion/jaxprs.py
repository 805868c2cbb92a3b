"""Jaxprs: jax's types of them, and what the passes read, cut and evaluate them with.

Here and in other files equations and variables are often ``Any``: by jax's annotations
the type of a variable has no shape and no dtype.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from optax_flash.fusion.unstable import core

ClosedJaxpr = core.ClosedJaxpr
Jaxpr = core.Jaxpr
JaxprEqn = core.JaxprEqn
Literal = core.Literal
Primitive = core.Primitive
Var = core.Var

Env = dict[Any, Any]
"""Values of variables."""


def is_variable(x: Any) -> bool:
    """Whether an operand or a result is a variable, and not a literal."""
    return not isinstance(x, core.Literal)


def variables(atoms: Iterable[Any]) -> list[Any]:
    """The variables among operands or results."""
    return [x for x in atoms if is_variable(x)]


def constant(literal: Any) -> Any:
    """The value of a literal, as a NumPy scalar of its dtype."""
    return np.asarray(literal.val, literal.aval.dtype)[()]


def read(env: Env, x: Any) -> Any:
    """The value of an operand."""
    return env[x] if is_variable(x) else constant(x)


def jaxpr_of(invars: list[Any], outvars: list[Any], eqns: list[Any]) -> core.Jaxpr:
    """A jaxpr of equations that have no side effects."""
    info = core.DebugInfo("optax_flash", "update", None, None)
    return core.Jaxpr((), invars, outvars, eqns, debug_info=info)


def as_fun(jaxpr: core.Jaxpr, consts: Sequence[Any] = ()) -> Callable[..., list[Any]]:
    """A jaxpr as a function of its operands."""
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))


def bind(eqn: Any, args: list[Any]) -> list[Any]:
    """The results of one equation.

    Args:
      eqn: the equation.
      args: the values of its operands; those of literals are ignored.
    """
    jaxpr, values = alone(eqn, args)
    return as_fun(jaxpr)(*values)


def alone(eqn: Any, args: list[Any]) -> tuple[core.Jaxpr, list[Any]]:
    """The jaxpr of one equation, and the values of its operands; see :func:`bind`."""
    # A variable may be several operands.
    values = {x: arg for x, arg in zip(eqn.invars, args, strict=True) if is_variable(x)}
    return jaxpr_of([*values], eqn.outvars, [eqn]), [*values.values()]


def evaluate(
    jaxpr: core.Jaxpr,
    args: Iterable[Any],
    rule: Callable[[Any, list[Any]], Iterable[Any]],
    consts: Iterable[Any] = (),
    literal: Callable[[Any], Any] = constant,
) -> list[Any]:
    """The results of a jaxpr, of whatever a rule computes with.

    Args:
      jaxpr: the equations, in their order.
      args: a value for each operand.
      rule: from an equation and its operands' values to those of its results.
      consts: a value for each constant.
      literal: from a literal to its value.
    """
    env: Env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def value(x: Any) -> Any:
        return env[x] if is_variable(x) else literal(x)

    for eqn in jaxpr.eqns:
        results = rule(eqn, [value(x) for x in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [value(x) for x in jaxpr.outvars]


def slice_equations(
    eqns: list[core.JaxprEqn], wanted: Iterable[Any], known: set[Any]
) -> list[core.JaxprEqn]:
    """The equations that make the wanted variables from known ones."""
    missing = {x for x in wanted if x not in known}
    kept = []
    for eqn in reversed(eqns):
        if any(x in missing for x in eqn.outvars):
            kept.append(eqn)
            missing.update(x for x in variables(eqn.invars) if x not in known)
    return kept[::-1]


CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",  # closed_call, since jax 0.12
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Primitives that call a jaxpr, and the parameter that holds it."""


def callee(eqn: Any) -> core.ClosedJaxpr | None:
    """The jaxpr that an equation calls; None where it is no call."""
    name = eqn.primitive.name
    if name not in CALLS:
        return None
    called = eqn.params[CALLS[name]]
    return called if hasattr(called, "consts") else core.ClosedJaxpr(called, ())


def flat_equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """All equations, those inside of calls too."""
    for eqn in jaxpr.eqns:
        yield eqn
        if called := callee(eqn):
            yield from flat_equations(called.jaxpr)


CASTS = frozenset({"pvary"})
"""Primitives that change what jax knows of an array inside of shard_map, no number."""


def scalar_casts(eqns: Iterable[Any]) -> dict[Any, Any]:
    """The casts of scalars among equations, by their results.

    Where a leaf varies over a mesh axis, jax casts every scalar that meets it.
    """
    return {
        eqn.outvars[0]: eqn
        for eqn in eqns
        if eqn.primitive.name in CASTS and not eqn.outvars[0].aval.shape
    }


def casts_of(x: Any, casts: dict[Any, Any]) -> list[Any]:
    """The casts by which a scalar was made of another, last first."""
    found = []
    while is_variable(x) and x in casts:
        found.append(casts[x])
        (x,) = casts[x].invars
    return found


def trace_state() -> Any:
    """Equal where jax is tracing into the same equations, for comparisons alone."""
    return core.get_opaque_trace_state(convention="flax")
