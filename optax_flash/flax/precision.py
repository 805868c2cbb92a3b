"""What both train states do: params in half precision except norms, and their rest."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from flax import nnx
from jax.typing import DTypeLike

from optax_flash.flax.norms import norm_paths
from optax_flash.transforms import _frozen, _mirror
from optax_flash.transforms.master_weights import cast_params, master_weights

KeepFloat32 = Callable[[str, jax.Array], bool] | Literal["norms"] | None


def kept_by(
    keep_float32: KeepFloat32, params: Any, wrt: Any = nnx.Param
) -> Callable[[str, jax.Array], bool] | None:
    """``keep_float32`` as :func:`optax_flash.cast_params` takes it.

    Args:
      keep_float32: of a train state.
      params: an nnx model, or a tree of params.
      wrt: the filter for the params of an nnx model.

    Raises:
      ValueError: another string than "norms".
    """
    if keep_float32 is None or callable(keep_float32):
        return keep_float32
    if keep_float32 != "norms":
        raise ValueError(
            f'keep_float32 is {keep_float32!r}; give "norms", a function '
            "(path, param) -> bool, or None."
        )
    norms = frozenset(norm_paths(params, wrt))
    return lambda path, _: path in norms


def float32_paths(params: optax.Params) -> list[str]:
    """The sorted paths of float32 params."""
    rows = zip(_mirror.leaf_paths(params), jax.tree.leaves(params), strict=True)
    return sorted(path for path, p in rows if getattr(p, "dtype", None) == "float32")


def cast_trained(
    tx: optax.GradientTransformation,
    params: optax.Params,
    dtype: DTypeLike,
    keep_float32: Callable[[str, jax.Array], bool] | None,
) -> optax.Params:
    """:func:`optax_flash.cast_params` for the params that the transformation moves.

    The lower bits of a param that is cast are kept in its residual, and frozen params
    have none.
    """
    frozen = _frozen.frozen_paths(tx, params)

    def keep(path: str, param: jax.Array) -> bool:
        return path in frozen or bool(keep_float32 and keep_float32(path, param))

    return cast_params(params, dtype, keep)


@functools.lru_cache(maxsize=1024)
def with_master_weights(
    tx: optax.GradientTransformation, bits: int, codec: str = "exact"
) -> optax.GradientTransformationExtraArgs:
    """``master_weights``, the same one whenever it is asked for.

    A transformation is a part of a train state's structure, and states that are made
    from one ``tx`` must have one structure: that of a state's shapes or shardings, say,
    and that of the state.
    """
    return master_weights(tx, bits, codec=codec)
