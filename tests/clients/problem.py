"""What all clients train: a small regression, on meshes of eight CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

N_IN, HIDDEN, N_OUT = 64, 256, 64
NAMES = {
    "up": {"kernel": ("fsdp", "tp"), "bias": ("tp",)},
    "down": {"kernel": ("tp", "fsdp"), "bias": ("fsdp",)},
}
"""Beside each param, along which axes of a mesh its own axes lie."""

_random = np.random.default_rng(0)
X = _random.normal(size=(32, N_IN)).astype(np.float32)
Y = np.tanh(X @ _random.normal(size=(N_IN, N_OUT)).astype(np.float32) / 8)


def mesh(fsdp=4, tp=2):
    """A mesh whose axes are named, of eight devices."""
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), (AxisType.Auto,) * 2)


def weights():
    """Plain params, for clients that make none of their own."""
    random = np.random.default_rng(1)

    def layer(n_in, n_out):
        kernel = random.normal(size=(n_in, n_out)) / n_in**0.5
        return {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.zeros(n_out),
        }

    return {"up": layer(N_IN, HIDDEN), "down": layer(HIDDEN, N_OUT)}


def predict(params, x):
    up, down = params["up"], params["down"]
    hidden = jax.nn.gelu(x @ up["kernel"] + up["bias"])
    return hidden @ down["kernel"] + down["bias"]


def error(y):
    return jnp.mean((y - Y) ** 2)


def whole(params):
    """Params gathered on every device, as FSDP gathers them for a layer.

    The batch is on every device, too: sums are the same on all meshes, to the last bit,
    and what differs is the optimizer's.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), params)


def loss(params):
    return error(predict(whole(params), X))


def difference(ours, stock, start):
    """How far two runs from one start have come apart, as a share of the way."""
    ours, stock, start = (
        jax.tree.map(lambda x: np.asarray(x, np.float32), jax.tree.leaves(tree))
        for tree in (ours, stock, start)
    )
    apart = optax.tree.norm(jax.tree.map(np.subtract, ours, stock))
    way = optax.tree.norm(jax.tree.map(np.subtract, stock, start))
    return float(apart / way)


def wait(tree):
    """Until the arrays are there, and returns them.

    Programs on eight virtual devices, two of them under way, may each wait for threads
    that the other holds.
    """
    return jax.block_until_ready(tree)


def check_close(client, ours, stock, start, at_most):
    """Prints the figure, which ``pytest -s`` shows."""
    found = difference(ours, stock, start)
    print(f"\n{client}: {found:.3f} of the way of stock optax from it")
    assert found < at_most, client


def check_equal(tree, other):
    """The same leaves, to the last bit, wherever they are."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    rows = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True)
    for (path, x), y in rows:
        x, y = np.asarray(x), np.asarray(y)
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert x.tobytes() == y.tobytes(), name


def shard_shape(x):
    """The shape that each of a leaf's shards has; None where they differ."""
    (shape,) = {shard.data.shape for shard in x.addressable_shards}
    return shape


def check_shards(name, x, shape):
    assert shard_shape(x) == shape, (name, x.sharding)
    assert len(x.sharding.device_set) == 8, (name, x.sharding)


def abstract(tree, sharding):
    """What orbax takes as target, so that leaves are read onto the devices they are of.

    Args:
      tree: of arrays or their shapes.
      sharding: a tree like it.
    """

    def described(x, s):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    return jax.tree.map(described, tree, sharding)


def save(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", tree)


def restore(folder, target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoint", target)
