"""``Optimizer`` for Flax nnx."""

from typing import Any, Generic, TypeVar

import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from optax_flash.flax.precision import KeepFloat32, is_norm
from optax_flash.transforms.master_weights import (
    cast_params,
    master_params,
    master_weights,
    set_master_params,
)

M = TypeVar("M", bound=nnx.Module)


class Optimizer(nnx.Optimizer[M], Generic[M]):
    """``flax.nnx.Optimizer`` for a model with params in half precision.

    The constructor casts the model's params in place, wraps ``tx`` in
    :func:`optax_flash.master_weights` with finished params, and keeps the lower bits of
    the weights that it found. ``update`` is Flax's own.

    Example:
      >>> import jax.numpy as jnp, optax_flash
      >>> from flax import nnx
      >>> from optax_flash.flax import Optimizer
      >>> model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, optax_flash.adamw8(1e-3), wrt=nnx.Param)
      >>> loss = lambda model: jnp.mean(model(jnp.ones((8, 64))) ** 2)
      >>> _ = optimizer.update(model, nnx.grad(loss)(model))
      >>> model.kernel[...].dtype.name
      'bfloat16'
      >>> optimizer.fp32_params(model)["kernel"].dtype.name
      'float32'
    """

    def __init__(
        self,
        model: M,
        tx: optax.GradientTransformation,
        *,
        wrt: Any = nnx.Param,
        param_dtype: DTypeLike = jnp.bfloat16,
        bits: int = 24,
        keep_float32: KeepFloat32 | None = is_norm,
    ):
        """Casts the model's params and makes their optimizer state.

        Args:
          model: its params are replaced by their half-precision values.
          tx: the transformation, without ``master_weights``; its updates are applied
            to float32 weights.
          wrt: the filter for what is trained.
          param_dtype: of the params: bfloat16 or float16; float32 casts nothing.
          bits: of param and residual together: 24 or 32.
          keep_float32: ``(path, param) -> bool`` for params that stay float32, norms
            by default; None for none.
        """
        weights = nnx.as_pure(nnx.state(model, wrt))
        half = cast_params(weights, param_dtype, keep_float32)
        nnx.update(model, half)
        super().__init__(model, master_weights(tx, bits, finished=True), wrt=wrt)
        state = set_master_params(nnx.as_pure(self.opt_state), half, weights)
        nnx.update(self.opt_state, nnx.state(state))

    def fp32_params(self, model: M) -> optax.Params:
        """The model's float32 weights, for evaluation and export."""
        params = nnx.as_pure(nnx.state(model, self.wrt))
        return master_params(params, nnx.as_pure(self.opt_state))
