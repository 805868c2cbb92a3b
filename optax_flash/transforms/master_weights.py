"""``master_weights``: 16-bit params that act as 24- or 32-bit weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flash.codecs import hashing
from optax_flash.codecs import residual as residuals
from optax_flash.fusion import fuse, ops
from optax_flash.transforms import _arguments, _boxes, _dtypes, _frozen, _init, _mirror
from optax_flash.transforms._extra_args import with_extra_args
from optax_flash.transforms._stored import StateCodecs, Stored, known_to_flax
from optax_flash.transforms.finished import FinishedParam

PyTree = Any


@known_to_flax
class MasterWeightsState(NamedTuple):
    """State of :func:`master_weights`.

    Attributes:
      step: updates so far; decides the stochastic rounding. # shape=(), dtype=int32
      residual: mirrors the params. # shape of the param, uint8 (24 bits) or uint16 (32)
        for bfloat16 and float16 params; MaskedNode for others, and for frozen ones
      inner_state: the wrapped transformation's state.
      digest: one number for each param, by which :func:`changed_params` knows them.
        # shape=(params,), dtype=uint32; None unless asked for
      codecs: how each residual is stored. A part of the tree's structure: no array.
    """

    step: jax.typing.ArrayLike
    residual: PyTree
    inner_state: optax.OptState
    digest: jax.Array | None
    codecs: StateCodecs

    def __getattr__(self, name: str) -> Any:
        return _arguments.of_inner_state(self, name)


def master_weights(
    inner: optax.GradientTransformation,
    bits: int | None = None,
    *,
    codec: str | residuals.ResidualCodec = "exact",
    finished: bool = True,
    track_params: bool = False,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps 16-bit params as if they were 24- or 32-bit weights.

    Beside every bfloat16 or float16 param ``p`` the state holds a residual ``r``.
    Together they are a float32 weight ``w``, on which ``inner`` works:

    .. math::
      w = \mathrm{join}(p, r),\qquad
      w' = w + \mathrm{inner}(g, w),\qquad
      (p', r') = \mathrm{split}(w')

    The 24-bit weight is rounded stochastically, so steps far below its resolution are
    not lost. Params in other dtypes, 8-bit floats and whole numbers among them, get
    what ``optax.apply_updates`` makes of them, computed in float32 at least.

    A param that ``inner`` freezes with ``optax.set_to_zero`` (alone or under
    ``optax.partition``, ``optax.masked`` or ``optax.freeze``) has no residual. ``init``
    finds these params in the traced update, where theirs are constant zeros. A param
    that is frozen in another way, for example multiplied by a mask, keeps a residual
    that never changes. Where gradients are None or MaskedNode, params and their state
    stay as they are.

    This must be the outermost transformation: the residual belongs to the very param
    that ``optax.apply_updates`` will produce. So updates are *finished params* by
    default, :class:`FinishedParam` leaves from which ``optax.apply_updates`` takes the
    new param. Anything else that is done with them raises while it is traced, and says
    what to do: a transformation chained behind, a wrapper that computes with updates,
    ``lax.cond`` and ``lax.scan``, updates returned from a jitted function.

    Additive updates (``finished=False``) are arrays. Take them where code reads,
    selects or returns updates without changing them: ``optax.apply_if_finite`` or
    ``optax.MultiSteps`` around this transformation, statistics of updates, an update
    and its application in two jitted functions. Nothing checks what is done with them:
    scaled or clipped afterwards, they leave residuals that belong to other params, and
    training goes wrong in silence. In half precision the param can miss ``w'`` (when it
    shrinks by more than half in one step); the residual then makes up what it can, half
    a unit in the last place. Finished params never miss.

    If params are changed from outside between two steps, the new values count, plus
    the old residual: an error of at most half a unit in the last place of the param.
    Nothing else happens. :func:`set_master_params` sets both; ``track_params=True``
    with :func:`changed_params` notices.

    Args:
      inner: the transformation. It gets gradients and weights in float32.
      bits: 24 for an 8-bit residual, 32 for a 16-bit one, with which bfloat16 params
        lose nothing of a float32 weight. None for the codec's, and 24 for a name.
      codec: of residuals: ``"exact"``, ``"flashoptim"`` (the published format), or an
        :class:`ExactResidual` or :class:`FlashOptimResidual`.
      finished: False for additive updates instead of finished params.
      track_params: keep a digest of the params for :func:`changed_params`. Costs a
        reduction over the params each step, and a collective where they are sharded.
      implementation: as in :func:`compress`.

    Returns:
      A transformation with a :class:`MasterWeightsState`. Additive updates have the
      wider dtype of the gradient's and the param's.

    Raises:
      TypeError: finished params are used by anything except ``optax.apply_updates``.
      ValueError: bits other than 24 and 32, or than the codec's, an unknown codec, no
        params, a leaf that is no array or number, a tree or state that is not init's, a
        named implementation that does not fit. The message names the leaf.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> params = {"w": jnp.ones((2,), jnp.bfloat16)}
      >>> tx = optax_flash.master_weights(optax.sgd(1e-3), bits=32)
      >>> state = tx.init(params)
      >>> grads = {"w": jnp.ones((2,), jnp.bfloat16)}
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["w"]  # too small a step for bfloat16
      Array([1, 1], dtype=bfloat16)
      >>> optax_flash.master_params(state, params)["w"]
      Array([0.999, 0.999], dtype=float32)

    References:
      Weight splitting: FlashOptim (arXiv 2602.23349). Pieces of the float's own bits:
      "param remainders" of NVIDIA's TransformerEngine.
    """
    _arguments.check_transformation(inner, (bits,), "master_weights(inner, bits)")
    inner = with_extra_args(inner)
    residual_codec = residuals.get_residual_codec(codec, bits)
    fuse.check_implementation(implementation)

    def init(params: optax.Params) -> PyTree:
        _mirror.check_arrays(params, "master_weights")
        leaves = jax.tree.leaves(params)
        frozen = [False] * len(leaves)
        if any(map(residuals.is_split, leaves)):
            frozen = _frozen.frozen(inner, params)

        @_init.compiled
        def init_arrays(params: optax.Params) -> MasterWeightsState:
            leaves, structure = jax.tree.flatten(params)
            rows = zip(leaves, frozen, strict=True)
            inner_state = inner.init(jax.tree.map(_init.like_float32, params))
            _arguments.check_no_master_weights(inner_state, "master_weights")
            codecs = _codecs(residual_codec, params, frozen)
            return MasterWeightsState(
                step=jnp.zeros([], jnp.int32),
                residual=structure.unflatten(
                    [_zero_residual(residual_codec, *row) for row in rows]
                ),
                inner_state=inner_state,
                digest=_digest(params, codecs) if track_params else None,
                codecs=codecs,
            )

        state = init_arrays(params)
        if _mirror.is_placeholder(params):
            return state._replace(codecs=0)
        return state

    def update(
        updates: optax.Updates,
        state: PyTree,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PyTree]:
        _arguments.check_update(MasterWeightsState, updates, state, params)
        if params is None:
            raise ValueError(
                "master_weights: update needs the params, the residual is a part of "
                "them. Call update(grads, state, params)."
            )
        updates = _init.as_arrays(updates)
        given = _mirror.narrowed(params, updates)
        params = _init.as_arrays(given)
        _mirror.check_mirrors(params, updates, "master_weights: the gradients")
        _mirror.check_shapes(
            _mirror.without_examples(updates, params),
            params,
            "master_weights: the gradient",
        )
        _check_state(residual_codec, state, params)
        codecs = state.codecs
        state, widen = _mirror.narrow(state, updates)
        emit_params = finished and not fuse.is_dry()
        paths = _mirror.leaf_paths(updates)
        structure = jax.tree.structure(updates)

        def step_all(
            start: jax.Array,
            updates: optax.Updates,
            state: MasterWeightsState,
            params: optax.Params,
        ) -> tuple[optax.Updates, MasterWeightsState]:
            inner_updates, inner_state = _arguments.update_inner(
                inner,
                "master_weights",
                jax.tree.map(_init.like_float32, updates),
                state.inner_state,
                jax.tree.map(_init.like_float32, _join(params, state.residual)),
                **extra_args,
            )
            _mirror.check_shapes(inner_updates, params, "master_weights: the update")
            inner_state = _dtypes.kept(inner_state, state.inner_state)
            residuals, rebuild = _mirror.entries_and_rebuild(state.residual, updates)
            stepped = [
                _step_leaf(residual_codec, emit_params, start, *row)
                for row in zip(
                    paths,
                    structure.flatten_up_to(params),
                    residuals,
                    structure.flatten_up_to(inner_updates),
                    structure.flatten_up_to(updates),
                    strict=True,
                )
            ]
            new_updates, produced = (
                structure.unflatten([row[i] for row in stepped]) for i in range(2)
            )
            return new_updates, MasterWeightsState(
                step=optax.safe_increment(state.step),
                residual=rebuild([residual for _, _, residual in stepped]),
                inner_state=inner_state,
                digest=_new_digest(state.digest, codecs, produced)
                if track_params
                else None,
                codecs=codecs,
            )

        new_updates, new_state = fuse.run(
            step_all,
            updates,
            state,
            params,
            implementation=implementation,
            names=paths,
            in_place_of="params" if emit_params else "updates",
        )
        if emit_params:
            leaves = structure.flatten_up_to(new_updates)
            old = structure.flatten_up_to(given)
            new_updates = structure.unflatten(
                [FinishedParam(*x) for x in zip(leaves, paths, old, strict=True)]
            )
        return new_updates, widen(new_state)

    return _boxes.taken(optax.GradientTransformationExtraArgs(init, update))


