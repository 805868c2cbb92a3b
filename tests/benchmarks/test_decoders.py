"""GPT-2 is one network, in examples/lm, in the planner and in what that is held to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.decoders import GPT2, sequence
from examples.lm import decoders
from optax_flash import plan

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH = 2, 64, 2, 128, 16
CONFIG = decoders.DecoderConfig(
    "gpt2",
    depth=LAYERS,
    width=WIDTH,
    heads=HEADS,
    seq_len=LENGTH,
    vocab=VOCABULARY,
    compute_dtype=jnp.bfloat16,
)


def planned():
    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "vocab_size": VOCABULARY}
    return plan.from_config({"model_type": "gpt2", "n_positions": LENGTH, **sizes})


def in_the_planners_layout(params):
    """Queries, keys and values in one matrix."""
    blocks = dict(params["blocks"])
    parts = [blocks.pop(name) for name in ("q", "k", "v")]
    qkv = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *parts)
    return params | {"blocks": blocks | {"qkv": qkv}}


@pytest.fixture(name="params")
def params_fixture():
    """First weights, and no bias or scale that is 0 or 1."""
    params = decoders.init(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)


def test_the_planner_knows_the_params_of_the_examples(params):
    found = jax.tree.map(jnp.shape, in_the_planners_layout(params))
    assert found == jax.tree.map(jnp.shape, planned().params)


def test_what_the_planner_is_held_to_has_the_loss_of_the_examples(params, monkeypatch):
    # The benchmark compiles for a GPU, with cuDNN's attention.
    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation, **options: attention(*args, **options),
    )
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (3, LENGTH + 1))
    theirs = sequence(GPT2(HEADS), chunks=2)(in_the_planners_layout(params), tokens)
    monkeypatch.undo()
    ours = decoders.decoder(CONFIG)(params, tokens)
    assert float(theirs) == pytest.approx(float(ours), rel=0.005)
    # Which is not so because all losses are alike.
    other = jax.tree.map(functools.partial(jnp.multiply, 0.5), params)
    assert float(decoders.decoder(CONFIG)(other, tokens)) != pytest.approx(
        float(ours), rel=0.02
    )
