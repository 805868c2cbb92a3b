"""``compress`` on states whose arrays are not shaped like their params."""

import functools
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash import compress, master_weights, meshes
from optax_flash.codecs import hashing
from optax_flash.lowrank import _factors
from optax_flash.transforms import _shardings

pytestmark = pytest.mark.usefixtures("quick_compile")

RANK, DECAY = 4, 0.75
SHAPE = (64, 128)
FACTORS = ("mu_left", "mu_right")
NAMED = dict.fromkeys(FACTORS, "companded8")
CODECS = {
    "companded8": optax_flash.Companded8(),
    "companded4": optax_flash.Companded4(),
    "affine4": optax_flash.Affine4(),
}


class SketchState(NamedTuple):
    mu_left: Any
    mu_right: Any
    mu: Any


def signs(rank, n):
    """A fixed matrix of ones and minus ones."""
    return np.random.default_rng(n).choice(np.float32([-1, 1]), (rank, n))


def to_left(rank, g):
    """(*batch, rank, p) of (*batch, p, q)."""
    g = g.astype(jnp.float32)[..., None, :, :]
    return jnp.sum(g * signs(rank, g.shape[-1])[:, None, :], axis=-1)


def to_right(rank, g):
    """(*batch, rank, q) of (*batch, p, q)."""
    g = g.astype(jnp.float32)[..., None, :, :]
    return jnp.sum(g * signs(rank, g.shape[-2])[:, :, None], axis=-2)


def scale_by_sketches(rank=RANK):
    """Averages two sketches of each matrix; and vectors, as they are."""

    def only(factored, function):
        return lambda p, *xs: (
            function(p, *xs) if (p.ndim > 1) == factored else optax.MaskedNode()
        )

    def init(params):
        params = jax.tree.map(jnp.zeros_like, params)
        return SketchState(
            jax.tree.map(only(True, lambda p: to_left(rank, p)), params),
            jax.tree.map(only(True, lambda p: to_right(rank, p)), params),
            jax.tree.map(only(False, lambda p: p), params),
        )

    def update(grads, state, params=None):
        del params

        def average(to):
            return lambda g, x: DECAY * x + (1 - DECAY) * to(g)

        def step(g, left, right, mu):
            if g.ndim < 2:
                return mu
            return jnp.sum(left[..., :, None] * right[..., None, :], axis=-3)

        state = SketchState(
            jax.tree.map(
                only(True, average(lambda g: to_left(rank, g))), grads, state.mu_left
            ),
            jax.tree.map(
                only(True, average(lambda g: to_right(rank, g))), grads, state.mu_right
            ),
            jax.tree.map(only(False, average(lambda g: g)), grads, state.mu),
        )
        return jax.tree.map(step, grads, *state), state

    return optax.GradientTransformation(init, update)


