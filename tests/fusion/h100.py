"""Compiling for H100s on a machine that has none.

XLA needs the CUDA plugin of ``jax[cuda13]`` and a description of the device, not the
device itself.
"""

import math
import pathlib
import re
from collections import Counter
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

TARGET = pathlib.Path(__file__).with_name("h100.textproto")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


class Compiled(NamedTuple):
    """What XLA made of a step.

    Attributes:
      kernels: how often each kind of instruction that costs a launch occurs, but for
        those that only make scalars; our kernels are called "optax_flash".
      collectives: names of those that there are.
      temporaries: bytes.
      aliased: bytes of arguments whose buffers hold results.
      arguments: bytes.
    """

    kernels: Counter
    collectives: list[str]
    temporaries: int
    aliased: int
    arguments: int


def mesh_of(shape=(1,), names=("fsdp",), kind=AxisType.Auto):
    """A mesh of H100s that are not there."""
    topology = topologies.get_topology_desc(
        "h100",
        platform="cuda",
        target_config=TARGET.read_text(),
        topology=f"1x1x{math.prod(shape)}",
    )
    devices = np.array(topology.devices).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def sharded_like(tree, mesh, spec=()):
    """Abstract arrays: sharded where that is possible, others on every device."""

    def shards(entry):
        names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        return math.prod(mesh.shape[name] for name in names)

    def place(x):
        fits = len(x.shape) > 1 and all(
            size % shards(entry) == 0
            for size, entry in zip(x.shape, spec, strict=False)
        )
        sharding = NamedSharding(mesh, PartitionSpec(*(spec if fits else ())))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def compile_step(tx, params, mesh=None, spec=(), donate_grads=False):
    """Compiles update and apply_updates for H100s."""
    mesh = mesh or mesh_of()
    state = jax.eval_shape(tx.init, params)
    params, state = sharded_like((params, state), mesh, spec)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    donated = (0, 1, 2) if donate_grads else (0, 1)
    return inspect(jax.jit(step, donate_argnums=donated), params, state, params)


def inspect(jitted, *args):
    """Compiles a jitted function for abstract arguments and reads the result."""
    compiled = jitted.lower(*args).compile()
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    entry = entry[: entry.index("\n}")]
    memory = compiled.memory_analysis()
    return Compiled(
        kernels=Counter(filter(None, map(_kernel, entry.splitlines()))),
        collectives=[name for name in COLLECTIVES if f" {name}" in text],
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
    )


def _kernel(line):
    found = re.search(r"= (.*?) (fusion|custom-call|copy|while|reduce|sort)\(", line)
    if not found:
        return None
    shapes, name = found.groups()
    if name == "custom-call" and "triton" in line:
        return "optax_flash"
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n)
        for dims in re.findall(r"[a-z0-9]+\[([\d,]*)\]", shapes)
    ]
    return name if max(sizes, default=0) > 1 else None
