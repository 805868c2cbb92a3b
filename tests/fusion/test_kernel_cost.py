"""What the default kernels cost in machine code: instructions, registers, no spills."""

import pytest

from benchmarks import h100, kernel_cost
from tests.tiers import quick

pytestmark = pytest.mark.cuda

FINISHED, ADDITIVE = "24 bits, finished", "24 bits, additive"

# For one element: instructions, those of the integer pipe; and registers a thread.
LIMITS = {
    ("adamw8", FINISHED): (90, 50, 64),
    ("adamw8", ADDITIVE): (107, 67, 80),
    ("adamw8", "float32, additive"): (80, 43, 64),
    ("nadamw", FINISHED): (93, 52, 72),
    ("lion8", FINISHED): (65, 43, 80),
    ("sgd8", FINISHED): (60, 43, 80),
}


@pytest.mark.parametrize("target", quick(["h100"], h100.TARGETS))
@pytest.mark.parametrize("case", LIMITS, ids=", ".join)
def test_kernels_are_lean(case, target):
    issue, integer, registers = LIMITS[case]
    found = kernel_cost.cost(*case, target)
    assert found.spilled == 0
    assert found.issue <= issue
    assert found.integer <= integer
    assert found.registers <= registers


def test_bytes_are_those_of_state_weights_and_gradient():
    # bfloat16 gradient, param and residual, two codes, all but the first written, too,
    # and a scale of two bytes for 32 of each code.
    found = kernel_cost.cost("adamw8", FINISHED, "h100")
    assert found.bytes == 2 + 2 * (2 + 1 + 1 + 1) + 2 * 2 * 2 / 32


@pytest.mark.parametrize(
    ("registers", "num_warps", "warps"),
    [(32, 4, 64), (64, 8, 32), (65, 8, 24), (96, 4, 20), (128, 4, 16), (255, 8, 8)],
)
def test_warps_that_are_resident(registers, num_warps, warps):
    """By NVIDIA's rule: 65,536 registers, in units of 256 a warp."""
    assert kernel_cost.resident_warps(registers, num_warps) == warps
