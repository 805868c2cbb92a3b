"""The language-model example: its data, its optimizers, its checkpoints, its demo."""

import collections
import dataclasses
import functools
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import optax_flash
from examples.common import states
from examples.common.config import parse
from examples.common.memory import live_bytes
from examples.common.run_folder import RunFolder
from examples.lm import data, decoders, demo, gpu_train, train
from optax_flash import plan

SEQ_LEN = 32


def play(seed: int, words: int = 3000) -> bytes:
    """Text that can be learned: random words of a small vocabulary, a few on a line."""
    rng = np.random.default_rng(seed)
    vocabulary = ["romeo", "juliet", "wherefore", "art", "thou", "the", "sun", "is"]
    picked = rng.choice(vocabulary, words)
    return b"\n".join(" ".join(line).encode() for line in picked.reshape(-1, 6))


TEXTS = {"one": play(1), "two": play(2), "poem": play(3, words=120)}


@pytest.fixture(scope="session", name="data_dir")
def data_dir_fixture(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(name="config")
def config_fixture(data_dir):
    return train.Config(
        depth=1,
        width=64,
        heads=2,
        seq_len=SEQ_LEN,
        batch_size=8,
        steps=60,
        warmup=5,
        eval_every=20,
        eval_batches=4,
        data_dir=data_dir,
    )


pytestmark = pytest.mark.usefixtures("quick_compile")


# --- data


@pytest.fixture(scope="session", name="sources")
def sources_fixture(data_dir):
    return data.prepare(SEQ_LEN, data_dir, TEXTS)


def windows(source) -> dict[str, set[bytes]]:
    """All windows of a split, by the text they come from."""
    found = collections.defaultdict(set)
    for example in source:
        found[example["text"].decode()].add(example["bytes"].tobytes())
    return found


def test_splits_share_no_window_and_hold_every_text(tmp_path):
    rng = np.random.default_rng(0)  # random bytes: no two windows are equal by chance
    sizes = {"long": 20_000, "short": 2 * (SEQ_LEN + 1) + 5}
    texts = {name: rng.bytes(size) for name, size in sizes.items()}
    sources = data.prepare(SEQ_LEN, tmp_path, texts)
    train_windows, held_out = windows(sources["train"]), windows(sources["validation"])
    assert set(train_windows) == set(held_out) == set(texts)
    for name, text in texts.items():
        assert not train_windows[name] & held_out[name]
        count = len(text) // (SEQ_LEN + 1)
        assert len(train_windows[name]) + len(held_out[name]) == count
        # What is held out is the end of the text, in one piece.
        starts = sorted(text.index(window) for window in held_out[name])
        assert starts == [i * (SEQ_LEN + 1) for i in range(count - len(starts), count)]
    fraction = len(held_out["long"]) / (sizes["long"] // (SEQ_LEN + 1))
    assert 0.05 <= fraction <= 0.1


def test_second_call_reuses_the_first_and_other_texts_do_not(tmp_path):
    def files():
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*array_record*")}

    data.prepare(SEQ_LEN, tmp_path, TEXTS)
    first = files()
    data.prepare(SEQ_LEN, tmp_path, TEXTS)
    assert files() == first
    other = data.prepare(SEQ_LEN, tmp_path, {"other": play(4)})
    assert set(windows(other["train"])) == {"other"}


def test_text_too_short_is_named(tmp_path):
    with pytest.raises(Exception, match="sonnet.*too short"):
        data.prepare(SEQ_LEN, tmp_path, {"sonnet": bytes(SEQ_LEN + 1)})


def test_batch_depends_on_seed_and_index_alone(sources):
    first = data.batches(sources["train"], 8, seed=3)
    in_order = [first[k] for k in range(40)]
    again = data.batches(sources["train"], 8, seed=3)
    for k in (17, 39, 0):
        np.testing.assert_array_equal(again[k], in_order[k])
    other = data.batches(sources["train"], 8, seed=4)
    assert not np.array_equal(other[17], in_order[17])


def test_each_epoch_holds_every_window_once_in_an_order_of_its_own(sources):
    source = sources["train"]
    ones = data.batches(source, 1, seed=0)
    epochs = [
        [ones[k].tobytes() for k in range(start, start + len(source))]
        for start in (0, len(source))
    ]
    everything = sorted(example["bytes"].tobytes() for example in source)
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]


# --- training


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        dict(optimizer="adamw8"),
        pytest.param(
            dict(optimizer="adamw", param_dtype="float32"), marks=pytest.mark.full
        ),
    ],
    ids=lambda options: options["optimizer"],
)
def test_learns_more_than_byte_frequencies(config, sources, options):
    epoch = len(sources["train"]) // config.batch_size
    half = -(-epoch // 2)
    config = dataclasses.replace(config, steps=epoch, eval_every=half, **options)
    history = train.train(config, TEXTS).history
    assert [row["step"] for row in history] == list(range(1, epoch + 1))
    losses = [row["val_loss"] for row in history if "val_loss" in row]
    assert losses == sorted(losses, reverse=True)
    counts = np.bincount(np.frombuffer(b"".join(TEXTS.values()), np.uint8))
    frequencies = counts[counts > 0] / counts.sum()
    assert losses[-1] < -0.6 * np.sum(frequencies * np.log(frequencies))


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        *("adamw", "adam", "nadamw", "lion", "sgd", "rmsprop", "adafactor"),
        *("adamw8", "adam8", "lion8", "sgd8", "adamw4", "adam4", "lion4", "sgd4"),
        *("factored_adamw", "factored_adamw@companded8", "factored_adamw@companded4"),
        *("muon", "adamw@flashoptim", "lowrank_adamw(rank=4)"),
        *("lora_pre_adamw(rank=4)", "tamed_adamw8(threshold=1.0,relative=True)"),
    ],
)
def test_every_optimizer_takes_steps(config, sources, name):
    # Each on the weights it is meant for; ours would take float32 just as well.
    param_dtype = "bfloat16" if name.endswith("8") else "float32"
    config = dataclasses.replace(
        config, optimizer=name, param_dtype=param_dtype, warmup=0
    )
    batches = data.batches(sources["train"], config.batch_size, config.seed)
    state, losses = train.init_state(config), []
    before = jax.tree.map(
        np.array, states.full_weights(state)
    )  # copied: steps donate it
    for k in range(3):
        state, metrics = train.train_step(state, batches[k])
        losses.append(
            float(metrics["loss"])
        )  # the last is that of the weights after two steps
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    moved = jax.tree.map(
        lambda p, q: (p != q).any(), states.full_weights(state), before
    )
    assert all(map(bool, jax.tree.leaves(moved)))


