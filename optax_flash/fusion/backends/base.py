"""What a backend is, and what no kernel takes."""

import dataclasses
import importlib
from types import ModuleType
from typing import NamedTuple, Protocol, cast

import jax

from optax_flash.fusion.backends import gpu as gpus
from optax_flash.fusion.program import Program
from optax_flash.fusion.tiles import Shard


class Target(NamedTuple):
    """What programs are compiled for.

    Attributes:
      platform: as compilers know it; JAX calls GPUs of both makers ``"gpu"``.
      gpu: on CUDA, the kind; None where it is not known.
    """

    platform: str
    gpu: gpus.Gpu | None = None


class Functions(Protocol):
    """What the file of a backend defines."""

    def absent(self) -> str | None:
        """Why it cannot be used with the packages here; None if it can."""
        ...

    def unsupported(self, program: Program, target: Target | None) -> str | None:
        """Why it cannot run a program; None if it can.

        Args:
          program: of a leaf.
          target: None while an update is traced, before it is known.
        """
        ...

    def run(self, shards: list[Shard], target: Target) -> list[list[jax.Array]]:
        """The results of programs of one family, each on a shard of its leaf.

        Leaves under ``backends.SMALL`` elements come together, others alone.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Backend:
    """A row of the table.

    Attributes:
      name: what ``implementation=`` calls it. Backends for different platforms may
        share a name.
      module: the file; see :class:`Functions`. It is imported when it is needed, since
        it may import a compiler.
      platforms: those that it runs on; None for all.
      by_name_only: it never runs unless it is asked for.
    """

    name: str
    module: str
    platforms: tuple[str, ...] | None
    by_name_only: bool = False

    def runs_on(self, platform: str) -> bool:
        """Whether it is for a platform."""
        return self.platforms is None or platform in self.platforms

    @property
    def functions(self) -> Functions:
        """What its file defines."""
        return cast(Functions, _imported(self.module))


def _imported(module: str) -> ModuleType:
    return importlib.import_module(module)


DTYPES = frozenset(
    "float32 bfloat16 float16 int32 uint32 int16 uint16 int8 uint8".split()
)
"""Of the arrays that kernels read."""


def unsupported_by_kernels(program: Program) -> str | None:
    """Why no kernel can run a program, whichever language it is written in."""
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
    return None
