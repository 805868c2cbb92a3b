"""Train states for Flax: half-precision params under split master weights."""

try:
    import flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        'flax is not installed: pip install "optax_flash[flax]".'
    ) from error

from optax_flash.flax.linen import TrainState as TrainState
from optax_flash.flax.nnx import Optimizer as Optimizer
from optax_flash.flax.norms import is_norm as is_norm
from optax_flash.flax.norms import norm_paths as norm_paths
