"""Memory of whole train steps with and without gradient release, compiled for one H100.

    JAX_PLATFORMS=cpu .venv-cuda/bin/python -m benchmarks.release_memory

Nothing is run, so no GPU is needed: XLA says what it would allocate. Writes
results/release_memory.json.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import optax

import optax_flash
from benchmarks.h100 import mesh_of, sharded_like
from examples.lm import decoders
from optax_flash import release
from optax_flash.flax import norm_paths

ROOT = pathlib.Path(__file__).resolve().parent

RESULT = ROOT / "results" / "release_memory.json"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A GPT-2, and what it is given.

    Attributes:
      layers: a stack, run as a scan.
      width: of the residual stream, of which each head has 64.
      vocab: tokens.
      context: tokens in a sequence.
      batch: sequences.
    """

    layers: int
    width: int
    vocab: int
    context: int
    batch: int

    @property
    def config(self) -> decoders.DecoderConfig:
        return decoders.DecoderConfig(
            "gpt2",
            depth=self.layers,
            width=self.width,
            heads=self.width // 64,
            seq_len=self.context,
            vocab=self.vocab,
            attention="cudnn",
            compute_dtype=jnp.bfloat16,
        )


SHAPES = {
    "24 layers": Shape(24, 2048, 2048, 512, 2),
    "GPT-2 XL": Shape(48, 1600, 50304, 1024, 1),
}


def params_of(shape: Shape) -> dict:
    """Abstract params in bfloat16, norms in float32."""

    def init(key: jax.Array) -> dict:
        weights = decoders.init(shape.config, key)
        norms = norm_paths(weights)
        return optax_flash.cast_params(
            weights, jnp.bfloat16, lambda path, _: path in norms
        )

    return jax.eval_shape(init, jax.random.key(0))


def optimizer() -> optax.GradientTransformation:
    """AdamW in 8 bits, weights in 24."""
    return optax_flash.master_weights(optax_flash.adamw8(3e-4, weight_decay=0.1))


def ordinary_step(model, tx):
    """The step without release."""

    def step(params, opt_state, *batch):
        value, grads = jax.value_and_grad(model)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    return step


def arguments(shape: Shape, tx) -> tuple:
    """Abstract params, state and tokens on one H100."""
    params = params_of(shape)
    state = jax.eval_shape(tx.init, params)
    tokens = jax.ShapeDtypeStruct((shape.batch, shape.context + 1), jnp.int32)
    return sharded_like((params, state, tokens), mesh_of())


def compiled(step, args):
    """A step compiled with params and state in place."""
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def memory(executable) -> dict:
    """Bytes that a compiled step takes."""
    found = executable.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes
    held -= found.alias_size_in_bytes
    return {
        "arguments and results": held,
        "temporaries": found.temp_size_in_bytes,
        "peak": held + found.temp_size_in_bytes,
    }


def bytes_of(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def activations(shape: Shape, args) -> dict:
    """Bytes of activations: layers' inputs, and the most that one segment needs.

    The latter are temporaries of a segment's gradients compiled alone, whose results,
    the gradients themselves, are not temporaries.
    """
    params, _, tokens = args
    x = jax.ShapeDtypeStruct(
        (shape.batch, shape.context, shape.width),
        jnp.bfloat16,
        sharding=tokens.sharding,
    )
    a_layer = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype, sharding=tokens.sharding),
        params["blocks"],
    )
    _, block, head = decoders.decoder(shape.config).segments
    of_head = {name: params[name] for name in head.names}

    def of_block(p, x, tokens, cotangent):
        _, pull = jax.vjp(lambda p, x: block.function(p, x, tokens), p, x)
        return pull(cotangent)

    def of_loss(p, x, tokens):
        return jax.value_and_grad(head.function, argnums=(0, 1))(p, x, tokens)

    working = {
        "block": jax.jit(of_block).lower(a_layer, x, tokens, x).compile(),
        "loss": jax.jit(of_loss).lower(of_head, x, tokens).compile(),
    }
    working = {
        name: found.memory_analysis().temp_size_in_bytes
        for name, found in working.items()
    }
    return {
        "inputs of layers": shape.layers * bytes_of(x),
        "working set": max(working.values()),
        "working sets": working,
    }


def measure(name: str) -> dict:
    """All figures of one shape."""
    shape, tx = SHAPES[name], optimizer()
    model = decoders.decoder(shape.config)
    args = arguments(shape, tx)
    params = args[0]
    n = sum(x.size for x in jax.tree.leaves(params))
    ordinary = memory(compiled(ordinary_step(model, tx), args))
    released = memory(compiled(release.train_step(model, tx), args))
    of_activations = activations(shape, args)
    counted = of_activations["inputs of layers"] + of_activations["working set"]
    fallen = ordinary["temporaries"] - released["temporaries"]
    return {
        "shape": dataclasses.asdict(shape),
        "params": n,
        "gradients": bytes_of(params),
        "ordinary": ordinary,
        "released": released,
        "activations": of_activations,
        "temporaries fall by, of the gradients": fallen / bytes_of(params),
        "peak without activations, bytes a parameter": {
            "ordinary": (ordinary["peak"] - counted) / n,
            "released": (released["peak"] - counted) / n,
        },
    }


def main() -> None:
    results = {"jax": jax.__version__} | {name: measure(name) for name in SHAPES}
    RESULT.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