@pytest.mark.full
@pytest.mark.parametrize(
    "options, dtype, residual",
    [
        (dict(param_dtype="float32"), "float32", 0),
        (dict(master_bits=None), "bfloat16", 0),
        (dict(master_bits=24), "bfloat16", 1),
        (dict(master_bits=32), "bfloat16", 2),
    ],
)
def test_weights_are_stored_as_asked(config, options, dtype, residual):
    state = train.init_state(dataclasses.replace(config, **options))
    assert state.params["embed"]["embedding"].dtype == dtype
    assert state.params["RMSNorm_0"]["scale"].dtype == "float32"
    params = sum(p.size for p in jax.tree.leaves(state.params))
    held = live_bytes(state)["residual"] / params
    assert held == pytest.approx(residual, rel=0.01)


@pytest.mark.full
def test_numerics_are_logged(config, tmp_path):
    out = str(tmp_path)
    config = dataclasses.replace(config, steps=4, warmup=0, report_every=2, out=out)
    state, history, _ = train.train(config, TEXTS)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert [row["step"] for row in history if "numerics" in row] == [2, 4]
    numerics = history[-1]["numerics"]
    assert set(numerics) == set(optax_flash.NumericsReport._fields)
    split = {path for path, p in flat(state.params) if p.dtype == "bfloat16"}
    whole = {path for path, p in flat(state.params) if p.dtype == "float32"}
    assert set(numerics["noisy"]) == split and set(numerics["lost"]) == whole
    compressed = {path for path, p in flat(state.params) if p.size >= 4096}
    assert set(numerics["zero"]) == {
        f"{p}/{m}" for p in compressed for m in ("mu", "nu")
    }
    assert set(numerics["non_finite"].values()) == {0.0}
    # The schedule is at a tenth of its peak; Adam's steps are about the learning rate.
    assert all(1e-5 < rms < 1e-3 for rms in numerics["update_rms"].values())


