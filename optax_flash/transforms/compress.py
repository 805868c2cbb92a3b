"""``compress``: any optax transformation, its state stored in codes."""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flash.numerics import hashing
from optax_flash.numerics.codecs import Codec, Companded8, get_codec
from optax_flash.transforms import _init, _mirror, _records

PyTree = Any
Codecs = str | Codec | Mapping[str, str | Codec | None] | None

SIGNED_FIELDS = frozenset(
    {"mu", "trace", "m", "m1", "m2", "momentum", "ema", "exp_avg"}
)
UNSIGNED_FIELDS = frozenset(
    {"nu", "nu_max", "v", "sum_of_squares", "exp_avg_sq", "e_g", "e_x"}
)
FIELDS_BY_STATE: Mapping[str, Mapping[str, bool | None]] = MappingProxyType(
    {
        # Adan's v averages differences of gradients; its second moment is n.
        "ScaleByAdanState": {"m": True, "v": True, "n": False, "g": True},
        # A Hessian's diagonal may be negative.
        "SophiaState": {"mu": True, "nu": True},
        # sqrt(nu - mu**2): the smallest error in either turns it into a NaN.
        "ScaleByRStdDevState": {"mu": None, "nu": None},
        "ScaleByRStdDevWithCountState": {"mu": None, "nu": None},
    }
)
"""State classes whose fields mean something else: signed, unsigned, or left alone."""


class CompressState(NamedTuple):
    """State of :func:`compress`.

    Attributes:
      step: updates so far; decides the stochastic rounding. # shape=(), dtype=int32
      inner_state: the wrapped transformation's own state. In a compressed leaf's
        place are its codes. # uint8, shape of the param (8-bit codecs)
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
) -> optax.GradientTransformationExtraArgs:
    r"""Stores the state of any transformation in 8-bit codes.

    Each update decodes the state, lets ``inner`` compute in float32, and encodes what
    it returns:

    .. math::
      u_t, s_t = \mathrm{inner}(g_t, \mathrm{decode}(c_{t-1})),\qquad
      c_t = \mathrm{encode}(s_t)

    Found are the parts of the state that mirror the params. Field names choose the
    codec: ``mu``, ``trace``, ``m`` and other momenta are signed; ``nu``, ``v``,
    ``sum_of_squares`` and other second moments are not. Fields that nobody knows,
    leaves under ``min_size`` elements and leaves whose shape is not their param's stay
    as they are. Global shapes decide, so sharding does not change the numbers.

    Args:
      inner: the transformation, for example ``optax.adamw(1e-3)``. It sees params and
        gradients in float32 where they come in half precision.
      codecs: None for :class:`Companded8`; a codec or its name for all fields; or a
        mapping. Its keys are field names (``"nu"``, also of fields that are not known)
        or patterns of ``"param/path/field"`` with wildcards (``"*embed*"``,
        ``"layers/0/*/mu"``); its values are codecs, names, or None for "leave it". The
        first key that fits decides.
      min_size: leaves with fewer elements are not compressed.

    Returns:
      A transformation with a :class:`CompressState`. Updates have the dtype of the
      gradients.

    Raises:
      ValueError: an unknown codec name or a field that the state does not have; a
        param that is not floating; gradients or a state of another structure or
        format than init made. The message names the leaf.

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
      bitsandbytes (arXiv 2110.02861) and FlashOptim (arXiv 2602.23349).
    """
    inner = optax.with_extra_args_support(inner)
    rules = _Rules.parse(codecs, min_size)

    def init(params: optax.Params) -> CompressState:
        _mirror.check_floating(params, "compress")
        rules.check_fields(inner, params)
        if _records.is_uncompressed():
            return inner.init(jax.tree.map(_init.like_float32, params))
        if _records.active():
            _record(rules, inner, params)
        return init_arrays(params)

    @_init.compiled
    def init_arrays(params: optax.Params) -> CompressState:
        inner_state = inner.init(jax.tree.map(_init.like_float32, params))
        parts, _ = _mirror.split_state(inner_state, params)
        codecs = {
            field.key: [
                field.codec_at_init(leaf, rules.min_size) for leaf in field.leaves
            ]
            for field in _fields(rules, parts, params)
        }
        return _encode(rules, codecs, inner_state, params, jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: CompressState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CompressState]:
        inner_state, codecs = _decode(rules, state, updates)
        new_updates, inner_state = inner.update(
            jax.tree.map(_init.like_float32, updates),
            inner_state,
            jax.tree.map(_init.like_float32, params),
            **extra_args,
        )
        new_updates = jax.tree.map(lambda u, g: u.astype(g.dtype), new_updates, updates)
        step = optax.safe_increment(state.step)
        state = _encode(rules, codecs, inner_state, updates, step, state.scales)
        return new_updates, state

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class _Rules:
    """Which codec a leaf of the state gets, from names and shapes alone."""

    patterns: tuple[tuple[str, Codec | None], ...]
    min_size: int

    @classmethod
    def parse(cls, codecs: Codecs, min_size: int) -> "_Rules":
        if codecs is None:
            codecs = Companded8()
        if isinstance(codecs, str | Codec):
            codecs = {"*": codecs}
        if not isinstance(codecs, Mapping):
            raise ValueError(
                f"compress: codecs must be a codec, a name or a mapping: {codecs!r}."
            )
        patterns = {
            key: None if codec is None else get_codec(codec)
            for key, codec in codecs.items()
        }
        return cls(tuple(patterns.items()), min_size)

    def signed(self, mirror: _mirror.Mirror) -> bool | None:
        """Whether a field is signed; None for fields that stay as they are."""
        known = self._known(mirror)
        for key, codec in self.patterns:
            if key == mirror.name:
                if codec is None:
                    return None
                return codec.signed if known is None else known
        return known

    def codec(self, name: str, path: str, signed: bool) -> Codec | None:
        """The codec for one param's entry in a field; None leaves it as it is."""
        for key, codec in (*self.patterns, ("*", Companded8())):
            if key == name or (
                _is_pattern(key) and fnmatch.fnmatchcase(f"{path}/{name}", key)
            ):
                return codec and dataclasses.replace(codec, signed=signed)
        raise AssertionError("the last pattern fits everything")

    def check_fields(self, inner: optax.GradientTransformation, params: PyTree) -> None:
        """Raises where a key of ``codecs`` names a field that is not there."""
        wanted = [key for key, _ in self.patterns if not _is_pattern(key)]
        if not wanted:
            return
        state = jax.eval_shape(lambda p: inner.init(p), params)
        parts, _ = _mirror.split_state(state, params)
        found = {part.name for part in parts if isinstance(part, _mirror.Mirror)}
        for key in wanted:
            if key not in found:
                raise ValueError(
                    f"compress: codecs has the key {key!r}, but the state's fields are "
                    f"{sorted(found)}. For a param write a pattern, as in '*{key}*'."
                )

    @staticmethod
    def _known(mirror: _mirror.Mirror) -> bool | None:
        by_state = FIELDS_BY_STATE.get(mirror.owner)
        if by_state is not None:
            return by_state.get(mirror.name)
        if mirror.name in SIGNED_FIELDS:
            return True
        return False if mirror.name in UNSIGNED_FIELDS else None


