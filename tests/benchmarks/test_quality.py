"""The training proof, in small: its data, its statistics, its runs and its files."""

import contextlib
import json
import math

import jax
import numpy as np
import pytest

from benchmarks import workloads
from benchmarks.quality import lion_decay, lion_signs
from benchmarks.quality.__main__ import main, trainers, write
from benchmarks.quality.comparison import summarize
from benchmarks.quality.conditions import conditions
from benchmarks.quality.results import Results
from benchmarks.quality.training import Trainer, study
from benchmarks.study.statistics import difference

pytestmark = pytest.mark.full

SIZE = 12  # of the pictures, in pixels


def tiny_gpt():
    rng = np.random.default_rng(0)
    words = np.array([b"romeo ", b"juliet ", b"art ", b"thou "])
    texts = {name: b"".join(rng.choice(words, 300)) for name in ("one", "two")}
    return workloads.gpt(
        texts, depth=1, width=32, heads=1, seq_len=16, batch_size=4, eval_windows=8
    )


def flat_pictures(count=20):
    """Picture i is i + 1 all over, and that is its label."""
    values = np.arange(1, count + 1, dtype=np.uint8)
    pictures = np.broadcast_to(values[:, None, None], (count, SIZE, SIZE))
    return workloads.Images(pictures, values, pictures, values)


def tiny_image():
    images = flat_pictures()
    images = images._replace(
        train_labels=images.train_labels % 10, test_labels=images.test_labels % 10
    )
    return workloads.image(images, widths=(32,), batch_size=4)


WORKLOADS = [tiny_gpt, tiny_image]


def chosen(*names):
    return [condition for condition in conditions() if condition.name in names]


# The workloads.


@pytest.mark.parametrize("make", WORKLOADS)
def test_a_seed_and_a_step_decide_a_batch(make):
    one, two = make(), make()
    jax.tree.map(np.testing.assert_array_equal, one.batch(3, 5), two.batch(3, 5))
    jax.tree.map(np.testing.assert_array_equal, one.init(3), two.init(3))
    for seed, step in [(3, 6), (4, 5)]:
        other = jax.tree.leaves(one.batch(seed, step))
        same = zip(jax.tree.leaves(one.batch(3, 5)), other, strict=True)
        assert not all(np.array_equal(x, y) for x, y in same)


def test_windows_are_text_to_train_on():
    text = bytes(range(200)) * 10
    held_out = b"\xff" * 150  # the 7 % at the end
    work = workloads.gpt(
        {"text": text + held_out}, depth=1, width=32, heads=1, seq_len=16
    )
    for step in range(20):
        for window in work.batch(0, step):
            assert window.tobytes() in text


def test_held_out_windows_are_the_ends_of_the_texts():
    rng = np.random.default_rng(0)
    text = rng.integers(32, 64, 1_000, np.uint8).tobytes()
    longer = {"text": text + b"\x00" * 75}
    small = dict(depth=1, width=32, heads=1, seq_len=16)
    zeros = workloads.gpt(longer, **small)
    tokens = np.zeros((4, 17), np.uint8)
    params = zeros.init(0)
    assert zeros.evaluate(params)["loss"] == pytest.approx(
        float(zeros.loss(params, tokens)), rel=1e-5
    )


def test_pictures_are_moved_with_their_labels():
    work = workloads.image(flat_pictures(), widths=(8,), batch_size=64)
    batch = work.batch(0, 0)
    pictures, labels = batch["image"], batch["label"]
    assert pictures.shape == (64, SIZE, SIZE)
    assert np.array_equal(pictures.max(axis=(1, 2)), labels)
    # What was moved in is black: at most two rows and two columns.
    black = (pictures == 0).sum(axis=(1, 2))
    assert 0 < black.max() <= SIZE**2 - (SIZE - 2) ** 2
    assert len(np.unique(labels)) > 10


def test_half_of_the_pictures_are_mirrored():
    ramp = np.broadcast_to(np.arange(1, SIZE + 1, dtype=np.uint8), (2, SIZE, SIZE))
    images = workloads.Images(ramp, np.zeros(2, np.uint8), ramp, np.zeros(2, np.uint8))
    batch = workloads.image(images, widths=(8,), batch_size=400).batch(0, 0)
    middle = batch["image"][:, SIZE // 2, 3:-3].astype(int)
    rising = np.all(np.diff(middle) == 1, axis=1)
    falling = np.all(np.diff(middle) == -1, axis=1)
    assert np.all(rising | falling)
    assert 0.4 < rising.mean() < 0.6


def test_accuracy_counts_every_test_picture():
    work = tiny_image()
    params = work.init(0)
    params["head"]["kernel"] = np.zeros_like(params["head"]["kernel"])
    params["head"]["bias"] = np.zeros(10, np.float32)  # all logits equal: class 0
    measured = work.evaluate(params)
    assert measured["accuracy"] == pytest.approx(2 / 20)
    assert measured["loss"] == pytest.approx(math.log(10), rel=1e-5)


def test_kinds():
    found = {}
    for make in WORKLOADS:
        work = make()
        for path, _ in jax.tree_util.tree_leaves_with_path(work.init(0)):
            path = "/".join(key.key for key in path)
            found[path] = work.kind(path)
    assert found["embed/embedding"] == "embedding"
    assert found["block_0/qkv/kernel"] == found["block_0/out/kernel"] == "attention"
    assert found["block_0/up/kernel"] == found["block_0/down/kernel"] == "mlp"
    assert found["block_0/RMSNorm_0/scale"] == found["norm_0a/bias"] == "norm"
    assert found["conv_0b/kernel"] == found["stem/kernel"] == "convolution"
    assert found["head/kernel"] == found["head/bias"] == "head"


def test_says_how_to_get_the_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match="make fashion-mnist"):
        workloads.fashion_mnist(tmp_path)


