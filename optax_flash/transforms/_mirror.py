"""Finding, inside any optimizer state, the trees that mirror the params."""

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import MaskedNode

PyTree = Any
Key = Any

BOXES = frozenset({"flax.Variable", "flax.AxisMetadata", "haliax.NamedArray"})
"""Classes, by :func:`class_name`, whose instances only hold an array and notes on it,
see ``_boxes``."""


class Mirror(NamedTuple):
    """A subtree of an optimizer state with one entry for each param.

    Attributes:
      name: the field that holds it, such as ``"mu"``; a dict key or an index where
        the state is no NamedTuple.
      owner: the class of the node that holds the field.
      tree: the subtree.
      entries: what it has in the place of each param: an array, or MaskedNode or None.
      rebuild: makes a tree like it of other entries.
    """

    name: str
    owner: type
    tree: PyTree
    entries: list[Any]
    rebuild: Callable[[list[Any]], PyTree]


def split_state(
    state: PyTree, params: PyTree
) -> tuple[list[Mirror | Any], Callable[[list[Any]], PyTree]]:
    """Cuts a state into subtrees that mirror ``params`` and all its other leaves.

    A subtree mirrors the params when it has their structure with an array, or nothing
    (as under ``optax.masked``), in place of every param; one MaskedNode may stand for
    all params below it. Shapes do not matter.

    Returns:
      ``(parts, join)``: ``parts`` holds a :class:`Mirror` for every mirroring subtree
      and other leaves as they are, in the state's order; ``join(parts)`` takes a
      subtree or leaf in the place of each and rebuilds the state.
    """

    def mirrors(node: PyTree) -> bool:
        return _entries(node, params) is not None

    def part(path: tuple[Key, ...], node: PyTree) -> Mirror | Any:
        found = _entries(node, params)
        if found is None:
            return node
        return Mirror(_name(path), _owner(state, path), node, *found)

    nodes, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=mirrors)
    return [part(path, node) for path, node in nodes], treedef.unflatten


def nodes(tree: PyTree, *kinds: type) -> list[Any]:
    """The outermost nodes of some classes, such as the states of one transformation."""

    def is_one(node: Any) -> bool:
        return isinstance(node, kinds)

    return list(filter(is_one, jax.tree.leaves(tree, is_leaf=is_one)))


def entries(tree: PyTree, params: PyTree) -> list[Any]:
    """What a tree that mirrors the params has in the place of each of them."""
    return entries_and_rebuild(tree, params)[0]


def entries_and_rebuild(
    tree: PyTree, params: PyTree
) -> tuple[list[Any], Callable[[list[Any]], PyTree]]:
    """The same, and what makes a tree like it of other entries.

    What is not there, None or MaskedNode, stays so in the tree that is rebuilt.
    """
    found = _entries(tree, params)
    if found is None:
        raise ValueError(
            f"{jax.tree.structure(tree)} does not mirror {jax.tree.structure(params)}."
        )
    return found


