"""Every optimizer of optax and optax.contrib under ``compress``, as tables.

    python -m benchmarks.optimizer_table

Trains one small model with each optimizer, as it is and compressed, from the same seeds
on the same batches, and writes docs/optimizers.md. With words, runs only the rows whose
names have one of them, and prints those.
"""

import argparse
import functools
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_flash
from benchmarks.optimizer_cases import Case, LeftAlone, cases, left_alone

PyTree = Any

SEEDS = 3
BATCH = 64
TOKENS = 128
STREAM_STEPS = 4000
TOLERANCE = 0.005
DOCS = pathlib.Path(__file__).parents[1] / "docs"

INTRODUCTION = """\
# Optimizers

`optax_flash.compress` takes any optax transformation. This page is the output of

    python -m benchmarks.optimizer_table

which trains a model of {size:,} parameters (embedding, hidden layer, readout: it
predicts a token from the two before it) with every optimizer of `optax` and
`optax.contrib`, as it is and compressed, for {steps} steps of {batch} examples. The
loss is that of 4,096 unseen examples, {start:.2f} before training: the mean of {seeds}
seeds ± half their range. Both see the same batches. Learning rates were chosen once
for the stock optimizer. State bytes are all bytes of the state over all parameters.

The verdict is **works** where the mean loss exceeds the stock optimizer's by no more
than {tolerance:.1%} or than the range of its seeds, whichever is more.
"""

SECOND_PART = """\

## Fields left alone

Fields that `compress` does not know stay in float32, and so do those that rounding
harms. Here each is put in codes by `compress(optimizer, {{field: codec}})`. Loss: as
above, after {long_steps:,} steps. Updates: their RMS, stock → in codes, in the last 500
of {stream_steps:,} steps at fixed params, with gradients from a distribution that does
not change and whose elements' sizes are lognormal (sigma 1).

"""

NOTES = """\

- The harm grows with the steps: after 20,000
  (`python -m benchmarks.optimizer_table --long-steps 20000 ademamix`) AdEMAMix has a
  loss of 2.855 ± 0.008 as it is and of 2.863 ± 0.009 (+0.28 %) with m2 in codes.
- AMSGrad's nu is in codes by default, since the losses do not differ. Where smaller
  steps matter, `compress(optax.amsgrad(...), {"nu": None})` avoids them.
- L-BFGS keeps several arrays for each param, GaLore smaller ones. Arrays of another
  shape than their param's are compressed only where `codecs` names their field. For
  GaLore, compress the base optimizer.
- Adafactor's momentum in 4 bits, and what the rest costs: [adafactor.md](adafactor.md).
- `contrib.dpsgd` takes a gradient for each example: aggregate before `compress`.
- An unknown field is compressed when it is named, as in
  `compress(optax.contrib.prodigy(), {"grad_sum": "companded8"})`.
"""


