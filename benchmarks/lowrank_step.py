"""Seconds of an optimizer's step on the shapes of the demo's GPT.

python benchmarks/lowrank_step.py adamw8 lora_pre_adamw
"""

import argparse
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import optax

import optax_flash

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples" / "lm"))
from model import GPT, GPTConfig  # noqa: E402

RANK = 0.25
CONTENDERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "adamw8": lambda: optax_flash.adamw8(1e-3),
    "lora_pre_adamw": lambda: optax_flash.lora_pre_adamw(1e-3, RANK),
    "muon": lambda: optax.contrib.muon(1e-3),
    "lora_pre_muon": lambda: optax_flash.lora_pre_muon(1e-3, RANK),
}


def measure(make, params, steps):
    """The fastest of some steps, in seconds."""
    tx = make()
    grads = jax.tree.map(lambda p: p + 0.01, params)
    state = tx.init(params)

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(grads, state, params))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*CONTENDERS, []])
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    model = GPT(GPTConfig())
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    size = sum(p.size for p in jax.tree.leaves(params))
    for name in args.names or CONTENDERS:
        seconds = measure(CONTENDERS[name], params, args.steps)
        print(f"{name}: {1e3 * seconds:.1f} ms, {1e9 * seconds / size:.1f} ns a param")


if __name__ == "__main__":
    main()
