"""Which part of an optimizer's state is stored by which codec."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from optax_flash.codecs.base import Codec
from optax_flash.codecs.companded import Companded8
from optax_flash.codecs.flashoptim import FlashOptim8
from optax_flash.codecs.registry import get_codec
from optax_flash.transforms import _mirror

PyTree = Any
Codecs = str | Codec | Mapping[str, str | Codec | None] | None

KNOWN_PACKAGES = frozenset({"optax", "optax_flash"})
"""A field's name says that it has no negative values only in state classes of these."""
SIGNED_FIELDS = frozenset(
    {"mu", "trace", "m", "momentum", "ema", "exp_avg", "previous_gradient"}
    | {"mu_left", "mu_right", "nu_left", "nu_right"}
)
UNSIGNED_FIELDS = frozenset(
    {"nu", "nu_max", "v", "sum_of_squares", "exp_avg_sq", "v_row", "v_col"}
)
FACTOR_FIELDS = frozenset(
    {"mu_left", "mu_right", "nu_left", "nu_right", "v_row", "v_col"}
)
"""Fields whose arrays are smaller than their params: in codes where they are named."""
FACTORS_IN_CODES = frozenset(
    {"optax_flash.ScaleByLoraPreState", "optax_flash.ScaleByLoraPreMuonState"}
)
"""State classes whose factors are in codes without being named; docs/budget.md has the
measurements."""
FIELDS_BY_STATE: Mapping[str, Mapping[str, bool | None]] = MappingProxyType(
    {
        # Adan's v averages differences of gradients; its second moment is n.
        "optax.ScaleByAdanState": {"m": True, "v": True, "n": False, "g": True},
        "optax.ScaleBySimplifiedAdEMAMixState": {"m": True, "n": False},
        # SM3 keeps its momentum in nu; mu is one array for each axis.
        "optax.ScaleBySM3State": {"nu": True},
        # A Hessian's diagonal may be negative.
        "optax.SophiaState": {"mu": True, "nu": True},
        # sqrt(nu - mu**2): the smallest error in either turns it into a NaN.
        "optax.ScaleByRStdDevState": {"mu": None, "nu": None},
        "optax.ScaleByRStdDevWithCountState": {"mu": None, "nu": None},
        # e_x grows by e_x * g**2 / e_g: noise in e_g makes it grow without end.
        "optax.ScaleByAdaDeltaState": {"e_g": None, "e_x": False},
        # m2 averages 10,000 steps and counts five times: rounding costs loss.
        "optax.ScaleByAdemamixState": {"m1": True, "m2": None, "nu": False},
    }
)
"""State classes whose fields mean something else: signed, unsigned, or left alone."""


SHARDS = 8
"""Into how many shards a long last axis divides without cutting groups, if it can."""
LONG_AXIS = 1024
"""From how many columns on. Shorter axes are rarely sharded so finely."""
SMALLEST_GROUP = 8
"""Smaller groups would spend more on scales than they keep apart."""


