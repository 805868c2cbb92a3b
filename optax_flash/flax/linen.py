"""``TrainState`` for Flax linen."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from flax.training import train_state
from jax.typing import DTypeLike

from optax_flash.flax.precision import KeepFloat32, is_norm, with_master_weights
from optax_flash.release import Sequence, train_step
from optax_flash.sharding import tree_sharding
from optax_flash.transforms.master_weights import (
    cast_params,
    master_params,
    set_master_params,
)


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` with params in half precision.

    ``create`` casts the params, wraps ``tx`` in :func:`optax_flash.master_weights`, and
    keeps the lower bits of the weights that it is given. All else is Flax's own:
    ``apply_gradients``, ``replace``, further fields in subclasses.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax_flash
      >>> from optax_flash.flax import TrainState
      >>> model = nn.Dense(64)
      >>> x = jnp.ones((8, 64))
      >>> state = TrainState.create(
      ...     apply_fn=model.apply,
      ...     params=model.init(jax.random.key(0), x)["params"],
      ...     tx=optax_flash.adamw8(1e-3),
      ... )
      >>> loss = lambda p: jnp.mean(state.apply_fn({"params": p}, x) ** 2)
      >>> state = state.apply_gradients(grads=jax.grad(loss)(state.params))
      >>> state.params["kernel"].dtype.name, state.fp32_params()["kernel"].dtype.name
      ('bfloat16', 'float32')
    """

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: optax.Params,
        tx: optax.GradientTransformation,
        param_dtype: DTypeLike = jnp.bfloat16,
        bits: int = 24,
        codec: str = "exact",
        keep_float32: KeepFloat32 | None = is_norm,
        **kwargs: Any,
    ) -> "TrainState":
        """A state at step 0.

        Args:
          apply_fn: usually ``model.apply``.
          params: float32 weights.
          tx: the transformation, without ``master_weights``; its updates are applied
            to float32 weights.
          param_dtype: of the params: bfloat16 or float16; float32 casts nothing.
          bits: of param and residual together: 24 or 32.
          codec: of the residual: "exact", or "flashoptim" for the published format.
          keep_float32: ``(path, param) -> bool`` for params that stay float32, norms
            by default; None for none.
          **kwargs: fields that a subclass adds.
        """
        half = cast_params(params, param_dtype, keep_float32)
        state = super().create(
            apply_fn=apply_fn,
            params=half,
            tx=with_master_weights(tx, bits, codec),
            **kwargs,
        )
        opt_state = set_master_params(state.opt_state, half, params)
        return state.replace(opt_state=opt_state)

    def release_gradients(
        self,
        model: Sequence,
        *batch: Any,
        per_layer: optax.GradientTransformation | None = None,
    ) -> tuple[Any, "TrainState"]:
        """A step in which no gradient outlives its layer.

        In the place of ``jax.grad`` and ``apply_gradients``; see
        :func:`optax_flash.release.train_step`.

        Args:
          model: of :func:`optax_flash.release.sequence`.
          *batch: what its functions take.
          per_layer: what each layer's gradients go through first, such as clipping.

        Returns:
          ``(loss, state)``.
        """
        step = train_step(model, self.tx, per_layer=per_layer)
        loss, params, opt_state = step(self.params, self.opt_state, *batch)
        return loss, self.replace(
            step=self.step + 1, params=params, opt_state=opt_state
        )

    def state_sharding(self, param_sharding: Any = None) -> "TrainState":
        """The sharding of every array: of params, of their optimizer state, of others.

        Shapes are enough, so a state can be made where it belongs:
        ``abstract = jax.eval_shape(create, key)``, then ``jax.jit(create,
        out_shardings=abstract.state_sharding(...))(key)``.

        Args:
          param_sharding: as in :func:`optax_flash.state_sharding`. For params with
            partitioning metadata ``nn.get_sharding(abstract.params, mesh)``, or
            ``nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract.params), mesh,
            rules)``.

        Returns:
          A state of NamedShardings. What mirrors no params, such as batch statistics,
          is replicated.

        Raises:
          ValueError: as :func:`optax_flash.state_sharding` does.
        """
        return tree_sharding(self, self.tx, self.params, param_sharding)

    def fp32_params(self) -> optax.Params:
        """The float32 weights, for evaluation and export."""
        return master_params(self.params, self.opt_state)
