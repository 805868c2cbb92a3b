"""The first steps of every optimizer with momenta, with its state in codes.

    python -m benchmarks.first_steps

Writes benchmarks/results/first_steps.md. With words, runs only the rows whose names
have one of them, and prints those.

- The largest of ten updates, over that of the optimizer as it is. Gradients are 1/300
  but for one outlier of 1 in each group of 32.
- The loss after 50 steps without warmup, of the model of ``optimizer_table.py``: from
  its first weights; and from weights that AdamW has trained for 400 steps, on which the
  optimizer begins with a new state.
"""

import argparse
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import optax_flash
from benchmarks.optimizer_table import BATCH, evaluate, init_params, loss_fn, sample

SEEDS = 8
STEPS = 50
SHAPE = (64, 64)
RATIO = 300.0
RESULTS = pathlib.Path(__file__).parent / "results"
STORAGE = ("8 bits", "4 bits", "4 and 8 bits")
SECOND_MOMENTS = ("nu", "nu_max", "n", "sum_of_squares")

OPTIMIZERS = {
    "adabelief": (optax.adabelief, 3e-3),
    "adam": (optax.adam, 3e-3),
    "adamax": (optax.adamax, 3e-3),
    "adamw": (optax.adamw, 3e-3),
    "adan": (optax.adan, 3e-3),
    "amsgrad": (optax.amsgrad, 3e-3),
    "contrib.ademamix": (contrib.ademamix, 3e-3),
    "contrib.adopt": (contrib.adopt, 3e-3),
    "lamb": (optax.lamb, 1e-2),
    "lion": (optax.lion, 1e-3),
    "nadam": (optax.nadam, 3e-3),
    "radam": (optax.radam, 3e-3),
    "rmsprop, momentum": (functools.partial(optax.rmsprop, momentum=0.9), 5e-4),
    "sgd, momentum": (functools.partial(optax.sgd, momentum=0.9), 0.1),
    "sgd, nesterov": (functools.partial(optax.sgd, momentum=0.9, nesterov=True), 0.1),
    "yogi": (optax.yogi, 3e-3),
}
"""Those with momenta, and their learning rates."""


def make(name: str, warmup: int = 0) -> optax.GradientTransformation:
    """An optimizer as it is, after as many steps of warmup at its learning rate."""
    optimizer, rate = OPTIMIZERS[name]
    return optimizer(optax.linear_schedule(0.0, rate, warmup) if warmup else rate)


def stored(
    optimizer: optax.GradientTransformation, storage: str | None
) -> optax.GradientTransformation:
    """An optimizer with its state in codes; as it is for None.

    With 4 and 8 bits, second moments have 8.
    """
    if storage is None:
        return optimizer
    codecs: Any = "companded8" if storage == "8 bits" else "companded4"
    if storage == "4 and 8 bits":
        state = jax.eval_shape(optimizer.init, jnp.zeros(SHAPE))
        fields = [name for name in SECOND_MOMENTS if optax.tree.get(state, name, None)]
        codecs = dict.fromkeys(fields, "companded8") | {"*": "companded4"}
    return optax_flash.compress(optimizer, codecs, min_size=1024)


def largest_updates(tx: optax.GradientTransformation, steps: int = 10) -> jax.Array:
    """The largest magnitude of each of some updates, beside outliers."""
    grads = jnp.full(SHAPE, 1 / RATIO).at[:, ::32].set(1.0)

    @jax.jit
    def run() -> jax.Array:
        params = jnp.full(SHAPE, 0.02)

        def step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = tx.update(grads, state, params)
            carry = optax.apply_updates(params, updates), state
            return carry, jnp.abs(updates).max()

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1]

    return run()


def over(found: jax.Array, stock: jax.Array) -> jax.Array:
    """Ratios; where stock updates are zero, updates themselves."""
    return found / jnp.where(stock == 0, 1.0, stock)


def train(tx: optax.GradientTransformation, params: Any, key: jax.Array, steps: int):
    """Params after some steps from a new state."""

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(loss_fn)(params, sample(key, BATCH))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


@functools.cache
def beginnings() -> tuple[Any, Any, jax.Array]:
    """First weights, trained weights and keys, for each seed."""
    keys = jax.random.split(jax.random.key(0), SEEDS)
    first = jax.vmap(init_params)(keys)
    trained = jax.jit(jax.vmap(lambda p, k: train(optax.adamw(3e-3), p, k, 400)))
    return first, trained(first, keys), jax.random.split(jax.random.key(1), SEEDS)


def losses(tx: optax.GradientTransformation, seeds: int = SEEDS) -> list[jax.Array]:
    """After some steps from first and from trained weights, for each seed."""
    *weights, keys = jax.tree.map(lambda x: x[:seeds], beginnings())
    unseen = sample(jax.random.key(2), 4096)
    run = jax.jit(jax.vmap(lambda params, key: train(tx, params, key, STEPS)))
    return [evaluate(run(params, keys), unseen) for params in weights]


def rows(name: str) -> list[str]:
    """A row for each way of storing an optimizer's state."""
    optimizer = make(name)
    updates, expected = largest_updates(optimizer), losses(optimizer)
    lines = []
    for storage in STORAGE:
        tx = stored(optimizer, storage)
        ratios = over(largest_updates(tx), updates)
        cells = [f"{ratios[0]:.2f}", f"{ratios.max():.2f}"]
        for stock, found in zip(expected, losses(tx), strict=True):
            difference = 100 * (found / stock - 1)
            margin = 2 * difference.std(ddof=1) / SEEDS**0.5
            cells.append(f"{stock.mean():.4f}")
            cells.append(f"{difference.mean():+.2f} % ± {margin:.2f}")
        lines.append(f"| {name} | {storage} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="only rows that have one of these")
    words = parser.parse_args().words
    names = [n for n in OPTIMIZERS if not words or any(word in n for word in words)]
    lines = [line for name in names for line in rows(name)]
    if words:
        return
    header = (
        "| optimizer | state | first update | largest of ten | loss from first weights "
        "| in codes | loss from trained weights | in codes |"
    )
    rule = "|" + "---|" * 2 + "---:|" * 6
    (RESULTS / "first_steps.md").write_text("\n".join([header, rule, *lines]) + "\n")


if __name__ == "__main__":
    main()