class Field(NamedTuple):
    """A field of a state that holds a tree to compress.

    Attributes:
      part: its index among the state's parts, see :func:`_mirror.split_state`.
      name: such as ``"mu"``; ``"mu_1"`` for the second of that name.
      key: its key among the scales.
      kind: the name as the state has it.
      signed: whether its values may be negative.
      factors: whether entries that are not shaped like their params are put in codes.
    """

    part: int
    name: str
    key: str
    kind: str
    signed: bool
    factors: bool


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which codec a leaf of the state gets, from names and shapes alone."""

    patterns: tuple[tuple[str, Codec | None], ...]
    min_size: int

    @classmethod
    def parse(cls, codecs: Codecs, min_size: int) -> "Rules":
        if codecs is None:
            codecs = Companded8()
        if not isinstance(codecs, Mapping):
            codecs = {"*": get_codec(codecs)}
        for key in codecs:
            if not isinstance(key, str):
                raise ValueError(
                    f"compress: codecs has the key {key!r}. Keys are the names of "
                    "fields, as 'mu', or patterns of paths, as '*embed*'."
                )
        patterns = {
            key: None if codec is None else get_codec(codec)
            for key, codec in codecs.items()
        }
        return cls(tuple(patterns.items()), min_size)

    def fields(self, parts: list[Any]) -> list[Field]:
        """The fields to compress among a state's parts."""
        fields: list[Field] = []
        occurrences: dict[str, int] = {}
        for index, part in enumerate(parts):
            if not isinstance(part, _mirror.Mirror):
                continue
            signed = self._signed(part)
            if signed is None:
                continue
            occurrence = occurrences[part.name] = occurrences.get(part.name, -1) + 1
            name = part.name + (f"_{occurrence}" if occurrence else "")
            factors = _has_factors_in_codes(part) or self._names(part.name)
            fields.append(
                Field(index, name, f"{name}_scales", part.name, signed, factors)
            )
        return fields

    def codec(self, field: Field, path: str) -> Codec | None:
        """The codec for one param's entry in a field; None leaves it as it is."""
        for key, codec in (*self.patterns, ("*", Companded8())):
            if key == field.kind or (
                _is_pattern(key) and fnmatch.fnmatchcase(f"{path}/{field.kind}", key)
            ):
                return codec and dataclasses.replace(codec, signed=field.signed)
        raise AssertionError("the last pattern fits everything")

    def codec_at_init(
        self, field: Field, path: str, shape: tuple[int, ...] | None, x: Any
    ) -> Codec | None:
        """The codec for a new entry ``x`` of a param of ``shape``.

        The shape is None where the param is not real floating.
        """
        if shape is None or not hasattr(x, "dtype") or not _mirror.is_real(x):
            return None
        codec = self.codec(field, path)
        fits = (
            codec is not None
            and x.size >= max(self.min_size, 1)
            and (x.shape == shape or field.factors)
            and x.shape == coded_shape(codec, codec.codes_shape(x.shape), shape)
        )
        return grouped(codec, x.shape) if codec is not None and fits else None

    def check(self, state: PyTree, params: PyTree) -> None:
        """Raises where the rules do not fit a new state, or do not say enough of it.

        Args:
          state: the wrapped transformation's.
          params: those of its init. Without any, as in a group of ``optax.partition``
            that nothing is in, there is nothing to compare keys with.

        Raises:
          ValueError: a key of ``codecs`` fits nothing, or a field's sign is not known.
        """
        paths = _mirror.leaf_paths(params)
        if not paths:
            return
        parts, _ = _mirror.split_state(state, params)
        mirrors = [part for part in parts if isinstance(part, _mirror.Mirror)]
        self._check_keys(sorted({mirror.name for mirror in mirrors}), paths, params)
        self._check_signs(mirrors, paths, [p.shape for p in jax.tree.leaves(params)])

    def _check_keys(self, fields: list[str], paths: list[str], params: PyTree) -> None:
        """Raises where a key fits no field and no param, and says what is near it."""
        # Of a transformation without a state patterns can only name the params.
        found = [f"{path}/{name}" for path in paths for name in fields or [""]]
        masked, empty = _mirror.absent_paths(params)
        may_fit = found + [
            f"{path}/{name}" for path in empty for name in fields or [""]
        ]
        for key, _ in self.patterns:
            if not _is_pattern(key):
                if key not in fields:
                    nearest = _nearest(key, [*fields, *found], cutoff=0.6) or key
                    advice = (
                        f"The nearest is {nearest!r}"
                        if nearest in fields
                        else f"For a param write a pattern, as in '*{nearest}*'"
                    )
                    raise ValueError(
                        f"compress: codecs has the key {key!r}, but the state's fields "
                        f"are {fields}. {advice}."
                    )
            elif not (
                any(fnmatch.fnmatchcase(name, key) for name in may_fit)
                or any(_may_fit_below(key, path) for path in masked)
            ):
                nearest = _nearest(key.strip("*?/"), found, cutoff=0)
                whole = next(name for name in found if f"/{nearest}/" in f"/{name}/")
                raise ValueError(
                    f"compress: codecs has the pattern {key!r}, which fits no "
                    f"'param/path/field'. The nearest is {whole!r}. Correct the "
                    "pattern, or leave it out."
                )

    def _names(self, kind: str) -> bool:
        """Whether a key is a field's name."""
        return any(key == kind for key, _ in self.patterns)

    def _signed(self, mirror: _mirror.Mirror) -> bool | None:
        """Whether a field is signed; None for fields that stay as they are."""
        by_name = self._sign_by_name(mirror)
        known = by_name if _is_known(mirror) else None
        for key, codec in self.patterns:
            if key == mirror.name:
                if codec is None:
                    return None
                return codec.signed if known is None else known
        left = mirror.name in FACTOR_FIELDS and not _has_factors_in_codes(mirror)
        return None if left else by_name

    @staticmethod
    def _sign_by_name(mirror: _mirror.Mirror) -> bool | None:
        by_state = FIELDS_BY_STATE.get(_mirror.class_name(mirror.owner))
        if by_state is not None:
            return by_state.get(mirror.name)
        if mirror.name in SIGNED_FIELDS:
            return True
        return False if mirror.name in UNSIGNED_FIELDS and _is_known(mirror) else None

    def _check_signs(
        self, mirrors: list[_mirror.Mirror], paths: list[str], shapes: list[Any]
    ) -> None:
        """Raises where codes could lose the sign of a field that looks unsigned."""
        for mirror in mirrors:
            name = mirror.name
            unsure = name in UNSIGNED_FIELDS - FACTOR_FIELDS and not _is_known(mirror)
            if not unsure or self._names(name):
                continue
            field = Field(0, name, "", name, True, False)
            for path, shape, x in zip(paths, shapes, mirror.entries, strict=True):
                codec = self.codec_at_init(field, path, shape, x)
                if codec is None:
                    continue
                owner = f"{mirror.owner.__module__}.{mirror.owner.__qualname__}"
                signed, unsigned, left = (
                    self._with_entry(name, choice)
                    for choice in (
                        dataclasses.replace(codec, signed=True),
                        dataclasses.replace(codec, signed=False),
                        None,
                    )
                )
                raise ValueError(
                    f"compress: '{path}/{name}' is a field of {owner}, a state class "
                    f"that optax_flash does not know, and {name!r} may name a second "
                    "moment or a velocity. If its values may be negative, pass "
                    f"codecs={signed}; if not, codecs={unsigned}; to keep it in "
                    f"float32, codecs={left}."
                )

    def _with_entry(self, name: str, codec: Codec | None) -> str:
        """The mapping to write for these rules and a field, as Python."""
        default = (("*", Companded8()),)
        # Patterns that come first still say how each param is stored.
        patterns = () if self.patterns == default else self.patterns
        entries = [f"{key!r}: {_written(x)}" for key, x in patterns]
        entries.append(f"{name!r}: {_written(codec, with_sign=True)}")
        return f"{{{', '.join(entries)}}}"


