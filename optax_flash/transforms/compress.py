"""``compress``: any optax transformation, its state stored in codes."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flash.fusion import ops, run
from optax_flash.numerics import hashing
from optax_flash.numerics.codecs import Codec
from optax_flash.transforms import _feedback, _init, _mirror, _records
from optax_flash.transforms._rules import Codecs, Field, Rules, coded_shape

PyTree = Any


class CompressState(NamedTuple):
    """State of :func:`compress`.

    Attributes:
      step: updates so far; decides the stochastic rounding. # shape=(), dtype=int32
      inner_state: the wrapped transformation's own state. In a compressed leaf's
        place are its codes. # uint8, shape of the leaf; with 4 bits (*rows, n / 2)
      scales: for each compressed field, as ``"mu_scales"``, a tree that mirrors the
        params. # shape=(*rows, groups), the codec's scale dtype. A leaf that is not
        compressed has ``(*rows, 1)`` zeros here, so that every param has an array.
    """

    step: jax.typing.ArrayLike
    inner_state: optax.OptState
    scales: dict[str, PyTree]


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
    ``sum_of_squares`` and other second moments are not. Fields that nobody knows and
    arrays under ``min_size`` elements stay as they are. So do arrays that are not
    shaped like their param, such as low-rank factors, unless ``codecs`` names their
    field. Global shapes decide, so sharding does not change the numbers. The state of
    complex params and of whole numbers is left as it is, too.

    Params may have leaves that gradients lack, such as the functions of an Equinox
    module. Where gradients are None or MaskedNode, the state does not change.

    With error feedback, what rounding adds to a momentum :math:`m` is taken off the
    update at once, with all that it will do to later ones:

    .. math::
      u_t \leftarrow u_t - \frac{\partial u_t / \partial m_{t-1}}
        {1 - \partial m_t / \partial m_{t-1}}
        \left(\mathrm{decode}(c_t) - m_t\right)

    A single update is less exact then, and the sum of updates far more exact: errors of
    rounding no longer add up in the params. The derivatives are those of an element by
    itself; where an update does not depend on a momentum element by element, as Muon's
    and Lion's do not, nothing is taken off.

    Args:
      inner: the transformation, for example ``optax.adamw(1e-3)``. It sees params and
        gradients in float32 where they come in half precision.
      codecs: None for :class:`Companded8`; a codec or its name (``"companded4"`` for 4
        bits) for all fields; or a mapping. Its keys are field names (``"nu"``, also of
        fields that are not known) or patterns of ``"param/path/field"`` with wildcards
        (``"*embed*"``, ``"layers/0/*/mu"``); its values are codecs, names, or None for
        "leave it". The first key that fits decides.
      min_size: arrays with fewer elements are not compressed. (Nor are, in 4 bits,
        factors with rows of odd length: their codes would not tell their shape.)
      error_feedback: whether updates make up for the rounding of momenta; None for
        those in 4 bits.
      implementation: ``"xla"``, ``"pallas"`` or ``"triton"`` runs every leaf so, or
        raises; None takes the best that fits, see :func:`optax_flash.explain`.

    Returns:
      A transformation with a :class:`CompressState`. Updates have the dtype of the
      gradients.

    Raises:
      ValueError: an unknown codec name or a field that the state does not have; a
        leaf of the params that is no array or number; gradients or a state of another
        structure or format than init made; a named implementation that does not fit.
        The message names the leaf.

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
    inner = optax.with_extra_args_support(inner)
    rules = Rules.parse(codecs, min_size)
    run.check_implementation(implementation)

    def init(params: optax.Params) -> PyTree:
        _mirror.check_arrays(params, "compress")
        params = _init.as_arrays(params)
        rules.check_fields(inner, params)
        if _records.is_uncompressed():
            return inner.init(jax.tree.map(_init.like_float32, params))
        if _records.active():
            _record(rules, inner, params)
        return _records.with_config(init_arrays(params), params, rules)

    @_init.compiled
    def init_arrays(params: optax.Params) -> CompressState:
        inner_state = inner.init(jax.tree.map(_init.like_float32, params))
        inner_state = _init.not_constant(inner_state)
        return encode_state(rules, inner_state, params)

    def update(
        updates: optax.Updates,
        state: PyTree,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PyTree]:
        if not isinstance(state, CompressState):
            raise ValueError(
                f"compress: the state is a {type(state).__name__}, not a "
                "CompressState. Pass what this transformation's init returned."
            )
        updates = _init.as_arrays(updates)
        params = _init.as_arrays(_mirror.narrowed(params, updates))
        state, widen = _mirror.narrow(state, updates)
        paths = _mirror.leaf_paths(updates)

        def step(
            start: jax.Array,
            updates: optax.Updates,
            state: PyTree,
            params: optax.Params | None,
        ) -> tuple[optax.Updates, PyTree]:
            shapes = _shapes(updates, params)
            inner_state, bundles = _decode(rules, state, updates, paths, shapes)

            def inner_update(inner_state: PyTree) -> tuple[PyTree, PyTree]:
                return inner.update(
                    jax.tree.map(_init.like_float32, updates),
                    inner_state,
                    jax.tree.map(_init.like_float32, params),
                    **extra_args,
                )

            momenta = _momenta(bundles, error_feedback)
            new_updates, inner_state, gains = _feedback.with_gains(
                inner_update, inner_state, momenta
            )
            new_state, corrections = _encode(
                rules, bundles, gains, inner_state, updates, start, state
            )
            new_updates = _corrected(new_updates, corrections)
            return jax.tree.map(_init.like_grad, new_updates, updates), new_state

        new_updates, new_state = run.run(
            step, updates, state, params, implementation=implementation, names=paths
        )
        return new_updates, widen(new_state)

    return optax.GradientTransformationExtraArgs(init, update)


def encode_state(rules: Rules, inner_state: PyTree, params: PyTree) -> CompressState:
    """A state at step 0 that stands for an inner state, rounded to nearest.

    Args:
      rules: of the transformation.
      inner_state: the wrapped transformation's, in float32.
      params: anything that has their paths and shapes.
    """
    parts, join = _mirror.split_state(inner_state, params)
    fields = rules.fields(parts)
    codecs = _codecs_at_init(rules, inner_state, params)
    scales = {}
    for field, column in zip(fields, codecs, strict=True):
        entries, of_field = list(parts[field.part].entries), []
        for i, codec in enumerate(column):
            if codec is None:
                of_field.append(_init.stub(entries[i], jnp.bfloat16))
            else:
                entries[i], scale = _encode_to_nearest(codec, entries[i])
                of_field.append(scale)
        parts[field.part] = parts[field.part].rebuild(entries)
        scales[field.key] = jax.tree.structure(params).unflatten(of_field)
    return CompressState(
        step=jnp.zeros([], jnp.int32), inner_state=join(_trees(parts)), scales=scales
    )


def decode_state(rules: Rules, state: CompressState, params: PyTree) -> PyTree:
    """The inner state that a state stands for, in float32.

    Args:
      rules: of the transformation that the state is of.
      state: its codes.
      params: anything that has their paths and shapes.

    Raises:
      ValueError: the state is not of these rules or params.
    """
    parts, join = _checked_parts(rules, state, params)
    paths, shapes = _mirror.leaf_paths(params), _shapes(params)
    for field in rules.fields(parts):
        entries = list(parts[field.part].entries)
        scales = _mirror.entries(state.scales[field.key], params)
        for i, row in enumerate(zip(paths, shapes, entries, scales, strict=True)):
            stored = _stored(rules, field, *row)
            if stored is not None:
                entries[i] = _decode_array(*stored, entries[i], scales[i])
        parts[field.part] = parts[field.part].rebuild(entries)
    return join(_trees(parts))


class InCodes(NamedTuple):
    """A leaf of a state that is stored in codes.

    Attributes:
      name: the param's path and the field, such as ``"decoder/kernel/mu"``.
      shape: of the array that the codes stand for.
      codec: the codec.
      codes: what the state holds in the array's place.
      scales: theirs.
    """

    name: str
    shape: tuple[int, ...]
    codec: Codec
    codes: jax.Array
    scales: jax.Array


def in_codes(rules: Rules, state: CompressState, params: PyTree) -> Iterator[InCodes]:
    """The leaves of a state that are in codes.

    Args:
      rules: of the transformation that the state is of.
      state: may lack params that were masked.
      params: anything that has their paths and shapes, such as gradients.

    Raises:
      ValueError: the state is not of these rules or params.
    """
    parts, _ = _checked_parts(rules, state, params)
    paths, shapes = _mirror.leaf_paths(params), _shapes(params)
    for field in rules.fields(parts):
        scales = _mirror.entries(state.scales[field.key], params)
        rows = zip(paths, shapes, parts[field.part].entries, scales, strict=True)
        for path, shape, x, scale in rows:
            stored = _stored(rules, field, path, shape, x, scale)
            if stored is not None:
                codec, shape = stored
                yield InCodes(f"{path}/{field.name}", shape, codec, x, scale)


class _Bundle(NamedTuple):
    """Entries of one param that are decoded, and encoded, by one op.

    Attributes:
      name: the random bits depend on it.
      param: its index.
      fields: the indices of the entries' fields.
      codecs: of each field.
      shape: of each entry.
      arrays: the entries, decoded.
    """

    name: str
    param: int
    fields: tuple[int, ...]
    codecs: tuple[Codec, ...]
    shape: tuple[int, ...]
    arrays: tuple[jax.Array, ...] = ()


def _codecs_at_init(
    rules: Rules, inner_state: PyTree, params: PyTree
) -> list[list[Codec | None]]:
    """For each field, the codec of each param's entry; None leaves it as it is."""
    parts, _ = _mirror.split_state(inner_state, params)
    paths, shapes = _mirror.leaf_paths(params), _shapes(params)
    return [
        [
            rules.codec_at_init(field, path, shape, x)
            for path, shape, x in zip(
                paths, shapes, parts[field.part].entries, strict=True
            )
        ]
        for field in rules.fields(parts)
    ]


