"""Checkpoints: bytes on disk, seconds, and whether a flipped bit is noticed.

    python -m benchmarks.checkpoint_report

Prints JSON; docs/checkpoints.md quotes it.
"""

import json
import pathlib
import random
import tempfile
import time

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from absl import logging

import optax_flash
from optax_flash.codecs import hashing

LEAVES, SIDE = 8, 2048
FLIPS = 40


def trained(tx, params):
    """Params and state after two steps on random gradients."""
    state = tx.init(params)

    @jax.jit
    def step(params, state, key):
        grads = {k: jax.random.normal(key, p.shape, p.dtype) for k, p in params.items()}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(2):
        params, state = step(params, state, jax.random.key(seed))
    return jax.block_until_ready((params, state))


def seconds(call):
    call()  # compiles
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(tx, params, folder):
    tree = trained(tx, params)
    steps = iter(range(10))
    with optax_flash.Checkpoints(folder, tx, params) as checkpoints:
        save = seconds(lambda: checkpoints.save(next(steps), tree))
        restore = seconds(lambda: checkpoints.restore(tree))
        files = (checkpoints.folder / str(checkpoints.latest)).rglob("*")
    return {
        "bytes per parameter": sum(f.stat().st_size for f in files if f.is_file())
        / (LEAVES * SIDE**2),
        "save, seconds": save,
        "restore, seconds": restore,
        "digests, seconds": seconds(
            lambda: [hashing.digest(x) for x in jax.tree.leaves(tree)]
        ),
    }


def flips(folder):
    """How many single flipped bits in a file of arrays raise an error, of FLIPS."""
    tx = optax_flash.master_weights(optax_flash.adamw8(1e-3))
    tree = trained(tx, {"w": jax.random.normal(jax.random.key(0), (256, 256))})
    rng = random.Random(0)
    noticed = {"orbax alone": 0, "Checkpoints": 0}
    with (
        optax_flash.Checkpoints(folder / "ours", tx, tree[0]) as checkpoints,
        ocp.StandardCheckpointer() as orbax,
    ):
        checkpoints.save(0, tree)
        orbax.save(folder / "orbax", tree)
        orbax.wait_until_finished()
        for name, where, restore in (
            ("orbax alone", "orbax", lambda: orbax.restore(folder / "orbax", tree)),
            ("Checkpoints", "ours", lambda: checkpoints.restore(tree)),
        ):
            files = [x for x in (folder / where).rglob("*") if x.is_file()]
            largest = max(files, key=lambda file: file.stat().st_size)
            whole = largest.read_bytes()
            for _ in range(FLIPS):
                flipped = bytearray(whole)
                flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
                largest.write_bytes(flipped)
                try:
                    restore()
                except Exception:
                    noticed[name] += 1
            largest.write_bytes(whole)
    return noticed


def main():
    logging.set_verbosity(logging.FATAL)
    weights = {
        f"w{i}": jax.random.normal(jax.random.key(i), (SIDE, SIDE))
        for i in range(LEAVES)
    }
    half = optax_flash.cast_params(weights, jnp.bfloat16)
    optimizers = {
        "optax.adamw, float32": (optax.adamw(1e-3), weights),
        "adamw8, 24 bits": (optax_flash.master_weights(optax_flash.adamw8(1e-3)), half),
        "adamw4, 24 bits": (optax_flash.master_weights(optax_flash.adamw4(1e-3)), half),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        report = {
            name: measure(tx, params, folder / str(i))
            for i, (name, (tx, params)) in enumerate(optimizers.items())
        }
        report[f"flipped bits noticed, of {FLIPS}"] = flips(folder)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