def test_says_that_texts_are_too_short():
    with pytest.raises(ValueError, match="too few for windows of 65"):
        workloads.gpt({"text": b"to be"})


# The statistics.


def test_interval_by_hand():
    found = difference([1.0, 2.0, 3.0], [1.5, 2.5, 4.0])
    # d = 0.5, 0.5, 1; s**2 = 1/12; t = 4.302653 for 2 degrees of freedom.
    assert found.mean == pytest.approx(2 / 3)
    assert found.spread == pytest.approx(math.sqrt(1 / 12))
    assert found.high - found.mean == pytest.approx(4.302653 / 6, rel=1e-6)
    assert found.mean - found.low == pytest.approx(4.302653 / 6, rel=1e-6)


def test_interval_of_two_pairs_and_of_one():
    # d = 0, 2; s = sqrt(2); t = 12.706205 for 1 degree of freedom.
    found = difference([0.0, 0.0], [0.0, 2.0])
    assert (found.mean, found.high) == pytest.approx((1.0, 1.0 + 12.706205))
    found = difference([1.0], [3.0])
    assert found.mean == 2.0
    assert math.isnan(found.low) and math.isnan(found.high)


def test_interval_holds_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    reference = rng.normal(0.0, 10.0, (4_000, 4))
    other = reference + rng.normal(0.3, 1.0, (4_000, 4))
    intervals = [difference(*pair) for pair in zip(reference, other, strict=True)]
    held = np.mean([x.low <= 0.3 <= x.high for x in intervals])
    assert held == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def run(storage, seed, loss):
    return {
        "workload": "gpt",
        "optimizer": "adamw",
        "storage": storage,
        "seed": seed,
        "loss": loss,
        "train_loss": loss,
        "bytes_per_parameter": 5.0,
        "seconds": 1.0,
    }


def summary_of(storage, losses, reference=(2.0, 2.0, 2.0)):
    runs = [run("float32", i, loss) for i, loss in enumerate(reference)]
    runs += [run(storage, i, loss) for i, loss in enumerate(losses)]
    return summarize(runs)[1]


@pytest.mark.parametrize(
    "losses, indistinguishable, mean_within, interval_within",
    [
        ((2.0, 2.001, 1.999), True, True, True),
        ((2.002, 2.002, 2.0021), False, True, True),
        ((2.001, 2.02, 1.99), True, True, False),
        ((2.02, 2.02, 2.021), False, False, False),
        ((1.9, 1.9, 1.901), False, True, True),  # better is not held against it
    ],
)
def test_verdicts(losses, indistinguishable, mean_within, interval_within):
    row = summary_of("8 bits", losses)
    assert row["indistinguishable"] == indistinguishable
    assert row["mean_within"] == mean_within
    assert row["interval_within"] == interval_within


def test_pairs_are_of_the_same_seed():
    # A constant cost of 1 % hidden under seeds that differ by 50 %.
    row = summary_of("4 bits", (2.02, 3.03, 1.01), reference=(2.0, 3.0, 1.0))
    assert row["loss_relative"]["mean"] == pytest.approx(0.01)
    assert row["loss_difference"]["spread"] == pytest.approx(0.01)
    # Seed 2 has no partner.
    row = summary_of("4 bits", (2.02, 3.03, 99.0), reference=(2.0, 3.0))
    assert row["loss_relative"]["mean"] == pytest.approx(0.01)


def test_a_nan_is_neither_indistinguishable_nor_within():
    row = summary_of("bfloat16", (2.0, math.nan, 2.0))
    assert not row["indistinguishable"]
    assert not row["mean_within"] and not row["interval_within"]


# The runs.


