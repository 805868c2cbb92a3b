"""Which implementation runs a program."""

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
        from optax_flash.fusion import mosaic

        return mosaic.reason(program)
    if implementation == "pallas":
        from optax_flash.fusion import pallas

        return pallas.reason(program)
    if implementation == "triton":
        from optax_flash.fusion import triton

        return triton.reason(program)
    return None


def choose(
    program: Program, implementation: str | None, platform: str
) -> tuple[str, str]:
    """The implementation that runs a program on a platform, and why."""
    if implementation is not None:
        return implementation, "asked for"
    if platform not in ("cuda", "tpu"):
        return "xla", f"there are no kernels for {platform}"
    reason = misfit(program, "pallas", platform)
    if reason:
        return "xla", reason
    if platform == "cuda" and program.size < SMALL:
        return "pallas", f"elementwise; {TOGETHER} small leaves share a kernel"
    return "pallas", "elementwise"
