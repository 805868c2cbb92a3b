"""Train states that store their weights as the options say."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

import optax_flash.flax
from examples.common.config import Config
from examples.common.optimizers import make_optimizer


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """The optimizer that the options name, under their schedule."""
    return make_optimizer(
        config.optimizer,
        steps=config.steps,
        warmup=config.warmup,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        clip=config.clip,
    )


def is_split(config: Config) -> bool:
    """Whether weights are half-precision params and a residual."""
    return config.param_dtype != "float32" and config.master_bits is not None


def create_state(
    config: Config, apply_fn: Callable[..., Any], weights: optax.Params, **fields: Any
) -> train_state.TrainState:
    """The state before the first step, with the weights stored as the options ask.

    Args:
      config: the options.
      apply_fn: the model's.
      weights: its first ones, float32.
      **fields: those that a subclass adds.
    """
    tx, dtype = optimizer_of(config), jnp.dtype(config.param_dtype)
    if is_split(config):
        return optax_flash.flax.TrainState.create(
            apply_fn=apply_fn,
            params=weights,
            tx=tx,
            param_dtype=dtype,
            bits=config.master_bits,
            codec=config.residual,
            **fields,
        )
    norms = frozenset(optax_flash.flax.norm_paths(weights))
    params = optax_flash.cast_params(weights, dtype, lambda path, _: path in norms)
    return train_state.TrainState.create(
        apply_fn=apply_fn, params=params, tx=tx, **fields
    )


def full_weights(state) -> optax.Params:
    """The weights at full precision: the split ones joined, any others as they are."""
    split = hasattr(state, "fp32_params")
    return state.fp32_params() if split else state.params


def count_params(params: optax.Params) -> int:
    return sum(p.size for p in jax.tree.leaves(params))
