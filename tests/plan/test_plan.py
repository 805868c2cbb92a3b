"""The planner: counts that are published, bytes that are counted elsewhere, and errors.

What XLA takes is in test_h100_plan.py.
"""

import json
import os
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import optax_flash
from optax_flash import plan
from optax_flash.plan import __main__ as command
from optax_flash.plan import activations, optimizers, planner, shards
from tests.tiers import quick

ROOT = pathlib.Path(__file__).parent.parent.parent

# Hugging Face's num_parameters() of the released GPT-2s and Llamas (tied weights once);
# torchvision's table of vit_b_16 and resnet50.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "vit-b16": 86_567_656,
    "resnet-50": 25_557_032,
}
CONFIGS = {
    "gpt2-xl": {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600},
    "llama-3.2-1b": {
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}


def test_presets_have_the_published_numbers_of_parameters():
    assert {name: plan.preset(name).size for name in plan.PRESETS} == PUBLISHED


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_gives_the_preset(name):
    model = plan.from_config(CONFIGS[name])
    assert model.size == PUBLISHED[name]
    assert model.architecture == plan.preset(name).architecture


def test_activations_of_a_resnet():
    # 11.1 million activations, the published count of what its convolutions make.
    sizes = plan.preset("resnet-50").architecture
    made = sizes.stem + sum(numbers for _, numbers in sizes.blocks)
    assert made == pytest.approx(11.1e6, rel=0.005)


@pytest.mark.parametrize("name", optimizers.OURS | optimizers.OPTAX)
def test_weights_and_state_are_those_of_the_memory_report(name):
    found = plan.plan("gpt2-124m", name)
    tx = optimizers.named(name)
    if name in optimizers.OURS:
        tx = optax_flash.master_weights(tx)
    dtype = jnp.bfloat16 if name in optimizers.OURS else jnp.float32
    params = jax.tree.map(
        lambda x: x.update(dtype=dtype), plan.preset("gpt2-124m").params
    )
    expected = optax_flash.memory_report(tx, params).component_bytes
    held = {k: v for k, v in found.component_bytes.items() if k in expected}
    for component in ("weights", "codes"):
        assert held[component] == expected[component]
    # What stands beside a leaf without codes is scales for one, other for the other.
    del expected["gradients"], held["gradients"]
    assert sum(held.values()) == sum(expected.values())
    state = jax.tree.leaves(jax.eval_shape(tx.init, params))
    counted = sum(x.size * x.dtype.itemsize for x in state)
    assert sum(held.values()) - held["weights"] == counted


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-3.1-8b", "vit-b16", "resnet-50"])
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    batch=st.integers(1, 1024),
    length=st.integers(1, 2**17),
    remat=st.booleans(),
    release=st.booleans(),
    loss_chunks=st.integers(1, 32),
    grads=st.lists(st.integers(0, 2**36), min_size=3, max_size=3),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_temporaries(name, batch, length, remat, release, loss_chunks, grads, flags):
    architecture = plan.preset(name).architecture
    blocks, embed, head = grads
    load = activations.Load(
        batch=batch,
        length=length,
        remat=remat,
        release=release,
        loss_chunks=loss_chunks,
        gradients=activations.Gradients(blocks, blocks // 8, embed, head),
        layer_weights=blocks // 8,
        head_weights=head,
        sharded=flags[0],
        cast=flags[1],
    )

    def peak(**changes):
        most = architecture.temporaries(load._replace(**changes))
        assert min(most) >= 0
        return sum(most)

    assert peak() <= peak(batch=batch + 1)
    assert peak() <= peak(length=length + 1)
    # Two pieces may take more than one: the head's gradient is then beside the logits.
    assert peak(loss_chunks=loss_chunks + 2) <= peak(loss_chunks=loss_chunks + 1)
    assert peak(remat=True) <= peak(remat=False)
    assert peak(release=True) <= peak(release=False)


@pytest.mark.parametrize(
    "name", quick(["gpt2-124m"], ["gpt2-124m", "vit-b16", "resnet-50"])
)
@pytest.mark.filterwarnings("ignore:state_sharding")
def test_devices_hold_everything_together(name):
    one, many = (
        plan.plan(name, "adamw4", mesh={"fsdp": n}, batch=2 * n) for n in (1, 8)
    )
    for component in ("weights", *shards.STATE):
        whole, part = one.component_bytes[component], many.component_bytes[component]
        assert whole / 8 <= part <= whole
    assert many.total < one.total
    assert one.saved[planner.FLOAT32] > 0
    assert one.gradients["released"] <= one.gradients["all at once"]


def test_the_largest_batch_fits_and_one_more_does_not():
    def of(batch):
        return plan.plan("gpt2-124m", "adamw8", mesh={"data": 2}, batch=batch)

    largest = of(2).largest_batch
    assert largest % 2 == 0 < largest
    assert of(largest).fits and not of(largest + 2).fits
    nothing = plan.plan("llama-3.1-70b", "adamw")
    assert nothing.largest_batch == 0 and not nothing.fits


def test_fsdp_divides_and_data_does_not():
    weights = {
        axis: plan.plan("llama-3.2-1b", mesh={axis: 8}, batch=8).component_bytes
        for axis in ("data", "fsdp")
    }
    # All but the norms.
    whole = weights["data"]["weights"]
    assert weights["fsdp"]["weights"] == pytest.approx(whole / 8, rel=1e-3)
    assert whole == 2 * PUBLISHED["llama-3.2-1b"]


def test_params_with_shardings_of_their_own():
    mesh = AbstractMesh((2, 4), ("fsdp", "tp"))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tp"))
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16, sharding=sharding)}
    found = plan.plan(params, optax_flash.adamw8(1e-3), bits=24, batch=8)
    numbers = 512 * 1024 // 8
    assert found.devices == 8
    assert found.component_bytes["weights"] == 2 * numbers
    assert found.component_bytes["residual"] == numbers
    assert found.component_bytes["codes"] == 2 * numbers
    assert found.component_bytes["scales"] == 2 * 2 * numbers // 32
    assert found.component_bytes["gradients"] == 2 * numbers
    assert found.largest_batch is None and "is unknown" in str(found)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "llama-9b"}, "Model 'llama-9b' is not known.*gpt2-124m, gpt2-355m"),
        ({"optimizer": "adamw6"}, "Optimizer 'adamw6' is not known.*adamw8, adamw4"),
        ({"device": "h900"}, "Device 'h900' is not known.*h100-80gb"),
        ({"mesh": {"tp": 2}}, "axis 'tp' is not known.*data, fsdp"),
        ({"mesh": {"fsdp": 0}}, "axis 'fsdp' has 0 devices"),
        ({"mesh": {"fsdp": 8}, "batch": 4}, "batch of 4 does not divide over 8"),
        ({"batch": 0}, "batch is 0"),
        ({"loss_chunks": 0}, "loss_chunks is 0"),
        ({"bits": 24, "param_dtype": jnp.float32}, "24 bits.*not in float32"),
        ({"bits": 7}, "7"),
        ({"memory_fraction": 2.0}, "memory_fraction is 2.0"),
        ({"model": {}}, "no params"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(**{"model": "gpt2-124m"} | arguments)


def test_errors_of_configs_and_models():
    with pytest.raises(ValueError, match="'bert' is not known; these are: llama, gpt2"):
        plan.from_config({"model_type": "bert"})
    with pytest.raises(ValueError, match="'gpt2' has no 'n_layer'"):
        plan.from_config({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="'blocks', 'embed', 'head'"):
        plan.Model("mine", {"w": 1}, plan.preset("gpt2-xl").architecture)


def test_the_command_line(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["gpt2-xl"]))
    chart = tmp_path / "chart.png"
    words = f"--model {config} --optimizer adamw8 --mesh data=8 --chart {chart}"
    done = subprocess.run(
        [sys.executable, "-m", "optax_flash.plan", *words.split()],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "adamw8, 24-bit weights, 8 x h100-80gb" in done.stdout
    assert "Saved against optax.adamw, float32" in done.stdout
    assert not done.stderr
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_errors_of_the_command_line(capsys):
    with pytest.raises(SystemExit, match="error: Model 'gpt3' is not known"):
        command.main(["--model", "gpt3"])
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", "gpt2-xl", "--mesh", "fsdp:8"])
    assert "'fsdp:8' is not like fsdp=8" in capsys.readouterr().err
