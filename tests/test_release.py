"""A released step is the ordinary step, and what cannot be released says so.

Compiled without XLA's optimisations, as elsewhere a multiplication and an addition are
contracted into one in some programs and not in others.
"""

import functools
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
import optax_flash.flax
from optax_flash import release
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")

LAYERS, WIDTH, HIDDEN, VOCAB = 3, 48, 80, 96
"""Matrices of a layer have 3840 elements, under ``min_size``; stacks of them are over
it. No row holds whole groups."""


def block(p, x, tokens):
    h = jnp.tanh(x @ p["up"] + p["bias"].astype(x.dtype))
    return x + h @ p["down"]


def embed(p, tokens):
    return p[tokens]


def head(p, x, tokens):
    logits = (x * p["norm"].astype(x.dtype)) @ p["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), tokens
    ).mean()


ENDS = release.layer("embed", embed), release.layer(("norm", "embed"), head)
STACKED = release.sequence(ENDS[0], release.scan("blocks", block), ENDS[1])
UNROLLED = release.sequence(
    ENDS[0], *(release.layer(f"blocks/{i}", block) for i in range(LAYERS)), ENDS[1]
)
TOKENS = jnp.arange(24).reshape(2, 12) * 7 % VOCAB


def make_params(dtype=jnp.bfloat16, stacked=True):
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.1, dtype)

    blocks = {
        "up": array(LAYERS, WIDTH, HIDDEN),
        "bias": jnp.zeros((LAYERS, HIDDEN)),
        "down": array(LAYERS, HIDDEN, WIDTH),
    }
    if not stacked:
        blocks = [jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(LAYERS)]
    return {"embed": array(VOCAB, WIDTH), "blocks": blocks, "norm": jnp.ones(WIDTH)}


def ordinary_step(model, tx):
    def step(params, opt_state, *batch):
        loss, grads = jax.value_and_grad(model)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return loss, optax.apply_updates(params, updates), opt_state

    return step


def run(step, tx, params, *batch, steps=2):
    """The last loss, params and state."""
    state = tx.init(params)
    step = jax.jit(step)
    for _ in range(steps):
        loss, params, state = step(params, state, *batch)
    return loss, params, state


def check_equal(model, tx, params, *batch):
    expected = run(ordinary_step(model, tx), tx, params, *batch)
    found = run(release.train_step(model, tx), tx, params, *batch)
    chex.assert_trees_all_equal(found, expected)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), found[1], params)
    assert all(jax.tree.leaves(changed))


def finished(inner, bits=24, **kwargs):
    return optax_flash.master_weights(inner, bits, **kwargs)


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


OPTIMIZERS = {
    "adamw8_24": lambda: finished(
        optax_flash.adamw8(1e-2, weight_decay=0.1, mask=matrices)
    ),
    "adamw4_32": lambda: optax_flash.master_weights(optax_flash.adamw4(1e-2), 32),
    "lion8": lambda: optax_flash.lion8(optax.linear_schedule(1e-2, 1e-3, 5)),
    "sgd8_24": lambda: finished(optax_flash.sgd8(0.1, momentum=0.9), track_params=True),
    "injected": lambda: finished(
        optax.inject_hyperparams(optax_flash.adamw8, hyperparam_dtype=jnp.float32)(
            learning_rate=1e-2
        )
    ),
    "partition": lambda: optax.partition(
        {"a": optax_flash.compress(optax.adan(1e-2), "affine8"), "b": optax.sgd(0.1)},
        {"embed": "b", "blocks": {"up": "a", "down": "a", "bias": "b"}, "norm": "b"},
    ),
    # Both count over all params.
    "tamed_adamw8": lambda: optax.chain(
        optax.zero_nans(), optax_flash.tamed_adamw8(1e-2, threshold=1e-3)
    ),
    "kernels": lambda: finished(optax_flash.adamw4(1e-2, implementation="interpret")),
}


@pytest.mark.parametrize("name", quick(["adamw8_24", "lion8"], OPTIMIZERS))
def test_a_stack_equals_the_ordinary_step(name):
    check_equal(STACKED, OPTIMIZERS[name](), make_params(), TOKENS)


def test_stock_optax():
    """Close alone: XLA computes gradients and such an update in one loop, and orders
    multiplications there as it likes."""
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, 100))
    params = make_params(jnp.float32)
    expected = run(ordinary_step(STACKED, tx), tx, params, TOKENS)
    found = run(release.train_step(STACKED, tx), tx, params, TOKENS)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_float32_params():
    check_equal(STACKED, optax_flash.adamw8(1e-2), make_params(jnp.float32), TOKENS)


def test_unrolled_layers_equal_the_ordinary_step():
    tx = finished(optax_flash.adamw8(1e-2))
    check_equal(UNROLLED, tx, make_params(stacked=False), TOKENS)


