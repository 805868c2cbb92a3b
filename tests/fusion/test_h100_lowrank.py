"""What XLA makes of LoRA-Pre's update on H100s: temporaries, kernels, collectives.

Compiled, not run: needs ``jax[cuda13]`` but no GPU, see ``make test-cuda``.
"""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from benchmarks.h100 import inspect, mesh_of, sharded_like

pytestmark = pytest.mark.cuda

SIDE, RANK = 4096, 128
MEGABYTE = 2**20
DENSE = 4 * SIDE * SIDE
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def lower(tx, mesh, spec, dtype):
    """A jitted step for a leaf of this spec, and its arguments."""
    params = {"kernel": jax.ShapeDtypeStruct((SIDE, SIDE), dtype)}
    state = sharded_like(jax.eval_shape(tx.init, params), mesh)
    params = sharded_like(params, mesh, spec)
    sides = {"left": P(None, spec[0]), "right": P(None, spec[1])}

    def place(path, x):
        for side, of_side in sides.items():
            if f"_{side}" in jax.tree_util.keystr(path):
                sharding = NamedSharding(mesh, of_side)
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return x

    state = jax.tree_util.tree_map_with_path(place, state)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)), (params, state, params)


def collectives(text):
    """The bytes that each collective makes."""
    found = []
    for shapes, name in COLLECTIVE.findall(text):
        sizes = re.findall(r"f32\[([\d,]*)\]", shapes)
        found += [
            (name, 4 * math.prod(int(n) for n in s.split(",") if n)) for s in sizes
        ]
    return found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temporaries_and_kernels(dtype):
    jitted, arguments = lower(
        optax_flash.lora_pre_adamw(1e-3, rank=RANK), mesh_of(), (None, None), dtype
    )
    compiled = inspect(jitted, *arguments)
    # Two dense float32 leaves, and what has the size of factors.
    assert compiled.temporaries < 2 * DENSE + 8 * MEGABYTE
    assert compiled.kernels.total() <= 80


# Both kinds of mesh with the spec that splits both axes, and with one other each.
@pytest.mark.parametrize(
    "devices, spec, kind",
    [
        ((8, 1), ("fsdp", None), AxisType.Auto),
        ((1, 8), (None, "tp"), AxisType.Explicit),
        ((4, 2), ("fsdp", "tp"), AxisType.Auto),
        ((4, 2), ("fsdp", "tp"), AxisType.Explicit),
    ],
    ids=str,
)
def test_eight_gpus_exchange_no_more_than_factors(devices, spec, kind):
    mesh = mesh_of(devices, ("fsdp", "tp"), kind)
    with jax.set_mesh(mesh):
        jitted, arguments = lower(
            optax_flash.lora_pre_adamw(1e-3, rank=RANK), mesh, spec, jnp.bfloat16
        )
        found = collectives(jitted.lower(*arguments).compile().as_text())
    assert {name for name, _ in found} == {"all-reduce"}
    # XLA may send the factors of both moments, and their Gram matrices, together.
    assert max(size for _, size in found) <= 2 * 4 * RANK * (SIDE + RANK)
