"""The CPU benchmark, with leaves too small for its figures to mean anything."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.full

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "",
    "PYTHONPATH": str(ROOT),
}


def bench_cpu(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_cpu", *map(str, args)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def test_measures_or_explains_everything(tmp_path):
    out = tmp_path / "folder" / "bench.json"
    run = bench_cpu("--tiny", "--rounds", 2, "--seconds", 0.001, "--out", out)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert result["tiny"] and result["machine"]["cores"] >= 1
    assert set(result["leaf_sets"]) == {"one leaf", "small leaves"}
    for leaf_set in result["leaf_sets"].values():
        contenders = leaf_set["contenders"]
        for name, row in contenders.items():
            assert name in run.stdout
            if "absent" in row:
                # The one package that is not a dependency.
                assert name == "flashoptim-jax, unfused" and row["absent"]
                continue
            assert row["median_ms"] > 0 and row["median_ratio"] > 0
            assert contenders[row["baseline"]]["median_ratio"] == pytest.approx(1)
        assert contenders["lion8"]["baseline"] == "optax.lion"
        assert contenders["master_weights(adamw8)"]["gradients"] == "bfloat16"
        assert contenders["adamw8"]["gradients"] == "float32"


def test_tiny_figures_do_not_become_results():
    assert bench_cpu("--tiny").returncode == 2