@pytest.mark.full
def test_unrolled_layers_take_what_is_not_elementwise():
    tx = finished(optax_flash.compress(optax.contrib.muon(1e-2)))
    params = make_params(stacked=False)
    _, *expected = run(ordinary_step(UNROLLED, tx), tx, params, TOKENS, steps=1)
    _, *found = run(release.train_step(UNROLLED, tx), tx, params, TOKENS, steps=1)
    weights = (optax_flash.master_params(s, p) for p, s in (found, expected))
    chex.assert_trees_all_close(*weights, atol=1e-4)


def test_a_layer_used_three_times_is_updated_once():
    def twist(w, x, *_):
        return jnp.tanh(x @ w)

    model = release.sequence(
        release.layer("a", twist),
        release.layer("b", twist),
        release.layer("a", twist),
        release.layer("a", lambda w, x, *_: jnp.mean(x @ w)),
    )
    params = {"a": jnp.eye(64) + 0.1, "b": jnp.eye(64) - 0.1}
    check_equal(model, optax_flash.adamw8(1e-2), params, jnp.ones((2, 64)))


def test_integers_beside_x_and_auxiliary_outputs():
    model = release.sequence(
        release.layer("a", lambda w, x: (x @ w, jnp.int32(0))),
        release.scan("b", lambda w, x, _: (x[0] + jnp.tanh(x[0] @ w), x[1] + 1)),
        release.layer("c", lambda w, x, _: (jnp.mean(x[0] @ w), {"layers": x[1]})),
        has_aux=True,
    )
    params = {"a": jnp.eye(8), "b": jnp.zeros((5, 8, 8)), "c": jnp.ones((8, 1))}
    tx = optax.sgd(0.1)
    (loss, aux), new, _ = run(
        release.train_step(model, tx), tx, params, jnp.ones((2, 8)), steps=1
    )
    assert loss == 8 and aux["layers"] == 5
    value, grads = jax.value_and_grad(model, has_aux=True)(params, jnp.ones((2, 8)))
    assert value == (8, {"layers": 5})
    chex.assert_trees_all_close(
        new, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    )


