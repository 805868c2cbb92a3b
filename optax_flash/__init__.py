"""optax_flash: the optimizer you already use, in less than half the memory."""

import importlib
import types

from optax_flash.aliases import adam4 as adam4
from optax_flash.aliases import adam8 as adam8
from optax_flash.aliases import adamw4 as adamw4
from optax_flash.aliases import adamw8 as adamw8
from optax_flash.aliases import lion4 as lion4
from optax_flash.aliases import lion8 as lion8
from optax_flash.aliases import lora_pre_adamw as lora_pre_adamw
from optax_flash.aliases import lora_pre_muon as lora_pre_muon
from optax_flash.aliases import lowrank_adamw as lowrank_adamw
from optax_flash.aliases import scale_by_adam8 as scale_by_adam8
from optax_flash.aliases import scale_by_lion8 as scale_by_lion8
from optax_flash.aliases import sgd4 as sgd4
from optax_flash.aliases import sgd8 as sgd8
from optax_flash.aliases import tamed_adamw8 as tamed_adamw8
from optax_flash.aliases import trace8 as trace8
from optax_flash.codecs.affine import Affine4 as Affine4
from optax_flash.codecs.affine import Affine8 as Affine8
from optax_flash.codecs.base import Codec as Codec
from optax_flash.codecs.companded import Companded4 as Companded4
from optax_flash.codecs.companded import Companded8 as Companded8
from optax_flash.codecs.flashoptim import FlashOptim8 as FlashOptim8
from optax_flash.codecs.registry import get_codec as get_codec
from optax_flash.codecs.residual import ExactResidual as ExactResidual
from optax_flash.codecs.residual import FlashOptimResidual as FlashOptimResidual
from optax_flash.io.checkpoint import Checkpoints as Checkpoints
from optax_flash.io.convert import from_optax_state as from_optax_state
from optax_flash.io.convert import to_optax_state as to_optax_state
from optax_flash.io.formats import check_format as check_format
from optax_flash.io.formats import state_format as state_format
from optax_flash.io.safetensors import load_safetensors as load_safetensors
from optax_flash.io.safetensors import save_safetensors as save_safetensors
from optax_flash.lowrank.adam import (
    ScaleByLowrankAdamState as ScaleByLowrankAdamState,
)
from optax_flash.lowrank.adam import scale_by_lowrank_adam as scale_by_lowrank_adam
from optax_flash.lowrank.lora_pre import ScaleByLoraPreState as ScaleByLoraPreState
from optax_flash.lowrank.lora_pre import scale_by_lora_pre as scale_by_lora_pre
from optax_flash.lowrank.lora_pre_muon import (
    ScaleByLoraPreMuonState as ScaleByLoraPreMuonState,
)
from optax_flash.lowrank.lora_pre_muon import (
    scale_by_lora_pre_muon as scale_by_lora_pre_muon,
)
from optax_flash.reports.explain import Explanation as Explanation
from optax_flash.reports.explain import explain as explain
from optax_flash.reports.memory import MemoryReport as MemoryReport
from optax_flash.reports.memory import memory_report as memory_report
from optax_flash.reports.numerics import NumericsReport as NumericsReport
from optax_flash.reports.numerics import numerics_report as numerics_report
from optax_flash.sharding import state_sharding as state_sharding
from optax_flash.transforms.compress import CompressState as CompressState
from optax_flash.transforms.compress import compress as compress
from optax_flash.transforms.derivatives import differentiable as differentiable
from optax_flash.transforms.finished import FinishedParam as FinishedParam
from optax_flash.transforms.master_weights import (
    MasterWeightsState as MasterWeightsState,
)
from optax_flash.transforms.master_weights import cast_params as cast_params
from optax_flash.transforms.master_weights import changed_params as changed_params
from optax_flash.transforms.master_weights import master_params as master_params
from optax_flash.transforms.master_weights import master_weights as master_weights
from optax_flash.transforms.master_weights import set_master_params as set_master_params
from optax_flash.transforms.tamed_adam import (
    ScaleByTamedAdamState as ScaleByTamedAdamState,
)
from optax_flash.transforms.tamed_adam import scale_by_tamed_adam as scale_by_tamed_adam

# Older names of the same.
tame = scale_by_tamed_adam
TameState = ScaleByTamedAdamState
LowRankAdamState = ScaleByLowrankAdamState

__version__ = "0.1.0"


def __getattr__(name: str) -> types.ModuleType:
    """Packages of their own, imported when they are first asked for: one needs flax."""
    if name in ("flax", "plan", "release"):
        return importlib.import_module(f"optax_flash.{name}")
    raise AttributeError(f"module 'optax_flash' has no attribute {name!r}")
