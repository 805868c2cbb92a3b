"""LoRA-Pre against float64 mathematics, stock optax and the paper's own recursion."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash import lora_pre_adamw, lora_pre_muon, scale_by_lora_pre
from optax_flash.lowrank import _newton
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def moment(state, name, key="k"):
    """A moment's product in float64."""
    left = np.asarray(optax.tree.get(state, f"{name}_left")[key], np.float64)
    right = np.asarray(optax.tree.get(state, f"{name}_right")[key], np.float64)
    return np.swapaxes(left, -1, -2) @ right


def run(tx, grads):
    """The updates for a list of gradients of one leaf, and the last state."""
    state, update, updates = (
        tx.init({"k": jnp.asarray(grads[0])}),
        jax.jit(tx.update),
        [],
    )
    for g in grads:
        u, state = update({"k": jnp.asarray(g)}, state)
        updates.append(np.asarray(u["k"]))
    return updates, state


def close(found, expected, rtol):
    """Equal but for a share of the expected norm."""
    error = np.linalg.norm(np.asarray(found, np.float64) - expected)
    assert error <= rtol * np.linalg.norm(expected), error / np.linalg.norm(expected)


class Paper:
    """The paper's recursion for one moment in float64, in its own notation.

    m = B @ A, with damping relative to each component (the paper's is absolute).
    """

    def __init__(self, b, a, decay, damping):
        self.b, self.a, self.decay, self.damping = b, a, decay, damping

    def step(self, g):
        a, b, gamma = self.a, self.b, 1 - self.decay
        gram_a, gram_b = a @ a.T, b.T @ b
        gram_a = gram_a + self.damping * np.diag(np.diag(gram_a))
        gram_b = gram_b + self.damping * np.diag(np.diag(gram_b))
        self.b = self.decay * b + gamma * g @ a.T @ np.linalg.inv(gram_a)
        # While b is zero, a only decays.
        pull = np.linalg.inv(gram_b) @ b.T @ g if b.any() else 0.0
        self.a = self.decay * a + gamma * pull


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_the_papers_recursion(scale):
    rank, shape, b1, b2 = 4, (24, 40), 0.9, 0.95
    grads = [scale * normal(shape, seed) for seed in range(12)]
    tx = scale_by_lora_pre(
        b1, b2, rank=rank, eps=0.0, damping=1e-4, bias_correction="paper"
    )
    start = tx.init({"k": jnp.asarray(grads[0], jnp.float32)})
    first, second = (
        Paper(np.zeros((24, rank)), np.asarray(a["k"], np.float64), decay, 1e-4)
        for a, decay in ((start.mu_right, b1**0.5), (start.nu_right, b2**0.25))
    )
    updates, state = run(tx, [g.astype(np.float32) for g in grads])
    for t, (g, u) in enumerate(zip(grads, updates, strict=True), start=1):
        m = b1 * first.b @ first.a + (1 - b1) * g
        v = b2 * (second.b @ second.a) ** 2 + (1 - b2) * g**2
        close(u, m / (1 - b1**t) / np.sqrt(v / (1 - b2**t)), rtol=1e-4)
        first.step(g)
        second.step(np.abs(g))
    close(moment(state, "mu"), first.b @ first.a, rtol=1e-4)
    close(moment(state, "nu"), second.b @ second.a, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-8])
def test_recovers_the_average_of_a_gradient_of_low_rank(scale):
    """Exactly, but for damping, which shortens it by some 1e-4 / 2."""
    g = scale * (normal((64, 4), 1) @ normal((4, 96), 2)).astype(np.float32)
    tx = scale_by_lora_pre(0.9, 0.95, rank=8)
    _, state = run(tx, [g] * 250)
    close(moment(state, "mu"), g.astype(np.float64), rtol=1e-4)


def test_follows_a_changing_gradient_of_low_rank_to_second_order():
    """The steps' product is an EMA but for gain**2 (g - m) m^+ g: b1 sets the error."""
    left, right = normal((48, 3), 1), normal((3, 64), 2)
    grads = [
        left @ (np.eye(3) + 0.3 * normal((3, 3), 9 + t)) @ right for t in range(400)
    ]
    errors = []
    for b1 in (0.9, 0.99):
        _, state = run(
            scale_by_lora_pre(b1, rank=6), [g.astype(np.float32) for g in grads]
        )
        average = np.zeros_like(grads[0])
        for g in grads:
            average = b1 * average + (1 - b1) * g
        errors.append(
            np.linalg.norm(moment(state, "mu") - average) / np.linalg.norm(average)
        )
    # 400 steps are four time constants of 0.99, whose start has not faded whole.
    assert errors[0] < 0.02 and errors[1] < 0.01, errors