def leaf_paths(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The path of every leaf, such as ``"decoder/layer_0/kernel"``.

    An array that is a tree by itself is ``"params"``; the array in one of Flax's boxes
    goes by the name of the box.
    """
    return [
        jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        for path in _leaf_keys(tree, is_leaf or (lambda _: False))
    ]


def absent_paths(params: PyTree) -> tuple[list[str], list[str]]:
    """The paths of MaskedNodes, each of which may stand for a subtree, and of Nones."""
    leaves = jax.tree.leaves(params, is_leaf=is_absent)
    paths = zip(leaf_paths(params, is_leaf=is_absent), leaves, strict=True)
    absent = [(path, x) for path, x in paths if is_absent(x)]
    masked = [path for path, x in absent if x is not None]
    return masked, [path for path, x in absent if x is None]


def map_with_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """``jax.tree.map`` of a function of each leaf's path, as above, and the leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(map(function, leaf_paths(tree), leaves))


def class_name(cls: type) -> str:
    """A class by its package and name, such as ``"optax.ScaleByAdamState"``."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


@functools.cache
def is_box(cls: type) -> bool:
    """Whether the instances of a class are boxes."""
    return not BOXES.isdisjoint(map(class_name, cls.__mro__))


def is_placeholder(params: PyTree) -> bool:
    """Whether this is what ``optax.tree_map_params`` gives an init for its params."""
    return class_name(type(params)) == "optax._ParamsPlaceholder"


def check_mirrors(tree: PyTree, params: PyTree, what: str) -> None:
    """Raises a ValueError that names the first leaf in which the trees differ.

    Args:
      tree: what should have an array, or nothing, in place of each param.
      params: params, gradients or updates.
      what: begins the message, as in ``"compress: the gradients"``.
    """
    if _entries(tree, params) is not None:
        return
    check_containers(params, what)
    found, expected = (leaf_paths(x, is_leaf=_is_masked) for x in (params, tree))

    def among(path: str, prefixes: list[str]) -> bool:
        # What is masked may stand for a subtree.
        return any(path == x or path.startswith(f"{x}/") for x in prefixes)

    missing = [x for x in expected if not any(among(path, [x]) for path in found)]
    extra = [path for path in found if not among(path, expected)]
    if missing:
        difference = f"{missing[0]!r} is missing"
    elif extra:
        difference = f"{extra[0]!r} is not in the state"
    else:
        difference = (
            f"the containers differ, {jax.tree.structure(params)} against "
            f"{jax.tree.structure(tree)}"
        )
    raise ValueError(
        f"{what}: {difference}. The tree must have the structure of the params that "
        "init saw; call init again after changing the model."
    )


def check_shapes(updates: PyTree, params: PyTree, what: str) -> None:
    """Raises a ValueError that names the first update not shaped like its param.

    Trees of different structures pass; see :func:`check_mirrors`.

    Args:
      updates: gradients or updates.
      params: arrays or their shapes.
      what: begins the message, as in ``"compress: the gradient"``.
    """
    if jax.tree.structure(updates) != jax.tree.structure(params):
        return
    rows = zip(
        leaf_paths(params),
        jax.tree.leaves(updates),
        jax.tree.leaves(params),
        strict=True,
    )
    for path, u, p in rows:
        if jnp.shape(u) != jnp.shape(p):
            raise ValueError(
                f"{what} of {path!r} has shape {list(jnp.shape(u))}, but the param has "
                f"{list(jnp.shape(p))}. Pass gradients of the very params that update "
                "gets; after changing the model call init again."
            )


def without_examples(grads: PyTree, params: PyTree) -> PyTree:
    """Gradients' shapes, without an axis in front that their params do not have.

    Transformations such as ``optax.contrib.differentially_private_aggregate`` take a
    gradient for each example.
    """
    if jax.tree.structure(grads) != jax.tree.structure(params):
        return grads

    def shape(g: Any, p: Any) -> jax.ShapeDtypeStruct:
        found, expected = jnp.shape(g), jnp.shape(p)
        found = expected if found[1:] == expected else found
        return jax.ShapeDtypeStruct(found, jnp.result_type(g))

    return jax.tree.map(shape, grads, params)


def narrowed(tree: PyTree, updates: PyTree) -> PyTree:
    """A tree without the leaves that the updates lack.

    Gradients have nothing, None or MaskedNode, in place of a frozen param or of a
    function that an Equinox module holds; the params beside them have all leaves.

    Args:
      tree: params. One that has other containers than the updates is returned as it is.
      updates: gradients.
    """
    leaves, wide = _with_absent(updates)
    if not any(map(is_absent, leaves)):
        return tree
    entries = _flatten_up_to(wide, tree)
    return tree if entries is None else wide.unflatten(_filled(leaves, entries))


def narrow(state: PyTree, updates: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """:func:`narrowed` for all subtrees of a state that mirror the updates, and back.

    Returns:
      ``(state, widen)``: ``widen`` puts what was left out into a state that is like
      the returned one, so that leaves without a gradient keep their state.
    """
    leaves, wide = _with_absent(updates)
    if len(leaves) < 2 or not any(map(is_absent, leaves)):
        return state, lambda new: new

    def entries_of(node: PyTree) -> list[Any] | None:
        entries = _flatten_up_to(wide, node)
        if entries is None:
            return None
        own = [x for x, u in zip(entries, leaves, strict=True) if not is_absent(u)]
        # Without a gradient at all, any container of that size would mirror them.
        fits = all(_is_array(x) or is_absent(x) for x in own or entries)
        known = any(_is_array(x) or _is_masked(x) for x in own or entries)
        return entries if fits and known else None

    nodes, treedef = jax.tree.flatten(
        state, is_leaf=lambda node: entries_of(node) is not None
    )
    columns = [entries_of(node) for node in nodes]
    narrow_nodes = [
        node if column is None else wide.unflatten(_filled(leaves, column))
        for node, column in zip(nodes, columns, strict=True)
    ]

    def widen(new: PyTree) -> PyTree:
        rows = zip(treedef.flatten_up_to(new), columns, strict=True)
        return treedef.unflatten(
            [
                node
                if column is None
                else wide.unflatten(
                    old if is_absent(u) else x
                    for u, old, x in zip(
                        leaves, column, wide.flatten_up_to(node), strict=True
                    )
                )
                for node, column in rows
            ]
        )

    return treedef.unflatten(narrow_nodes), widen


def check_arrays(params: PyTree, what: str) -> None:
    """Raises a ValueError that names the first leaf which is no array or number.

    Or the first container that does not hold what has no leaves, see below.
    """
    check_containers(params, what)
    for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        if not _is_array(leaf) and not isinstance(leaf, numbers.Number):
            raise ValueError(
                f"{what}: param {path!r} is a {type(leaf).__name__}. Pass "
                "init the arrays alone, as equinox.filter(model, equinox.is_array) or "
                "optax.masked do; update takes the whole params."
            )


def check_containers(params: PyTree, what: str) -> None:
    """Raises a ValueError that names the first container without room for nothing.

    A state has MaskedNode in the place of a leaf that it does not concern. Haiku's
    immutable dicts flatten what they are given, and it is gone.
    """
    found = _without_room(params)
    if not found:
        return
    path, node = found[0]
    name = repr(path) if path else "the tree"
    raise ValueError(
        f"{what}: {name} is a {class_name(type(node))}, which does not keep the places "
        "of leaves that a state leaves out. Pass plain dicts, as "
        "hk.data_structures.to_mutable_dict makes of Haiku's."
    )


def _without_room(tree: PyTree) -> list[tuple[str, Any]]:
    """The paths and nodes of the innermost such containers."""
    if _has_room(tree):
        return []
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is not tree
    )
    below = [
        ("/".join(filter(None, (_name(path), rest))), found)
        for path, node in nodes
        for rest, found in _without_room(node)
    ]
    return below or [("", tree)]


def _has_room(tree: PyTree) -> bool:
    leaves, structure = jax.tree.flatten(tree)
    try:
        empty = structure.unflatten([MaskedNode()] * len(leaves))
    except Exception:
        # A class that checks what it is given says so itself, if it is given this.
        return True
    return len(_with_absent(empty)[0]) == len(_with_absent(tree)[0])


def arrays_of(params: PyTree) -> PyTree:
    """Params as init takes them: None in place of what is no array or number.

    Such leaves are the functions that an Equinox module holds, and update takes them.
    """

    def is_known(x: Any) -> bool:
        return _is_array(x) or isinstance(x, numbers.Number)

    if all(map(is_known, jax.tree.leaves(params))):
        return params
    return jax.tree.map(lambda x: x if is_known(x) else None, params)


def is_real(x: Any) -> bool:
    """Whether an array is of real floating numbers, which codes can stand for."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def check_floating(params: PyTree, what: str) -> None:
    """Raises a ValueError that names the first leaf which is not real floating."""
    check_containers(params, what)
    for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{what}: param {path!r} has dtype {dtype}; only real "
                "floating params can be stored in codes. Keep it out with "
                "optax.masked or optax.partition"
                + (
                    ", or split it with optax.contrib.split_real_and_imaginary."
                    if jnp.issubdtype(dtype, jnp.complexfloating)
                    else "."
                )
            )


