"""Which params a transformation never moves, from the update that it computes.

``optax.set_to_zero``, under ``optax.partition``, ``optax.masked`` or ``optax.freeze``,
makes zeros of whatever gradients there are, and that is how params are frozen in optax.
The traced update shows it: such a result is a constant.
"""

from typing import Any

import jax
import optax

from optax_flash.fusion import fuse
from optax_flash.fusion.jaxprs import callee, evaluate
from optax_flash.transforms import _init, _mirror

PyTree = Any

KEEP_ZERO = frozenset(
    "broadcast_in_dim convert_element_type copy copy_p neg reshape sign".split()
)
"""Primitives of one operand that make zeros of zeros."""


def frozen(tx: optax.GradientTransformation, params: PyTree) -> list[bool]:
    """For each param, whether its updates are zeros, whatever the gradients are.

    Nothing is computed, and nothing is traced unless the transformation has an
    ``optax.masked`` in it, or no state at all. What cannot be traced without further
    arguments of ``update`` counts as moving all params.

    Args:
      tx: the transformation.
      params: arrays or ``jax.ShapeDtypeStruct``.
    """
    nothing = [False] * len(jax.tree.leaves(params))
    # Without the types of an explicit mesh, for which init would need its context.
    shapes = jax.tree.map(
        lambda p: _init.like_float32(jax.ShapeDtypeStruct(p.shape, p.dtype)), params
    )
    state = jax.eval_shape(lambda p: tx.init(p), shapes)
    nodes = jax.tree.leaves(state, is_leaf=_is_masked)
    if nodes and not any(map(_is_masked, nodes)):
        return nothing
    structure = jax.tree.structure(shapes)

    def updates(grads: PyTree, state: PyTree, params: PyTree) -> list[Any]:
        return structure.flatten_up_to(tx.update(grads, state, params)[0])

    try:
        with fuse.dry():
            closed = jax.make_jaxpr(updates)(shapes, state, shapes)
    except Exception:
        # It raises again where it is called, if that is without its arguments, too.
        return nothing
    zeros = _zeros(closed.jaxpr, [False] * len(closed.jaxpr.invars))
    return zeros if len(zeros) == len(nothing) else nothing


def frozen_paths(tx: optax.GradientTransformation, params: PyTree) -> frozenset[str]:
    """The paths of those params."""
    rows = zip(_mirror.leaf_paths(params), frozen(tx, params), strict=True)
    return frozenset(path for path, is_frozen in rows if is_frozen)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedState)


def _zeros(jaxpr: Any, of_operands: list[bool]) -> list[bool]:
    """For each result of a jaxpr, whether it is zeros."""
    unknown = [False] * len(jaxpr.constvars)
    return evaluate(jaxpr, of_operands, _zeros_of_equation, unknown, _is_zero)


def _zeros_of_equation(eqn: Any, operands: list[bool]) -> list[bool]:
    """For each result of an equation, whether it is zeros."""
    name = eqn.primitive.name
    if called := callee(eqn):
        return _zeros(called.jaxpr, operands)
    if name == "cond":
        branches = [_zeros(x.jaxpr, operands[1:]) for x in eqn.params["branches"]]
        return [all(column) for column in zip(*branches, strict=True)]
    if name == "mul":
        return [any(operands)]
    if name == "div":
        return operands[:1]
    if name == "select_n":
        return [all(operands[1:])]
    return [name in KEEP_ZERO and operands[0]] * len(eqn.outvars)


def _is_zero(literal: Any) -> bool:
    x = literal.val
    return bool((x == 0).all() if hasattr(x, "all") else x == 0)
