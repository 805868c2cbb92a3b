"""For which NVIDIA GPU a kernel is compiled, which need not be at hand.

Triton compiles for one compute capability, and so does Pallas through Triton. A
lowering knows its devices, but a kernel inside of it may be compiled later, in a
callback of the partitioner of XLA. So a kernel is an equation of its own, which carries
along what compiling it needs.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core

from optax_flash.fusion.jaxprs import Primitive
from optax_flash.fusion.unstable import mlir


class Gpu(NamedTuple):
    """A kind of GPU.

    Attributes:
      kind: as ``jax.Device.device_kind`` has it.
      capability: ten times the major number of its compute capability, and the minor.
    """

    kind: str
    capability: int


PRESUMED = Gpu("NVIDIA H100", 90)
"""The one that :func:`explain` speaks of where no other is at hand."""

OLDEST = 80
"""The least capability that Triton compiles for."""

CAPABILITIES = {
    "T4": 75,
    "A10": 86,
    "A10G": 86,
    "A30": 80,
    "A40": 86,
    "A100": 80,
    "L4": 89,
    "L40": 89,
    "L40S": 89,
    "V100": 70,
    "H100": 90,
    "H200": 90,
    "GH200": 90,
    "B200": 100,
    "GB200": 100,
    "B300": 103,
    "GB300": 103,
}
"""By a word of the kind: an abstract device has a name and no capability."""

NEEDED = (
    "kernels are compiled for one kind of GPU, and which is not known here: none is at "
    "hand, and jax.sharding.use_abstract_mesh names none "
    "(jax.sharding.AbstractDevice('NVIDIA H100', None, 'gpu'))"
)


def at_hand() -> Gpu | None:
    """The GPU of the default backend."""
    return _of_devices(jax.local_devices())


def of_lowering(context: Any) -> Gpu | None:
    """The GPU that a lowering is for, by its ``module_context.axis_context``.

    Its devices come first, then the abstract device of the mesh in use, then the GPU at
    hand.
    """
    if isinstance(context, mlir.ShardingContext):
        found = _of_devices(context.device_assignment or ())
    elif isinstance(context, mlir.SPMDAxisContext):
        found = _of_mesh(context.mesh)
    else:
        found = None
    return found or _of_mesh(jax.sharding.get_abstract_mesh()) or at_hand()


def unsupported(gpu: Gpu | None) -> str | None:
    """Why no kernel is compiled for a GPU; None if one is."""
    if gpu is None:
        return NEEDED
    if gpu.capability < OLDEST:
        have, need = (f"{n // 10}.{n % 10}" for n in (gpu.capability, OLDEST))
        return f"the GPU has compute capability {have}, and Triton needs {need}"
    return None


def call(
    kernel: Callable[..., Sequence[jax.Array]],
    operands: Sequence[jax.Array],
    results: Sequence[jax.core.ShapedArray],
    around: Callable[[], contextlib.AbstractContextManager[None]],
) -> list[jax.Array]:
    """Calls a kernel, which is traced and compiled when the call is lowered.

    Args:
      kernel: a function of the operands; it has no effects but those on references of
        its own.
      operands: arrays.
      results: their types.
      around: makes the context to compile in.
    """
    return kernel_p.bind(
        *operands, kernel=kernel, results=tuple(results), around=around
    )


def _of_devices(devices: Iterable[Any]) -> Gpu | None:
    for device in devices:
        capability = getattr(device, "compute_capability", None)
        # AMD's have one, too: a name.
        if device.platform == "gpu" and re.fullmatch(r"\d+\.\d", str(capability)):
            return Gpu(device.device_kind, int(str(capability).replace(".", "")))
    return None


def _of_mesh(mesh: Any) -> Gpu | None:
    if isinstance(mesh, jax.sharding.Mesh):
        return _of_devices(mesh.devices.flat)
    device = mesh.abstract_device
    if device is None or device.platform not in ("gpu", "cuda"):
        return None
    for word in device.device_kind.split():
        if word in CAPABILITIES:
            return Gpu(device.device_kind, CAPABILITIES[word])
    return None


kernel_p = Primitive("optax_flash_kernel")
kernel_p.multiple_results = True


@kernel_p.def_abstract_eval
def _types(*avals: Any, kernel: Any, results: Any, around: Any) -> list[Any]:
    del avals, kernel, around
    return list(results)


def _lower(
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    kernel: Callable[..., Any],
    results: Any,
    around: Callable[[], contextlib.AbstractContextManager[None]],
) -> Any:
    del results
    with around():
        return mlir.lower_fun(kernel, multiple_results=True)(ctx, *operands)


mlir.register_lowering(kernel_p, _lower, platform="cuda")
