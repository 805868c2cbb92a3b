"""``compress``: any optax transformation, its state stored in codes."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flash.codecs import hashing
from optax_flash.codecs.base import Codec
from optax_flash.fusion import error_feedback as feedbacks
from optax_flash.fusion import fuse, ops, rounding
from optax_flash.lowrank import _factors
from optax_flash.transforms import (
    _arguments,
    _boxes,
    _carried,
    _dtypes,
    _entries,
    _init,
    _mirror,
)
from optax_flash.transforms._entries import Bundle
from optax_flash.transforms._extra_args import with_extra_args
from optax_flash.transforms._rules import FACTOR_FIELDS, Codecs, Rules
from optax_flash.transforms._stored import StateCodecs, Stored, known_to_flax

PyTree = Any


@known_to_flax
class CompressState(NamedTuple):
    """State of :func:`compress`.

    Attributes:
      step: updates so far; decides the stochastic rounding. # shape=(), dtype=int32
      inner_state: the wrapped transformation's own state. In a compressed leaf's
        place are its codes. # uint8, shape of the leaf; with 4 bits (*rows, n / 2)
      scales: for each compressed field, as ``"mu_scales"``, a tree that mirrors the
        params. # shape=(*rows, groups), the codec's scale dtype; MaskedNode for a leaf
        that is not compressed
      codecs: how each compressed leaf is stored. A part of the tree's structure, like
        the fields' names: no array.
      carried: None, except where derivatives go through updates. Then for each
        compressed field, as ``"mu_carried"``, a tree that mirrors the params, of zeros
        whose derivatives are those of the arrays in codes; None for a leaf that is not
        compressed. # shape of the leaf, float32
    """

    step: jax.typing.ArrayLike
    inner_state: optax.OptState
    scales: dict[str, PyTree]
    codecs: StateCodecs
    carried: dict[str, PyTree] | None = None

    def __getattr__(self, name: str) -> Any:
        return _arguments.of_inner_state(self, name)


def compress(
    inner: optax.GradientTransformation,
    codecs: Codecs = None,
    min_size: int = 4096,
    *,
    error_feedback: bool | None = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stores the state of any transformation in codes of 8 or 4 bits.

    Each update decodes the state, lets ``inner`` compute in float32, and encodes what
    it returns:

    .. math::
      u_t, s_t = \mathrm{inner}(g_t, \mathrm{decode}(c_{t-1})),\qquad
      c_t = \mathrm{encode}(s_t)

    Found are the parts of the state that mirror the params. Field names choose the
    codec: ``mu``, ``trace``, ``m`` and other momenta are signed; ``nu``, ``v``,
    ``sum_of_squares`` and other second moments of optax's state classes are not. In
    other classes such a name may be a velocity's, and ``codecs`` has to name the field.
    Unknown fields and arrays under ``min_size`` elements stay as they are. So do arrays
    that are not shaped like their param, such as low-rank factors, unless ``codecs``
    names their field. The state of complex params and of whole numbers is left as it
    is, too.

    Global shapes decide, so sharding does not change the numbers. Inside of your own
    ``shard_map`` shapes are those of a shard, and each shard draws the same noise.

    Params may have leaves that gradients lack, such as the functions of an Equinox
    module. Where gradients are None or MaskedNode, the state does not change.

    With error feedback, the update is corrected at once for the rounding error of a
    momentum :math:`m`, including its effect on all later updates:

    .. math::
      u_t \leftarrow u_t - \frac{\partial u_{t+1} / \partial m_t}
        {1 - \partial m_{t+1} / \partial m_t}
        \left(\mathrm{decode}(c_t) - m_t\right)

    A single update is less exact then, and the sum of updates far more exact: rounding
    errors do not accumulate in the params. The momentum is rounded to nearest, and
    corrections are bounded by the gradient's own effect and the group's largest update.
    Derivatives are those of an element by itself; where an update does not depend on a
    momentum element by element, as Muon's and Lion's do not, it is not corrected.

    Args:
      inner: the transformation, for example ``optax.adamw(1e-3)``. It sees params and
        gradients in float32 where they come in half precision.
      codecs: None for :class:`Companded8`; a codec or its name (``"companded4"`` for 4
        bits) for all fields; or a mapping. Its keys are field names (``"nu"``, also of
        fields that are not known) or patterns of ``"param/path/field"`` with wildcards
        (``"*embed*"``, ``"layers/0/*/mu"``); its values are codecs, names, or None for
        "leave it". The first key that fits decides. A field of a class that is not
        optax's has the sign of the codec under its own name: a codec's name means
        signed, ``Companded8(signed=False)`` unsigned. Patterns never choose a sign.
      min_size: arrays with fewer elements are not compressed. (Nor are, in 4 bits,
        factors with rows of odd length: their codes would not tell their shape.)
      error_feedback: whether updates make up for the rounding of momenta; None for
        those in 4 bits.
      implementation: ``"xla"``, ``"pallas"`` or ``"triton"`` runs every leaf so, or
        raises; None takes the best that fits, see :func:`optax_flash.explain`.

    Returns:
      A transformation with a :class:`CompressState`. Updates have the wider dtype of
      the gradient's and the param's, or the gradient's where ``update`` gets no params.

    Raises:
      ValueError: an unknown codec name; a key of ``codecs`` that fits no field or
        path; a field whose sign is not known; an ``inner`` that is compressed already,
        or has a :func:`master_weights` in it;
        a leaf of the params that is no array or number; gradients or a state of another
        structure, shape or format than init made; a named implementation that does not
        fit. The message names the leaf.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     optax_flash.compress(optax.nadamw(1e-3), codecs={"mu": "affine8"}),
      ... )
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "nu")["kernel"].dtype
      dtype('uint8')
      >>> updates, state = tx.update(params, state, params)

    References:
      Compressing a state that stays outside the mathematics is the idea of
      bitsandbytes (arXiv 2110.02861) and FlashOptim (arXiv 2602.23349); error feedback
      that of 1-bit SGD (Seide et al., 2014), which keeps errors in an array of its own.
    """
    _arguments.check_transformation(inner, (codecs,), "compress(inner, codecs)")
    inner = with_extra_args(inner)
    rules = Rules.parse(codecs, min_size)
    fuse.check_implementation(implementation)

    def init(params: optax.Params) -> PyTree:
        _mirror.check_arrays(params, "compress")
        state = init_arrays(params)
        if _mirror.is_placeholder(params):
            # Which params have scales is not known, so none of them are the params'.
            return state._replace(scales=0, codecs=0)
        return state

    @_init.compiled
    def init_arrays(params: optax.Params) -> CompressState:
        inner_state = inner.init(jax.tree.map(_init.like_float32, params))
        _check_compressed_once(inner_state)
        _arguments.check_no_master_weights(inner_state, "compress")
        rules.check(inner_state, params)
        inner_state = _init.not_constant(inner_state)
        return _new_state(rules, inner_state, params)

    def update(
        updates: optax.Updates,
        state: PyTree,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PyTree]:
        _arguments.check_update(CompressState, updates, state, params)
        _arguments.check_made_by_init(CompressState, state, "compress")
        updates = _init.as_arrays(updates)
        params = _init.as_arrays(_mirror.narrowed(params, updates))
        if params is not None:
            shapes = _mirror.without_examples(updates, params)
            _mirror.check_shapes(shapes, params, "compress: the gradient")
        state, widen = _mirror.narrow(state, updates)
        paths = _mirror.leaf_paths(updates)

        def step(
            start: jax.Array,
            updates: optax.Updates,
            state: PyTree,
            params: optax.Params | None,
        ) -> tuple[optax.Updates, PyTree]:
            shapes = _entries.shapes(updates, params)
            inner_state, bundles = _decode(rules, state, updates, paths, shapes)

            def inner_update(inner_state: PyTree) -> tuple[PyTree, PyTree]:
                try:
                    new_updates, new_state = _arguments.update_inner(
                        inner,
                        "compress",
                        jax.tree.map(_init.like_float32, updates),
                        inner_state,
                        jax.tree.map(_init.like_float32, params),
                        **extra_args,
                    )
                except (TypeError, ValueError) as error:
                    _explain(error, rules, inner_state, updates)
                    raise
                return new_updates, _dtypes.kept(new_state, inner_state)

            momenta = _momenta(bundles, error_feedback)
            carries = state.carried is not None or fuse.is_differentiated()
            zero = rounding.zero_of(state.step)
            new_updates, inner_state, feedback = feedbacks.with_feedback(
                inner_update, inner_state, momenta, zero, carries
            )
            new_state, stored, momenta = _encode(
                rules,
                bundles,
                feedback,
                inner_state,
                new_updates,
                start,
                state,
                zero,
                carries,
            )
            if params is not None:
                _mirror.check_shapes(new_updates, params, "compress: the update")
            new_updates = rounding.apart(
                lambda: _corrected(new_updates, feedback.gains(stored), momenta, zero),
                zero,
            )()
            return _dtypes.cast_updates(new_updates, updates, params), new_state

        new_updates, new_state = fuse.run(
            step, updates, state, params, implementation=implementation, names=paths
        )
        if state.carried is None:
            # What begins to be carried here has no column to be put into.
            carried = new_state.carried
            widened = widen(new_state._replace(carried=None))
            return new_updates, widened._replace(carried=carried)
        return new_updates, widen(new_state)

    return _boxes.taken(optax.GradientTransformationExtraArgs(init, update))