def test_noise_is_tracked_nearly_as_well_as_the_best_truncation():
    signal = normal((64, 4), 1) @ normal((4, 96), 2) / 2
    grads = [signal + normal((64, 96), 9 + t) for t in range(150)]
    _, state = run(scale_by_lora_pre(rank=8), [g.astype(np.float32) for g in grads])
    average = np.zeros((64, 96))
    for g in grads:
        average = 0.9 * average + 0.1 * g
    u, s, v = np.linalg.svd(average)
    best = np.linalg.norm(s[8:])
    found = np.linalg.norm(moment(state, "mu") - average)
    assert best < found < 1.2 * best


@pytest.mark.parametrize(
    "scale", quick([2.0**-20], [2.0**-10, 2.0**-20, 2.0**-27, 2.0**10])
)
def test_gradient_scale_does_not_matter(scale):
    """Powers of two go through bit for bit, but for what underflows."""
    grads = [normal((32, 48), seed).astype(np.float32) for seed in range(10)]
    tx = functools.partial(scale_by_lora_pre, rank=6)
    expected, _ = run(tx(eps=1e-8), grads)
    found, _ = run(tx(eps=1e-8 * scale), [scale * g for g in grads])
    for u, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(u, e, rtol=1e-5, atol=1e-6)


@functools.cache
def ratios(b2, share, steps=1000):
    """m and v over a constant gradient of rank 1: raw, before any correction."""
    q = 64
    rank = int(q * share)
    g = jnp.asarray(np.outer(normal(48, 1), normal(q, 2)), jnp.float32)
    tx = scale_by_lora_pre(0.9, b2, rank=rank)

    def step(state, _):
        m = _newton.product(state.mu_left, state.mu_right)
        v = _newton.product(state.nu_left, state.nu_right) ** 2
        m, v = 0.9 * m + 0.1 * g, b2 * v + (1 - b2) * g**2
        energy = jnp.sum(g**2)
        return tx.update(g, state)[1], (jnp.sum(m * g) / energy, jnp.sum(v) / energy)

    return jax.tree.map(np.asarray, jax.lax.scan(step, tx.init(g), length=steps)[1])


@pytest.mark.parametrize(
    "b2, share",
    quick(
        [(0.999, 1 / 4)],
        [(0.95, 1 / 16), (0.999, 1 / 16), (0.999, 1 / 4), (0.95, 1 / 2)],
    ),
)
def test_matched_correction(b2, share):
    m, v = ratios(b2, share)
    steps = jnp.arange(len(m))
    c1 = 0.1 + 0.9 * _newton.share_reached(0.9**0.5, steps, share)
    c2 = (1 - b2) + b2 * _newton.share_reached(b2**0.25, steps, share) ** 2
    np.testing.assert_allclose(m / c1, 1, atol=0.05)
    np.testing.assert_allclose(v / c2, 1, atol=0.05)


@pytest.mark.parametrize(
    "b2, figures",
    [
        (0.95, {2: 0.51, 5: 0.25, 10: 0.22, 30: 0.40, 100: 0.86}),
        (0.999, {10: 0.10, 30: 0.041, 100: 0.035, 1000: 0.25}),
    ],
)
def test_the_papers_correction_is_far_off(b2, figures):
    """v is up to 28 times too small, so updates are up to 5.3 times too large."""
    _, v = ratios(b2, 1 / 4)
    for t, figure in figures.items():
        assert v[t - 1] / (1 - b2**t) == pytest.approx(figure, rel=0.05)


@pytest.mark.parametrize("bias_correction", ["matched", "paper"])
def test_the_first_update_is_a_sign(bias_correction):
    g = normal((32, 48)).astype(np.float32)
    (update,), _ = run(scale_by_lora_pre(rank=4, bias_correction=bias_correction), [g])
    np.testing.assert_allclose(update, np.sign(g), rtol=1e-3)


def test_a_spike_does_not_go_beyond_itself():
    """Without a bound, gain**2 * g * g / m."""
    g = np.outer(normal(48, 1), normal(64, 2)).astype(np.float32)
    _, state = run(scale_by_lora_pre(rank=4), [g] * 100 + [1e4 * g])
    gain = 1 - 0.9**0.5
    assert np.linalg.norm(moment(state, "mu")) < (1 + gain) * 1e4 * np.linalg.norm(g)


