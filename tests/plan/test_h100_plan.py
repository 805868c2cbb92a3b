"""The planner against XLA's compiler for H100s, on a few layers of full width.

Compiled, not run: needs ``jax[cuda13]`` but no GPU, see ``make test-cuda``. The table
of whole models is ``make llama-memory``.
"""

import pytest

from benchmarks.llama_memory import Case, compile_case
from optax_flash.plan import models

pytestmark = pytest.mark.cuda

LLAMA = models.llama(
    "llama of 4 layers",
    layers=4,
    width=4_096,
    hidden=14_336,
    heads=32,
    kv_heads=8,
    vocabulary=32_000,
)


@pytest.mark.parametrize(
    "optimizer, released", [("adamw8", False), ("adamw", False), ("adamw4", True)]
)
def test_the_compiler_takes_what_was_planned(optimizer, released):
    found = compile_case(Case(LLAMA.name, optimizer, released), LLAMA)
    assert found["planned"] == pytest.approx(found["peak"], rel=0.05)
