"""Compiling for H100s and B200s on a machine that has none.

XLA needs the CUDA plugin of ``jax[cuda13]`` and a description of the device, not the
device itself.

    JAX_PLATFORMS=cpu python -m benchmarks.h100

prints what becomes of AdamW by each kind of kernel, a table of docs/kernels.md.
"""

import contextlib
import functools
import importlib.util
import math
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optax_flash
from optax_flash.fusion.backends import jax_triton

FOLDER = pathlib.Path(__file__).parent
TARGETS = {"h100": "sm_90a", "b200": "sm_100a"}
BACKENDS = ("triton", "pallas")
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
      ptx: of each kernel that jax-triton compiled for it.
    """

    kernels: Counter
    collectives: list[str]
    temporaries: int
    aliased: int
    arguments: int
    ptx: tuple[str, ...] = ()


@functools.cache
def devices_of(target, count):
    """GPUs that are not there."""
    topology = topologies.get_topology_desc(
        target,
        platform="cuda",
        target_config=(FOLDER / f"{target}.textproto").read_text(),
        topology=f"1x1x{count}",
    )
    return topology.devices


def mesh_of(shape=(1,), names=("fsdp",), kind=AxisType.Auto, target="h100"):
    """A mesh of them."""
    devices = np.array(devices_of(target, math.prod(shape))).reshape(shape)
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
    with _recorded() as ptx:
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
        ptx=tuple(ptx),
    )


@contextlib.contextmanager
def _recorded():
    """A list that gets the PTX of all that jax-triton compiles in the context."""
    found = []
    if jax_triton.absent():
        yield found
        return
    from jax_triton import triton_lib

    compile_ = triton_lib.compile_ttir_inplace

    def spy(*args):
        result = compile_(*args)
        found.append(result.binary)
        return result

    # jax-triton keeps what it has compiled, by the kernel.
    jax_triton.kernel.cache_clear()
    triton_lib.compile_ttir_inplace = spy
    try:
        yield found
    finally:
        triton_lib.compile_ttir_inplace = compile_


@functools.cache
def adamw_step(backend, target, codecs):
    """AdamW on one leaf of 4096 x 4096, finished params: compiled once a session."""
    tx = optax_flash.master_weights(
        optax_flash.compress(optax.adamw(1e-3), codecs), implementation=backend
    )
    params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
    return compile_step(tx, params, mesh_of(target=target))


def access_widths(ptx):
    """Bytes a thread reads or writes at once, for every access to global memory."""
    widths = {"load": [], "store": []}
    pattern = r"(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)"
    for kind, vector, bits in re.findall(pattern, ptx):
        name = "load" if kind == "ld" else "store"
        widths[name].append(int(vector or 1) * int(bits) // 8)
    return widths


class Assembled(NamedTuple):
    """What a kernel takes of an SM: registers a thread, and bytes a thread spilled."""

    registers: int
    spilled: int


def assemble(ptx, target, out=None):
    """What machine code of PTX takes, by the assembler that XLA takes.

    Args:
      ptx: text of one kernel.
      target: one of TARGETS.
      out: the file that gets the machine code, if any.
    """
    found = re.search(r"\.target (\w+)", ptx).group(1)
    assert found == TARGETS[target]
    wheel = importlib.util.find_spec("nvidia").submodule_search_locations[0]
    ptxas = shutil.which("ptxas") or f"{wheel}/cu13/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "kernel.ptx")
        source.write_text(ptx)
        out = out or pathlib.Path(folder, "out")
        command = [ptxas, "-v", f"--gpu-name={found}", f"--output-file={out}"]
        run = subprocess.run([*command, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    registers = re.search(r"Used (\d+) registers", run.stderr).group(1)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", run.stderr)
    return Assembled(int(registers), sum(map(int, spills)))


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


def _widths(found):
    counts = sorted(Counter(found).items(), reverse=True)
    return ", ".join(f"{n} x {width}" for width, n in counts)


def main():
    """Prints the table. Pallas' PTX is what XLA dumps, which 0.12 does not."""
    folder = tempfile.mkdtemp()
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder}"
    print(
        "| kernel | bits | GPU | kernels | temporaries | loads | stores | registers |"
    )
    print("|---|---|---|---:|---:|---|---|---:|")
    for backend in BACKENDS:
        for codecs, bits in (("companded8", 8), ("companded4", 4)):
            for target, name in TARGETS.items():
                compiled = adamw_step(backend, target, codecs)
                ptx = list(compiled.ptx)
                for file in pathlib.Path(folder).glob("*.ptx"):
                    # Others make scalars.
                    ptx.append(file.read_text())
                    file.unlink()
                cells = ["", "", ""]
                if ptx:
                    text = max(ptx, key=len)
                    widths = access_widths(text)
                    used = assemble(text, target)
                    cells = [_widths(widths["load"]), _widths(widths["store"])]
                    cells.append(f"{used.registers}, {used.spilled} spilled")
                row = [
                    f'`"{backend}"`',
                    bits,
                    name,
                    compiled.kernels["optax_flash"],
                    f"{compiled.temporaries:,} bytes",
                    *cells,
                ]
                print("|", " | ".join(map(str, row)), "|", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
