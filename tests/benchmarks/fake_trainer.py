"""A trainer without training, which can go wrong in every way that a run can."""

import errno
import os
import pathlib
import signal
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

from examples.common.config import Config as Common
from examples.common.config import option

MOODS = ["well", "nan", "rising", "wrong", "killed", "full"]


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    mood: str = option("well", "what happens at half of the steps", choices=MOODS)
    pause: float = option(0.0, "seconds a step")
    diary: str = option("", "file of what was done")


class Result(NamedTuple):
    state: None
    history: list
    summary: dict


def train(config, data=None, *, console=None, watch=None):
    folder = pathlib.Path(config.out)
    saved = [int(path.name) for path in folder.glob("checkpoints/*")]
    start = max(saved, default=0) if config.resume else 0
    if config.diary:
        with open(config.diary, "a") as file:
            file.write(f"{config.optimizer} {config.seed} {start}\n")
    history, stopped = [], None
    for step in range(1, config.steps + 1):
        row = {"step": step, "loss": 5 * 0.9**step + config.seed, "grad_norm": 1.0}
        if 2 * step >= config.steps and config.mood != "well":
            misbehave(config.mood, row)
        if step == config.steps:
            row["val_loss"] = row["loss"]
        history.append(row)
        if step <= start:
            continue
        time.sleep(config.pause)
        if step % config.save_every == 0:
            (folder / "checkpoints" / str(step)).mkdir(parents=True)
        if stopped := watch and watch(row):
            break
    losses = [row["loss"] for row in history]
    summary = {
        "config": asdict(config),
        "parameters": 10,
        "bytes": {"weights": 40, "optimizer state": 80},
        "peak_bytes": {"live": 120, "compiled": None, "allocator": None},
        "checkpoint_bytes": 100,
        "seconds": 2.0,
        "steps": len(history) - start,
        "units": "tokens",
        "units_per_second": 3.0,
        "train_loss": losses[-1],
        "val_loss": losses[-1],
        "metrics": {"perplexity": 2.0},
        "gradient_norm": 1.0,
        "nonfinite": 0,
        "diverged": not losses[-1] <= losses[0],
        "stopped": stopped,
    }
    return Result(None, history, summary)


def misbehave(mood, row):
    if mood == "nan":
        row["loss"] = float("nan")
    elif mood == "rising":
        row["loss"] = 100.0 + row["step"]
    elif mood == "wrong":
        raise RuntimeError("the weights have left\nand did not say where to")
    elif mood == "killed":
        print("all was well", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    elif mood == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
