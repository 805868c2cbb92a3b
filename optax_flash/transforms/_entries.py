"""The entries of a state: what it has in each field for each param, and in codes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_flash.codecs.base import Codec
from optax_flash.transforms import _mirror
from optax_flash.transforms._rules import Field, Rules, coded_shape, grouped
from optax_flash.transforms._stored import StateCodecs

PyTree = Any


class Entry(NamedTuple):
    """An array of a state that is stored in codes.

    Attributes:
      name: the param's path and the field, such as ``"decoder/kernel/mu"``.
      codec: the codec.
      shape: of the array that the codes stand for.
      dtype: of that array.
      at: its place among the leaves of the inner state.
      codes: what the state holds in the array's place.
      scales: theirs.
    """

    name: str
    codec: Codec
    shape: tuple[int, ...]
    dtype: np.dtype
    at: int
    codes: jax.Array
    scales: jax.Array

    def decoded(self) -> jax.Array:
        """The array, as its codec gives it."""
        return _decoded(self.codec, self.shape, self.codes, self.scales)


def entries(state: Any) -> Iterator[Entry]:
    """The entries of a CompressState, in the order of its scales."""
    leaves, scales = jax.tree.leaves(state.inner_state), jax.tree.leaves(state.scales)
    for entry, scale in zip(state.codecs.leaves, scales, strict=True):
        codes = leaves[entry.at]
        # Inside shard_map the codes are those of a shard.
        shape = coded_shape(entry.codec, codes.shape, entry.shape)
        yield Entry(entry.name, entry.codec, shape, entry.dtype, entry.at, codes, scale)


class Columns(NamedTuple):
    """An inner state, as a column of entries for each field that is put in codes.

    Attributes:
      fields: those fields.
      values: of each field, what it has in the place of each param.
      parts: of the state, see :func:`_mirror.split_state`.
      join: makes a state of other parts.
    """

    fields: list[Field]
    values: list[list[Any]]
    parts: list[Any]
    join: Callable[[list[Any]], PyTree]

    @classmethod
    def of(cls, rules: Rules, inner_state: PyTree, params: PyTree) -> "Columns":
        """The columns of a state, for anything that has the params' structure."""
        parts, join = _mirror.split_state(inner_state, params)
        fields = rules.fields(parts)
        values = [list(parts[field.part].entries) for field in fields]
        return cls(fields, values, parts, join)

    def joined(self, values: list[list[Any]]) -> PyTree:
        """The same state with other entries."""
        trees = [x.tree if isinstance(x, _mirror.Mirror) else x for x in self.parts]
        for field, column in zip(self.fields, values, strict=True):
            trees[field.part] = self.parts[field.part].rebuild(column)
        return self.join(trees)


def scales_of(
    state: Any, fields: list[Field], updates: PyTree
) -> tuple[list[list[Any]], list[Any]]:
    """The scales of each field's entries, and what makes a tree of others."""
    found = [
        _mirror.entries_and_rebuild(state.scales[field.key], updates)
        for field in fields
    ]
    return [list(entries) for entries, _ in found], [rebuild for _, rebuild in found]


def shapes(updates: PyTree, params: PyTree = None) -> list[tuple[int, ...] | None]:
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


class InCodes(NamedTuple):
    """An entry in codes: by which codec, and the array that they stand for."""

    codec: Codec
    shape: tuple[int, ...]
    dtype: np.dtype


def stored_as(
    rules: Rules,
    codecs: StateCodecs,
    field: Field,
    path: str,
    shape: tuple[int, ...] | None,
    x: Any,
    scale: Any,
) -> InCodes | None:
    """How the state holds an entry of a param of ``shape``, checked against the rules.

    None where it holds the array itself, or nothing.
    """
    if not hasattr(x, "dtype") or shape is None:
        return None
    entry = codecs.by_name.get(f"{path}/{field.name}")
    codec = rules.codec(field, path)
    if entry is None:
        # Inside shard_map shapes are local, so a large array may look small, never the
        # other way round.
        small = rules.codec_at_init(field, path, shape, x) is None
        if x.dtype != jnp.uint8 and small:
            return None
    elif codec is not None and grouped(codec, entry.shape) == entry.codec:
        codec = entry.codec
        found = coded_shape(codec, x.shape, shape)
        whole = x.dtype == jnp.uint8 and (
            getattr(scale, "shape", None) == codec.scales_shape(found)
        )
        if whole and scale.dtype != codec.scale_dtype:
            raise ValueError(
                f"compress: the scales of '{path}/{field.name}' are {scale.dtype}, but "
                f"{codec!r} stores them in {np.dtype(codec.scale_dtype)}. Something "
                "has cast the optimizer state. Leave it out of casts; cast back, "
                "scales that were made wider lose nothing."
            )
        if whole and (found == shape or field.factors):
            return InCodes(codec, found, entry.dtype)
        if whole:
            raise other_shape(path, shape, field, found)
    scales = f"{scale.dtype}{list(scale.shape)}" if hasattr(scale, "dtype") else "none"
    there = f", made by {entry.codec!r}," if entry else ""
    raise ValueError(
        f"compress: '{path}/{field.name}' is stored as {x.dtype}{list(x.shape)} with "
        f"scales {scales}{there} but a param of shape {list(shape)} under {codec!r} is "
        "not. The state was made with other codecs, another min_size or other shapes: "
        "pass those to compress, or call init again."
    )


def other_shape(
    path: str, shape: tuple[int, ...], field: Field, of_init: tuple[int, ...]
) -> ValueError:
    """Of a gradient whose shape is not that of the param that init saw."""
    return ValueError(
        f"compress: {path!r} has shape {list(shape)}, but {field.name!r} of the state "
        f"{list(of_init)}. Pass gradients of the shapes of the params that init saw; "
        "after changing the model call init again."
    )


class Bundle(NamedTuple):
    """Entries of one param that are decoded, and encoded, by one op.

    Attributes:
      name: the random bits depend on it.
      param: its index.
      fields: the indices of the entries' fields.
      codecs: of each field.
      shape: of each entry.
      dtypes: of each entry.
      arrays: the entries, decoded.
    """

    name: str
    param: int
    fields: tuple[int, ...]
    codecs: tuple[Codec, ...]
    shape: tuple[int, ...]
    dtypes: tuple[np.dtype, ...]
    arrays: tuple[jax.Array, ...] = ()


def bundles(
    stored: list[list[InCodes | None]],
    fields: list[Field],
    paths: list[str],
    shapes: list[tuple[int, ...] | None],
) -> list[Bundle]:
    """All entries in codes: a param's, if shaped like it, together; others alone."""
    found = []
    for i, of_param in enumerate(zip(*stored, strict=True)):
        present = [(j, entry) for j, entry in enumerate(of_param) if entry]
        own = shapes[i]
        alike = [(j, entry) for j, entry in present if entry.shape == own]
        if alike:
            found.append(_bundle(paths[i], i, alike))
        for j, entry in present:
            if entry.shape != own:
                name = f"{paths[i]}/{fields[j].name}"
                found.append(_bundle(name, i, [(j, entry)]))
    return found


def _bundle(name: str, param: int, entries: list[tuple[int, InCodes]]) -> Bundle:
    """Of a param's entries of one shape, each with its field."""
    fields, found = zip(*entries, strict=True)
    codecs, shapes, dtypes = zip(*found, strict=True)
    return Bundle(name, param, fields, codecs, shapes[0], dtypes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decoded(
    codec: Codec, shape: tuple[int, ...], codes: jax.Array, scales: jax.Array
) -> jax.Array:
    return codec.decode(codes, scales, shape)
