"""Finished updates where others compute with updates: the error says what to pass."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from optax_flash.transforms.finished import REFUSED, FinishedParam

TARGET = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)


def update():
    old = jnp.zeros((2, 3))
    return FinishedParam(jnp.ones((2, 3)), "mlp/w", old), old


def test_every_operator_of_an_array_is_refused_but_the_one_that_applies():
    """Python's protocols of classes, objects and pickling are no arithmetic."""
    other = set(dir(object)) | {"__hash__", "__class__", "__module__", "__slots__"}
    compared = {f"__{x}__" for x in ("eq", "ne", "lt", "le", "gt", "ge")}
    array = {
        x
        for cls in (jax.Array, np.ndarray)
        for x in dir(cls)
        if x.startswith("__") and callable(getattr(cls, x))
    }
    # How NumPy and JAX meet other kinds of arrays, and what changes one in place.
    other |= {x for x in array if x.startswith(("__array_", "__jax_", "__dlpack"))}
    other |= {f"__{x}__" for x in ("copy deepcopy buffer class_getitem").split()}
    other |= {"__annotate_func__", "__annotate__", "__instancecheck__", "__await__"}
    other |= {x for x in array if x.startswith("__i") and f"__{x[3:]}" in array}
    other |= {"__setitem__", "__delitem__", "__contains__", "__setstate__"}
    assert (array - (other - compared)) - {"__radd__"} <= set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_operation_the_leaf_and_what_to_do(name):
    finished, old = update()
    arguments = [old] if name not in ("__abs__", "__neg__") else []
    message = f"^{name.strip('_')}: .*'mlp/w'.*finished=False"
    with pytest.raises(TypeError, match=message):
        getattr(finished, name)(*arguments)


@pytest.mark.parametrize(
    "compute",
    [
        abs,
        operator.neg,
        jnp.abs,
        jnp.linalg.norm,
        np.abs,
        np.asarray,
        lambda x: x.astype("float32"),
        lambda x: x * 2.0,
        lambda x: 2.0 * x,
        lambda x: jax.tree.map(lambda u: u - 1, x),
        optax.tree.norm,
    ],
)
def test_whoever_computes_hears_of_additive_updates(compute):
    finished, _ = update()
    with pytest.raises(TypeError, match="finished=False"):
        compute(finished)


class TestOptimistix:
    """Its OptaxMinimiser takes the size of an update to know when to stop."""

    def minimise(self, tx):
        optimistix = pytest.importorskip("optimistix")
        solver = optimistix.OptaxMinimiser(tx, rtol=1e-3, atol=1e-3)

        def loss(params, args):
            return jnp.sum((params["w"] - args) ** 2)

        return optimistix.minimise(
            loss,
            solver,
            {"w": jnp.zeros((64, 128))},
            args=jnp.asarray(TARGET),
            max_steps=200,
            throw=False,
        ).value["w"]

    def test_finished_updates(self):
        tx = optax_flash.master_weights(optax_flash.adamw8(1e-1))
        with pytest.raises(TypeError, match="OptaxMinimiser.*finished=False"):
            self.minimise(tx)

    def test_additive_updates(self):
        inner = optax_flash.adamw8(1e-1, weight_decay=0.0)
        found = self.minimise(optax_flash.master_weights(inner, finished=False))
        stock = self.minimise(optax.adam(1e-1))
        assert np.max(np.abs(stock - TARGET)) < 0.05
        assert np.max(np.abs(found - TARGET)) < 0.05
