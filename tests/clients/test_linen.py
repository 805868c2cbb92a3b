"""Flax linen: logical axes as MaxText uses them, stock and with our ``TrainState``."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash.flax import TrainState
from tests.clients import problem
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")

RULES = (("embed", "fsdp"), ("hidden", "tp"), ("data", None))


class Model(nn.Module):
    """With logical names for every param, those of biases among them."""

    @nn.compact
    def __call__(self, x):
        def dense(name, features, kernel, bias):
            return nn.Dense(
                features,
                kernel_init=nn.with_logical_partitioning(
                    nn.initializers.lecun_normal(), kernel
                ),
                bias_init=nn.with_logical_partitioning(
                    nn.initializers.zeros_init(), bias
                ),
                name=name,
            )

        x = dense("up", problem.HIDDEN, ("embed", "hidden"), ("hidden",))(x)
        x = jax.nn.gelu(x)
        return dense("down", problem.N_OUT, ("hidden", "embed"), ("embed",))(x)


MODEL = Model()


def unboxed(tree):
    """As MaxText unboxes a state."""

    def is_box(x):
        return isinstance(x, nn.spmd.LogicallyPartitioned)

    return jax.tree.map(lambda x: x.unbox() if is_box(x) else x, tree, is_leaf=is_box)


def loss(params):
    return problem.error(MODEL.apply({"params": problem.whole(params)}, problem.X))


class MaxText:
    """The calls of MaxText 0.2.5 that make a state, shard it and train it, anew."""

    def __init__(self, tx, mesh, make=train_state.TrainState.create):
        self.mesh = mesh

        def create(key):
            params = MODEL.init(key, problem.X)["params"]
            return make(apply_fn=MODEL.apply, params=params, tx=tx)

        with nn.logical_axis_rules(RULES):
            abstract = jax.eval_shape(create, jax.random.key(0))
        specs = nn.get_partition_spec(abstract)
        self.sharding = nn.logical_to_mesh_sharding(specs, mesh, RULES)
        self.create = create
        self.abstract = unboxed(
            jax.jit(create, out_shardings=self.sharding).eval_shape(jax.random.key(0))
        )
        self.compiled = None

    def target(self):
        """What a checkpoint is restored to: shapes and shardings."""
        return problem.abstract(self.abstract, unboxed(self.sharding))

    def new(self):
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(RULES):
            create = jax.jit(self.create, out_shardings=self.sharding)
            return unboxed(create(jax.random.key(0)))

    def step(self, state, **extra_args):
        grads = jax.grad(loss)(state.params)
        return state.apply_gradients(grads=grads)

    def train(self, state, steps):
        if self.compiled is None:
            shardings = unboxed(self.sharding)
            self.compiled = jax.jit(
                self.step,
                in_shardings=(shardings,),
                out_shardings=shardings,
                donate_argnums=0,
            )
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(RULES):
            for _ in range(steps):
                state = problem.wait(self.compiled(state))
        return state


def chained(scale_by):
    """As an ``adamw`` of a trainer's own is put together, its moments first."""
    return optax.chain(
        scale_by(b2=0.95),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(1e-3),
    )


OPTIMIZERS = {
    "adamw8": (optax_flash.adamw8, optax.adamw, 0.02),
    "adamw4": (optax_flash.adamw4, optax.adamw, 0.3),
}


