"""One file and one row make a backend."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_flash
from optax_flash.fusion import backends
from tests.fusion import toy_backend


@pytest.fixture(name="toy", autouse=True)
def toy_fixture(monkeypatch):
    row = backends.Backend(
        "toy", "tests.fusion.toy_backend", ("cpu",), by_name_only=True
    )
    monkeypatch.setattr(backends, "TABLE", (*backends.TABLE, row))
    toy_backend.seen.clear()


def stepped(implementation, params):
    tx = optax_flash.compress(optax.adamw(1e-2), implementation=implementation)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_it_runs_where_it_is_asked_for():
    params = {"kernel": jnp.linspace(-1.0, 1.0, 96 * 64).reshape(96, 64)}
    ours = stepped("toy", params)
    assert toy_backend.seen == [("cpu", [(96, 64)])]
    stock = stepped("xla", params)
    # The last bit may differ: compilers fuse them in other ways.
    np.testing.assert_allclose(ours["kernel"], stock["kernel"], rtol=1e-6)


def test_each_device_runs_it_on_its_own_shard():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = jnp.linspace(-1.0, 1.0, 96 * 64).reshape(96, 64)
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    stepped("toy", {"kernel": jax.device_put(kernel, sharding)})
    assert ("cpu", [(12, 64)]) in toy_backend.seen


def test_what_it_cannot_run_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="'w': an array is reshaped"):
        tx = optax_flash.compress(optax.contrib.muon(1e-3), implementation="toy")
        params = {"w": jnp.ones((64, 64))}
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_elsewhere_it_is_an_error_that_says_where():
    params = jnp.ones((64, 64))
    tx = optax_flash.compress(optax.adamw(1e-2), implementation="toy")
    traced = jax.jit(tx.update).trace(params, tx.init(params), params)
    with pytest.raises(ValueError, match="'toy' needs a CPU.* compiled for tpu"):
        traced.lower(lowering_platforms=("tpu",))
    (path,) = optax_flash.explain(tx, params, platform="tpu").paths
    assert path.implementation == "toy" and "raises: " in path.reason