def cast_params(
    params: optax.Params, dtype: jax.typing.DTypeLike, keep_float32: Any = None
) -> optax.Params:
    """Rounds float32 params to half precision, as :func:`master_weights` does.

    Args:
      params: float32 weights.
      dtype: bfloat16 or float16; float32 changes nothing.
      keep_float32: ``(path, param) -> bool`` for params that stay as they are; None
        for none. ``path`` is like ``"decoder/norm/scale"``.

    Returns:
      The params. ``set_master_params(state, params, weights)`` afterwards recovers the
      rest of the weights' bits.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> optax_flash.cast_params({"w": jnp.float32([1.001])}, jnp.bfloat16)
      {'w': Array([1], dtype=bfloat16)}
    """
    if isinstance(params, type | np.dtype | str):
        raise TypeError(
            f"The arguments are swapped: params is the dtype {params!r}. Call "
            "cast_params(params, dtype)."
        )
    dtype = np.dtype(dtype)

    def cast(path: str, p: jax.Array) -> jax.Array:
        is_float32 = getattr(p, "dtype", None) == jnp.float32
        stays = dtype not in residuals.SPLIT_DTYPES or not is_float32
        if stays or (keep_float32 and keep_float32(path, p)):
            return p
        return ops.Elementwise(_param_of, dtype, _cast)(p)[0]

    return _mirror.map_with_path(cast, params)


