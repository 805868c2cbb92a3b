"""The decoders of examples/lm, compiled for H100s: what their options do to memory."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks.h100 import mesh_of, sharded_like
from examples.lm import decoders

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module", name="compiled")
def compiled_fixture():
    """Gradients of a small GPT-2, compiled once for each way."""

    @functools.cache
    def compiled(attention, remat):
        config = decoders.DecoderConfig(
            "gpt2",
            depth=4,
            width=256,
            heads=4,
            seq_len=1024,
            attention=attention,
            compute_dtype=jnp.bfloat16,
        )
        model = decoders.decoder(config)
        loss = model if remat else decoders.without_remat(model)
        weights = jax.eval_shape(
            functools.partial(decoders.init, config), jax.random.key(0)
        )
        tokens = jax.ShapeDtypeStruct((4, 1025), jnp.uint8)
        args = sharded_like((weights, tokens), mesh_of())
        return jax.jit(jax.value_and_grad(loss)).lower(*args).compile()

    return compiled


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def test_fused_attention_is_cudnns_and_keeps_no_scores(compiled):
    fused, plain = (compiled(attention, False) for attention in ("cudnn", "plain"))
    assert "__cudnn$fmha" in fused.as_text()
    assert "__cudnn$fmha" not in plain.as_text()
    scores = 4 * 4 * 4 * 1024**2 * 2  # layers, batch, heads, time by time, bfloat16
    assert temporaries(plain) - temporaries(fused) > scores


def test_remat_keeps_the_inputs_of_layers(compiled):
    kept = temporaries(compiled("cudnn", False)) - temporaries(compiled("cudnn", True))
    # Of three other layers: what norms, attention and the MLP need backwards.
    assert kept > 3 * 8 * 4 * 1024 * 256 * 2
