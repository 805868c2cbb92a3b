"""Runs one optimizer as Pallas kernels, interpreted, and in XLA: are both the same?

    XLA_FLAGS=--xla_cpu_max_isa=AVX python tests/fusion/equality.py adamw lion
    XLA_FLAGS=--xla_cpu_max_isa=AVX python tests/fusion/equality.py --all

Without fused multiply-add, which XLA puts in different places of different programs,
every bit must agree. A process of its own, as the instruction set is chosen at start.

An optimizer's arithmetic, the weights' storage, the codec and the leaf's shape are
separate parts of a program, so pairs of them are run: adamw with every storage and
codec, and on every shape with each of them once; the others with 4 bits, where what
rounding did is made up for by derivatives of their arithmetic, and with one storage of
weights. Those on shapes that do not fill their groups. --all runs all with all.
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_flash

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "adam": lambda: optax.adam(optax.linear_schedule(1e-2, 1e-3, 10)),
    "nadamw": lambda: optax.nadamw(1e-2),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "yogi": lambda: optax.yogi(1e-2),
    "adan": lambda: optax.adan(1e-2),
    "lion": lambda: optax.lion(1e-3),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda: optax.rmsprop(1e-2),
    "ademamix": lambda: optax.contrib.ademamix(1e-2),
    "adopt": lambda: optax.contrib.adopt(1e-2),
    "clipped_adamw": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-2)
    ),
    "tame": lambda: optax.chain(
        optax_flash.scale_by_tamed_adam(0.1), optax.scale(-1e-2)
    ),
    "tame_relative": lambda: optax.chain(
        optax_flash.scale_by_tamed_adam(0.8, relative=True), optax.scale(-1e-2)
    ),
    "lamb": lambda: optax.lamb(1e-2),
}
STORAGE = {"float32": (jnp.float32, 24), "24": (jnp.bfloat16, 24)}
STORAGE["32"] = (jnp.bfloat16, 32)
CODECS = ("companded8", "flashoptim", "companded4")
ALL = list(itertools.product(STORAGE, CODECS))
EACH_ONCE = [("float32", "companded4"), ("24", "companded8"), ("32", "flashoptim")]
SHAPES = {
    "whole_groups": (40, 128),
    "ragged": (70, 100),
    "three_axes": (3, 5, 300),
    "vector": (4096,),
    "small": (7,),
}
RAGGED = {k: SHAPES[k] for k in ("ragged", "small")}


FOUR_BITS, *WITH_RESIDUALS = EACH_ONCE
PAIRS = {name: [FOUR_BITS, WITH_RESIDUALS[i % 2]] for i, name in enumerate(OPTIMIZERS)}
PAIRS["adamw"] = ALL


def random_like(tree, rng):
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype), tree
    )


def differences(optimizer, dtype, bits, codec, finished, shapes=SHAPES, steps=3):
    """Paths of the leaves that differ after some steps, with how many elements do."""
    rng = np.random.default_rng(0)
    start = random_like({k: jnp.zeros(s, dtype) for k, s in shapes.items()}, rng)
    grads = [random_like(start, rng) for _ in range(steps)]

    def transformation(implementation):
        return optax_flash.master_weights(
            optax_flash.compress(OPTIMIZERS[optimizer](), codec),
            bits,
            codec="flashoptim" if codec == "flashoptim" else "exact",
            finished=finished,
            implementation=implementation,
        )

    # Which does not depend on the implementation.
    start_state = transformation("xla").init(start)

    def run(implementation):
        tx = transformation(implementation)

        @jax.jit
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = start, start_state
        for g in grads:
            params, state = step(params, state, g)
        return params, state

    expected, found = run("xla"), run("interpret")
    result = {}
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected),
        jax.tree.leaves(found),
        strict=True,
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        different = np.sum(a.reshape(-1).view(np.uint8) != b.reshape(-1).view(np.uint8))
        if different:
            result[jax.tree_util.keystr(path)] = int(different)
    return result


def main():
    failed, everything = False, sys.argv[1:] == ["--all"]
    for optimizer in OPTIMIZERS if everything else sys.argv[1:]:
        for storage, codec in ALL if everything else PAIRS[optimizer]:
            dtype, bits = STORAGE[storage]
            # Additive updates, and finished params where there is a residual.
            finished = dtype == jnp.bfloat16 and codec == "companded8"
            on_all = optimizer == "adamw" and (storage, codec) in EACH_ONCE
            shapes = SHAPES if everything or on_all else RAGGED
            found = differences(optimizer, dtype, bits, codec, finished, shapes)
            failed |= bool(found)
            print(optimizer, storage, codec, found or "equal", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
