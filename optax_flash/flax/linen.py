"""``TrainState`` for Flax linen."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jax.typing import DTypeLike

from optax_flash.flax.precision import (
    KeepFloat32,
    cast_trained,
    float32_paths,
    kept_by,
    with_master_weights,
)
from optax_flash.release import Sequence, train_step
from optax_flash.sharding import tree_sharding
from optax_flash.transforms import _arguments, _init
from optax_flash.transforms.master_weights import master_params, set_master_params


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` with params in half precision.

    ``create`` casts the params, wraps ``tx`` in :func:`optax_flash.master_weights`, and
    keeps the lower bits of the weights that it is given. All else is Flax's own:
    ``apply_gradients``, ``replace``, further fields in subclasses, and the collection
    of FP8 layers that gradients overwrite.

    Params that ``tx`` freezes (``optax.set_to_zero`` under ``optax.partition`` or
    ``optax.masked``) stay in the dtype in which they are given, and have no residual.

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
        keep_float32: KeepFloat32 = "norms",
        **kwargs: Any,
    ) -> "TrainState":
        """A state at step 0.

        Args:
          apply_fn: usually ``model.apply``.
          params: float32 weights; of FP8 layers all that ``model.init`` returned, with
            the collections "params" and "_overwrite_with_gradient".
          tx: the transformation, without ``master_weights``; its updates are applied
            to float32 weights.
          param_dtype: of the params: bfloat16 or float16; float32 casts nothing.
          bits: of param and residual together: 24 or 32.
          codec: of the residual: "exact", or "flashoptim" for the published format.
          keep_float32: "norms" for those of :func:`optax_flash.flax.norm_paths`;
            ``(path, param) -> bool``, which decides instead; or None for none.
            ``kept_float32`` lists what it kept.
          **kwargs: fields that a subclass adds.

        Raises:
          ValueError: ``keep_float32`` is another string.
        """
        call = "TrainState.create(apply_fn=..., params=params, tx=tx)"
        _arguments.check_transformation(tx, (params,), call)
        weights = _init.as_arrays(_trained(params))
        kept = kept_by(keep_float32, weights)
        half = cast_trained(tx, weights, param_dtype, kept)
        state = super().create(
            apply_fn=apply_fn,
            params=_with_trained(params, half),
            tx=with_master_weights(tx, bits, codec),
            **kwargs,
        )
        opt_state = set_master_params(state.opt_state, half, weights)
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
        if _overwritten(self.params):
            raise ValueError(
                f"release_gradients: the params have {OVERWRITE_WITH_GRADIENT!r}. Only "
                "apply_gradients takes such params."
            )
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
        given = param_sharding
        if _overwritten(given):
            given = _trained(given)
        sharding = tree_sharding(self, self.tx, _trained(self.params), given)
        if given is param_sharding:
            return sharding
        # The other collection mirrors no params, but may have shardings of its own.
        own = _with_trained(param_sharding, _trained(sharding.params))
        return sharding.replace(params=own)

    def kept_float32(self) -> list[str]:
        """The sorted paths of the params that are stored in float32.

        Example:
          >>> import jax.numpy as jnp, optax_flash
          >>> from optax_flash.flax import TrainState
          >>> norm = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
          >>> dense = {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)}
          >>> params = {"n1": norm, "dense": dense}
          >>> tx = optax_flash.adamw8(1e-3)
          >>> state = TrainState.create(apply_fn=None, params=params, tx=tx)
          >>> state.kept_float32()
          ['n1/bias', 'n1/scale']
        """
        return float32_paths(self.params)

    def fp32_params(self) -> optax.Params:
        """The float32 weights, for evaluation and export; frozen ones as they are.

        A tree like ``params``.
        """
        weights = master_params(self.opt_state, _trained(self.params))
        return _with_trained(self.params, weights)


def _overwritten(params: Any) -> bool:
    """Whether there is a collection that gradients overwrite, as FP8 layers have."""
    return isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params


def _trained(params: Any) -> Any:
    """What the transformation gets of the params."""
    return params["params"] if _overwritten(params) else params


def _with_trained(params: Any, new: Any) -> Any:
    """The params with others in place of those."""
    return {**params, "params": new} if _overwritten(params) else new
