"""Pallas kernels for GPUs, run by XLA on any platform: for tests."""

import jax

from optax_flash.fusion.backends import pallas_triton
from optax_flash.fusion.backends.base import Target, unsupported_by_kernels
from optax_flash.fusion.program import Program
from optax_flash.fusion.tiles import Shard

absent = pallas_triton.absent


def unsupported(program: Program, target: Target | None) -> str | None:
    """Why it cannot run a program; None if it can."""
    del target
    return unsupported_by_kernels(program) or absent()


def run(shards: list[Shard], target: Target) -> list[list[jax.Array]]:
    """The results of programs of one family, each on a shard of its leaf."""
    del target
    return pallas_triton.launched(shards, None, interpret=True)
