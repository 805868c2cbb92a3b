"""Paths of params: an attribute is part of the path, whatever it is called."""

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

import optax_flash
from optax_flash import compress
from optax_flash.io import formats

pytestmark = pytest.mark.usefixtures("quick_compile")


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any


def kernel(seed):
    return jax.random.normal(jax.random.key(seed), (64, 64))


ATTENTION = Attention(kernel(0), kernel(1), kernel(2))
PATHS = {"attention/query", "attention/key", "attention/value"}


def in_codes(tx, params):
    return set(optax_flash.state_format(tx, params)["leaves"])


def test_a_pattern_finds_an_attribute_called_value():
    tx = compress(optax.sgd(0.1, 0.9), {"*value*": None})
    assert in_codes(tx, {"attention": ATTENTION}) == {
        "attention/query/trace",
        "attention/key/trace",
    }


def test_at_the_top_it_is_not_the_name_of_an_array_without_one():
    tx = compress(optax.sgd(0.1, 0.9))
    assert in_codes(tx, ATTENTION) == {"query/trace", "key/trace", "value/trace"}
    assert in_codes(tx, ATTENTION.value) == {"params/trace"}


def test_nested_ones_have_different_paths():
    tree = Attention(
        query=Attention(jnp.ones(1), None, None),
        key=None,
        value=Attention(jnp.ones(2), None, Attention(None, None, jnp.ones(3))),
    )
    found = {path: x.size for path, x in formats.named_leaves(tree).items()}
    assert found == {"query/query": 1, "value/query": 2, "value/value/value": 3}


def test_safetensors_files_have_the_names_of_the_params(tmp_path):
    path = tmp_path / "model.safetensors"
    params = {"attention": ATTENTION}
    optax_flash.save_safetensors(path, params)
    by_hand = {
        "attention.query": np.asarray(ATTENTION.query),
        "attention.key": np.asarray(ATTENTION.key),
        "attention.value": np.asarray(ATTENTION.value),
    }
    chex.assert_trees_all_equal(safetensors.numpy.load_file(path), by_hand)
    safetensors.numpy.save_file(by_hand, path)
    chex.assert_trees_all_equal(optax_flash.load_safetensors(path, params), params)


def test_predicates_get_it():
    """Each function of the user's that takes a path."""
    params = {"attention": ATTENTION}

    def paths_of(apply):
        seen = set()
        apply(lambda path, *_: bool(seen.add(path)))
        return seen

    def init(alias):
        return lambda where: jax.eval_shape(
            alias(0.1, rank=8, where=where).init, params
        )

    takers = {
        "cast_params": lambda keep: optax_flash.cast_params(params, jnp.float16, keep),
        "lora_pre_adamw": init(optax_flash.lora_pre_adamw),
        "lora_pre_muon": init(optax_flash.lora_pre_muon),
        "lowrank_adamw": init(optax_flash.lowrank_adamw),
    }
    assert {name: paths_of(apply) for name, apply in takers.items()} == dict.fromkeys(
        takers, PATHS
    )


def test_errors_name_it():
    params = {"attention": ATTENTION._replace(value=jnp.tanh)}
    for wrap in (compress, optax_flash.master_weights):
        with pytest.raises(ValueError, match="'attention/value' is a"):
            wrap(optax.sgd(0.1)).init(params)


def test_arrays_in_boxes_of_flax_go_by_the_name_of_the_box():
    """Trainers take them out of their boxes between init and update."""
    linear = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    boxed = {
        "nnx": nnx.state(linear, nnx.Param),
        "a subclass": {"kernel": nnx.LoRAParam(kernel(0)), "bias": jnp.ones(64)},
        "linen": {
            "kernel": nn.LogicallyPartitioned(kernel(0), ("a", "b")),
            "bias": nn.Partitioned(jnp.ones(64), (None,)),
        },
        "both": {"kernel": nnx.Param(nn.Partitioned(kernel(0), ("a", "b")))},
    }
    for name, params in boxed.items():
        assert in_codes(optax_flash.lion8(1e-4), params) == {"kernel/mu"}, name
    assert in_codes(optax_flash.lion8(1e-4), boxed["both"]["kernel"]) == {"params/mu"}


def test_a_box_of_several_arrays_keeps_their_paths_apart():
    params = {"attention": nnx.Param(ATTENTION)}
    assert set(formats.named_leaves(params)) == {
        "attention/value/query",
        "attention/value/key",
        "attention/value/value",
    }
