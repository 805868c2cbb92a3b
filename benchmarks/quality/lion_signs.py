"""How often does a stored momentum flip Lion's signs, and do the flips add up?

    python -m benchmarks.quality.lion_signs

Trains with float32 Lion and gives its gradients to Lions with their momentum in codes,
which move nothing. Every step tells where their signs differ from those of the float32
momentum. Writes benchmarks/results/lion_signs.json and prints its table.
"""

import argparse
import dataclasses
import math
import pathlib
import platform
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_flash
from benchmarks import summaries, workloads
from benchmarks.workloads import Workload
from optax_flash import Codec, Companded4, Companded8, FlashOptim8

from .conditions import LEARNING_RATES

WINDOWS = 10
PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest8(Companded8):
    """The default codec, but rounded to nearest: tells rounding from scales."""

    name = "nearest8"

    def codes(self, x, scales, maxima, bits):
        del bits
        return super().codes(x, scales, maxima, None)


class Variant(NamedTuple):
    """A codec, and what the gradients are multiplied by before they come to it.

    Lion's signs do not depend on the size of the gradients; their codes may.
    """

    codec: Codec
    gradients: float = 1.0


VARIANTS = {
    "flashoptim": Variant(FlashOptim8()),
    "flashoptim, gradients / 1,000": Variant(FlashOptim8(), 1e-3),
    "default, rounded to nearest": Variant(Nearest8()),
    "default": Variant(Companded8()),
    "default, gradients / 1,000": Variant(Companded8(), 1e-3),
    "4 bits": Variant(Companded4()),
}


def signs(codec: Codec | None) -> optax.GradientTransformation:
    """Lion that neither scales nor decays: its updates are -1, 0 and 1."""
    if codec is None:
        return optax.lion(1.0, weight_decay=0.0)
    return optax_flash.lion8(1.0, weight_decay=0.0, codecs=codec)


def momentum(state: optax.OptState, codec: Codec | None, params: PyTree) -> PyTree:
    """The momentum in float32."""
    mu = optax.tree.get(state, "mu")
    if codec is None:
        return mu

    def decode(mu, scales, param):
        is_coded = mu.dtype == jnp.uint8
        return codec.decode(mu, scales, param.shape) if is_coded else mu

    return jax.tree.map(decode, mu, state.scales["mu_scales"], params)


