"""What the lab compares: every codec x rounding x scale x group, for m and for v."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from optax_flash import Codec, Companded4
from optax_flash.codecs.curves import CURVES
from optax_flash.codecs.registry import CODECS

from . import candidates
from .candidates import Library, Table
from .tracking import NEAREST, STOCHASTIC, UNSTICKING

ROUNDINGS = (STOCHASTIC, NEAREST)

# Scales of v, see :class:`candidates.Table`.
BF16 = {"scale": "bf16", "root": 2}
FP16 = {"scale": "fp16", "root": 4}
FP32 = {"scale": "fp32"}
POWERS = {"scale": "power of two"}


class Variant(NamedTuple):
    """A codec for one field of the state, with its rounding.

    Attributes:
      field: "m", signed, or "v", unsigned.
      family: what the codec is called, whatever its group.
      group: how many share a scale, or "rank-1".
      rounding: "stochastic", "nearest" or "unsticking".
      bits: of a code.
      codec: what quantizes.
      origin: "lab", "library" or "published".
    """

    field: str
    family: str
    group: int | str
    rounding: str
    bits: int
    codec: Table | Library
    origin: str = "lab"

    @property
    def name(self) -> str:
        return f"{self.family}, {self.group}, {self.rounding}"


class Format(NamedTuple):
    """A book under a name, and what else a table of it needs."""

    family: str
    book: np.ndarray
    options: dict = {}
    groups: tuple[int | None, ...] = (32,)
    origin: str = "lab"


def signed_formats(bits: int) -> Iterator[Format]:
    """Candidates for m."""
    groups = (16, 32, 64, 128, None) if bits == 4 else (32,)
    yield Format("softsign", candidates.softsign(bits), groups=groups)
    yield Format("power 2", candidates.signed_power(bits, 2), groups=groups)
    for p in (1, 1.5, 3):
        yield Format(f"power {p}", candidates.signed_power(bits, p))
    if bits == 4:
        # Of torchao and of "Memory Efficient Optimizers with 4-bit States".
        book, group = candidates.dynamic(4, 3, signed=True), 128
        yield Format("dynamic", book)
    else:
        # Of bitsandbytes.
        book, group = candidates.dynamic(8, 7, signed=True), 256
    yield Format("dynamic, fp32 scale", book, FP32, (group,), "published")


def unsigned_formats(bits: int) -> Iterator[Format]:
    """Candidates for v, without a code for 0 where nothing else is said.

    Scales are of sqrt(v) in bfloat16, of v**(1/4) in float16, or powers of two. No
    positive value takes a code for 0, but in the map of bitsandbytes.
    """
    for p in (1, 2, 3, 4) if bits == 4 else (2, 3, 4):
        book = candidates.power(bits, p, zero=False)
        yield Format(f"power {p}", book, BF16)
        yield Format(f"power {p}, scale 2**i", book, POWERS)
    for mantissa in (0, 1, 2) if bits == 4 else (4, 5):
        book = candidates.floating(bits, mantissa)
        groups = (32, 64, 128, None) if mantissa == 1 else (32,)
        yield Format(f"floats of {mantissa} bits, scale 2**i", book, POWERS, groups)
    for octaves in (8, 16, 32) if bits == 4 else (16,):
        yield Format(f"log {octaves}", candidates.log(bits, octaves, zero=False), BF16)
    book = candidates.power(bits, 2, zero=False)
    yield Format("power 2, fp16 scale", book, FP16)
    yield Format("power 2, fp32 scale", book, FP32 | {"root": 2})
    book = candidates.power(bits, 2, zero=True)
    yield Format("power 2 and 0", book, BF16 | {"guard": True})
    yield from _more_of_4_bits() if bits == 4 else _more_of_8_bits()


def _more_of_4_bits() -> Iterator[Format]:
    for octaves in (5, 6, 8, 12):
        book = candidates.log(4, octaves, zero=False)
        yield Format(f"log {octaves}, lattice", book, POWERS | {"root": octaves / 15})
    book = candidates.dynamic(4, 3, signed=False)
    yield Format("dynamic and 0", book, BF16 | {"guard": True})
    for name, book in [
        ("power 2, fp32 scale", candidates.power(4, 2, zero=False)),
        ("log 8, fp32 scale", candidates.log(4, 8, zero=False)),
    ]:
        yield Format(name, book, FP32 | {"root": 2}, (None,))
    # Of torchao, and of "Memory Efficient Optimizers with 4-bit States".
    book = candidates.power(4, 1, zero=False)
    yield Format("power 1, fp32 scale", book, FP32, (128, None), "published")


def _more_of_8_bits() -> Iterator[Format]:
    # Of bitsandbytes.
    book = candidates.dynamic(8, 7, signed=False)
    yield Format("dynamic, fp32 scale", book, FP32, (256,), "published")


def variants(codecs: tuple[Codec, ...] = tuple(CODECS.values())) -> list[Variant]:
    """Every candidate of the lab and every codec of the library, once per rounding."""
    return [*_candidates(), *_library(codecs)]


def _candidates() -> Iterator[Variant]:
    for field, formats in ("m", signed_formats), ("v", unsigned_formats):
        for bits in (4, 8):
            for form in formats(bits):
                book = np.full(2**bits, form.book[-1], np.float32)
                book[: form.book.size] = form.book
                for group in form.groups:
                    codec = Table(book=book, group=group, **form.options)
                    # A second moment moves by less than a code at almost every step.
                    extra = [UNSTICKING] if field == "m" and group == 32 else []
                    for rounding in [*ROUNDINGS, *extra]:
                        # Published formats round to nearest.
                        published = form.origin == "published" and rounding == NEAREST
                        yield Variant(
                            field,
                            form.family,
                            group or "rank-1",
                            rounding,
                            bits,
                            codec,
                            "published" if published else "lab",
                        )


def _library(codecs: tuple[Codec, ...]) -> Iterator[Variant]:
    for codec in codecs:
        published = codec.name == "flashoptim"
        groups = (32,) if published else (32, 64, 128)
        for field, group in itertools.product("mv", groups):
            sized = dataclasses.replace(codec, signed=field == "m", group=group)
            for family, ours in _curves(sized):
                for rounding in [NEAREST] if published else ROUNDINGS:
                    yield Variant(
                        field,
                        family,
                        group,
                        rounding,
                        codec.bits,
                        Library(ours),
                        "published" if published else "library",
                    )


def _curves(codec: Codec) -> Iterator[tuple[str, Codec]]:
    """The codec, and in groups of 32 with each of its other curves, if it has any."""
    if not isinstance(codec, Companded4) or codec.group != 32:
        yield codec.name, codec
        return
    field = "signed_curve" if codec.signed else "unsigned_curve"
    for curve in CURVES:
        if codec.signed or curve != "dynamic":
            ours = dataclasses.replace(codec, **{field: curve})
            default = ours == codec
            yield codec.name if default else f"{codec.name} {curve}", ours
