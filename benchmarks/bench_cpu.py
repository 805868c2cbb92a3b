"""Optimizer steps on a CPU, as ratios to optax.

    python -m benchmarks.bench_cpu

Times whole steps (update and ``optax.apply_updates``, one jitted function that donates
params and state) on one large leaf and on 300 small ones, all contenders in one
process, alternating, and writes benchmarks/results/bench_cpu.json. A ratio is to the
optax optimizer of the same round; the median over rounds is printed. ``pip install
flashoptim-jax`` adds that package's unfused path, which is the one for CPUs.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_flash
from benchmarks.contenders import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    JaxContender,
    Shapes,
    flashoptim_jax,
    optax_float32,
    transformation,
)
from benchmarks.rounds import METHOD, alternate, median_ms

RESULTS = pathlib.Path(__file__).parent / "results" / "bench_cpu.json"


class Entrant(NamedTuple):
    """A contender, and the name of the one that its ratio is to."""

    contender: JaxContender
    baseline: str


def entrants() -> list[Entrant]:
    settings = dict(weight_decay=WEIGHT_DECAY)
    adamw = optax_float32()
    adamw8 = transformation(
        "adamw8",
        lambda: optax_flash.adamw8(LEARNING_RATE, **settings),
        weights="float32",
        dtype=jnp.float32,
    )
    finished = transformation(
        "adamw8, finished",
        lambda: optax_flash.master_weights(
            optax_flash.adamw8(LEARNING_RATE, **settings)
        ),
        weights="float32",
        dtype=jnp.float32,
    )
    split = transformation(
        "master_weights(adamw8)",
        lambda: optax_flash.master_weights(
            optax_flash.adamw8(LEARNING_RATE, **settings)
        ),
        weights="bfloat16 + 8 bits",
    )
    lion = transformation(
        "optax.lion",
        lambda: optax.lion(LEARNING_RATE, **settings),
        weights="float32",
        dtype=jnp.float32,
    )
    lion8 = transformation(
        "lion8",
        lambda: optax_flash.lion8(LEARNING_RATE, **settings),
        weights="float32",
        dtype=jnp.float32,
    )
    return [
        Entrant(adamw, adamw.name),
        Entrant(adamw8, adamw.name),
        Entrant(finished, adamw.name),
        Entrant(split, adamw.name),
        Entrant(flashoptim_jax(fused=False), adamw.name),
        Entrant(lion, lion.name),
        Entrant(lion8, lion.name),
    ]


def small_leaves(count: int) -> Shapes:
    """Nine shapes in turn, of 4,096 to 65,536 elements."""
    return [(64 << (i % 3), 64 << (i // 3 % 3)) for i in range(count)]


def leaf_sets(tiny: bool) -> dict[str, Shapes]:
    if tiny:
        return {"one leaf": [(64, 64)], "small leaves": small_leaves(3)}
    return {"one leaf": [(2048, 4096)], "small leaves": small_leaves(300)}


def measure(shapes: Shapes, rounds: int, seconds: float) -> dict[str, Any]:
    """The median of each contender and of its ratio, or why there is none."""
    competitors = entrants()
    timed = alternate(
        [entrant.contender for entrant in competitors],
        shapes,
        rounds=rounds,
        seconds=seconds,
    )
    table: dict[str, Any] = {}
    for contender, baseline in competitors:
        result = timed[contender.name]
        if "absent" in result:
            table[contender.name] = result
            continue
        pairs = zip(result["seconds"], timed[baseline]["seconds"], strict=True)
        table[contender.name] = {
            "weights": contender.weights,
            "gradients": contender.gradients,
            "median_ms": median_ms(result),
            "baseline": baseline,
            "median_ratio": statistics.median(own / other for own, other in pairs),
        }
    return table


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = [
        line.split(":", 1)[1].strip()
        for line in cpu_info().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "optax_flash": optax_flash.__version__,
    }


def cpu_info() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def show(name: str, shapes: Shapes, table: dict[str, Any]) -> None:
    parameters = sum(rows * columns for rows, columns in shapes)
    print(f"{name}: {parameters:,} parameters, leaves: {len(shapes)}")
    for contender, row in table.items():
        if "absent" in row:
            print(f"  {contender:26} absent: {row['absent']}")
            continue
        kind = f"{row['weights']:18} {row['gradients']:9}"
        ratio = f"{row['median_ratio']:6.2f} x {row['baseline']}"
        print(f"  {contender:26} {kind}{row['median_ms']:9.2f} ms {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="JSON file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one timing")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny leaves, for the tests"
    )
    args = parser.parse_args()
    if args.tiny and args.out.resolve() == RESULTS.resolve():
        parser.error("--tiny needs --out with another file")
    jax.config.update("jax_platforms", "cpu")
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "benchmarks.bench_cpu", *sys.argv[1:]]),
        "tiny": args.tiny,
        "machine": machine(),
        "method": METHOD,
        "rounds": args.rounds,
        "leaf_sets": {},
    }
    for name, shapes in leaf_sets(args.tiny).items():
        table = measure(shapes, args.rounds, args.seconds)
        show(name, shapes, table)
        result["leaf_sets"][name] = {
            "shapes": [list(shape) for shape in shapes],
            "contenders": table,
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
