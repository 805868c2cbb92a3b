"""Params that gradients lack, and trees without params: what stock optax makes of them.

Equinox is imitated: a module is a pytree whose leaves are arrays and functions, and its
filtered form has None in place of the functions.
"""

import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_flash
from optax_flash import master_params, master_weights
from optax_flash.flax import Optimizer, TrainState
from tests.tiers import quick

MASKED = optax.MaskedNode()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "frozen", "activation", "steps"),
    meta_fields=(),
)
@dataclasses.dataclass
class Module:
    """As an ``equinox.Module`` is, with a leaf of each kind."""

    weight: object
    frozen: object
    activation: object
    steps: object


def module(dtype=jnp.float32):
    weight = jax.random.normal(jax.random.key(0), (64, 64)).astype(dtype)
    frozen = jax.random.normal(jax.random.key(1), (64, 64)).astype(dtype)
    return Module(weight, frozen, jnp.tanh, jnp.int32(3))


def arrays(tree):
    """``equinox.filter(tree, equinox.is_array)``."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else None, tree)


def trained(model, absent=None):
    """Gradients, which the weight alone has."""
    g = jax.random.normal(jax.random.key(2), model.weight.shape)
    return Module(g.astype(model.weight.dtype), absent, absent, absent)


def only_weight(model):
    return Module(model.weight, None, None, None)


def apply_updates(model, updates):
    """``equinox.apply_updates``."""
    return jax.tree.map(
        lambda u, p: p if u is None else p + u,
        updates,
        model,
        is_leaf=lambda x: x is None,
    )


ALIASES = {
    "adamw8": (optax_flash.adamw8(1e-2), optax.adamw(1e-2)),
    "adamw4": (optax_flash.adamw4(1e-2), None),
    "adam8": (optax_flash.adam8(1e-2), optax.adam(1e-2)),
    "lion8": (optax_flash.lion8(1e-2), optax.lion(1e-2)),
    "sgd8": (optax_flash.sgd8(1e-2, 0.9), optax.sgd(1e-2, 0.9)),
    "lora_pre": (optax_flash.lora_pre_adamw(1e-2, rank=64), None),
    "lowrank": (optax_flash.lowrank_adamw(1e-2, rank=4), None),
    "muon": (optax_flash.lora_pre_muon(1e-2, rank=4), None),
    "tamed": (optax_flash.tamed_adamw8(1e-2, threshold=9.0), optax.adamw(1e-2)),
}


@pytest.mark.parametrize("absent", [None, MASKED], ids=["None", "MaskedNode"])
@pytest.mark.parametrize("name", quick(["adamw8", "adamw4", "lora_pre"], ALIASES))
def test_params_count_only_where_updates_have_leaves(name, absent):
    """The whole module as params: the update of the filtered one, bit for bit."""
    tx, stock = ALIASES[name]
    model = module()
    grads = trained(model, absent)
    filtered = Module(model.weight, absent, absent, absent)
    state = tx.init(filtered)
    expected, expected_state = tx.update(grads, state, filtered)
    found, found_state = tx.update(grads, state, model)
    chex.assert_trees_all_equal((found, found_state), (expected, expected_state))
    if stock is not None:
        wanted, _ = stock.update(grads, stock.init(filtered), filtered)
        np.testing.assert_allclose(found.weight, wanted.weight, rtol=0.02)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_module_under_master_weights(finished, dtype):
    """Three steps of Equinox: weights are stock's in float32, all else is untouched."""
    model, stock_model = module(dtype), module(dtype)
    tx = master_weights(optax.adam(1e-2), 32, finished=finished, track_params=True)
    stock = optax.adam(1e-2)
    stock_model = dataclasses.replace(
        stock_model, weight=stock_model.weight.astype(jnp.float32)
    )
    state, stock_state = tx.init(arrays(model)), stock.init(only_weight(stock_model))
    for _ in range(3):
        grads = trained(model)
        updates, state = tx.update(grads, state, model)
        assert (updates.frozen, updates.activation, updates.steps) == (None,) * 3
        grads = Module(grads.weight.astype(jnp.float32), None, None, None)
        wanted, stock_state = stock.update(grads, stock_state, stock_model)
        before = model
        model = apply_updates(model, updates)
        stock_model = apply_updates(stock_model, wanted)
        assert model.frozen is before.frozen and model.activation is jnp.tanh
    assert optax_flash.changed_params(state, model) == []
    weights = master_params(state, model)
    assert weights.activation is jnp.tanh and weights.steps == 3
    np.testing.assert_array_equal(weights.frozen, model.frozen.astype(jnp.float32))
    # An update in bfloat16 misses a weight that it brings close to zero.
    atol = 5e-5 if dtype == jnp.bfloat16 and not finished else 1e-7
    np.testing.assert_allclose(weights.weight, stock_model.weight, rtol=1e-6, atol=atol)
    changed = dataclasses.replace(model, frozen=2 * model.frozen)
    assert optax_flash.changed_params(state, changed) == ["frozen"]


