"""Cutting a traced update into scalars, programs on leaves, and the rest.

Working backwards from each array that the update returns, equations are collected as
long as they are elementwise. What is reached is an operand of the update, or a scalar.
Arrays that meet on the way belong to one leaf. So an update becomes

1. a prologue, which computes the scalars: bias corrections, schedules, global norms;
2. a program for each leaf, the same one for all leaves that differ in nothing else;
3. the rest: scalars that are returned, and leaves that no program fits.
"""

import weakref
from typing import Any, NamedTuple

from optax_flash.fusion import program as programs
from optax_flash.fusion.jaxprs import (
    Jaxpr,
    JaxprEqn,
    Var,
    casts_of,
    is_variable,
    jaxpr_of,
    scalar_casts,
    slice_equations,
    variables,
)
from optax_flash.fusion.ops import op_p
from optax_flash.fusion.program import Program
from optax_flash.fusion.simplify import inline, with_reciprocals


class Leaf(NamedTuple):
    """The part of an update that concerns one leaf.

    Attributes:
      program: what to compute; None where the reason says why there is none.
      operands: variables or literals, one for each of the program's inputs.
      results: variables, one for each output.
      names: the paths of the params that it concerns, as far as known.
      reason: why no program fits, or what is special about it.
    """

    program: Program | None
    operands: list[Any]
    results: list[Any]
    names: tuple[str, ...]
    reason: str | None


class Split(NamedTuple):
    """An update in parts that run one after another.

    Attributes:
      prologue: from the update's operands to ``scalars``.
      scalars: variables of the scalars that leaves or the rest need.
      leaves: all leaves, misfits too.
      rest: from operands, scalars and the leaves' results to what else is returned.
      rest_operands: the variables that the rest takes.
      returned: for each result of the update its variable or literal.
    """

    prologue: Jaxpr
    scalars: list[Any]
    leaves: list[Leaf]
    rest: Jaxpr
    rest_operands: list[Any]
    returned: list[Any]


def split(jaxpr: Jaxpr, names: list[str], donors: dict[int, int]) -> Split:
    """Cuts the jaxpr of an update.

    Args:
      jaxpr: its constants are operands like any other. The first operands beside them
        are gradients, the first results updates.
      names: the paths of the gradients.
      donors: for the position of a result, that of the operand which it replaces.
    """
    jaxpr = with_reciprocals(inline(jaxpr))
    operands = [*jaxpr.constvars, *jaxpr.invars]
    is_operand = set(operands)
    groups = _Groups(scalar_casts(jaxpr.eqns))
    arrays = [x for x in jaxpr.outvars if _is_array(x) and x not in is_operand]
    for x in arrays:
        groups.add(x)
    for eqn in reversed(jaxpr.eqns):
        wanted = [x for x in eqn.outvars if x in groups]
        if wanted:
            groups.collect(eqn, wanted)
    leaves = _leaves(jaxpr, operands, names, groups, donors)
    fitting = [leaf for leaf in leaves if leaf.program]
    scalars = list(
        dict.fromkeys(
            x
            for leaf in fitting
            for x in leaf.operands
            if is_variable(x) and x not in is_operand
        )
    )
    made = {x for leaf in fitting for x in leaf.results}
    others = [
        x
        for x in jaxpr.outvars
        if is_variable(x) and x not in made and x not in is_operand
    ]
    others = list(dict.fromkeys(others))
    known = [*operands, *scalars, *made]
    eqns = slice_equations(jaxpr.eqns, others, set(known))
    used = {x for eqn in eqns for x in variables(eqn.invars)}
    used.update(others)
    rest_operands = [x for x in known if x in used]
    first = slice_equations(jaxpr.eqns, scalars, is_operand)
    reread = {x for eqn in first for x in eqn.invars if _is_array(x)}
    reread -= set(jaxpr.invars[: len(names)])
    leaves = [
        leaf._replace(reason=TWICE)
        if leaf.program and any(x in reread for x in leaf.operands if _is_array(x))
        else leaf
        for leaf in leaves
    ]
    return Split(
        prologue=jaxpr_of(operands, scalars, first),
        scalars=scalars,
        leaves=leaves,
        rest=jaxpr_of(rest_operands, others, eqns),
        rest_operands=rest_operands,
        returned=list(jaxpr.outvars),
    )


TWICE = "elementwise, after a pass over it that computes scalars"
"""Such as a norm of the update, which the update is then scaled by."""


class _Groups:
    """Arrays that belong together, each set with its equations.

    Casts of scalars go with the arrays that they meet: leaves share what was cast.
    """

    def __init__(self, casts: dict[Any, Any]) -> None:
        self.casts = casts
        self.parent: dict[Any, Any] = {}
        self.eqns: dict[Any, list[JaxprEqn]] = {}
        self.reasons: dict[Any, str] = {}

    def __contains__(self, x: Any) -> bool:
        return x in self.parent

    def add(self, x: Any) -> None:
        self.parent.setdefault(x, x)

    def find(self, x: Any) -> Any:
        parent = self.parent
        while parent[x] is not x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def union(self, a: Any, b: Any) -> Any:
        a, b = self.find(a), self.find(b)
        if a is b:
            return a
        self.parent[b] = a
        if b in self.eqns:
            self.eqns.setdefault(a, []).extend(self.eqns.pop(b))
        if b in self.reasons:
            self.reasons.setdefault(a, self.reasons.pop(b))
        return a

    def collect(self, eqn: JaxprEqn, wanted: list[Any]) -> None:
        """Takes an equation into the set of its results, with what it needs."""
        root = wanted[0]
        for x in wanted[1:]:
            root = self.union(root, x)
        reason = programs.misfit(eqn)
        if reason is not None:
            self.reasons.setdefault(self.find(root), reason)
            return
        for x in eqn.invars:
            if _is_array(x):
                self.add(x)
                root = self.union(root, x)
        eqns = self.eqns.setdefault(self.find(root), [])
        eqns.append(eqn)
        for x in eqn.invars:
            eqns.extend(casts_of(x, self.casts))


