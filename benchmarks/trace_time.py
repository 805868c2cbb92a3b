"""Time to trace and lower one update on many leaves, against ``optax.adamw``.

    python -m benchmarks.trace_time

512 leaves of 4 distinct shapes. Every measurement is a new process, as tracing is cold
when a training starts; the contenders alternate. Prints medians and their ratio.
"""

import argparse
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax

import optax_flash

SHAPES = ((256, 256), (256, 1024), (1024, 256), (4096,))
CONTENDERS = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "adamw8": lambda: optax_flash.adamw8(1e-3),
    "master_weights(adamw8)": lambda: optax_flash.master_weights(
        optax_flash.adamw8(1e-3), finished=False
    ),
}


def lower_seconds(tx: optax.GradientTransformation, leaves: int) -> float:
    """Seconds to trace and lower ``tx.update`` on so many leaves."""
    params = {
        f"layer_{i}": jax.ShapeDtypeStruct(SHAPES[i % len(SHAPES)], jnp.bfloat16)
        for i in range(leaves)
    }
    state = jax.eval_shape(tx.init, params)
    start = time.perf_counter()
    jax.jit(tx.update).lower(params, state, params)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--leaves", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=CONTENDERS, help="measure one, once, here")
    args = parser.parse_args()
    if args.only:
        print(lower_seconds(CONTENDERS[args.only](), args.leaves))
        return
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name, times in seconds.items():
            command = [sys.executable, "-m", "benchmarks.trace_time", "--only", name]
            command += ["--leaves", str(args.leaves)]
            output = subprocess.run(command, check=True, capture_output=True, text=True)
            times.append(float(output.stdout))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians["optax.adamw"]
        print(f"{name:24} {median:6.2f} s  {ratio:5.2f} x")


if __name__ == "__main__":
    main()