def _is_pattern(key: str) -> bool:
    return any(character in key for character in "*?[/")


class _Leaf(NamedTuple):
    """One param's entry in a field of the state."""

    name: str  # "path/of/the/param/field"
    value: Any  # an array; or MaskedNode or None, where the state has nothing
    codec: Codec | None
    shape: tuple[int, ...]  # of the param


class _Field(NamedTuple):
    """A field of the state that holds a tree to compress."""

    part: int  # its index among the state's parts
    key: str  # its key among the scales
    leaves: list[_Leaf]  # in the order of the params

    def codec_at_init(self, leaf: _Leaf, min_size: int) -> Codec | None:
        size = math.prod(leaf.shape)
        if size == 0 or size < min_size or not _is_float(leaf.value):
            return None
        return leaf.codec if leaf.value.shape == leaf.shape else None


def _fields(rules: _Rules, parts: list[Any], params: PyTree) -> list[_Field]:
    """The fields to compress, each with a leaf for every param."""
    structure = jax.tree.structure(params)
    paths = _mirror.leaf_paths(params)
    shapes = [p.shape for p in jax.tree.leaves(params)]
    fields: list[_Field] = []
    occurrences: dict[str, int] = {}
    for index, part in enumerate(parts):
        if not isinstance(part, _mirror.Mirror):
            continue
        signed = rules.signed(part)
        if signed is None:
            continue
        occurrence = occurrences[part.name] = occurrences.get(part.name, -1) + 1
        key = part.name + (f"_{occurrence}" if occurrence else "") + "_scales"
        leaves = [
            _Leaf(f"{path}/{part.name}", x, rules.codec(part.name, path, signed), shape)
            for path, x, shape in zip(
                paths, structure.flatten_up_to(part.tree), shapes, strict=True
            )
        ]
        fields.append(_Field(index, key, leaves))
    return fields


