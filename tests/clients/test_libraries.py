"""Other libraries of models and of optimization, and populations."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from tests.clients import named_arrays, problem
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")


class Named(eqx.Module):
    """A levanter-like model: an Equinox module whose params are named arrays."""

    up: Any
    up_bias: Any
    down: Any
    down_bias: Any

    @classmethod
    def new(cls):
        weights, named = problem.weights(), named_arrays.named
        up, down = weights["up"], weights["down"]
        return cls(
            named(up["kernel"], "embed", "mlp"),
            named(up["bias"], "mlp"),
            named(down["kernel"], "mlp", "embed"),
            named(down["bias"], "embed"),
        )

    def __call__(self, x):
        hidden = named_arrays.dot(x, self.up) + self.up_bias.array
        return named_arrays.dot(jax.nn.gelu(hidden), self.down) + self.down_bias.array


class Levanter:
    """The calls of levanter's trainer state, written anew."""

    mapping = {"embed": "fsdp", "mlp": "tp"}

    def __init__(self, tx, mesh):
        self.tx, self.mesh = tx, mesh

    def new(self):
        model = Named.new()
        state = self.tx.init(eqx.filter(model, eqx.is_inexact_array))
        return named_arrays.shard((model, state), self.mapping, self.mesh)

    def take_step(self, model, state):
        def objective(model):
            return problem.error(problem.whole(model)(problem.X))

        loss, grads = eqx.filter_value_and_grad(objective)(model)
        trainable = eqx.filter(model, eqx.is_inexact_array)
        updates, state = self.tx.update(
            grads, state, params=trainable, obj_fn=objective, loss=loss, grads=grads
        )
        return eqx.apply_updates(model, updates), state

    def train(self, model, state, steps):
        # As named_jit does it, whose outputs are placed by their names.
        placed = named_arrays.shardings((model, state), self.mapping, self.mesh)
        step = jax.jit(self.take_step, out_shardings=placed)
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                model, state = problem.wait(step(model, state))
        return model, state


class Loss(NamedTuple):
    last: jax.Array


def scale_by_loss():
    """Reads levanter's extra arguments."""

    def init(params):
        return Loss(jnp.zeros([]))

    def update(updates, state, params=None, *, loss, grads, obj_fn, **extra_args):
        assert callable(obj_fn)
        factor = loss + 1e-3 * optax.tree.norm(grads)
        return jax.tree.map(lambda u: u * factor, updates), Loss(loss)

    return optax.GradientTransformationExtraArgs(init, update)


def with_loss(scale_by):
    return optax.chain(scale_by, scale_by_loss(), optax.scale_by_learning_rate(2e-3))


LEVANTER = {
    "adamw8": (lambda: optax_flash.adamw8(1e-3), lambda: optax.adamw(1e-3)),
    "extra arguments": (
        lambda: optax_flash.compress(with_loss(optax.scale_by_adam())),
        lambda: with_loss(optax.scale_by_adam()),
    ),
    "injected": (
        lambda: optax.inject_hyperparams(optax_flash.adamw8)(learning_rate=1e-3),
        lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    ),
    "sophia": (
        lambda: optax_flash.compress(optax.contrib.sophia(1e-3)),
        lambda: optax.contrib.sophia(1e-3),
    ),
}


