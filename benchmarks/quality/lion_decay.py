"""How much of Lion's weight decay survives the rounding of split weights?

    python -m benchmarks.quality.lion_decay

All of Lion's steps have the size of the learning rate. A weight that is rounded to
nearest after each starts from the grid of its codes every time, so the same step is
rounded in the same way for ever, and a decay that is too small to change that rounding
never happens. Adam's steps vary, which acts like a dither. Here weights of a normal
distribution take random steps of either sort, with and without decay, in float32 and
split; the share of the decay that happened is printed and written to
benchmarks/results/lion_decay.json.
"""

import argparse
import pathlib
import platform
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_flash
from benchmarks import summaries

SHAPE = (256, 256)
SPREAD = 0.05  # of the first weights
DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0)


def steps_of(sort: str, key: jax.Array) -> jax.Array:
    """Random steps whose mean square is 1: "equal" as Lion's, "varying" as Adam's."""
    if sort == "equal":
        return jnp.sign(jax.random.normal(key, SHAPE))
    return jax.random.normal(key, SHAPE)


def walk(
    sort: str, codec: str | None, learning_rate: float, decay: float, steps: int
) -> jax.Array:
    """The weights after steps of a sort, all from the same ones and the same steps."""
    tx = optax.chain(
        optax.add_decayed_weights(decay), optax.scale_by_learning_rate(learning_rate)
    )
    weights = SPREAD * jax.random.normal(jax.random.key(0), SHAPE)
    weights = optax_flash.cast_params({"w": weights}, jnp.bfloat16)
    if codec is None:
        params = jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    else:
        params = weights
        tx = optax_flash.master_weights(tx, codec=codec)

    @jax.jit
    def run(params, state):
        def body(i, carry):
            params, state = carry
            step = steps_of(sort, jax.random.fold_in(jax.random.key(1), i))
            updates, state = tx.update({"w": step}, state, params)
            return optax.apply_updates(params, updates), state

        params, state = jax.lax.fori_loop(0, steps, body, (params, state))
        if codec is None:
            return params
        return optax_flash.master_params(state, params)

    return run(params, tx.init(params))["w"]


def surviving(
    sort: str, codec: str, learning_rate: float, decay: float, steps: int
) -> float:
    """The share of the float32 decay that happened, in the mean over the weights.

    Both movements against the weights without decay are projected on those weights.
    """
    free = walk(sort, None, learning_rate, 0.0, steps)
    right = walk(sort, None, learning_rate, decay, steps)
    ours = walk(sort, codec, learning_rate, decay, steps)
    return float(jnp.vdot(free - ours, free) / jnp.vdot(free - right, free))


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| steps | residual | " + " | ".join(f"decay {d:g}" for d in DECAYS) + " |",
        "| --- | --- |" + " ---: |" * len(DECAYS),
    ]
    for row in found:
        shares = " | ".join(f"{100 * x:.0f} %" for x in row["surviving"])
        lines.append(f"| {row['steps']} | {row['codec']} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.lion_decay",
        description=__doc__.split("\n")[0],
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=pathlib.Path, default=summaries.RESULTS)
    options = parser.parse_args()
    found = [
        {
            "steps": sort,
            "codec": codec,
            "surviving": [
                surviving(sort, codec, options.learning_rate, decay, options.steps)
                for decay in DECAYS
            ],
        }
        for sort in ("equal", "varying")
        for codec in ("flashoptim", "exact")
    ]
    content = {
        "command": "python -m benchmarks.quality.lion_decay "
        f"--learning-rate {options.learning_rate:g} --steps {options.steps}",
        "machine": f"{platform.machine()} CPU",
        "jax": jax.__version__,
        "decays": DECAYS,
        "found": found,
    }
    path = options.out / "lion_decay.json"
    summaries.write(path, content)
    print(table(found))


if __name__ == "__main__":
    main()
