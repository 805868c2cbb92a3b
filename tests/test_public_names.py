"""What people import stays importable, and is documented."""

import importlib
import pathlib
import re

import pytest

import optax_flash

API = pathlib.Path(__file__).parents[1] / "docs" / "api"

# Of the first development version: names come, none goes.
NAMES = """
Affine4 Affine8 Checkpoints Codec Companded4 Companded8 CompressState ExactResidual
Explanation FinishedParam FlashOptim8 FlashOptimResidual LowRankAdamState
MasterWeightsState MemoryReport NumericsReport ScaleByLoraPreMuonState
ScaleByLoraPreState TameState adam4 adam8 adamw4 adamw8 cast_params changed_params
check_format compress differentiable explain from_optax_state get_codec lion4 lion8
load_safetensors lora_pre_adamw lora_pre_muon lowrank_adamw master_params
master_weights memory_report numerics_report save_safetensors scale_by_adam8
scale_by_lion8 scale_by_lora_pre scale_by_lora_pre_muon scale_by_lowrank_adam
set_master_params sgd4 sgd8 state_format state_sharding tame tamed_adamw8
to_optax_state trace8
flax.Optimizer flax.TrainState flax.is_norm flax.norm_paths
plan.Convolutions plan.DEVICES plan.Device plan.Model plan.PRESETS plan.Plan
plan.Transformer plan.from_config plan.plan plan.preset
release.Sequence release.layer release.scan release.sequence release.train_step
""".split()


def found(name):
    module, _, attribute = f"optax_flash.{name}".rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_imports(name):
    thing = found(name)
    assert callable(thing) or thing


def test_every_name_has_its_place_in_the_api():
    pages = "".join(path.read_text() for path in API.glob("*.md"))
    missing = [name for name in NAMES if not re.search(rf"\b{name}\b", pages)]
    assert not missing


def test_the_api_shows_what_can_be_imported():
    pages = "".join(path.read_text() for path in API.glob("*.md"))
    shown = re.findall(r"^::: optax_flash\.(\S+)$", pages, re.MULTILINE)
    assert {*shown} >= {x for x in vars(optax_flash) if x.startswith("scale_by_")}
    for name in shown:
        found(name)
