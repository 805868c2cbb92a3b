"""Our states, found inside of the states of other transformations."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from optax_flash.transforms import _boxes, _entries, _mirror
from optax_flash.transforms._stored import Stored
from optax_flash.transforms.compress import CompressState
from optax_flash.transforms.master_weights import MasterWeightsState

PyTree = Any


def is_ours(node: Any) -> bool:
    """Whether a node is a state of :func:`compress` or :func:`master_weights`."""
    return isinstance(node, CompressState | MasterWeightsState)


def ours(state: PyTree) -> Iterator[Any]:
    """Our states, outer ones first."""
    for node in _mirror.nodes(state, CompressState, MasterWeightsState):
        yield node
        yield from ours(node.inner_state)


def stored(state: PyTree) -> Iterator[tuple[Stored, Any, Any]]:
    """How each array is stored, its codes, and its scales; None for a residual's."""
    for node in ours(state):
        if isinstance(node, CompressState):
            for entry, x in zip(
                node.codecs.leaves, _entries.entries(node), strict=True
            ):
                yield entry, x.codes, x.scales
        else:
            residuals = jax.tree.leaves(node.residual)
            for entry in node.codecs.leaves:
                yield entry, residuals[entry.at], None


def kinds(state: PyTree) -> list[str]:
    """What each leaf of a state is, in the words of :func:`memory_report`."""
    found = []
    for node in jax.tree.leaves(state, is_leaf=is_ours):
        found += _kinds(node) if is_ours(node) else ["other state"]
    return found


def _kinds(node: Any) -> list[str]:
    fields = {name: kinds(x) for name, x in node._asdict().items()}
    if isinstance(node, CompressState):
        fields["scales"] = ["scales"] * len(fields["scales"])
        for entry in node.codecs.leaves:
            fields["inner_state"][entry.at] = "codes"
    else:
        fields["residual"] = ["residual"] * len(fields["residual"])
    return [kind for of_field in fields.values() for kind in of_field]


def map_ours(function: Callable[[Any], Any], state: PyTree) -> PyTree:
    """A state with a function's results in place of our outermost states."""
    return jax.tree.map(
        lambda x: function(x) if is_ours(x) else x, state, is_leaf=is_ours
    )


def map_compressed(
    function: Callable[[CompressState], CompressState], state: PyTree
) -> PyTree:
    """A state with a function's results in place of all states in codes."""

    def mapped(node: Any) -> Any:
        node = node._replace(inner_state=map_ours(mapped, node.inner_state))
        return function(node) if isinstance(node, CompressState) else node

    return map_ours(mapped, state)


def check_made_by(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    caller: str,
) -> None:
    """Raises a ValueError where a transformation has states of another structure.

    Args:
      tx: the transformation that should have made the state.
      state: its state.
      params: those that it is for, or their shapes.
      caller: a function's name, for the message.
    """
    expected = jax.eval_shape(lambda p: tx.init(p), params)
    if _outline(_boxes.unboxed(expected)) != _outline(_boxes.unboxed(state)):
        raise ValueError(
            f"{caller}: the state has another structure than tx.init makes for these "
            "params. Pass the transformation that made it."
        )


def _outline(state: PyTree) -> Any:
    """The structure of a state, without what depends on shapes or derivatives."""

    def outline(node: Any) -> Any:
        if isinstance(node, CompressState):
            return dict.fromkeys(node.scales, 0), map_ours(outline, node.inner_state)
        return map_ours(outline, node.inner_state), 0

    return jax.tree.structure(map_ours(outline, state))