@pytest.mark.full
def test_a_learning_rate_that_is_too_small_is_named(config):
    config = dataclasses.replace(config, steps=2, warmup=0, report_every=2)
    with pytest.warns(UserWarning) as warned:
        train.train(dataclasses.replace(config, learning_rate=1e-8), TEXTS)
    messages = [str(warning.message) for warning in warned]
    assert all("the learning rate is small" in message for message in messages)
    assert any(message.startswith("'block_0/") for message in messages)


def flat(params):
    """Params with their paths."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), p)
        for path, p in jax.tree_util.tree_leaves_with_path(params)
    ]


# --- decoders


def tokens_of(config):
    rng = np.random.default_rng(0)
    shape = config.batch_size, config.seq_len + 1
    return rng.integers(0, 256, shape, dtype=np.uint8)


def decoder_config(config, **options):
    return dataclasses.replace(config, depth=2, seq_len=16, **options)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_attention_remat_and_release_are_the_same_training(config, architecture):
    """They differ in memory alone: losses and weights are those of the plain step."""
    found = {}
    for name, options in {
        "plain": dict(attention="plain"),
        "remat": dict(remat=True),
        "released": dict(release=True),
    }.items():
        # At norm 0 nothing is clipped: released layers would be clipped alone.
        changes = dict(architecture=architecture, optimizer="sgd8", clip=0.0, warmup=0)
        this = decoder_config(config, **changes, **options)
        state, tokens = train.init_state(this), tokens_of(this)
        step = train.released_step(0.0) if this.release else train.train_step
        losses = []
        for _ in range(3):
            state, metrics = step(state, tokens)
            losses.append(float(metrics["loss"]))
        found[name] = losses, states.full_weights(state)
    losses, weights = found["plain"]
    assert losses[-1] < losses[0]
    for name in ("remat", "released"):
        np.testing.assert_allclose(found[name][0], losses, rtol=1e-4)
        for a, b in zip(
            jax.tree.leaves(found[name][1]), jax.tree.leaves(weights), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-3)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_no_decoder_sees_the_future(config, architecture):
    this = decoder_config(config, architecture=architecture, attention="plain")
    state, tokens = train.init_state(this), tokens_of(this)
    sizes = train.model(this)[1]

    def loss_until(tokens, time):
        """The sum of the losses of the first bytes."""
        return time * float(sizes(state.params, tokens[:, : time + 1]))

    other = tokens.copy()
    other[:, 10:] += 1
    assert loss_until(other, 9) == loss_until(tokens, 9)
    assert loss_until(other, 12) != loss_until(tokens, 12)


def test_sizes_are_those_of_the_models_they_are_named_after():
    config = train.Config(
        architecture="gpt2", depth=12, width=768, heads=12, seq_len=1024, vocab=50257
    )
    assert count(config) == 124_439_808  # GPT-2's
    config = dataclasses.replace(config, depth=48, width=1600, heads=25)
    assert count(config) == 1_557_611_200  # GPT-2 XL's
    config = train.Config(
        architecture="llama", depth=22, width=2048, heads=16, seq_len=64, vocab=32000
    )
    # Embedding and head; four matrices of attention, three of the MLP, two norms; one.
    hidden = 5472  # 8 / 3 of the width, in whole groups
    layer = 4 * 2048**2 + 3 * 2048 * hidden + 2 * 2048
    assert count(config) == 2 * 32000 * 2048 + 22 * layer + 2048


def test_the_planner_has_the_params_of_gpt2():
    config = decoders.DecoderConfig("gpt2", 3, width=64, heads=2, seq_len=16, vocab=128)
    weights = jax.eval_shape(
        functools.partial(decoders.init, config), jax.random.key(0)
    )
    sizes = {"n_layer": 3, "n_embd": 64, "n_positions": 16, "vocab_size": 128}
    planned = plan.from_config({"model_type": "gpt2", **sizes}).params
    assert jax.tree.map(jnp.shape, weights) == jax.tree.map(jnp.shape, planned)


def test_layer_norm_is_that_of_flax():
    keys = jax.random.split(jax.random.key(0), 4)
    x, scale, bias, seen = (3 + 2 * jax.random.normal(key, (8, 64)) for key in keys)
    params = {"params": {"scale": scale[0], "bias": bias[0]}}

    def of(norm):
        y, pull = jax.vjp(norm.apply, params, x)
        return y, pull(seen)

    ours, flax = of(decoders.LayerNorm(jnp.float32)), of(nn.LayerNorm(epsilon=1e-5))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(flax), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def count(config) -> int:
    """The params of a model, from its shapes."""
    init, _ = train.model(config)
    weights = jax.eval_shape(init, jax.random.key(0))
    return sum(p.size for p in jax.tree.leaves(weights))


@pytest.mark.full
def test_a_released_run_holds_no_gradients_and_resumes(config, tmp_path):
    changes = dict(architecture="llama", release=True, steps=4, warmup=1, save_every=2)
    config = decoder_config(config, **changes, eval_every=4)
    whole = train.train(config, TEXTS)
    assert whole.summary["bytes"]["gradients"] == 0
    assert whole.summary["gradient_norm"] is None
    out = str(tmp_path)
    train.train(dataclasses.replace(config, out=out, stop_at=2), TEXTS)
    resumed = train.train(dataclasses.replace(config, out=out, resume=True), TEXTS)
    assert resumed.history == whole.history
    for a, b in zip(
        jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_a_model_cannot_do_is_said(config, tmp_path):
    with pytest.raises(ValueError, match="'gpt' has fused attention"):
        dataclasses.replace(config, release=True)
    with pytest.raises(ValueError, match="vocab is 100"):
        dataclasses.replace(config, vocab=100)
    missing = dataclasses.replace(config, text="kernel", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make kernel-docs"):
        train.train(missing)


@pytest.mark.full
def test_kernel_docs_are_read_by_folders(tmp_path):
    folder = tmp_path / "kernel-docs"
    for name in ("mm/a.rst", "mm/b.txt.gz", "mm/c.svg", "translations/d.rst", "e.rst"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = name.encode() * 3000
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    expected = b"mm/a.rst" * 3000 + b"\n" + b"mm/b.txt.gz" * 3000
    assert data.kernel_docs(tmp_path) == {"mm": expected}


# --- interruption

DIES = """
import json, os, signal, sys
from examples.lm import train
config = train.Config(**json.loads(sys.argv[1]))
texts = {name: text.encode() for name, text in json.loads(sys.argv[2]).items()}
left = 20
def hook(event, args):
    global left
    if left and event.startswith(("open", "os.")):
        left -= f"checkpoints/{config.steps}" in str(args)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