def _entries(
    tree: PyTree, params: PyTree
) -> tuple[list[Any], Callable[[list[Any]], PyTree]] | None:
    """A mirroring tree's entries and how to rebuild it; None if it does not mirror."""
    structure = jax.tree.structure(params)
    entries = _flatten_up_to(structure, tree)
    if entries is None:
        return _entries_of_prefix(tree, params)
    mirrors = all(_is_array(x) or is_absent(x) for x in entries)
    return (entries, structure.unflatten) if mirrors else None


def _entries_of_prefix(
    tree: PyTree, params: PyTree
) -> tuple[list[Any], Callable[[list[Any]], PyTree]] | None:
    """The same for a tree in which one absent leaf may stand for several params."""
    leaves, prefix = jax.tree.flatten(tree, is_leaf=is_absent)
    if not all(_is_array(x) or is_absent(x) for x in leaves):
        return None
    try:
        below = [jax.tree.structure(x).num_leaves for x in prefix.flatten_up_to(params)]
    except (ValueError, TypeError, KeyError):
        return None
    if any(n != 1 for x, n in zip(leaves, below, strict=True) if _is_array(x)):
        return None
    entries = [x for x, n in zip(leaves, below, strict=True) for _ in range(n)]

    def rebuild(entries: list[Any]) -> PyTree:
        remaining = iter(entries)
        # Where one absent leaf stands for several params, or for none, it stays.
        rebuilt = []
        for x, n in zip(leaves, below, strict=True):
            new = [next(remaining) for _ in range(n)]
            rebuilt.append(new[0] if _is_array(x) else x)
        return prefix.unflatten(rebuilt)

    return entries, rebuild