@pytest.mark.parametrize(
    "name", quick(["adamw8"], ["adamw8", "extra arguments", "injected", "sophia"])
)
def test_levanter(name, tmp_path):
    make, make_stock = LEVANTER[name]
    tx = make()
    trainer = Levanter(tx, problem.mesh())
    model, state = trainer.new()
    start = jax.device_get(model)
    mu = optax.tree.get(state, "mu")
    problem.check_shards("mu", mu.up.array, (problem.N_IN // 4, problem.HIDDEN // 2))
    problem.check_shards("mu of a bias", mu.up_bias.array, (problem.HIDDEN // 2,))
    halfway = trainer.train(model, state, 4)
    problem.save(tmp_path, halfway)
    model, state = trainer.train(*halfway, 4)

    stock = Levanter(make_stock(), problem.mesh())
    other, _ = stock.train(*stock.new(), 8)
    problem.check_close(f"levanter, {name}", model, other, start, 0.02)

    resumed = Levanter(tx, problem.mesh(2, 4))
    fresh = resumed.new()
    shapes = jax.eval_shape(lambda: fresh)
    placed = named_arrays.shardings(shapes, resumed.mapping, resumed.mesh)
    target = jax.tree.map(
        lambda x, s: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), x
        ),
        shapes,
        placed,
        is_leaf=named_arrays.is_named,
    )
    restored = problem.restore(tmp_path, target)
    problem.check_equal(resumed.train(*restored, 4), (model, state))


@pytest.mark.full
@pytest.mark.parametrize(
    "whole", quick([False], [False, True]), ids=["filtered", "whole module"]
)
def test_equinox(whole, tmp_path):
    """An update gets a module's arrays as params, or it with its functions."""

    def new():
        model = eqx.nn.MLP(
            problem.N_IN, problem.N_OUT, problem.HIDDEN, 1, key=jax.random.key(0)
        )
        arrays, static = eqx.partition(model, eqx.is_inexact_array)
        place = eqx.filter_shard
        return eqx.combine(place(arrays, of_rows), static)

    def run(tx, model, state, steps):
        @eqx.filter_jit
        def step(model, state):
            @eqx.filter_grad
            def grads(model):
                arrays, static = eqx.partition(model, eqx.is_inexact_array)
                model = eqx.combine(problem.whole(arrays), static)
                return problem.error(jax.vmap(model)(problem.X))

            params = model if whole else eqx.filter(model, eqx.is_inexact_array)
            updates, state = tx.update(grads(model), state, params)
            return eqx.apply_updates(model, updates), state

        with jax.set_mesh(mesh):
            for _ in range(steps):
                model, state = problem.wait(step(model, state))
        return model, state

    def fresh(tx):
        model = new()
        return model, tx.init(eqx.filter(model, eqx.is_inexact_array))

    mesh = problem.mesh()
    of_rows = NamedSharding(mesh, P("fsdp"))
    tx = optax_flash.adamw8(1e-3)
    model, state = fresh(tx)
    start = eqx.filter(model, eqx.is_inexact_array)
    mu = optax.tree.get(state, "mu").layers[0].weight
    assert mu.dtype == jnp.uint8
    problem.check_shards("mu", mu, (problem.HIDDEN // 4, problem.N_IN))
    halfway = run(tx, model, state, 4)
    eqx.tree_serialise_leaves(tmp_path / "run.eqx", halfway)
    ours = run(tx, *halfway, 4)
    if not whole:  # Stock optax takes only arrays as params.
        stock = optax.adamw(1e-3)
        other, _ = run(stock, *fresh(stock), 8)
        arrays = (eqx.filter(x, eqx.is_inexact_array) for x in (ours[0], other))
        problem.check_close("Equinox, adamw8", *arrays, start, 0.02)

    # On another mesh.
    mesh = problem.mesh(2, 4)
    of_rows = NamedSharding(mesh, P("fsdp"))
    restored = eqx.tree_deserialise_leaves(tmp_path / "run.eqx", fresh(tx))
    arrays = (eqx.filter(x, eqx.is_array) for x in (run(tx, *restored, 4), ours))
    problem.check_equal(*map(jax.tree.leaves, arrays))


@pytest.mark.full
def test_equinox_finished():
    """Finished params through Equinox's own ``apply_updates``."""
    model = eqx.nn.Linear(64, 64, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    half = optax_flash.cast_params(params, jnp.bfloat16)
    tx = optax_flash.master_weights(optax_flash.adamw8(1e-3))

    @eqx.filter_jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return eqx.apply_updates(params, updates), state

    ours, state = step(half, tx.init(half))
    stock = optax.adamw(1e-3)
    updates, _ = stock.update(half, stock.init(params), params)
    expected = optax.apply_updates(half, updates)
    weights = optax_flash.master_params(state, ours)
    np.testing.assert_allclose(weights.weight, expected.weight, atol=1e-3)
    assert eqx.combine(ours, static).weight.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "make",
    [
        optax_flash.adamw8,
        optax_flash.adamw4,
        functools.partial(optax_flash.lora_pre_adamw, rank=8),
        functools.partial(optax_flash.lora_pre_muon, rank=8),
        functools.partial(optax_flash.lowrank_adamw, rank=8),
        functools.partial(optax_flash.tamed_adamw8, threshold=1.0),
        lambda rate: optax_flash.master_weights(optax.adamw(rate)),
    ],
)
def test_haikus_immutable_dicts(make):
    """They drop MaskedNodes. Made mutable, they have the numbers of plain dicts."""
    plain = problem.weights()
    immutable = hk.data_structures.to_immutable_dict(plain)
    tx = make(1e-3)
    message = "the tree is a haiku.FlatMap.*plain dicts.*to_mutable_dict"
    with pytest.raises(ValueError, match=message):
        tx.init(immutable)
    with pytest.raises(ValueError, match="'model' is a haiku.FlatMap.*to_mutable_dict"):
        tx.init({"model": immutable, "head": plain["up"]})
    with pytest.raises(ValueError, match=message):
        tx.update(immutable, tx.init(plain), immutable)

    mutable = hk.data_structures.to_mutable_dict(immutable)
    problem.check_equal(tx.init(mutable), tx.init(plain))


@pytest.mark.full
def test_haiku(tmp_path):
    """Transformed functions, params by "~" paths, in a donated step."""

    def forward(x):
        hidden = jax.nn.gelu(hk.Linear(problem.HIDDEN, name="up")(x))
        return hk.Linear(problem.N_OUT, name="down")(hidden)

    model = hk.without_apply_rng(hk.transform(forward))

    def new(tx, mesh):
        params = model.init(jax.random.key(0), problem.X)
        params = jax.device_put(params, NamedSharding(mesh, P("fsdp")))
        return params, tx.init(params)

    def run(tx, params, state, mesh, steps):
        @jax.jit
        def step(params, state):
            def loss(params):
                return problem.error(model.apply(problem.whole(params), problem.X))

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        with jax.set_mesh(mesh):
            for _ in range(steps):
                params, state = problem.wait(step(params, state))
        return params, state

    tx, mesh = optax_flash.adamw8(1e-3), problem.mesh()
    start, state = new(tx, mesh)
    mu = state.mu["up"]["w"]
    problem.check_shards("mu", mu, (problem.N_IN // 4, problem.HIDDEN))
    halfway = run(tx, start, state, mesh, 4)
    problem.save(tmp_path, halfway)
    ours, state = run(tx, *halfway, mesh, 4)
    stock = optax.adamw(1e-3)
    other, _ = run(stock, *new(stock, mesh), mesh, 8)
    problem.check_close("Haiku, adamw8", ours, other, start, 0.02)

    mesh = problem.mesh(2, 4)
    fresh = new(tx, mesh)
    sharding = optax_flash.state_sharding(tx, fresh[0])
    sharding = (jax.tree.map(lambda x: x.sharding, fresh[0]), sharding)
    restored = problem.restore(tmp_path, problem.abstract(fresh, sharding))
    problem.check_equal(run(tx, *restored, mesh, 4), (ours, state))


class Ema(NamedTuple):
    count: jax.Array
    ema_params: Any


def ema_params(decay):
    """Kauldron's average of the params, which stands last and applies the updates."""

    def init(params):
        return Ema(jnp.zeros([], jnp.int32), params)

    def update(updates, state, params=None):
        new = optax.apply_updates(params, updates)
        average = optax.tree.update_moment(new, state.ema_params, decay, 1)
        return updates, Ema(state.count + 1, average)

    return optax.GradientTransformation(init, update)


@pytest.mark.full
class TestKauldron:
    """One line of a config; summaries and averages that read updates."""

    def run(self, tx, params, steps=8):
        """Params, state, the last update's norm, and the average of the params."""
        params = jax.device_put(params, NamedSharding(problem.mesh(), P("fsdp")))
        state = tx.init(params)

        @jax.jit
        def step(params, state, average):
            grads = jax.grad(problem.loss)(params)
            updates, state = jax.named_call(tx.update)(grads, state, params)
            norm = optax.tree.norm(updates)
            params = optax.apply_updates(params, updates)
            return (
                params,
                state,
                norm,
                optax.tree.update_moment(params, average, 0.5, 1),
            )

        average = params
        with jax.set_mesh(problem.mesh()):
            for _ in range(steps):
                params, state, norm, average = problem.wait(
                    step(params, state, average)
                )
        return params, state, norm, average

    def chain(self, adam):
        return optax.named_chain(
            ("clip", optax.clip_by_global_norm(1.0)),
            ("adam", adam),
            ("lr", optax.scale_by_learning_rate(1e-3)),
            ("ema", ema_params(0.5)),
        )

    def test_chain(self):
        start = problem.weights()
        ours, state, norm, average = self.run(
            self.chain(optax_flash.scale_by_adam8()), start
        )
        mu = state["adam"].mu["up"]["kernel"]
        problem.check_shards("mu", mu, (problem.N_IN // 4, problem.HIDDEN))
        problem.check_equal(state["ema"].ema_params, average)
        stock, _, stock_norm, _ = self.run(self.chain(optax.scale_by_adam()), start)
        problem.check_close("kauldron, scale_by_adam8", ours, stock, start, 0.02)
        np.testing.assert_allclose(norm, stock_norm, rtol=0.01)

    def test_master_weights(self):
        """Additive updates can be read; finished params say why they cannot."""
        half = optax_flash.cast_params(problem.weights(), jnp.bfloat16)
        start = jax.tree.map(lambda x: x.astype(jnp.float32), half)

        def make(finished):
            tx = optax_flash.adamw8(1e-3)
            tx = optax_flash.master_weights(tx, finished=finished)
            return optax.chain(tx, ema_params(0.5))

        ours, state, _, average = self.run(make(False), half)
        # It is the average of the very params that were trained.
        problem.check_equal(state[1].ema_params, average)
        weights = optax_flash.master_params(state, ours)
        stock = self.run(optax.adamw(1e-3), start)[0]
        problem.check_close("kauldron, adamw8 additive", weights, stock, start, 0.02)
        with pytest.raises(TypeError, match="finished=False"):
            self.run(make(True), half)


@pytest.mark.full
def test_optimistix():
    """Its ``OptaxMinimiser``, with the whole of an optimization in one loop."""

    def residual(params, target):
        return jnp.sum((params["x"] - target) ** 2)

    target = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    start = {"x": jnp.zeros((64, 64))}

    def minimise(tx):
        # Stopped on its way, since all of them end at the target.
        solver = optx.OptaxMinimiser(tx, rtol=1e-5, atol=1e-5)
        solution = optx.minimise(
            residual, solver, start, target, max_steps=20, throw=False
        )
        return solution.value

    ours, stock = minimise(optax_flash.adam8(0.05)), minimise(optax.adam(0.05))
    problem.check_close("Optimistix, adam8", ours, stock, start, 0.02)
    with_weights = optax_flash.master_weights(optax_flash.adam8(0.05), finished=False)
    half = minimise(with_weights)
    problem.check_close("Optimistix, additive", half, stock, start, 0.02)


@pytest.mark.full
class TestPopulations:
    """Several runs at once; each is the run by itself."""

    size = 8

    def members(self):
        def perturbed(key):
            weights = problem.weights()
            noise = optax.tree.random_like(key, weights)
            return jax.tree.map(lambda w, n: w + 0.01 * n, weights, noise)

        return jax.vmap(perturbed)(jax.random.split(jax.random.key(0), self.size))

    def steps(self, tx, mapped):
        params = self.members()
        state = mapped(tx.init)(params)

        def step(params, state):
            updates, state = tx.update(jax.grad(problem.loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        step = mapped(step)
        for _ in range(4):
            params, state = problem.wait(step(params, state))
        return params, state

    @pytest.mark.parametrize("name", ["vmap", "sharded vmap", "pmap"])
    def test_population(self, name):
        mapped = {
            "vmap": lambda f: jax.jit(jax.vmap(f)),
            "sharded vmap": self.sharded,
            "pmap": jax.pmap,
        }[name]
        tx = optax_flash.adamw8(1e-3)
        params, state = self.steps(tx, mapped)
        codes = state.mu["up"]["kernel"]
        assert codes.shape == (self.size, problem.N_IN, problem.HIDDEN)
        stock, _ = self.steps(optax.adamw(1e-3), mapped)
        start = self.members()
        problem.check_close(f"{name}, adamw8", params, stock, start, 0.02)
        if name != "vmap":
            shape = (1, problem.N_IN, problem.HIDDEN)
            problem.check_shards("mu", codes, shape)

    def sharded(self, f):
        mesh = jax.make_mesh((8,), ("member",), (jax.sharding.AxisType.Auto,))
        sharding = NamedSharding(mesh, P("member"))
        return jax.jit(jax.vmap(f), in_shardings=sharding, out_shardings=sharding)


@pytest.mark.full
def test_schedule_free():
    """Its params for evaluation, from a state in codes."""

    def run(tx, nu_dtype=jnp.uint8):
        params = problem.weights()
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(problem.loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(8):
            params, state = problem.wait(step(params, state))
        assert optax.tree.get(state, "nu")["up"]["kernel"].dtype == nu_dtype
        return optax.contrib.schedule_free_eval_params(state, params)

    start = problem.weights()
    make = functools.partial(optax.contrib.schedule_free, learning_rate=1e-3)
    stock = run(make(optax.rmsprop(1e-3)), jnp.float32)
    outside = run(optax_flash.compress(make(optax.rmsprop(1e-3))))
    inside = run(make(optax_flash.compress(optax.rmsprop(1e-3))))
    problem.check_close("schedule_free, compressed", outside, stock, start, 0.02)
    problem.check_close("schedule_free of compress", inside, stock, start, 0.02)
