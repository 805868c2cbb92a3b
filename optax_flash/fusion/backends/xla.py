"""Programs on shards in plain JAX: what XLA runs where a leaf comes in slices.

A shard is one tile, and its operands are laid out as kernels see them, so that random
bits are those of the place in the whole leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_flash.fusion.backends.base import Target
from optax_flash.fusion.ops import Tile
from optax_flash.fusion.program import Program, Role, evaluate
from optax_flash.fusion.tiles import Layout, Shard, from_tile, to_tile


def absent() -> None:
    """XLA is always there."""


def unsupported(program: Program, target: Target | None) -> None:
    """It runs every program."""
    del program, target


def run(shards: list[Shard], target: Target) -> list[list[jax.Array]]:
    """The results of programs, each on a shard of its leaf."""
    del target
    return [_run(shard) for shard in shards]


def _run(shard: Shard) -> list[jax.Array]:
    program, shape = shard.program, shard.shape
    lanes = program.lanes if program.lanes > 1 else max(shape[-1], 1)
    layout = Layout(shape, lanes)
    index = layout.global_index(shard.origin, 0, layout.units)
    mask = layout.elements(0, layout.units).mask
    operands = [
        to_tile(layout, role, x)
        for role, x in zip(program.inputs, shard.operands, strict=True)
    ]
    tile = Tile((layout.units, lanes), index, mask)
    results = evaluate(program.jaxpr, tile, operands)
    return [
        _from_tile(tile, role, x, like)
        for role, x, like in zip(
            program.outputs, results, shard.result_shapes(), strict=True
        )
    ]


def _from_tile(tile: Tile, role: Role, x: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    if not role.codec:
        x = jnp.broadcast_to(x, tile.shape).astype(like.dtype)
    return from_tile(role, x, like.shape)