def _leaves(
    jaxpr: Jaxpr,
    operands: list[Any],
    names: list[str],
    groups: _Groups,
    donors: dict[int, int],
) -> list[Leaf]:
    members: dict[Any, tuple[list[Any], list[Any]]] = {}
    place = {id(eqn): i for i, eqn in enumerate(jaxpr.eqns)}
    names_of: dict[Any, list[str]] = {}
    for x in operands:
        if x in groups:
            members.setdefault(groups.find(x), ([], []))[0].append(x)
    # What a misfit needs is not known, so its results tell names too.
    for beginning in (jaxpr.invars, jaxpr.outvars):
        for x, name in zip(beginning, names, strict=False):
            if _is_array(x) and x in groups:
                names_of.setdefault(groups.find(x), []).append(name)
    is_operand = set(operands)
    donor_of: dict[Any, Any] = {}
    for i, x in enumerate(jaxpr.outvars):
        if not _is_array(x) or x in is_operand or x in donor_of:
            continue
        donor_of[x] = jaxpr.invars[donors[i]] if i in donors else None
        members.setdefault(groups.find(x), ([], []))[1].append(x)
    leaves = []
    for root, (arrays, results) in members.items():
        if not results:
            continue
        eqns = {place[id(eqn)]: eqn for eqn in groups.eqns.get(root, [])}
        eqns = [eqns[i] for i in sorted(eqns)]
        found_names = tuple(dict.fromkeys(names_of.get(root, ())))
        reason = groups.reasons.get(root)
        shape = None if reason else programs.leaf_shape(eqns)
        if shape is None:
            reason = reason or "arrays of several shapes meet"
            leaves.append(Leaf(None, [], results, found_names, reason))
            continue
        found, scalars = _program(shape, eqns, arrays, results, donor_of)
        leaves.append(Leaf(found, arrays + scalars, results, found_names, None))
    return leaves


_known: "weakref.WeakValueDictionary[Any, Program]" = weakref.WeakValueDictionary()


def _program(
    shape: tuple[int, ...],
    eqns: list[JaxprEqn],
    arrays: list[Any],
    results: list[Any],
    donor_of: dict[Any, Any],
) -> tuple[Program, list[Any]]:
    """The program of some equations, and the scalars that it takes."""
    made = {x for eqn in eqns for x in eqn.outvars}
    # An op's literals tell leaves apart, so they are operands.
    scalars: dict[Any, Any] = {}
    number: dict[Any, int] = {x: i for i, x in enumerate(arrays)}
    key: list[Any] = [shape, tuple(x.aval for x in arrays)]
    literals: dict[int, tuple[Any, list[tuple[int, int]]]] = {}
    for e, eqn in enumerate(eqns):
        inputs: list[Any] = []
        for i, x in enumerate(eqn.invars):
            if not is_variable(x):
                if eqn.primitive is op_p:
                    value = int(x.val)
                    literals.setdefault(value, (x, []))[1].append((e, i))
                    inputs.append((list(literals).index(value), x.aval))
                else:
                    inputs.append((str(x.val), x.aval))
                continue
            if x not in number:
                # Not made by these equations, so a scalar from the prologue.
                assert x not in made
                number[x] = len(number)
                scalars[x] = x
                inputs.append(x.aval)
            inputs.append(number[x])
        for x in eqn.outvars:
            number[x] = len(number)
        key.append((eqn.primitive, _params_key(eqn), tuple(inputs)))
    inputs = arrays + list(scalars) + [x for x, _ in literals.values()]
    position = {x: i for i, x in enumerate(arrays)}
    donors = tuple(
        position.get(donor_of[x])
        if donor_of[x] is not None and _same(x, donor_of[x])
        else None
        for x in results
    )
    key.append((tuple(number[x] for x in results), donors))
    frozen = tuple(key)
    found = _known.get(frozen)
    if found is None:
        found = _build(
            shape, eqns, inputs, list(literals.values()), results, donors, frozen
        )
        _known[frozen] = found
    return found, inputs[len(arrays) :]


def _build(
    shape: tuple[int, ...],
    eqns: list[JaxprEqn],
    operands: list[Any],
    literals: list[tuple[Any, list[tuple[int, int]]]],
    results: list[Any],
    donors: tuple[int | None, ...],
    key: Any,
) -> Program:
    invars, new_eqns = list(operands), list(eqns)
    first = len(operands) - len(literals)
    for n, (literal, places) in enumerate(literals):
        invars[first + n] = Var(literal.aval)
        for e, i in places:
            eqn_invars = list(new_eqns[e].invars)
            eqn_invars[i] = invars[first + n]
            new_eqns[e] = new_eqns[e].replace(invars=eqn_invars)
    inputs, outputs = programs.roles(new_eqns, invars, results)
    jaxpr = jaxpr_of(invars, results, new_eqns)
    return Program(shape, jaxpr, inputs, outputs, donors, key)


def _params_key(eqn: JaxprEqn) -> Any:
    params = eqn.params
    if not params:
        return ()
    items = tuple(params.items())
    try:
        hash(items)
    except TypeError:
        return id(eqn)
    return items


def _is_array(x: Any) -> bool:
    return is_variable(x) and bool(x.aval.shape)


def _same(a: Any, b: Any) -> bool:
    return a.aval.shape == b.aval.shape and a.aval.dtype == b.aval.dtype
