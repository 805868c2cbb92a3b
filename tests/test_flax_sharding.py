"""Train states made sharded, from linen's metadata and from nnx's sharding names."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash.flax import Optimizer, TrainState

pytestmark = pytest.mark.usefixtures("quick_compile")
# Beside each a field, and along which axes of a kernel its axes lie.
OPTIMIZERS = {
    "adamw4": (lambda: optax_flash.adamw4(1e-3), "mu", (0, 1)),
    "low rank": (
        lambda: optax_flash.lora_pre_adamw(1e-3, rank=8),
        "mu_right",
        (None, 1),
    ),
}
RULES = (("embed", "fsdp"), ("hidden", "tp"))
X = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)


@pytest.fixture(name="mesh")
def mesh_fixture():
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


class MLP(nn.Module):
    """A large kernel, and one that is left in float32, whose scales are stubs."""

    annotate: object = None

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        annotate = self.annotate or (lambda init, names: init)
        x = nn.Dense(256, kernel_init=annotate(init, ("embed", "hidden")))(x)
        return nn.Dense(8, kernel_init=annotate(init, ("hidden", "embed")))(x)


def named(init, names):
    """By the mesh's own axes."""
    return nn.with_partitioning(init, tuple(dict(RULES)[name] for name in names))


def from_names(params, mesh):
    return nn.get_sharding(params, mesh)


def from_logical_names(params, mesh):
    specs = nn.get_partition_spec(params)
    return nn.logical_to_mesh_sharding(specs, mesh, RULES)


def from_shapes(params, mesh):
    def sharding(p):
        return NamedSharding(mesh, P("fsdp" if p.ndim > 1 else None))

    return jax.tree.map(sharding, params)


@pytest.mark.parametrize(
    "optimizer, annotate, param_sharding",
    [
        ("adamw4", named, from_names),
        pytest.param(
            *("adamw4", nn.with_logical_partitioning, from_logical_names),
            marks=pytest.mark.full,
        ),
        pytest.param("adamw4", None, from_shapes, marks=pytest.mark.full),
        pytest.param("low rank", named, from_names, marks=pytest.mark.full),
    ],
    ids=["names", "logical names", "no names", "low rank"],
)
def test_linen(mesh, optimizer, annotate, param_sharding):
    make, field, axes = OPTIMIZERS[optimizer]
    tx = make()
    model = MLP(annotate)

    def create(key):
        params = model.init(key, X)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    abstract = jax.eval_shape(create, jax.random.key(0))
    sharding = abstract.state_sharding(param_sharding(abstract.params, mesh))
    state = jax.jit(create, out_shardings=sharding)(jax.random.key(0))
    # To the last bit what one device makes.
    chex.assert_trees_all_equal(state, jax.jit(create)(jax.random.key(0)))

    def step(state):
        def loss(params):
            return jnp.mean(state.apply_fn({"params": params}, X) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    old = state
    step = jax.jit(step, donate_argnums=0, out_shardings=sharding)
    with jax.set_mesh(mesh):
        state = step(state)
    assert state.step == 1 and all(x.is_deleted() for x in jax.tree.leaves(old.params))
    names = ("fsdp", "tp" if annotate else None)
    check(state.opt_state, field, axes, names, "Dense_0")


def check(state, field, axes, names, layer):
    """Of residual and field, the shardings of a kernel whose axes have these names."""
    for name, found in (("residual", (0, 1)), (field, axes)):
        (x,) = jax.tree.leaves(optax.tree.get(state, name)[layer]["kernel"])
        spec = P(*[None if axis is None else names[axis] for axis in found])
        sharding = NamedSharding(x.sharding.mesh, spec)
        assert x.sharding.is_equivalent_to(sharding, 2), (name, x.sharding)


class Model(nnx.Module):
    def __init__(self, names, rngs):
        init = nnx.initializers.lecun_normal()

        def linear(n_in, n_out, names):
            annotated = nnx.with_partitioning(init, names)
            return nnx.Linear(n_in, n_out, kernel_init=annotated, rngs=rngs)

        self.large = linear(64, 256, names)
        self.small = linear(256, 8, names[::-1])

    def __call__(self, x):
        return self.small(self.large(x))


@pytest.mark.parametrize(
    "optimizer, names, transform",
    [
        pytest.param(
            *("adamw4", ("fsdp", "tp"), lambda create: create), marks=pytest.mark.full
        ),
        ("adamw4", ("embed", "hidden"), nnx.jit),
        pytest.param(
            *("low rank", ("embed", "hidden"), lambda create: create),
            marks=pytest.mark.full,
        ),
        pytest.param("low rank", ("fsdp", "tp"), nnx.jit, marks=pytest.mark.full),
    ],
    ids=["eager", "logical names in jit", "low rank", "low rank in jit"],
)
def test_nnx(mesh, optimizer, names, transform):
    make, field, axes = OPTIMIZERS[optimizer]
    tx = make()

    @transform
    def create():
        model = Model(names, nnx.Rngs(0))
        return model, Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean(model(X) ** 2))(model)
        optimizer.update(model, grads)

    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        model, optimizer = create()
        state = nnx.state(optimizer)
        expected = nnx.get_named_sharding(state, mesh)
        for x, sharding in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
        step(model, optimizer)
    check(nnx.as_pure(optimizer.opt_state), field, axes, ("fsdp", "tp"), "large")
