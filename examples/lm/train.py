"""Trains a small GPT on Shakespeare's bytes with any optimizer of optimizers.py.

    python examples/lm/train.py --optimizer adamw8 --out runs/first

As a function: train(TrainConfig(...)) -> Result. Every number a run produces follows
from its config; an interrupted run that resumes repeats the uninterrupted one bit for
bit.
"""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from checkpoint import RunFolder
from data import batches, prepare
from flax.training.train_state import TrainState
from memory import live_bytes
from model import GPT, GPTConfig
from optimizers import OPTIMIZERS, make_optimizer
from rich import progress
from rich.console import Console

import optax_flash.flax

LOG_EVERY = 10  # steps between two looks at the losses; in between, nothing waits


def option(default, help, **kwargs):
    """A field of TrainConfig that is also an option of the command line."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


def bits_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    optimizer: str = option("adamw8", "which optimizer", choices=list(OPTIMIZERS))
    learning_rate: float | None = option(
        None, "the schedule's peak; the optimizer's own default if left out", type=float
    )
    weight_decay: float = option(0.1, "for the optimizers that have it; matrices only")
    warmup: int = option(50, "steps of linear warmup, before the cosine decay")
    steps: int = option(500, "planned steps: the schedule ends here")
    batch_size: int = option(8, "windows a step")
    seq_len: int = option(128, "bytes predicted in each window")
    depth: int = option(3, "layers")
    width: int = option(256, "features; a multiple of 32 * heads")
    heads: int = option(4, "attention heads")
    param_dtype: str = option(
        "bfloat16",
        "how weights are stored; norms stay float32",
        choices=["float32", "bfloat16"],
    )
    master_bits: int | None = option(
        24,
        "bits of a bfloat16 weight together with its residual: 24, 32, or none for no "
        "residual",
        type=bits_or_none,
        choices=[24, 32, None],
        metavar="{24,32,none}",
    )
    compute_dtype: str = option(
        "float32", "what the model computes in", choices=["float32", "bfloat16"]
    )
    seed: int = option(0, "of the first weights and of the order of the data")
    eval_every: int = option(100, "steps between two validation losses")
    eval_batches: int = option(16, "batches of held-out windows, always the same ones")
    report_every: int = option(
        100, "steps between two looks at codes and at the size of steps; 0 for none"
    )
    out: str | None = option(
        None,
        "folder for checkpoints, metrics.jsonl and summary.json; nothing is written if "
        "left out",
        type=str,
    )
    save_every: int = option(100, "steps between two checkpoints")
    resume: bool = option(
        False, "go on from the newest checkpoint in --out; repeat all other options"
    )
    stop_at: int | None = option(
        None, "stop early, after this step, as if interrupted", type=int
    )
    data_dir: str = option("data", "where the dataset is prepared, once")


class Result(NamedTuple):
    state: TrainState
    # A row a step: step, loss, and at times val_loss and numerics.
    history: list[dict[str, Any]]
    summary: dict[str, Any]  # what summary.json holds


def init_state(config: TrainConfig) -> TrainState:
    """The state before the first step, with the weights stored as the config asks."""
    model = GPT(
        GPTConfig(
            depth=config.depth,
            width=config.width,
            heads=config.heads,
            compute_dtype=jnp.dtype(config.compute_dtype),
        )
    )
    tx = make_optimizer(
        config.optimizer,
        steps=config.steps,
        warmup=config.warmup,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    dtype = jnp.dtype(config.param_dtype)

    @jax.jit  # one program, and so every leaf has a buffer of its own to donate
    def create(key):
        tokens = jnp.zeros((1, config.seq_len), jnp.int32)
        params = model.init(key, tokens)["params"]
        if dtype == jnp.bfloat16 and config.master_bits is not None:
            return optax_flash.flax.TrainState.create(
                apply_fn=model.apply,
                params=params,
                tx=tx,
                param_dtype=dtype,
                bits=config.master_bits,
            )
        params = optax_flash.cast_params(params, dtype, optax_flash.flax.is_norm)
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    return create(jax.random.key(config.seed))


def weights(state: TrainState):
    """The weights at full precision: the split ones joined, any others as they are."""
    split = isinstance(state, optax_flash.flax.TrainState)
    return state.fp32_params() if split else state.params


def loss_fn(params, apply_fn, tokens):  # tokens: (B, T + 1) uint8 -> nats per byte
    logits = apply_fn({"params": params}, tokens[:, :-1])  # (B, T, 256)
    targets = tokens[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state, tokens):
    """One update in place: the old state's memory becomes the new state's."""
    loss, grads = jax.value_and_grad(loss_fn)(state.params, state.apply_fn, tokens)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def eval_step(state, tokens):
    return loss_fn(weights(state), state.apply_fn, tokens)


@jax.jit
def report_step(state, tokens):
    """How the state is stored, and what another step on these tokens would be."""
    grads = jax.grad(loss_fn)(state.params, state.apply_fn, tokens)
    return optax_flash.numerics_report(state.tx, state.opt_state, state.params, grads)


def held_out_batches(source, config: TrainConfig) -> list:
    """The same held-out windows for every run, whatever its seed."""
    count = min(config.eval_batches, math.ceil(len(source) / config.batch_size))
    shuffled = batches(source, config.batch_size, seed=0)
    return [shuffled[i] for i in range(count)]


def progress_bar(console: Console | None) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeRemainingColumn(),
        console=console,
        disable=console is None,
    )


def train(
    config: TrainConfig,
    texts: Mapping[str, bytes] | None = None,
    *,
    console: Console | None = None,
) -> Result:
    """Trains as the config says, on Shakespeare unless other texts are given.

    Shows its progress on the console, if there is one.
    """
    sources = prepare(config.seq_len, config.data_dir, texts)
    data = batches(sources["train"], config.batch_size, config.seed)
    held_out = held_out_batches(sources["validation"], config)
    state = init_state(config)

    folder, start, history = None, 0, []
    if config.out:
        folder = RunFolder(config.out, state, resume=config.resume)
    if config.resume:
        start, history = folder.latest, folder.restore_log()
        state = folder.restore(state)
    stop = config.steps if config.stop_at is None else config.stop_at

    # Compiled ahead of the loop, so that the clock sees nothing but steps.
    step_fn = train_step.lower(state, data[start]).compile()
    seconds, pending, clock = 0.0, [], time.perf_counter()
    with progress_bar(console) as bar:
        task = bar.add_task(config.optimizer, total=stop, completed=start, note="")
        for step in range(start + 1, stop + 1):  # so many steps are done after this one
            state, loss = step_fn(state, data[step - 1])
            pending.append((step, loss))
            eval_now = step % config.eval_every == 0 or step == config.steps
            save_now = step % config.save_every == 0 or step == stop
            report_now = config.report_every and step % config.report_every == 0
            if not (eval_now or save_now or report_now or step % LOG_EVERY == 0):
                continue  # without waiting for the device
            rows = [{"step": at, "loss": float(loss)} for at, loss in pending]
            seconds += time.perf_counter() - clock
            if eval_now:
                losses = [float(eval_step(state, tokens)) for tokens in held_out]
                rows[-1]["val_loss"] = sum(losses) / len(losses)
            if report_now:
                report = report_step(state, data[step - 1])
                report.warn()  # of leaves for which the learning rate is too small
                rows[-1]["numerics"] = jax.tree.map(float, report)._asdict()
            history += rows
            if folder:
                folder.log(rows)
                if save_now:
                    folder.save(step, state)
            rate = (step - start) * config.batch_size * config.seq_len / seconds
            note = f"loss {rows[-1]['loss']:.3f}  {rate:,.0f} tokens/s"
            bar.update(task, completed=step, note=note)
            pending, clock = [], time.perf_counter()

    summary = summarize(config, state, history, seconds, stop - start)
    if folder:
        folder.close(summary)
    return Result(state, history, summary)


def summarize(config, state, history, seconds, steps) -> dict[str, Any]:
    """What a run came to; losses are nats per byte.

    `seconds` is what `steps` train steps took since the start or the resumption,
    without compilation, evaluation and saving. The last train losses are averaged,
    because the loss of a single batch is noisy.
    """
    measured = [row["val_loss"] for row in history if "val_loss" in row]
    last = [row["loss"] for row in history[-20:]]
    tokens = steps * config.batch_size * config.seq_len
    return {
        "config": dataclasses.asdict(config),
        "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
        "bytes": live_bytes(state),
        "train_loss": sum(last) / len(last),
        "val_loss": measured[-1] if measured else None,
        "val_bits_per_byte": measured[-1] / math.log(2) if measured else None,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if steps else None,
    }


def parse(args: Sequence[str] | None = None) -> TrainConfig:
    """The command line: one option for each field of TrainConfig."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(TrainConfig):
        kwargs = {"default": field.default, **field.metadata}
        if isinstance(field.default, bool):
            kwargs["action"] = "store_true"
        else:
            kwargs.setdefault("type", type(field.default))
        parser.add_argument("--" + field.name.replace("_", "-"), **kwargs)
    config = TrainConfig(**vars(parser.parse_args(args)))
    if config.resume and config.out is None:
        parser.error("--resume needs the --out of the run to resume")
    return config


def main():
    console = Console()
    result = train(parse(), console=console)
    console.print_json(data={k: v for k, v in result.summary.items() if k != "config"})


if __name__ == "__main__":
    main()
