"""Parts of jaxprs."""

from collections.abc import Iterable
from typing import Any

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


def jaxpr_of(invars: list[Any], outvars: list[Any], eqns: list[Any]) -> core.Jaxpr:
    """A jaxpr of equations that have no side effects."""
    info = core.DebugInfo("optax_flash", "update", None, None)
    return core.Jaxpr((), invars, outvars, eqns, debug_info=info)