@contextlib.contextmanager
def little_compilation():
    """XLA leaves most optimizations out, and takes half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", name="finished")
def finished_fixture(tmp_path_factory):
    """The results of two conditions, two seeds and two steps on both workloads."""
    folder = tmp_path_factory.mktemp("results")
    results = Results(folder / "runs.json")
    settings = chosen("adamw, float32", "adamw, 8 bits")
    with little_compilation():
        study(results, trainers([tiny_gpt(), tiny_image()], settings, steps=2), [0, 1])
    write(results, folder, "python -m benchmarks.quality")
    return results


def test_writes_all_outputs(finished):
    content = json.loads(finished.path.read_text())
    runs = {
        (run["workload"], run["storage"], run["seed"]): run for run in content["runs"]
    }
    assert set(runs) == {
        (workload, storage, seed)
        for workload in ("gpt", "image")
        for storage in ("float32", "8 bits")
        for seed in (0, 1)
    }
    assert all(math.isfinite(run["loss"]) for run in content["runs"])
    assert all("accuracy" in run for run in content["runs"] if "image" in run.values())
    # Two steps from the same weights on the same data: almost the same loss.
    for workload in ("gpt", "image"):
        for seed in (0, 1):
            ours, float32 = (
                runs[workload, storage, seed]["train_loss"]
                for storage in ("8 bits", "float32")
            )
            assert ours == pytest.approx(float32, rel=1e-2)
    gpt = {row["storage"]: row for row in content["summary"] if "gpt" in row.values()}
    assert gpt["float32"]["bytes_per_parameter"] == pytest.approx(12, abs=0.1)
    assert gpt["8 bits"]["bytes_per_parameter"] < 7
    kept = json.loads(finished.path.with_name("quality.json").read_text())
    assert [run["seed"] for run in kept["runs"]] == [
        run["seed"] for run in finished.runs
    ]
    assert all(len(run["curve"]) == 2 for run in content["runs"])
    assert not any("curve" in run for run in kept["runs"])
    for ours, theirs in zip(kept["summary"], content["summary"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    page = finished.path.with_name("quality.md").read_text()
    assert "## gpt" in page and "## image" in page and "| adamw | 8 bits |" in page
    assert finished.path.with_name("quality.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(finished, tmp_path, monkeypatch):
    path = tmp_path / "quality.json"
    content = json.loads(finished.path.read_text())
    content["runs"] = [run for run in content["runs"] if run["seed"] == 0]
    path.write_text(json.dumps(content))
    made = []

    def train(trainer, seed):
        made.append(seed)
        return {"loss": 1.0, "bytes_per_parameter": 1.0}

    monkeypatch.setattr(Trainer, "run", train)
    settings = chosen("adamw, float32", "adamw, 8 bits")
    for _ in range(2):
        study(Results(path), trainers([tiny_gpt()], settings, steps=2), [0, 1])
        assert made == [1, 1]
    assert len(json.loads(path.read_text())["runs"]) == 6  # two of them pictures


def test_runs_of_other_settings_are_not_mixed(finished):
    results = Results(finished.path)
    settings = chosen("adamw, float32")
    with pytest.raises(ValueError, match=r"float32, 0\) with steps 2, not 3"):
        study(results, trainers([tiny_gpt()], settings, steps=3), [0])
    with pytest.raises(ValueError, match="with learning_rate 0.003, not 0.1"):
        study(
            results,
            trainers([tiny_gpt()], settings, steps=2, learning_rate=0.1),
            [0],
        )


def test_codecs_belong_to_the_settings():
    work = tiny_gpt()
    eight, other = chosen("adamw, 8 bits", "adamw, flashoptim")
    formats = [Trainer(work, x, 1e-3, 2).settings(0)["format"] for x in (eight, other)]
    assert formats[0] != formats[1]


def test_a_name_that_fits_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--only", "adamax", "--out", str(tmp_path)])
    assert "adamw, float32" in capsys.readouterr().err


# Lion.


def test_lions_weight_decay_survives_the_rounding_of_weights():
    # 1e-4 * 0.01 is far below the resolution of 24-bit weights.
    kept = lion_decay.surviving("equal", "exact", 1e-4, 0.01, steps=200)
    assert kept == pytest.approx(1.0, abs=0.05)
    # The published rounding loses it.
    lost = lion_decay.surviving("equal", "flashoptim", 1e-4, 0.01, steps=200)
    assert lost == pytest.approx(0.0, abs=0.05)


def test_a_momentum_that_underflows_flips_signs(monkeypatch):
    variants = {
        "published": lion_signs.Variant(lion_signs.FlashOptim8(), 1e-8),
        "default": lion_signs.Variant(lion_signs.Companded8(), 1e-8),
    }
    monkeypatch.setattr(lion_signs, "VARIANTS", variants)
    with little_compilation():
        found = lion_signs.compare(tiny_gpt(), 1e-3, steps=6, seed=0)
    lost, kept = found["published"]["all"], found["default"]["all"]
    assert lost["zero"][-1] == 1 and lost["momentum"][-1] == 0
    assert kept["momentum"][-1] == pytest.approx(1, abs=0.02)
    assert kept["flipped"][-1] < 0.02 < lost["flipped"][-1]
    assert kept["drift"] < lost["drift"]
    assert set(found["default"]) == {"all", "embedding", "mlp", "head"}
