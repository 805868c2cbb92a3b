"""What a Llama-3.1-8B fine-tuning step takes on H100s, compiled without any.

    python -m benchmarks.llama_memory

XLA compiles the whole step (loss, gradients, update) for H100s that are not there, from
shapes alone, and says how much memory it takes: arguments, outputs and temporaries,
less what is aliased. Beside it, what ``optax_flash.plan`` says; also of other models.
Its coefficients were fitted to the steps of all tables but the last. Needs
``jax[cuda13]`` and JAX_PLATFORMS=cpu. Writes a JSON file and tables.

The device is described as an H100 with more memory than any step takes: where it is
short XLA trades time for memory of its own accord.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optax_flash
from benchmarks import decoders
from examples.lm.decoders import DecoderConfig
from optax_flash import plan, release
from optax_flash.plan import optimizers, shards

ROOT = pathlib.Path(__file__).parent.parent
TARGET = ROOT / "benchmarks/h100.textproto"
RESULTS = ROOT / "benchmarks/results"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
      model: a preset of ``optax_flash.plan``.
      optimizer: its name there.
      released: whether gradients are released.
      batch: examples on all devices together.
      length: tokens of each.
      chunks: pieces in which logits are made.
      remat: whether layers keep their inputs only.
      devices: over which weights, state and batch are divided.
    """

    model: str
    optimizer: str
    released: bool = False
    batch: int = 1
    length: int = 2_048
    chunks: int = 1
    remat: bool = True
    devices: int = 1

    @property
    def bits(self) -> int | None:
        return None if self.optimizer == "adamw" else 24


LLAMA = "llama-3.1-8b"
CONTENDERS = (("adamw", False), ("adamw8", False), ("adamw8", True), ("adamw4", False))
CONTENDERS += (("adamw4", True),)
PAPER = {
    ("adamw", False): {"weights": 29.9, "state": 59.8, "peak": 175.2},
    ("adamw8", False): {"weights": 15.0, "state": 23.4, "peak": 112.9},
}
"""GiB, of FlashOptim (arXiv 2602.23349), whose batch is not known here."""

CASES = {
    "one device": [Case(LLAMA, *x) for x in CONTENDERS],
    "one device, 8 examples": [Case(LLAMA, *x, batch=8, chunks=8) for x in CONTENDERS],
    "8 devices, FSDP": [
        Case(LLAMA, *x, batch=8, devices=8) for x in CONTENDERS if not x[1]
    ],
    "other steps": [
        Case(LLAMA, "adamw8", batch=8),
        Case(LLAMA, "adamw8", batch=16, length=4_096, chunks=32),
        Case(LLAMA, "adamw8", remat=False),
        Case(LLAMA, "adamw", remat=False),
        Case(LLAMA, "adamw8", batch=64, devices=8),
        Case(LLAMA, "adamw8", batch=32, chunks=8, devices=8),
        Case(LLAMA, "lion8", batch=8, length=1_024),
        Case("llama-3.1-70b", "adamw8", batch=16, devices=16),
        Case("llama-3.2-1b", "adamw8", batch=4),
        Case("llama-3.2-1b", "adamw", batch=8, chunks=8),
        Case("llama-3.2-1b", "adamw8", batch=8, devices=8),
        Case("gpt2-xl", "adamw", batch=8, length=1_024),
        Case("gpt2-xl", "adamw8", batch=8, length=1_024),
        Case("gpt2-xl", "adamw8", True, batch=8, length=1_024),
        Case("gpt2-xl", "adamw8", batch=8, length=1_024, remat=False),
        Case("gpt2-xl", "adamw8", batch=32, length=1_024, devices=8),
        Case("gpt2-124m", "adamw8", batch=8, length=1_024),
        Case("gpt2-124m", "adamw", batch=8, length=1_024, chunks=4, remat=False),
    ],
    "steps that nothing was fitted to": [
        Case(LLAMA, "adamw8", batch=4, length=4_096, chunks=4),
        Case(LLAMA, "adamw", batch=2, length=8_192, chunks=8),
        Case(LLAMA, "adamw4", True, batch=16, chunks=16),
        Case(LLAMA, "sgd8", batch=4),
        Case(LLAMA, "adamw4", batch=16, chunks=4, devices=8),
        Case("llama-3.2-1b", "adamw8", True, batch=4, chunks=8),
        Case("gpt2-355m", "adamw8", batch=16, length=1_024, chunks=4),
        Case("gpt2-774m", "adamw", batch=4, length=1_024),
        Case("gpt2-774m", "adamw8", batch=4, length=512, remat=False),
    ],
}


def decoder(model: plan.Model) -> decoders.Llama | decoders.GPT2:
    """The network that a preset describes, or the like of it."""
    sizes = model.architecture
    assert isinstance(sizes, plan.Transformer)
    head_width = 64 if sizes.width < 4_096 else 128
    heads = sizes.width // head_width
    if sizes.gated:
        return decoders.Llama(heads, sizes.keys // head_width, sizes.tied)
    config = DecoderConfig(
        "gpt2",
        depth=sizes.layers,
        width=sizes.width,
        heads=heads,
        seq_len=model.length,
        vocab=sizes.vocabulary,
        attention="cudnn",
        compute_dtype=jnp.bfloat16,
    )
    return decoders.GPT2(config)


def devices(count: int) -> Mesh:
    """A mesh of H100s that are not there."""
    target = re.sub(
        r"device_memory_size: \d+",
        "device_memory_size: 8000000000000",
        TARGET.read_text(),
    )
    topology = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=target, topology=f"1x1x{count}"
    )
    return Mesh(np.array(topology.devices), ("fsdp",), axis_types=(AxisType.Auto,))