def init_params(key: jax.Array) -> PyTree:
    shapes = {"embedding": (TOKENS, 32), "hidden": (64, 128), "readout": (128, TOKENS)}
    keys = jax.random.split(key, len(shapes))
    params = {
        name: jax.random.normal(k, shape) * (1.0 if name == "embedding" else 0.1)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params | {"bias": jnp.zeros(TOKENS)}


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """Tokens by inverse transform, from one random number each."""
    below = jnp.cumsum(jax.nn.softmax(logits), axis=-1) < uniform
    return jnp.minimum(jnp.sum(below, axis=-1), TOKENS - 1)


def sample(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Pairs of tokens and what follows. Like words, few are frequent and most rare."""
    uniform = jax.random.uniform(key, (count, 3, 1))
    log_frequency = -jnp.log(jnp.arange(1.0, TOKENS + 1))
    x = draw(log_frequency, uniform[:, :2])
    # What follows depends on both, through tables that are the same for every seed.
    tables = jax.random.normal(jax.random.key(7), (2, TOKENS, TOKENS))
    logits = log_frequency + 1.5 * (tables[0][x[:, 0]] + tables[1][x[:, 1]])
    return x, draw(logits, uniform[:, 2])


def loss_fn(params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    hidden = params["embedding"][x].reshape(len(x), -1) @ params["hidden"]
    logits = jax.nn.gelu(hidden) @ params["readout"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


evaluate = jax.jit(jax.vmap(loss_fn, (0, None)))


@functools.cache
def problem(steps: int) -> tuple[Any, Any, Any]:
    """Initial params and batches for each seed, and what the loss is measured on."""
    keys = jax.random.split(jax.random.key(0), SEEDS)

    @jax.jit
    def batches(key):
        return jax.lax.map(lambda k: sample(k, BATCH), jax.random.split(key, steps))

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(batches, keys))
    return jax.vmap(init_params)(keys), stacked, sample(jax.random.key(1), 4096)


def train(
    tx: optax.GradientTransformation, case: Case, params: PyTree, batches: Any
) -> PyTree:
    """Params after a step on each batch."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, batch):
        params, state = carry
        objective = functools.partial(loss_fn, batch=batch)
        if case.per_example:
            alone = jax.tree.map(lambda x: x[:, None], batch)
            value = jnp.zeros([])
            grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, alone)
        else:
            value, grads = jax.value_and_grad(objective)(params)
        offered = {
            "value": value,
            "grad": grads,
            "value_fn": objective,
            "obj_fn": objective,
            "grad_fn": lambda params, _: jax.grad(objective)(params),
        }
        extras = {name: offered[name] for name in case.extras}
        updates, state = tx.update(grads, state, params, **extras)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params


def final_losses(
    tx: optax.GradientTransformation, case: Case, steps: int
) -> list[float]:
    params, batches, unseen = problem(steps)
    run = jax.jit(jax.vmap(lambda p, b: train(tx, case, p, b)))
    return evaluate(run(params, batches), unseen).tolist()


def updates_rms(tx: optax.GradientTransformation) -> float:
    """The size of updates at the end of a stream of gradients, at fixed params."""
    shape = (64, 128)
    size = jnp.exp(jax.random.normal(jax.random.key(0), shape))
    mean = 0.3 * jax.random.normal(jax.random.key(1), shape)
    # The second param keeps counters from looking like the params.
    params = {
        "w": jax.random.normal(jax.random.key(2), shape),
        "b": jnp.zeros(1),
    }

    def step(state, key):
        grads = {"w": size * (mean + jax.random.normal(key, shape)), "b": jnp.zeros(1)}
        updates, state = tx.update(grads, state, params)
        return state, optax.tree.norm(updates, squared=True) / size.size

    @jax.jit
    def run(key):
        keys = jax.random.split(key, STREAM_STEPS)
        _, squares = jax.lax.scan(step, tx.init(params), keys)
        return jnp.sqrt(jnp.mean(squares[-500:]))

    return run(jax.random.key(3)).item()


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> float:
    """Bytes of the state over the number of parameters."""
    state = jax.eval_shape(tx.init, params)
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return total / sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def fields_in_codes(tx: optax.GradientTransformation, params: PyTree) -> str:
    paths = optax_flash.state_format(tx, params)["leaves"]
    # mu_1 is the second mu of one state.
    return ", ".join(sorted({re.sub(r"^.*/|_\d+$", "", path) for path in paths}))


def verdict(
    case: Case, fields: str, stock: list[float], compressed: list[float] | Exception
) -> str:
    note = f"; {case.note}" if case.note else ""
    if isinstance(compressed, Exception):
        return f"not: {type(compressed).__name__}{note}"
    if not fields:
        return f"nothing to compress{note}"
    mean = statistics.fmean(stock)
    more = statistics.fmean(compressed) - mean
    if more <= max(TOLERANCE * mean, max(stock) - min(stock)):
        return f"works{note}"
    return f"not: {more / mean:+.1%} loss{note}"


def loss_cell(losses: list[float] | Exception, stock: list[float]) -> str:
    if isinstance(losses, Exception):
        return "–"
    mean = statistics.fmean(losses)
    if not math.isfinite(mean):
        return "NaN"
    cell = f"{mean:.3f} ± {(max(losses) - min(losses)) / 2:.3f}"
    if losses is stock:
        return cell
    return f"{cell} ({mean / statistics.fmean(stock) - 1:+.2%})"


def case_row(name: str, case: Case, steps: int) -> str:
    params = jax.eval_shape(init_params, jax.random.key(0))
    compressed = case.compressed or optax_flash.compress(case.stock)
    fields = fields_in_codes(compressed, params)
    before, after = (state_bytes(tx, params) for tx in (case.stock, compressed))
    stock = final_losses(case.stock, case, steps)
    try:
        losses = final_losses(compressed, case, steps)
    except ValueError as error:
        losses = error
    return (
        f"| {name} | {fields or '–'} | {before:.2f} → {after:.2f} | "
        f"{loss_cell(stock, stock)} | {loss_cell(losses, stock)} | "
        f"{verdict(case, fields, stock, losses)} |"
    )


def left_alone_row(name: str, case: LeftAlone, steps: int) -> str:
    tx = optax_flash.compress(case.stock, case.codecs)
    stock = final_losses(case.stock, Case(case.stock), steps)
    losses = final_losses(tx, Case(case.stock), steps)
    return (
        f"| {name} | {', '.join(case.codecs)} | {case.why} | "
        f"{loss_cell(stock, stock)} | {loss_cell(losses, stock)} | "
        f"{updates_rms(case.stock):.2g} → {updates_rms(tx):.2g} |"
    )


def table(
    header: str, row: Callable[..., str], entries: Iterable[tuple[str, Any]], steps: int
) -> str:
    lines = [header, re.sub("[^|]+", "---", header)]
    for name, entry in entries:
        lines.append(row(name, entry, steps))
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="only rows that have one of these")
    parser.add_argument("--steps", type=int, default=400, help="of the first table")
    parser.add_argument("--long-steps", type=int, default=2000, help="of the second")
    args = parser.parse_args()
    start = time.perf_counter()

    def wanted(entries: dict[str, Any]) -> list[tuple[str, Any]]:
        words = args.words or [""]
        return [(n, e) for n, e in entries.items() if any(word in n for word in words)]

    first = table(
        "| optimizer | fields in codes | state bytes per parameter | final loss, stock "
        "| final loss, compressed | verdict |",
        case_row,
        wanted(cases()),
        args.steps,
    )
    second = table(
        "| optimizer | fields put in codes | because | final loss, stock "
        "| final loss, in codes | updates |",
        left_alone_row,
        wanted(left_alone()),
        args.long_steps,
    )
    print(f"{time.perf_counter() - start:.0f} s")
    if args.words:
        return
    params, _, unseen = problem(args.steps)
    numbers = {
        "size": sum(x[0].size for x in jax.tree.leaves(params)),
        "start": evaluate(params, unseen).mean().item(),
        "steps": args.steps,
        "long_steps": args.long_steps,
        "stream_steps": STREAM_STEPS,
        "batch": BATCH,
        "seeds": SEEDS,
        "tolerance": TOLERANCE,
    }
    DOCS.mkdir(exist_ok=True)
    text = INTRODUCTION.format(**numbers) + "\n" + first
    text += SECOND_PART.format(**numbers) + second + NOTES
    (DOCS / "optimizers.md").write_text(text)


if __name__ == "__main__":
    main()
