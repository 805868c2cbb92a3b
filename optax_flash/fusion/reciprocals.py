"""Dividing by a scalar through its reciprocal, which is a scalar too.

So there is one division for all leaves. Some compilers do this anyway, leaf by leaf,
and others do not; now all compute the same.
"""

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

from optax_flash.fusion.jaxprs import casts_of, scalar_casts


def with_reciprocals(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The same jaxpr, its float32 arrays not divided by scalars but multiplied."""
    casts = scalar_casts(jaxpr.eqns)
    if not any(_divides_by_scalar(eqn, casts) for eqn in jaxpr.eqns):
        return jaxpr
    reciprocal = jax.make_jaxpr(lambda x: lax.integer_pow(x, -1))(1.0).eqns[0]
    product = jax.make_jaxpr(lax.mul)(1.0, 1.0).eqns[0]
    known: dict[Any, Any] = {}
    eqns: list[core.JaxprEqn] = []

    def reciprocal_of(x: Any, like: Any) -> Any:
        if x not in known:
            known[x] = core.Var(x.aval)
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
    if isinstance(x, core.Literal) or x.aval.shape:
        return False
    return bool(out.aval.shape) and out.aval.dtype == np.float32