def make(seed=0, shape=SHAPE, dtype=jnp.float32):
    """Small whole numbers, so that sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return {
        "bias": jnp.asarray(rng.integers(-8, 9, 256), dtype),
        "kernel": jnp.asarray(rng.integers(-8, 9, shape), dtype),
    }


def named(codec="companded8", rank=RANK, min_size=1):
    return compress(
        scale_by_sketches(rank), dict.fromkeys(FACTORS, codec), min_size=min_size
    )


def steps(tx, n, params=None, place=lambda tree: tree):
    params = place(make() if params is None else params)
    shape, dtype = params["kernel"].shape, params["kernel"].dtype
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(n):
        grads = place(make(seed + 1, shape, dtype))
        updates, state = update(grads, state, params)
    return updates, state


def kernel(state, field):
    return optax.tree.get(state, field)["kernel"]


class TestWhichEntries:
    @pytest.mark.parametrize("codecs", [None, "companded4", {"*kernel*": "affine8"}])
    def test_factors_that_nobody_names_stay(self, codecs):
        inner = scale_by_sketches()
        updates, state = steps(compress(inner, codecs, min_size=1), 3)
        expected, inner_state = steps(inner, 3)
        chex.assert_trees_all_equal(updates["kernel"], expected["kernel"])
        for field in FACTORS:
            chex.assert_trees_all_equal(
                kernel(state, field), getattr(inner_state, field)["kernel"]
            )
        assert set(state.scales) == {"mu_scales"}

    @pytest.mark.parametrize("name", CODECS)
    @pytest.mark.parametrize("batch", [(), (3,)])
    def test_named_ones_are_codes(self, name, batch):
        codec = CODECS[name]
        params = make(shape=(*batch, *SHAPE))
        state = named(codec).init(params)
        for field, n in zip(FACTORS, SHAPE, strict=True):
            shape = (*batch, RANK, n)
            assert kernel(state, field).dtype == jnp.uint8
            assert kernel(state, field).shape == codec.codes_shape(shape)
            scales = kernel(state.scales, f"{field}_scales")
            assert scales.shape == codec.scales_shape(shape)

    def test_min_size_is_of_the_factor(self):
        state = named(min_size=RANK * SHAPE[0] + 1).init(make())
        assert kernel(state, "mu_left").dtype == jnp.float32
        assert kernel(state, "mu_right").dtype == jnp.uint8

    def test_a_pattern_keeps_a_param_out(self):
        codecs = {"kernel/*": None, **NAMED}
        state = compress(scale_by_sketches(), codecs, min_size=1).init(make())
        assert kernel(state, "mu_left").dtype == jnp.float32

    def test_four_bits_and_rows_of_odd_length(self):
        params = make(shape=(64, 63))
        updates, state = steps(named("companded4"), 2, params)
        assert kernel(state, "mu_left").dtype == jnp.uint8
        assert kernel(state, "mu_right").dtype == jnp.float32
        assert updates["kernel"].shape == (64, 63)
        state = named("companded8").init(params)
        assert kernel(state, "mu_right").dtype == jnp.uint8

    def test_codes_that_would_be_taken_for_those_of_the_param(self):
        # (64, 64) in the place of (64, 63): two codes a byte make (64, 32) of both.
        updates, state = steps(named("companded4", 64), 2, make(shape=(64, 63)))
        assert kernel(state, "mu_left").dtype == jnp.float32
        assert kernel(state, "mu_right").dtype == jnp.uint8
        assert updates["kernel"].shape == (64, 63)

    def test_a_factor_shaped_like_its_param(self):
        # Full rank: it has the param's place in its op, and its random bits.
        _, state = steps(named(rank=64), 2, make(shape=(64, 128)))
        assert kernel(state, "mu_right").shape == (64, 128)
        assert kernel(state, "mu_right").dtype == jnp.uint8


class TestNumbers:
    @pytest.mark.parametrize("name", CODECS)
    def test_codes_of_one_step_are_those_of_the_codec(self, name):
        codec = CODECS[name]
        _, state = steps(named(codec), 1)
        _, exact = steps(scale_by_sketches(), 1)
        for field in FACTORS:
            x = getattr(exact, field)["kernel"]
            seed = hashing.fold(1, hashing.salt(f"kernel/{field}"))
            codes, scales = jax.jit(codec.encode)(x, hashing.bits(seed, x.shape))
            chex.assert_trees_all_equal(kernel(state, field), codes)
            chex.assert_trees_all_equal(kernel(state.scales, f"{field}_scales"), scales)

    def test_an_average_of_what_decodes_is_right(self):
        # The same gradient in many rows: their rounding is independent.
        n = 64
        g = jnp.zeros((8, 32)).at[0].set(3.0)
        grads = {"kernel": jnp.broadcast_to(g, (n, 8, 32))}
        tx, codec = named(), optax_flash.Companded8()
        state, update = tx.init(grads), jax.jit(tx.update)
        for _ in range(8):
            _, state = update(grads, state)
        decoded = codec.decode(
            kernel(state, "mu_right"),
            kernel(state.scales, "mu_right_scales"),
            (n, RANK, 32),
        )
        exact = (1 - DECAY**8) * to_right(RANK, g)
        # On a square curve of 127 codes a rounding is off by 2 / 127 of the group's
        # largest at most; the average holds each for sum(decay**2k) of its variance.
        noise = 2 / 127 * jnp.max(jnp.abs(exact)) * (1 - DECAY**2) ** -0.5
        assert jnp.max(jnp.abs(decoded - exact)) < 4 * noise
        assert jnp.max(jnp.abs(decoded.mean(0) - exact)) < 4 * noise / n**0.5

    def test_fields_like_the_param_are_as_without_factors(self):
        # One param with both kinds.
        def tx(codecs):
            inner = optax.chain(optax.trace(0.9), scale_by_sketches())
            return compress(inner, codecs, min_size=1)

        _, alone = steps(tx(None), 3)
        _, both = steps(tx(NAMED), 3)
        assert kernel(both, "mu_left").dtype == jnp.uint8
        chex.assert_trees_all_equal(
            optax.tree.get(both, "trace"), optax.tree.get(alone, "trace")
        )
        chex.assert_trees_all_equal(
            both.scales["trace_scales"], alone.scales["trace_scales"]
        )

    def test_half_precision_gradients(self):
        # Whole numbers are exact in bfloat16, and the arithmetic is float32.
        low, low_state = steps(named(), 3, make(dtype=jnp.bfloat16))
        high, high_state = steps(named(), 3)
        chex.assert_trees_all_equal(low_state, high_state)
        assert low["kernel"].dtype == jnp.bfloat16
        chex.assert_trees_all_equal(low["kernel"], high["kernel"].astype(jnp.bfloat16))


class TestReports:
    @pytest.mark.parametrize("name", CODECS)
    def test_memory_report(self, name):
        tx, params = named(name), make()
        report = optax_flash.memory_report(tx, params)
        state = tx.init(params)
        rows = {row.name.split()[0]: row.component_bytes for row in report.rows}
        codes = sum(kernel(state, field).nbytes for field in FACTORS)
        assert (
            rows["kernel"]["codes"]
            == codes
            == RANK * sum(SHAPE) * (CODECS[name].bits / 8)
        )
        scales = [kernel(state.scales, f"{field}_scales") for field in FACTORS]
        assert rows["kernel"]["scales"] == sum(x.nbytes for x in scales)
        kept = ("codes", "scales", "residual", "other state")
        total = sum(report.component_bytes[component] for component in kept)
        assert total == sum(x.nbytes for x in jax.tree.leaves(state))
        stock = {row.name.split()[0]: row.stock_bytes for row in report.rows}
        assert stock["kernel"]["other state"] == 4 * RANK * sum(SHAPE)

    def test_formats(self):
        saved = optax_flash.state_format(named(), make())
        for field in FACTORS:
            assert saved["leaves"][f"kernel/{field}"].startswith("Companded8(signed=T")
        optax_flash.check_format(saved, named(), make())
        with pytest.raises(ValueError, match="kernel/mu_left.*Companded8.*Companded4"):
            optax_flash.check_format(saved, named("companded4"), make())

    def test_numerics_report(self):
        tx, params = named("companded4"), make()
        look = jax.jit(functools.partial(optax_flash.numerics_report, tx))
        report = look(tx.init(params), params, params)
        assert report.zero["kernel/mu_left"] == report.zero["kernel/mu_right"] == 1
        _, state = steps(tx, 3)
        report = look(state, params, params)
        for field in FACTORS:
            assert report.zero[f"kernel/{field}"] < 0.5
            assert 0 < report.saturated[f"kernel/{field}"] < 0.5
            assert report.non_finite[f"kernel/{field}"] == 0

    def test_explain(self):
        paths = optax_flash.explain(named(), make(), platform="cuda").paths
        found = {path.params[0]: path for path in paths}
        assert found["bias"].implementation == "pallas"
        assert found["kernel"].implementation == "xla"
        assert "a sum" in found["kernel"].reason


class TestErrors:
    @pytest.mark.parametrize(
        "made_with, read_with",
        [
            ("companded8", "flashoptim"),
            ("companded8", "companded4"),
            ("companded4", "companded8"),
            ("companded8", optax_flash.Companded8(group=16)),
        ],
    )
    def test_a_state_of_other_codecs(self, made_with, read_with):
        state = named(made_with).init(make())
        with pytest.raises(ValueError, match="kernel/mu_left.*other codecs"):
            named(read_with).update(make(), state, make())

    def test_a_state_of_another_min_size(self):
        state = named(min_size=4096).init(make())
        with pytest.raises(ValueError, match="kernel/mu_left.*min_size"):
            named().update(make(), state, make())

    def test_a_state_without_their_scales(self):
        state = compress(scale_by_sketches(), min_size=1).init(make())
        with pytest.raises(ValueError, match="mu_left_scales"):
            named().update(make(), state, make())


class TestWrappers:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda tx: master_weights(tx, finished=False),
            lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
            lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
            lambda tx: optax.apply_if_finite(tx, 3),
            lambda tx: optax.masked(tx, {"bias": False, "kernel": True}),
            lambda tx: optax.partition(
                {"a": tx, "b": optax.sgd(0.1)}, {"bias": "b", "kernel": "a"}
            ),
        ],
        ids=["master", "chain", "multi_steps", "if_finite", "masked", "partition"],
    )
    def test_state_keeps_its_types(self, wrap):
        tx, params = wrap(named("companded4")), make(dtype=jnp.bfloat16)
        state = tx.init(params)
        step = jax.jit(tx.update, donate_argnums=1)
        # Its types are compared, as its buffers are given away.
        before = jax.eval_shape(lambda: state)
        updates, state = step(make(1, dtype=jnp.bfloat16), state, params)
        updates, state = step(make(2, dtype=jnp.bfloat16), state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_tree_all_finite(updates)
        assert "uint8" in {str(x.dtype) for x in jax.tree.leaves(state)}

    def test_init_of_shapes(self):
        abstract = jax.eval_shape(named().init, make())
        state = named().init(jax.eval_shape(make))
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)

    def test_tree_map_params(self):
        tx = named()
        state = tx.init(make())
        count = optax.tree_utils.tree_map_params(
            tx, lambda x: 1, state, transform_non_params=lambda x: 0
        )
        # Left and right, and dense mu. Which of them have scales init alone knows.
        assert sum(jax.tree.leaves(count)) == 3

    def test_checkpoint(self):
        tx = named("companded4")
        _, state = steps(tx, 2)
        restored = flax.serialization.from_bytes(
            tx.init(make()), flax.serialization.to_bytes(state)
        )
        chex.assert_trees_all_equal(restored, state)
        assert restored.inner_state.mu_left["kernel"].dtype == jnp.uint8


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str, name="mesh")
def mesh_fixture(request):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: tests/conftest.py asks for them on CPU")
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(request.param,) * 2)


class TestSharding:
    @pytest.mark.parametrize(
        "spec", [P("fsdp"), P(None, "tp"), P("fsdp", "tp"), P(None, ("fsdp", "tp"))]
    )
    @pytest.mark.parametrize("codecs", [NAMED, None], ids=["codes", "float32"])
    def test_init(self, mesh, spec, codecs):
        params = {"kernel": jax.device_put(make()["kernel"], NamedSharding(mesh, spec))}
        state = compress(scale_by_sketches(), codecs, min_size=1).init(params)
        rows, columns = (*spec, None)[:2]
        for field, entry in zip(FACTORS, (rows, columns), strict=True):
            expected = NamedSharding(mesh, P(None, entry))
            assert kernel(state, field).sharding.is_equivalent_to(expected, 2)

    def test_scales_are_sharded_with_their_factor(self, mesh):
        sharding = NamedSharding(mesh, P("fsdp"))
        params = {"kernel": jax.device_put(make(shape=(256, 128))["kernel"], sharding)}
        scales = kernel(named().init(params).scales, "mu_left_scales")
        assert scales.shape == (RANK, 8)
        expected = NamedSharding(mesh, P(None, "fsdp"))
        assert scales.sharding.is_equivalent_to(expected, 2)

    @pytest.mark.full
    @pytest.mark.parametrize("codec", ["companded8", "companded4"])
    def test_a_sharded_run_equals_one_on_a_single_device(self, mesh, codec):
        def place(tree):
            specs = {"bias": P(), "kernel": P("fsdp", "tp")}
            return {
                k: jax.device_put(tree[k], NamedSharding(mesh, specs[k])) for k in tree
            }

        params = make(shape=(128, 128))
        updates, state = steps(named(codec), 3, params, place)
        expected, alone = steps(named(codec), 3, params)
        chex.assert_trees_all_equal(state, alone)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "spec, shape, state_shape, field, expected",
    [
        # Like the param, its scales, and what stands beside a leaf without scales.
        (P("fsdp", "tp"), (64, 128), (64, 128), "mu", P("fsdp", "tp")),
        (P("fsdp", "tp"), (64, 128), (64, 4), "mu_scales", P("fsdp", "tp")),
        (P("fsdp", "tp"), (64, 128), (64, 1), "mu_scales", P("fsdp", None)),
        # Adafactor's means along an axis.
        (P("fsdp", "tp"), (64, 128), (64,), "v_row", P("fsdp")),
        (P("fsdp", "tp"), (64, 128), (128,), "v_col", P("tp")),
        (P("fsdp"), (64, 128), (128,), "v_col", P(None)),
        (P("fsdp", "tp"), (64, 64), (64,), "v_row", P(None)),
        (P("fsdp", "tp"), (64, 128), (1,), "v", P(None)),
        (P(None, "fsdp", "tp"), (3, 64, 128), (3, 128), "v_col", P(None, "tp")),
        # Several arrays for a param.
        (P("fsdp", "tp"), (64, 128), (8, 64, 128), "memory", P(None, "fsdp", "tp")),
        # Factors, also where they look like the param.
        (P("fsdp", "tp"), (64, 64), (64, 64), "mu_left", P(None, "fsdp")),
        (P("fsdp", "tp"), (64, 64), (64, 2), "nu_right_1_scales", P(None, "tp")),
        (P("tp", "fsdp"), (4, 64, 64), (4, 8, 64), "mu_left", P("tp", None, "fsdp")),
        (P("tp", "fsdp"), (4, 64, 64), (4, 8, 64), "mu_right", P("tp", None, None)),
        # An axis that does not divide; a projection of unknown axes; no axes.
        (P("fsdp", "tp"), (64, 63), (8, 63), "mu_right", P(None, None)),
        (P("fsdp", "tp"), (64, 64), (8, 64), "mu", P(None, None)),
        (P("fsdp"), (64,), (), "nu", P()),
    ],
)
def test_specs(spec, shape, state_shape, field, expected):
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tp"))
    entries = _shardings.along(_factors.side_of(field), spec, shape, state_shape)
    assert meshes.fitted(mesh, entries, state_shape) == expected


class SideState(NamedTuple):
    """Fields that are named as factors are, and have their params' shapes."""

    mu: Any
    trust_left: Any


