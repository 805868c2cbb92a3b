r"""Error feedback: updates make up for what rounding does to a momentum.

A momentum :math:`m_t` that is stored with an error :math:`e` changes the next update by
:math:`l' e`, with :math:`l' = \partial u_{t+1} / \partial m_t`. It changes the update
after that by :math:`a r l' e`, and so on. Here :math:`a = \partial m_{t+1} / \partial
m_t` is how the momentum fades, and :math:`r` is how its influence on updates changes
with time: bias corrections end and learning rates decay. The sum of all changes is

.. math:: \frac{l'}{1 - a r}\, e,\qquad l' \le l,\quad r = l_\mathrm{time} / l \le 1.

With this taken off the present update, updates sum up to what they would be without
the error. Here :math:`l = \partial u_t / \partial m_{t-1}` is the present influence;
:math:`l'` is that on an update from the new state, as it is stored, with the same
gradient; and :math:`l_\mathrm{time}` is the present one under the counts of the next
step. For SGD all are the same, and the sum is exact. For Adam :math:`l'` knows that the
second moment is rounded too, which makes the next update smaller beside an outlier. An
influence that grows, as in a warmup, counts as constant.

Only :math:`l` and :math:`l'` are computed for every element. What is kept, and how
influence changes with time, are scalars of a leaf, computed as if all arrays held ones:
counts and learning rates act on all elements alike, except for an epsilon.

Derivatives are those of an element by itself. Where elements mix, in a norm or a matrix
product, there are none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_flash.fusion import fuse, rounding, untraced
from optax_flash.fusion import program as programs
from optax_flash.fusion.jaxprs import (
    ClosedJaxpr,
    Jaxpr,
    Var,
    as_fun,
    is_variable,
    jaxpr_of,
    slice_equations,
    variables,
)
from optax_flash.fusion.ops import Tile, op_p
from optax_flash.fusion.simplify import inline

PyTree = Any
ByParam = dict[int, jax.Array]


class Gain(NamedTuple):
    """What a momentum's rounding error is multiplied by and added to its update.

    Attributes:
      value: an array like the momentum.
      uniform: whether all elements have the same one, as SGD's do. Others are estimates
        of their own for each element.
    """

    value: jax.Array
    uniform: bool


class Feedback(NamedTuple):
    """What an update's momenta owe to it.

    Attributes:
      fed: by field and param, the gains as far as they are known before the momenta
        are rounded: if their influence stays what it is. They get no larger.
      exact: by field, the params whose gains are these.
      gains: a function of the new state as it is stored, decoded; gives the gains.
    """

    fed: dict[int, ByParam]
    exact: dict[int, frozenset[int]]
    gains: Callable[[PyTree], dict[int, dict[int, Gain]]]

    def looks_ahead(self, param: int) -> bool:
        """Whether a param's gains depend on how its state is stored."""
        return any(
            param in gains and param not in self.exact[field]
            for field, gains in self.fed.items()
        )


NONE = Feedback({}, {}, lambda stored: {})
"""Of an update that makes up for nothing."""


