"""Conversion of running states: from plain optax into codes, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flash.codecs.residual import SPLIT_DTYPES
from optax_flash.io import formats
from optax_flash.transforms import _arguments, _boxes, _init, _inside, _mirror
from optax_flash.transforms import compress as compression
from optax_flash.transforms.compress import CompressState
from optax_flash.transforms.master_weights import (
    MasterWeightsState,
    cast_params,
    master_params,
    set_master_params,
)

PyTree = Any


def to_optax_state(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> tuple[optax.Params, optax.OptState]:
    """Float32 weights and the state of plain optax, to go on without this library.

    The state is that of the same transformation with :func:`compress` and
    :func:`master_weights` taken away: for ``master_weights(chain(clip, adamw8(...)))``
    that of ``chain(clip, optax.adamw(...))``.

    Args:
      tx: the transformation that the state is of.
      state: its state. # arrays, sharded as they may be
      params: as ``tx.update`` takes them.

    Returns:
      ``(weights, optax_state)``, in float32: exactly what codes and residuals stand
      for. The weights have None in place of the functions of an Equinox module.

    Raises:
      ValueError: the state is not of ``tx`` and ``params``; the message names the leaf.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> tx = optax_flash.master_weights(optax_flash.adamw8(1e-3))
      >>> params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
      >>> weights, state = optax_flash.to_optax_state(tx, tx.init(params), params)
      >>> updates, state = optax.adamw(1e-3).update(weights, state, weights)
      >>> optax.tree.get(state, "mu")["w"].dtype
      dtype('float32')
    """
    call = "to_optax_state(tx, state, params)"
    _arguments.check_transformation(tx, (state, params), call)
    _arguments.check_order(state, params, call)
    params = _init.as_arrays(_mirror.arrays_of(params))
    expected = jax.eval_shape(lambda p: tx.init(p), params)
    _check_state(expected, _without_carried(state), "The state")
    if _mirror.nodes(state, MasterWeightsState):
        params = master_params(state, params)
    plain = _boxes.as_stock(decoded(_boxes.unboxed(state)), params)
    return jax.tree.map(_init.like_float32, params), plain


def decoded(state: optax.OptState) -> optax.OptState:
    """The state of plain optax that a state stands for, from what it says itself."""

    def plain(node: Any) -> Any:
        if isinstance(node, MasterWeightsState):
            return decoded(node.inner_state)
        return decoded(compression.decoded(node))

    return _inside.map_ours(plain, state)


def from_optax_state(
    tx: optax.GradientTransformation,
    optax_state: optax.OptState,
    weights: optax.Params,
    like: optax.Params | None = None,
) -> tuple[optax.Params, optax.OptState]:
    """Params and the state in codes, to go on with a run of plain optax.

    The inverse of :func:`to_optax_state`, but that codes and residuals are rounded to
    nearest. (So are moments that were in codes before, where their group's scale moves.
    Weights that came from params and residuals stay what they were.)

    Args:
      tx: the transformation to go on with; without :func:`compress` and
        :func:`master_weights` it must be the one that made the state.
      optax_state: the state of plain optax.
      weights: its params. # float32
      like: params in the dtypes to keep them in, such as ``TrainState.params`` or what
        :func:`cast_params` returns; values do not matter. None: as they are. Half
        precision without :func:`master_weights` in ``tx`` loses the lower bits.

    Returns:
      ``(params, state)``.

    Raises:
      ValueError: the state is not what ``tx`` would have in plain optax; the message
        names the first leaf.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> weights = {"w": jnp.full((64, 64), 1.001)}
      >>> state = optax.adamw(1e-3).init(weights)  # and many steps later
      >>> tx = optax_flash.master_weights(optax_flash.adamw8(1e-3))
      >>> params, state = optax_flash.from_optax_state(
      ...     tx, state, weights, like=optax_flash.cast_params(weights, jnp.bfloat16)
      ... )
      >>> params["w"].dtype, optax.tree.get(state, "mu")["w"].dtype
      (dtype(bfloat16), dtype('uint8'))
    """
    call = "from_optax_state(tx, optax_state, weights, like)"
    _arguments.check_transformation(tx, (optax_state, weights), call)
    _arguments.check_order(optax_state, weights, call)
    params = weights = _init.as_arrays(_mirror.arrays_of(weights))
    if like is not None:
        like = _init.as_arrays(_mirror.arrays_of(like))
        params = jax.tree.map(_like, weights, like)
    state = tx.init(params)
    unboxed, optax_state = _boxes.unboxed(state), _boxes.unboxed(optax_state)
    plain = jax.eval_shape(decoded, unboxed)
    _check_state(plain, optax_state, "The optax state")
    optax_state = jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), optax_state, plain)
    state = _boxes.like(_encoded(unboxed, optax_state), state)
    if _mirror.nodes(state, MasterWeightsState):
        state = set_master_params(state, params, weights)
    return params, state


def _like(weight: jax.Array, param: Any) -> Any:
    """A weight in the dtype of a param."""
    if param.dtype in SPLIT_DTYPES:
        return cast_params(weight, param.dtype)
    # A float32 weight of a float32 param stays, and 8-bit floats have no residual.
    narrow = param.dtype.itemsize == 1 and jnp.issubdtype(param.dtype, jnp.floating)
    return weight.astype(param.dtype) if narrow else weight


def _encoded(new: PyTree, plain: PyTree) -> PyTree:
    """A new state, which stands for the state of plain optax instead."""
    nodes, structure = jax.tree.flatten(new, is_leaf=_inside.is_ours)
    parts = structure.flatten_up_to(plain)
    for i, node in enumerate(nodes):
        if not _inside.is_ours(node):
            continue
        inner = _encoded(node.inner_state, parts[i])
        parts[i] = (
            compression.encoded(node, inner)
            if isinstance(node, CompressState)
            else node._replace(inner_state=inner)
        )
    return structure.unflatten(parts)


def _without_carried(state: PyTree) -> PyTree:
    """The state without what carries derivatives, which no init makes."""
    return _inside.map_compressed(lambda x: x._replace(carried=None), state)


def _check_state(expected: PyTree, found: PyTree, what: str) -> None:
    """Raises where a state has other leaves, shapes or nodes than it should."""
    expected, found = _boxes.unboxed(expected), _boxes.unboxed(found)
    formats.check_leaves(_by_path(found), _by_path(expected), what)
    if jax.tree.structure(found) != jax.tree.structure(expected):
        raise ValueError(
            f"{what} is {jax.tree.structure(found)}, not "
            f"{jax.tree.structure(expected)}. It has the right leaves in other nodes, "
            "as after reading a file: put them into the state of a new init."
        )


def _by_path(tree: PyTree) -> dict[str, str]:
    leaves = formats.named_leaves(tree)
    return {path: f"an array {list(jnp.shape(x))}" for path, x in leaves.items()}
