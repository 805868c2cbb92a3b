"""An update in parts: what runs a part of its equations, or one layer of a stack.

:mod:`fuse` runs the leaves of a whole update with it. For passes outside of the
compiler, such as gradient release, which choose the parts themselves, :func:`trace`
gives an update as equations, :func:`unsupported_on_layer` says which of them need
whole stacks of layers, and :func:`evaluate` runs some of them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from optax_flash.fusion import backends, primitive
from optax_flash.fusion import program as programs
from optax_flash.fusion.jaxprs import (
    ClosedJaxpr,
    Env,
    alone,
    bind,
    is_variable,
    read,
)
from optax_flash.fusion.ops import Decode, Elementwise, Tile, Within, op_p
from optax_flash.fusion.program import Program
from optax_flash.fusion.simplify import inline


def trace(function: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, Any]:
    """A function that has an update in it, as equations: kernels have one for a leaf.

    Returns:
      The jaxpr, and the shapes and dtypes of the function's results.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr = inline(closed.jaxpr)
    eqns = [part for eqn in jaxpr.eqns for part in _by_leaf(eqn)]
    return ClosedJaxpr(jaxpr.replace(eqns=eqns), closed.consts), shapes


def is_small(size: int) -> bool:
    """Whether a leaf of so many elements shares a kernel with others."""
    return size < backends.SMALL


def is_op(eqn: Any) -> bool:
    """Whether an equation encodes, decodes or rounds, outside of a kernel."""
    return eqn.primitive is op_p


def in_words(eqn: Any, otherwise: str) -> str:
    """What an equation computes that no kernel does."""
    return programs.WORDS.get(eqn.primitive.name, otherwise)


def unsupported_on_layer(eqn: Any, layers: int) -> str | None:
    """Why an equation cannot run on one layer of a stack, in words; None if it can.

    Args:
      eqn: of :func:`trace`.
      layers: the length of the first axis of all that is stacked.
    """
    if eqn.primitive is primitive.update_p:
        (program,) = eqn.params["programs"]
        if len(program.shape) == 1 and program.lanes > 1:
            return "its codes share scales along the axis of layers"
        return None
    if is_op(eqn):
        # Others draw random bits, by the global index.
        op = eqn.params["op"]
        fits = isinstance(op, Elementwise) or (
            isinstance(op, Decode)
            and len(op.shape) > 1
            or isinstance(op, Within)
            and len(eqn.invars[0].aval.shape) > 1
        )
        return None if fits else "arrays of several shapes meet"
    reason = programs.unsupported(eqn)
    for x in eqn.outvars:
        if x.aval.shape and x.aval.shape[:1] != (layers,):
            return reason or "an array has no axis of layers"
    return reason


def evaluate(eqns: Iterable[Any], env: Env, index: jax.Array | None = None) -> Env:
    """Values of what equations make, beside those that are known.

    Args:
      eqns: of :func:`trace`, in their order.
      env: values of the variables that the equations take.
      index: of a layer, int32: arrays are slices ``x[index : index + 1]``, and so are
        the results. # shape=(), dtype=int32
    """
    env = dict(env)
    waiting: list[Any] = []

    def run_waiting() -> None:
        by_implementation: dict[Any, list[BoundProgram]] = {}
        for eqn in waiting:
            (program,) = eqn.params["programs"]
            leaf = BoundProgram(program, eqn.invars, eqn.outvars)
            by_implementation.setdefault(eqn.params["implementation"], []).append(leaf)
        for implementation, leaves in by_implementation.items():
            run(leaves, implementation, env, index)
        waiting.clear()

    # No plain evaluation in order: kernels of small leaves wait for each other until
    # one's result is read, and then share a launch, whichever params they belong to.
    for eqn in eqns:
        if any(is_variable(x) and x not in env for x in eqn.invars):
            run_waiting()
        if eqn.primitive is primitive.update_p and len(eqn.params["programs"]) == 1:
            waiting.append(eqn)
        else:
            args = [read(env, x) for x in eqn.invars]
            results = bind(eqn, args) if index is None else _on_slice(eqn, args)
            env.update(zip(eqn.outvars, results, strict=True))
    run_waiting()
    return env


class BoundProgram(NamedTuple):
    """A program, and what it takes and makes in an update.

    Attributes:
      program: what to compute.
      operands: variables or literals, one for each of the program's inputs.
      results: variables, one for each output.
    """

    program: Program
    operands: list[Any]
    results: list[Any]


def run(
    leaves: list[BoundProgram],
    implementation: str | None,
    env: Env,
    index: jax.Array | None = None,
) -> None:
    """Runs programs, small leaves together, and writes their results into ``env``.

    Args:
      leaves: the programs.
      implementation: a name, or None for the best.
      env: values of variables.
      index: see :func:`evaluate`.
    """
    for batch in _batches(leaves, sliced=index is not None):
        results = primitive.update(
            tuple(leaf.program for leaf in batch),
            implementation,
            [[read(env, x) for x in leaf.operands] for leaf in batch],
            index,
        )
        for leaf, of_leaf in zip(batch, results, strict=True):
            env.update(zip(leaf.results, of_leaf, strict=True))


def _batches(leaves: list[BoundProgram], sliced: bool) -> Iterator[list[BoundProgram]]:
    """Leaves that run together: small ones of one family, equal programs first."""
    families: dict[Any, dict[Program, list[BoundProgram]]] = {}
    for leaf in leaves:
        program = leaf.program
        size = program.size // program.shape[0] if sliced else program.size
        if is_small(size):
            family = families.setdefault(program.family, {})
            family.setdefault(program, []).append(leaf)
        else:
            yield [leaf]
    for family in families.values():
        rest = []
        for alike in family.values():
            # Whole batches of one program, which are traced and compiled once.
            full = len(alike) // backends.TOGETHER * backends.TOGETHER
            for i in range(0, full, backends.TOGETHER):
                yield alike[i : i + backends.TOGETHER]
            rest += alike[full:]
        for i in range(0, len(rest), backends.TOGETHER):
            yield rest[i : i + backends.TOGETHER]


def _by_leaf(eqn: Any) -> list[Any]:
    """An equation, or one for each leaf if it runs kernels."""
    if eqn.primitive is not primitive.update_p:
        return [eqn]
    return primitive.one_by_one(eqn)


def _on_slice(eqn: Any, args: list[Any]) -> Any:
    """An equation's results, for one layer where it makes arrays."""
    shape = eqn.outvars[0].aval.shape
    if is_op(eqn):
        op = eqn.params["op"]
        if isinstance(op, Decode):
            op = dataclasses.replace(op, shape=(1, *op.shape[1:]))
        return op.whole(*args)
    if not shape:
        return bind(eqn, args)
    # Elementwise equations do not ask for global indices.
    tile = Tile((1, *shape[1:]), None, None)  # pyright: ignore
    jaxpr, values = alone(eqn, args)
    return programs.evaluate(jaxpr, tile, values)
