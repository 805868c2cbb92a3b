"""The train state of an nnx model: the model and its optimizer, as one pytree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_flash.flax
from examples.common.config import Config
from examples.common.states import is_split, optimizer_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """A model and its optimizer, which jitted functions take and return whole.

    Their variables are the pytree's leaves. Inside of a jitted function they can be
    changed in place, as nnx does; nothing outside sees it, but in what is returned.
    """

    model: nnx.Module
    optimizer: nnx.Optimizer

    @property
    def params(self) -> optax.Params:
        return nnx.as_pure(nnx.state(self.model, nnx.Param))

    @property
    def opt_state(self) -> optax.OptState:
        return nnx.as_pure(self.optimizer.opt_state)

    @property
    def tx(self) -> optax.GradientTransformation:
        return self.optimizer.tx


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SplitState(State):
    """A state whose weights are half-precision params and a residual."""

    optimizer: optax_flash.flax.Optimizer

    def fp32_params(self) -> optax.Params:
        """The float32 weights, for evaluation and export."""
        return self.optimizer.fp32_params(self.model)


def create_state(config: Config, model: nnx.Module) -> State:
    """The state before the first step, with the weights stored as the options ask.

    Args:
      config: the options.
      model: with float32 weights, which the state takes over.
    """
    tx, dtype = optimizer_of(config), jnp.dtype(config.param_dtype)

    @functools.partial(jax.jit, donate_argnums=0)
    def create(model) -> State:
        if is_split(config):
            optimizer = optax_flash.flax.Optimizer(
                model,
                tx,
                wrt=nnx.Param,
                param_dtype=dtype,
                bits=config.master_bits,
                codec=config.residual,
            )
            return SplitState(model, optimizer)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        norms = frozenset(optax_flash.flax.norm_paths(model))
        params = optax_flash.cast_params(params, dtype, lambda path, _: path in norms)
        nnx.update(model, params)
        return State(model, nnx.Optimizer(model, tx, wrt=nnx.Param))

    return create(model)
