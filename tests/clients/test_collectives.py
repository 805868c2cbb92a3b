"""A sharded step has no collective that stock optax's has not."""

import collections
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optax_flash
from tests.clients import problem

pytestmark = pytest.mark.usefixtures("quick_compile")
COLLECTIVE = re.compile(
    r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


class Model(nnx.Module):
    """Two layers whose shards hold whole groups of codes."""

    def __init__(self):
        rngs = nnx.Rngs(0)

        def linear(n_in, n_out, names):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
            bias_init = nnx.with_partitioning(nnx.initializers.zeros_init(), names[1:])
            return nnx.Linear(
                n_in, n_out, kernel_init=init, bias_init=bias_init, rngs=rngs
            )

        self.up = linear(problem.N_IN, 256, ("fsdp", "tp"))
        self.down = linear(256, 128, ("tp", "fsdp"))


@nnx.jit
def step(model, optimizer):
    def loss(model):
        return jnp.mean(model.down(jax.nn.gelu(model.up(problem.X))) ** 2)

    optimizer.update(model, nnx.grad(loss)(model))


def collectives(tx):
    """How often each collective of each type of array is in the compiled step."""
    with jax.set_mesh(problem.mesh()):
        model = Model()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        text = step.lower(model, optimizer).compile().as_text()
    found = [
        (operation, re.sub(r"\{[\d,]*\}", "", kind))
        for kind, operation in COLLECTIVE.findall(text)
    ]
    return collections.Counter(found)


@pytest.mark.parametrize(
    "make, make_stock",
    [
        (optax_flash.adamw8, optax.adamw),
        pytest.param(optax_flash.adamw4, optax.adamw, marks=pytest.mark.full),
        pytest.param(optax_flash.lion8, optax.lion, marks=pytest.mark.full),
        (lambda rate: optax_flash.sgd8(rate, 0.9), lambda rate: optax.sgd(rate, 0.9)),
    ],
    ids=["adamw8", "adamw4", "lion8", "sgd8"],
)
def test_no_collective_that_stock_has_not(make, make_stock):
    stock, ours = collectives(make_stock(1e-3)), collectives(make(1e-3))
    print(dict(ours))
    # The step that is compared does have some, of gradients and activations.
    assert stock
    assert not ours - stock
