"""Sixteen optimizers of optax under ``compress``, against themselves without it."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from optax_flash import Affine8, Companded8, compress, state_format
from tests.tiers import quick

KERNEL = (32, 128)  # 4096 elements: the smallest that is compressed by default.
STEPS = 40


def decay_mask(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


class Optimizer(NamedTuple):
    """What is tested.

    Attributes:
      make: makes the optimizer.
      fields: those in codes.
      rest: those that mirror the params in float32.
      rtol: of the first update.
      distance: see ``test_trajectory``.
    """

    make: functools.partial
    fields: set[str]
    rest: set[str] = frozenset()
    rtol: float = 1e-5
    distance: float = 0.02


OPTIMIZERS = {
    "adam": Optimizer(functools.partial(optax.adam, 0.01), {"mu", "nu"}),
    "adamw": Optimizer(
        functools.partial(optax.adamw, 0.01, weight_decay=0.1, mask=decay_mask),
        {"mu", "nu"},
    ),
    "nadamw": Optimizer(functools.partial(optax.nadamw, 0.01), {"mu", "nu"}),
    "amsgrad": Optimizer(
        functools.partial(optax.amsgrad, 0.01), {"mu", "nu", "nu_max"}
    ),
    "adabelief": Optimizer(functools.partial(optax.adabelief, 0.01), {"mu", "nu"}),
    "radam": Optimizer(functools.partial(optax.radam, 0.01), {"mu", "nu"}),
    # Its moments begin at 1e-6, which is not exact in codes.
    # Begins with a second moment, stored to a 64th of it: half of that in its root.
    "yogi": Optimizer(functools.partial(optax.yogi, 0.01), {"mu", "nu"}, rtol=1 / 128),
    "adan": Optimizer(functools.partial(optax.adan, 0.01), {"m", "v", "n", "g"}),
    # A momentum near zero may change its sign, and then the update does, whole.
    "lion": Optimizer(functools.partial(optax.lion, 0.003), {"mu"}, distance=0.05),
    "sgd_momentum": Optimizer(
        functools.partial(optax.sgd, 0.05, momentum=0.9), {"trace"}
    ),
    "sgd_nesterov": Optimizer(
        functools.partial(optax.sgd, 0.05, momentum=0.9, nesterov=True), {"trace"}
    ),
    "rmsprop": Optimizer(functools.partial(optax.rmsprop, 0.01), {"nu"}),
    "ademamix": Optimizer(
        functools.partial(contrib.ademamix, 0.01), {"m1", "nu"}, {"m2"}
    ),
    "adopt": Optimizer(functools.partial(contrib.adopt, 0.01), {"mu", "nu"}),
    "muon": Optimizer(functools.partial(contrib.muon, 0.01), {"mu"}),
    "schedule_free_adamw": Optimizer(
        functools.partial(contrib.schedule_free_adamw, 0.01), {"nu"}, {"z"}
    ),
}


QUICK = ("adamw", "lion", "sgd_nesterov")


@pytest.fixture(params=quick(QUICK, OPTIMIZERS), name="optimizer")
def optimizer_fixture(request):
    return OPTIMIZERS[request.param]


def make_params():
    """A leaf that is compressed among all that are not."""
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.normal(size=KERNEL), jnp.float32),
        "small": jnp.asarray(rng.normal(size=7), jnp.float32),
        "scalar": jnp.float32(0.5),
        "empty": jnp.zeros((0,)),
        "none": None,
    }


def fields_of(state, leaf):
    """The state's fields by name, at one param."""
    return {
        path[-2].name: x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if len(path) > 1 and path[-1] == jax.tree_util.DictKey(leaf)
    }


def test_fields(optimizer):
    params = make_params()
    state = jax.eval_shape(compress(optimizer.make()).init, params)
    kernel = fields_of(state.inner_state, "kernel")
    assert set(kernel) == optimizer.fields | optimizer.rest
    for name, x in kernel.items():
        assert x.shape == KERNEL
        assert x.dtype == ("uint8" if name in optimizer.fields else "float32")
    scales = [tree["kernel"] for tree in state.scales.values()]
    scales = [x for x in scales if not isinstance(x, optax.MaskedNode)]
    assert len(scales) == len(optimizer.fields)
    for x in scales:
        assert x.shape == (32, 4) and x.dtype == jnp.bfloat16
    for leaf in ("small", "scalar", "empty"):
        for x in fields_of(state.inner_state, leaf).values():
            assert x.shape == params[leaf].shape and x.dtype == jnp.float32
    assert all(tree["none"] is None for tree in state.scales.values())


