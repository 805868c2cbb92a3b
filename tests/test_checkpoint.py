"""Checkpoints: round trips, other meshes, size, bad input, and deaths."""

import json
import os
import pathlib
import random
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
import optax_flash.flax
from optax_flash import Checkpoints
from tests.disks import full_disk
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")
TX = optax_flash.master_weights(optax_flash.adamw8(1e-2))


def make(seed, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (64, 128), "bias": (16,)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


@jax.jit
def step(params, state, grads):
    updates, state = TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state


first_state = jax.jit(lambda params: TX.init(params))  # compiled once for all tests


@pytest.fixture(name="trained")
def trained_fixture():
    """Params and a state that are not the first ones."""
    return step(make(0), first_state(make(0)), make(1))


@pytest.fixture(name="checkpoints")
def checkpoints_fixture(tmp_path):
    with Checkpoints(tmp_path, TX, make(0)) as checkpoints:
        yield checkpoints


def assert_same_bits(tree, other):
    chex.assert_trees_all_equal_structs(tree, other)
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    for x, y in leaves:
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def empty(tree):
    return jax.tree.map(jnp.zeros_like, tree)


# --- what is saved is what is restored


def test_round_trip(trained, checkpoints):
    checkpoints.save(3, trained)
    assert checkpoints.latest == 3
    assert_same_bits(checkpoints.restore(empty(trained)), trained)
    shapes = jax.eval_shape(lambda: trained)
    restored = checkpoints.restore(shapes, step=3)
    assert_same_bits(restored, trained)
    assert {d for x in jax.tree.leaves(restored) for d in x.devices()} == {
        jax.devices()[0]
    }


def test_any_leaf_that_jax_can_hold(checkpoints):
    tree = {
        "key": jax.random.key(5),
        "empty": jnp.zeros((0, 4)),
        "number": 3,
        "mask": jnp.array([True, False]),
        "complex": jnp.array([1 + 2j, 3 - 1j]),
        "numpy": np.arange(4, dtype=np.int32),
        "nothing": None,
        "dict": {"a": [jnp.ones(2, jnp.float16), (jnp.full(3, jnp.nan),)]},
    }
    checkpoints.save(0, tree)
    restored = checkpoints.restore(tree)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))
    key = {"key": jax.eval_shape(lambda: jax.random.key(0))}
    again = checkpoints.restore(jax.eval_shape(lambda: restored) | key)["key"]
    assert restored.pop("key") == tree["key"] == again
    del tree["key"]
    chex.assert_trees_all_equal(restored, jax.tree.map(jnp.asarray, tree))


def test_nnx(tmp_path):
    def make_both(seed):
        model = nnx.Linear(64, 64, rngs=nnx.Rngs(seed))
        return model, optax_flash.flax.Optimizer(model, optax_flash.adamw8(1e-2))

    model, optimizer = make_both(0)
    optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(jnp.ones(64)) ** 2))(model))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    with Checkpoints(tmp_path, optimizer.tx, params) as checkpoints:
        checkpoints.save(1, nnx.state((model, optimizer)))
        others = make_both(1)
        nnx.update(others, checkpoints.restore(nnx.state(others)))
    assert_same_bits(nnx.state(others), nnx.state((model, optimizer)))


@pytest.mark.parametrize(
    "axis_type",
    quick([AxisType.Explicit], [AxisType.Auto, AxisType.Explicit]),
    ids=str,
)
def test_on_another_mesh_the_run_goes_on_bit_for_bit(axis_type, trained, checkpoints):
    def sharded(tree, shape, spec):
        mesh = jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(axis_type,) * 2)

        def place(x):
            wide = x.ndim == 2 and x.shape[1] > 4
            return jax.device_put(x, NamedSharding(mesh, spec if wide else P()))

        return jax.tree.map(place, tree)

    params, state = sharded(trained, (8, 1), P("fsdp"))
    checkpoints.save(1, (params, state))
    expected = step(*trained, make(2))
    for shape, spec in [((2, 2), P("fsdp", "tp")), ((1, 4), P(None, "tp"))]:
        target = sharded(empty(trained), shape, spec)
        restored = checkpoints.restore(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                target,
            )
        )
        assert_same_bits(restored, trained)
        for x, like in zip(
            jax.tree.leaves(restored), jax.tree.leaves(target), strict=True
        ):
            assert x.sharding == like.sharding
        grads = sharded(make(2), shape, spec)
        assert_same_bits(step(*restored, grads), expected)


