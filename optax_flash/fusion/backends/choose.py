"""Which implementation runs a program."""

import importlib.util

from optax_flash.fusion.backends import gpu as gpus
from optax_flash.fusion.program import Program

IMPLEMENTATIONS = ("xla", "pallas", "triton", "interpret")
"""``"interpret"`` runs the Pallas kernel in Python, on any platform: for tests."""

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""As compilers know them. JAX calls GPUs of both makers ``"gpu"``."""

SMALL = 2**16
"""Leaves with fewer elements are not worth a launch of their own, and share one."""

TOGETHER = 16
"""How many of them share one."""


DTYPES = frozenset(
    "float32 bfloat16 float16 int32 uint32 int16 uint16 int8 uint8".split()
)
"""Of the arrays that kernels read."""


def misfit(program: Program, implementation: str, platform: str = "cuda") -> str | None:
    """Why a program cannot run in a kernel for a platform; None if it can."""
    if implementation == "xla":
        return None
    if program.size >= 2**31:
        return "it has 2**31 elements or more, and kernels count in 32 bits"
    if program.size == 0:
        return "it is empty"
    if not program.shape:
        return "it is a single number"
    if program.lanes & (program.lanes - 1):
        return f"groups of {program.lanes} are no power of two"
    for role, x in zip(program.inputs, program.jaxpr.invars, strict=True):
        if role.kind != "scalar" and x.aval.dtype.name not in DTYPES:
            return f"an operand is {x.aval.dtype}"
    # Backends import compilers, for which nobody else should wait.
    if implementation == "pallas" and platform == "tpu":
        from optax_flash.fusion.backends import mosaic_tpu

        return mosaic_tpu.reason(program)
    if implementation == "pallas":
        if absent := _pallas_is_absent():
            return absent
        from optax_flash.fusion.backends import pallas_triton

        return pallas_triton.reason(program)
    if implementation == "triton":
        from optax_flash.fusion.backends import jax_triton

        if absent := jax_triton.absent():
            return f"{absent}; the extra optax_flash[cuda13] brings what it needs"
        return jax_triton.reason(program)
    return None


def _pallas_is_absent() -> str | None:
    """Why Pallas cannot be lowered through Triton: JAX will drop that."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "this release of JAX does not lower Pallas through Triton"
    return None


def unfit_gpu(implementation: str, gpu: gpus.Gpu | None) -> str | None:
    """Why kernels of one kind cannot be compiled for a GPU; None if they can."""
    if implementation == "pallas" and gpu is None:
        from optax_flash.fusion.backends import pallas_triton

        if not pallas_triton.needs_gpu():
            return None
    return gpus.misfit(gpu)


def choose(
    program: Program,
    implementation: str | None,
    platform: str,
    gpu: gpus.Gpu | None = gpus.PRESUMED,
) -> tuple[str, str]:
    """The implementation that runs a program on a platform, and why.

    Args:
      program: of a leaf.
      implementation: the one asked for; None for the best that fits.
      platform: as compilers know it.
      gpu: what CUDA kernels are compiled for; None where that is not known.
    """
    if implementation is not None:
        return implementation, "asked for"
    if platform == "tpu":
        reason = misfit(program, "pallas", platform)
        return ("xla", reason) if reason else ("pallas", "elementwise")
    if platform != "cuda":
        return "xla", f"there are no kernels for {platform}"
    from optax_flash.fusion.backends import jax_triton

    absent = jax_triton.absent()
    name = "pallas" if absent else "triton"
    reason = misfit(program, name) or unfit_gpu(name, gpu)
    because = [reason or "elementwise"]
    if not reason and program.size < SMALL:
        because.append(f"{TOGETHER} small leaves share a kernel")
    if absent:
        because.append(absent)
    return "xla" if reason else name, "; ".join(because)