def grouped(codec: Codec, shape: tuple[int, ...]) -> Codec:
    """The codec for an array of ``shape``, in groups that shards of it can hold whole.

    A head of 151,936 columns divides into eight shards, and its 4,748 groups of 32 do
    not: groups of 16 do. Global shapes alone decide, so that the codes are the same
    however they are sharded. The published format keeps its group.
    """
    *_, n = shape or (1,)
    published = isinstance(codec, FlashOptim8)
    if published or n < LONG_AXIS or n % SHARDS:
        return codec
    group, columns = codec.group, n // SHARDS
    while columns % group and group % 2 == 0 and group > SMALLEST_GROUP:
        group //= 2
    return codec if columns % group else dataclasses.replace(codec, group=group)


def coded_shape(
    codec: Codec, codes_shape: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of the array that codes stand for.

    It is the param's ``shape`` where the codes may be of such an array; if not, every
    byte is full. What this would not get right is not put in codes: with 4 bits, rows
    of odd length that are not the param's.
    """
    if codes_shape == codec.codes_shape(shape):
        return shape
    return *codes_shape[:-1], *(n * codec.codes_per_byte for n in codes_shape[-1:])


def _nearest(text: str, names: list[str], cutoff: float) -> str:
    """What is most like a text among names and, of paths, their runs of parts.

    Nothing where the likeness of none is above ``cutoff``, from 0 to 1.
    """
    length = text.count("/") + 1
    runs = {
        "/".join(parts[i : i + length])
        for parts in (name.rstrip("/").split("/") for name in names)
        for i in range(max(len(parts) - length, 0) + 1)
    }
    return "".join(difflib.get_close_matches(text, sorted(runs), 1, cutoff))


def _may_fit_below(pattern: str, path: str) -> bool:
    """Whether a pattern fits some path that begins with the parts of this one."""
    return any(
        fnmatch.fnmatchcase(f"{path}/", pattern[:end])
        for end in range(len(pattern) + 1)
    )


def _is_known(mirror: _mirror.Mirror) -> bool:
    return mirror.owner.__module__.partition(".")[0] in KNOWN_PACKAGES


def _has_factors_in_codes(mirror: _mirror.Mirror) -> bool:
    return _mirror.class_name(mirror.owner) in FACTORS_IN_CODES


def _written(codec: Codec | None, with_sign: bool = False) -> str:
    """A codec as Python; of its arguments those that are not the defaults."""
    if codec is None:
        return "None"
    arguments = [
        f"{field.name}={getattr(codec, field.name)!r}"
        for field in dataclasses.fields(codec)
        if getattr(codec, field.name) != field.default
        or (with_sign and field.name == "signed")
    ]
    return f"{_mirror.class_name(type(codec))}({', '.join(arguments)})"


def _is_pattern(key: str) -> bool:
    return any(character in key for character in "*?[/")
