"""Parts of jaxprs.

Here and in other files equations and variables are often ``Any``: by jax's annotations
the type of a variable has no shape and no dtype.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.extend import core


def slice_equations(
    eqns: list[core.JaxprEqn], wanted: Iterable[Any], known: set[Any]
) -> list[core.JaxprEqn]:
    """The equations that make the wanted variables from known ones."""
    missing = {x for x in wanted if x not in known}
    kept = []
    for eqn in reversed(eqns):
        if any(x in missing for x in eqn.outvars):
            kept.append(eqn)
            missing.update(
                x
                for x in eqn.invars
                if not isinstance(x, core.Literal) and x not in known
            )
    return kept[::-1]


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
    while not isinstance(x, core.Literal) and x in casts:
        found.append(casts[x])
        (x,) = casts[x].invars
    return found


def constant(literal: Any) -> np.ndarray:
    """The value of a literal."""
    return np.asarray(literal.val, literal.aval.dtype)


def jaxpr_of(invars: list[Any], outvars: list[Any], eqns: list[Any]) -> core.Jaxpr:
    """A jaxpr of equations that have no side effects."""
    info = core.DebugInfo("optax_flash", "update", None, None)
    return core.Jaxpr((), invars, outvars, eqns, debug_info=info)