@pytest.mark.parametrize(
    "tx",
    [
        optax_flash.adamw8(1e-2),
        master_weights(optax_flash.adamw8(1e-2), finished=False),
        master_weights(optax_flash.adamw8(1e-2), finished=True, track_params=True),
        optax.chain(optax.clip(1.0), master_weights(optax_flash.adamw4(1e-2))),
    ],
)
def test_a_leaf_without_a_gradient_keeps_its_state(tx):
    """Also where init saw it: the state keeps its structure, as scans need it."""
    params = {"a": {"w": jnp.ones((64, 64), jnp.bfloat16)}, "b": jnp.ones((64, 64))}
    both = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    params_state = tx.update(both, state, params)[1]
    for grads in ({"a": None, "b": both["b"]}, {"a": {"w": None}, "b": both["b"]}):
        updates, after = tx.update(grads, params_state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        chex.assert_trees_all_equal_structs(after, state)
        old = jax.tree_util.tree_leaves_with_path(params_state)
        new = jax.tree.leaves(after)
        for (path, x), y in zip(old, new, strict=True):
            if "w" in (getattr(key, "key", None) for key in path):
                np.testing.assert_array_equal(x, y, err_msg=str(path))
        # A later gradient finds the state as it was.
        chex.assert_trees_all_equal_structs(tx.update(both, after, params)[1], state)


def test_gradients_of_params_that_are_not_there():
    """As in stock optax: an update for nothing, and nothing to apply it to."""
    params, grads = {"a": jnp.ones(4), "b": None}, {"a": jnp.ones(4), "b": jnp.ones(4)}
    stock = optax.sgd(0.5)
    expected, _ = stock.update(grads, stock.init(params), params)
    expected = optax.apply_updates(params, expected)
    for tx in (
        optax_flash.compress(stock),
        master_weights(stock, finished=False),
        master_weights(stock, finished=True),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        chex.assert_trees_all_equal(optax.apply_updates(params, updates), expected)


@pytest.mark.parametrize("wrap", [optax_flash.compress, master_weights])
def test_init_names_a_leaf_that_is_a_function(wrap):
    with pytest.raises(ValueError, match=r"'activation' is a PjitFunction.*filter"):
        wrap(optax.adam(1e-3)).init(module())


EMPTY = {
    "{}": {},
    "()": (),
    "None": {"a": None},
    "MaskedNode": {"a": MASKED},
    "nested": {"a": [None, {"c": {}}], "b": MASKED},
}
TRANSFORMATIONS = {name: tx for name, (tx, _) in ALIASES.items()} | {
    "adam4": optax_flash.adam4(1e-3),
    "sgd4": optax_flash.sgd4(0.1, 0.9),
    "lion4": optax_flash.lion4(1e-3),
    "scale_by_adam8": optax_flash.scale_by_adam8(),
    "scale_by_lion8": optax_flash.scale_by_lion8(),
    "trace8": optax_flash.trace8(0.9),
    "tame": optax_flash.scale_by_tamed_adam(1.0),
    "scale_by_lora_pre": optax_flash.scale_by_lora_pre(rank=4),
    "scale_by_lora_pre_muon": optax_flash.scale_by_lora_pre_muon(rank=4),
    "scale_by_lowrank_adam": optax_flash.scale_by_lowrank_adam(rank=4),
    "additive": master_weights(optax_flash.adamw8(1e-3), finished=False),
    "finished": master_weights(
        optax_flash.adamw8(1e-3), 32, finished=True, track_params=True
    ),
    "partition": master_weights(
        optax.partition({"all": optax_flash.adamw8(1e-3)}, "all"), finished=True
    ),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_every_transformation_steps_over_no_params(kind):
    params = EMPTY[kind]
    for name, tx in TRANSFORMATIONS.items():
        state = tx.init(params)
        updates, after = tx.update(params, state, params)
        assert optax.apply_updates(params, updates) == params, name
        assert jax.tree.structure(after) == jax.tree.structure(state), name
        for field in ("step", "count"):
            if found := optax.tree.get_all_with_path(after, field):
                assert all(count == 1 for _, count in found), name


@pytest.mark.parametrize("kind", EMPTY)
def test_every_report_on_no_params(kind):
    params = EMPTY[kind]
    mesh = jax.make_mesh((1,), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for name in ("adamw8", "finished", "lowrank", "muon", "partition"):
        tx = TRANSFORMATIONS[name]
        state = tx.init(params)
        report = optax_flash.memory_report(tx, params)
        assert report.params == 0 and report.bytes_per_param == 0.0, name
        assert report.stock_bytes_per_param == 0.0 and "(no param)" in str(report)
        for platform in (None, "cuda"):
            paths = optax_flash.explain(tx, params, platform=platform).paths
            assert {x for path in paths for x in path.params} <= {"(state)"}, name
        numerics = optax_flash.numerics_report(tx, state, params, params)
        numerics.warn()
        assert numerics.update_rms == {} and "step RMS" in str(numerics), name
        format_ = optax_flash.state_format(tx, params)
        assert format_["leaves"] == {}, name
        optax_flash.check_format(format_, tx, params)
        weights, plain = optax_flash.to_optax_state(tx, state, params)
        again = optax_flash.from_optax_state(tx, plain, weights, like=params)
        assert jax.tree.structure(again) == jax.tree.structure((params, state)), name
        shardings = optax_flash.state_sharding(tx, params, replicated)
        assert set(jax.tree.leaves(shardings)) == {replicated}, name
        assert optax.tree.map_params(tx, lambda x: x, state) == state, name


def test_no_mesh_is_known_of_no_params():
    with pytest.raises(ValueError, match="no params, and so no mesh"):
        optax_flash.state_sharding(optax_flash.adamw8(1e-3), {})


@pytest.mark.parametrize("kind", EMPTY)
def test_weights_of_no_params(kind, tmp_path):
    params, tx = EMPTY[kind], TRANSFORMATIONS["finished"]
    state = tx.init(params)
    assert optax_flash.cast_params(params, jnp.bfloat16) == params
    assert master_params(state, params) == params
    state = optax_flash.set_master_params(state, params, params)
    assert optax_flash.changed_params(state, params) == []
    path = tmp_path / "model.safetensors"
    optax_flash.save_safetensors(path, params, state)
    assert optax_flash.load_safetensors(path, params) == params
    tree = {"params": params, "state": state}
    for saved in (params, tree):
        folder = pathlib.Path(tmp_path, str(len(saved)), str(saved is tree))
        with optax_flash.Checkpoints(folder, tx, params) as checkpoints:
            checkpoints.save(1, saved)
            restored = checkpoints.restore(saved)
        assert jax.tree.structure(restored) == jax.tree.structure(saved)


class TestTrainStatesOfNothing:
    def test_linen(self):
        state = TrainState.create(
            apply_fn=None, params={}, tx=optax_flash.adamw8(1e-3)
        ).apply_gradients(grads={})
        assert state.step == 1 and state.params == {} and state.fp32_params() == {}

    def test_a_filter_that_selects_nothing(self):
        model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        kernel = model.kernel[...]
        optimizer = Optimizer(model, optax_flash.adamw8(1e-3), wrt=nnx.LoRAParam)
        optimizer.update(model, nnx.state(model, nnx.LoRAParam))
        assert optimizer.step[...] == 1
        assert model.kernel[...] is kernel
        assert not jax.tree.leaves(optimizer.fp32_params(model))


def test_release_of_params_without_elements():
    """The gradient release takes a model in which a layer has nothing to train."""
    release = optax_flash.release
    model = release.sequence(
        release.layer("empty", lambda w, x: x),
        release.layer("last", lambda w, x, _: jnp.mean((x @ w) ** 2)),
    )
    params = {"empty": {}, "last": jnp.ones((64, 64))}
    tx = optax_flash.adamw8(1e-3)
    step = jax.jit(release.train_step(model, tx))
    x = jnp.ones((2, 64))
    loss, new, _ = step(params, tx.init(params), x)
    grads = jax.grad(lambda p: model(p, x))(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_close(new, optax.apply_updates(params, updates), rtol=1e-6)
    assert loss == model(params, x)
