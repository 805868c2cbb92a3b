"""Params in boxes whose states have other boxes: the numbers are those of arrays.

A state's box has those names of its param's that fit its own array, and one of nnx says
so beside them. JAX then takes the two boxes for different nodes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash import release
from optax_flash.transforms import _boxes
from tests.clients import problem

pytestmark = pytest.mark.usefixtures("quick_compile")

NAMES = ("fsdp", "tp")


def weights(rows=64, columns=256, dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = {"kernel": (rows, columns), "bias": (columns,)}
    return {k: jnp.asarray(random.normal(size=s), dtype) for k, s in shapes.items()}


def linen(arrays):
    return arrays | {"kernel": nn.Partitioned(arrays["kernel"], NAMES)}


def out_of_linen(params):
    # Not nn.meta.unbox, which constrains sharding and refuses what does not divide.
    return params | {"kernel": params["kernel"].value}


def variables(arrays):
    names = {"kernel": NAMES, "bias": NAMES[1:]}
    return nnx.State(
        {k: nnx.Param(x, out_sharding=names[k]) for k, x in arrays.items()}
    )


@pytest.fixture(name="mesh")
def mesh_fixture():
    mesh = problem.mesh()
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(
    name="case",
    params=[
        (linen, out_of_linen, 64, 256),
        (linen, out_of_linen, 66, 258),
        (variables, nnx.as_pure, 64, 256),
    ],
    ids=["linen", "does not divide", "nnx"],
)
def case_fixture(request, mesh):
    """Makes params of a dtype in boxes, and as Flax takes them out."""
    del mesh
    box, take_out, rows, columns = request.param

    def make(dtype=jnp.float32):
        boxed = box(weights(rows, columns, dtype))
        return take_out(boxed), boxed

    return make


def check_same(boxed, arrays):
    found, expected = jax.tree.leaves(boxed), jax.tree.leaves(arrays)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(
    "tx",
    [
        optax_flash.adamw8(1e-3),
        optax_flash.lora_pre_adamw(1e-3, rank=16),
        optax_flash.lowrank_adamw(1e-3, rank=16),
        optax_flash.master_weights(optax_flash.adamw8(1e-3)),
        optax.adamw(1e-3),
    ],
    ids=["adamw8", "lora_pre_adamw", "lowrank_adamw", "master_weights", "stock"],
)
def test_memory_report(case, tx):
    arrays, boxed = case(jnp.bfloat16)
    report = optax_flash.memory_report(tx, boxed)
    assert report == optax_flash.memory_report(tx, arrays)
    counts = [n for row in report.rows for n in row.component_bytes.values()]
    assert min(counts) >= 0
    held = sum(x.nbytes for x in jax.tree.leaves((arrays, arrays, tx.init(arrays))))
    assert sum(counts) == held


def test_master_weights(case):
    exact, exact_boxed = case()
    arrays, boxed = case(jnp.bfloat16)
    tx = optax_flash.master_weights(
        optax_flash.adamw8(1e-3), bits=32, track_params=True
    )
    state = optax_flash.set_master_params(tx.init(boxed), boxed, exact_boxed)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(boxed))
    found = optax_flash.master_params(state, boxed)
    assert jax.tree.structure(found) == jax.tree.structure(boxed)
    check_same(found, exact)
    moved = jax.tree.map(lambda p: 2 * p, boxed)
    assert optax_flash.changed_params(state, boxed) == []
    assert optax_flash.changed_params(state, moved) == ["bias", "kernel"]


def test_numerics_report(case):
    arrays, boxed = case(jnp.bfloat16)
    tx = optax_flash.master_weights(optax_flash.adamw8(1e-3))
    found, expected = (
        optax_flash.numerics_report(tx, tx.init(p), p, p) for p in (boxed, arrays)
    )
    assert str(found) == str(expected)


@pytest.mark.parametrize("half", [False, True])
def test_conversion(case, half):
    """To stock optax, which goes on with it, and back."""
    dtype = jnp.bfloat16 if half else jnp.float32
    arrays, boxed = case(dtype)
    tx = optax_flash.adamw8(1e-3)
    tx = optax_flash.master_weights(tx) if half else tx
    stock = optax.adamw(1e-3)
    exact, stock_state = optax_flash.to_optax_state(tx, tx.init(boxed), boxed)
    assert jax.tree.structure(stock_state) == jax.tree.structure(stock.init(boxed))
    updates, stock_state = stock.update(exact, stock_state, exact)
    plain = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    expected = stock.update(plain, stock.init(plain), plain)
    check_same((updates, stock_state), expected)

    params, state = optax_flash.from_optax_state(tx, stock_state, exact, like=boxed)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(boxed))
    _, expected = optax_flash.from_optax_state(tx, expected[1], plain, like=arrays)
    check_same(params, arrays)
    check_same(state, expected)


def test_derivatives_through_updates(case):
    arrays, boxed = case()
    tx = optax_flash.adamw8(1e-3)

    def moved(params):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    check_same(jax.grad(moved)(boxed), jax.grad(moved)(arrays))


def test_labels_in_boxes(case, mesh):
    """A tree of labels that was made from params is in their boxes."""
    arrays, boxed = case()
    sharding = NamedSharding(mesh, P())

    def results(params):
        labels = jax.tree.map(lambda p: "ab"[p.ndim - 1], params)
        groups: Any = {"a": optax.sgd(0.1), "b": optax_flash.adamw8(1e-3)}
        tx = optax.partition(groups, labels)
        shardings = optax_flash.state_sharding(tx, params, sharding)
        updates, state = tx.update(params, tx.init(params), params)
        return jax.tree.leaves(shardings), updates, state

    found, expected = results(boxed), results(arrays)
    assert found[0] == expected[0]
    check_same(found[1:], expected[1:])


def test_release(case):
    """The state's arrays are those of a layer, whatever their boxes say."""
    arrays, boxed = case()
    model = release.sequence(
        release.layer("kernel", lambda p, x: x @ _boxes.unboxed(p)),
        release.layer("bias", lambda p, x, _: jnp.mean((x + _boxes.unboxed(p)) ** 2)),
    )
    tx = optax_flash.adamw8(1e-3)
    x = jnp.ones((8, arrays["kernel"].shape[0]))

    def step(params):
        return jax.jit(release.train_step(model, tx))(params, tx.init(params), x)

    check_same(step(boxed), step(arrays))
