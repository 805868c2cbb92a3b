"""XLA moves neither params nor state in a step that is sharded by the params' names."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash.flax import Optimizer, TrainState
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")
MOVES = re.compile(
    r"= \(?(\w+)\[[\d,]*\].* (?:all-gather|all-to-all|collective-permute)\("
)
NAMES = (None, "fsdp")
SIGNS = np.random.default_rng(1).normal(size=64 * 256).astype(np.float32)


def sum_of(kernel, signs):
    """Its gradient, of four heads, has the sharding of the flat array of signs."""
    heads = kernel.astype(jnp.float32).reshape(64, 4, 64)
    return jnp.sum(heads * signs.reshape(64, 4, 64))


def mesh_of(n_devices):
    devices = jax.devices()[:n_devices]
    return jax.make_mesh((n_devices,), ("fsdp",), (AxisType.Auto,), devices=devices)


def nnx_run(signs):
    class Heads(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), NAMES)
            self.linear = nnx.Linear(
                64, 256, use_bias=False, kernel_init=init, rngs=rngs
            )

    @nnx.jit
    def step(model, optimizer, signs):
        loss = lambda model: sum_of(model.linear.kernel[...], signs)  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))

    model = Heads(nnx.Rngs(0))
    optimizer = Optimizer(model, optax_flash.adamw8(1e-3), wrt=nnx.Param)
    text = step.lower(model, optimizer, signs).compile().as_text()
    for _ in range(3):
        step(model, optimizer, signs)
    return nnx.to_pure_dict(nnx.state((model, optimizer))), text


def linen_run(annotate, signs):
    init = annotate(nn.initializers.lecun_normal(), NAMES)
    params = {"kernel": init(jax.random.key(0), (64, 256))}

    def create(params):
        tx = optax_flash.adamw8(1e-3)
        return TrainState.create(apply_fn=None, params=params, tx=tx)

    abstract = jax.eval_shape(create, params)
    mesh = jax.sharding.get_mesh()
    specs = nn.get_partition_spec(abstract)
    # The names of this test's logical axes are those of the mesh.
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )
    state = jax.jit(create, out_shardings=shardings)(params)

    @jax.jit
    def step(state, signs):
        def loss(params):
            return sum_of(nn.unbox(params)["kernel"], signs)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    text = step.lower(state, signs).compile().as_text()
    for _ in range(3):
        state = step(state, signs)
    return nn.unbox((state.params, state.opt_state)), text


RUNS = {
    "nnx": nnx_run,
    "linen": lambda signs: linen_run(nn.with_partitioning, signs),
    "linen, logical": lambda signs: linen_run(nn.with_logical_partitioning, signs),
}


@pytest.mark.parametrize("name", quick(["linen"], RUNS))
def test_codes_stay_where_they_are(name, capfd):
    run = RUNS[name]
    with nn.logical_axis_rules((("fsdp", "fsdp"),)):
        with jax.set_mesh(mesh_of(1)):
            expected, _ = run(jnp.asarray(SIGNS))
            expected = jax.tree.map(np.asarray, expected)
        capfd.readouterr()
        mesh = mesh_of(8)
        with jax.set_mesh(mesh):
            flat = NamedSharding(mesh, P("fsdp"))
            found, text = run(jax.device_put(SIGNS, flat))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    moved = set(MOVES.findall(text))
    # Gradients do move, in float32. Params are bfloat16, codes and residuals integers.
    assert moved == {"f32"}
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, found), expected)
