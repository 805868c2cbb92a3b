"""An optimizer's update, cut into the updates of parts of the params.

The whole update is traced once, and each part takes from the trace the equations that
its results need. So masks, partitions and states of any form mean what they mean in the
whole, random bits are those of the whole, and a part that needs another's gradient is
found out before anything runs.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flash.fusion import parts as fused
from optax_flash.fusion.jaxprs import (
    Env,
    is_variable,
    read,
    slice_equations,
    variables,
)
from optax_flash.transforms import _boxes, _mirror

PyTree = Any

EXACT = {
    "reduce_sum": (jnp.add, 0),
    "reduce_or": (jnp.logical_or, False),
    "reduce_and": (jnp.logical_and, True),
}
"""Reductions that do not depend on the order of layers, sums of integers alone; how to
combine two and what to begin with. States count with them, of whole gradients."""

_CLIP = (
    "To clip, clip each layer's gradients by themselves: "
    "release.train_step(..., per_layer=optax.clip_by_global_norm(1.0))."
)
_WAIT = (
    "optax.MultiSteps and optax.apply_if_finite do so, for example: they wait for all "
    "gradients. Leave them out, and take smaller batches in place of accumulation."
)


class Part(NamedTuple):
    """The update of some params.

    Attributes:
      params: their positions.
      reductions: variables of scalars that the rest of the update takes, see
        :data:`EXACT`, and their equations.
      results: for positions among the params' and state's leaves the variables of their
        new values. What does not change is left out.
      scalars: equations on whole arrays that make scalars for ``eqns``.
      eqns: the rest; for stacked params they compute on slices of one layer.
    """

    params: tuple[int, ...]
    reductions: dict[Any, Any]
    results: dict[int, Any]
    scalars: list[Any]
    eqns: list[Any]

    def variables(self) -> list[tuple[int, Any]]:
        """The results that are not literals."""
        return [(i, x) for i, x in self.results.items() if is_variable(x)]


class Update:
    """A traced update of all params.

    Args:
      tx: the transformation.
      params: a tree of arrays.
      state: the transformation's.

    Attributes:
      n: how many params there are. The leaves of params and then of the state are
        counted through, in positions.
      owner: for each position the param that it belongs to, as far as there is one.

    Raises:
      ValueError: the state changes its structure or shapes from step to step, or the
        update has side effects.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any, state: Any):
        def step(grads: Any, params: Any, state: Any) -> Any:
            updates, new_state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), new_state

        closed, shapes = fused.trace(step, params, params, state)
        _check_kept((params, state), shapes)
        if closed.effects:
            raise ValueError(
                "release: the update has side effects, as host callbacks have, which "
                "would run layer by layer. Leave them out of the transformation."
            )
        jaxpr = closed.jaxpr
        self.n = len(jax.tree.leaves(params))
        self.names = _mirror.leaf_paths(params)
        self.state_names = _mirror.leaf_paths(state)
        self.eqns: list[Any] = jaxpr.eqns
        self.grads: list[Any] = jaxpr.invars[: self.n]
        self.operands: list[Any] = jaxpr.invars[self.n :]
        self.results = jaxpr.outvars
        self.owner = [*range(self.n), *_owners(state, params)]
        self._consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        self._known = {*jaxpr.constvars, *jaxpr.invars}
        self._reductions = self._find_reductions()

    def parts(self, params: Iterable[int], stacked: int | None) -> list[Part]:
        """The updates of params, given by their positions.

        Args:
          params: what is updated at a time, when all their gradients are there.
          stacked: how many layers they have; their updates run one after another, so
            that but one of them has its state in slices. None for params that are not
            stacked.

        Raises:
          ValueError: an update needs gradients of other params; or the params are
            stacked, and it is not elementwise.
        """
        own = set(params)
        together = self._part(own, stacked)
        self._check_grads([*together.scalars, *together.eqns], own)
        if stacked is None:
            return [together]
        self._check_elementwise(together, stacked)
        sizes = {i: self.operands[i].aval.size // stacked for i in own}
        small = {i for i in own if fused.is_small(sizes[i])}
        apart = [small, *({i} for i in sorted(own - small))]
        parts = [self._part(some, stacked) for some in apart if some]
        mixed = any(self._foreign(part.eqns, set(part.params)) for part in parts)
        return [together] if mixed else parts

    def _part(self, own: set[int], stacked: int | None) -> Part:
        results = {
            i: x
            for i, (x, old) in enumerate(zip(self.results, self.operands, strict=True))
            if x is not old
            and self.owner[i] in own
            and (stacked is None or old.aval.shape[:1] == (stacked,))
        }
        reductions = {x: eqn for x, (i, eqn) in self._reductions.items() if i in own}
        reduced = [eqn.invars[0] for eqn in reductions.values()]
        wanted = variables([*results.values(), *reduced])
        eqns = slice_equations(self.eqns, wanted, self._known)
        ordered = tuple(sorted(own))
        if stacked is None:
            return Part(ordered, reductions, results, [], eqns)
        before = self._scalars(eqns)
        made = {x for eqn in before for x in eqn.outvars}
        eqns = [eqn for eqn in eqns if not made.issuperset(eqn.outvars)]
        return Part(ordered, reductions, results, before, eqns)

    def rest(self, parts: list[Part]) -> Part:
        """What no part updates, such as step counts, from what the parts made."""
        made = {i: x for part in parts for i, x in part.results.items()}
        results = {
            i: x
            for i, (x, old) in enumerate(zip(self.results, self.operands, strict=True))
            if i not in made and x is not old
        }
        known = self._known | set(variables(made.values())) | set(self._reductions)
        for i, x in results.items():
            eqns = slice_equations(self.eqns, variables([x]), known)
            if self._foreign(eqns, set()):
                name = (*self.names, *self.state_names)[i]
                raise ValueError(
                    f"release: {name!r} of the state is computed from whole gradients, "
                    "but only those of one layer are there at a time. Take a "
                    "transformation whose state has arrays like the params alone, or "
                    "the ordinary step."
                )
        eqns = slice_equations(self.eqns, variables(results.values()), known)
        return Part((), {}, results, [], eqns)

    def arrays(self, part: Part) -> list[Any]:
        """The variables of arrays, gradients aside, that a part of a stack takes."""
        read = [x for eqn in part.eqns for x in variables(eqn.invars)]
        read += variables(part.results.values())
        read += variables(eqn.invars[0] for eqn in part.reductions.values())
        known = self._known.difference(self.grads)
        return [x for x in dict.fromkeys(read) if x in known and x.aval.shape]

    def environment(self, operands: list[Any]) -> Env:
        """Values of the variables that are known before any gradient is.

        Args:
          operands: leaves of params and state.
        """
        return self._consts | dict(zip(self.operands, operands, strict=True))

    def _find_reductions(self) -> dict[Any, tuple[int, Any]]:
        """Those of one param's arrays from which scalars of the state are made."""
        sources = {x: frozenset([i]) for i, x in enumerate(self.grads)}
        found: dict[Any, tuple[int, Any]] = {}
        for eqn in self.eqns:
            of = frozenset[int]().union(
                *(sources.get(x, frozenset()) for x in variables(eqn.invars))
            )
            sources.update(dict.fromkeys(eqn.outvars, of))
            x: Any = eqn.outvars[0]
            name = eqn.primitive.name
            whole = name == "reduce_sum" and jnp.issubdtype(x.aval.dtype, jnp.integer)
            if len(of) == 1 and not x.aval.shape:
                if whole or name in ("reduce_or", "reduce_and"):
                    found[x] = (next(iter(of)), eqn)
        wanted = [x for x in variables(self.results) if not x.aval.shape]
        eqns = slice_equations(self.eqns, wanted, self._known | set(found))
        read = {x for eqn in eqns for x in variables(eqn.invars)} | set(wanted)
        return {x: of for x, of in found.items() if x in read}

    def _foreign(self, eqns: list[Any], own: set[int]) -> list[int]:
        """Params that are not ``own`` and whose gradients equations read."""
        read = {x for eqn in eqns for x in variables(eqn.invars)}
        return [i for i, x in enumerate(self.grads) if x in read and i not in own]

    def _check_grads(self, eqns: list[Any], own: set[int]) -> None:
        """Raises where equations read gradients of params that are not ``own``."""
        foreign = self._foreign(eqns, own)
        if foreign:
            reason = self._culprit(eqns)
            raise ValueError(
                f"release: the update of {self.names[min(own)]!r} needs the gradient "
                f"of {self.names[foreign[0]]!r}, which is not there at the same time: "
                f"{reason}. {_CLIP if 'norm' in reason else _WAIT}"
            )

    def _culprit(self, eqns: list[Any]) -> str:
        """How gradients of several params first meet, in words."""
        sources = {x: frozenset([i]) for i, x in enumerate(self.grads)}
        for eqn in eqns:
            met = [sources[x] for x in variables(eqn.invars) if x in sources]
            together = frozenset[int]().union(*met)
            if len(together) > 1 and together not in met:
                return fused.in_words(
                    eqn, "gradients are combined, as in a global norm"
                )
            sources.update(dict.fromkeys(eqn.outvars, together))
        return "gradients are combined"

    def _scalars(self, eqns: list[Any]) -> list[Any]:
        """The equations that make the scalars which others compute arrays with."""
        arrays = [eqn for eqn in eqns if any(x.aval.shape for x in eqn.outvars)]
        read = [x for eqn in arrays for x in variables(eqn.invars)]
        return slice_equations(eqns, [x for x in read if not x.aval.shape], self._known)

    def _check_elementwise(self, part: Part, layers: int) -> None:
        """Raises where layers depend on each other."""
        own = self._foreign(part.scalars, set())
        if own:
            self._refuse(self.names[own[0]], layers, _reduction(part.scalars))
        reasons = [(eqn, fused.unsupported_on_layer(eqn, layers)) for eqn in part.eqns]
        # An op is only left over where something else does not fit.
        reasons.sort(key=lambda pair: fused.is_op(pair[0]))
        for eqn, reason in reasons:
            if reason:
                self._refuse(self._whose(eqn, part), layers, reason)

    def _whose(self, eqn: Any, part: Part) -> str:
        """The name of a param on which an equation depends."""
        needed = slice_equations(part.eqns, eqn.outvars, self._known)
        read = {x for each in needed for x in variables(each.invars)}
        for i in part.params:
            if self.grads[i] in read or self.operands[i] in read:
                return self.names[i]
        return self.names[part.params[0]]

    def _refuse(self, name: str, layers: int, reason: str) -> None:
        raise ValueError(
            f"release: the update of {name!r}, a stack of {layers} layers, does not "
            f"take one layer at a time: {reason}. {_CLIP} For other transformations "
            "that are not elementwise, make each layer a release.layer of its own, "
            "with params that are not stacked."
        )


def evaluate(
    part: Part, env: Env, index: jax.Array | None = None
) -> tuple[dict[int, Any], list[Any]]:
    """The new values of a part's results, and its reductions.

    Args:
      part: what to compute.
      env: values of operands, of gradients, and, of a stack, scalars; for a stack,
        arrays are slices ``x[index : index + 1]``.
      index: of the layer, int32.
    """
    env = fused.evaluate(part.eqns, env, index)
    results = {i: read(env, x) for i, x in part.results.items()}
    # On what was computed, whether that is of a layer or of all.
    env = fused.evaluate(part.reductions.values(), env)
    return results, [env[x] for x in part.reductions]


def scalars(part: Part, env: Env) -> Env:
    """Values of all scalars that a part may take, from whole params and state."""
    known = fused.evaluate(part.scalars, env)
    return {x: value for x, value in known.items() if not x.aval.shape}


def _reduction(eqns: list[Any]) -> str:
    """The first equation that makes a scalar of an array, in words."""
    for eqn in eqns:
        arrays = any(x.aval.shape for x in eqn.invars)
        if arrays and not any(x.aval.shape for x in eqn.outvars):
            name = eqn.primitive.name
            return fused.in_words(eqn, f"{name!r} of a whole gradient")
    return "a scalar is computed from its gradient"


def _check_kept(old: PyTree, new: PyTree) -> None:
    """Raises where params or state change their structure, shapes or dtypes."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            "release: the update returns a state of another structure than it takes, "
            f"{jax.tree.structure(new)} for {jax.tree.structure(old)}. Call init again."
        )
    for path, a, b in zip(
        _mirror.leaf_paths(old), jax.tree.leaves(old), jax.tree.leaves(new), strict=True
    ):
        before, after = jax.typeof(a), jax.typeof(b)
        if before.shape != after.shape or before.dtype != after.dtype:
            raise ValueError(
                f"release: the update makes {path!r} "
                f"{after.dtype}{list(after.shape)} of {before.dtype}"
                f"{list(before.shape)}. It has to keep shapes and dtypes."
            )


def _owners(state: PyTree, params: PyTree) -> list[int | None]:
    """For each leaf of the state, the position of its param."""
    parts, join = _mirror.split_state(*map(_boxes.unboxed, (state, params)))

    def tagged(part: Any) -> Any:
        if not isinstance(part, _mirror.Mirror):
            return _Owner(None)
        tags = [
            _Owner(i) if hasattr(x, "shape") else x for i, x in enumerate(part.entries)
        ]
        return part.rebuild(tags)

    tags = jax.tree.leaves(
        join([tagged(part) for part in parts]), is_leaf=lambda x: isinstance(x, _Owner)
    )
    return [tag.param for tag in tags]


class _Owner(NamedTuple):
    """Stands for a leaf; has a shape, as arrays have, so that trees of it mirror."""

    param: int | None
    shape: tuple[int, ...] = ()
    dtype: Any = None
