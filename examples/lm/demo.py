"""The same GPT twice: optax.adamw on float32 weights, then 8-bit AdamW on split ones.

    python -m examples.lm.demo --out runs/demo

Seed, data, schedule and model are the same; only the storage of the weights and of the
optimizer's state differs. Ends with a table of live bytes and of held-out losses, a
picture of the losses, and the numbers as JSON.
"""

import argparse
import dataclasses
import json
import math
import operator
import pathlib
import time

from rich.console import Console
from rich.table import Table

from examples.common.plots import draw_losses
from examples.lm.train import Config, train

RUNS = {
    "optax.adamw, float32 weights": dict(optimizer="adamw", param_dtype="float32"),
    "optax_flash.adamw8, bfloat16 + 8 bits": dict(
        optimizer="adamw8", param_dtype="bfloat16", master_bits=24
    ),
}


def demo_config(seed: int = 0, steps: int = 400, data_dir: str = "data") -> Config:
    """What the demo trains: sized to end within minutes on two CPU cores."""
    return Config(
        seed=seed,
        steps=steps,
        warmup=steps // 10,
        eval_every=math.ceil(steps / 10),
        data_dir=data_dir,
    )


def compare(config: Config, texts=None, console: Console | None = None) -> dict:
    """Trains as the config says, once for each of RUNS; returns their numbers by name.

    "bytes" are those of the live arrays in a step, gradients among them.
    """
    runs = {}
    for name, options in RUNS.items():
        if console:
            console.print(name)
        _, history, summary = train(
            dataclasses.replace(config, **options), texts, console=console
        )
        runs[name] = {**summary, "history": history}
    return runs


def table(runs: dict[str, dict]) -> Table:
    """The comparison: one column for each run."""
    table = Table(title="The same training, stored in two ways")
    table.add_column()
    for name in runs:
        table.add_column(name.replace(", ", "\n"), justify="right")

    def add(label, numbers, **kwargs):
        table.add_row(label, *numbers, **kwargs)

    def per_parameter(count):
        return [
            f"{count(run['bytes']) / run['parameters']:.3f}" for run in runs.values()
        ]

    def each(key, form):
        return [format(run[key], form) for run in runs.values()]

    for part in ("weights", "residual", "optimizer state", "gradients"):
        add(f"{part}, bytes per parameter", per_parameter(operator.itemgetter(part)))
    total = per_parameter(lambda parts: sum(parts.values()))
    add("total, bytes per parameter", total, style="bold", end_section=True)
    add("validation loss, nats per byte", each("val_loss", ".4f"), style="bold")
    bits = [run["metrics"]["bits_per_byte"] for run in runs.values()]
    add("validation loss, bits per byte", [f"{number:.4f}" for number in bits])
    add("seconds in train steps", each("seconds", ".1f"))
    add("tokens per second", each("units_per_second", ",.0f"))
    return table


def plot(runs: dict[str, dict], path: pathlib.Path) -> None:
    """The losses of all runs."""
    parameters = next(iter(runs.values()))["parameters"]
    draw_losses(
        {name: run["history"] for name, run in runs.items()},
        path,
        title=f"A GPT of {parameters / 1e6:.1f} M parameters on Shakespeare",
        unit="nats per byte",
    )


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="runs/demo")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args(args)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    clock = time.perf_counter()

    config = demo_config(args.seed, args.steps, args.data_dir)
    runs = compare(config, console=console)
    console.print(table(runs))
    plot(runs, out / "lm_demo.png")
    (out / "lm_demo.json").write_text(json.dumps(runs, indent=2) + "\n")
    console.print(f"Took {time.perf_counter() - clock:.0f} s in all. Written:")
    for name in ("lm_demo.png", "lm_demo.json"):
        console.print(str(out / name), soft_wrap=True)


if __name__ == "__main__":
    main()