def test_per_layer_clipping():
    params, tx = make_params(jnp.float32), optax.sgd(1.0)
    clip = optax.clip_by_global_norm(0.01)
    step = release.train_step(STACKED, tx, per_layer=clip)
    _, found, _ = run(step, tx, params, TOKENS, steps=1)
    grads = jax.jit(jax.grad(STACKED))(params, TOKENS)

    def clipped(grads):
        return clip.update(grads, clip.init(grads))[0]

    # A shared param belongs to the first that uses it.
    expected = {name: clipped(grads[name]) for name in ("embed", "norm")}
    expected["blocks"] = jax.vmap(clipped)(grads["blocks"])
    steps = jax.tree.map(jnp.subtract, params, found)
    chex.assert_trees_all_close(steps, expected, atol=1e-7)
    norm = optax.tree.norm(jax.tree.map(lambda x: x[1], steps["blocks"]))
    np.testing.assert_allclose(norm, 0.01, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", quick([AxisType.Auto], [AxisType.Auto, AxisType.Explicit]), ids=str
)
def test_sharded_equals_one_device(kind):
    """All of it elementwise, as sums over devices are rounded in another order."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: tests/conftest.py asks for them on CPU")
    model = release.sequence(
        release.layer("first", lambda w, x: x * w),
        release.scan("blocks", lambda w, x, _: x + jnp.tanh(x * w)),
        release.layer("last", lambda w, x, _: jnp.sum(x * w)),
    )
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for name, shape in {
            "first": (64, 256),
            "blocks": (2, 64, 256),
            "last": (64, 256),
        }.items()
    }
    tx = finished(optax_flash.adamw8(1e-2))
    x = jnp.ones((64, 256), jnp.bfloat16)
    alone = run(ordinary_step(model, tx), tx, params, x)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)
    rows = NamedSharding(mesh, P("fsdp", "tp"))
    layers = NamedSharding(mesh, P(None, "fsdp", "tp"))
    shardings = {"first": rows, "blocks": layers, "last": rows}
    with jax.set_mesh(mesh):
        found = run(
            release.train_step(model, tx),
            tx,
            jax.device_put(params, shardings),
            jax.device_put(x, rows),
        )
    chex.assert_trees_all_equal(found[1:], alone[1:])


def test_train_state():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.Dense(64)(nn.tanh(nn.Dense(64)(x)))

    x = jnp.ones((2, 64))
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embed": jnp.eye(64),
        "blocks": jax.vmap(Block().init, (0, None))(keys, x)["params"],
        "head": jnp.ones((64, 1)),
    }
    model = release.sequence(
        release.layer("embed", lambda p, x: x @ p),
        release.scan("blocks", lambda p, x, _: Block().apply({"params": p}, x)),
        release.layer("head", lambda p, x, _: jnp.mean((x @ p) ** 2)),
    )
    state = optax_flash.flax.TrainState.create(
        apply_fn=model, params=params, tx=optax_flash.adamw8(1e-2)
    )
    loss, grads = jax.jit(jax.value_and_grad(model))(state.params, x)
    expected = state.apply_gradients(grads=grads)
    found_loss, found = jax.jit(lambda s: s.release_gradients(model, x))(state)
    assert found_loss == loss and found.step == 1
    chex.assert_trees_all_equal(found.params, expected.params)


class NormState(NamedTuple):
    norm: jax.Array


def norm_of_updates():
    def update(updates, state, params=None):
        del state, params
        return updates, NormState(optax.tree.norm(updates))

    return optax.GradientTransformation(lambda _: NormState(jnp.zeros([])), update)


ADAMW8 = functools.partial(optax_flash.adamw8, 1e-3)
REFUSED = {
    "global norm": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), ADAMW8()),
        r"'embed' needs the gradient of .* global norm.*per_layer",
    ),
    "global norm inside": (
        lambda: finished(optax.chain(optax.clip_by_global_norm(1.0), ADAMW8())),
        "global norm.*per_layer",
    ),
    "accumulation": (
        lambda: optax.MultiSteps(ADAMW8(), 2),
        "needs the gradient of .* lax.cond .*MultiSteps",
    ),
    "norm of a stack": (
        lambda: optax.chain(optax.clip_by_block_rms(1.0), ADAMW8()),
        "'blocks/.*', a stack of 3 layers.*a sum along an axis.*per_layer",
    ),
    "lamb": (
        lambda: optax_flash.compress(optax.lamb(1e-3)),
        "'blocks/.*a sum along an axis.*not stacked",
    ),
    "muon": (
        lambda: finished(optax_flash.compress(optax.contrib.muon(1e-3))),
        "'blocks/.*an array is reshaped.*not stacked",
    ),
    "low rank": (
        lambda: optax_flash.lowrank_adamw(1e-3, rank=4, min_dim=8),
        "'blocks/.*a matrix product.*not stacked",
    ),
    "a norm in the state": (
        lambda: optax.chain(ADAMW8(), norm_of_updates()),
        "'1/norm' of the state .* whole gradients",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_other_gradients_raises(name):
    make, message = REFUSED[name]
    tx, params = make(), make_params()
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(release.train_step(STACKED, tx), params, state, TOKENS)


SCAN = release.scan("blocks", block)
BAD_MODELS = {
    "a param without a segment": (ENDS, "no segment uses .*'blocks/"),
    "a name that leads nowhere": (
        (ENDS[0], release.scan("block", block), ENDS[1]),
        "no params at 'block'",
    ),
    "a stack that is shared": (
        (ENDS[0], SCAN, release.layer(("norm", "embed", "blocks/up"), head)),
        "'blocks/up' belongs to another segment",
    ),
    "leaves of no stack": (
        (ENDS[0], release.scan("blocks/up", block), release.scan("", block), ENDS[1]),
        "no params at ''",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_do_not_fit_the_params(name):
    segments, message = BAD_MODELS[name]
    params, tx = make_params(), ADAMW8()
    step = release.train_step(release.sequence(*segments), tx)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, params, jax.eval_shape(tx.init, params), TOKENS)


def test_stacks_of_unequal_length():
    params, tx = make_params(), ADAMW8()
    params["blocks"]["bias"] = jnp.zeros((2, HIDDEN))
    with pytest.raises(ValueError, match=r"'blocks/down' has shape \[3, 80, 48\]"):
        release.train_step(STACKED, tx)(params, tx.init(params), TOKENS)


def test_a_scan_at_an_end_is_refused():
    with pytest.raises(ValueError, match="both are a release.layer"):
        release.sequence(ENDS[0], SCAN)


def test_clipping_with_a_state_is_refused():
    params, tx = make_params(), ADAMW8()
    step = release.train_step(STACKED, tx, per_layer=optax.zero_nans())
    with pytest.raises(ValueError, match="per_layer keeps a state.*found_nan"):
        jax.eval_shape(step, params, jax.eval_shape(tx.init, params), TOKENS)


def test_layers_that_change_the_dtype_of_x_are_refused():
    scan = release.scan("blocks", lambda p, x, _: x.astype(jnp.float32) + p["up"][0, 0])
    params = make_params()
    with pytest.raises(ValueError, match=r"'blocks'.*bfloat16\[2,12,48\].*float32"):
        jax.eval_shape(release.sequence(ENDS[0], scan, ENDS[1]), params, TOKENS)
