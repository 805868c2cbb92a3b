"""What the GPU report measures: leaf sets, sizes and durations."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from benchmarks.contenders import Shapes
from benchmarks.gpu_checks import DRY_SHAPES, SHAPES
from optax_flash.plan import from_config


class Plan(NamedTuple):
    """What a real run and a dry run do differently.

    Attributes:
      implementations: of our transformations.
      leaf_sets: shapes by name.
      check_shapes: leaves for the comparison with plain JAX.
      check_steps: steps compared.
      rounds: how often each contender is timed.
      seconds: about how long one timing takes.
      copy_bytes: size of the copied array.
      minutes: after so long no timing begins.
    """

    implementations: tuple[str, ...]
    leaf_sets: Mapping[str, Shapes]
    check_shapes: Mapping[str, tuple[int, ...]]
    check_steps: int
    rounds: int
    seconds: float
    copy_bytes: int
    minutes: float


def gpt2(layers: int, width: int, vocabulary: int, context: int) -> Shapes:
    """All leaves of a GPT-2, where each layer has its own."""
    sizes = {"n_layer": layers, "n_embd": width, "vocab_size": vocabulary}
    config = {"model_type": "gpt2", "n_positions": context, **sizes}
    params = from_config(config).params
    embed, blocks, head = (
        [x.shape for x in jax.tree.leaves(params[part])]
        for part in ("embed", "blocks", "head")
    )
    return [*embed, *layers * [shape[1:] for shape in blocks], *head]


def llama_layer(width: int, key_width: int, hidden: int) -> Shapes:
    """q, k, v, o, gate, up, down and both norms."""
    attention = [(width, width), (width, key_width), (width, key_width), (width, width)]
    mlp = [(width, hidden), (width, hidden), (hidden, width)]
    return [*attention, *mlp, (width,), (width,)]


REAL = Plan(
    implementations=("pallas", "triton"),
    leaf_sets={
        "1024^2": [(1024, 1024)],
        "4096^2": [(4096, 4096)],
        "16384^2": [(16384, 16384)],
        "GPT-2 124M": gpt2(12, 768, 50257, 1024),
        "Llama-3.1-8B layer": llama_layer(4096, 1024, 14336),
    },
    check_shapes=SHAPES,
    check_steps=8,
    rounds=5,
    seconds=0.05,
    copy_bytes=2**30,
    minutes=8.0,
)
DRY = Plan(
    implementations=("xla", "interpret"),
    leaf_sets={"64^2": [(64, 64)], "GPT-2, reduced": gpt2(1, 32, 128, 32)},
    check_shapes=DRY_SHAPES,
    check_steps=2,
    rounds=2,
    seconds=0.01,
    copy_bytes=2**20,
    minutes=10.0,
)
