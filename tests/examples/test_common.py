"""What the trainers share: options, optimizers by name, the loop."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_flash
from examples.common import optimizers
from examples.common.config import Config, from_mapping, parse
from examples.common.loop import fit, outcome
from examples.common.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("quick_compile")


# --- options


def test_a_file_gives_defaults_and_the_command_line_goes_first(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('steps = 70\nlearning_rate = 1\nmaster_bits = "none"\nout = "a"\n')
    expected = Config(steps=70, learning_rate=1, master_bits=None, out="a")
    assert parse(Config, None, ["--config", str(file)]) == expected
    line = ["--config", str(file), "--steps", "80", "--master-bits", "32", "--resume"]
    expected = Config(steps=80, learning_rate=1, master_bits=32, out="a", resume=True)
    assert parse(Config, None, line) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps =\nwarmup = 1", "is not TOML.*line 1"),
        ("stebs = 3", "'stebs' is no option; did you mean 'steps'"),
        ("steps = 2.5", "steps is 2.5, a float"),
        ("steps = true", "steps is True, a bool"),
        ('learning_rate = "fast"', "learning_rate is 'fast'"),
        ("master_bits = 16", "master_bits is 16; it can be 24, 32, None"),
        ("steps = 0", "steps is 0; give 1 or more"),
        ("steps = 50", "warmup is 50 of 50 steps"),
        ("resume = true", "resume needs the out folder"),
        ('optimizer = "adamw9"', "no optimizer 'adamw9'; did you mean adamw"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, capsys, text, message):
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse(Config, None, ["--config", str(file)])
    error = capsys.readouterr().err
    assert re.search(message, error) and "config.toml" in error


def test_options_of_a_mapping_are_those_of_the_command_line():
    assert from_mapping(Config, {"param_dtype": "float32"}, "here").steps == 500
    with pytest.raises(ValueError, match="here: param_dtype is 'float8'"):
        from_mapping(Config, {"param_dtype": "float8"}, "here")


# --- optimizers


@pytest.mark.parametrize(
    "name, message",
    [
        ("adamw(", "not of the form"),
        ("adamw(3)", "are no options"),
        ("adamw(b3=0.9)", "no option 'b3'"),
        ("adamw@int8", "Unknown codec 'int8'"),
        ("momo", "needs more than gradients"),
    ],
)
def test_a_wrong_optimizer_is_explained(name, message):
    with pytest.raises(ValueError, match=message):
        optimizers.check_name(name)


def test_an_optimizer_is_that_of_its_name():
    params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones((2, 128))}
    make = {"steps": 10, "warmup": 0, "learning_rate": 0.1, "weight_decay": 0.5}
    options = {"b1": 0.8, "b2": 0.95, "weight_decay": 0.5}
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 0, 10, 0.01)
    mask = {"kernel": True, "bias": False}
    stock = optax.adamw(schedule, **options, mask=mask)
    expected = optax.chain(
        optax.clip_by_global_norm(1.0), optax_flash.compress(stock, "flashoptim")
    )
    found = optimizers.make_optimizer("adamw(b1=0.8)@flashoptim", **make)
    grads = jax.tree.map(lambda p: 3 * p, params)
    for tx in (found, expected):
        state = tx.init(params)
        updates, _ = tx.update(grads, state, params)
        if tx is found:
            first = updates
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(updates), strict=True):
        np.testing.assert_array_equal(a, b)


def test_all_kinds_of_adamw_have_one_b2():
    params = {"kernel": jnp.ones((64, 128))}
    grads = {"kernel": jnp.full((64, 128), 2.0)}
    for name in ("adamw", "tamed_adamw8(threshold=9.0, codecs={'*': None})"):
        tx = optimizers.make_optimizer(name, steps=10, warmup=0, clip=0)
        _, state = tx.update(grads, tx.init(params), params)
        nu = optax.tree.get(state, "nu")["kernel"]
        np.testing.assert_allclose(nu, 0.05 * 4.0, rtol=1e-6)
    # What is asked for by name goes first.
    tx = optimizers.make_optimizer("adamw(b2=0.9)", steps=10, warmup=0, clip=0)
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "nu")["kernel"], 0.4, rtol=1e-6)


def test_matrices_decay_and_stacks_of_biases_and_gains_do_not():
    """Whatever a norm is called; of an nnx model, params lie in Variables."""
    stack = {
        "n1": {"scale": jnp.ones((3, 8)), "bias": jnp.ones((3, 8))},
        "rms_norm": {"weight": jnp.ones((3, 8))},
        "up": {"kernel": jnp.ones((3, 8, 8)), "bias": jnp.ones((3, 8))},
        "gate": {"scale": jnp.ones((3, 8, 8))},
    }
    expected = {
        "n1": {"scale": False, "bias": False},
        "rms_norm": {"weight": False},
        "up": {"kernel": True, "bias": False},
        "gate": {"scale": True},
    }
    assert optimizers.matrices({"blocks": stack}) == {"blocks": expected}
    variables = nnx.State({"blocks": jax.tree.map(nnx.Param, stack)})
    assert nnx.to_pure_dict(optimizers.matrices(variables)) == {"blocks": expected}


# --- the loop


class Numbers:
    """Batch k is the number k."""

    def __getitem__(self, index):
        return np.float32(index)


@jax.jit
def step(state, batch):
    """From batch 30 on, losses are not finite."""
    loss = jnp.where(batch < 30, 100 - batch, jnp.nan)
    grads = jax.tree.map(jnp.ones_like, state.params)
    return state.apply_gradients(grads=grads), {"loss": loss, "grad_norm": batch}


def run(config, **options):
    params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    tx = optimizers.make_optimizer(config.optimizer, steps=config.steps, warmup=1)
    state = TrainState.create(apply_fn=step, params=params, tx=tx)
    settings = dict(evaluate=lambda state: {"val_loss": 2.0, "val_hits": 0.5})
    settings |= dict(units="images", units_per_step=8)
    return fit(config, state, Numbers(), step=step, **settings, **options)


@pytest.fixture(name="config")
def config_fixture():
    return Config(
        optimizer="sgd", param_dtype="float32", steps=25, warmup=1, eval_every=10
    )


def test_summary_says_what_the_run_came_to(config, tmp_path):
    state, history, summary = run(dataclasses.replace(config, out=str(tmp_path)))
    assert [row["loss"] for row in history] == [100 - k for k in range(25)]
    assert [row["step"] for row in history if "val_loss" in row] == [10, 20, 25]
    assert summary["train_loss"] == np.mean([100 - k for k in range(5, 25)])
    assert (summary["val_loss"], summary["metrics"]) == (2.0, {"hits": 0.5})
    assert summary["gradient_norm"] == 12.0
    assert not summary["nonfinite"] and not summary["diverged"]
    weights = 4 * 64 * 64
    assert summary["bytes"]["weights"] == summary["bytes"]["gradients"] == weights
    assert summary["bytes"]["optimizer state"] == pytest.approx(weights, abs=16)
    assert summary["peak_bytes"]["live"] == sum(summary["bytes"].values())
    assert summary["peak_bytes"]["compiled"] >= weights
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # The momentum is one number again and again, and takes next to nothing.
    assert 0.8 * weights < summary["checkpoint_bytes"] < 2 * held
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_diverging_run_ends_and_says_so(config):
    _, history, summary = run(dataclasses.replace(config, steps=100))
    assert len(history) == 40  # the first ten steps without a finite loss
    assert summary["stopped"] == "the loss is not finite since step 31 or before"
    assert summary["diverged"] and summary["nonfinite"] == 10
    assert math.isnan(summary["train_loss"])


def test_a_loss_that_grows_is_a_divergence(config):
    _, _, summary = run(dataclasses.replace(config, steps=2))
    assert not summary["diverged"]
    losses = [{"loss": 1.0}, *[{"loss": 3.0}] * 20]
    assert outcome(losses)["diverged"]


def test_a_watch_ends_a_run(config):
    seen = []

    def watch(row):
        seen.append(row["step"])
        return "enough" if row["loss"] <= 90 else None

    _, history, summary = run(config, watch=watch)
    assert summary["stopped"] == "enough" and summary["steps"] == 20
    assert seen == list(range(1, 12))  # nothing after the row with the reason
    assert len(history) == 20


def test_tensorboard_gets_every_number(config, tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    config = dataclasses.replace(config, out=str(tmp_path), stop_at=10, save_every=5)
    _, history, _ = run(config)
    run(dataclasses.replace(config, stop_at=None, resume=True))
    found, starts = {}, []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            record = content[at + 12 : at + 12 + size]
            check = int.from_bytes(content[at + 12 + size : at + 16 + size], "little")
            assert check == masked_crc32c(record)
            event = Event.FromString(record)
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
            if event.HasField("session_log"):
                starts.append(event.step)
            at += 16 + size
    assert found["loss", 1] == 100 and found["loss", 25] == 76
    assert found["val_hits", 20] == 0.5 and found["grad_norm", 7] == 6
    assert starts == [11]  # where the resumed run drops what may have come before


def test_metrics_that_cannot_be_written_name_the_checkpoint(config, tmp_path):
    folder = run(dataclasses.replace(config, out=str(tmp_path))).state
    resumed = RunFolder(tmp_path, folder, resume=True)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match="(?s)step 26 .*checkpoint is of step 25.*resume"):
        resumed.log([{"step": 26, "loss": 1.0}])
    resumed.close({})