def with_feedback(
    update: Callable[[PyTree], tuple[PyTree, PyTree]],
    state: PyTree,
    momenta: dict[int, ByParam],
    zero: jax.Array,
    differentiated: bool = False,
) -> tuple[PyTree, PyTree, Feedback]:
    """An update, and how its momenta's rounding errors are made up for.

    Args:
      update: from a state to updates and the new state.
      state: a tree of arrays.
      momenta: leaves of it: of each field, by the index of the updates' leaf.
      zero: of :func:`rounding.zero_of`.
      differentiated: whether derivatives go through the update. They do not go through
        the gains.

    Returns:
      Updates; the new state; and the feedback, in which a momentum is missing where
      the update, or the new momentum, does not depend on it element by element.
    """
    if not momenta:
        return *update(state), NONE
    leaves, treedef = jax.tree.flatten(state)
    index_of = {id(x): i for i, x in enumerate(leaves)}
    structure = []

    def flat(*leaves: Any) -> list[Any]:
        out = update(treedef.unflatten(leaves))
        structure.extend(jax.tree.structure(x) for x in out)
        return jax.tree.leaves(out)

    try:
        closed = jax.make_jaxpr(flat)(*leaves)
    except untraced.ERRORS:
        # It still runs with values, where this is no part of another trace.
        updates, new_state = update(state)
        fuse.leave_out("error feedback")
        return updates, new_state, NONE
    updates, new_state = structure
    # Evaluated in parts, effects would happen several times; and gains are looked up by
    # the position of a momentum in the state, before and after.
    if closed.effects or new_state != treedef:
        return *update(state), NONE
    jaxpr = inline(closed.jaxpr)
    count = updates.num_leaves

    def still(arrays: list[Any]) -> list[Any]:
        """What gains are computed from: a rounding error has no derivative."""
        return list(map(lax.stop_gradient, arrays)) if differentiated else arrays

    responses = {}
    for field, by_param in momenta.items():
        at = {i: index_of[id(x)] for i, x in by_param.items()}
        response = _Response.of(jaxpr, still(closed.consts), count, at)
        if response.at:
            responses[field] = response
    results: list[Any] = []
    found = {}
    for field, response in responses.items():
        outs, found[field] = response.first(still(leaves), zero)
        # Any field's will do: the results are those of the update in each of them.
        results = results or outs
    if not responses:
        results = as_fun(closed.jaxpr, closed.consts)(*leaves)
    elif differentiated:
        # The results so far have no derivative where elements meet others. Where the
        # same products are rounded by themselves, values are the same.
        made = {x for eqn in jaxpr.eqns for x in eqn.outvars}
        held = [x for x in next(iter(responses.values())).held if x in made]
        whole = ClosedJaxpr(
            jaxpr.replace(outvars=[*jaxpr.outvars, *held]), closed.consts
        )
        n = len(jaxpr.outvars)
        results = rounding.evaluate(whole, leaves, zero, as_they_are=n)[:n]

    def gains(stored: PyTree) -> dict[int, dict[int, Gain]]:
        new_leaves = still(treedef.flatten_up_to(stored))
        return {
            field: response.gains(found[field], new_leaves)
            for field, response in responses.items()
        }

    fed = {
        field: rounding.apart(response.present_gains, zero)(found[field])
        for field, response in responses.items()
    }
    exact = {field: response.exact for field, response in responses.items()}
    new = new_state.unflatten(results[count:])
    feedback = Feedback(fed, exact, gains)
    return updates.unflatten(results[:count]), new, feedback


class _Influence(NamedTuple):
    """How momenta act, by param.

    Attributes:
      on_update: the change of the update with that of the momentum.
      steps: how often an error acts, in all: ``1 / (1 - a * r)``; a scalar where that
        is the same for all elements.
      held: values of :attr:`_Response.held`.
    """

    on_update: ByParam
    steps: ByParam
    held: list[Any]