def master_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The float32 weights that params and residuals stand for.

    Args:
      state: a :class:`MasterWeightsState`, or any state that holds one.
      params: as they came from ``optax.apply_updates`` with the state's update.

    Returns:
      A tree like ``params``; float32 for half-precision params, others as they are.

    Raises:
      ValueError: the state holds no or several :class:`MasterWeightsState`, or the
        params are not those that it belongs to.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> params = {"w": jnp.ones((2,), jnp.bfloat16)}
      >>> state = optax_flash.master_weights(optax.sgd(0.1)).init(params)
      >>> optax_flash.master_params(state, params)
      {'w': Array([1., 1.], dtype=float32)}
    """
    _arguments.check_order(state, params, "master_params(state, params)")
    found, unboxed = map(_boxes.unboxed, (_find_state(state), params))
    _check_state(None, found, unboxed)
    return _boxes.like(_join(unboxed, found.residual), params)


def set_master_params(
    state: optax.OptState, params: optax.Params, new_weights: optax.Params
) -> optax.OptState:
    """A state whose residuals make the params stand for the given weights.

    To start from float32 weights without losing their lower bits, or after changing
    params from outside.

    Args:
      state: a :class:`MasterWeightsState`, or any state that holds one.
      params: the half-precision params, for example from :func:`cast_params`.
      new_weights: float32 weights that round to these params.

    Returns:
      The state, with new residuals rounded to nearest.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> weights = {"w": jnp.float32([1.001])}
      >>> params = optax_flash.cast_params(weights, jnp.bfloat16)
      >>> state = optax_flash.master_weights(optax.sgd(0.1), bits=32).init(params)
      >>> state = optax_flash.set_master_params(state, params, weights)
      >>> optax_flash.master_params(state, params)
      {'w': Array([1.001], dtype=float32)}
    """
    call = "set_master_params(state, params, new_weights)"
    for other in (params, new_weights):
        _arguments.check_order(state, other, call)
    if _any_split(new_weights) and not _any_split(params):
        raise TypeError(
            "The arguments are swapped: params are float32, and new_weights are in "
            f"half precision. Call {call}."
        )
    boxed = _find_state(state)
    old, params, new_weights = map(_boxes.unboxed, (boxed, params, new_weights))
    _check_state(None, old, params)
    known, widen = _mirror.narrow(old, params)
    structure = jax.tree.structure(params)
    residuals, rebuild = _mirror.entries_and_rebuild(known.residual, params)
    rows = zip(
        structure.flatten_up_to(new_weights),
        jax.tree.leaves(params),
        residuals,
        strict=True,
    )
    residual = rebuild([_residual_leaf(*row) for row in rows])
    digest = old.digest
    if digest is not None:
        digest = _new_digest(digest, old.codecs, params)
    new = widen(known._replace(residual=residual, digest=digest))
    new = _boxes.like(new, boxed)
    return jax.tree.map(
        lambda node: new if node is boxed else node,
        state,
        is_leaf=lambda node: node is boxed,
    )


def changed_params(state: optax.OptState, params: optax.Params) -> list[str]:
    """Paths of the params that are not those that the last update made.

    Needs ``master_weights(track_params=True)``. Compares one number for each param; a
    change goes unnoticed with a probability of 2**-32.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
      >>> tx = optax_flash.master_weights(optax.sgd(0.1), track_params=True)
      >>> state = tx.init(params)
      >>> optax_flash.changed_params(state, params | {"b": 2 * params["b"]})
      ['b']
    """
    _arguments.check_order(state, params, "changed_params(state, params)")
    found, params = map(_boxes.unboxed, (_find_state(state), params))
    if found.digest is None:
        raise ValueError(
            "changed_params: the state has no digest. Make the transformation with "
            "master_weights(..., track_params=True)."
        )
    _check_state(None, found, params)
    known = [i for i, _ in _tracked(params, found.codecs)]
    changed = (
        np.asarray(_digest(params, found.codecs)) != np.asarray(found.digest)[known]
    )
    tracked = [found.codecs.tracked[i] for i in known]
    return [path for path, differs in zip(tracked, changed, strict=True) if differs]


def _any_split(params: PyTree) -> bool:
    return any(
        hasattr(p, "dtype") and residuals.is_split(p) for p in jax.tree.leaves(params)
    )


def _join(params: PyTree, residual: PyTree) -> PyTree:
    """The float32 weights of all params."""
    leaves, structure = jax.tree.flatten(params)
    entries = _mirror.entries(_mirror.narrowed(residual, params), params)
    rows = zip(leaves, entries, strict=True)
    return structure.unflatten([_join_leaf(*row) for row in rows])


def _join_leaf(param: Any, residual: Any) -> Any:
    if not residuals.is_split(param):
        return param
    if not hasattr(residual, "dtype"):
        return _init.like_float32(param)
    (weight,) = ops.Elementwise(_join_arrays, None, _join_smoothly)(param, residual)
    return weight


def _join_arrays(
    static: None, param: jax.Array, residual: jax.Array
) -> tuple[jax.Array]:
    del static
    return (residuals.codec_of(residual).join(param, residual),)


def _join_smoothly(
    static: None, param: jax.Array, residual: jax.Array
) -> tuple[jax.Array]:
    del static, residual
    return (param.astype(jnp.float32),)


def _residual_leaf(weight: Any, param: Any, residual: Any) -> Any:
    if not residuals.is_split(param) or not hasattr(residual, "dtype"):
        return residual
    return _residual_array(weight, param, residual)


@jax.jit
def _residual_array(
    weight: jax.Array, param: jax.Array, residual: jax.Array
) -> jax.Array:
    weight = weight.astype(jnp.float32)
    return residuals.codec_of(residual).residual(weight, param)


def _param_of(dtype: np.dtype, weight: jax.Array) -> tuple[jax.Array]:
    return (residuals.ExactResidual(bits=32).split(weight, dtype)[0],)


def _step_leaf(
    codec: residuals.ResidualCodec,
    finished: bool,
    start: jax.Array,
    path: str,
    param: Any,
    residual: Any,
    update: Any,
    grad: Any,
) -> tuple[Any, Any, Any]:
    """One param's step.

    Args:
      codec: the residual's.
      finished: whether to return the new param in the place of the update.
      start: what rounding depends on, beside the path and the place in the leaf.
      param: may be None, as for ``optax.apply_updates``, which leaves it so.
      residual: None or MaskedNode where the param is frozen. It then is updated as
        params in float32 are.
      update: what the wrapped transformation adds to the weight. # float32
      grad: tells the dtype of an additive update, with the param.

    Returns:
      ``(update, param, residual)``, the param being what ``optax.apply_updates`` will
      make of the update.
    """
    dtype = _dtypes.wider(grad, param)
    if not residuals.is_split(param) or not hasattr(residual, "dtype"):
        if not finished and jnp.issubdtype(grad.dtype, jnp.inexact):
            (update,) = ops.Elementwise(_as_dtype, dtype, _cast)(update)
        new = _applied(param, update)
        return new if finished else update, new, residual
    salt = hashing.salt(path)
    if finished:
        step = ops.Round(_finish, codec, param.shape, _finish_smoothly)
        new, residual = step(start, salt, param, residual, update)
        return new, new, residual
    step = ops.Round(_add, (codec, dtype), param.shape, _add_smoothly)
    update, new, residual = step(start, salt, param, residual, update)
    return update, new, residual


def _applied(param: Any, update: Any) -> Any:
    """What ``optax.apply_updates`` makes of a param, computed in float32 at least."""
    # Gradients of whole numbers have no values, and neither do their updates.
    if param is None or update.dtype == jax.dtypes.float0:
        return param
    new = _init.like_float32(param) + _init.like_float32(update)
    return new.astype(param.dtype)


def _finish(
    codec: residuals.ResidualCodec,
    bits: jax.Array,
    param: jax.Array,
    residual: jax.Array,
    update: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """``(param, residual)`` after an update."""
    weight = codec.join(param, residual) + update.astype(jnp.float32)
    return codec.split(weight, param.dtype, bits)


def _finish_smoothly(
    codec: residuals.ResidualCodec,
    param: jax.Array,
    residual: jax.Array,
    update: jax.Array,
) -> tuple[jax.Array, None]:
    del codec, residual
    new = param.astype(jnp.float32) + update.astype(jnp.float32)
    return new.astype(param.dtype), None


def _add(
    codec_and_dtype: tuple[residuals.ResidualCodec, np.dtype],
    bits: jax.Array,
    param: jax.Array,
    residual: jax.Array,
    update: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The update in its dtype, the param that it will produce, and its residual."""
    codec, dtype = codec_and_dtype
    weight = codec.join(param, residual) + update.astype(jnp.float32)
    target, _ = codec.split(weight, param.dtype, bits)
    old = residuals.widened(param)
    update = _rounded(residuals.widened(target) - old, dtype)
    produced = residuals.round_to(old + update, param.dtype)
    return update.astype(dtype), produced, codec.residual(weight, produced, bits)


