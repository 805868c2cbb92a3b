"""The demo over several seeds: does adamw8 end within the seeds' spread of AdamW?

    python -m benchmarks.demo_seeds

Writes benchmarks/results/demo_seeds.json and prints its summary. A seed decides the
initial weights and the order of the data, the same for both optimizers.
"""

import argparse
import json
import pathlib
import platform
import statistics
import sys

import jax

from examples.lm.demo import compare, demo_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "demo_seeds.json"


def summarize(losses: dict[str, list[float]]) -> dict[str, float]:
    """Means, spread and the paired difference of the two optimizers' final losses."""
    (stock_name, stock), (_, ours) = losses.items()
    del stock_name
    differences = [b - a for a, b in zip(stock, ours, strict=True)]
    return {
        "stock_mean": statistics.mean(stock),
        "stock_spread": statistics.stdev(stock),
        "ours_mean": statistics.mean(ours),
        "ours_spread": statistics.stdev(ours),
        "difference_mean": statistics.mean(differences),
        "difference_spread": statistics.stdev(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    losses: dict[str, list[float]] = {}
    for seed in args.seeds:
        runs = compare(demo_config(seed, args.steps, args.data_dir))
        for name, run in runs.items():
            losses.setdefault(name, []).append(run["val_loss"])
            print(f"seed {seed}  {name:40} {run['val_loss']:.4f}", flush=True)
    result = {
        "command": " ".join(["python", "-m", "benchmarks.demo_seeds", *sys.argv[1:]]),
        "machine": f"{platform.machine()} CPU, {jax.device_count()} device",
        "jax": jax.__version__,
        "seeds": args.seeds,
        "validation_loss_nats_per_byte": losses,
        **summarize(losses),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    for key, value in summarize(losses).items():
        print(f"{key:18} {value:.5f}")


if __name__ == "__main__":
    main()
