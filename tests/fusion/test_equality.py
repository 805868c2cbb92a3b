"""Kernels compute what XLA computes, bit for bit, for every optimizer."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("equality.py")
# A process each: the instruction set is chosen at its start.
OPTIMIZERS = (
    "adamw",
    "adam nadamw amsgrad adabelief yogi adan lion sgd",
    "rmsprop ademamix adopt clipped_adamw tame tame_relative lamb",
)
# Without fused multiply-add, see the script. Unoptimised, which only writes the same
# operations down otherwise.
FLAGS = "--xla_cpu_max_isa=AVX --xla_backend_optimization_level=0"


@pytest.mark.full
@pytest.mark.parametrize("optimizers", OPTIMIZERS)
def test_interpreted_kernels_equal_xla(optimizers, cache_environment):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *optimizers.split()],
        env=os.environ | cache_environment | {"XLA_FLAGS": FLAGS},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    pairs = 9 if optimizers == "adamw" else 2 * len(optimizers.split())
    assert run.stdout.count(": ") == 0 and run.stdout.count(" equal\n") == pairs


def test_all_optimizers_are_run():
    tree = ast.parse(SCRIPT.read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPTIMIZERS"
    )
    names = [key.value for key in table.keys]
    assert sorted(names) == sorted(" ".join(OPTIMIZERS).split())
