"""Inlining calls that work on several leaves at once, or on scalars too.

optax jits some functions of whole trees. A call of one is a single equation that takes
and makes arrays of every leaf, and would tie all leaves together; and the scalars that
are computed inside would be computed for every element.
"""

from collections.abc import Callable
from typing import Any

from jax.extend import core

CALLS = ("jit", "pjit", "closed_call")


def inline(jaxpr: core.Jaxpr, every: bool = False) -> core.Jaxpr:
    """The same jaxpr without such calls; without any, if ``every``."""
    wanted = _is_call if every else _is_mixed
    if not any(wanted(eqn) or _is_identity(eqn) for eqn in jaxpr.eqns):
        return jaxpr
    eqns: list[core.JaxprEqn] = []
    renamed: dict[Any, Any] = {}
    _emit(jaxpr.eqns, wanted, renamed, eqns)
    return jaxpr.replace(
        eqns=eqns, outvars=[_renamed(x, renamed) for x in jaxpr.outvars]
    )


def _is_identity(eqn: Any) -> bool:
    """Whether it is what derivatives leave behind on a mesh of automatic axes."""
    return eqn.primitive.name == "reshard" and eqn.invars[0].aval == eqn.outvars[0].aval


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
        if _is_identity(eqn):
            renamed[eqn.outvars[0]] = operands[0]
            continue
        if not wanted(eqn):
            out.append(eqn.replace(invars=operands) if renamed else eqn)
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