def test_gradients_may_come_back_after_thousands_of_zeros():
    """Then both factors of a plain recursion have underflowed, and stay zero."""
    g = np.outer(normal(48, 1), normal(64, 2)).astype(np.float32)
    tx = scale_by_lora_pre(rank=4)
    state = tx.init({"k": jnp.asarray(g)})

    @jax.jit
    def repeat(state, g):
        def step(_, carry):
            updates, new_state = tx.update({"k": g}, carry[0])
            return new_state, updates["k"]

        return jax.lax.fori_loop(0, 3000, step, (state, g))

    state, _ = repeat(state, g)
    state, update = repeat(state, 0 * g)
    assert not np.any(update)
    assert np.linalg.norm(moment(state, "mu")) < 1e-12 * np.linalg.norm(g)
    state, _ = repeat(state, g)
    close(moment(state, "mu"), g.astype(np.float64), rtol=1e-4)


@pytest.mark.parametrize("rank", quick([8], [8, 128]))
def test_gram_matrices_of_rank_one(rank):
    """Where damping alone makes them positive definite."""
    g = np.outer(normal(160, 1), normal(192, 2)).astype(np.float32)
    updates, state = run(scale_by_lora_pre(0.5, 0.5, rank=rank, damping=0.0), [g] * 40)
    chex.assert_tree_all_finite((updates, state))
    close(moment(state, "mu"), g.astype(np.float64), rtol=1e-3)


def test_nan_is_not_swallowed_and_can_be_skipped():
    g = {"k": jnp.asarray(normal((32, 48)), jnp.float32)}
    broken = {"k": g["k"].at[3, 4].set(jnp.nan)}
    tx = scale_by_lora_pre(rank=4)
    _, state = tx.update(g, tx.init(g))
    updates, _ = tx.update(broken, state)
    assert np.isnan(updates["k"][3, 4])
    guarded = optax.apply_if_finite(tx, 5)
    _, state = guarded.update(g, guarded.init(g))
    _, after = guarded.update(broken, state)
    assert not after.last_finite
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_batches_are_their_matrices():
    grads = [normal((2, 3, 24, 40), seed).astype(np.float32) for seed in range(5)]
    batched, state = run(scale_by_lora_pre(rank=4), grads)
    assert state.mu_left["k"].shape == (2, 3, 4, 24)
    alone = scale_by_lora_pre(rank=4)
    single = alone.init({"k": jnp.asarray(grads[0][1, 2])})
    # From the same start: it is drawn for the whole leaf.
    fresh = scale_by_lora_pre(rank=4).init({"k": jnp.asarray(grads[0])})
    single = single._replace(
        mu_right={"k": fresh.mu_right["k"][1, 2]},
        nu_right={"k": fresh.nu_right["k"][1, 2]},
    )
    for g, u in zip(grads, batched, strict=True):
        expected, single = alone.update({"k": jnp.asarray(g[1, 2])}, single)
        close(u[1, 2], np.asarray(expected["k"], np.float64), rtol=1e-4)


def make_params(dtype="float32", seed=0):
    shapes = {"kernel": (32, 128), "wide": (64, 256), "small": (4, 64), "bias": (32,)}
    shapes |= {"stack": (2, 48, 64), "scalar": (), "empty": (0, 4)}
    return {k: jnp.asarray(normal(s, seed), dtype) for k, s in shapes.items()}


def test_what_is_not_factored_is_optax_adam():
    params = make_params()
    tx = scale_by_lora_pre(rank=8, where=lambda path: path != "wide")
    stock = optax.scale_by_adam(b2=0.95)
    state, stock_state = tx.init(params), stock.init(params)
    shapes = {k: getattr(x, "shape", None) for k, x in state.mu_left.items()}
    assert shapes == {
        **dict.fromkeys(params),
        **{"kernel": (8, 32), "stack": (2, 8, 48)},
    }
    for seed in range(3):
        grads = make_params(seed=seed)
        updates, state = jax.jit(tx.update)(grads, state)
        expected, stock_state = jax.jit(stock.update)(grads, stock_state)
        for name in ("wide", "small", "bias", "scalar", "empty"):
            np.testing.assert_array_max_ulp(
                np.asarray(updates[name]), np.asarray(expected[name]), 1
            )