class _Response(NamedTuple):
    """How updates and new momenta change with the momenta of one field.

    Attributes:
      at: for each param, the index of its momentum among the state's leaves.
      exact: those whose influence is the same at all steps.
      uniform: those whose influence is the same for all elements.
      alike: those of which all elements keep the same share.
      jaxpr: the update, cut where elements meet others.
      consts: its constants.
      updates: how many of its results are updates.
      again: the part of it that changes with the state, from ``held`` and the state's
        leaves to updates and then momenta of the params in ``at``.
      held: variables of what does not change, or is taken not to: gradients, norms.
    """

    at: dict[int, int]
    exact: frozenset[int]
    uniform: frozenset[int]
    alike: frozenset[int]
    jaxpr: Jaxpr
    consts: list[Any]
    updates: int
    again: Jaxpr
    held: list[Any]

    @classmethod
    def of(
        cls, jaxpr: Jaxpr, consts: list[Any], updates: int, at: dict[int, int]
    ) -> "_Response":
        inputs = [jaxpr.invars[k] for k in at.values()]
        separate, moving = _without_mixing(jaxpr, inputs)
        linear, changing = _linear(separate, inputs)
        update = {i: separate.outvars[i] for i in at}
        momentum = {i: separate.outvars[updates + k] for i, k in at.items()}
        at = {
            i: k
            for i, k in at.items()
            if {update[i], momentum[i]} <= moving and _fades(linear.get(momentum[i]))
        }
        alike = [i for i in at if momentum[i] in linear]
        uniform = [i for i in alike if update[i] in linear]
        exact = [i for i in uniform if not {update[i], momentum[i]} & changing]
        again, held = _again(separate, [x[i] for x in (update, momentum) for i in at])
        return cls(
            at,
            frozenset(exact),
            frozenset(uniform),
            frozenset(alike),
            separate,
            consts,
            updates,
            again,
            held,
        )

    def first(self, leaves: list[Any], zero: jax.Array) -> tuple[list[Any], _Influence]:
        """All results of the update, and the influence of the present momenta."""
        jaxpr = self.jaxpr.replace(outvars=[*self.jaxpr.outvars, *self.held])
        function = as_fun(jaxpr, self.consts)
        moved = list(self.at.values())
        closed = jax.make_jaxpr(_with_changes(function, moved))(*leaves)
        n, m = len(self.jaxpr.outvars), len(jaxpr.outvars)
        # The update itself may be fused as it would be without its derivative.
        outs = rounding.evaluate(closed, leaves, zero, as_they_are=n)
        held, changes = outs[n:m], outs[m:]
        kept = {i: changes[self.updates + k] for i, k in self.at.items()}
        in_time = outs[self.updates : n]
        steps = rounding.apart(self._steps, zero)(kept, held, leaves, in_time)
        on_update = {i: changes[i] for i in self.at}
        return outs[:n], _Influence(on_update, steps, held)

    def _steps(
        self, kept: ByParam, held: list[Any], now: list[Any], later: list[Any]
    ) -> ByParam:
        """How often errors act, from the scalars of two states.

        Args:
          kept: what momenta keep, by element.
          held: values of :attr:`held`.
          now: leaves of the state of this step.
          later: those of the next one.
        """
        on_update, alike = self._at_ones(held, now)
        on_next, _ = self._at_ones(held, later)
        steps = {}
        for i in self.at:
            ratio = 1.0 if i in self.exact else _ratio(on_update[i], on_next[i])
            share = alike[i] if i in self.alike else kept[i]
            steps[i] = _sum_of_powers(share, ratio)
        return steps

    def present_gains(self, now: _Influence) -> ByParam:
        """The gains if momenta keep the influence that they have."""
        return {i: -now.on_update[i] * now.steps[i] for i in self.at}

    def gains(self, now: _Influence, leaves: list[Any]) -> dict[int, Gain]:
        """All gains, from a new state's leaves as they are stored."""
        values = self.present_gains(now)
        if len(self.exact) < len(self.at):
            function = as_fun(self.again)
            later, _ = self._influences(function, now.held, leaves)
            for i in self.at:
                if i not in self.exact:
                    smaller = _between_zero_and(now.on_update[i], later[i])
                    values[i] = -smaller * now.steps[i]
        return {i: Gain(x, i in self.uniform) for i, x in values.items()}

    def _at_ones(self, held: list[Any], leaves: list[Any]) -> tuple[ByParam, ByParam]:
        """Influences on updates and on momenta where every array is one. # shape=()"""

        def function(*scalars: Any) -> list[Any]:
            nowhere = Tile((), jnp.uint32(0), None)
            return programs.evaluate(self.again, nowhere, list(scalars))

        held, leaves = ([_one_of(x) for x in xs] for xs in (held, leaves))
        return self._influences(function, held, leaves)

    def _influences(
        self, function: Callable[..., list[Any]], held: list[Any], leaves: list[Any]
    ) -> tuple[ByParam, ByParam]:
        """Those of momenta on updates and on momenta, by a function like ``again``."""
        moved = [len(held) + k for k in self.at.values()]
        n = len(self.at)
        changes = _with_changes(function, moved)(*held, *leaves)[2 * n :]
        return (
            dict(zip(self.at, changes[:n], strict=True)),
            dict(zip(self.at, changes[n:], strict=True)),
        )


def _with_changes(
    function: Callable[..., list[Any]], moved: list[int]
) -> Callable[..., list[Any]]:
    """A function's results, and their changes where some operands change.

    Args:
      function: the function.
      moved: which operands change, by one in all elements.
    """

    def wrapped(*operands: Any) -> list[Any]:
        def moving(*changed: jax.Array) -> list[Any]:
            given = list(operands)
            for k, x in zip(moved, changed, strict=True):
                given[k] = x
            return function(*given)

        primals = [operands[k] for k in moved]
        results, changes = jax.jvp(moving, primals, [jnp.ones_like(x) for x in primals])
        return [*results, *changes]

    return wrapped


def _one_of(x: Any) -> Any:
    """A scalar as it is; for an array a one, varying over the same mesh axes."""
    return jnp.ones_like(x, shape=()) if jnp.ndim(x) else x


def _fades(scalar: float | None) -> bool:
    """Whether a momentum fades that is kept times a scalar; None is for "unknown"."""
    return scalar is None or abs(scalar) < 1.0


def _ratio(now: jax.Array, later: jax.Array) -> jax.Array:
    """A later influence by that of now, between 0 and 1; 1 where there is none."""
    ratio = later / jnp.where(now == 0.0, 1.0, now)
    known = (now != 0.0) & jnp.isfinite(ratio)
    return jnp.where(known, jnp.clip(ratio, 0.0, 1.0), 1.0)


