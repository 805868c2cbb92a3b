"""Runs variants over recorded streams and measures them, alone and in pairs."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .candidates import Exact
from .measures import Measured, adam, leaf_sums, pool
from .streams import B1, B2S, LION_B1, LION_B2, Streams
from .tracking import Layout, Tracked, by_leaf, quantize, track
from .variants import Variant

CHECKPOINTS = 4
MATRIX = (4096, 4096)


class FieldResult(NamedTuple):
    """A variant of one field; where the update is concerned, the other is float32.

    Attributes:
      variant: what was measured.
      b2: of the second moments.
      one_shot: of the field put in codes once, after the window.
      tracked: of the field in codes at every step, after the window.
      mean: of the field's mean over the steps of the window. Errors that change from
        step to step have left it, those that stay have not.
      update: of the update at the checkpoints.
      lion: of Lion's update, for m at the first b2.
    """

    variant: Variant
    b2: float
    one_shot: dict[str, Measured]
    tracked: dict[str, Measured]
    mean: dict[str, Measured]
    update: dict[str, Measured]
    lion: dict[str, Measured] | None = None

    @property
    def bytes(self) -> float:
        return bytes_per_param(self.variant)


class PairResult(NamedTuple):
    """The update with m and v in codes: the whole state of AdamW."""

    m: Variant
    v: Variant
    b2: float
    update: dict[str, Measured]

    @property
    def bytes(self) -> float:
        return bytes_per_param(self.m) + bytes_per_param(self.v)


def bytes_per_param(variant: Variant) -> float:
    """Of one field, codes and scales, in a matrix whose rows are whole groups."""
    return variant.codec.nbytes(MATRIX) / math.prod(MATRIX)


class Lab:
    """Recorded streams, their averages in float32, and what codecs make of them."""

    def __init__(self, streams: Streams):
        length = len(streams.grads)
        if length % CHECKPOINTS:
            raise ValueError(
                f"streams of {streams.name}: {length} steps are no multiple of the "
                f"{CHECKPOINTS} checkpoints; record another window"
            )
        self._streams = streams
        self._sizes = tuple(math.prod(leaf.recorded) for leaf in streams.leaves)
        self._shapes = [leaf.recorded for leaf in streams.leaves]
        ends = np.arange(1, CHECKPOINTS + 1) * (length // CHECKPOINTS)
        self._steps = (streams.step + ends)[:, None].astype(np.float64)
        self._last_grads = streams.grads[ends - 1]
        self._packed: tuple[int, Layout, jax.Array] | None = None
        self.reference = functools.cache(self._reference)
        self._exact_update = functools.cache(self.update)

    def field(self, variant: Variant) -> list[FieldResult]:
        """Measures a variant at each b2."""
        runs = functools.cache(lambda decay: self.run(variant, decay))
        results = []
        for b2 in B2S:
            decay = b2 if variant.field == "v" else B1
            run, reference = runs(decay), self.reference(variant.field, decay)
            once = self.once(variant, reference.stored)
            results.append(
                FieldResult(
                    variant,
                    b2,
                    one_shot=self._measure(once, reference.stored),
                    tracked=self._measure(run.stored, reference.stored),
                    mean=self._measure(run.mean, reference.mean),
                    update=self._measure(
                        self.update(b2, **{variant.field: run.exact}),
                        self._exact_update(b2),
                    ),
                )
            )
        if variant.field == "m":
            ours, exact = self.run(variant, LION_B2), self.reference("m", LION_B2)
            signs = self._measure(self.lion(ours.exact), self.lion(exact.exact))
            results[0] = results[0]._replace(lion=signs)
        return results

    def pairs(
        self, chosen: Sequence[tuple[Variant, Variant, float]]
    ) -> Iterator[PairResult]:
        """Measures pairs of variants (m, v), each at a b2."""
        runs = functools.cache(lambda *key: self.run(*key).exact)
        # Neighbours share a group, whose layout is kept.
        for variant, decay in sorted(
            {(m, B1) for m, _, _ in chosen} | {(v, b2) for _, v, b2 in chosen},
            key=lambda key: str(key[0].group),
        ):
            runs(variant, decay)
        for m, v, b2 in chosen:
            update = self.update(b2, m=runs(m, B1), v=runs(v, b2))
            yield PairResult(m, v, b2, self._measure(update, self._exact_update(b2)))

    def run(self, variant: Variant, decay: float) -> Tracked:
        """A field over the window in codes, for a b1 or b2 of the streams; flat."""
        square = variant.field == "v"

        def tracked(start, grads):
            return track(
                variant.codec,
                start,
                grads,
                jnp.float32(decay),
                square=square,
                rounding=variant.rounding,
                checkpoints=CHECKPOINTS,
            )

        start = (self._streams.v if square else self._streams.m)[decay]
        if variant.codec.group is None:
            return by_leaf(tracked, self._shapes, start, self._streams.grads)
        layout, grads = self._pack(variant.codec.group)
        return jax.tree.map(layout.unpack, tracked(layout.pack(start), grads))

    def once(self, variant: Variant, x: np.ndarray) -> np.ndarray:
        """An array in codes; flat."""

        def quantized(x):
            seed = jnp.uint32(0)
            return quantize(variant.codec, x, x, seed, rounding=variant.rounding)

        if variant.codec.group is None:
            return by_leaf(quantized, self._shapes, x)
        layout, _ = self._pack(variant.codec.group)
        return layout.unpack(quantized(layout.pack(x)))

    def lion(self, exact: np.ndarray) -> np.ndarray:
        """Lion's update at the checkpoints, of its momentum there.

        The signs of b1 m + (1 - b1) g, of the m before it took g in.
        """
        grads = self._last_grads
        before = (exact - np.float32(1 - LION_B2) * grads) / np.float32(LION_B2)
        return np.sign(LION_B1 * before + np.float32(1 - LION_B1) * grads)

    def update(self, b2: float, m=None, v=None) -> jax.Array:
        """Adam's update at the checkpoints; of a field not given, float32's."""
        m = self.reference("m", B1).exact if m is None else m
        v = self.reference("v", b2).exact if v is None else v
        corrections = (np.float32(1 - b**self._steps) for b in (B1, b2))
        return adam(m, v, *corrections)

    def _reference(self, field: str, decay: float) -> Tracked:
        exact = Variant(field, "float32", 32, "nearest", 32, Exact())
        return self.run(exact, decay)

    def _measure(self, x, reference) -> dict[str, Measured]:
        return pool(leaf_sums(x, reference, self._sizes), self._streams.leaves)

    def _pack(self, group: int) -> tuple[Layout, jax.Array]:
        """The gradients in groups; kept for the next variant of that group."""
        if self._packed is None or self._packed[0] != group:
            layout = Layout(self._shapes, group)
            self._packed = None  # makes room
            grads = jnp.asarray(layout.pack(self._streams.grads))
            self._packed = group, layout, grads
        return self._packed[1:]
