"""What a kernel costs beside memory, read from its machine code; no GPU needed.

    make kernel-cost

A GPU has several units beside its memory, and the slowest bounds a kernel: issue slots
(4 warps a clock on each SM), the pipe of integers and comparisons (64 lanes), and the
special-function unit (16 lanes). Kernels of ours have no loops, so an instruction of
the listing is one a thread, and an element costs their number over the elements of a
thread. The units' figures are those of the throughput table of the CUDA programming
guide, for compute capabilities 9.0 and 10.0.

The bound is a lower one. It takes every schedule for perfect: what registers leave of
warps to wait for memory, and how long each instruction takes, come on top.
"""

import importlib.util
import math
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_flash
from benchmarks import h100
from benchmarks.summaries import RESULTS, write
from optax_flash.fusion.launch import Config

SHAPE = (4096, 4096)
WARPS, REGISTERS = 64, 65536
"""Of an SM, at most."""


class Device(NamedTuple):
    """What bounds a kernel on a GPU.

    Attributes:
      target: of h100.TARGETS.
      sms: streaming multiprocessors.
      clock: Hz.
      bandwidth: of a copy, in bytes a second: measured, on the B200 published.
    """

    target: str
    sms: int
    clock: float
    bandwidth: float


DEVICES = {
    "H100": Device("h100", 132, 1.755e9, 3.0e12),
    "H200": Device("h100", 132, 1.755e9, 4.3e12),
    "B200": Device("b200", 148, 1.85e9, 7.2e12),
}

UNITS = {"issue": 128, "integer": 64, "special": 16}
"""Lanes a clock and SM."""

INTEGER = frozenset(
    "LOP3 LOP SHF IADD IADD3 IMAD LEA PRMT SEL SGXT VIADD VIADDMNMX VIMNMX VIMNMX3 "
    "IMNMX ISETP IABS I2F I2FP F2I BFE POPC FLO BREV P2R R2P".split()
)
SPECIAL = frozenset({"MUFU"})

OPTIMIZERS: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "adamw8": lambda: optax_flash.adamw8(1e-3, weight_decay=0.1),
    "adamw4": lambda: optax_flash.adamw4(1e-3, weight_decay=0.1),
    "lion8": lambda: optax_flash.lion8(1e-3, weight_decay=0.1),
    "sgd8": lambda: optax_flash.sgd8(1e-3, momentum=0.9),
    "nadamw": lambda: optax_flash.compress(optax.nadamw(1e-3)),
    "adan": lambda: optax_flash.compress(optax.adan(1e-3)),
    'adamw8, codecs="flashoptim"': lambda: optax_flash.adamw8(
        1e-3, weight_decay=0.1, codecs="flashoptim"
    ),
}

PARAMS = (
    "24 bits, finished",
    "24 bits, additive",
    "float32, finished",
    "float32, additive",
)


class Cost(NamedTuple):
    """What a kernel takes for one element, and of an SM.

    Attributes:
      issue: instructions.
      integer: of these on the pipe of integers.
      special: of these on the special-function unit.
      bytes: read and written.
      registers: a thread.
      spilled: bytes a thread.
      warps: that are resident on an SM.
    """

    issue: float
    integer: float
    special: float
    bytes: float
    registers: int
    spilled: int
    warps: int

    def bounds(self, device: Device) -> dict[str, float]:
        """Seconds an element for each unit."""
        a_second = device.sms * device.clock
        units = {
            name: getattr(self, name) / lanes / a_second
            for name, lanes in UNITS.items()
        }
        return {"memory": self.bytes / device.bandwidth, **units}


def cost(optimizer: str, params: str, target: str) -> Cost:
    """The cost of a kernel of ours.

    Args:
      optimizer: one of OPTIMIZERS.
      params: one of PARAMS.
      target: one of h100.TARGETS.
    """
    inner = OPTIMIZERS[optimizer]()
    dtype = jnp.float32 if "float32" in params else jnp.bfloat16
    if params == "float32, additive":
        tx = inner
    else:
        tx = optax_flash.master_weights(inner, finished="finished" in params)
    tree = {"kernel": jax.ShapeDtypeStruct(SHAPE, dtype)}
    program = _program(tx, tree)
    compiled = h100.compile_step(tx, tree, h100.mesh_of(target=target))
    (ptx,) = compiled.ptx
    config = Config.of(program)
    counts, assembled = machine_code(ptx, target)
    elements = config.elements // (32 * config.num_warps)
    arrays = [x.aval for x in (*program.jaxpr.invars, *program.jaxpr.outvars)]
    return Cost(
        issue=counts.total() / elements,
        integer=sum(counts[x] for x in INTEGER) / elements,
        special=sum(counts[x] for x in SPECIAL) / elements,
        bytes=sum(x.size * x.dtype.itemsize for x in arrays if x.shape) / program.size,
        registers=assembled.registers,
        spilled=assembled.spilled,
        warps=resident_warps(assembled.registers, config.num_warps),
    )