train.train(config, texts)
"""


def killed_in_its_last_save(config: train.Config) -> None:
    """Trains in a process that dies while it writes the last checkpoint."""
    variables = {
        "PYTHONPATH": str(pathlib.Path(optax_flash.__file__).parents[1]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            DIES,
            json.dumps(dataclasses.asdict(config)),
            json.dumps({name: text.decode() for name, text in TEXTS.items()}),
        ],
        env=os.environ | variables,
    )
    assert done.returncode == -signal.SIGKILL


def saved(config: train.Config):
    """The newest train state in the run's folder."""
    state = train.init_state(config)
    return RunFolder(config.out, state, resume=True).restore(state)


@pytest.mark.full
def test_killed_and_resumed_run_is_the_uninterrupted_run(config, tmp_path):
    config = dataclasses.replace(config, steps=6, warmup=2, eval_every=2, save_every=3)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    expected, history, _ = train.train(whole, TEXTS)

    killed = dataclasses.replace(config, out=str(tmp_path / "killed"))
    killed_in_its_last_save(killed)
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {"3", "6.orbax-checkpoint-tmp"}
    train.train(dataclasses.replace(killed, resume=True), TEXTS)

    state = saved(killed)
    assert int(state.step) == 6
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    for leaf, other in leaves:
        assert leaf.dtype == other.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()
    metrics = (tmp_path / "killed" / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in metrics.splitlines()] == history