@pytest.mark.parametrize("rank, expected", [(0.25, 8), (3, 3)])
def test_state_elements(rank, expected):
    params = {"k": jnp.ones((32, 128)), "b": jnp.ones(32)}
    elements = 2 * expected * (32 + 128)
    state = scale_by_lora_pre(rank=rank).init(params)
    fields = [tree["k"] for tree in state[1:]]
    assert sum(x.size for x in jax.tree.leaves(fields)) == elements
    report = optax_flash.memory_report(scale_by_lora_pre(rank=rank), params)
    (row,) = (row for row in report.rows if row.name.startswith("k "))
    assert row.component_bytes["other state"] == 4 * elements
    muon = lora_pre_muon(0.1, rank=rank).init(params)
    left, right = (optax.tree.get(muon, f"mu_{x}")["k"] for x in ("left", "right"))
    assert left.size + right.size == elements / 2


ALIASES = {
    "adamw": functools.partial(lora_pre_adamw, rank=8),
    "muon": functools.partial(lora_pre_muon, rank=8),
}
WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "master_weights": lambda tx: optax_flash.master_weights(tx, finished=False),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, lambda p: {k: k != "wide" for k in p}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)},
        lambda p: {k: "b" if k == "wide" else "a" for k in p},
    ),
}


@pytest.mark.parametrize("alias", [lora_pre_adamw, lora_pre_muon])
def test_factors_are_in_8_bit_codes_unless_codecs_say_otherwise(alias):
    params = {"k": jnp.ones((128, 256))}
    fields = [f"{m}_{side}" for m in ("mu", "nu") for side in ("left", "right")]
    fields = fields[:2] if alias is lora_pre_muon else fields
    for codecs, dtype in (None, jnp.uint8), (dict.fromkeys(fields), jnp.float32):
        state = alias(1e-3, rank=32, codecs=codecs).init(params)
        for field in fields:
            assert optax.tree.get(state, field)["k"].dtype == dtype