def scale_with_sides():
    def init(params):
        return SideState(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    return optax.GradientTransformation(init, lambda u, s, p=None: (u, s))


@pytest.mark.parametrize("shape", [(64, 256), (256, 256)], ids=str)
@pytest.mark.parametrize("codec", [None, "companded8", "companded4"])
def test_a_field_with_a_factors_name_and_its_params_shape(codec, shape):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), (AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("fsdp", "tp"))
    params = {"w": jax.device_put(jnp.ones(shape), sharding)}
    tx = scale_with_sides()
    if codec:
        tx = compress(tx, dict.fromkeys(SideState._fields, codec))
    state, abstract = tx.init(params), optax_flash.state_sharding(tx, params)
    inner = state.inner_state if codec else state
    stock = scale_with_sides().init(params)
    for x, expected in zip(inner, stock, strict=True):
        assert x["w"].sharding.is_equivalent_to(expected["w"].sharding, 2)
    rows = zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
    assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in rows)
    if codec:
        for scales in state.scales.values():
            assert scales["w"].sharding.is_equivalent_to(sharding, 2)
        leaves = optax_flash.state_format(tx, params)["leaves"]
        assert leaves["w/trust_left"] == leaves["w/mu"]

    boxed = {"w": nn.Partitioned(jnp.ones(shape), ("fsdp", "tp"))}
    with jax.set_mesh(mesh):
        names = nn.get_partition_spec(tx.init(boxed))
    specs = jax.tree.map(lambda s: s.spec, abstract)
    for found, spec in zip(jax.tree.leaves(names), jax.tree.leaves(specs), strict=True):
        assert found == spec


def test_a_factor_of_ours_with_its_params_shape():
    """At full rank the right factor of (128, 256) is (128, 256)."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), (AxisType.Auto,) * 2)
    params = {"w": jnp.ones((128, 256))}
    sharding = NamedSharding(mesh, P("fsdp", "tp"))
    for tx in (
        optax_flash.scale_by_lowrank_adam(rank=128),
        optax_flash.lowrank_adamw(1e-3, rank=128),
    ):
        state = jax.eval_shape(tx.init, params)
        abstract = optax_flash.state_sharding(tx, params, sharding)
        assert optax.tree.get(state, "mu_right")["w"].shape == (128, 256)
        for field, axis in {"mu_left": "fsdp", "mu_right": "tp"}.items():
            assert optax.tree.get(abstract, field)["w"].spec == P(None, axis)
    assert abstract.scales["mu_right_scales"]["w"].spec == P(None, "tp")
