"""What a state says of itself: its codecs, in its structure; and no more arrays."""

import copy
import functools
import pickle

import chex
import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from optax_flash import Companded4, Companded8, compress, master_weights
from optax_flash.transforms import _rules
from tests import processes

pytestmark = pytest.mark.usefixtures("quick_compile")


def make(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"w": (64, 80), "norm": (8,)}
    params = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
    return params | {"norm": params["norm"].astype(jnp.float32)}


def whole():
    return master_weights(optax_flash.adamw8(1e-2))


def distance(x, y):
    """Of two updates, relative to the second."""
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def names(state):
    """Codecs by name, outer states first."""
    inner = state.inner_state
    return [set(x.codecs.by_name) for x in (state, inner)]


NAMES = [{"w/residual"}, {"w/mu", "w/nu"}]


class TestCodecs:
    """They are a part of the structure, which JAX hands on."""

    def test_of_init(self):
        state = whole().init(make(dtype=jnp.bfloat16))
        assert names(state) == NAMES
        stored = state.inner_state.codecs.by_name["w/nu"]
        assert stored.codec == Companded8(signed=False)
        assert (stored.shape, stored.dtype) == ((64, 80), np.float32)

    def test_of_an_init_that_was_traced_before(self):
        init = jax.jit(whole().init)
        init(make(dtype=jnp.bfloat16))
        assert names(jax.eval_shape(init, make(dtype=jnp.bfloat16))) == NAMES

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda tx: optax.chain(optax.clip(1.0), tx),
            lambda tx: optax.MultiSteps(tx, 2),
            lambda tx: optax.apply_if_finite(tx, 3),
            lambda tx: optax.partition({"a": tx}, "a"),
            lambda tx: optax.masked(tx, {"w": True, "norm": False}),
        ],
        ids=["chain", "MultiSteps", "apply_if_finite", "partition", "masked"],
    )
    def test_memory_report_of_an_init_under_jit(self, wrap):
        """The bytes of the arrays that there are."""
        tx = wrap(optax_flash.adamw8(1e-2))
        jitted = optax.GradientTransformation(jax.jit(tx.init), tx.update)
        params = make()
        report = optax_flash.memory_report(jitted, params)
        found = sum(x.nbytes for x in jax.tree.leaves(jitted.init(params)))
        parts = ("residual", "codes", "scales", "other state")
        assert sum(report.component_bytes[part] for part in parts) == found
        assert report.component_bytes["codes"] == 2 * 64 * 80

    def test_through_scan_cond_and_vmap(self):
        tx = optax_flash.adamw8(1e-2)
        params = make()
        state = tx.init(params)

        def step(state, _):
            _, new = tx.update(params, state, params)
            return jax.lax.cond(new.step > 2, lambda: new, lambda: new), None

        scanned, _ = jax.lax.scan(step, state, length=3)
        chex.assert_trees_all_equal_structs(scanned, state)
        several = jax.tree.map(lambda x: jnp.stack([x, x]), params)
        assert jax.vmap(tx.init)(several).codecs == state.codecs

    def test_two_codecs_are_two_structures(self):
        params = make()
        states = [
            compress(optax.adam(1e-2), codec).init(params)
            for codec in (Companded8(), Companded8(group=16))
        ]
        assert jax.tree.structure(states[0]) != jax.tree.structure(states[1])

    def test_copies_and_pickles(self):
        state = whole().init(make(dtype=jnp.bfloat16))
        for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
            chex.assert_trees_all_equal(other, state)

    def test_a_pickle_holds_no_hash(self):
        """Another process has other hashes of strings."""
        codecs = whole().init(make()).inner_state.codecs
        before = hash(codecs)
        other = pickle.loads(pickle.dumps(codecs))
        assert set(vars(other)) == {"leaves", "tracked", "version"}
        assert hash(other) == before and other == codecs


class TestNoPlaceholders:
    def test_scales_are_those_of_codes(self):
        state = optax_flash.adamw8(1e-2).init(make())
        shapes = [x.shape for x in jax.tree.leaves(state.scales)]
        assert shapes == [(64, 3), (64, 3)]

    def test_residuals_are_those_of_half_precision(self):
        state = whole().init(make(dtype=jnp.bfloat16))
        assert [x.shape for x in jax.tree.leaves(state.residual)] == [(64, 80)]

    def test_half_precision_params_for_a_state_of_float32(self):
        tx = whole()
        state = tx.init(make())
        half = make(dtype=jnp.bfloat16)
        with pytest.raises(ValueError, match="'w' is bfloat16.*no residual"):
            tx.update(half, state, half)