def _check_compressed_once(inner_state: PyTree) -> None:
    if _mirror.nodes(inner_state, CompressState):
        raise ValueError(
            "compress: the state would be compressed twice. A transformation inside "
            "is compressed already, as adamw8 and the other aliases are. Remove the "
            "outer compress and give its arguments to the inner one, or wrap stock "
            "optax alone, as in compress(optax.adamw(1e-3), codecs=...)."
        )


def _new_state(rules: Rules, inner_state: PyTree, params: PyTree) -> CompressState:
    """A state at step 0 that stands for an inner state, rounded to nearest.

    Args:
      rules: of the transformation.
      inner_state: the wrapped transformation's.
      params: anything that has their paths and shapes.
    """
    columns = _entries.Columns.of(rules, inner_state, params)
    paths, shapes = _mirror.leaf_paths(params), _entries.shapes(params)
    structure = jax.tree.structure(params)
    # Which leaf of the inner state each entry is, from the leaves' numbers.
    leaves, treedef = jax.tree.flatten(inner_state)
    numbered = treedef.unflatten(map(_numbered, leaves, range(len(leaves))))
    numbers, _ = _mirror.split_state(numbered, params)
    scales, stored = {}, {}
    for field, entries in zip(columns.fields, columns.values, strict=True):
        of_field = [optax.MaskedNode()] * len(entries)
        stored[field.key] = []
        for i, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
            x = entries[i]
            codec = rules.codec_at_init(field, path, shape, x)
            if codec is None:
                continue
            entries[i], of_field[i] = _encode_to_nearest(codec, x)
            at = numbers[field.part].entries[i].at
            owner = columns.parts[field.part].owner
            factor = _factors.is_factor(field.kind, owner, x.shape, shape)
            stored[field.key].append(
                Stored(path, field.name, codec, x.shape, np.dtype(x.dtype), at, factor)
            )
        scales[field.key] = structure.unflatten(of_field)
    return CompressState(
        step=jnp.zeros([], jnp.int32),
        inner_state=columns.joined(columns.values),
        scales=scales,
        # As jax.tree.leaves has the scales.
        codecs=StateCodecs(tuple(x for key in sorted(stored) for x in stored[key])),
    )


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """An array's shape and dtype, and its place among the leaves of its tree."""

    shape: tuple[int, ...]
    dtype: Any
    at: int


