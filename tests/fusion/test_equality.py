"""Kernels compute what XLA computes, bit for bit, for every optimizer."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("equality.py")
# A process each, which also runs all storages with all codecs for adamw.
OPTIMIZERS = (
    "adamw",
    "adam nadamw amsgrad",
    "adabelief yogi adan",
    "lion sgd rmsprop",
    "ademamix adopt clipped_adamw",
    "tame tame_relative lamb",
)
# Without fused multiply-add, see the script. Unoptimised, and with the emitters that
# compile three times as fast: both only write the same operations down otherwise.
FLAGS = (
    "--xla_cpu_max_isa=AVX --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)


@pytest.mark.parametrize("optimizers", OPTIMIZERS)
def test_interpreted_kernels_equal_xla(optimizers):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *optimizers.split()],
        env=os.environ | {"XLA_FLAGS": FLAGS},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": ") == 0 and run.stdout.count(" equal\n") == 9
