"""What XLA makes of one update on TPUs that are not there: `make tpu-report`.

Compiles the step of a 4096x4096 leaf for a v5e and a v5p and writes, per parameter, the
bytes accessed, and the bytes of temporaries: benchmarks/results/tpu.json and .md. XLA
does not look into a kernel; what it accesses is its operands and results, once each.
"""

import json
import os
import pathlib
import re

# Quiets libtpu where there is no TPU, and lets two processes compile at a time.
os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import optax_flash  # noqa: E402

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
SHAPE = (4096, 4096)
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}


def ours(alias, implementation):
    tx = alias(1e-3, implementation=implementation)
    return optax_flash.master_weights(tx), jnp.bfloat16


STEPS = {
    "optax.adamw, float32": lambda: (optax.adamw(1e-3), jnp.float32),
    "adamw8, 24-bit weights, XLA": lambda: ours(optax_flash.adamw8, "xla"),
    "adamw8, 24-bit weights": lambda: ours(optax_flash.adamw8, None),
    "adamw4, 24-bit weights, XLA": lambda: ours(optax_flash.adamw4, "xla"),
    "adamw4, 24-bit weights": lambda: ours(optax_flash.adamw4, None),
    "lion8, 24-bit weights, XLA": lambda: ours(optax_flash.lion8, "xla"),
    "lion8, 24-bit weights": lambda: ours(optax_flash.lion8, None),
}


def compiled(tx, dtype, device):
    """The train step of one leaf, params and state donated, and what it is given."""
    alone = NamedSharding(Mesh([device], ("x",)), PartitionSpec())

    def on_device(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), tree
        )

    params = on_device({"w": jax.ShapeDtypeStruct(SHAPE, dtype)})
    state = on_device(jax.eval_shape(tx.init, params))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    return step.lower(params, state, params).compile(), (params, state)


def measure(name, kind):
    device = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[kind]
    ).devices[0]
    tx, dtype = STEPS[name]()
    step, (params, state) = compiled(tx, dtype, device)
    kernels = len(re.findall(r'custom_call_target="tpu_custom_call"', step.as_text()))
    size = SHAPE[0] * SHAPE[1]
    if kernels:
        # Gradients are read; params and state are read and written.
        twice = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
        accessed = 2 * twice + size * jnp.dtype(dtype).itemsize
    else:
        accessed = step.cost_analysis()["bytes accessed"]
    return {
        "device": kind,
        "step": name,
        "kernels": kernels,
        "bytes_accessed_per_parameter": round(accessed / size, 2),
        "temporary_megabytes": round(
            step.memory_analysis().temp_size_in_bytes / 1e6, 1
        ),
    }


def table(rows):
    lines = [
        f"`python -m benchmarks.tpu_report`, compiled by XLA, not run: jax "
        f"{jax.__version__}, one leaf of {SHAPE[0]}x{SHAPE[1]}.",
        "",
        "| device | step | our kernels | bytes accessed a parameter | temporary MB |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        lines.append("| " + " | ".join(str(x) for x in row.values()) + " |")
    return "\n".join(lines) + "\n"


def main():
    rows = [measure(name, kind) for kind in TOPOLOGIES for name in STEPS]
    content = {"shape": SHAPE, "jax": jax.__version__, "rows": rows}
    (RESULTS / "tpu.json").write_text(json.dumps(content, indent=2) + "\n")
    (RESULTS / "tpu.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
