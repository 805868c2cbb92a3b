"""Kernels compute what XLA computes, bit for bit, for every optimizer."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("equality.py")
OPTIMIZERS = (
    "adamw adam nadamw amsgrad adabelief yogi adan lion sgd rmsprop ademamix adopt "
    "clipped_adamw tame tame_relative lamb"
).split()
# Without fused multiply-add, see the script; unoptimised, which compiles twice as fast.
FLAGS = "--xla_cpu_max_isa=AVX --xla_backend_optimization_level=0"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_interpreted_kernels_equal_xla(optimizer):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), optimizer],
        env=os.environ | {"XLA_FLAGS": FLAGS},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # Three ways to store weights, three codecs.
    assert run.stdout.count(": ") == 0 and run.stdout.count(" equal\n") == 9