@pytest.mark.full
def test_rows_after_the_newest_checkpoint_are_logged_once(config, tmp_path):
    state = train.init_state(config)
    folder = RunFolder(tmp_path, state)
    folder.log([{"step": 1, "loss": 3.0}])
    folder.save(1, state)
    folder.log([{"step": 2, "loss": 2.0}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # and in the middle of the next the process dies
    resumed = RunFolder(tmp_path, state, resume=True)
    assert resumed.restore_log() == [{"step": 1, "loss": 3.0}]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.full
def test_checkpoint_of_other_codecs_is_refused(config, tmp_path):
    config = dataclasses.replace(config, steps=2, warmup=0, stop_at=1)
    config = dataclasses.replace(config, out=str(tmp_path))
    train.train(config, TEXTS)
    config = dataclasses.replace(config, stop_at=None, resume=True)
    for other in (dict(optimizer="adamw"), dict(master_bits=32)):
        with pytest.raises(ValueError, match="checkpoint stores 'block_0"):
            train.train(dataclasses.replace(config, **other), TEXTS)

    # The hard case: codes of the same shapes and dtypes, with another meaning.
    config = dataclasses.replace(config, optimizer="adamw8(codecs='flashoptim')")
    with pytest.raises(ValueError, match="Companded8.*FlashOptim8"):
        train.train(config, TEXTS)


@pytest.mark.full
def test_folder_of_an_earlier_run_is_not_overwritten(config, tmp_path):
    state = train.init_state(config)
    RunFolder(tmp_path, state).save(1, state)
    with pytest.raises(FileExistsError, match="--resume"):
        RunFolder(tmp_path, state)
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume"):
        RunFolder(tmp_path / "other", state, resume=True)


# --- command line and demo


def command_line(line: str) -> train.Config:
    return parse(train.Config, None, line.split())


@pytest.mark.full
def test_command_line():
    assert command_line("") == train.Config()
    parsed = command_line("--master-bits none --learning-rate 1e-4 --steps 70")
    assert parsed == train.Config(master_bits=None, learning_rate=1e-4, steps=70)
    assert command_line("--out runs --resume").resume
    for wrong in ("--resume", "--master-bits 16", "--optimizer adamw9"):
        with pytest.raises(SystemExit):
            command_line(wrong)


@pytest.mark.full
def test_demo_compares_two_runs(config, tmp_path):
    config = dataclasses.replace(config, steps=4, warmup=1, eval_every=2)
    runs = demo.compare(config, TEXTS)
    stock, ours = (
        {part: size / run["parameters"] for part, size in run["bytes"].items()}
        for run in runs.values()
    )
    assert stock == pytest.approx(
        {"weights": 4, "residual": 0, "optimizer state": 8, "gradients": 4}, abs=0.01
    )
    assert ours == pytest.approx(
        {"weights": 2, "residual": 1, "optimizer state": 2.125, "gradients": 2}, abs=0.1
    )
    first, second = (run["val_loss"] for run in runs.values())
    assert second == pytest.approx(first, abs=0.02)

    demo.plot(runs, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=120)
    with console.capture() as capture:
        console.print(demo.table(runs))
    assert "total, bytes per parameter" in capture.get()


@pytest.mark.full
def test_gpu_train_compares_equal_steps(config, tmp_path, monkeypatch, capsys):
    """Here on a CPU, in this process, and with few steps."""
    ran = []

    def in_this_process(line):
        assert line[1:3] == ["-m", "examples.lm.train"]
        this = parse(train.Config, None, line[3:])
        ran.append((this.optimizer, this.param_dtype, this.steps))
        train.train(this, TEXTS)
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(gpu_train.subprocess, "run", in_this_process)
    monkeypatch.setattr(gpu_train, "TRIAL", 3)
    file = tmp_path / "config.toml"
    sizes = 'depth = 1\nwidth = 64\nheads = 2\nseq_len = 16\narchitecture = "gpt2"\n'
    file.write_text(sizes + f'report_every = 0\ndata_dir = "{config.data_dir}"\n')
    out = tmp_path / "out"
    line = ["--minutes", "1e-6", "--config", str(file), "--out", str(out)]
    gpu_train.main(line)
    both = [("adamw", "float32", 3), ("adamw8", "bfloat16", 3)]
    assert ran == both + both
    printed = capsys.readouterr().out
    assert "tokens per second" in printed and "3 steps" in printed
    runs = json.loads((out / "gpu_train.json").read_text())
    assert [run["steps"] for run in runs.values()] == [3, 3]
    gpu_train.main(line)  # finds what is there
    assert ran == both + both