def _numbered(x: Any, at: int) -> Any:
    return _Numbered(x.shape, x.dtype, at) if hasattr(x, "dtype") else x


def encoded(state: CompressState, inner_state: PyTree) -> CompressState:
    """A state at step 0 that stands for another inner state, rounded to nearest.

    Args:
      state: its codecs are used, and its structure.
      inner_state: the wrapped transformation's, as ``state`` decodes.
    """
    leaves, structure = jax.tree.flatten(inner_state)
    scales = []
    for entry in state.codecs.leaves:
        codes, scale = _encode_to_nearest(entry.codec, leaves[entry.at])
        leaves[entry.at] = codes
        scales.append(scale)
    return CompressState(
        step=jnp.zeros([], jnp.int32),
        inner_state=structure.unflatten(leaves),
        scales=jax.tree.structure(state.scales).unflatten(scales),
        codecs=state.codecs,
    )


def decoded(state: CompressState) -> PyTree:
    """The inner state that a state stands for."""
    leaves, structure = jax.tree.flatten(state.inner_state)
    carried = _carried.leaves(state)
    for entry, x in zip(_entries.entries(state), carried, strict=True):
        array = _dtypes.as_dtype(entry.decoded(), entry.dtype)
        leaves[entry.at] = _carried.with_derivative(array, x)
    return structure.unflatten(leaves)


