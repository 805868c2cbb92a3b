"""The same GPT-2 with optax.adamw and with adamw8, for so many minutes in all.

    python -m examples.lm.gpu_train --minutes 8 --out runs/gpu_train

Each contender trains in a process of its own, so that the allocator's peak is its own,
for the same number of steps: as many as the slower one can take, by a short trial of
both. Ends with losses, tokens per second and peak memory side by side, and as JSON.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

CONFIG = pathlib.Path(__file__).parent / "gpt2_124m.toml"
CONTENDERS = {
    "optax.adamw, float32": ["--optimizer", "adamw", "--param-dtype", "float32"],
    "adamw8, bfloat16 + 8 bits": ["--optimizer", "adamw8"],
}
TRIAL = 30  # steps
SHARE = 0.75  # of the time for training, what is left for starting and compiling


def train(
    options: Sequence[str], out: pathlib.Path, config: pathlib.Path, steps: int
) -> dict:
    """Trains in a new process; returns the run's summary."""
    summary = out / "summary.json"
    if not summary.exists():
        line = [sys.executable, "-m", "examples.lm.train", "--config", str(config)]
        sizes = {
            "--steps": steps,
            "--warmup": steps // 20,
            "--eval-every": math.ceil(steps / 4),
            "--save-every": steps,
            "--out": out,
        }
        line += [str(x) for pair in sizes.items() for x in pair]
        if subprocess.run([*line, *options]).returncode:
            raise SystemExit(f"training {out.name} failed; its messages are above")
    return json.loads(summary.read_text())


def compare(out: pathlib.Path, config: pathlib.Path, minutes: float) -> dict:
    """Both contenders' summaries by name."""
    names = {name: name.split(",")[0] for name in CONTENDERS}
    trials = [
        train(options, out / "trial" / names[name], config, TRIAL)
        for name, options in CONTENDERS.items()
    ]
    # The first steps of a process are slower, so this is rather too few than too many.
    slowest = max(trial["seconds"] / trial["steps"] for trial in trials)
    seconds = SHARE * 60 * minutes / len(CONTENDERS)
    steps = max(TRIAL, int(seconds / slowest))
    return {
        name: train(options, out / names[name], config, steps)
        for name, options in CONTENDERS.items()
    }


def table(runs: dict[str, dict]) -> Table:
    """The comparison: one column for each run."""
    some = next(iter(runs.values()))
    title = f"{some['parameters'] / 1e6:.0f} M parameters, {some['steps']:,} steps"
    table = Table(title=title)
    table.add_column()
    for name in runs:
        table.add_column(name.replace(", ", "\n"), justify="right")

    def add(label, get, form, scale=1):
        found = [get(run) for run in runs.values()]
        table.add_row(
            label, *("-" if x is None else f"{x / scale:{form}}" for x in found)
        )

    add("train loss, nats per byte", lambda run: run["train_loss"], ".4f")
    add("validation loss", lambda run: run["val_loss"], ".4f")
    add("tokens per second", lambda run: run["units_per_second"], ",.0f")
    peaks = {"live": "live arrays", "compiled": "XLA", "allocator": "allocator"}
    for key, what in peaks.items():
        label = f"peak memory, GB, by {what}"
        add(label, lambda run, key=key: run["peak_bytes"][key], ".3f", scale=1e9)
    add("checkpoint, GB", lambda run: run["checkpoint_bytes"], ".3f", scale=1e9)
    return table


def main(args: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="for all of it")
    parser.add_argument("--config", type=pathlib.Path, default=CONFIG)
    parser.add_argument("--out", type=pathlib.Path, default="runs/gpu_train")
    args = parser.parse_args(args)
    runs = compare(args.out, args.config, args.minutes)
    console = Console(width=100)
    console.print(table(runs))
    file = args.out / "gpu_train.json"
    file.write_text(json.dumps(runs, indent=2) + "\n")
    console.print(f"Written: {file}")


if __name__ == "__main__":
    main()