@pytest.mark.full
def test_codes_follow_the_average():
    """Codes add less than a fifth to the error that a rank of 8 makes."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(128, 8)) @ rng.normal(size=(8, 512))
    grads = [
        (signal + rng.normal(size=signal.shape)).astype(np.float32) for _ in range(60)
    ]
    errors = []
    average = np.zeros(signal.shape)
    for g in grads:
        average = 0.9 * average + 0.1 * g
    exact = scale_by_lora_pre(rank=8)
    for tx in exact, optax_flash.compress(exact, min_size=1):
        _, state = run(tx, grads)
        left, right = (optax.tree.get(state, f"mu_{x}")["k"] for x in ("left", "right"))
        if left.dtype == jnp.uint8:
            codec = optax_flash.Companded8()
            scales = (state.scales[f"mu_{x}_scales"]["k"] for x in ("left", "right"))
            left, right = (
                codec.decode(x, s, x.shape)
                for x, s in zip((left, right), scales, strict=True)
            )
        found = np.asarray(left, np.float64).T @ np.asarray(right, np.float64)
        errors.append(np.linalg.norm(found - average) / np.linalg.norm(average))
    assert errors[0] < 0.1 and errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("alias", quick(["adamw"], ALIASES))
@pytest.mark.parametrize("wrapper", quick(["alone"], WRAPPERS))
def test_composes(alias, wrapper):
    names = ("kernel", "wide", "bias", "empty")
    params, grads = (
        {k: v for k, v in make_params("bfloat16", seed).items() if k in names}
        for seed in (0, 1)
    )
    schedule = optax.linear_schedule(0.1, 0.01, 10)
    tx = WRAPPERS[wrapper](ALIASES[alias](schedule))
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, params), state
    )
    update = jax.jit(tx.update, donate_argnums=1)
    for _ in range(2):
        updates, new_state = update(grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        state = new_state
    chex.assert_tree_all_finite(updates)
    assert np.any(updates["kernel"])
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    if wrapper == "alone":
        mapped = optax.tree_map_params(tx, lambda x: x, state)
        chex.assert_trees_all_equal(mapped, state)
        assert optax.tree.get(state, "mu_left")["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("alias", quick(["adamw"], ALIASES))
def test_inject_hyperparams(alias):
    factory = {"adamw": lora_pre_adamw, "muon": lora_pre_muon}[alias]
    static = ("rank", "ns_steps", "ns_coeffs") if alias == "muon" else "rank"
    tx = optax.inject_hyperparams(factory, static, hyperparam_dtype=jnp.float32)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 4), rank=8
    )
    params = {"kernel": make_params()["kernel"]}
    plain = factory(0.1, rank=8)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = jax.jit(plain.update)(params, plain.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


def test_muon_is_optax_muon_while_nothing_is_factored():
    params = {"k": jnp.asarray(normal((32, 48)), jnp.float32)}
    tx = lora_pre_muon(0.1, rank=32, beta=0.9)
    stock = optax.contrib.muon(0.1, beta=0.9, nesterov=False)
    state, stock_state = tx.init(params), stock.init(params)
    for seed in range(3):
        grads = {"k": jnp.asarray(normal((32, 48), seed), jnp.float32)}
        updates, state = tx.update(grads, state, params)
        expected, stock_state = stock.update(grads, stock_state, params)
        # The iteration does not see that one momentum is ten times the other.
        chex.assert_trees_all_close(updates, expected, atol=1e-5)


def test_muon_with_factors_is_muon_for_a_constant_gradient_of_low_rank():
    g = {"k": jnp.asarray(normal((32, 2)) @ normal((2, 48), 1), jnp.float32)}
    for nesterov in (False, True):
        tx = optax_flash.scale_by_lora_pre_muon(
            rank=4, nesterov=nesterov, consistent_rms=0.2
        )
        state, update = tx.init(g), jax.jit(tx.update)
        for _ in range(300):
            updates, state = update(g, state)
        close(moment(state, "mu"), 20 * np.asarray(g["k"], np.float64), rtol=1e-3)
        stock = optax.contrib.muon(-1.0, nesterov=nesterov, consistent_rms=0.2)
        expected, _ = stock.update(g, stock.init(g), g)
        close(updates["k"], np.asarray(expected["k"], np.float64), rtol=2e-2)


@pytest.mark.parametrize(
    "make", [scale_by_lora_pre, functools.partial(lora_pre_muon, 0.1)]
)
@pytest.mark.parametrize("rank", [0, -1, True, 1.5, 0.0, None])
def test_bad_ranks(make, rank):
    with pytest.raises(ValueError, match="rank is"):
        make(rank=rank)


def test_bad_input():
    with pytest.raises(ValueError, match="'none'.*'matched', 'paper'"):
        scale_by_lora_pre(rank=4, bias_correction="none")
    with pytest.raises(ValueError, match="param 'steps' is a PjitFunction"):
        scale_by_lora_pre(rank=4).init({"steps": jnp.tanh})
    with pytest.raises(ValueError, match=r"param 'b' has the shape \[3\]"):
        optax_flash.scale_by_lora_pre_muon(rank=4).init({"b": jnp.ones(3)})
    tx = scale_by_lora_pre(rank=4)
    state = tx.init({"k": jnp.ones((8, 8))})
    with pytest.raises(ValueError, match="gradients: 'k' is missing"):
        tx.update({"other": jnp.ones((8, 8))}, state)
    # Not factored, as the rank does not fit.
    state = scale_by_lora_pre(rank=64).init({"k": jnp.ones((8, 8))})
    assert state.mu["k"].shape == (8, 8)


# Either with every spec, and with both kinds of mesh.
@pytest.mark.parametrize(
    "alias, spec, kind",
    quick(
        [("adamw", P("fsdp", "tp"), AxisType.Explicit)],
        [
            (alias, spec, (AxisType.Auto, AxisType.Explicit)[(i + j) % 2])
            for i, alias in enumerate(ALIASES)
            for j, spec in enumerate([P("fsdp", "tp"), P("fsdp"), P(None, "tp")], 1)
        ],
    ),
    ids=str,
)
def test_sharded_equals_single_device(alias, spec, kind):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: tests/conftest.py asks for them on CPU")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)
    tx = ALIASES[alias](0.1)
    grads = [
        {"k": jnp.asarray(normal((64, 128), seed), jnp.float32)} for seed in range(3)
    ]

    def run(place):
        update, state = jax.jit(tx.update), tx.init(place(grads[0]))
        left = optax.tree.get(state, "mu_left")["k"].sharding
        for g in grads:
            updates, new_state = update(place(g), state, place(g))
            typeof = functools.partial(jax.tree.map, jax.typeof)
            assert typeof(new_state) == typeof(state)
            state = new_state
        return np.asarray(updates["k"], np.float64), left

    expected, _ = run(lambda x: x)
    with jax.set_mesh(mesh):
        found, left = run(lambda x: jax.device_put(x, NamedSharding(mesh, spec)))
    side = NamedSharding(mesh, P(None, spec[0]))
    assert left.is_equivalent_to(side, 2)
    # Sums in another order; damping 1e-4 magnifies their rounding by up to a hundred.
    close(found, expected, rtol=1e-4)
