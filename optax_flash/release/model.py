"""A model as a sequence of segments, which a backward pass can take one by one."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flash.transforms import _arguments, _mirror

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Segment:
    """A layer, or a stack of them that runs as a scan; see :func:`layer`, :func:`scan`.

    Attributes:
      names: where its params are, as paths in the tree of all params.
      function: what it computes.
      stacked: whether the params have a leading axis of layers.
      alone: whether the function takes the params at its one name as they are, and no
        dict of names.
    """

    names: tuple[str, ...]
    function: Callable[..., Any]
    stacked: bool
    alone: bool

    def __str__(self) -> str:
        return ", ".join(map(repr, self.names))

    def of_stack(self, params: PyTree, x: PyTree, *batch: Any) -> PyTree:
        """The function of one layer of a stack.

        Raises:
          ValueError: it does not keep the shapes and dtypes of ``x``.
        """
        out = self.function(params, x, *batch)
        if jax.tree.structure(out) == jax.tree.structure(x):
            pairs = zip(jax.tree.leaves(x), jax.tree.leaves(out), strict=True)
            types = [(jax.typeof(a), jax.typeof(b)) for a, b in pairs]
            if all(a.shape == b.shape and a.dtype == b.dtype for a, b in types):
                return out
        raise ValueError(
            f"release.scan({self}): a layer takes {jax.tree.map(jax.typeof, x)} and "
            f"returns {jax.tree.map(jax.typeof, out)}. It has to keep the structure, "
            "shapes and dtypes of x, for the next layer takes it."
        )


def layer(names: str | tuple[str, ...], function: Callable[..., Any]) -> Segment:
    """A segment whose params are used once.

    Args:
      names: where its params are, such as ``"embed"`` or ``"decoder/norm"``; a tuple
        for several, whose params the function gets as a dict by these names. Layers may
        share params, as a head does with tied embeddings.
      function: ``(params, x, *batch) -> x``; in the first segment of a model
        ``(params, *batch) -> x``, and the last returns the loss. ``x`` is any tree of
        arrays.

    Example:
      >>> import optax_flash.release as release
      >>> head = release.layer(
      ...     ("norm", "embed"),
      ...     lambda p, x, tokens: (x * p["norm"] @ p["embed"].T).mean(),
      ... )
    """
    _arguments.check_function(function, "layer(names, function)")
    alone = isinstance(names, str)
    return Segment((names,) if alone else tuple(names), function, False, alone)


def scan(name: str, function: Callable[..., Any]) -> Segment:
    """A stack of equal layers, which runs as a ``jax.lax.scan``.

    Args:
      name: where the params are, stacked: each has a leading axis of layers.
      function: one layer, ``(params, x, *batch) -> x`` with an ``x`` of the same shapes
        and dtypes. ``params`` come without the leading axis.
    """
    _arguments.check_function(function, "scan(name, function)")
    return Segment((name,), function, True, True)


def sequence(*segments: Segment, has_aux: bool = False) -> "Sequence":
    """A model whose segments run one after another.

    Calling it computes the loss, as any function ``(params, *batch) -> loss`` does. Of
    each layer only the input is kept for a backward pass.

    Args:
      *segments: of :func:`layer` and :func:`scan`.
      has_aux: whether the last function returns ``(loss, aux)``.

    Example:
      >>> import jax.numpy as jnp, optax_flash.release as release
      >>> model = release.sequence(
      ...     release.layer("first", lambda w, x: x @ w),
      ...     release.scan("blocks", lambda w, x, _: x + jnp.tanh(x @ w)),
      ...     release.layer("last", lambda w, x, _: jnp.mean((x @ w) ** 2)),
      ... )
      >>> params = {
      ...     "first": jnp.ones((4, 8)),
      ...     "blocks": jnp.zeros((3, 8, 8)),
      ...     "last": jnp.ones((8, 1)),
      ... }
      >>> float(model(params, jnp.ones((2, 4))))
      1024.0
    """
    return Sequence(segments, has_aux)


@dataclasses.dataclass(frozen=True)
class Sequence:
    """See :func:`sequence`.

    Raises:
      ValueError: there is no segment, or the first or the last one is a scan.
    """

    segments: tuple[Segment, ...]
    has_aux: bool = False

    def __post_init__(self) -> None:
        ends = self.segments[:1] + self.segments[-1:]
        if not ends or any(segment.stacked for segment in ends):
            raise ValueError(
                "release.sequence: the first segment makes x from the batch and the "
                "last makes the loss, so both are a release.layer: "
                f"{[str(segment) for segment in self.segments]}."
            )

    def __call__(self, params: optax.Params, *batch: Any) -> Any:
        places = places_of(self, params)
        leaves = jax.tree.leaves(params)
        x: tuple[Any, ...] = ()
        for segment, place in zip(self.segments[:-1], places, strict=False):
            own = place.take(leaves)
            if segment.stacked:
                # Inside of a scan nothing is merged with its recomputation anyway.
                body = jax.checkpoint(
                    lambda x, p, f=segment.of_stack: (f(p, x, *batch), None),
                    prevent_cse=False,
                )
                x = (jax.lax.scan(body, x[0], own)[0],)
            else:
                x = (jax.checkpoint(segment.function)(own, *x, *batch),)
        return self.segments[-1].function(places[-1].take(leaves), *x, *batch)


class Place(NamedTuple):
    """Where a segment's params are among the leaves of all params.

    Attributes:
      leaves: their indices.
      treedef: of what the segment's function takes.
    """

    leaves: tuple[int, ...]
    treedef: Any

    def take(self, leaves: list[Any]) -> PyTree:
        """The params as the segment's function takes them, from all leaves."""
        return self.treedef.unflatten([leaves[i] for i in self.leaves])