@pytest.mark.parametrize("name", quick(["adamw8"], OPTIMIZERS))
def test_maxtext(name, tmp_path):
    make, make_stock, at_most = OPTIMIZERS[name]
    tx = make(1e-3)
    trainer = MaxText(tx, problem.mesh())
    state = trainer.new()
    start = jax.device_get(state.params)
    mu = state.opt_state.mu["up"]
    columns = problem.HIDDEN // (2 if "4" in name else 1)
    problem.check_shards("mu", mu["kernel"], (problem.N_IN // 4, columns // 2))
    problem.check_shards("mu of a bias", mu["bias"], (problem.HIDDEN // 2,))
    scales = state.opt_state.scales["mu_scales"]["up"]["kernel"]
    problem.check_shards("scales", scales, (problem.N_IN // 4, 4))
    state = trainer.train(state, 4)
    problem.save(tmp_path, state)
    state = trainer.train(state, 4)

    stock = MaxText(make_stock(1e-3), problem.mesh())
    ours, stock = state.params, stock.train(stock.new(), 8).params
    problem.check_close(f"MaxText, {name}", ours, stock, start, at_most)

    resumed = MaxText(tx, problem.mesh(2, 4))
    restored = problem.restore(tmp_path, resumed.target())
    problem.check_equal(resumed.train(restored, 4), state)


@pytest.mark.full
def test_maxtext_with_factors(tmp_path):
    """Factors have the names of those axes that they share with their param."""
    tx = optax_flash.lora_pre_adamw(1e-3, rank=16)
    trainer = MaxText(tx, problem.mesh())
    state = trainer.new()
    start = jax.device_get(state.params)
    right = optax.tree.get(state.opt_state, "mu_right")["up"]["kernel"]
    assert right.shape == (16, problem.HIDDEN) and right.dtype == jnp.uint8
    problem.check_shards("mu_right", right, (16, problem.HIDDEN // 2))
    state = trainer.train(state, 4)
    problem.save(tmp_path, state)
    resumed = MaxText(tx, problem.mesh(2, 4))
    restored = problem.restore(tmp_path, resumed.target())
    problem.check_equal(restored, state)
    # Products with factors add over shards, so their last bits depend on the mesh; in
    # the step after, these may round codes another way.
    ours, other = (
        x.train(y, 1).params for x, y in ((trainer, state), (resumed, restored))
    )
    assert problem.difference(other, ours, start) < 1e-4


@pytest.mark.full
def test_our_train_state(tmp_path):
    """Half precision under the same calls, and flax's msgpack."""
    tx = optax_flash.adamw8(1e-3)
    trainer = MaxText(tx, problem.mesh(), TrainState.create)
    state = trainer.new()
    stock = MaxText(optax.adamw(1e-3), problem.mesh())
    fresh = stock.new()
    start = jax.device_get(fresh.params)
    stock = stock.train(fresh, 8)
    assert state.params["up"]["kernel"].dtype == jnp.bfloat16
    residual = state.opt_state.residual["up"]["kernel"]
    problem.check_shards("residual", residual, (problem.N_IN // 4, problem.HIDDEN // 2))
    state = trainer.train(state, 8)
    ours = state.fp32_params()
    problem.check_close("our TrainState, adamw8", ours, stock.params, start, 0.02)

    saved = flax.serialization.to_bytes(jax.device_get(state))
    resumed = MaxText(tx, problem.mesh(2, 4), TrainState.create)
    read = flax.serialization.from_bytes(resumed.new(), saved)
    read = jax.device_put(read, unboxed(resumed.sharding))
    problem.check_equal(resumed.train(read, 2), trainer.train(state, 2))


@pytest.mark.full
class TestZero1:
    """MaxText shards optimizer states over data, and then params like the moments."""

    axes = ("fsdp", "tp", "data")
    mesh = jax.make_mesh((2, 2, 2), axes, (jax.sharding.AxisType.Auto,) * 3)

    @pytest.mark.parametrize("make", [optax_flash.adamw8, None], ids=["alone", "chain"])
    def test_mu(self, make):
        tx = make(1e-3) if make else chained(optax_flash.scale_by_adam8)
        trainer = MaxText(tx, self.mesh)
        sharding = unboxed(trainer.sharding)
        opt_state = jax.tree.map(
            over_data, trainer.abstract.opt_state, sharding.opt_state
        )
        for x, s in zip(
            *map(jax.tree.leaves, (trainer.abstract.opt_state, opt_state)), strict=True
        ):
            s.shard_shape(x.shape)
        # Its own look-up asks for an optax.ScaleByAdamState, and raises without one.
        first = opt_state if make else opt_state[0]
        assert not isinstance(first, optax.ScaleByAdamState)
        assert jax.tree.structure(first.mu) == jax.tree.structure(sharding.params)
        assert first.mu["up"]["kernel"].spec == P(("data", "fsdp"), "tp")
        sharding = sharding.replace(params=first.mu, opt_state=opt_state)
        state = jax.device_put(trainer.new(), sharding)
        mu = (state.opt_state if make else state.opt_state[0]).mu["up"]["kernel"]
        problem.check_shards("mu", mu, (problem.N_IN // 4, problem.HIDDEN // 2))
        trainer.sharding = sharding
        sharded = trainer.train(state, 3)
        plain = MaxText(tx, problem.mesh())
        problem.check_equal(sharded, plain.train(plain.new(), 3))


def over_data(x, sharding):
    """A state leaf's sharding with "data" on the first axis that divides."""
    spec = [*sharding.spec, *[None] * (len(x.shape) - len(sharding.spec))]
    shape = sharding.shard_shape(x.shape)
    for axis, entry in enumerate(spec):
        if shape[axis] % sharding.mesh.shape["data"] == 0:
            others = (entry,) if isinstance(entry, str) else tuple(entry or ())
            spec[axis] = ("data", *others)
            break
    return NamedSharding(sharding.mesh, P(*spec))


@pytest.mark.full
def test_bias_sharded_by_all_devices():
    """A bias that is not in codes has no stub beside it that could not be sharded."""
    mesh = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    init = nn.with_partitioning(nn.initializers.zeros_init(), ("fsdp",))
    model = nn.Dense(256, bias_init=init)
    tx = optax_flash.adamw8(1e-3)

    def create(key):
        params = model.init(key, problem.X)["params"]
        return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    abstract = jax.eval_shape(create, jax.random.key(0))
    specs = nn.get_partition_spec(abstract)
    assert specs.opt_state.mu["bias"] == P("fsdp")
    # What divides over no mesh is not known to the names, and has none.
    assert specs.opt_state.scales["nu_scales"]["kernel"] == P()
    sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    state = jax.jit(create, out_shardings=sharding)(jax.random.key(0))
    problem.check_shards("mu", state.opt_state.mu["bias"].value, (32,))


@pytest.mark.parametrize("logical", [True, False], ids=["logical", "mesh"])
def test_state_sharding_of_boxed_params(logical):
    """``state_sharding`` says where each array of a state goes, without boxes."""
    tx, mesh = optax_flash.adamw4(1e-3), problem.mesh()
    params = jax.eval_shape(MODEL.init, jax.random.key(0), problem.X)["params"]
    specs = nn.get_partition_spec(params)
    of_params = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    if not logical:
        params = unboxed(params)
    # Groups of 32 in 64 columns on 4 devices: said, and done all the same.
    with pytest.warns(UserWarning, match="'down/kernel'.*64 columns in 4 shards"):
        sharding = optax_flash.state_sharding(tx, params, of_params)
    state = unboxed(jax.eval_shape(tx.init, params))
    assert jax.tree.structure(sharding) == jax.tree.structure(state)
    assert sharding.mu["up"]["kernel"].spec == P("fsdp", "tp")
    assert sharding.scales["nu_scales"]["up"]["kernel"].spec == P("fsdp", "tp")
    assert sharding.mu["up"]["bias"].spec == P("tp")
    made = jax.jit(lambda: unboxed(tx.init(problem.weights())), out_shardings=sharding)
    for x, s in zip(*map(jax.tree.leaves, (made(), sharding)), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)


@pytest.mark.full
def test_steps_that_are_skipped_by_cond():
    """MaxText's ``skip_step_on_spikes``: an update under ``lax.cond``, or none."""

    def skipping(inner):
        def init(params):
            return {"inner_state": inner.init(params), "losses": jnp.zeros(4)}

        def update(updates, state, params=None, *, loss, **extra_args):
            inner_state, losses = state["inner_state"], state["losses"]

            def take():
                return inner.update(updates, inner_state, params, **extra_args)

            def skip():
                return jax.tree.map(jnp.zeros_like, updates), inner_state

            updates, inner_state = jax.lax.cond(loss < 10, take, skip)
            losses = jnp.roll(losses, 1).at[0].set(loss)
            return updates, {"inner_state": inner_state, "losses": losses}

        return optax.GradientTransformationExtraArgs(init, update)

    params = unboxed(MODEL.init(jax.random.key(0), problem.X)["params"])
    half = optax_flash.cast_params(params, jnp.bfloat16)
    master = optax_flash.master_weights(optax_flash.adamw8(1e-3), finished=False)
    for inner, start in ((optax_flash.adamw8(1e-3), params), (master, half)):
        tx = skipping(inner)

        @jax.jit
        def step(params, state, loss, tx=tx):
            updates, state = tx.update(params, state, params, loss=loss)
            return optax.apply_updates(params, updates), state

        state = tx.init(start)
        skipped = step(start, state, 100.0)
        problem.check_equal(skipped[0], start)
        problem.check_equal(skipped[1]["inner_state"], state["inner_state"])
        taken = step(start, state, 1.0)
        assert taken[1]["inner_state"].step == 1
        kernels = (x["up"]["kernel"] for x in (taken[0], start))
        assert not np.array_equal(*kernels)


@pytest.mark.full
def test_moments_in_half_precision():
    """A trainer's ``mu_dtype``, and ``lax.cond`` where a step is not finite."""
    params = unboxed(MODEL.init(jax.random.key(0), problem.X)["params"])
    tx = optax_flash.compress(optax.adamw(1e-3, mu_dtype=jnp.bfloat16))
    tx = optax.apply_if_finite(tx, 3)
    state = tx.init(params)
    assert optax.tree.get(state, "mu")["up"]["bias"].dtype == jnp.bfloat16
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    update = jax.jit(tx.update)
    updates, skipped = update(bad, state, params)
    assert not any(x.any() for x in jax.tree.leaves(updates))
    problem.check_equal(skipped.inner_state, state.inner_state)
    _, state = update(params, state, params)
    assert state.inner_state.step == 1


class TestMsgpack:
    params = problem.weights()

    def saved(self, tx):
        def create():
            return train_state.TrainState.create(
                apply_fn=None, params=self.params, tx=tx
            )

        state = create().apply_gradients(grads=self.params)
        return create(), state

    def test_round_trip(self):
        fresh, state = self.saved(optax_flash.adamw8(1e-3))
        read = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
        problem.check_equal(read, state)
        grads = self.params
        problem.check_equal(
            read.apply_gradients(grads=grads), state.apply_gradients(grads=grads)
        )

    @pytest.mark.full
    def test_other_codecs(self):
        """Codes of another codec have the same shapes: names are what tells."""
        _, state = self.saved(optax_flash.adamw8(1e-3))
        saved = flax.serialization.to_bytes(state)
        other = optax_flash.compress(optax.adamw(1e-3), codecs={"mu": "affine8"})
        fresh, _ = self.saved(other)
        with pytest.raises(ValueError, match=r"kernel/mu' as Companded8.* Affine8"):
            flax.serialization.from_bytes(fresh, saved)

    def test_the_format_before(self):
        """A state dict of format 1 says nothing of codecs, and has stubs as scales."""
        fresh, state = self.saved(optax_flash.adamw8(1e-3))
        old = flax.serialization.to_state_dict(state)
        codecs = old["opt_state"].pop("codecs")
        for scales in old["opt_state"]["scales"].values():
            for layer in scales.values():
                layer["bias"] = np.zeros((1,), jnp.bfloat16)
        with pytest.raises(ValueError, match="do not match.*'codecs'.* at path"):
            flax.serialization.from_state_dict(fresh, old)

        old = flax.serialization.to_state_dict(state)
        old["opt_state"]["codecs"] = codecs | {"version": 1}
        with pytest.raises(ValueError, match="format version 1.* reads 3"):
            flax.serialization.from_state_dict(fresh, old)