def test_first_update(optimizer):
    """Zeros decode to zeros, and the update is made of what is not yet rounded."""
    params = make_params()
    grads = jax.tree.map(lambda p: jnp.flip(p) + 0.1, params)
    stock = optimizer.make()
    tx = compress(stock)
    expected, _ = jax.jit(stock.update)(grads, stock.init(params), params)
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_close(updates, expected, rtol=optimizer.rtol, atol=1e-8)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def regression(tx, dtype):
    """Params after a linear regression on noisy batches, and the updates' dtype.

    The optimizer sees params and gradients in ``dtype``. The sum of its updates is
    float32, so that what differs is the optimizer and not the params' rounding.
    """
    rng = np.random.default_rng(1)
    truth = jnp.asarray(rng.normal(size=KERNEL), jnp.float32)
    # Inputs of different sizes, as are the gradients' rows then.
    x = rng.normal(size=(STEPS, 16, 32)) * np.exp(rng.normal(size=32) / 2)
    noise = rng.normal(size=(STEPS, 16, 128))

    def cast(tree):
        return jax.tree.map(lambda p: p.astype(dtype), tree)

    def step(carry, batch):
        params, state = carry
        x, noise = batch
        error = x @ (params["kernel"] - truth) + noise
        grads = {"kernel": x.T @ error / 16}
        updates, state = tx.update(cast(grads), state, cast(params))
        chex.assert_trees_all_equal_dtypes(updates, cast(grads))
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params, batches):
        carry = params, tx.init(cast(params))
        return jax.lax.scan(step, carry, batches)[0][0]

    params = {"kernel": jnp.zeros(KERNEL)}
    return run(params, jax.tree.map(jnp.float32, (x, noise)))


def test_trajectory(optimizer):
    """Compressed, an optimizer ends near where it ends in float32.

    The distance is a share of the way from the start. Rounding moves a value by at most
    1.6 % of its group's largest, and on average not at all, so over 40 steps a percent
    or so remains. Gradients in half precision add little to it.
    """
    expected = regression(optimizer.make(), "float32")
    for dtype in ("float32", "bfloat16", "float16"):
        params = regression(compress(optimizer.make()), dtype)
        difference = optax.tree.norm(optax.tree.sub(params, expected))
        assert difference / optax.tree.norm(expected) < optimizer.distance, dtype


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx, mask: compress(optax.masked(tx, mask)),
        lambda tx, mask: optax.masked(compress(tx), mask),
    ],
    ids=["masked inside", "masked outside"],
)
def test_masked(wrap):
    """What is masked has no codes and no scales, and its gradients pass through."""
    params = {"kernel": jnp.ones(KERNEL), "frozen": {"kernel": jnp.ones(KERNEL)}}
    tx = wrap(optax.adam(0.01), {"kernel": True, "frozen": {"kernel": False}})
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(2):
        updates, state = update(params, state, params)
    chex.assert_trees_all_equal(updates["frozen"], params["frozen"])
    # A code of v is up to 1/32 of it, and half of that in its root.
    expected = -0.01 * jnp.ones(KERNEL)
    chex.assert_trees_all_close(updates["kernel"], expected, rtol=1 / 64)
    for name in ("mu", "nu", "mu_scales", "nu_scales"):
        frozen = optax.tree.get(state, name)["frozen"]["kernel"]
        assert isinstance(frozen, optax.MaskedNode)
    assert optax.tree.get(state, "mu")["kernel"].dtype == jnp.uint8


MU, NU = Companded8(), Companded8(signed=False)
TWO_KERNELS = {"embed": jnp.ones(KERNEL), "dense": jnp.ones(KERNEL)}