LATE_FLAX = """
import pathlib, sys
import jax, jax.numpy as jnp
import optax_flash

folder, first = pathlib.Path(sys.argv[1]), sys.argv[2]
tx = optax_flash.master_weights(optax_flash.adamw8(1e-2))
fresh = tx.init({"w": jnp.full((64, 80), 0.5, jnp.bfloat16)})
assert not any(name.partition(".")[0] == "flax" for name in sys.modules)

import flax.serialization

def write():
    (folder / "written").write_bytes(flax.serialization.to_bytes(fresh))

def read():
    saved = (folder / "saved").read_bytes()
    restored = flax.serialization.from_bytes(fresh, saved)
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    try:
        flax.serialization.from_bytes(fresh, (folder / "other").read_bytes())
    except ValueError as error:
        assert "stores 'w/mu' as Affine8" in str(error), error
    else:
        raise AssertionError("other codecs were read")

for step in (write, read) if first == "write" else (read, write):
    step()
"""


class TestFlaxSerialization:
    def state(self, **kwargs):
        return compress(optax.adam(1e-2), **kwargs).init(make())

    def test_round_trip(self):
        tx = whole()
        params = make(dtype=jnp.bfloat16)
        _, state = tx.update(params, tx.init(params), params)
        saved = flax.serialization.to_bytes(state)
        restored = flax.serialization.from_bytes(tx.init(params), saved)
        chex.assert_trees_all_equal(restored, state)
        chex.assert_trees_all_equal_structs(restored, state)

    @pytest.mark.parametrize("first", ["write", "read"])
    def test_flax_imported_after_the_state_was_made(self, tmp_path, first):
        """In another process; what it writes is what is written here."""
        params = {"w": jnp.full((64, 80), 0.5, jnp.bfloat16)}
        state = whole().init(params)
        saved = flax.serialization.to_bytes(state)
        other = compress(optax.adamw(1e-2), codecs={"mu": "affine8"})
        other = flax.serialization.to_bytes(master_weights(other).init(params))
        for name, content in {"saved": saved, "other": other}.items():
            (tmp_path / name).write_bytes(content)
        processes.run(["-c", LATE_FLAX, tmp_path, first])
        assert (tmp_path / "written").read_bytes() == saved

    @pytest.mark.parametrize("codecs", ["flashoptim", Companded8(group=16)])
    def test_other_codecs_are_refused(self, codecs):
        saved = flax.serialization.to_bytes(self.state(codecs=codecs))
        with pytest.raises(ValueError, match="stores 'w/mu' as"):
            flax.serialization.from_bytes(self.state(), saved)

    def test_format_1_is_refused(self):
        """Its states said nothing of their codecs, which Flax's message names."""
        saved = flax.serialization.to_state_dict(self.state())
        del saved["codecs"]
        with pytest.raises(ValueError, match="do not match.*codecs"):
            flax.serialization.from_state_dict(self.state(), saved)

    def test_of_format_1_is_refused(self):
        tx, params = optax_flash.adamw8(1e-2), make()
        saved = optax_flash.state_format(tx, params) | {"version": 1}
        with pytest.raises(ValueError, match="format version 1, this.*reads 3"):
            optax_flash.check_format(saved, tx, params)


class TestAttributes:
    """What is not ours is the inner state's."""

    def test_moments(self):
        state = whole().init(make(dtype=jnp.bfloat16))
        assert state.mu is state.inner_state.inner_state[0].mu
        with pytest.raises(AttributeError, match="no.* has a field 'momentum'"):
            _ = state.momentum
        # Whoever asks whether this is an array hears that it is none.
        assert not hasattr(state, "shape")

    def test_schedule_free(self):
        stock = optax.contrib.schedule_free_adamw(1e-2)
        tx = compress(stock, codecs={"z": None})
        params = make()
        _, state = tx.update(params, tx.init(params), params)
        _, stock_state = stock.update(params, stock.init(params), params)
        got, expected = (
            optax.contrib.schedule_free_eval_params(x, params)
            for x in (state, stock_state)
        )
        chex.assert_trees_all_close(got, expected, rtol=1e-5)