def compare(
    workload: Workload, learning_rate: float, steps: int, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Follows all variants through one training.

    Returns:
      For each variant and kind of leaf ("all" too), as lists over WINDOWS parts of the
      training but for the drift, which is at its end:

      - "flipped": the share of signs that are not those of float32 momentum.
      - "still flipped": the share of these that was flipped a step before, too.
      - "float32 momentum": its RMS.
      - "momentum": its RMS over that.
      - "zero": the share of elements whose momentum decodes to 0.
      - "drift": with the schedule's rates, the RMS of the sum of all differences over
        the RMS of the sum of all float32 steps: how wrong the weights would go.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 10), steps
    )
    clip = optax.clip_by_global_norm(1.0)
    train = optax.lion(
        schedule,
        weight_decay=0.3,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    params = workload.init(seed)
    paths = [
        "/".join(str(key.key) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    sizes = np.array([p.size for p in jax.tree.leaves(params)])
    large = sizes >= 4096
    kinds = np.array([workload.kind(path) for path in paths])
    transformations = {name: signs(x.codec) for name, x in VARIANTS.items()}

    def per_leaf(function: Callable[..., jax.Array], *trees: PyTree) -> jax.Array:
        return jnp.stack(jax.tree.leaves(jax.tree.map(function, *trees)))

    @jax.jit
    def step(params, state, reference, coded, at, batch):
        grads = jax.grad(workload.loss)(params, batch)
        grads, _ = clip.update(grads, clip.init(params))
        updates, new_state = train.update(grads, state, params)
        rate = schedule(at)
        right, shadow = signs(None).update(grads, reference["state"], params)
        moved = jax.tree.map(lambda d, u: d + rate * u, reference["moved"], right)
        exact = momentum(shadow, None, params)
        power = per_leaf(lambda m: jnp.sum(m * m), exact)
        measured, new_coded = {}, {}
        for name, (codec, factor) in VARIANTS.items():
            old = coded[name]
            scaled = jax.tree.map(lambda g, factor=factor: factor * g, grads)
            ours, own = transformations[name].update(scaled, old["state"], params)
            differs = jax.tree.map(lambda a, b: a != b, ours, right)
            drift = jax.tree.map(
                lambda d, a, b: d + rate * (a - b), old["drift"], ours, right
            )
            m = momentum(own, codec, params)
            measured[name] = {
                "flipped": per_leaf(jnp.sum, differs),
                "again": per_leaf(lambda a, b: jnp.sum(a & b), differs, old["differs"]),
                "power": per_leaf(lambda m: jnp.sum(m * m), m) / factor**2,
                "float32 power": power,
                "zero": per_leaf(lambda m: jnp.sum(m == 0), m),
                "drift": per_leaf(lambda d: jnp.sum(d * d), drift),
                "moved": per_leaf(lambda d: jnp.sum(d * d), moved),
            }
            new_coded[name] = {"state": own, "differs": differs, "drift": drift}
        params = optax.apply_updates(params, updates)
        reference = {"state": shadow, "moved": moved}
        return params, new_state, reference, new_coded, measured

    state = train.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    reference = {"state": signs(None).init(params), "moved": zeros}
    coded = {
        name: {
            "state": tx.init(params),
            "differs": jax.tree.map(lambda z: z != 0, zeros),
            "drift": zeros,
        }
        for name, tx in transformations.items()
    }
    history = []
    for at in range(steps):
        params, state, reference, coded, measured = step(
            params, state, reference, coded, at, workload.batch(seed, at)
        )
        history.append(measured)
    history = jax.tree.map(lambda *x: np.array(x, np.float64), *jax.device_get(history))
    groups = {"all": large} | {
        kind: large & (kinds == kind) for kind in dict.fromkeys(kinds[large])
    }
    return {
        name: {
            kind: _shares(
                {key: x[:, which] for key, x in history[name].items()}, sizes[which]
            )
            for kind, which in groups.items()
        }
        for name in VARIANTS
    }


def _shares(sums: Mapping[str, np.ndarray], sizes: np.ndarray) -> dict[str, Any]:
    """The measures of some leaves from sums over each, (steps, leaves)."""

    def windows(name: str) -> np.ndarray:
        parts = np.array_split(sums[name].sum(axis=1), min(WINDOWS, len(sums[name])))
        return np.array([part.mean() for part in parts])

    total = sizes.sum()
    flipped = windows("flipped")
    last = {name: x[-1].sum() for name, x in sums.items()}
    return {
        "flipped": list(flipped / total),
        "still flipped": list(windows("again") / np.maximum(flipped, 1e-9)),
        "float32 momentum": list(np.sqrt(windows("float32 power") / total)),
        "momentum": list(np.sqrt(windows("power") / windows("float32 power"))),
        "zero": list(windows("zero") / total),
        "drift": math.sqrt(last["drift"] / last["moved"]),
    }


def table(found: Mapping[str, Any]) -> str:
    lines = [
        "| workload | momentum | leaves | signs flipped, first and last tenth, % | "
        "still flipped a step later, % | momentum's RMS to float32's, last tenth | "
        "decodes to 0, last tenth, % | drift, % of the movement |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for workload, variants in found.items():
        for variant, kinds in variants.items():
            for kind, x in kinds.items():
                cells = [
                    workload,
                    variant,
                    kind,
                    f"{100 * x['flipped'][0]:.2f}, {100 * x['flipped'][-1]:.2f}",
                    f"{100 * x['still flipped'][-1]:.0f}",
                    f"{x['momentum'][-1]:.3f}",
                    f"{100 * x['zero'][-1]:.1f}",
                    f"{100 * x['drift']:.2f}",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.lion_signs",
        description=__doc__.split("\n")[0],
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=summaries.RESULTS)
    options = parser.parse_args()
    found = {
        workload.name: compare(
            workload,
            LEARNING_RATES[workload.name]["lion"],
            options.steps,
            options.seed,
        )
        for workload in (workloads.gpt(), workloads.image())
    }
    content = {
        "command": f"python -m benchmarks.quality.lion_signs --steps {options.steps} "
        f"--seed {options.seed}",
        "machine": f"{platform.machine()} CPU",
        "jax": jax.__version__,
        "found": found,
    }
    path = options.out / "lion_signs.json"
    summaries.write(path, content)
    print(table(found))


if __name__ == "__main__":
    main()