@pytest.mark.parametrize(
    "codecs, embed, dense",
    [
        (None, {"mu": MU, "nu": NU}, {"mu": MU, "nu": NU}),
        ("affine8", *[{"mu": Affine8(), "nu": Affine8(signed=False)}] * 2),
        ({"nu": None}, {"mu": MU}, {"mu": MU}),
        ({"*embed*": None}, {}, {"mu": MU, "nu": NU}),
        ({"embed/mu": None}, {"nu": NU}, {"mu": MU, "nu": NU}),
        ({"mu": "affine8"}, *[{"mu": Affine8(), "nu": NU}] * 2),
        ({"mu": Companded8(group=64)}, *[{"mu": Companded8(group=64), "nu": NU}] * 2),
        # A codec for both fields; each gets its own sign.
        (
            {"dense/*": Companded8(group=64)},
            {"mu": MU, "nu": NU},
            {"mu": Companded8(group=64), "nu": Companded8(group=64, signed=False)},
        ),
        # The first key that fits decides.
        (
            {"*embed*": None, "mu": "affine8"},
            {},
            {"mu": Affine8(), "nu": NU},
        ),
        (
            {"mu": "affine8", "*embed*": None},
            {"mu": Affine8()},
            {"mu": Affine8(), "nu": NU},
        ),
    ],
)
def test_overrides(codecs, embed, dense):
    tx = compress(optax.adam(0.01), codecs)
    state = jax.eval_shape(tx.init, TWO_KERNELS)
    leaves = state_format(tx, TWO_KERNELS)["leaves"]
    for param, expected in (("embed", embed), ("dense", dense)):
        for name in ("mu", "nu"):
            x = optax.tree.get(state, name)[param]
            codec = expected.get(name)
            assert leaves.get(f"{param}/{name}") == (codec and repr(codec))
            assert x.dtype == ("uint8" if codec else "float32")
            if codec:
                scales = state.scales[f"{name}_scales"][param]
                assert scales.shape == codec.scales_shape(KERNEL)
                assert scales.dtype == codec.scale_dtype


def test_a_param_left_alone_is_exact():
    """And what is beside it is not disturbed by another group."""
    stock = optax.adam(0.01)
    tx = compress(stock, {"*embed*": None, "nu": Companded8(group=64)})
    state, stock_state = tx.init(TWO_KERNELS), stock.init(TWO_KERNELS)
    update, stock_update = jax.jit(tx.update), jax.jit(stock.update)
    for key in jax.random.split(jax.random.key(0), 5):
        grads = optax.tree.random_like(key, TWO_KERNELS)
        updates, state = update(grads, state)
        expected, stock_state = stock_update(grads, stock_state)
    chex.assert_trees_all_close(updates["embed"], expected["embed"], rtol=1e-5)
    error = optax.tree.norm(optax.tree.sub(updates, expected))
    assert 0 < error < 0.02 * optax.tree.norm(expected)


@pytest.mark.parametrize(
    "tx, name, codec",
    [
        (contrib.schedule_free_adamw(0.01), "z", MU),
        (contrib.ademamix(0.01), "m2", MU),
        (optax.adadelta(1.0), "e_g", NU),
        (contrib.prodigy(), "grad_sum", MU),
    ],
)
def test_a_field_that_stays_unless_it_is_named(tx, name, codec):
    params = {"kernel": jnp.ones(KERNEL)}
    for codecs, dtype in ((None, "float32"), ({name: codec}, "uint8")):
        state = jax.eval_shape(compress(tx, codecs).init, params)
        assert optax.tree.get(state, name)["kernel"].dtype == dtype


@pytest.mark.parametrize(
    "codecs, message",
    [
        ({"n": None}, "'n'.*'mu', 'nu'"),
        ({"mu": None, "embed": None}, r"'embed'.*'mu', 'nu'.*'\*embed\*'"),
        ({"mu": "int3"}, "'int3'.*companded8"),
    ],
)
def test_names_that_nobody_knows(codecs, message):
    with pytest.raises(ValueError, match=message):
        compress(optax.adam(0.01), codecs).init(TWO_KERNELS)


@pytest.mark.parametrize(
    "tx, name, signed",
    [
        (optax.sm3(0.1), "nu", True),
        (contrib.simplified_ademamix(0.01), "n", False),
        (optax.optimistic_gradient_descent(0.1), "previous_gradient", True),
        (contrib.sophia(0.01), "nu", True),
    ],
)
def test_signs_of_fields_by_another_name(tx, name, signed):
    leaves = state_format(compress(tx), {"kernel": jnp.ones(KERNEL)})["leaves"]
    assert leaves[f"kernel/{name}"] == repr(Companded8(signed=signed))


@pytest.mark.parametrize(
    "tx", [optax.rmsprop(0.01, centered=True), optax.rprop(0.01), optax.sgd(0.1)]
)
def test_nothing_to_compress(tx):
    params = {"kernel": jnp.ones(KERNEL)}
    state = compress(tx).init(params)
    chex.assert_trees_all_equal(state.inner_state, tx.init(params))
