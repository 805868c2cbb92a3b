"""What is done to a traced update before it is cut.

Some calls are inlined. optax jits some functions of whole trees. A call of one is a
single equation that takes and makes arrays of every leaf, and would tie all leaves
together; and the scalars that are computed inside would be computed for every element.

Divisions by a scalar become products with its reciprocal, which is a scalar too. So
there is one division for all leaves. Some compilers do this anyway, leaf by leaf, and
others do not; now all compute the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from optax_flash.fusion.jaxprs import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Var,
    callee,
    casts_of,
    is_variable,
    scalar_casts,
)

# The last two are one primitive, before jax 0.12 and since. Calls with a derivative of
# their own are not here: inlined, they would lose it.
INLINED = ("jit", "pjit", "closed_call", "eval_jaxpr")


def inline(jaxpr: Jaxpr, every: bool = False) -> Jaxpr:
    """The same jaxpr without calls that work on several leaves, or on scalars too.

    Derivatives reshard arrays on a mesh, mostly to the sharding that they have: jax
    0.12. Such an equation is no computation, and goes too.

    Args:
      jaxpr: of an update.
      every: whether all calls go, but those with a derivative of their own.
    """

    def wanted(eqn: Any) -> bool:
        if every:
            return _inlined(eqn) is not None or _keeps_sharding(eqn)
        return _is_mixed(eqn) or _keeps_sharding(eqn) or _calls_what_does(eqn)

    if not any(map(wanted, jaxpr.eqns)):
        return jaxpr
    eqns: list[JaxprEqn] = []
    renamed: dict[Any, Any] = {}
    _emit(jaxpr.eqns, wanted, renamed, eqns)
    return jaxpr.replace(
        eqns=eqns, outvars=[_renamed(x, renamed) for x in jaxpr.outvars]
    )


def _inlined(eqn: Any) -> ClosedJaxpr | None:
    """What an equation calls, if that can take its place."""
    called = callee(eqn) if eqn.primitive.name in INLINED else None
    return called if called and not called.consts else None


def _is_mixed(eqn: Any) -> bool:
    called = _inlined(eqn)
    if called is None:
        return False
    arrays = sum(1 for x in eqn.outvars if x.aval.shape)
    if arrays != 1:
        return arrays > 1
    inside: list[Any] = called.jaxpr.eqns
    return any(not x.aval.shape for inner in inside for x in inner.outvars)


def _keeps_sharding(eqn: Any) -> bool:
    """Whether an equation reshards an array to the sharding that it has."""
    return eqn.primitive.name == "reshard" and eqn.invars[0].aval == eqn.outvars[0].aval


def _calls_what_does(eqn: Any) -> bool:
    called = _inlined(eqn)
    return called is not None and any(
        _keeps_sharding(inner) or _calls_what_does(inner) for inner in called.jaxpr.eqns
    )


def _emit(
    eqns: Any,
    wanted: Callable[[Any], bool],
    renamed: dict[Any, Any],
    out: list[JaxprEqn],
) -> None:
    for eqn in eqns:
        operands = [_renamed(x, renamed) for x in eqn.invars]
        if not wanted(eqn):
            out.append(eqn.replace(invars=operands) if renamed else eqn)
            continue
        called = _inlined(eqn)
        if called is None:
            renamed[eqn.outvars[0]] = operands[0]
            continue
        inside = dict(zip(called.jaxpr.invars, operands, strict=True))
        # One callee may be called several times, so each call has variables of its own.
        fresh = []
        for inner in called.jaxpr.eqns:
            results = [Var(x.aval) for x in inner.outvars]
            arguments = [_renamed(x, inside) for x in inner.invars]
            fresh.append(inner.replace(invars=arguments, outvars=results))
            inside.update(zip(inner.outvars, results, strict=True))
        _emit(fresh, wanted, renamed, out)
        results = [_renamed(_renamed(x, inside), renamed) for x in called.jaxpr.outvars]
        renamed.update(zip(eqn.outvars, results, strict=True))


def _renamed(x: Any, names: dict[Any, Any]) -> Any:
    return names.get(x, x) if is_variable(x) else x


def with_reciprocals(jaxpr: Jaxpr) -> Jaxpr:
    """The same jaxpr, its float32 arrays not divided by scalars but multiplied."""
    casts = scalar_casts(jaxpr.eqns)
    if not any(_divides_by_scalar(eqn, casts) for eqn in jaxpr.eqns):
        return jaxpr
    reciprocal = jax.make_jaxpr(lambda x: lax.integer_pow(x, -1))(1.0).eqns[0]
    product = jax.make_jaxpr(lax.mul)(1.0, 1.0).eqns[0]
    known: dict[Any, Any] = {}
    eqns: list[JaxprEqn] = []

    def reciprocal_of(x: Any, like: Any) -> Any:
        if x not in known:
            known[x] = Var(x.aval)
            if x in casts:
                # The scalar itself is shared by leaves that vary over other axes.
                inverse = reciprocal_of(casts[x].invars[0], like)
                eqn = casts[x].replace(invars=[inverse], outvars=[known[x]])
            else:
                # What the division has besides, such as its mesh, stays.
                eqn = like.replace(
                    primitive=reciprocal.primitive,
                    params=reciprocal.params,
                    invars=[x],
                    outvars=[known[x]],
                )
            eqns.append(eqn)
        return known[x]

    for eqn in jaxpr.eqns:
        if _divides_by_scalar(eqn, casts):
            dividend, x = eqn.invars
            eqn = eqn.replace(
                primitive=product.primitive,
                params=product.params,
                invars=[dividend, reciprocal_of(x, eqn)],
            )
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns)


def _divides_by_scalar(eqn: Any, casts: dict[Any, Any]) -> bool:
    if eqn.primitive is not lax.div_p:
        return False
    x, out = eqn.invars[1], eqn.outvars[0]
    for cast in casts_of(x, casts):
        (x,) = cast.invars
    if not is_variable(x) or x.aval.shape:
        return False
    return bool(out.aval.shape) and out.aval.dtype == np.float32
