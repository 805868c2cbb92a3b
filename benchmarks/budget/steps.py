"""What a step costs, on a CPU: update and apply_updates, without the model.

    python -m benchmarks.budget.steps

All conditions in one process, in turns, each a jitted function that donates params and
state. Writes budget_steps.json: medians of the rounds, and ratios to float32 AdamW of
the same round.
"""

import argparse
import functools
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import summaries, workloads
from benchmarks.quality.conditions import Condition

from .conditions import conditions

CALLS = 10


def stepper(condition: Condition, weights: optax.Params) -> Callable[[], None]:
    """A function that takes some steps and waits for the last."""
    tx = condition.transformation(optax.constant_schedule(1e-3))
    # A copy, for the step writes over its params.
    params = jax.tree.map(lambda w: jnp.array(w, condition.params), weights)
    grads = jax.tree.map(lambda w: (0.1 * w).astype(condition.params), weights)
    state = tx.init(params)

    # Returned in the order of the arguments, in which jax hands out donated buffers:
    # in another order float32 optimizers take several times as long.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    carry = [params, state]

    def run() -> None:
        for _ in range(CALLS):
            carry[:] = step(*carry, grads)
        jax.block_until_ready(carry)

    return run


def measure(
    chosen: Sequence[Condition], weights: optax.Params, rounds: int
) -> dict[str, Any]:
    """Milliseconds of a step and ratios to the first condition's, by name."""
    steppers = {condition.name: stepper(condition, weights) for condition in chosen}
    for run in steppers.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, run in steppers.items():
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) / CALLS)
    reference = seconds[chosen[0].name]
    return {
        name: {
            "median_ms": 1e3 * statistics.median(own),
            "median_ratio": statistics.median(
                x / y for x, y in zip(own, reference, strict=True)
            ),
        }
        for name, own in seconds.items()
    }


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget.steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, default=summaries.RESULTS)
    options = parser.parse_args(args)
    found = measure(conditions(), workloads.gpt().init(0), options.rounds)
    content = {
        "command": "python -m benchmarks.budget.steps",
        "machine": f"{platform.machine()} CPU, {jax.device_count()} device",
        "jax": jax.__version__,
        "steps": found,
    }
    path = options.out / "budget_steps.json"
    summaries.write(path, content)
    for name, row in found.items():
        print(f"{name:45} {row['median_ms']:8.2f} ms  {row['median_ratio']:6.2f} x")


if __name__ == "__main__":
    main()