def _momenta(
    bundles: list[Bundle], error_feedback: bool | None
) -> dict[int, dict[int, jax.Array]]:
    """Of each field, by param, the arrays whose rounding errors updates make up for."""
    momenta: dict[int, dict[int, jax.Array]] = {}
    for bundle in bundles:
        rows = zip(bundle.fields, bundle.codecs, bundle.arrays, strict=True)
        for field, codec, x in rows:
            wanted = codec.bits < 8 if error_feedback is None else error_feedback
            if codec.signed and wanted:
                momenta.setdefault(field, {})[bundle.param] = x
    return momenta


class _Rounded(NamedTuple):
    """A momentum with error feedback, after a step.

    Attributes:
      codec: which rounded it.
      error: what that added to it.
    """

    codec: Codec
    error: jax.Array


AT_MOST = 2.0
"""How many of its group's largest updates an update with its correction may be.

Second moments in codes make updates up to 1.6 times those of float32 (Adam, normal
gradients). With a higher bound first steps exceed three times; with a lower one the
errors of small elements are not made up for, and add up.
"""


def _corrected(
    updates: PyTree,
    gains: dict[int, dict[int, feedbacks.Gain]],
    momenta: dict[int, dict[int, _Rounded]],
    zero: jax.Array,
) -> PyTree:
    """Updates that make up for rounding errors of momenta, by field and param.

    Corrections are exact where gains are the same for all elements. Others are
    estimates: with them an update is at most twice as large as the largest one of its
    group without. ``zero`` is that of :func:`rounding.zero_of`.
    """
    leaves, treedef = jax.tree.flatten(updates)
    exact: dict[int, Any] = {}
    estimated: dict[int, tuple[Codec, Any]] = {}
    for field, of_field in gains.items():
        for i, gain in of_field.items():
            codec, error = momenta[field][i]
            correction = gain.value * error
            if gain.uniform:
                exact[i] = exact.get(i, 0.0) + correction
            else:
                codec, before = estimated.get(i, (codec, 0.0))
                estimated[i] = codec, before + correction
    for i, (codec, correction) in estimated.items():
        update = rounding.alone(leaves[i], zero)
        (leaves[i],) = ops.Within(AT_MOST, codec.group)(update + correction, update)
    for i, correction in exact.items():
        leaves[i] = rounding.alone(leaves[i], zero) + correction
    return treedef.unflatten(leaves)


def _encode(
    rules: Rules,
    bundles: list[Bundle],
    feedback: feedbacks.Feedback,
    inner_state: PyTree,
    updates: PyTree,
    start: jax.Array,
    old: CompressState,
    zero: jax.Array,
    carries: bool,
) -> tuple[CompressState, PyTree, dict[int, dict[int, _Rounded]]]:
    """The state after a step, its arrays in codes again.

    Returns:
      The state; the inner state that it stands for, as far as feedback asks; and the
      momenta with feedback, by field and param.
    """
    columns = _entries.Columns.of(rules, inner_state, updates)
    fields, values = columns.fields, columns.values
    leaves, structure = jax.tree.flatten(updates)
    decoded = [list(column) for column in values]
    scales, rebuild = _entries.scales_of(old, fields, updates)
    carried: list[list[Any]] = [[None] * len(column) for column in values]
    momenta: dict[int, dict[int, _Rounded]] = {}
    most_of = rounding.apart(_most, zero)
    for name, i, of_param, codecs, shape, _, old_arrays in bundles:
        arrays = [_dtypes.as_dtype(values[j][i], np.float32) for j in of_param]
        fed = [n for n, j in enumerate(of_param) if i in feedback.fed.get(j, ())]
        told = range(len(of_param)) if feedback.looks_ahead(i) else fed
        most = [
            most_of(arrays[n], old_arrays[n], leaves[i], feedback.fed[of_param[n]][i])
            for n in fed
        ]
        op = ops.Encode(codecs, shape, tuple(told), tuple(fed), carries)
        encoded = op(start, hashing.salt(name), *arrays, *most)
        for n, j in enumerate(of_param):
            carried[j][i] = _carried.derivative_of(arrays[n]) if carries else None
            values[j][i], scales[j][i] = encoded[n], encoded[n + len(of_param)]
        for n, error in zip(told, encoded[2 * len(of_param) :], strict=True):
            j = of_param[n]
            decoded[j][i] = arrays[n] + error
            if n in fed:
                momenta.setdefault(j, {})[i] = _Rounded(codecs[n], error)
    state = CompressState(
        step=optax.safe_increment(old.step),
        inner_state=columns.joined(values),
        scales={
            field.key: rebuilt(entries)
            for field, entries, rebuilt in zip(fields, scales, rebuild, strict=True)
        },
        codecs=old.codecs,
        carried={
            _carried.key_of(field): structure.unflatten(entries)
            for field, entries in zip(fields, carried, strict=True)
        }
        if carries
        else None,
    )
    return state, columns.joined(decoded), momenta


