"""What a momentum's rounding error will do to updates, and what makes up for it.

A momentum m that is stored with an error e changes the next update by du/dm e, the one
after it by dm'/dm times as much, and so on: in all by

    du/dm e / (1 - dm'/dm)

where m' is the new momentum. With that taken off the present update, updates sum up to
what they would without the error. Derivatives are those of an element by itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from optax_flash.fusion import program as programs
from optax_flash.fusion.inline import inline
from optax_flash.fusion.ops import op_p

PyTree = Any
ByParam = dict[int, jax.Array]


def with_gains(
    update: Callable[[PyTree], tuple[PyTree, PyTree]],
    state: PyTree,
    momenta: dict[int, ByParam],
    differentiated: bool = False,
) -> tuple[PyTree, PyTree, dict[int, ByParam]]:
    """An update, and how much of each rounding error is to be added to it.

    Args:
      update: from a state to updates and the new state.
      state: a tree of arrays.
      momenta: leaves of it: of each field, by the index of the updates' leaf.
      differentiated: whether derivatives go through the update. They do not go through
        the gains.

    Returns:
      Updates; the new state; and, in the place of momenta, what the rounding error of
      the new one is to be multiplied by. Where an update does not depend on a momentum
      element by element there is nothing in its place.
    """
    if not momenta:
        return *update(state), {}
    leaves, treedef = jax.tree.flatten(state)
    place = {id(x): i for i, x in enumerate(leaves)}
    structure = []

    def flat(*leaves: Any) -> list[Any]:
        out = update(treedef.unflatten(leaves))
        structure.extend(jax.tree.structure(x) for x in out)
        return jax.tree.leaves(out)

    closed = jax.make_jaxpr(flat)(*leaves)
    updates, new_state = structure
    if closed.effects or new_state != treedef:
        return *update(state), {}
    jaxpr = inline(closed.jaxpr)
    count = updates.num_leaves
    results: list[Any] = []
    gains: dict[int, ByParam] = {}
    for field, by_param in momenta.items():
        at = {i: place[id(x)] for i, x in by_param.items()}
        moved = [jaxpr.invars[k] for k in at.values()]
        separate, moving = _without_mixing(jaxpr, moved)
        at = {i: k for i, k in at.items() if jaxpr.outvars[i] in moving}
        gains[field] = {}
        if not at:
            continue
        outs, tangents = _derivative(
            core.ClosedJaxpr(separate, closed.consts), leaves, list(at.values())
        )
        results = results or outs
        gains[field] = {
            i: _gain(tangents[i], tangents[count + k]) for i, k in at.items()
        }
    if differentiated:
        # The results so far have no derivative where elements meet others.
        results = []
        gains = jax.tree.map(lax.stop_gradient, gains)
    results = results or core.jaxpr_as_fun(closed)(*leaves)
    new = new_state.unflatten(results[count:])
    return updates.unflatten(results[:count]), new, gains


def _derivative(
    closed: core.ClosedJaxpr, operands: list[Any], moved: list[int]
) -> tuple[list[Any], list[Any]]:
    """Results, and their changes where some operands change by one in all elements."""

    def function(*changed: jax.Array) -> Any:
        given = list(operands)
        for k, x in zip(moved, changed, strict=True):
            given[k] = x
        return core.jaxpr_as_fun(closed)(*given)

    primals = [operands[k] for k in moved]
    return jax.jvp(function, primals, [jnp.ones_like(x) for x in primals])


def _gain(of_update: jax.Array, of_momentum: jax.Array) -> jax.Array:
    """Zero for a momentum that does not fade, whose errors have no sum."""
    fades = of_momentum < 1.0
    # Compilers differ in how they divide by what is the same for a whole leaf.
    steps = 1.0 / jnp.where(fades, 1.0 - of_momentum, 1.0)
    return jnp.where(fades, -of_update * steps, 0.0)


FLAT = frozenset(
    "sign floor ceil round is_finite eq ne lt le gt ge not and or xor "
    "stop_gradient".split()
)
"""Primitives whose derivative is zero wherever there is one."""


def _without_mixing(
    jaxpr: core.Jaxpr, inputs: list[Any]
) -> tuple[core.Jaxpr, set[Any]]:
    """A jaxpr whose derivative by the inputs stops where elements meet others.

    Returns:
      The jaxpr, and the variables that depend on the inputs element by element.
    """
    moving = set(inputs)
    stop = jax.make_jaxpr(lax.stop_gradient)(1.0).eqns[0]
    eqns: list[Any] = []
    for eqn in jaxpr.eqns:
        touched = [x for x in eqn.invars if _is_variable(x) and x in moving]
        if touched and not _is_elementwise(eqn):
            still = {x: core.Var(x.aval) for x in touched}
            eqns += [stop.replace(invars=[x], outvars=[y]) for x, y in still.items()]
            invars = [still.get(x, x) if _is_variable(x) else x for x in eqn.invars]
            eqn = eqn.replace(invars=invars)
        elif touched:
            moving.update(eqn.outvars)
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns), moving


def _is_elementwise(eqn: Any) -> bool:
    if eqn.primitive is op_p or eqn.primitive.name in FLAT:
        return False
    makes_arrays = all(x.aval.shape for x in eqn.outvars)
    return makes_arrays and programs.misfit(eqn) is None


def _is_variable(x: Any) -> bool:
    return not isinstance(x, core.Literal)
