"""What both train states do: params in half precision, but norms, and their rest."""

import functools
import re
from collections.abc import Callable

import jax
import optax

from optax_flash.transforms.master_weights import master_weights

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
