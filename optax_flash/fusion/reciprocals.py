"""Dividing by a scalar through its reciprocal, which is a scalar too.

So there is one division for all leaves. Some compilers do this anyway, leaf by leaf,
and others do not; now all compute the same.
"""

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core


def with_reciprocals(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The same jaxpr, its float32 arrays not divided by scalars but multiplied."""
    if not any(map(_divides_by_scalar, jaxpr.eqns)):
        return jaxpr
    product = jax.make_jaxpr(lax.mul)(1.0, 1.0).eqns[0]
    known: dict[Any, Any] = {}
    eqns: list[core.JaxprEqn] = []
    for eqn in jaxpr.eqns:
        if _divides_by_scalar(eqn):
            dividend, x = eqn.invars
            if x not in known:
                known[x] = core.Var(x.aval)
                one = core.Literal(np.float32(1.0), x.aval)
                eqns.append(eqn.replace(invars=[one, x], outvars=[known[x]]))
            # What it has besides, such as its mesh, stays.
            eqn = eqn.replace(
                primitive=product.primitive,
                params=product.params,
                invars=[dividend, known[x]],
            )
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns)


def _divides_by_scalar(eqn: Any) -> bool:
    if eqn.primitive is not lax.div_p:
        return False
    x, out = eqn.invars[1], eqn.outvars[0]
    if isinstance(x, core.Literal) or x.aval.shape:
        return False
    return bool(out.aval.shape) and out.aval.dtype == np.float32
