"""The pass as transformations use it: trace an update, split it, run the parts."""

import contextlib
import contextvars
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.extend import core

from optax_flash import meshes
from optax_flash.codecs import hashing
from optax_flash.fusion import primitive as leaves
from optax_flash.fusion import split as splits
from optax_flash.fusion import untraced
from optax_flash.fusion.backends.choose import IMPLEMENTATIONS, SMALL, TOGETHER, misfit
from optax_flash.fusion.jaxprs import constant
from optax_flash.fusion.program import Program
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
        return self.level == core.get_opaque_trace_state(convention="flax")


_trace: contextvars.ContextVar[_Trace | None] = contextvars.ContextVar(
    "optax_flash_trace", default=None
)
Watched = list[tuple[splits.Leaf, str | None]]
_watched: contextvars.ContextVar[Watched | None] = contextvars.ContextVar(
    "optax_flash_leaves", default=None
)


@contextlib.contextmanager
def watch() -> Iterator[Watched]:
    """Gives a list of the leaves that updates run while the context is open.

    Beside each leaf is the implementation that was asked for.
    """
    seen: Watched = []
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)


_dry: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "optax_flash_dry", default=False
)


@contextlib.contextmanager
def dry() -> Iterator[None]:
    """Updates inside are plain JAX and additive: XLA drops what nobody reads.

    For a look at the updates, with neither the cost nor the memory of a new state.
    """
    token = _dry.set(True)
    try:
        yield
    finally:
        _dry.reset(token)


def is_dry() -> bool:
    """Whether an update is only to be looked at."""
    return _dry.get()


_step_by_step: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "optax_flash_step_by_step", default=False
)


def is_differentiated() -> bool:
    """Whether derivatives go through the update that is being traced.

    False where that is not known yet: inside of a jit, scan or cond.
    """
    trace = _trace.get()
    return trace is not None and trace.differentiated and trace.is_here()


