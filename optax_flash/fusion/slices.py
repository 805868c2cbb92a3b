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


def constant(literal: Any) -> np.ndarray:
    """The value of a literal."""
    return np.asarray(literal.val, literal.aval.dtype)


def jaxpr_of(invars: list[Any], outvars: list[Any], eqns: list[Any]) -> core.Jaxpr:
    """A jaxpr of equations that have no side effects."""
    info = core.DebugInfo("optax_flash", "update", None, None)
    return core.Jaxpr((), invars, outvars, eqns, debug_info=info)