def resident_warps(registers: int, num_warps: int) -> int:
    """How many warps of blocks of ``num_warps`` an SM holds at once."""
    # A warp's registers come in units of 256.
    a_warp = 32 * math.ceil(registers / 8) * 8
    blocks = REGISTERS // (a_warp * num_warps)
    return min(blocks * num_warps, WARPS)


def machine_code(ptx: str, target: str) -> tuple[Counter[str], h100.Assembled]:
    """How often each instruction is in a kernel's machine code, and what it takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        assembled = h100.assemble(ptx, target, path)
        run = subprocess.run(
            [_disassembler(), "-c", path], capture_output=True, text=True, check=True
        )
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)"
    counts = Counter(re.findall(pattern, run.stdout, re.MULTILINE))
    # What follows the end fills the last line of the instruction cache.
    del counts["NOP"], counts["BRA"]
    return counts, assembled


def _disassembler() -> pathlib.Path:
    """NVIDIA's, in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    assert spec and spec.submodule_search_locations
    return pathlib.Path(
        spec.submodule_search_locations[0], "backends/nvidia/bin/nvdisasm"
    )


def _program(tx: optax.GradientTransformation, params: optax.Params):
    """The program of the one kernel of an update."""
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jaxpr = jax.make_jaxpr(step)(params, state, params)
    (program,) = (
        program
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "optax_flash_update"
        for program in eqn.params["programs"]
    )
    return program


def row(name: str, params: str, costs: Mapping[str, Cost]) -> list[str]:
    """A line of the table.

    Args:
      name: of the optimizer.
      params: how weights are stored.
      costs: by target.
    """
    found = costs["h100"]
    cells = [f"`{name}`", params, f"{found.bytes:.2f}"]
    cells += [f"{getattr(found, unit):.1f}" for unit in UNITS]
    cells += [f"{found.registers}", f"{found.spilled}", f"{found.warps}"]
    for device in DEVICES.values():
        bounds = costs[device.target].bounds(device)
        worst = max(bounds, key=lambda unit: bounds[unit])
        cells.append(f"{bounds['memory'] / bounds[worst]:.0%} ({worst})")
    return cells


HEAD = [
    *("optimizer", "params", "bytes", "issue", "integer", "special"),
    *("registers", "spilled", "warps", *DEVICES),
]

PAGE = """\
# What kernels cost beside memory

`make kernel-cost` made this, without a GPU: jax {jax}, Triton kernels, one leaf of
4096 x 4096, gradients in the params' dtype. For one element: bytes read and written,
and machine instructions of sm_90a (all, those of integers, those of the
special-function unit). Then registers a thread, bytes spilled, and the warps of 64 that
are resident on an SM. Last the share of a copy's bandwidth that the kernel can reach at
best, and what bounds it: of 3.0 TB/s (H100) and 4.3 TB/s (H200), measured, and 7.2 TB/s
(B200, sm_100a), published.

The model leaves out how long an instruction takes and how many warps it takes to hide
that, conflicts within units, and the launch. **No kernel here has been timed.**

{table}
"""


def main() -> None:
    """Writes kernel_cost.json and kernel_cost.md."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|" + "---:|" * (len(HEAD) - 2)]
    rows = []
    for name in OPTIMIZERS:
        for params in PARAMS:
            costs = {target: cost(name, params, target) for target in h100.TARGETS}
            lines.append("| " + " | ".join(row(name, params, costs)) + " |")
            print(lines[-1], flush=True)
            for target, found in costs.items():
                rows.append(
                    {"optimizer": name, "params": params, "target": target}
                    | found._asdict()
                )
    write(
        RESULTS / "kernel_cost.json",
        {"command": "make kernel-cost", "jax": jax.__version__, "rows": rows},
    )
    page = PAGE.format(jax=jax.__version__, table="\n".join(lines))
    (RESULTS / "kernel_cost.md").write_text(page)


if __name__ == "__main__":
    main()