def _momenta(
    bundles: list[_Bundle], error_feedback: bool | None
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


def _corrected(updates: PyTree, corrections: dict[int, jax.Array]) -> PyTree:
    """Updates, by param, with corrections added."""
    if not corrections:
        return updates
    leaves, treedef = jax.tree.flatten(updates)
    for i, x in corrections.items():
        leaves[i] = leaves[i] + x
    return treedef.unflatten(leaves)


def _encode(
    rules: Rules,
    bundles: list[_Bundle],
    gains: dict[int, dict[int, jax.Array]],
    inner_state: PyTree,
    params: PyTree,
    start: jax.Array,
    old: CompressState,
) -> tuple[CompressState, dict[int, jax.Array]]:
    """The state after a step, its arrays in codes again; and, by param, what makes up
    for that in the update."""
    parts, join = _mirror.split_state(inner_state, params)
    fields = rules.fields(parts)
    structure = jax.tree.structure(params)
    values = [list(parts[field.part].entries) for field in fields]
    scales = [structure.flatten_up_to(old.scales[field.key]) for field in fields]
    corrections: dict[int, jax.Array] = {}
    for name, i, of_param, codecs, shape, _ in bundles:
        arrays = [values[j][i] for j in of_param]
        fed = tuple(n for n, j in enumerate(of_param) if i in gains.get(j, ()))
        encoded = ops.Encode(codecs, shape, fed)(start, hashing.salt(name), *arrays)
        for n, j in enumerate(of_param):
            values[j][i], scales[j][i] = encoded[n], encoded[n + len(of_param)]
        for n, error in zip(fed, encoded[2 * len(of_param) :], strict=True):
            correction = gains[of_param[n]][i] * error
            known = corrections.get(i)
            corrections[i] = correction if known is None else known + correction
    for field, entries in zip(fields, values, strict=True):
        parts[field.part] = parts[field.part].rebuild(entries)
    state = CompressState(
        step=optax.safe_increment(old.step),
        inner_state=join(_trees(parts)),
        scales={
            field.key: structure.unflatten(entries)
            for field, entries in zip(fields, scales, strict=True)
        },
    )
    return state, corrections


def _shapes(updates: PyTree, params: PyTree = None) -> list[tuple[int, ...] | None]:
    """The shape of each leaf; None for one that is not real floating.

    The state of such a leaf is not put in codes. Gradients of whole numbers may be
    floating, so where there are params they must be, too.
    """
    leaves, structure = jax.tree.flatten(updates)
    alike = structure == jax.tree.structure(params)
    rows = zip(leaves, jax.tree.leaves(params) if alike else leaves, strict=True)
    return [
        x.shape if _mirror.is_real(x) and _mirror.is_real(p) else None for x, p in rows
    ]


def _decode(
    rules: Rules,
    state: CompressState,
    updates: optax.Updates,
    paths: list[str],
    shapes: list[tuple[int, ...] | None],
) -> tuple[PyTree, list[_Bundle]]:
    """The state that ``inner`` knows; and what of it is stored in codes."""
    parts, join = _checked_parts(rules, state, updates)
    fields = rules.fields(parts)
    structure = jax.tree.structure(updates)
    values = [list(parts[field.part].entries) for field in fields]
    scales = [structure.flatten_up_to(state.scales[field.key]) for field in fields]
    stored = [
        [
            _stored(rules, field, path, shape, x, scale)
            for path, shape, x, scale in zip(paths, shapes, *columns, strict=True)
        ]
        for field, *columns in zip(fields, values, scales, strict=True)
    ]
    bundles = _bundles(stored, fields, paths, shapes)
    for k, (_, i, of_param, codecs, shape, _) in enumerate(bundles):
        codes = [columns[j][i] for columns in (values, scales) for j in of_param]
        arrays = ops.Decode(codecs, shape)(*codes)
        bundles[k] = bundles[k]._replace(arrays=tuple(arrays))
        for j, x in zip(of_param, arrays, strict=True):
            values[j][i] = x
    for field, entries in zip(fields, values, strict=True):
        parts[field.part] = parts[field.part].rebuild(entries)
    return join(_trees(parts)), bundles


def _checked_parts(rules: Rules, state: CompressState, updates: optax.Updates) -> Any:
    """The parts of the state's inner state, if it is one for these updates."""
    for scales in state.scales.values():
        _mirror.check_mirrors(scales, updates, "compress: the gradients")
    parts, join = _mirror.split_state(state.inner_state, updates)
    keys = {field.key for field in rules.fields(parts)}
    if keys != set(state.scales):
        raise ValueError(
            f"compress: the state has {sorted(state.scales)}, but these codecs store "
            f"{sorted(keys)}. The state was made with other codecs: pass those to "
            "compress, or call init again."
        )
    return parts, join


class _Stored(NamedTuple):
    """An entry in codes: by which codec, and the shape of the array they stand for."""

    codec: Codec
    shape: tuple[int, ...]


def _stored(
    rules: Rules,
    field: Field,
    path: str,
    shape: tuple[int, ...] | None,
    x: Any,
    scale: Any,
) -> _Stored | None:
    """How the state holds an entry of a param of ``shape``, checked against the rules.

    None where it holds the array itself, or nothing.
    """
    if not hasattr(x, "dtype") or shape is None:
        return None
    codec = rules.codec(field, path)
    if x.dtype != jnp.uint8:
        # Inside shard_map shapes are local, so a large array may look small, never the
        # other way round.
        if rules.codec_at_init(field, path, shape, x) is None:
            return None
    elif codec is not None:
        found = coded_shape(codec, x.shape, shape)
        if (
            (found == shape or field.factors)
            and scale.shape == codec.scales_shape(found)
            and scale.dtype == codec.scale_dtype
        ):
            return _Stored(codec, found)
    raise ValueError(
        f"compress: '{path}/{field.name}' is stored as {x.dtype}{list(x.shape)} with "
        f"scales {scale.dtype}{list(scale.shape)}, but a param of shape {list(shape)} "
        f"under {codec!r} is not. The state was made with other codecs, another "
        "min_size or other shapes: pass those to compress, or call init again."
    )


def _bundles(
    stored: list[list[_Stored | None]],
    fields: list[Field],
    paths: list[str],
    shapes: list[tuple[int, ...] | None],
) -> list[_Bundle]:
    """All entries in codes: a param's, if shaped like it, together; others alone."""
    bundles = []
    for i, of_param in enumerate(zip(*stored, strict=True)):
        present = [(j, *entry) for j, entry in enumerate(of_param) if entry]
        own = shapes[i]
        alike = [(j, codec) for j, codec, shape in present if shape == own]
        if alike and own is not None:
            js, codecs = zip(*alike, strict=True)
            bundles.append(_Bundle(paths[i], i, js, codecs, own))
        for j, codec, shape in present:
            if shape != own:
                name = f"{paths[i]}/{fields[j].name}"
                bundles.append(_Bundle(name, i, (j,), (codec,), shape))
    return bundles


@functools.partial(jax.jit, static_argnums=0)
def _encode_to_nearest(codec: Codec, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return codec.encode(x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_array(
    codec: Codec, shape: tuple[int, ...], codes: jax.Array, scales: jax.Array
) -> jax.Array:
    return codec.decode(codes, scales, shape)


def _trees(parts: list[Any]) -> list[Any]:
    return [part.tree if isinstance(part, _mirror.Mirror) else part for part in parts]


def _record(rules: Rules, inner: optax.GradientTransformation, params: PyTree) -> None:
    """Notes how each leaf is stored, for reports and checkpoint formats."""
    state = jax.eval_shape(inner.init, jax.tree.map(_init.like_float32, params))
    parts, _ = _mirror.split_state(state, params)
    codecs = _codecs_at_init(rules, state, params)
    paths = _mirror.leaf_paths(params)
    for field, column in zip(rules.fields(parts), codecs, strict=True):
        entries = parts[field.part].entries
        for path, x, codec in zip(paths, entries, column, strict=True):
            if codec is not None:
                scales = math.prod(codec.scales_shape(x.shape))
                _records.add(
                    _records.Record(
                        path=path,
                        field=field.name,
                        codec=repr(codec),
                        shape=x.shape,
                        group=codec.group,
                        code_bytes=math.prod(codec.codes_shape(x.shape)),
                        scale_bytes=scales * jnp.dtype(codec.scale_dtype).itemsize,
                    )
                )
