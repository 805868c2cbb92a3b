"""A running optax state goes into codes and back; training goes on."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash.flax
from optax_flash import from_optax_state, to_optax_state
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")

ONLY_W = {"w": True, "v": False, "b": False}
LABELS = {"w": "codes", "v": "plain", "b": "plain"}
SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 10)


# What we call it, and what it is in optax.
CASES = {
    "adamw": (optax_flash.adamw8, optax.adamw),
    "lion": (optax_flash.lion8, optax.lion),
    "sgd": (
        lambda lr: optax_flash.sgd8(lr, momentum=0.9),
        lambda lr: optax.sgd(lr, momentum=0.9),
    ),
    "adamw4": (optax_flash.adamw4, optax.adamw),
    "mask": (
        lambda lr: optax_flash.adamw8(lr, mask=ONLY_W),
        lambda lr: optax.adamw(lr, mask=ONLY_W),
    ),
    "chain": (
        lambda lr: optax.chain(optax.clip(1.0), optax_flash.adamw8(SCHEDULE)),
        lambda lr: optax.chain(optax.clip(1.0), optax.adamw(SCHEDULE)),
    ),
    "masked": (
        lambda lr: optax.masked(optax_flash.adamw8(lr), ONLY_W),
        lambda lr: optax.masked(optax.adamw(lr), ONLY_W),
    ),
    "partition": (
        lambda lr: optax.partition(
            {"codes": optax_flash.adamw8(lr), "plain": optax.sgd(lr)}, LABELS
        ),
        lambda lr: optax.partition(
            {"codes": optax.adamw(lr), "plain": optax.sgd(lr)}, LABELS
        ),
    ),
    "inject_hyperparams": (
        lambda lr: optax.inject_hyperparams(optax_flash.adamw8)(lr),
        lambda lr: optax.inject_hyperparams(optax.adamw)(lr),
    ),
    "flatten": (
        lambda lr: optax.flatten(optax_flash.adamw8(lr)),
        lambda lr: optax.flatten(optax.adamw(lr)),
    ),
}
# Half the widest gap between two codes, relative to the largest of their group of 32,
# of which the scale may be twice.
ERRORS = {"adamw4": 0.27}


def make(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"w": (64, 80), "v": (4100,), "b": (8,)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def step(tx, params, state, seed):
    updates, state = tx.update(make(seed), state, params)
    return optax.apply_updates(params, updates), state


def run(tx, params, steps):
    state = tx.init(params)
    for k in range(steps):
        params, state = step(tx, params, state, 100 + k)
    return params, state


def group_maxima(x):
    """For each element the largest magnitude of its group."""
    *rows, n = x.shape
    whole = np.pad(np.abs(x), [(0, 0)] * len(rows) + [(0, -n % 32)])
    largest = whole.reshape(*rows, -1, 32).max(-1)
    return np.repeat(largest, 32, axis=-1)[..., :n]


@pytest.mark.parametrize("case", quick(["adamw", "adamw4", "partition"], CASES))
def test_round_trip(case):
    ours, stock = (make_tx(1e-2) for make_tx in CASES[case])
    tx = optax_flash.master_weights(ours)
    weights, optax_state = run(stock, make(0), 3)
    half = optax_flash.cast_params(weights, jnp.bfloat16, lambda path, p: path == "b")

    params, state = from_optax_state(tx, optax_state, weights, like=half)
    chex.assert_trees_all_equal(params, half)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(half))
    dtypes = {x.dtype.name for x in jax.tree.leaves(state.inner_state)}
    assert "uint8" in dtypes

    weights_again, back = to_optax_state(tx, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, optax_state)
    # Half a code; nearly a whole one where the residual has none above for it.
    chex.assert_trees_all_close(weights_again, weights, rtol=2**-15)
    for x, y in zip(jax.tree.leaves(optax_state), jax.tree.leaves(back), strict=True):
        if jnp.ndim(x):
            error = ERRORS.get(case, 0.016)
            assert (np.abs(y - x) <= error * group_maxima(np.asarray(x))).all()
        else:
            assert x == y

    # The weights of params and residuals are kept exactly; and both can go on.
    params_again, state_again = from_optax_state(tx, back, weights_again, like=half)
    exactly, _ = to_optax_state(tx, state_again, params_again)
    chex.assert_trees_all_equal(exactly, weights_again)
    step(stock, weights_again, back, 200)
    step(tx, params, state, 200)


def test_float32_params_without_master_weights():
    tx = optax_flash.adamw8(1e-2)
    weights, optax_state = run(optax.adamw(1e-2), make(0), 2)
    params, state = from_optax_state(tx, optax_state, weights)
    assert params is weights
    assert isinstance(state, optax_flash.CompressState)
    again, _ = to_optax_state(tx, state, params)
    chex.assert_trees_all_equal(again, weights)


def test_32_bits_keep_every_bit_of_the_weights():
    tx = optax_flash.master_weights(optax_flash.sgd8(0.1, momentum=0.9), bits=32)
    weights, optax_state = run(optax.sgd(0.1, momentum=0.9), make(0), 2)
    like = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), weights)
    params, state = from_optax_state(tx, optax_state, weights, like)
    again, _ = to_optax_state(tx, state, params)
    chex.assert_trees_all_equal(again, weights)


def test_under_jit_and_sharded():
    mesh = jax.make_mesh((8,), ("fsdp",))
    sharding = {"w": NamedSharding(mesh, P("fsdp")), "v": None, "b": None}
    tx = optax_flash.master_weights(optax_flash.adamw8(1e-2))
    weights, optax_state = run(optax.adamw(1e-2), make(0), 1)
    like = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    expected = from_optax_state(tx, optax_state, weights, like)

    weights = weights | {"w": jax.device_put(weights["w"], sharding["w"])}
    adam = optax_state[0]
    adam = adam._replace(
        mu=adam.mu | {"w": jax.device_put(adam.mu["w"], sharding["w"])},
        nu=adam.nu | {"w": jax.device_put(adam.nu["w"], sharding["w"])},
    )
    params, state = from_optax_state(tx, (adam, *optax_state[1:]), weights, like)
    chex.assert_trees_all_equal((params, state), expected)
    for x in (params["w"], state.residual["w"], optax.tree.get(state, "mu")["w"]):
        assert x.sharding.is_equivalent_to(sharding["w"], 2)

    compiled = jax.jit(functools.partial(from_optax_state, tx))
    chex.assert_trees_all_equal(compiled(optax_state, weights, like), expected)


# --- training goes on


def regression():
    """A small net's loss, with a random batch for each step."""
    rng = np.random.default_rng(0)
    teacher = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
    weights = {
        "first": jnp.asarray(rng.normal(size=(32, 160)) / 6, jnp.float32),
        "last": jnp.asarray(rng.normal(size=(160, 32)) / 12, jnp.float32),
    }

    def loss(params, seed):
        x = jax.random.normal(jax.random.key(seed), (64, 32))
        hidden = jax.nn.relu(x @ params["first"].astype(jnp.float32))
        y = hidden @ params["last"].astype(jnp.float32)
        return jnp.mean((y[:, :8] - x @ teacher / 6) ** 2)

    return weights, loss


