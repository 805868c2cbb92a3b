"""Loss against bytes, in small: its conditions, and its files."""

import json

import jax
import numpy as np
import optax
import pytest

from benchmarks import workloads
from benchmarks.budget.__main__ import main, write
from benchmarks.budget.conditions import LEARNING_RATES, conditions
from benchmarks.quality.results import Results
from benchmarks.quality.training import Trainer, study

pytestmark = pytest.mark.full


@pytest.fixture(scope="module", name="tiny")
def tiny_fixture():
    words = np.random.default_rng(0).choice(np.array([b"romeo ", b"art ", b"o "]), 300)
    return workloads.gpt(
        {"text": b"".join(words)},
        depth=1,
        width=128,
        heads=4,
        seq_len=16,
        batch_size=4,
        eval_windows=8,
    )


@pytest.fixture(scope="module", name="state_bytes")
def state_bytes_fixture(tiny):
    """Bytes of the state of each condition, for each parameter."""
    weights = jax.eval_shape(tiny.init, 0)
    count = sum(w.size for w in jax.tree.leaves(weights))

    def of(condition):
        dtype = condition.params
        params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), weights)
        tx = condition.transformation(optax.constant_schedule(1e-3))
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        return sum(x.size * x.dtype.itemsize for x in leaves) / count

    return {condition.name: of(condition) for condition in conditions()}


def test_every_condition_has_a_learning_rate():
    assert {condition.optimizer for condition in conditions()} == set(LEARNING_RATES)


def test_names_tell_the_order_of_the_bytes(state_bytes):
    ranks = [state_bytes[f"lora_pre, rank 1/{n}"] for n in (2, 4, 8, 16)]
    assert ranks == sorted(ranks, reverse=True)
    factors = [
        state_bytes[f"lora_pre, rank 1/4{bits}"]
        for bits in (", float32 factors", "", ", 4-bit factors")
    ]
    assert factors == sorted(factors, reverse=True)
    assert state_bytes["adafactor, 4-bit momentum"] < state_bytes["adamw, 4 bits"]
    assert state_bytes["tamed, threshold 1"] == pytest.approx(
        state_bytes["adamw, 8 bits"], abs=0.01
    )
    assert max(state_bytes, key=state_bytes.__getitem__) == "adamw, float32"


def test_writes_all_outputs(tiny, tmp_path):
    names = ["adamw, float32", "lora_pre, rank 1/16"]
    trainers = [
        Trainer(tiny, condition, LEARNING_RATES[condition.optimizer], steps=2)
        for condition in conditions()
        if condition.name in names
    ]
    results = Results(tmp_path / "runs.json")
    study(results, trainers, [0, 1])
    write(results, tmp_path, "python -m benchmarks.budget")
    content = json.loads((tmp_path / "budget.json").read_text())
    reference, ours = content["summary"]
    assert "loss_relative" not in reference
    expected = (ours["loss"] - reference["loss"]) / reference["loss"]
    assert ours["loss_relative"]["mean"] == pytest.approx(expected, rel=1e-3)
    page = (tmp_path / "budget.md").read_text()
    assert "| lora_pre | rank 1/16 |" in page
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


def test_a_name_that_fits_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--only", "adamax", "--out", str(tmp_path)])
    assert "adamw, float32" in capsys.readouterr().err
