"""Gradient release on an H100, compiled and not run; see ``make test-cuda``."""

import re

import pytest

from benchmarks.release_memory import (
    SHAPES,
    arguments,
    bytes_of,
    compiled,
    measure,
    memory,
    optimizer,
    ordinary_step,
)
from examples.lm import decoders
from optax_flash import release

pytestmark = pytest.mark.cuda


def test_24_layers():
    # One test, as a step takes long to compile and the workers do not share it.
    shape, tx = SHAPES["24 layers"], optimizer()
    model, args = decoders.decoder(shape.config), arguments(shape, tx)
    ordinary = compiled(ordinary_step(model, tx), args)
    released = compiled(release.train_step(model, tx), args)
    check_temporaries_fall_by_the_gradients(ordinary, released, bytes_of(args[0]))
    check_params_and_state_are_updated_in_place(released)
    check_one_kernel_for_each_matrix_of_a_layer_in_the_loop(released)


def check_temporaries_fall_by_the_gradients(ordinary, released, gradients):
    fallen = memory(ordinary)["temporaries"] - memory(released)["temporaries"]
    assert fallen > 0.9 * gradients


def check_params_and_state_are_updated_in_place(released):
    found = released.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    assert 0 <= results < 2**20
    # Nothing as large as a stack is copied, in the loop or around it.
    assert not re.findall(r"= \w+\[24,\d{3,}[\d,]*\]\S* copy\(", released.as_text())


def check_one_kernel_for_each_matrix_of_a_layer_in_the_loop(released):
    computations = re.split(r"\n(?=\S)", released.as_text())
    counts = [
        len(re.findall(r" custom-call\(.*triton_kernel_call", text))
        for text in computations
    ]
    # Of a layer four matrices, biases and norms; two embeddings and the last norm.
    assert sorted(n for n in counts if n) == [3, 6]


def test_a_model_of_one_and_a_half_billion_params():
    found = measure("GPT-2 XL")
    assert found["params"] > 1.5e9
    assert found["peak without activations, bytes a parameter"]["released"] < 5.4
    assert found["temporaries fall by, of the gradients"] > 0.9