def train(tx, params, state, loss, steps):
    @jax.jit
    def one(params, state, seed):
        updates, state = tx.update(jax.grad(loss)(params, seed), state, params)
        return optax.apply_updates(params, updates), state

    for seed in steps:
        params, state = one(params, state, seed)
    return params, state


def test_training_goes_on_where_it_was():
    weights, loss = regression()
    stock = optax.adamw(3e-3)
    tx = optax_flash.master_weights(optax_flash.adamw8(3e-3))

    def held_out(params):
        return float(np.mean([loss(params, seed) for seed in range(1000, 1010)]))

    middle = train(stock, weights, stock.init(weights), loss, range(60))
    uninterrupted, _ = train(stock, *middle, loss, range(60, 120))
    expected = held_out(uninterrupted)
    assert expected < 0.8 * held_out(middle[0])  # there was something to learn

    like = optax_flash.cast_params(weights, jnp.bfloat16)
    params, state = from_optax_state(tx, middle[1], middle[0], like)
    params, state = train(tx, params, state, loss, range(60, 90))
    back = train(stock, *to_optax_state(tx, state, params), loss, range(90, 120))
    assert held_out(back[0]) == pytest.approx(expected, rel=0.02)


def test_nnx_and_linen():
    """Their states go on with the weights and moments of Flax's own."""
    x = jnp.ones((8, 64))
    old_model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    old = nnx.Optimizer(old_model, optax.adamw(1e-2), wrt=nnx.Param)
    old.update(old_model, nnx.grad(lambda m: jnp.mean(m(x) ** 2))(old_model))
    weights = nnx.as_pure(nnx.state(old_model, nnx.Param))
    optax_state = nnx.as_pure(old.opt_state)

    model = nnx.Linear(64, 64, rngs=nnx.Rngs(1))
    optimizer = optax_flash.flax.Optimizer(model, optax_flash.adamw8(1e-2))
    like = nnx.as_pure(nnx.state(model, nnx.Param))
    params, opt_state = from_optax_state(optimizer.tx, optax_state, weights, like)
    nnx.update(model, params)
    nnx.update(optimizer.opt_state, nnx.state(opt_state))
    chex.assert_trees_all_close(optimizer.fp32_params(model), weights, rtol=2**-15)
    assert optax.tree.get(nnx.as_pure(optimizer.opt_state), "count") == 1

    state = optax_flash.flax.TrainState.create(
        apply_fn=None, params=weights, tx=optax_flash.adamw8(1e-2)
    )
    params, opt_state = from_optax_state(state.tx, optax_state, weights, state.params)
    state = state.replace(params=params, opt_state=opt_state)
    chex.assert_trees_all_close(state.fp32_params(), weights, rtol=2**-15)
    _, back = to_optax_state(state.tx, state.opt_state, state.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, optax_state)
    chex.assert_trees_all_close(back[0].nu, optax_state[0].nu, atol=1e-6)