def _add_smoothly(
    codec_and_dtype: tuple[residuals.ResidualCodec, np.dtype],
    param: jax.Array,
    residual: jax.Array,
    update: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    codec, dtype = codec_and_dtype
    new, _ = _finish_smoothly(codec, param, residual, update)
    return update.astype(dtype), new, None


def _as_dtype(dtype: np.dtype, update: jax.Array) -> tuple[jax.Array]:
    return (_rounded(update, dtype).astype(dtype),)


def _cast(dtype: np.dtype, x: jax.Array) -> tuple[jax.Array]:
    return (x.astype(dtype),)


def _rounded(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """A float32 array rounded to the values of ``dtype``.

    In integers: XLA may leave out a rounding between two casts, and an update that
    leaves the compiled function would then not be the one computed with.
    """
    if dtype not in residuals.SPLIT_DTYPES:
        return x
    return residuals.rounded(x, dtype).astype(x.dtype)


def _zero_residual(
    codec: residuals.ResidualCodec, param: jax.Array, frozen: bool
) -> Any:
    if not residuals.is_split(param) or frozen:
        return optax.MaskedNode()
    return jnp.full_like(param, codec.zero(param.dtype), dtype=codec.dtype)


def _codecs(
    codec: residuals.ResidualCodec, params: PyTree, frozen: list[bool]
) -> StateCodecs:
    """How the params' residuals are stored, and which params a digest is of."""
    rows = zip(_mirror.leaf_paths(params), jax.tree.leaves(params), frozen, strict=True)
    moving = [(path, p) for path, p, is_frozen in rows if not is_frozen]
    split = [(path, p) for path, p in moving if residuals.is_split(p)]
    return StateCodecs(
        tuple(
            Stored(path, "residual", codec, p.shape, codec.dtype, i)
            for i, (path, p) in enumerate(split)
        ),
        tracked=tuple(path for path, _ in moving),
    )


def _tracked(params: PyTree, codecs: StateCodecs) -> list[tuple[int, Any]]:
    """Places in the digest, and the params that they are of.

    Args:
      params: may lack some of those that the state is of.
      codecs: of the state.
    """
    places = {path: i for i, path in enumerate(codecs.tracked)}
    rows = zip(_mirror.leaf_paths(params), jax.tree.leaves(params), strict=True)
    return [(places[path], p) for path, p in rows if path in places]


def _new_digest(
    old: jax.Array | None, codecs: StateCodecs, params: PyTree
) -> jax.Array | None:
    """The digest of a state, of which some params have changed.

    Args:
      old: the state's digest; None where it has none yet.
      codecs: of the state.
      params: may lack some of those that the state is of.
    """
    new = _digest(params, codecs)
    places = [i for i, _ in _tracked(params, codecs)]
    if len(places) == len(codecs.tracked):
        return new
    return None if old is None else old.at[np.array(places, np.int32)].set(new)


def _digest(params: optax.Params, codecs: StateCodecs) -> jax.Array:
    """A number for each param that depends on all its bits and their places.

    Frozen params, which have no residual, have none here.
    """

    def digest(p: jax.Array) -> jax.Array:
        if isinstance(p, jax.ShapeDtypeStruct):
            return jnp.zeros([], jnp.uint32)
        return hashing.digest(p)

    leaves = [digest(p) for _, p in _tracked(params, codecs)]
    return jnp.stack(leaves) if leaves else jnp.zeros([0], jnp.uint32)


def _find_state(state: optax.OptState) -> MasterWeightsState:
    found = _mirror.nodes(state, MasterWeightsState)
    if len(found) != 1:
        raise ValueError(
            f"The state holds {len(found)} MasterWeightsStates, not one. Wrap the "
            "whole transformation in optax_flash.master_weights, once."
        )
    return found[0]


def _check_state(
    codec: residuals.ResidualCodec | None, state: MasterWeightsState, params: PyTree
) -> None:
    """Raises where state and params do not belong together; names the leaf."""
    _arguments.check_made_by_init(MasterWeightsState, state, "master_weights")
    residual = _mirror.narrowed(state.residual, params)
    _mirror.check_mirrors(residual, params, "master_weights: the params")
    triples = zip(
        _mirror.leaf_paths(params),
        jax.tree.leaves(params),
        _mirror.entries(residual, params),
        strict=True,
    )
    for path, p, r in triples:
        if not residuals.is_split(p):
            continue
        if not hasattr(r, "dtype"):
            if path in state.codecs.tracked:
                raise ValueError(
                    f"master_weights: {path!r} is {p.dtype}{list(p.shape)}, but the "
                    "state has no residual for it: init saw another dtype. Pass the "
                    "params that the state was made for, or call init again."
                )
            continue
        if r.shape != p.shape:
            raise ValueError(
                f"master_weights: {path!r} has shape {list(p.shape)}, but init saw "
                f"{list(r.shape)}. Pass the params that the state was made for; after "
                "changing the model call init again."
            )
        dtype = residuals.codec_of(r).dtype if codec is None else codec.dtype
        if r.dtype != dtype:
            raise ValueError(
                f"master_weights: {path!r} is {p.dtype}{list(p.shape)}, which takes a "
                f"residual {dtype}{list(p.shape)}, but the state has {r.dtype}"
                f"{list(r.shape)}. The state was made for other params, bits or "
                "another codec: pass those, or call init again."
            )
