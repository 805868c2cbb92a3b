"""Flax nnx: its own ``nnx.Optimizer``, Tunix, and our ``Optimizer``."""

import functools

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash.flax import Optimizer
from tests.clients import problem
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")


class Model(nnx.Module):
    """With names of the mesh's axes for every param, those of biases among them."""

    def __init__(self, param_dtype=jnp.float32):
        rngs = nnx.Rngs(0)

        def linear(name, n_in, n_out):
            names = problem.NAMES[name]
            return nnx.Linear(
                n_in,
                n_out,
                kernel_init=nnx.with_partitioning(
                    nnx.initializers.lecun_normal(), names["kernel"]
                ),
                bias_init=nnx.with_partitioning(
                    nnx.initializers.zeros_init(), names["bias"]
                ),
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.up = linear("up", problem.N_IN, problem.HIDDEN)
        self.down = linear("down", problem.HIDDEN, problem.N_OUT)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x)))


def loss(model):
    graph, params = nnx.split(model)
    return problem.error(nnx.merge(graph, problem.whole(params))(problem.X))


@nnx.jit
def step(model, optimizer):
    optimizer.update(model, nnx.grad(loss)(model))


def train(model, optimizer, steps):
    for _ in range(steps):
        step(model, optimizer)
        problem.wait(nnx.state((model, optimizer)))


def pure(model):
    return nnx.as_pure(nnx.state(model, nnx.Param))


def stock_run(steps, tx, dtype=jnp.float32):
    """The same run with stock optax in float32: its start and its end.

    Args:
      steps: how many.
      tx: of optax.
      dtype: in which the run that it is compared with begins.
    """
    with jax.set_mesh(problem.mesh()):
        model = Model()
        start = jax.tree.map(lambda x: x.astype(jnp.float32), pure(Model(dtype)))
        nnx.update(model, start)
        start = jax.device_get(start)
        train(model, nnx.Optimizer(model, tx, wrt=nnx.Param), steps)
        return start, pure(model)


OPTIMIZERS = {
    "adamw8": (optax_flash.adamw8, (1e-3,), optax.adamw, jnp.float32, 0.02),
    "adamw4": (optax_flash.adamw4, (1e-3,), optax.adamw, jnp.float32, 0.3),
    "lion8": (optax_flash.lion8, (1e-4,), optax.lion, jnp.float32, 0.02),
    "adamw8, 24-bit weights": (
        lambda rate: optax_flash.master_weights(optax_flash.adamw8(rate)),
        (1e-3,),
        optax.adamw,
        jnp.bfloat16,
        0.02,
    ),
}


