"""What runs a program: one file a backend, and one table of them.

To add a backend, write a file that defines the three functions of
:class:`base.Functions`, and give it a row in :data:`TABLE`. The files that are no
backends help those that are: ``gpu`` tells which GPU to compile for, ``int32`` computes
where vectors hold 32 bits, ``triton_source`` writes Triton.
"""

from optax_flash.fusion.backends.base import Backend, Target
from optax_flash.fusion.program import Program

_HERE = "optax_flash.fusion.backends"

XLA = Backend("xla", f"{_HERE}.xla", None)
"""The reference, which everything falls back on."""

TABLE = (
    Backend("triton", f"{_HERE}.jax_triton", ("cuda",)),
    Backend("pallas", f"{_HERE}.pallas_triton", ("cuda",)),
    Backend("pallas", f"{_HERE}.mosaic_tpu", ("tpu",)),
    Backend("interpret", f"{_HERE}.pallas_interpreted", None, by_name_only=True),
    Backend("xla", f"{_HERE}.cpu", ("cpu",)),
    XLA,
)
"""Of two for one platform the first comes first, where its packages are installed."""

PLATFORMS = {
    "cpu": "a CPU",
    "cuda": "an NVIDIA GPU",
    "rocm": "an AMD GPU",
    "tpu": "a TPU",
}
"""As compilers know them, and what they are."""

SMALL = 2**16
"""Leaves with fewer elements are not worth a launch of their own, and share one."""

TOGETHER = 16
"""How many of them share one."""


def names() -> tuple[str, ...]:
    """What ``implementation=`` may be."""
    return tuple(dict.fromkeys(backend.name for backend in TABLE))


def unsupported(program: Program, implementation: str) -> str | None:
    """Why the first backend of a name cannot run a program, wherever it runs."""
    backend = next(x for x in TABLE if x.name == implementation)
    return backend.functions.unsupported(program, None)


def choose(
    program: Program, implementation: str | None, target: Target
) -> tuple[Backend, str]:
    """The backend that runs a program, and why.

    Args:
      program: of a leaf.
      implementation: the one asked for; None for the best that fits.
      target: what to compile for.

    Raises:
      ValueError: no backend of the name asked for can run it there.
    """
    if implementation is not None:
        return _named(program, implementation, target), "asked for"
    absences: list[str] = []
    for backend in TABLE:
        if backend.by_name_only or backend.name == "xla":
            continue
        if not backend.runs_on(target.platform):
            continue
        if absent := backend.functions.absent():
            absences.insert(0, absent)
            continue
        reason = backend.functions.unsupported(program, target)
        if reason:
            return _named(program, "xla", target), "; ".join([reason, *absences])
        because = ["elementwise"]
        if program.size < SMALL and target.platform == "cuda":
            because.append(f"{TOGETHER} small leaves share a kernel")
        return backend, "; ".join([*because, *absences])
    because = "; ".join(absences) or f"there are no kernels for {target.platform}"
    return _named(program, "xla", target), because


def _named(program: Program, implementation: str, target: Target) -> Backend:
    """The backend of a name for a target."""
    found = [x for x in TABLE if x.name == implementation]
    for_platform = [x for x in found if x.runs_on(target.platform)]
    if not for_platform:
        platforms = [
            PLATFORMS.get(name, name) for x in found for name in x.platforms or ()
        ]
        raise ValueError(
            f"implementation={implementation!r} needs {' or '.join(platforms)}, but "
            f"this is compiled for {target.platform}. implementation=None takes what "
            "there is; 'interpret' runs the Pallas kernel anywhere, slowly, for tests."
        )
    reasons = []
    for backend in for_platform:
        reason = backend.functions.unsupported(program, target)
        if reason is None:
            return backend
        reasons.append(reason)
    raise ValueError(
        f"implementation={implementation!r} cannot be compiled for a leaf of shape "
        f"{list(program.shape)}: {reasons[0]}. implementation=None runs it in XLA."
    )
