"""Our nnx Optimizer over params that are plain arrays, and over a single param."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_flash
from optax_flash.flax import Optimizer


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Two(nnx.Module):
    def __init__(self, wrap):
        self.w = wrap(normal(0, 64, 64))
        self.b = wrap(normal(1, 64))
        self.name = "not a param"

    def __call__(self, x):
        return jnp.asarray(x @ jnp.asarray(self.w) + self.b, jnp.float32)


class One(nnx.Module):
    def __init__(self, wrap):
        self.w = wrap(normal(0, 64, 64))

    def __call__(self, x):
        return jnp.asarray(x @ jnp.asarray(self.w), jnp.float32)


def is_array(path, x):
    return isinstance(x, jax.Array)


KINDS = {"arrays": (nnx.data, is_array), "params": (nnx.Param, nnx.Param)}


def train(model, optimizer, wrt, transform):
    def loss(model):
        return jnp.mean((model(normal(2, 16, 64)) - 1) ** 2)

    @transform
    def step(model, optimizer):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    return nnx.to_pure_dict(nnx.as_pure(nnx.state(model, wrt)))


@pytest.mark.parametrize("transform", [nnx.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("wrap, wrt", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("make", [One, Two])
def test_as_flax_does(make, wrap, wrt, transform):
    """Without codes and in float32 they are Flax's own steps."""
    model = make(wrap)
    stock = nnx.Optimizer(model, optax.adamw(1e-2), wrt=wrt)
    expected = train(model, stock, wrt, transform)
    model = make(wrap)
    tx = optax_flash.compress(optax.adamw(1e-2), min_size=10**6)
    ours = Optimizer(model, tx, wrt=wrt, param_dtype=jnp.float32)
    found = train(model, ours, wrt, transform)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [One, Two])
def test_arrays_and_params_are_trained_alike(make):
    runs = []
    for wrap, wrt in KINDS.values():
        model = make(wrap)
        ours = Optimizer(model, optax_flash.adamw8(1e-2), wrt=wrt, keep_float32=None)
        found = train(model, ours, wrt, nnx.jit)
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
        assert not ours.kept_float32(model)
        weights = nnx.to_pure_dict(ours.fp32_params(model))
        mu = optax.tree.get(nnx.as_pure(ours.opt_state), "mu")
        assert nnx.to_pure_dict(mu)["w"].dtype == jnp.uint8
        runs.append((found, weights, nnx.to_pure_dict(mu)))
    chex.assert_trees_all_equal(*runs)