def step_of(case: Case, model: plan.Model, tx: Any, params: Any, mesh: Mesh):
    """The step: ``(params, state, tokens) -> (loss, params, state)``."""
    over = mesh if case.devices > 1 else None
    loss = decoders.sequence(decoder(model), chunks=case.chunks, mesh=over)
    if case.released:
        return release.train_step(loss, tx)
    if not case.remat:
        loss = functools.partial(decoders.without_remat, loss)

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        # Or XLA may choose other shardings for them, and move codes to follow.
        grads = jax.lax.with_sharding_constraint(grads, shardings)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    shardings = jax.tree.map(lambda x: x.sharding, params)
    return step


def compile_case(case: Case, model: plan.Model | None = None) -> dict[str, float]:
    """Bytes of the compiled step on each device, and of the plan.

    Args:
      case: the step.
      model: another than the preset that the case names.
    """
    mesh = devices(case.devices)
    model = model or plan.preset(case.model)
    dtype = jnp.bfloat16 if case.bits else jnp.float32
    tx = optax.adamw(1e-3)
    if case.bits:
        inner = optimizers.named(case.optimizer)
        tx = optax_flash.master_weights(inner, case.bits)
    params = jax.tree.map(lambda x: x.update(dtype=dtype), model.params)
    params = shards.place(params, mesh)
    state = jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding),
        jax.eval_shape(tx.init, params),
        optax_flash.state_sharding(tx, params),
    )
    by_example = NamedSharding(mesh, PartitionSpec("fsdp"))
    tokens = jax.ShapeDtypeStruct(
        (case.batch, case.length + 1), jnp.int32, sharding=by_example
    )
    outputs = jax.tree.map(lambda x: x.sharding, (params, state))
    start = time.perf_counter()
    step = jax.jit(
        step_of(case, model, tx, params, mesh),
        donate_argnums=(0, 1),
        out_shardings=(NamedSharding(mesh, PartitionSpec()), *outputs),
    )
    memory = step.lower(params, state, tokens).compile().memory_analysis()
    seconds = time.perf_counter() - start
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    planned = plan.plan(
        model,
        case.optimizer,
        "h100-80gb",
        {"fsdp": case.devices},
        batch=case.batch,
        length=case.length,
        remat=case.remat,
        release=case.released,
        loss_chunks=case.chunks,
    )
    return {
        "weights": shards.nbytes(params),
        "state": shards.nbytes(state),
        "temporaries": memory.temp_size_in_bytes,
        "peak": peak,
        "planned": planned.total,
        "difference": planned.total / peak - 1,
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown, GiB on each device."""
    lines = [
        "| | weights | state | temporaries | **peak** | planned | difference |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = " | ".join(
            f"{row[key] / GIB:.2f}" for key in ("weights", "state", "temporaries")
        )
        peak, planned = f"{row['peak'] / GIB:.2f}", f"{row['planned'] / GIB:.2f}"
        lines.append(
            f"| {describe(row)} | {sizes} | **{peak}** | {planned} | "
            f"{row['difference']:+.1%} |"
        )
    return "\n".join(lines)


def describe(row: dict[str, Any]) -> str:
    """What distinguishes a step."""
    size = f"{row['batch']} x {row['length']}"
    words = [row["model"], f"`{row['optimizer']}`", size]
    words += ["gradients released"] * row["released"]
    words += [f"logits in {row['chunks']} pieces"] * (row["chunks"] > 1)
    words += ["no remat"] * (not row["remat"])
    words += [f"{row['devices']} devices"] * (row["devices"] > 1)
    return ", ".join(words)


def page(results: dict[str, list[dict[str, Any]]]) -> str:
    """All tables."""
    parts = [
        "# A fine-tuning step of Llama-3.1-8B on H100s\n\nCompiled, not run: "
        "`python -m benchmarks.llama_memory`. GiB on each device. Weights are float32 "
        "with `adamw` and else 16 + 8 bits, of which 8 count as state."
    ]
    for name, rows in results.items():
        parts.append(f"## {name[0].upper()}{name[1:]}\n\n{table(rows)}")
    ours = results["one device"]
    lines = [
        "| | weights | state | peak | weights, paper | state, paper | peak, paper |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in ours:
        theirs = PAPER.get((row["optimizer"], row["released"]), {})
        cells = [describe(row)]
        cells += [f"{row[key] / GIB:.1f}" for key in ("weights", "state", "peak")]
        cells += [str(theirs.get(key, "")) for key in ("weights", "state", "peak")]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "FlashOptim (arXiv 2602.23349), Llama-3.1-8B with AdamW and FlashAdamW. Its "
        "batch is not known here: peak less weights, state and gradients in the "
        "weights' dtype is 55.6 and 59.5 GiB there."
    )
    parts.append("## Beside the paper\n\n" + "\n".join([note, "", *lines]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="of the tables, the one whose name has this")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    results = {}
    for name, cases in CASES.items():
        if args.only and args.only not in name:
            continue
        results[name] = []
        for case in cases:
            row = dataclasses.asdict(case) | compile_case(case)
            results[name].append(row)
            print(table([row]).splitlines()[-1], f"{row['seconds']:.0f} s", flush=True)
    if args.only:
        return
    versions = {x: importlib.metadata.version(x) for x in ("jax", "jaxlib", "optax")}
    report = {"versions": versions, "python": sys.version.split()[0], "steps": results}
    (args.out / "llama_memory.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "llama_memory.md").write_text(page(results))


if __name__ == "__main__":
    main()