def test_a_counter_that_is_nowhere_joins_any_mesh(checkpoints):
    """Flax's TrainState has its step as a number, and keys lie on no mesh."""
    mesh = jax.make_mesh((8,), ("fsdp",))
    kernel = jax.device_put(make(0)["kernel"], NamedSharding(mesh, P("fsdp")))
    rest = {"step": 0, "key": jax.random.key(1), "count": jnp.zeros([], jnp.int32)}
    checkpoints.save(1, {"kernel": kernel, **rest})
    tree = checkpoints.restore({"kernel": kernel, **rest})
    assert tree["kernel"].committed and tree["kernel"].sharding == kernel.sharding
    assert not tree["step"].committed

    @jax.jit
    def use(tree):
        noise = jax.random.normal(tree["key"], (64, 128))
        return tree["kernel"] + tree["step"] + tree["count"] + noise

    assert use(tree).shape == (64, 128)


def test_half_the_size_of_float32(tmp_path):
    """Of weights and state on disk, after some steps on noise."""
    weights = {"w": jax.random.normal(jax.random.key(0), (256, 1024))}
    half = optax_flash.cast_params(weights, jnp.bfloat16)

    def size(name, tx, params):
        state = tx.init(params)
        for k in range(3):
            noise = jax.random.normal(jax.random.key(k), (256, 1024))
            grads = {"w": noise.astype(params["w"].dtype)}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        with Checkpoints(tmp_path / name, tx, params) as checkpoints:
            checkpoints.save(0, (params, state))
        files = (tmp_path / name).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    assert size("ours", TX, half) < 0.5 * size("stock", optax.adamw(1e-2), weights)


def test_newest_are_kept(trained, tmp_path):
    tree = {"x": jnp.ones(3)}
    with Checkpoints(tmp_path, TX, make(0), keep=2) as checkpoints:
        assert checkpoints.latest is None and checkpoints.steps == []
        for k in (1, 5, 10):
            checkpoints.save(k, tree)
        assert checkpoints.steps == [5, 10]
        for k in (10, 7):
            with pytest.raises(ValueError, match=f"Step {k} cannot be saved"):
                checkpoints.save(k, tree)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "5"]
    with pytest.raises(ValueError, match="Keep at least 1"):
        Checkpoints(tmp_path, TX, make(0), keep=0)


# --- bad input

# Where orbax fails, its threads raise, too, and its event loops stay open.
orbax_fails = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


def test_missing(trained, checkpoints, monkeypatch):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint in"):
        checkpoints.restore(trained)
    checkpoints.save(4, trained)
    with pytest.raises(FileNotFoundError, match=r"of step 3 in .*, which has \[4\]"):
        checkpoints.restore(trained, step=3)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r'pip install "optax_flash\[checkpoint\]"'):
        Checkpoints(checkpoints.folder, TX, make(0))


def test_checkpoint_of_another_optimizer_or_model(trained, checkpoints):
    checkpoints.save(1, trained)

    def restore(tx, params):
        with Checkpoints(checkpoints.folder, tx, params) as others:
            others.restore((params, jax.eval_shape(tx.init, params)))

    lion = optax_flash.master_weights(optax_flash.lion8(1e-2))
    with pytest.raises(ValueError, match="stores 'kernel/nu' as Companded8.*no codes"):
        restore(lion, make(0))
    # Codes of the same shapes, with another meaning.
    other = optax_flash.master_weights(optax_flash.adamw8(codecs="flashoptim"))
    with pytest.raises(ValueError, match="'kernel/mu' as Companded8.*FlashOptim8"):
        restore(other, make(0))
    with pytest.raises(
        ValueError, match="'bias/residual' as ExactResidual.*from_optax_st"
    ):
        restore(optax.adamw(1e-2), make(0, jnp.float32))
    with pytest.raises(
        ValueError, match=r"step 1 has bfloat16\[16\] at '0/bias' where"
    ):
        restore(TX, make(0) | {"bias": jnp.zeros(8, jnp.bfloat16)})
    params, state = trained
    target = (params | {"more": jnp.zeros(2)}, state)
    with pytest.raises(ValueError, match=r"nothing at '0/more' where float32\[2\]"):
        checkpoints.restore(target)


