"""Our states, found inside of the states of other transformations."""

from typing import Any, NamedTuple

import jax
import optax

from optax_flash.transforms import _records
from optax_flash.transforms._rules import Rules
from optax_flash.transforms.compress import CompressState


class Compressed(NamedTuple):
    """A state in codes, with what it does not say itself.

    Attributes:
      rules: of its transformation.
      state: the state.
      params: shapes of what its init was given, masked as wrappers do.
    """

    rules: Rules
    state: CompressState
    params: Any


def described(tx: optax.GradientTransformation, params: Any, caller: str) -> Any:
    """The state of :func:`_records.describe`, which says how each leaf is stored.

    Args:
      tx: any transformation.
      params: those that it is for, or their shapes.
      caller: a function's name, for the message.

    Raises:
      ValueError: a state in codes does not say its codecs.
    """
    state = _records.describe(tx, params)
    nodes = jax.tree.leaves(state, is_leaf=_is_ours)
    if any(isinstance(node, CompressState) for node in nodes):
        raise ValueError(
            f"{caller}: tx.init was traced before, inside of jax.jit, and so does not "
            "say which codecs it uses. Make tx of the init without jit."
        )
    return state


def split(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    caller: str,
) -> tuple[list[Any], Any]:
    """The leaves of a state, those in codes as one :class:`Compressed` each.

    Args:
      tx: the transformation that made the state, however deeply it wraps ours.
      state: its state.
      params: those that it is for.
      caller: a function's name, for messages.

    Returns:
      The leaves, and the structure that they are of.

    Raises:
      ValueError: the state is not ``tx``'s.
    """
    nodes, structure = jax.tree.flatten(described(tx, params, caller), is_leaf=_is_ours)
    foreign = (
        f"{caller}: the state has another structure than tx.init makes for these "
        "params. Pass the transformation that made it."
    )
    try:
        parts = structure.flatten_up_to(state)
    except (ValueError, TypeError) as error:
        raise ValueError(foreign) from error
    for i, (node, part) in enumerate(zip(nodes, parts, strict=True)):
        if isinstance(node, _records.Configured):
            if not isinstance(part, CompressState):
                raise ValueError(foreign)
            parts[i] = Compressed(node.config, part, node.params)
    return parts, structure


def _is_ours(node: Any) -> bool:
    return isinstance(node, _records.Configured | CompressState)
