"""The pass as transformations use it: trace an update, split it, run the parts."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flash import meshes
from optax_flash.codecs import hashing
from optax_flash.fusion import backends, parts, untraced
from optax_flash.fusion import split as splits
from optax_flash.fusion.jaxprs import ClosedJaxpr, Env, as_fun, read, trace_state
from optax_flash.fusion.tangents import moves

PyTree = Any
Update = Callable[[jax.Array, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


@dataclasses.dataclass
class _Trace:
    """What transformations inside a traced update share.

    Attributes:
      implementations: those that they ask for.
      start: of their random bits, :func:`hashing.start` of the outermost one's step.
        Sharing it, they share one hash of each element.
      differentiated: whether derivatives go through this update.
      level: the state of jax's tracing where the start is known. Inside of another jit
        it must not be used: jax would keep what is traced there for the next update,
        with this one's start.
    """

    implementations: set[str]
    differentiated: bool
    start: Any = None
    level: Any = None

    def is_here(self) -> bool:
        """Whether what it knows is true where jax is tracing."""
        return self.level == trace_state()


class _Unfused(NamedTuple):
    """Updates inside are plain JAX.

    Attributes:
      dry: they are only looked at, see :func:`dry`.
      left_out: what needs a trace, and does not run.
    """

    dry: bool
    left_out: set[str]


Watched = list[tuple[splits.LeafUpdate, str | None]]

# Who is around an update: a trace that it takes part in, somebody who wants it unfused,
# or a list for its leaves. No argument could tell. Between the outermost transformation
# or a report and the ones inside are any of optax and of users, and those without extra
# arguments hand on nothing but updates, state and params.
_around: contextvars.ContextVar[_Trace | _Unfused | Watched | None] = (
    contextvars.ContextVar("optax_flash_around", default=None)
)


@contextlib.contextmanager
def _inside(around: _Trace | _Unfused | Watched) -> Iterator[None]:
    token = _around.set(around)
    try:
        yield
    finally:
        _around.reset(token)


@contextlib.contextmanager
def watch() -> Iterator[Watched]:
    """Gives a list of the leaves that updates run while the context is open.

    Beside each leaf is the implementation that was asked for.
    """
    seen: Watched = []
    with _inside(seen):
        yield seen


def dry() -> contextlib.AbstractContextManager[None]:
    """Updates inside are plain JAX and additive: XLA drops what nobody reads.

    For a look at the updates, with neither the cost nor the memory of a new state.
    """
    return _inside(_Unfused(True, set()))


def is_dry() -> bool:
    """Whether an update is only to be looked at."""
    around = _around.get()
    return isinstance(around, _Unfused) and around.dry


def leave_out(what: str) -> None:
    """Says of a part of an update that it needs a trace, and does not run here."""
    around = _around.get()
    if isinstance(around, _Unfused):
        around.left_out.add(what)


def is_differentiated() -> bool:
    """Whether derivatives go through the update that is being traced.

    False where that is not known yet: inside of a jit, scan or cond.
    """
    trace = _around.get()
    return isinstance(trace, _Trace) and trace.differentiated and trace.is_here()


def check_implementation(implementation: str | None) -> None:
    """Raises a ValueError where no such implementation is known."""
    if implementation is not None and implementation not in backends.names():
        raise ValueError(
            f"Unknown implementation {implementation!r}. Known names: "
            f"{', '.join(backends.names())}. None takes the best for the platform."
        )


def run(
    update: Update,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    implementation: str | None,
    names: list[str],
    in_place_of: str = "updates",
) -> tuple[PyTree, PyTree]:
    """Runs an update as a kernel for each leaf, where that is possible.

    An update inside of another's just takes part in it.

    Args:
      update: ``(start, updates, state, params) -> (updates, state)``, pure; ``start``
        is what its random bits depend on.
      updates: gradients, a tree of arrays.
      state: a NamedTuple with a field ``step``; the new one has its structure.
      params: a tree of arrays, or None.
      implementation: a name, or None for the best that fits.
      names: the path of each leaf of ``updates``.
      in_place_of: ``"updates"`` or ``"params"``: whose buffers the new updates take.

    Raises:
      ValueError: a named implementation does not fit. The message says why not, leaf by
        leaf.
      TypeError: the update takes values of arrays, and is to be compiled.
    """
    around = _around.get()
    if isinstance(around, _Trace):
        if implementation is not None:
            around.implementations.add(implementation)
        if around.is_here():
            return update(around.start, updates, state, params)
    operands, treedef = jax.tree.flatten((updates, state, params))
    with meshes.context_of(operands):
        if isinstance(around, _Trace | _Unfused):
            start = hashing.start(optax.safe_increment(state.step))
            return update(start, updates, state, params)
        return _fused(
            update, operands, treedef, around, implementation, names, in_place_of
        )


def _fused(
    update: Update,
    operands: list[Any],
    treedef: Any,
    watched: Watched | None,
    implementation: str | None,
    names: list[str],
    in_place_of: str,
) -> tuple[PyTree, PyTree]:
    """The outermost update, from the leaves of its updates, state and params."""
    updates, state, params = jax.tree.unflatten(treedef, operands)
    operands = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in operands]

    def traced(differentiated: bool) -> tuple[ClosedJaxpr, Any, set[str]]:
        trace = _Trace({implementation} if implementation else set(), differentiated)
        structure = []

        def flat(*operands: Any) -> list[Any]:
            updates, state, params = jax.tree.unflatten(treedef, operands)
            trace.start = hashing.start(optax.safe_increment(state.step))
            trace.level = trace_state()
            try:
                with _inside(trace):
                    out = update(trace.start, updates, state, params)
            finally:
                # Nothing of this trace outlives it.
                trace.start = trace.level = None
            results, out_treedef = jax.tree.flatten(out)
            structure.append((out_treedef, jax.tree.structure(out[1])))
            return results

        closed = jax.make_jaxpr(flat)(*operands)
        return closed, structure[0], trace.implementations

    unfused = _Unfused(False, set())

    def step_by_step() -> tuple[PyTree, PyTree]:
        start = hashing.start(optax.safe_increment(state.step))
        with _inside(unfused):
            return update(start, updates, state, params)

    differentiated = moves(operands)
    try:
        closed, structure, implementations = traced(differentiated)
        if not differentiated and moves(closed.consts):
            # By a hyperparameter, for example, that the transformation was made with.
            closed, structure, implementations = traced(True)
    except untraced.ERRORS as error:
        return untraced.run(
            step_by_step, unfused.left_out, error, operands, implementation
        )
    out_treedef, new_state = structure
    sizes = [len(jax.tree.leaves(x)) for x in (updates, state, params)]
    n_updates = out_treedef.num_leaves - new_state.num_leaves
    aliases = {}
    in_order = in_place_of != "params" or sizes[2] == n_updates
    if n_updates == sizes[0] and in_order:
        first = sum(sizes[:2]) if in_place_of == "params" else 0
        aliases.update({i: first + i for i in range(n_updates)})
    if new_state == jax.tree.structure(state):
        aliases.update({n_updates + i: sizes[0] + i for i in range(sizes[1])})
    results = _run_parts(
        splits.split(closed.jaxpr, names, aliases),
        closed,
        [*closed.consts, *operands],
        _one(implementations),
        watched,
    )
    return jax.tree.unflatten(out_treedef, results)


def _one(implementations: set[str]) -> str | None:
    if len(implementations) > 1:
        raise ValueError(
            f"Nested transformations ask for several implementations, "
            f"{sorted(implementations)}. Name one, on the outermost."
        )
    return next(iter(implementations), None)


def _run_parts(
    split: splits.Split,
    closed: ClosedJaxpr,
    operands: list[Any],
    implementation: str | None,
    watched: Watched | None,
) -> list[Any]:
    effects = "it has side effects, as host callbacks have" if closed.effects else None
    if effects:
        unfused = [x._replace(program=None, reason=effects) for x in split.leaves]
        split = split._replace(leaves=unfused)
    if watched is not None:
        watched.extend((leaf, implementation) for leaf in split.leaves)
    if implementation not in (None, "xla"):
        _check_fit(split.leaves, implementation)
    if effects:
        operands = operands[len(closed.consts) :]
        return as_fun(closed.jaxpr, closed.consts)(*operands)
    variables = [*closed.jaxpr.constvars, *closed.jaxpr.invars]
    env: Env = dict(zip(variables, operands, strict=True))

    scalars = as_fun(split.prologue)(*operands)
    env.update(zip(split.scalars, scalars, strict=True))
    fitting = [
        parts.BoundProgram(leaf.program, leaf.operands, leaf.results)
        for leaf in split.leaves
        if leaf.program
    ]
    parts.run(fitting, implementation, env)
    rest = as_fun(split.rest)(*(read(env, x) for x in split.rest_operands))
    env.update(zip(split.rest.outvars, rest, strict=True))
    return [read(env, x) for x in split.returned]


def _check_fit(all_leaves: list[splits.LeafUpdate], implementation: str) -> None:
    """Raises where a named implementation cannot run every leaf."""
    reasons: dict[str, list[str]] = {}
    for leaf in all_leaves:
        if leaf.program:
            reason = backends.unsupported(leaf.program, implementation)
        else:
            reason = leaf.reason
        if reason:
            reasons.setdefault(reason, []).extend(leaf.names or ["the state"])
    if reasons:
        lines = [
            f"  {', '.join(map(repr, paths[:3]))}"
            f"{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}: {reason}"
            for reason, paths in reasons.items()
        ]
        raise ValueError(
            f"implementation={implementation!r} does not fit every leaf:\n"
            + "\n".join(lines)
            + "\nTake implementation=None, which leaves these to XLA."
        )
