"""Inlining calls that work on several leaves at once, or on scalars too.

optax jits some functions of whole trees. A call of one is a single equation that takes
and makes arrays of every leaf, and would tie all leaves together; and the scalars that
are computed inside would be computed for every element.

Derivatives reshard arrays on a mesh, mostly to the sharding that they have: jax 0.12.
Such an equation is no computation, and goes too.
"""

from collections.abc import Callable
from typing import Any

from jax.extend import core

# The last two are one primitive, before jax 0.12 and since.
CALLS = ("jit", "pjit", "closed_call", "eval_jaxpr")


def inline(jaxpr: core.Jaxpr, every: bool = False) -> core.Jaxpr:
    """The same jaxpr without such calls; without any, if ``every``."""

    def wanted(eqn: Any) -> bool:
        if every:
            return _is_call(eqn) or _keeps_sharding(eqn)
        return _is_mixed(eqn) or _keeps_sharding(eqn) or _calls_what_does(eqn)

    if not any(map(wanted, jaxpr.eqns)):
        return jaxpr
    eqns: list[core.JaxprEqn] = []
    renamed: dict[Any, Any] = {}
    _emit(jaxpr.eqns, wanted, renamed, eqns)
    return jaxpr.replace(
        eqns=eqns, outvars=[_renamed(x, renamed) for x in jaxpr.outvars]
    )


def _is_call(eqn: Any) -> bool:
    return eqn.primitive.name in CALLS and not _callee(eqn).consts


def _is_mixed(eqn: Any) -> bool:
    if not _is_call(eqn):
        return False
    arrays = sum(1 for x in eqn.outvars if x.aval.shape)
    if arrays != 1:
        return arrays > 1
    inside = _callee(eqn).jaxpr.eqns
    return any(not x.aval.shape for inner in inside for x in inner.outvars)


def _keeps_sharding(eqn: Any) -> bool:
    """Whether an equation reshards an array to the sharding that it has."""
    return eqn.primitive.name == "reshard" and eqn.invars[0].aval == eqn.outvars[0].aval


def _calls_what_does(eqn: Any) -> bool:
    return _is_call(eqn) and any(
        _keeps_sharding(inner) or _calls_what_does(inner)
        for inner in _callee(eqn).jaxpr.eqns
    )


def _callee(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    return eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]


def _emit(
    eqns: Any,
    wanted: Callable[[Any], bool],
    renamed: dict[Any, Any],
    out: list[core.JaxprEqn],
) -> None:
    for eqn in eqns:
        operands = [_renamed(x, renamed) for x in eqn.invars]
        if not wanted(eqn):
            out.append(eqn.replace(invars=operands) if renamed else eqn)
            continue
        if _keeps_sharding(eqn):
            renamed[eqn.outvars[0]] = operands[0]
            continue
        callee = _callee(eqn).jaxpr
        inside = dict(zip(callee.invars, operands, strict=True))
        fresh = []
        for inner in callee.eqns:
            results = [core.Var(x.aval) for x in inner.outvars]
            arguments = [_renamed(x, inside) for x in inner.invars]
            fresh.append(inner.replace(invars=arguments, outvars=results))
            inside.update(zip(inner.outvars, results, strict=True))
        _emit(fresh, wanted, renamed, out)
        results = [_renamed(_renamed(x, inside), renamed) for x in callee.outvars]
        renamed.update(zip(eqn.outvars, results, strict=True))


def _renamed(x: Any, names: dict[Any, Any]) -> Any:
    return x if isinstance(x, core.Literal) else names.get(x, x)
