"""Arguments in the wrong order: recognised by what they are, before they do harm."""

import operator
import os
from typing import Any

import jax
import optax


def check_transformation(tx: Any, others: tuple[Any, ...], call: str) -> None:
    """Raises a TypeError where something else stands in a transformation's place.

    Args:
      tx: what should be an optax transformation.
      others: the arguments that it may have been swapped with.
      call: the right one, for the message.
    """
    if is_transformation(tx):
        return
    if any(map(is_transformation, others)):
        raise TypeError(f"The arguments are swapped: call {call}.")
    raise TypeError(
        f"tx is of type {type(tx).__name__}, not an optax transformation. Call {call}."
    )


def check_order(state: Any, params: Any, call: str) -> None:
    """Raises a TypeError where an optimizer state stands in the params' place."""
    if holds_state(params) and not holds_state(state):
        raise TypeError(
            "The arguments are swapped: there is an optimizer state where params "
            f"should be. Call {call}."
        )


def check_update(kind: type, updates: Any, state: Any, params: Any) -> None:
    """Raises a TypeError where the state of an update is in another's place.

    Args:
      kind: of the state.
      updates: what stands in the gradients' place.
      state: what stands in the state's place.
      params: what stands in the params' place.
    """
    others = isinstance(updates, kind) or isinstance(params, kind)
    if others and not isinstance(state, kind):
        raise TypeError(
            "The arguments are swapped: call tx.update(grads, state, params)."
        )


def check_made_by_init(kind: type, state: Any, what: str) -> None:
    """Raises a ValueError where a state is another transformation's.

    Args:
      kind: of the state that init makes.
      state: what stands in the state's place.
      what: the transformation's name, for the message.
    """
    if not isinstance(state, kind):
        raise ValueError(
            f"{what}: the state is of type {type(state).__name__}, not "
            f"{kind.__name__}. Pass what this transformation's init returned; after "
            "changing the optimizer call init again."
        )


def update_inner(
    inner: optax.GradientTransformationExtraArgs,
    what: str,
    updates: Any,
    state: Any,
    params: Any,
    **extra_args: Any,
) -> tuple[Any, Any]:
    """``inner.update``, with an error that says so where the state is another's.

    Fields of one name let some transformations run on the state of others.
    """
    try:
        new_updates, new_state = inner.update(updates, state, params, **extra_args)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _check_inner_state(inner, what, state, updates, params, error)
        raise
    if jax.tree.structure(new_state) != jax.tree.structure(state):
        _check_inner_state(inner, what, state, updates, params)
    return new_updates, new_state


def _check_inner_state(
    inner: optax.GradientTransformation,
    what: str,
    state: Any,
    updates: Any,
    params: Any,
    error: Exception | None = None,
) -> None:
    like = updates if params is None else params
    try:
        expected = jax.eval_shape(lambda p: inner.init(p), like)
    except Exception:
        # Not made for these gradients, or not under a trace.
        return
    wanted, found = _classes(expected), _classes(state)
    if wanted != found:
        raise ValueError(
            f"{what}: the state is of {', '.join(found) or 'no optimizer'}, but this "
            f"transformation's has {', '.join(wanted) or 'nothing'}. Pass what its "
            "init returned; after changing the optimizer call init again."
        ) from error


def _classes(state: Any) -> list[str]:
    """The names of the NamedTuples in a state."""
    if _is_state(state):
        name = type(state).__name__
        return [name, *(x for field in state for x in _classes(field))]
    nodes = jax.tree.leaves(state, is_leaf=_is_state)
    return [x for node in nodes if _is_state(node) for x in _classes(node)]


def check_no_master_weights(inner_state: Any, what: str) -> None:
    """Raises a ValueError where master_weights is wrapped, at whatever depth.

    Its updates are whole params, and the params that it gets there are float32.
    """

    def is_master(node: Any) -> bool:
        # By name: the class is in a module that imports compress.
        name, module = type(node).__name__, type(node).__module__
        return name == "MasterWeightsState" and module.startswith("optax_flash.")

    if any(map(is_master, jax.tree.leaves(inner_state, is_leaf=is_master))):
        once = " Remove the outer one." if what == "master_weights" else ""
        raise ValueError(
            f"{what}: there is a master_weights inside of it, and that has to be the "
            f"outermost transformation, as in master_weights(compress(...)).{once}"
        )