def _most(
    momentum: jax.Array, old: jax.Array, update: jax.Array, gain: jax.Array
) -> jax.Array:
    """The largest magnitude of a momentum whose correction keeps the update's sign.

    No less than the magnitude it had, as then the correction gives back what the
    momentum lost; and no less than what the rounding of its scale may add.
    """
    size = jnp.abs(momentum)
    sign = jnp.sign(momentum)
    more = -update * sign / jnp.where(gain == 0.0, 1.0, gain)
    limit = jnp.maximum(size + more, jnp.maximum(size, old * sign) * np.float32(1.01))
    # Otherwise a correction has the update's sign.
    return jnp.where(more > 0.0, limit, jnp.inf)


def _decode(
    rules: Rules,
    state: CompressState,
    updates: optax.Updates,
    paths: list[str],
    shapes: list[tuple[int, ...] | None],
) -> tuple[PyTree, list[Bundle]]:
    """The state that ``inner`` knows; and what of it is stored in codes."""
    columns = _checked_columns(rules, state, updates)
    fields, values = columns.fields, columns.values
    structure = jax.tree.structure(updates)
    scales, _ = _entries.scales_of(state, fields, updates)
    carried = [_carried.column(state, field, structure) for field in fields]
    stored = [
        [
            _entries.stored_as(rules, state.codecs, field, path, shape, x, scale)
            for path, shape, x, scale in zip(paths, shapes, *of_field, strict=True)
        ]
        for field, *of_field in zip(fields, values, scales, strict=True)
    ]
    bundles = _entries.bundles(stored, fields, paths, shapes)
    for k, (_, i, of_param, codecs, shape, dtypes, _) in enumerate(bundles):
        codes = [rows[j][i] for rows in (values, scales) for j in of_param]
        arrays = [
            _dtypes.as_dtype(_carried.with_derivative(x, carried[j][i]), dtype)
            for j, x, dtype in zip(
                of_param, ops.Decode(codecs, shape)(*codes), dtypes, strict=True
            )
        ]
        bundles[k] = bundles[k]._replace(arrays=tuple(arrays))
        for j, x in zip(of_param, arrays, strict=True):
            values[j][i] = x
    return columns.joined(values), bundles


def _checked_columns(
    rules: Rules, state: CompressState, updates: optax.Updates
) -> _entries.Columns:
    """The columns of the state's inner state, if it is one for these updates."""
    for scales in state.scales.values():
        _mirror.check_mirrors(scales, updates, "compress: the gradients")
    columns = _entries.Columns.of(rules, state.inner_state, updates)
    keys = {field.key for field in columns.fields}
    if keys != set(state.scales):
        raise ValueError(
            f"compress: the state has {sorted(state.scales)}, but these codecs store "
            f"{sorted(keys)}. The state was made with other codecs: pass those to "
            "compress, or call init again."
        )
    return columns


def _explain(
    error: Exception, rules: Rules, inner_state: PyTree, updates: optax.Updates
) -> None:
    """Raises where gradients and a decoded state cannot be combined by element."""
    if "shape" not in str(error):
        return
    columns = _entries.Columns.of(rules, inner_state, updates)
    paths, leaves = _mirror.leaf_paths(updates), jax.tree.leaves(updates)
    for field, entries in zip(columns.fields, columns.values, strict=True):
        if field.kind in FACTOR_FIELDS:
            continue
        rows = zip(paths, leaves, entries, strict=True)
        for path, u, x in rows:
            try:
                jnp.broadcast_shapes(jnp.shape(u), getattr(x, "shape", ()))
            except ValueError:
                raise _entries.other_shape(path, u.shape, field, x.shape) from error


@functools.partial(jax.jit, static_argnums=0)
def _encode_to_nearest(codec: Codec, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return codec.encode(x)
