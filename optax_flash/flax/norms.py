"""Which params belong to norms: by type in nnx, by structure in trees of params."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen, nnx

from optax_flash.transforms import _mirror

_NORM = re.compile(
    r"norm|^ln(_|\d|$)|_ln(_|\d|$)|^bn(_|\d|$)|_bn(_|\d|$)", re.IGNORECASE
)
_MATRICES = frozenset({"kernel", "embedding"})
# In a layer by itself: one axis more in a stack of layers.
_LEAST_RANK = {"kernel": 2, "embedding": 2, "scale": 1, "bias": 1}

# SpectralNorm is missing because it has no params of its own: those of the layer that
# it wraps are the layer's. WeightNorm has gains.
_NNX_NORMS = (
    nnx.BatchNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.WeightNorm,
)

Module = tuple[str, ...]


class _Param(NamedTuple):
    """A param, and where it is.

    Attributes:
      path: as ``keep_float32`` takes it.
      module: the names that lead to its module.
      name: within the module.
      shape: of all layers together, where they are stacked.
    """

    path: str
    module: Module
    name: str
    shape: tuple[int, ...]


def is_norm(path: str, param: jax.Array) -> bool:
    """Whether a param belongs to a normalization layer, by its own path alone.

    True where the module or the param has ``norm`` in its name or is an ``ln`` or
    ``bn``, kernels and embeddings excepted, and for vectors called ``scale``, the name
    of Flax's norm gains. One param does not tell whether a ``bias`` has a gain beside
    it, or whether the axes of a ``scale`` are layers and features:
    :func:`norm_paths` looks at all params together.

    Args:
      path: such as ``"decoder/LayerNorm_0/scale"``.
      param: the param.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash.flax import is_norm
      >>> is_norm("decoder/LayerNorm_0/bias", jnp.zeros(8))
      True
      >>> is_norm("decoder/Dense_0/kernel", jnp.zeros((8, 8)))
      False
    """
    *module, name = path.split("/")
    if name in _MATRICES:
        return False
    gain = name == "scale" and param.ndim <= 1
    return gain or _is_called_norm(module) or bool(_NORM.search(name))


def norm_paths(params: Any, wrt: Any = nnx.Param) -> list[str]:
    """The paths of the params that belong to normalization layers.

    These params are few and sit near 1, where half precision is coarsest against their
    small steps. The train states keep them in float32.

    Of an nnx model, the params of ``BatchNorm``, ``GroupNorm``, ``InstanceNorm``,
    ``LayerNorm``, ``RMSNorm`` and ``WeightNorm``, of their subclasses, and what the
    rules below find in other modules, whose class names count as names.

    Of a tree of params, which has names and shapes only:

    - the params of a module that has ``scale`` and ``bias`` of one shape and nothing
      else, whatever its name and rank;
    - in each layer, a vector called ``scale``, and with it a ``bias`` of its shape in
      the same module;
    - in each layer, a vector whose module or own name has ``norm`` in it or is an
      ``ln`` or ``bn``, unless the module has a ``kernel`` or ``embedding``; a lone
      ``scale`` in such a module whatever its rank.

    Axes along which ``nn.scan`` or ``nn.vmap`` stacks layers are not counted: they have
    one size in all params of a module that holds matrices. A ``scale`` with two axes in
    a layer is a matrix and does not count as a gain.

    Args:
      params: an nnx model, or a tree of params or of their shapes.
      wrt: the filter for the params of an nnx model.

    Returns:
      Sorted paths, as ``keep_float32`` takes them.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash.flax import norm_paths
      >>> dense = {"kernel": jnp.ones((3, 8, 8)), "bias": jnp.zeros((3, 8))}
      >>> n1 = {"scale": jnp.ones((3, 8)), "bias": jnp.zeros((3, 8))}
      >>> norm_paths({"layers": {"n1": n1, "up": dense}})
      ['layers/n1/bias', 'layers/n1/scale']
    """
    if not _has_modules(params):
        return sorted(_by_structure(list(_params(params)), _is_called_norm))
    classes = {_keys(path): type(x) for path, x in nnx.iter_modules(params)}
    # A norm shows by all its params, whether they are trained or not.
    state = nnx.as_pure(nnx.state(params, nnx.Any(nnx.Param, wrt)))

    def is_called_norm(module: Module) -> bool:
        name = classes[module].__name__ if module in classes else ""
        return _is_called_norm(module) or bool(_NORM.search(name))

    def is_norm_layer(module: Module) -> bool:
        parents = (module[:depth] for depth in range(len(module), -1, -1))
        owner = next((classes[x] for x in parents if x in classes), object)
        return issubclass(owner, _NNX_NORMS)

    found = list(_params(state))
    paths = _by_structure(found, is_called_norm)
    paths |= {x.path for x in found if is_norm_layer(x.module)}
    trained = _mirror.leaf_paths(nnx.as_pure(nnx.state(params, wrt)))
    return sorted(paths.intersection(trained))


def _has_modules(tree: Any) -> bool:
    """Whether a tree is an nnx model, or a container of several."""
    if isinstance(tree, nnx.Module):
        return True
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Module))
    return any(isinstance(x, nnx.Module) for x in leaves)


def _params(tree: Any) -> Iterator[_Param]:
    """The params of a tree; in boxes with metadata, too."""

    def is_box(x: Any) -> bool:
        return isinstance(x, linen.meta.AxisMetadata | nnx.Variable)

    for outer, box in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box):
        *module, name = _keys(outer) or ("",)
        path = jax.tree_util.keystr(outer, simple=True, separator="/") or "params"
        for p in jax.tree.leaves(box):
            yield _Param(path, tuple(module), name, np.shape(p))


def _keys(path: tuple[Any, ...]) -> Module:
    """The names in a path of jax or of nnx."""
    return tuple(
        x if isinstance(x, str) else jax.tree_util.keystr((x,), simple=True)
        for x in path
    )


def _is_called_norm(module: tuple[str, ...] | list[str]) -> bool:
    # An element of a list has the list's name: "norms/0".
    name = next((x for x in reversed(module) if not x.isdigit()), "")
    return bool(_NORM.search(name))


def _by_structure(
    params: list[_Param], is_called_norm: Callable[[Module], bool]
) -> set[str]:
    """The paths of norms, from the names and shapes of all params."""
    own, within = defaultdict(dict), defaultdict(list)
    for param in params:
        own[param.module][param.name] = param
        for depth in range(len(param.module) + 1):
            within[param.module[:depth]].append(param)
    stacked = {module: _stacked_axes(inside) for module, inside in within.items()}

    paths = set()
    for module, mine in own.items():
        # A module's own params alone say nothing about their axes.
        around = (module[:depth] for depth in range(len(module) + 1))
        axes = max(
            (stacked[x] for x in around if len(within[x]) > len(mine)), default=0
        )
        kept = _norms_of_module(
            {name: x.shape for name, x in mine.items()},
            axes,
            is_leaf=len(within[module]) == len(mine),
            called_norm=is_called_norm(module),
        )
        paths |= {mine[name].path for name in kept}
    return paths


def _norms_of_module(
    shapes: dict[str, tuple[int, ...]], axes: int, is_leaf: bool, called_norm: bool
) -> set[str]:
    """The names of those of a module's own params that belong to a norm.

    Args:
      shapes: of its own params.
      axes: along which layers are stacked.
      is_leaf: whether it has no submodules with params.
      called_norm: whether its name says that it is a norm.
    """
    names = set(shapes)
    has_norms_names = names == {"scale", "bias"} or (called_norm and names == {"scale"})
    if is_leaf and has_norms_names and len(set(shapes.values())) == 1:
        return names
    called_norm = called_norm and not names & _MATRICES
    kept = set()
    for name, shape in shapes.items():
        # WeightNorm's gains have the paths of what they scale: "Dense_0/kernel/scale".
        is_gain = name.split("/")[-1] == "scale"
        if len(shape) <= 1 + axes and (is_gain or called_norm or _NORM.search(name)):
            kept.add(name)
    if "scale" in kept and shapes.get("bias") == shapes["scale"]:
        kept.add("bias")
    return kept


def _stacked_axes(params: list[_Param]) -> int:
    """How many axes of all of a module's params are those of a stack of layers.

    They have one size in all params, wherever they are, and each layer has the axes
    that its params' names promise, and a matrix: a scope of vectors alone would pass
    for a stack of scalars.
    """
    ranks = [len(x.shape) for x in params]
    sizes = ({x.shape[axis] for x in params} for axis in range(min(ranks)))
    shared = sum(len(x) == 1 for x in sizes)
    spare = min(len(x.shape) - _LEAST_RANK.get(x.name, 0) for x in params)
    return max(0, min(shared, spare, max(ranks) - 2))