def check_no_dtype(alias: str, name: str, dtype: Any, *fields: str) -> None:
    """Raises a ValueError where a dtype is asked for of what codes store.

    Args:
      alias: a function's name, for the message.
      name: the argument's.
      dtype: what was given; None asks for nothing.
      fields: of the state, which the argument is about in optax.
    """
    if dtype is None:
        return
    codecs = ", ".join(f'"{field}": None' for field in fields)
    raise ValueError(
        f"{alias}: {name} is {dtype!r}, but the momentum is stored in codes, and is "
        f"float32 while it is computed. Leave {name} out. codecs={{{codecs}}} stores "
        "the momentum in float32."
    )


def check_only(alias: str, name: str, given: Any, only: Any, advice: str) -> None:
    """Raises a ValueError where an argument has another than its only value."""
    if given is not only and given != only:
        raise ValueError(f"{alias}: {name} is {given!r}. {advice}.")


def check_params(params: Any, call: str) -> None:
    """Raises a TypeError where an optimizer state stands in the params' place."""
    if holds_state(params):
        raise TypeError(
            "The second argument is an optimizer state, and params are asked for: "
            f"call {call}."
        )


def check_function(function: Any, call: str) -> None:
    """Raises a TypeError where something else stands in a function's place."""
    if not callable(function):
        raise TypeError(
            f"{function!r} stands where a function should. The arguments may be "
            f"swapped: call {call}."
        )


def check_path(path: Any, call: str) -> None:
    """Raises a TypeError where something else stands in the place of a path."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"The first argument is of type {type(path).__name__}, not a path. "
            f"Call {call}."
        )


def check_step(step: Any, call: str) -> None:
    """Raises a TypeError where something else stands in the place of a step."""
    try:
        operator.index(step)
    except TypeError:
        raise TypeError(
            f"step is of type {type(step).__name__}, not a whole number. Call {call}."
        ) from None


def of_inner_state(state: Any, name: str) -> Any:
    """An attribute that a wrapping state lacks, as ``state.mu``: its inner state's.

    Found in the order of a chain, as in ``state.inner_state[0].mu``. Some code, such
    as ``optax.contrib.schedule_free_eval_params``, looks there.

    Raises:
      AttributeError: no state inside has a field of that name.
    """
    found = _field(state.inner_state, name)
    if found:
        return found[0]
    raise AttributeError(
        f"Neither {type(state).__name__} nor a state inside of it has a field {name!r}."
    )


def _field(state: Any, name: str) -> list[Any]:
    """The first field of that name among states in states, if there is one."""
    fields = getattr(type(state), "_fields", ())
    if name in fields:
        return [getattr(state, name)]
    if not isinstance(state, tuple):
        return []
    inner = [getattr(state, x) for x in fields if x == "inner_state"]
    return next(filter(None, (_field(x, name) for x in inner or state)), [])


def holds_state(tree: Any) -> bool:
    """Whether a tree has the state of a transformation in it, optax's or ours."""
    return any(map(_is_state, jax.tree.leaves(tree, is_leaf=_is_state)))


def _is_state(node: Any) -> bool:
    package = type(node).__module__.partition(".")[0]
    if package not in ("optax", "optax_flash") or not hasattr(node, "_fields"):
        return False
    # NamedTuples that are no states; params may have the last two in them.
    others = (
        optax.GradientTransformation,
        optax.GradientTransformationExtraArgs,
        optax.LookaheadParams,
        optax.MaskedNode,
    )
    return not isinstance(node, others)


def is_transformation(x: Any) -> bool:
    """Whether it has what an optax transformation has."""
    return all(callable(getattr(x, name, None)) for name in ("init", "update"))
