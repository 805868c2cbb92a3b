"""What a training step will take on each device, before there is one.

``python -m optax_flash.plan --help``, or :func:`plan` as a function.
"""

from optax_flash.plan.activations import Convolutions as Convolutions
from optax_flash.plan.activations import Transformer as Transformer
from optax_flash.plan.configs import from_config as from_config
from optax_flash.plan.devices import DEVICES as DEVICES
from optax_flash.plan.devices import Device as Device
from optax_flash.plan.models import PRESETS as PRESETS
from optax_flash.plan.models import Model as Model
from optax_flash.plan.models import preset as preset
from optax_flash.plan.planner import plan as plan
from optax_flash.plan.result import Plan as Plan
