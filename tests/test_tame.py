"""Clipped momentum: against float64, against stock AdamW, under everything else."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")

SHAPES = {"kernel": (32, 128), "bias": (32,), "scalar": ()}
RELATIVE = pytest.mark.parametrize("relative", [False, True])


def make(seed=0, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * rng.standard_t(3, size=shape), dtype)
        for name, shape in SHAPES.items()
    }


def reference(grads, threshold, relative, nesterov, b1=0.9, b2=0.999, eps=1e-8):
    """Updates and numbers of clipped elements, in float64."""
    m = v = 0.0
    updates, clipped = [], []
    for t, g in enumerate((np.asarray(g, np.float64) for g in grads), start=1):
        v = b2 * v + (1 - b2) * g * g
        v_hat = v / (1 - b2**t)
        bound = threshold * np.sqrt(v_hat) if relative else threshold
        clipped.append(np.sum(np.abs(g) > bound))
        g = np.clip(g, -bound, bound)
        m = b1 * m + (1 - b1) * g
        m_hat = m / (1 - b1**t)
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        updates.append(m_hat / (np.sqrt(v_hat) + eps))
    return updates, clipped


def unfused(update):
    """Products and sums in fused loops are rounded once or twice, as XLA likes."""
    return jax.jit(update, compiler_options={"xla_disable_hlo_passes": "fusion"})


def eager(update):
    """Operation by operation: a jitted program has fused multiply-adds in places of its
    own, so that two of them differ in last bits."""
    return update


def run(tx, grads, params, jit=jax.jit):
    state, updates, states = tx.init(params), [], []
    update = jit(tx.update)
    for g in grads:
        u, state = update(g, state, params)
        updates.append(u)
        states.append(state)
    return updates, states


@RELATIVE
@pytest.mark.parametrize("nesterov", [False, True])
def test_against_float64(relative, nesterov):
    grads = [make(seed)["kernel"] for seed in range(20)]
    tx = optax_flash.scale_by_tamed_adam(0.7, relative=relative, nesterov=nesterov)
    updates, states = run(tx, grads, grads[0])
    expected, clipped = reference(grads, 0.7, relative, nesterov)
    assert all(0 < n < grads[0].size for n in clipped[1:])
    # Elements within rounding of the bound may fall on either side: no jump there.
    for state, n in zip(states, clipped, strict=True):
        assert abs(float(state.clipped) - n) <= 1
    # float32: 1 - b2 ** t is off by a unit of 1 over 1e-3. Nesterov's two terms may
    # cancel, each off by a unit of 1 over 1 - b1 and a few in size.
    chex.assert_trees_all_close(updates, expected, rtol=2e-4, atol=1e-5)


@RELATIVE
@pytest.mark.parametrize("nesterov", [False, True])
def test_infinite_threshold_is_adamw_bit_for_bit(relative, nesterov):
    params = make(9)
    grads = [make(seed, scale=10.0 ** (-seed)) for seed in range(12)]
    grads.append(jax.tree.map(jnp.zeros_like, params))
    tx = optax.chain(
        optax_flash.scale_by_tamed_adam(math.inf, relative=relative, nesterov=nesterov),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(1e-3),
    )
    stock = optax.adamw(1e-3, weight_decay=1e-4, nesterov=nesterov)
    updates, states = run(tx, grads, params, eager)
    expected, _ = run(stock, grads, params, eager)
    chex.assert_trees_all_equal(updates, expected)
    assert all(state[0].clipped == 0 for state in states)


def test_in_codes_infinite_threshold_is_adamw8_bit_for_bit():
    params, grads = make(9), [make(seed) for seed in range(5)]
    updates, states = run(
        optax_flash.tamed_adamw8(1e-3, threshold=math.inf), grads, params, unfused
    )
    expected, stock_states = run(optax_flash.adamw8(1e-3), grads, params, unfused)
    chex.assert_trees_all_equal(updates, expected)
    for name in ("mu", "nu"):
        found = optax.tree.get(states[-1], name)
        assert found["kernel"].dtype == jnp.uint8
        chex.assert_trees_all_equal(found, optax.tree.get(stock_states[-1], name))


def test_relative_does_not_depend_on_scale():
    """Powers of two: everything scales without rounding, but for eps."""
    make_tx = functools.partial(optax_flash.tame, 0.5, eps=0.0, relative=True)
    grads = [make(seed)["kernel"] for seed in range(5)]
    expected, states = run(make_tx(), grads, grads[0])
    for scale in (2.0**-20, 2.0**10):
        scaled = [g * scale for g in grads]
        updates, scaled_states = run(make_tx(), scaled, grads[0])
        chex.assert_trees_all_equal(updates, expected)
        assert [s.clipped for s in scaled_states] == [s.clipped for s in states]


def test_an_outlier_moves_the_momentum_by_a_bounded_amount():
    params = jnp.zeros(3)
    quiet, spike = jnp.ones(3), jnp.array([1.0, 1e6, -1e6])
    _, states = run(
        optax_flash.scale_by_tamed_adam(2.0), [quiet] * 10 + [spike], params
    )
    before, after = states[-2].mu, states[-1].mu
    step = np.abs(np.asarray(after - 0.9 * before))
    np.testing.assert_allclose(step, [0.1, 0.2, 0.2], rtol=1e-5)
    assert states[-1].clipped == 2 and states[-2].clipped == 0
    np.testing.assert_allclose(states[-1].nu[1], 1e9, rtol=1e-3)


@RELATIVE
def test_relative_thresholds_over_the_largest_ratio_clip_nothing(relative):
    """One gradient after 2,000 of zero is 31.6 roots of its own second moment."""
    params = jnp.zeros(4)
    state = (
        optax_flash.scale_by_tamed_adam(1.0)
        .init(params)
        ._replace(count=jnp.asarray(20_000))
    )
    spike = jnp.full(4, 100.0)
    for threshold, clipped in ((31.0, 4), (32.0, 0 if relative else 4)):
        tx = optax_flash.scale_by_tamed_adam(threshold, relative=relative)
        assert tx.update(spike, state)[1].clipped == clipped


@RELATIVE
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_shows(relative, bad):
    grads = make(1)
    broken = grads | {"kernel": grads["kernel"].at[3, 5].set(bad)}
    tx = optax_flash.scale_by_tamed_adam(0.5, relative=relative)
    (updates,), _ = run(tx, [broken], grads)
    assert np.argwhere(~np.isfinite(updates["kernel"])).tolist() == [[3, 5]]


@RELATIVE
def test_zero_gradients_give_zero_updates(relative):
    zeros = jax.tree.map(jnp.zeros_like, make())
    updates, states = run(
        optax_flash.scale_by_tamed_adam(0.5, relative=relative), [zeros] * 3, zeros
    )
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert states[-1].clipped == 0


@RELATIVE
def test_half_precision_gradients_are_averaged_in_float32(relative):
    grads = [make(seed, jnp.bfloat16) for seed in range(4)]
    tx = optax_flash.scale_by_tamed_adam(0.5, relative=relative)
    updates, states = run(tx, grads, grads[0], eager)
    wide = [optax.tree.cast(g, jnp.float32) for g in grads]
    expected, wide_states = run(tx, wide, wide[0], eager)
    chex.assert_trees_all_equal(updates, optax.tree.cast(expected, jnp.bfloat16))
    chex.assert_trees_all_equal(states, wide_states)


@pytest.mark.parametrize("threshold", [0, 0.0, -1.0, math.nan])
def test_thresholds_that_are_none(threshold):
    with pytest.raises(ValueError, match="threshold is .* Give a positive number"):
        optax_flash.scale_by_tamed_adam(threshold)


def test_another_tree_of_gradients():
    tx, params = optax_flash.scale_by_tamed_adam(1.0), make()
    with pytest.raises(
        ValueError, match="scale_by_tamed_adam: the gradients: 'bias' is missing"
    ):
        tx.update({"kernel": params["kernel"]}, tx.init(params))


@RELATIVE
def test_one_kernel_for_each_leaf(relative):
    """The count is a reduction beside it."""
    params = {k: jax.ShapeDtypeStruct((512, 512), jnp.bfloat16) for k in "ab"}
    tx = optax_flash.master_weights(
        optax_flash.tamed_adamw8(1e-3, threshold=0.5, relative=relative)
    )
    (path,) = optax_flash.explain(tx, params, platform="cuda").paths
    assert path.implementation in ("triton", "pallas") and path.params == ("a", "b")
    assert path.reason.startswith("elementwise")


@pytest.mark.parametrize(
    "relative, spec, kind",
    quick(
        [(False, P("a", "b"), AxisType.Explicit)],
        [
            (False, P("a", "b"), AxisType.Explicit),
            (True, P("a", "b"), AxisType.Auto),
            (False, P(None, "b"), AxisType.Auto),
            (True, P(("a", "b")), AxisType.Explicit),
        ],
    ),
    ids=str,
)
def test_counts_all_shards(relative, spec, kind):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: tests/conftest.py asks for them on CPU")
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    tx = optax_flash.tamed_adamw8(1e-3, threshold=0.5, relative=relative)
    grads = [{"kernel": make(seed)["kernel"]} for seed in range(2)]
    expected, states = run(tx, grads, grads[0])
    placed = [jax.device_put(g, NamedSharding(mesh, spec)) for g in grads]
    updates, sharded = run(tx, placed, placed[0])
    chex.assert_trees_all_equal(updates, expected)
    count = optax.tree.get(sharded[-1], "clipped")
    assert count == optax.tree.get(states[-1], "clipped") > 0
    assert count.sharding.is_fully_replicated


class TestComposes:
    def test_inject_hyperparams_with_a_schedule(self):
        schedule = optax.piecewise_constant_schedule(0.5, {2: 4.0})
        tx = optax.inject_hyperparams(optax_flash.tamed_adamw8)(
            learning_rate=1e-3, threshold=schedule
        )
        grads = [{"kernel": make(seed)["kernel"]} for seed in range(4)]
        _, states = run(tx, grads, grads[0])
        for g, state, threshold in zip(grads, states, [0.5, 0.5, 2, 2], strict=True):
            expected = np.sum(np.abs(g["kernel"]) > threshold)
            assert optax.tree.get(state, "clipped") == expected

    def test_masked_and_partition(self):
        params, grads = make(), make(1)
        labels = {"kernel": "on", "bias": "off", "scalar": "off"}
        tx = optax.partition(
            {"on": optax_flash.scale_by_tamed_adam(0.5), "off": optax.sgd(0.1)}, labels
        )
        _, (state,) = run(tx, [grads], params)
        clipped = optax.tree.get(state, "clipped")
        assert clipped == np.sum(np.abs(grads["kernel"]) > 0.5)
        masked = optax.masked(
            optax_flash.scale_by_tamed_adam(0.5), {k: k == "kernel" for k in params}
        )
        (updates,), _ = run(masked, [grads], params)
        chex.assert_trees_all_equal(updates["bias"], grads["bias"])

    def test_master_weights_multi_steps_and_donation(self):
        params = make(dtype=jnp.bfloat16)
        grads = [make(seed, jnp.bfloat16) for seed in range(2)]
        tamed = optax_flash.tamed_adamw8(1e-2, threshold=0.5)
        for tx in (
            optax_flash.master_weights(tamed, finished=False),
            optax.MultiSteps(tamed, every_k_schedule=2),
            optax.apply_if_finite(tamed, 3),
        ):
            state = tx.init(params)
            chex.assert_trees_all_equal_shapes_and_dtypes(
                jax.eval_shape(tx.init, params), state
            )
            update = jax.jit(tx.update, donate_argnums=1)
            for g in grads:
                updates, new_state = update(g, state, params)
                chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
                state = new_state
            chex.assert_tree_all_finite(updates)

    def test_map_params(self):
        tx, params = optax_flash.scale_by_tamed_adam(1.0), make()
        specs = {"kernel": P("fsdp"), "bias": P(), "scalar": P()}
        mapped = optax.tree_map_params(
            tx,
            lambda _, spec: spec,
            tx.init(params),
            specs,
            transform_non_params=lambda _: None,
        )
        assert mapped.mu == mapped.nu == specs and mapped.clipped is None


def test_older_names_are_the_same():
    assert optax_flash.tame is optax_flash.scale_by_tamed_adam
    assert optax_flash.TameState is optax_flash.ScaleByTamedAdamState
    assert optax_flash.LowRankAdamState is optax_flash.ScaleByLowrankAdamState
