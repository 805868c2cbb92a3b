"""The same GPT twice: optax.adamw on float32 weights, then 8-bit AdamW on split ones.

    python examples/lm/demo.py --out runs/demo

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

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from memory import count_bytes
from rich.console import Console
from rich.table import Table
from train import TrainConfig, loss_fn, train

RUNS = {
    "optax.adamw, float32 weights": dict(optimizer="adamw", param_dtype="float32"),
    "optax_flash.adamw8, bfloat16 + 8 bits": dict(
        optimizer="adamw8", param_dtype="bfloat16", master_bits=24
    ),
}


def demo_config(seed: int = 0, steps: int = 400, data_dir: str = "data") -> TrainConfig:
    """What the demo trains: sized to end within minutes on two CPU cores."""
    return TrainConfig(
        seed=seed,
        steps=steps,
        warmup=steps // 10,
        eval_every=math.ceil(steps / 10),
        data_dir=data_dir,
    )


def compare(config: TrainConfig, texts=None, console: Console | None = None) -> dict:
    """Trains as the config says, once for each of RUNS; returns their numbers by name.

    "bytes" are those of the live arrays after the last step, gradients among them.
    """
    runs = {}
    for name, options in RUNS.items():
        if console:
            console.print(name)
        state, history, summary = train(
            dataclasses.replace(config, **options), texts, console=console
        )
        tokens = jnp.zeros((config.batch_size, config.seq_len + 1), jnp.uint8)
        grads = jax.jit(jax.grad(loss_fn), static_argnums=1)(
            state.params, state.apply_fn, tokens
        )
        parts = {**summary["bytes"], "gradients": count_bytes(grads)}
        runs[name] = {**summary, "bytes": parts, "history": history}
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
    add("validation loss, bits per byte", each("val_bits_per_byte", ".4f"))
    add("seconds in train steps", each("seconds", ".1f"))
    add("tokens per second", each("tokens_per_second", ",.0f"))
    return table


def plot(runs: dict[str, dict], path: pathlib.Path) -> None:
    """The losses of all runs; train losses are averaged over a twentieth of a run."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for (name, run), color, line in zip(
        runs.items(), ["tab:blue", "tab:orange"], ["-", "--"], strict=True
    ):
        steps = [row["step"] for row in run["history"]]
        losses = [row["loss"] for row in run["history"]]
        span = math.ceil(len(losses) / 20)
        smooth = np.convolve(losses, np.ones(span) / span, mode="valid")
        axes.plot(
            steps[span - 1 :],
            smooth,
            line,
            color=color,
            alpha=0.5,
            label=f"train: {name}",
        )
        measured = [row for row in run["history"] if "val_loss" in row]
        axes.plot(
            [row["step"] for row in measured],
            [row["val_loss"] for row in measured],
            line,
            marker="o",
            color=color,
            linewidth=2,
            label=f"validation: {name}, last {run['val_loss']:.3f}",
        )
    axes.set_xlabel("step", fontsize=13)
    axes.set_ylabel("loss, nats per byte", fontsize=13)
    parameters = next(iter(runs.values()))["parameters"]
    axes.set_title(f"A GPT of {parameters / 1e6:.1f} M parameters on Shakespeare")
    axes.set_ylim(top=min(4.0, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=11)
    figure.savefig(path, dpi=120)


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
