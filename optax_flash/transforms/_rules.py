"""Which part of an optimizer's state is stored by which codec."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import optax

from optax_flash.numerics.catalogue import get_codec
from optax_flash.numerics.codecs import Codec
from optax_flash.numerics.companded import Companded8
from optax_flash.transforms import _mirror

PyTree = Any
Codecs = str | Codec | Mapping[str, str | Codec | None] | None

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
FACTORS_IN_CODES = frozenset({"ScaleByLoraPreState", "ScaleByLoraPreMuonState"})
"""State classes whose factors are in codes without being named; docs/budget.md has the
measurements."""
FIELDS_BY_STATE: Mapping[str, Mapping[str, bool | None]] = MappingProxyType(
    {
        # Adan's v averages differences of gradients; its second moment is n.
        "ScaleByAdanState": {"m": True, "v": True, "n": False, "g": True},
        "ScaleBySimplifiedAdEMAMixState": {"m": True, "n": False},
        # SM3 keeps its momentum in nu; mu is one array for each axis.
        "ScaleBySM3State": {"nu": True},
        # A Hessian's diagonal may be negative.
        "SophiaState": {"mu": True, "nu": True},
        # sqrt(nu - mu**2): the smallest error in either turns it into a NaN.
        "ScaleByRStdDevState": {"mu": None, "nu": None},
        "ScaleByRStdDevWithCountState": {"mu": None, "nu": None},
        # e_x grows by e_x * g**2 / e_g: noise in e_g makes it grow without end.
        "ScaleByAdaDeltaState": {"e_g": None, "e_x": False},
        # m2 averages 10,000 steps and counts five times: rounding costs loss.
        "ScaleByAdemamixState": {"m1": True, "m2": None, "nu": False},
    }
)
"""State classes whose fields mean something else: signed, unsigned, or left alone."""


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
            factors = part.owner in FACTORS_IN_CODES or self._names(part.name)
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
        return codec if fits else None

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

    def _names(self, kind: str) -> bool:
        """Whether a key is a field's name."""
        return any(key == kind for key, _ in self.patterns)

    def _signed(self, mirror: _mirror.Mirror) -> bool | None:
        """Whether a field is signed; None for fields that stay as they are."""
        known = self._known(mirror)
        for key, codec in self.patterns:
            if key == mirror.name:
                if codec is None:
                    return None
                return codec.signed if known is None else known
        left = mirror.name in FACTOR_FIELDS and mirror.owner not in FACTORS_IN_CODES
        return None if left else known

    @staticmethod
    def _known(mirror: _mirror.Mirror) -> bool | None:
        by_state = FIELDS_BY_STATE.get(mirror.owner)
        if by_state is not None:
            return by_state.get(mirror.name)
        if mirror.name in SIGNED_FIELDS:
            return True
        return False if mirror.name in UNSIGNED_FIELDS else None


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


def _is_pattern(key: str) -> bool:
    return any(character in key for character in "*?[/")
