"""``Optimizer`` for Flax nnx."""

from typing import Any, Generic, TypeVar

import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from optax_flash.flax.gradients import placed
from optax_flash.flax.precision import (
    KeepFloat32,
    cast_trained,
    float32_paths,
    kept_by,
    with_master_weights,
)
from optax_flash.transforms import _arguments
from optax_flash.transforms.master_weights import master_params, set_master_params

M = TypeVar("M", bound=nnx.Module)


class Optimizer(nnx.Optimizer[M], Generic[M]):
    """``flax.nnx.Optimizer`` for a model with params in half precision.

    The constructor casts the model's params in place, wraps ``tx`` in
    :func:`optax_flash.master_weights`, and keeps the lower bits of the weights that it
    found. ``update`` is Flax's own, but that gradients are moved to where the sharding
    names of their params say, before they meet the state.

    Sharding names of the model's params pass to their state, where they fit: made under
    ``jax.set_mesh``, also inside ``nnx.jit``, the state is sharded like the model, and
    ``nnx.get_named_sharding(nnx.state(optimizer), mesh)`` tells how.

    What ``wrt`` does not select stays as it is. So do params that ``tx`` freezes
    (``optax.set_to_zero`` under ``optax.partition`` or ``optax.masked``): they stay in
    the dtype in which they are found, and have no residual.

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
        codec: str = "exact",
        keep_float32: KeepFloat32 = "norms",
    ):
        """Casts the model's params and makes their optimizer state.

        Args:
          model: its params are replaced by their half-precision values.
          tx: the transformation, without ``master_weights``; its updates are applied
            to float32 weights.
          wrt: the filter for what is trained.
          param_dtype: of the params: bfloat16 or float16; float32 casts nothing.
          bits: of param and residual together: 24 or 32.
          codec: of the residual: "exact", or "flashoptim" for the published format.
          keep_float32: "norms" for those of :func:`optax_flash.flax.norm_paths`;
            ``(path, param) -> bool``, which decides instead; or None for none.
            ``kept_float32`` lists what it kept.

        Raises:
          ValueError: ``keep_float32`` is another string.
        """
        _arguments.check_transformation(tx, (model,), "Optimizer(model, tx, wrt=...)")
        weights = nnx.as_pure(nnx.state(model, wrt))
        kept = kept_by(keep_float32, model, wrt)
        half = cast_trained(tx, weights, param_dtype, kept)
        nnx.update(model, half)
        super().__init__(model, with_master_weights(tx, bits, codec), wrt=wrt)
        state = set_master_params(nnx.as_pure(self.opt_state), half, weights)
        nnx.update(self.opt_state, nnx.state(state))

    def update(self, model: M, /, *grads: Any, **kwargs: Any) -> Any:
        """Flax's own, see ``nnx.Optimizer.update``.

        Args:
          model: whose params are updated in place.
          *grads: the gradients, one tree.
          **kwargs: further arguments of ``tx.update``.
        """
        if len(grads) == 1:
            grads = (placed(grads[0], nnx.state(model, self.wrt)),)
        return super().update(model, *grads, **kwargs)

    def kept_float32(self, model: M) -> list[str]:
        """The sorted paths of the model's trained params that are stored in float32.

        Example:
          >>> import optax_flash
          >>> from flax import nnx
          >>> from optax_flash.flax import Optimizer
          >>> rngs = nnx.Rngs(0)
          >>> n1, up = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 32, rngs=rngs)
          >>> model = nnx.Sequential(n1, up)
          >>> optimizer = Optimizer(model, optax_flash.adamw8(1e-3), wrt=nnx.Param)
          >>> optimizer.kept_float32(model)
          ['layers/0/bias', 'layers/0/scale']
        """
        return float32_paths(nnx.as_pure(nnx.state(model, self.wrt)))

    def fp32_params(self, model: M) -> optax.Params:
        """The model's float32 weights, for evaluation and export."""
        params = nnx.as_pure(nnx.state(model, self.wrt))
        return master_params(nnx.as_pure(self.opt_state), params)
