"""What both train states do: params in half precision, but norms, and their rest."""

import functools
import re
from collections.abc import Callable

import jax
import optax
from jax.typing import DTypeLike

from optax_flash.transforms import _frozen
from optax_flash.transforms.master_weights import cast_params, master_weights

KeepFloat32 = Callable[[str, jax.Array], bool]

_NORM = re.compile(
    r"norm|^ln(_|\d|$)|_ln(_|\d|$)|^bn(_|\d|$)|_bn(_|\d|$)", re.IGNORECASE
)


def is_norm(path: str, param: jax.Array) -> bool:
    """Whether a param belongs to a normalisation layer, by its path.

    True where a part of the path has ``norm`` in it or is an ``ln`` or ``bn``, and for
    vectors called ``scale``, the name of Flax's norm gains. Such params are few, and
    sit near 1, where half precision is coarsest against their small steps.

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
    parts = path.split("/")
    gain = parts[-1] == "scale" and param.ndim <= 1
    return gain or any(_NORM.search(part) for part in parts)


def cast_trained(
    tx: optax.GradientTransformation,
    params: optax.Params,
    dtype: DTypeLike,
    keep_float32: KeepFloat32 | None,
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
    """``master_weights`` with finished params, the same one whenever it is asked for.

    A transformation is a part of a train state's structure, and states that are made
    from one ``tx`` must have one structure: that of a state's shapes or shardings, say,
    and that of the state.
    """
    return master_weights(tx, bits, codec=codec, finished=True)