def _leaf_keys(tree: PyTree, is_leaf: Callable[[Any], bool]) -> list[tuple[Key, ...]]:
    """The keys that lead to each leaf, without those by which boxes hold an array."""

    def is_box_below(node: Any) -> bool:
        return node is not tree and is_box(type(node))

    def stop(node: Any) -> bool:
        return is_box_below(node) or is_leaf(node)

    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)
    keys = [
        path + below
        for path, node in nodes
        for below in (_leaf_keys(node, is_leaf) if is_box_below(node) else [()])
    ]
    holds_an_array = len(keys) == 1 and len(keys[0]) == 1
    return [()] if holds_an_array and is_box(type(tree)) else keys


def _with_absent(tree: PyTree) -> tuple[list[Any], Any]:
    """``jax.tree.flatten`` for which None and MaskedNode are leaves."""
    return jax.tree.flatten(tree, is_leaf=is_absent)


def _flatten_up_to(structure: Any, tree: PyTree) -> list[Any] | None:
    """What a tree has in the place of each leaf; None if its containers differ."""
    node = structure.node_data()
    if node is not None and type(tree) is not node[0]:
        # Seen at a glance; the exception below would print the whole tree first.
        return None
    try:
        return structure.flatten_up_to(tree)
    except (ValueError, TypeError, KeyError):
        return None


def _filled(leaves: list[Any], entries: list[Any]) -> list[Any]:
    """The entries, with nothing where the leaves are nothing."""
    rows = zip(leaves, entries, strict=True)
    return [u if is_absent(u) else x for u, x in rows]


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def is_absent(x: Any) -> bool:
    """Whether a leaf is nothing: None, or what stands for what is masked."""
    return x is None or isinstance(x, MaskedNode)


def _is_masked(x: Any) -> bool:
    return isinstance(x, MaskedNode)


def _name(path: tuple[Key, ...]) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True) if path else "state"


def _owner(state: PyTree, path: tuple[Key, ...]) -> type:
    node = state
    for key in path[:-1]:
        if isinstance(key, jax.tree_util.GetAttrKey):
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.DictKey):
            node = node[key.key]
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        else:
            return object
    return type(node)