# --- bad input


def test_a_state_of_another_optimizer_is_named():
    weights, lion = run(optax.lion(1e-2), make(0), 1)
    tx = optax_flash.adamw8(1e-2)
    with pytest.raises(ValueError, match="has nothing at '0/nu/b' where an array"):
        from_optax_state(tx, lion, weights)
    state = tx.init(weights)
    with pytest.raises(ValueError, match="The state has an array .* at '.*'"):
        to_optax_state(optax_flash.lion8(1e-2), state, weights)
    smaller = {k: x for k, x in weights.items() if k != "v"}
    with pytest.raises(ValueError, match=r"'inner_state/0/mu/v' where nothing is"):
        to_optax_state(tx, state, smaller)


def test_right_leaves_in_other_nodes_are_refused():
    weights, (adam, *rest) = run(optax.adam(1e-2), make(0), 1)
    as_read_from_a_file = (adam._asdict(), *rest)
    with pytest.raises(ValueError, match="right leaves in other nodes"):
        from_optax_state(optax_flash.adam8(1e-2), as_read_from_a_file, weights)


def test_an_init_under_jit():
    """A state says its codecs itself, also where a cached trace made it."""
    tx = optax_flash.adamw8(1e-2)
    jitted = optax.GradientTransformation(jax.jit(tx.init), tx.update)
    state = jitted.init(make(0))
    got = to_optax_state(jitted, jitted.init(make(0)), make(0))
    chex.assert_trees_all_equal(got, to_optax_state(tx, state, make(0)))
    assert got[1][0].mu["w"].dtype == jnp.float32