def test_what_is_no_array_is_refused(checkpoints):
    with pytest.raises(ValueError, match="'a/0' is a str. A checkpoint holds arrays"):
        checkpoints.save(1, {"a": ["text"]})
    with pytest.raises(ValueError, match="'a' is float64, of which JAX would keep"):
        checkpoints.save(1, {"a": np.ones(2)})
    with pytest.raises(ValueError, match="Two leaves have the path 'a/b'"):
        checkpoints.save(1, {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    assert checkpoints.steps == []


@orbax_fails
def test_damage_is_noticed(trained, checkpoints):
    checkpoints.save(1, trained)
    newer = step(*trained, make(2))
    checkpoints.save(2, newer)
    folder = checkpoints.folder / "2"
    files = [file for file in folder.rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    rng = random.Random(0)

    def damages():
        whole = largest.read_bytes()
        for _ in range(8):
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            yield largest, bytes(flipped)
        yield largest, whole[: len(whole) // 2]
        yield largest, None
        for name in ("description/metadata", "arrays/manifest.ocdbt"):
            yield folder / name, (folder / name).read_bytes()[:-7]
            yield folder / name, None

    noticed = []
    for file, content in damages():
        whole = file.read_bytes()
        file.unlink() if content is None else file.write_bytes(content)
        try:  # A few bits of a compressed file do not matter.
            assert_same_bits(checkpoints.restore(empty(newer)), newer)
        except ValueError as error:
            noticed.append(str(error))
        file.write_bytes(whole)
    assert len(noticed) >= 12  # of 14
    for message in noticed:
        assert f"{folder} is damaged: " in message
        assert message.endswith("Delete that folder to go on from step 1.")
    assert_same_bits(checkpoints.restore(empty(newer)), newer)
    assert_same_bits(checkpoints.restore(empty(trained), step=1), trained)


# The lower limit stops a description of the arrays, the higher the arrays: into how
# many files these are divided is a matter of timing, but the kernel alone takes 13 kB.
@pytest.mark.parametrize("limit", [2_000, 5_000])
@orbax_fails
def test_full_disk(limit, trained, checkpoints):
    checkpoints.save(1, trained)
    newer = step(*trained, make(2))
    with (
        full_disk(limit),
        pytest.raises(OSError, match="(?s)Step 2 was not saved .*whole: .1"),
    ):
        checkpoints.save(2, newer)
    # Orbax may still be writing other files, which the next save removes.
    assert checkpoints.steps == [1]
    assert_same_bits(checkpoints.restore(empty(trained)), trained)
    checkpoints.save(2, newer)
    assert_same_bits(checkpoints.restore(empty(newer)), newer)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["1", "2"]


# --- deaths


@pytest.mark.full
def test_killed_at_any_moment_nothing_is_lost(tmp_path):
    kills = 24
    tests = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, tests / "killed_run.py", tmp_path, str(kills), "0"],
        env=os.environ | {"PYTHONPATH": str(tests.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *deaths, last = json.loads(done.stdout)
    assert [death["code"] for death in deaths] == [-9] * kills, done.stderr
    assert last["code"] == 0, done.stderr
    assert sum(death["mid_save"] for death in deaths) >= 5
    for death in (*deaths, last):
        if death["resumed"] is not None:  # it lived so long
            assert death["resumed"] >= death["safe"]
    assert last["resumed"] > 20

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    logged = (whole / "metrics.jsonl").read_text()
    assert (killed / "metrics.jsonl").read_text() == logged
    assert [json.loads(line)["step"] for line in logged.splitlines()] == [
        *range(1, last["saved"][-1] + 1)
    ]
    state = optax_flash.flax.TrainState.create(
        apply_fn=None,
        params=make(0, jnp.float32),
        tx=optax_flash.adamw8(1e-2, weight_decay=0.1),
    ).replace(step=jnp.zeros([], jnp.int32))
    ends = []
    for folder in (whole, killed):
        path = folder / "checkpoints"
        with Checkpoints(path, state.tx, state.params) as checkpoints:
            assert checkpoints.latest == last["saved"][-1]
            ends.append(checkpoints.restore(state))
    assert int(ends[0].step) == last["saved"][-1]
    assert_same_bits(*ends)