def _encode(
    rules: _Rules,
    codecs: dict[str, list[Codec | None]],
    inner_state: PyTree,
    params: PyTree,
    step: jax.Array,
    old_scales: dict[str, PyTree] | None = None,
) -> CompressState:
    """Puts codes in the place of a state's arrays, and their scales beside them."""
    parts, join = _mirror.split_state(inner_state, params)
    structure = jax.tree.structure(params)
    scales = {}
    for field in _fields(rules, parts, params):
        if old_scales is None:
            old = [None] * len(field.leaves)
        else:
            old = structure.flatten_up_to(old_scales[field.key])
        pairs = []
        for leaf, codec, stub in zip(field.leaves, codecs[field.key], old, strict=True):
            if codec is None:
                pairs.append(
                    (
                        leaf.value,
                        _init.stub(leaf.value, jnp.bfloat16) if stub is None else stub,
                    )
                )
            else:
                # At init values are exact, or may as well be rounded to nearest.
                counter = None if old_scales is None else step
                salt = hashing.salt(f"{leaf.name}/{field.key}")
                pairs.append(_encode_leaf(codec, leaf.value, counter, salt))
        parts[field.part] = structure.unflatten([codes for codes, _ in pairs])
        scales[field.key] = structure.unflatten([scale for _, scale in pairs])
    trees = [part.tree if isinstance(part, _mirror.Mirror) else part for part in parts]
    return CompressState(step, join(trees), scales)


def _decode(
    rules: _Rules, state: CompressState, updates: optax.Updates
) -> tuple[PyTree, dict[str, list[Codec | None]]]:
    """The state that ``inner`` knows, and the codec that each leaf came in."""
    if not isinstance(state, CompressState):
        raise ValueError(
            f"compress: the state is a {type(state).__name__}, not a CompressState. "
            "Pass what this transformation's init returned."
        )
    for scales in state.scales.values():
        _mirror.check_mirrors(scales, updates, "compress: the gradients")
    parts, join = _mirror.split_state(state.inner_state, updates)
    structure = jax.tree.structure(updates)
    fields = _fields(rules, parts, updates)
    if {field.key for field in fields} != set(state.scales):
        raise ValueError(
            f"compress: the state has {sorted(state.scales)}, but these codecs store "
            f"{sorted(field.key for field in fields)}. The state was made with other "
            "codecs: pass those to compress, or call init again."
        )
    codecs = {}
    for field in fields:
        scales = structure.flatten_up_to(state.scales[field.key])
        pairs = zip(field.leaves, scales, strict=True)
        used = [_codec_of_state(leaf, scale, rules.min_size) for leaf, scale in pairs]
        codecs[field.key] = used
        values = [
            leaf.value
            if codec is None
            else _decode_leaf(codec, leaf.value, scale, leaf.shape)
            for leaf, scale, codec in zip(field.leaves, scales, used, strict=True)
        ]
        parts[field.part] = structure.unflatten(values)
    trees = [part.tree if isinstance(part, _mirror.Mirror) else part for part in parts]
    return join(trees), codecs


def _codec_of_state(leaf: _Leaf, scale: Any, min_size: int) -> Codec | None:
    """The codec in which the state holds a leaf, checked against the rules."""
    x, codec = leaf.value, leaf.codec
    if not hasattr(x, "dtype"):
        return None
    is_codes = x.dtype == jnp.uint8
    if not is_codes and (
        codec is None
        or x.shape != leaf.shape
        or math.prod(leaf.shape) < max(min_size, 1)
    ):
        return None
    if (
        is_codes
        and codec is not None
        and x.shape == codec.codes_shape(leaf.shape)
        and scale.shape == codec.scales_shape(leaf.shape)
        and scale.dtype == codec.scale_dtype
    ):
        return codec
    raise ValueError(
        f"compress: {leaf.name!r} is stored as {x.dtype}{list(x.shape)} with scales "
        f"{scale.dtype}{list(scale.shape)}, but a param of shape {list(leaf.shape)} "
        f"under {codec!r} is not. The state was made with other codecs, another "
        "min_size or other shapes: pass those to compress, or call init again."
    )


@functools.partial(jax.jit, static_argnums=0)
def _encode_leaf(
    codec: Codec, x: jax.Array, step: jax.Array | None, salt: np.uint32
) -> tuple[jax.Array, jax.Array]:
    """Jitted by itself so that leaves of one shape are traced once."""
    return codec.encode(x, None if step is None else hashing.fold(step, salt))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode_leaf(
    codec: Codec, codes: jax.Array, scales: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    return codec.decode(codes, scales, shape)


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _record(rules: _Rules, inner: optax.GradientTransformation, params: PyTree) -> None:
    """Notes how each leaf is stored, for reports and checkpoint formats."""
    state = jax.eval_shape(inner.init, jax.tree.map(_init.like_float32, params))
    parts, _ = _mirror.split_state(state, params)
    for field in _fields(rules, parts, params):
        for path, leaf in zip(_mirror.leaf_paths(params), field.leaves, strict=True):
            codec = field.codec_at_init(leaf, rules.min_size)
            if codec is not None:
                _records.add(
                    _records.Record(
                        path=path,
                        field=field.key.removesuffix("_scales"),
                        codec=repr(codec),
                        code_bytes=math.prod(codec.codes_shape(leaf.shape)),
                        scale_bytes=math.prod(codec.scales_shape(leaf.shape))
                        * jnp.dtype(codec.scale_dtype).itemsize,
                    )
                )