class TestGroups:
    """Long axes whose shards would end within groups have smaller groups."""

    @pytest.mark.parametrize(
        "codec, n, group",
        [
            (Companded8(), 151936, 16),  # 18,992 columns in each of eight shards
            (Companded8(), 50304, 16),
            (Companded8(), 50256, 32),  # 6,282 = 2 * 3141: no group divides it
            (Companded8(), 4096, 32),
            (Companded8(), 96, 32),  # short
            (Companded8(), 1001 * 8, 32),
            (Companded8(), 1003 * 64, 8),
            (Companded4(), 151936, 16),
            (optax_flash.FlashOptim8(), 151936, 32),  # as it was published
        ],
    )
    def test_a_size(self, codec, n, group):
        assert _rules.grouped(codec, (8, n)).group == group

    @hypothesis.given(st.integers(1, 2**20), st.sampled_from([16, 32, 64, 128]))
    def test_whole_groups_where_there_can_be(self, n, group):
        codec = _rules.grouped(Companded8(group=group), (4, n))
        smallest = min(group, 8)
        if n >= 1024 and n % (8 * smallest) == 0:
            assert n % (8 * codec.group) == 0
        else:
            assert codec.group == group

    def test_a_head_over_eight_devices(self):
        """Codes on eight devices are those of one, and nothing is gathered."""
        tx = optax_flash.adamw8(1e-2)
        rng = np.random.default_rng(0)
        head = jnp.asarray(rng.normal(size=(2, 9344)), jnp.float32)
        assert tx.init({"head": head}).codecs.by_name["head/mu"].codec.group == 16
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        sharded = jax.device_put(head, NamedSharding(mesh, P(None, "x")))

        @functools.partial(jax.jit, donate_argnums=1)
        def step(params, state):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        states = []
        for x in (head, sharded):
            params = {"head": x}
            state = tx.init(params)
            for _ in range(3):
                params, state = step(params, state)
            states.append((params, state))
        chex.assert_trees_all_equal(*jax.device_get(states))
        scales = states[1][1].scales["mu_scales"]["head"]
        assert scales.addressable_shards[0].data.shape == (2, 9344 // 8 // 16)
        hlo = step.lower(*states[1]).compile().as_text()
        assert not any(
            name in hlo for name in ("all-gather", "all-to-all", "collective-permute")
        )


class TestInnerDtypes:
    def test_branches_of_a_step_that_is_skipped(self):
        """mu_dtype under apply_if_finite: the dtypes are those of the inner init."""
        params = make()

        def run(tx):
            state = tx.init(params)
            for scale in (1.0, np.nan, 0.5):
                grads = jax.tree.map(lambda x, s=scale: x * s, params)
                updates, state = jax.jit(tx.update)(grads, state, params)
            return updates, state

        def tx(mu_dtype):
            return optax.apply_if_finite(optax.adam(1e-2, mu_dtype=mu_dtype), 5)

        updates, state = run(compress(tx(jnp.bfloat16)))
        expected, expected_state = run(tx(jnp.bfloat16))
        assert distance(updates["w"], expected["w"]) < 0.05
        assert state.total_notfinite == 1
        _, plain = optax_flash.to_optax_state(compress(tx(jnp.bfloat16)), state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(plain, expected_state)
        assert plain.inner_state[0].mu["w"].dtype == jnp.bfloat16

    def test_complex_and_whole_numbers_beside_real_ones(self):
        real = make()
        params = real | {
            "complex": jax.lax.complex(real["w"], -real["w"]),
            "whole": jnp.ones((64, 80), jnp.int32),
        }
        tx, stock = optax_flash.adam8(1e-2), optax.adam(1e-2)
        state, stock_state = tx.init(params), stock.init(params)
        assert set(state.codecs.by_name) == {"w/mu", "w/nu"}
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            expected, stock_state = stock.update(params, stock_state, params)
        for name in ("complex", "norm", "whole"):
            np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)
        assert distance(updates["w"], expected["w"]) < 0.05


@pytest.mark.parametrize(
    "inner",
    [
        lambda: optax.chain(optax.clip(1.0), optax_flash.adamw8(1e-3)),
        lambda: optax.partition({"a": optax_flash.adamw8(1e-3)}, "a"),
        lambda: optax.MultiSteps(optax_flash.adamw8(1e-3), 2),
        lambda: optax_flash.compress(optax.sgd(1e-3, momentum=0.9), min_size=10**9),
    ],
    ids=["chain", "partition", "MultiSteps", "nothing in codes"],
)
@pytest.mark.parametrize("jit", [False, True])
def test_a_state_in_codes_is_not_put_in_codes_again(inner, jit):
    init = compress(inner()).init
    with pytest.raises(ValueError, match="would be compressed twice"):
        (jax.jit(init) if jit else init)(make())


def test_tree_map_params_with_specs():
    """A bias of 256 on eight devices, beside a leaf in codes: valid shardings."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"kernel": jnp.ones((256, 256)), "bias": jnp.zeros(256)}
    specs = {"kernel": P("fsdp", None), "bias": P("fsdp")}
    tx = optax.chain(optax.clip(1.0), optax_flash.adamw8(1e-3))
    state = tx.init(params)
    placed = optax.tree_map_params(
        tx,
        lambda _, spec: NamedSharding(mesh, spec),
        state,
        specs,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    sharded = jax.jit(lambda x: x, out_shardings=placed)(state)
    chex.assert_trees_all_equal(jax.device_get(sharded), jax.device_get(state))
    assert sharded[1].mu["bias"].addressable_shards[0].data.shape == (32,)
    assert sharded[1].mu["kernel"].addressable_shards[0].data.shape == (32, 256)