@pytest.mark.parametrize("name", quick(["adamw8, 24-bit weights"], OPTIMIZERS))
def test_stock_optimizer(name, tmp_path):
    make, arguments, make_stock, dtype, at_most = OPTIMIZERS[name]
    tx = make(*arguments)

    def create():
        model = Model(dtype)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    with jax.set_mesh(problem.mesh()):
        model, optimizer = create()
        assert (model.up.kernel[...].dtype) == dtype
        mu = optimizer.opt_state.mu["up"]["kernel"][...]
        assert mu.dtype == jnp.uint8
        columns = problem.HIDDEN // (2 if "4" in name.split(",")[0] else 1)
        problem.check_shards("mu", mu, (problem.N_IN // 4, columns // 2))
        bias = optimizer.opt_state.mu["up"]["bias"][...]
        problem.check_shards("mu of a bias", bias, (problem.HIDDEN // 2,))
        train(model, optimizer, 4)
        problem.save(tmp_path, nnx.state((model, optimizer)))
        train(model, optimizer, 4)

    start, stock = stock_run(8, make_stock(*arguments), dtype)
    ours = pure(model)
    if dtype != jnp.float32:
        ours = optax_flash.master_params(nnx.as_pure(optimizer.opt_state), ours)
    problem.check_close(f"nnx.Optimizer, {name}", ours, stock, start, at_most)

    # A process that has nothing but the code, on another mesh.
    other = problem.mesh(2, 4)
    with jax.set_mesh(other):
        resumed = nnx.eval_shape(create)
        state = nnx.state(resumed)
        sharding = nnx.get_named_sharding(state, other)
        state = problem.restore(tmp_path, problem.abstract(state, sharding))
        nnx.update(resumed, state)
        codes = resumed[1].opt_state.mu["up"]["kernel"][...]
        problem.check_shards("mu", codes, (problem.N_IN // 2, columns // 4))
        train(*resumed, 4)
    problem.check_equal(
        nnx.as_pure(nnx.state(resumed)), nnx.as_pure(nnx.state((model, optimizer)))
    )


def test_our_optimizer():
    tx = optax_flash.adamw8(1e-3)
    with jax.set_mesh(problem.mesh()):
        model = Model()
        start = jax.device_get(pure(model))
        optimizer = Optimizer(model, tx)
        train(model, optimizer, 8)
    weights = optimizer.fp32_params(model)
    residual = optimizer.opt_state.residual["up"]["kernel"][...]
    problem.check_shards("residual", residual, (problem.N_IN // 4, problem.HIDDEN // 2))
    begun, stock = stock_run(8, optax.adamw(1e-3))
    problem.check_equal(jax.tree.leaves(begun), jax.tree.leaves(start))
    problem.check_close("our nnx Optimizer, adamw8", weights, stock, start, 0.02)


@pytest.mark.full
def test_bias_sharded_by_all_devices():
    """A bias that is not in codes has no stub beside it that could not be sharded."""
    tx = optax_flash.adamw8(1e-3)
    mesh = jax.make_mesh((8,), ("fsdp",))
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.zeros_init(), ("fsdp",))
        model = nnx.Linear(64, 256, bias_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        state = opt_state(optimizer)
        specs = nnx.get_partition_spec(state)
        for x, spec in zip(*map(jax.tree.leaves, (state, specs)), strict=True):
            jax.device_put(x, NamedSharding(mesh, spec))

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda model: jnp.mean(model(problem.X) ** 2))(model)
            optimizer.update(model, grads)

        step(model, optimizer)
    problem.check_shards("mu", optimizer.opt_state.mu["bias"][...], (32,))
    assert specs["opt_state"]["inner_state"][0]["mu"]["bias"].get_value() == P("fsdp")
    assert jax.tree.leaves(optimizer.opt_state.scales["mu_scales"]["bias"]) == []


class Accumulator(nnx.Module):
    """As Tunix has one beside the optimizer: gradients added up, and how many."""

    def __init__(self, model):
        zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
        self.grads = nnx.data(zeros)
        self.count = nnx.Variable(jnp.zeros([]))

    def add(self, grads):
        for total, x in zip(*map(variables, (self.grads, grads)), strict=True):
            total.set_value(total[...] + x[...])
        self.count[...] += 1.0

    def mean(self):
        def mean(x):
            return type(x)(x[...] / self.count[...])

        return jax.tree.map(mean, self.grads, is_leaf=is_variable)

    def reset(self):
        for total in variables(self.grads):
            total.set_value(jnp.zeros_like(total[...]))
        self.count[...] = jnp.zeros([])


def is_variable(x):
    return isinstance(x, nnx.Variable)


def variables(tree):
    return jax.tree.leaves(tree, is_leaf=is_variable)


def opt_state(optimizer):
    return nnx.state(optimizer, nnx.optimizer.OptState)


class Tunix:
    """The calls of the trainer of Tunix 0.1.7 around an optimizer, written anew."""

    accumulators = ()

    def __init__(self, model, tx, every):
        self.model = model
        tx = optax.MultiSteps(tx, every)
        self.optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        self.step = None

    def shard(self):
        state = opt_state(self.optimizer)
        specs = nnx.get_partition_spec(state)
        nnx.update(self.optimizer, jax.lax.with_sharding_constraint(state, specs))

    def train(self, batches):
        if self.step is None:
            self.shard()
            step = nnx.jit(self.batch, donate_argnames=("optimizer", "accumulators"))
            arguments = (self.model, self.optimizer, self.accumulators)
            self.step = functools.partial(step, *arguments)
        for i in range(batches):
            self.step(jnp.asarray(i % 2 == 1))

    @staticmethod
    def batch(model, optimizer, accumulators, is_last):
        del accumulators, is_last
        value, grads = nnx.value_and_grad(loss, argnums=0)(model)
        norm = optax.tree.norm(grads)
        optimizer.update(model, grads)
        return value, norm

    def save(self, folder):
        with ocp.CheckpointManager(folder) as manager:
            items = {"model": nnx.state(self.model), "state": opt_state(self.optimizer)}
            args = {key: ocp.args.PyTreeSave(item) for key, item in items.items()}
            manager.save(1, args=ocp.args.Composite(**args))

    def load(self, folder):
        model, state = nnx.state(self.model), opt_state(self.optimizer)
        shardings = [x.sharding for x in jax.tree.leaves(state)]
        mesh = next(x.mesh for x in shardings if isinstance(x, NamedSharding))
        of_state = nnx.get_named_sharding(state, mesh)
        restore_args = ocp.checkpoint_utils.construct_restore_args
        args = ocp.args.Composite(
            model=ocp.args.PyTreeRestore(model, restore_args=restore_args(model)),
            state=ocp.args.PyTreeRestore(
                state, restore_args=restore_args(state, of_state)
            ),
        )
        with ocp.CheckpointManager(folder) as manager:
            loaded = manager.restore(manager.latest_step(), args=args)
        nnx.update(self.optimizer, loaded.state)
        nnx.update(self.model, loaded.model)


class NewerTunix(Tunix):
    """After 0.1.7: it adds up gradients itself, and aligns a state's dtypes."""

    def __init__(self, model, tx, every):
        assert every == 2
        self.model = model
        self.optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        self.align_dtypes()
        self.accumulators = Accumulator(model)
        self.step = None

    def align_dtypes(self):
        """Casts the state to the dtypes that an update would give it."""

        def values(tree):
            return jax.tree.map(lambda x: x[...], tree, is_leaf=is_variable)

        params = values(nnx.state(self.model, nnx.Param))
        state = values(self.optimizer.opt_state)
        _, after = jax.eval_shape(self.optimizer.tx.update, params, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        found = variables(self.optimizer.opt_state)
        for x, new in zip(found, jax.tree.leaves(after), strict=True):
            if x[...].dtype != new.dtype:
                x.set_value(x[...].astype(new.dtype))

    @staticmethod
    def batch(model, optimizer, accumulators, is_last):
        accumulators.add(nnx.grad(loss)(model))

        def update(model, optimizer, accumulators):
            grads = accumulators.mean()
            norm = optax.tree.norm(grads)
            optimizer.update(model, grads)
            accumulators.reset()
            return norm

        def skip(model, optimizer, accumulators):
            return jnp.zeros([])

        return nnx.cond(is_last, update, skip, model, optimizer, accumulators)


@pytest.mark.full
@pytest.mark.parametrize("trainer_class", [Tunix, NewerTunix])
def test_tunix(trainer_class, tmp_path):
    def injected(factory):
        make = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)
        rate = optax.warmup_cosine_decay_schedule(1e-4, 1e-3, 2, 20)
        return make(learning_rate=rate, b2=0.99)

    tx = injected(optax_flash.adamw8)
    with jax.set_mesh(problem.mesh()):
        trainer = trainer_class(Model(), tx, 2)
        start = jax.device_get(pure(trainer.model))
        trainer.train(8)
        trainer.save(tmp_path)
        trainer.train(4)
        (codes,) = [
            x[...]
            for path, x in nnx.to_flat_state(opt_state(trainer.optimizer))
            if path[-3:] == ("mu", "up", "kernel")
        ]
        assert codes.dtype == jnp.uint8
        problem.check_shards("mu", codes, (problem.N_IN // 4, problem.HIDDEN // 2))

        stock = trainer_class(Model(), injected(optax.adamw), 2)
        stock.train(12)
    name = f"{trainer_class.__name__}, adamw8 with injected hyperparameters"
    problem.check_close(name, pure(trainer.model), pure(stock.model), start, 0.02)

    with jax.set_mesh(problem.mesh(2, 4)):
        resumed = trainer_class(Model(), tx, 2)
        resumed.load(tmp_path)
        resumed.train(4)
    for of_resumed, of_trainer in (
        (resumed.model, trainer.model),
        (resumed.optimizer, trainer.optimizer),
    ):
        problem.check_equal(
            *(nnx.as_pure(nnx.state(x)) for x in (of_resumed, of_trainer))
        )


@pytest.mark.full
def test_a_state_whose_floats_were_cast():
    """Some snapshots of Tunix cast all floats of a state to float32: scales as well.

    That cannot go on unnoticed: an update gives scales their own dtype.
    """
    tx = optax_flash.adamw8(1e-3)
    with jax.set_mesh(problem.mesh()):
        model = Model()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for x in variables(opt_state(optimizer)):
            if jnp.issubdtype(x[...].dtype, jnp.floating):
                x.set_value(x[...].astype(jnp.float32))
        with pytest.raises(ValueError, match=r"down/kernel/mu' are float32.* has cast"):
            step(model, optimizer)


@pytest.mark.full
@pytest.mark.parametrize("names", [("x", None), (None, "x")], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        optax_flash.scale_by_lora_pre,
        optax_flash.scale_by_lora_pre_muon,
        optax_flash.scale_by_lowrank_adam,
    ],
)
def test_factors_alone_in_a_stock_optimizer(make, names):
    """Their rank does not divide over the devices that their param's rows do."""

    def run(mesh):
        with jax.set_mesh(mesh):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
            model = nnx.Linear(
                64, 128, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0)
            )
            optimizer = nnx.Optimizer(model, make(rank=4), wrt=nnx.Param)
            grads = nnx.grad(lambda model: jnp.sum(model(problem.X) ** 2))(model)
            for _ in range(2):
                optimizer.update(model, grads)
                problem.wait(nnx.state((model, optimizer)))
            return jax.device_get(pure(model)), optimizer.opt_state

    one, eight = (
        jax.make_mesh((n,), ("x",), (AxisType.Auto,), devices=jax.devices()[:n])
        for n in (1, 8)
    )
    expected, _ = run(one)
    found, state = run(eight)
    problem.check_close(str(names), found, expected, {"kernel": 0.0}, 1e-4)
    shards = [
        x.addressable_shards[0].data.size * 8 == x.size
        for x in jax.tree.leaves(nnx.as_pure(state))
    ]
    assert any(shards)