def _between_zero_and(limit: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.clip(x, jnp.minimum(limit, 0.0), jnp.maximum(limit, 0.0))


def _sum_of_powers(kept: jax.Array, ratio: jax.Array | float) -> jax.Array:
    """``1 / (1 - kept * ratio)``; zero for a momentum that does not fade.

    The errors of such a momentum have no sum.
    """
    fades = kept < 1.0
    return jnp.where(fades, 1.0 / jnp.where(fades, 1.0 - kept * ratio, 1.0), 0.0)


FLAT = frozenset(
    "sign floor ceil round is_finite eq ne lt le gt ge not and or xor "
    "stop_gradient".split()
)
"""Primitives whose derivative is zero wherever there is one."""


def _without_mixing(jaxpr: Jaxpr, inputs: list[Any]) -> tuple[Jaxpr, set[Any]]:
    """A jaxpr whose derivative by the inputs stops where elements meet others.

    Returns:
      The jaxpr, and the variables that depend on the inputs element by element.
    """
    moving = set(inputs)
    stop = jax.make_jaxpr(lax.stop_gradient)(1.0).eqns[0]
    eqns: list[Any] = []
    for eqn in jaxpr.eqns:
        touched = [x for x in variables(eqn.invars) if x in moving]
        if touched and not _is_smooth(eqn):
            still = {x: Var(x.aval) for x in touched}
            eqns += [stop.replace(invars=[x], outvars=[y]) for x, y in still.items()]
            invars = [still.get(x, x) if is_variable(x) else x for x in eqn.invars]
            eqn = eqn.replace(invars=invars)
        elif touched:
            moving.update(eqn.outvars)
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns), moving


def _linear(
    jaxpr: Jaxpr, inputs: list[Any]
) -> tuple[dict[Any, float | None], set[Any]]:
    """Variables that are an input by a scalar, plus what does not depend on inputs.

    Returns:
      These variables with their scalars, None for one that is not a literal; and those
      of them whose scalar depends on the state, so that it may change.
    """
    linear: dict[Any, float | None] = dict.fromkeys(inputs, 1.0)
    changing: set[Any] = set()
    invars: list[Any] = jaxpr.invars
    timed = {x for x in invars if not x.aval.shape}
    # Arrays that hold one scalar everywhere.
    alike: set[Any] = set()
    for eqn in jaxpr.eqns:
        name, operands = eqn.primitive.name, list[Any](eqn.invars)
        read = variables(operands)
        touched = [x for x in read if x in linear]
        others = [x for x in read if x not in linear]
        if any(x in timed for x in others):
            timed.update(eqn.outvars)
        if not touched:
            alone = all(not x.aval.shape or x in alike for x in read)
            if alone and _is_elementwise(eqn):
                alike.update(eqn.outvars)
            continue
        product = name in ("mul", "div") and len(touched) == 1
        if product:
            scaled = all(not x.aval.shape or x in alike for x in others)
            product = scaled and (name == "mul" or operands[0] in touched)
        if not product and name not in SUMS:
            continue
        # Known for products with literals alone, as decays mostly are. An unknown one
        # counts as fading; _sum_of_powers looks again, at its value.
        scalar = None
        if name == "mul" and not others:
            (literal,) = (x for x in operands if not is_variable(x))
            before = linear[touched[0]]
            scalar = None if before is None else before * float(literal.val)
        elif not product and len(touched) == 1:
            scalar = linear[touched[0]]
        linear.update(dict.fromkeys(eqn.outvars, scalar))
        if any(x in changing for x in touched) or (
            product and any(x in timed for x in others)
        ):
            changing.update(eqn.outvars)
    return linear, changing


SUMS = frozenset("add sub add_any neg copy copy_p convert_element_type".split())
"""Primitives through which a scalar of an input goes as it is, up to its sign."""


def _again(jaxpr: Jaxpr, wanted: list[Any]) -> tuple[Jaxpr, list[Any]]:
    """What of an update there is to compute again where only the state is another.

    Where elements meet others, in norms, values stay as they were.

    Returns:
      A jaxpr of held variables and the state to the wanted variables; and the held
      ones, which do not change.
    """
    changed = set(jaxpr.invars)
    eqns = []
    for eqn in jaxpr.eqns:
        moved = any(x in changed for x in variables(eqn.invars))
        if moved and (_is_scalar(eqn) or _is_elementwise(eqn)):
            changed.update(eqn.outvars)
            eqns.append(eqn)
    eqns = slice_equations(eqns, wanted, set(jaxpr.invars))
    known = {x for eqn in eqns for x in eqn.outvars} | set(jaxpr.invars)
    used = [*(x for eqn in eqns for x in variables(eqn.invars)), *wanted]
    held = list(dict.fromkeys(x for x in used if x not in known))
    return jaxpr_of([*held, *jaxpr.invars], wanted, eqns), held


def _is_scalar(eqn: Any) -> bool:
    return not any(x.aval.shape for x in (*eqn.invars, *eqn.outvars))


def _is_elementwise(eqn: Any) -> bool:
    if eqn.primitive is op_p:
        return False
    return all(x.aval.shape for x in eqn.outvars) and programs.unsupported(eqn) is None


def _is_smooth(eqn: Any) -> bool:
    return eqn.primitive.name not in FLAT and _is_elementwise(eqn)