def places_of(model: Sequence, params: optax.Params) -> list[Place]:
    """Where the params of each segment are.

    Raises:
      ValueError: a name leads nowhere; a param belongs to no segment; a stacked one to
        several, or has no leading axis of the stack's length.
    """
    leaves, treedef = jax.tree.flatten(params)
    paths = _mirror.leaf_paths(params)
    indices = treedef.unflatten(list(range(len(leaves))))
    places, users = [], [0] * len(leaves)
    for segment in model.segments:
        found = {name: _walk(indices, name) for name in segment.names}
        tree = found[segment.names[0]] if segment.alone else found
        own, own_treedef = jax.tree.flatten(tree)
        if segment.stacked:
            _check_stack(segment, {paths[i]: leaves[i] for i in own})
        for i in set(own):
            users[i] += 1
        places.append(Place(tuple(own), own_treedef))
    for segment, place in zip(model.segments, places, strict=True):
        shared = [paths[i] for i in place.leaves if users[i] > 1]
        if segment.stacked and shared:
            raise ValueError(
                f"release.scan({segment}): {shared[0]!r} belongs to another segment, "
                "too. Only params of release.layer can be shared."
            )
    for path, n in zip(paths, users, strict=True):
        if not n:
            raise ValueError(
                f"release: no segment uses the param {path!r}. Name it in one, or keep "
                "it out of the params that are trained."
            )
    return places


def _walk(tree: PyTree, name: str) -> PyTree:
    """The subtree at a path such as ``"decoder/blocks"``."""
    node = tree
    for key in name.split("/"):
        try:
            node = node[int(key)] if isinstance(node, list | tuple) else node[key]
        except (KeyError, IndexError, TypeError, ValueError):
            if not hasattr(node, key):
                raise ValueError(
                    f"release: there are no params at {name!r}: {key!r} was not found "
                    f"among {_mirror.leaf_paths(tree)[:20]}."
                ) from None
            node = getattr(node, key)
    return node


def _check_stack(segment: Segment, leaves: dict[str, Any]) -> None:
    lengths = {path: jnp.shape(x)[:1] for path, x in leaves.items()}
    expected = next(iter(lengths.values()), ())
    for path, length in lengths.items():
        if not length or length != expected:
            raise ValueError(
                f"release.scan({segment}): {path!r} has shape "
                f"{list(jnp.shape(leaves[path]))}, but every param of the stack needs "
                f"a leading axis of layers, {list(expected)} as the first has."
            )