def check_implementation(implementation: str | None) -> None:
    """Raises a ValueError where no such implementation is known."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown implementation {implementation!r}. Known names: "
            f"{', '.join(IMPLEMENTATIONS)}. None takes the best for the platform."
        )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing makes many objects that live on: looking for garbage costs a fifth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
    mesh = meshes.context_of(jax.tree.leaves((updates, state, params)))
    with _no_garbage_collection(), mesh:
        return _run(update, updates, state, params, implementation, names, in_place_of)


def _run(
    update: Update,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    implementation: str | None,
    names: list[str],
    in_place_of: str,
) -> tuple[PyTree, PyTree]:
    trace = _trace.get()
    if trace is not None:
        if implementation is not None:
            trace.implementations.add(implementation)
        if trace.is_here():
            return update(trace.start, updates, state, params)
    if trace is not None or is_dry() or _step_by_step.get():
        start = hashing.start(optax.safe_increment(state.step))
        return update(start, updates, state, params)

    operands, treedef = jax.tree.flatten((updates, state, params))
    operands = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in operands]

    def traced(differentiated: bool) -> tuple[core.ClosedJaxpr, Any, set[str]]:
        trace = _Trace({implementation} if implementation else set(), differentiated)
        structure = []

        def flat(*operands: Any) -> list[Any]:
            updates, state, params = jax.tree.unflatten(treedef, operands)
            trace.start = hashing.start(optax.safe_increment(state.step))
            trace.level = core.get_opaque_trace_state(convention="flax")
            token = _trace.set(trace)
            try:
                out = update(trace.start, updates, state, params)
            finally:
                _trace.reset(token)
                # Nothing of this trace outlives it.
                trace.start = trace.level = None
            results, out_treedef = jax.tree.flatten(out)
            structure.append((out_treedef, jax.tree.structure(out[1])))
            return results

        closed = jax.make_jaxpr(flat)(*operands)
        return closed, structure[0], trace.implementations

    def step_by_step() -> tuple[PyTree, PyTree]:
        start = hashing.start(optax.safe_increment(state.step))
        token = _step_by_step.set(True)
        try:
            return update(start, updates, state, params)
        finally:
            _step_by_step.reset(token)

    differentiated = moves(operands)
    try:
        closed, structure, implementations = traced(differentiated)
        if not differentiated and moves(closed.consts):
            # By a hyperparameter, for example, that the transformation was made with.
            closed, structure, implementations = traced(True)
    except untraced.ERRORS as error:
        return untraced.run(step_by_step, error, operands, implementation)
    out_treedef, new_state = structure
    sizes = [len(jax.tree.leaves(x)) for x in (updates, state, params)]
    n_updates = out_treedef.num_leaves - new_state.num_leaves
    donors = {}
    in_order = in_place_of != "params" or sizes[2] == n_updates
    if n_updates == sizes[0] and in_order:
        first = sum(sizes[:2]) if in_place_of == "params" else 0
        donors.update({i: first + i for i in range(n_updates)})
    if new_state == jax.tree.structure(state):
        donors.update({n_updates + i: sizes[0] + i for i in range(sizes[1])})
    results = _run_parts(
        splits.split(closed.jaxpr, names, donors),
        closed,
        [*closed.consts, *operands],
        _one(implementations),
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
    closed: core.ClosedJaxpr,
    operands: list[Any],
    implementation: str | None,
) -> list[Any]:
    effects = "it has side effects, as host callbacks have" if closed.effects else None
    if effects:
        misfits = [x._replace(program=None, reason=effects) for x in split.leaves]
        split = split._replace(leaves=misfits)
    watched = _watched.get()
    if watched is not None:
        watched.extend((leaf, implementation) for leaf in split.leaves)
    if implementation not in (None, "xla"):
        _check_fit(split.leaves, implementation)
    if effects:
        operands = operands[len(closed.consts) :]
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *operands)
    variables = [*closed.jaxpr.constvars, *closed.jaxpr.invars]
    env = dict(zip(variables, operands, strict=True))

    def read(x: Any) -> Any:
        if isinstance(x, core.Literal):
            return constant(x)
        return env[x]

    env.update(
        zip(
            split.scalars,
            jax.core.eval_jaxpr(split.prologue, (), *operands),
            strict=True,
        )
    )
    fitting = [(leaf, leaf.program) for leaf in split.leaves if leaf.program]
    for batch in batches(fitting):
        results = leaves.update(
            tuple(program for _, program in batch),
            implementation,
            [[read(x) for x in leaf.operands] for leaf, _ in batch],
        )
        for (leaf, _), of_leaf in zip(batch, results, strict=True):
            env.update(zip(leaf.results, of_leaf, strict=True))
    rest = jax.core.eval_jaxpr(split.rest, (), *map(read, split.rest_operands))
    env.update(zip(split.rest.outvars, rest, strict=True))
    return [read(x) for x in split.returned]


T = TypeVar("T")


def batches(
    fitting: list[tuple[T, Program]], sliced: bool = False
) -> Iterator[list[tuple[T, Program]]]:
    """Leaves that run together: small ones of one family, equal programs first.

    Args:
      fitting: the program of each leaf, beside whatever stands for the leaf.
      sliced: they run on a slice at one index of the leaf's first axis.
    """
    families: dict[Any, dict[Program, list[tuple[T, Program]]]] = {}
    for leaf, program in fitting:
        size = program.size // program.shape[0] if sliced else program.size
        if size >= SMALL:
            yield [(leaf, program)]
        else:
            family = families.setdefault(program.family, {})
            family.setdefault(program, []).append((leaf, program))
    for family in families.values():
        rest = []
        for alike in family.values():
            # Whole batches of one program, which are traced and compiled once.
            full = len(alike) // TOGETHER * TOGETHER
            for i in range(0, full, TOGETHER):
                yield alike[i : i + TOGETHER]
            rest += alike[full:]
        for i in range(0, len(rest), TOGETHER):
            yield rest[i : i + TOGETHER]


def _check_fit(all_leaves: list[splits.Leaf], implementation: str) -> None:
    """Raises where a named implementation cannot run every leaf."""
    reasons: dict[str, list[str]] = {}
    for leaf in all_leaves:
        if leaf.program:
            reason = misfit(leaf.program, implementation)
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
