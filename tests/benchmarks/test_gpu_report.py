"""The GPU report's dry run: the same path in small, on the CPU."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import optax_flash
from benchmarks import gpu_checks

pytestmark = pytest.mark.full

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "",
    "PYTHONPATH": str(ROOT),
}

ON_CPU = ("adamw8, ", "adamw4, ", "optax.adamw")

# Gradients one hundredth too large, for all implementations but the reference.
WRONG_IMPLEMENTATION = """
import sys
import jax, optax
from benchmarks import gpu_checks, gpu_report

right = gpu_checks.transformation

def wrong(case, implementation):
    tx = right(case, gpu_checks.REFERENCE)
    if implementation == gpu_checks.REFERENCE:
        return tx
    def update(grads, state, params):
        return tx.update(jax.tree.map(lambda g: 1.01 * g, grads), state, params)
    return optax.GradientTransformationExtraArgs(tx.init, update)

gpu_checks.transformation = wrong
sys.exit(gpu_report.main(sys.argv[1:]))
"""


@pytest.fixture(name="python")
def python_fixture(cache_environment):
    def python(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, args)],
            env=os.environ | cache_environment | ENVIRONMENT,
            capture_output=True,
            text=True,
        )

    return python


def read(folder: pathlib.Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_dry_run_measures_or_explains_everything(python, tmp_path):
    run = python("-m", "benchmarks.gpu_report", "--dry-run", "--out", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    report = read(tmp_path)

    # Nothing of it can be taken for a GPU's.
    assert report["dry_run"] and report["device"]["platform"] == "cpu"
    names = {path.name for path in tmp_path.iterdir()}
    stem = "gpu_report_dry-run-cpu"
    assert names == {f"{stem}.json", f"{stem}.md", f"{stem}.png"}
    page = (tmp_path / f"{stem}.md").read_text()
    assert page.startswith(
        "# Dry run on a CPU: these figures say nothing about any GPU"
    )
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")

    assert report["passed"]
    assert {check["implementation"] for check in report["checks"]} >= {"interpret"}
    for check in report["checks"]:
        assert check["passed"]
        for name, limit in report["check_limits"].items():
            assert check[name] <= limit

    assert set(report["copy_gb_per_second"]) == {"uint8", "bfloat16"}
    for leaf_set in report["leaf_sets"].values():
        for key in ("single_steps", "compiled_loop"):
            assert set(leaf_set[key]) == set(report["contenders"])
            for name, timing in leaf_set[key].items():
                assert name in page
                if "absent" in timing:
                    assert set(timing) == {"absent"} and timing["absent"]
                else:
                    assert timing["step_ms"] > 0
        # What runs on a CPU was measured, what needs a GPU was not.
        single = leaf_set["single_steps"]
        measured = {name for name, timing in single.items() if "step_ms" in timing}
        assert measured == {name for name in single if name.startswith(ON_CPU)}
    check_moved_bytes(report["leaf_sets"]["64^2"]["single_steps"])


def check_moved_bytes(timings: dict) -> None:
    """The bytes of one leaf of 64 x 64 against those counted by hand."""
    n, scalars = 64 * 64, 64
    moved = {name: t["moved_bytes"] for name, t in timings.items() if "step_ms" in t}
    # Params, residual, two moments, a scale per 32 of each: twice; gradients once.
    ours = 2 * n * (2 + 1 + 1 + 1 + 2 * 2 / 32) + 2 * n
    for name in ("adamw8, additive, xla", "adamw8, finished, interpret"):
        assert moved[name] == pytest.approx(ours, abs=scalars)
    stock = 2 * n * (4 + 4 + 4) + 4 * n
    assert moved["optax.adamw"] == pytest.approx(stock, abs=scalars)
    # bfloat16 params are written and never read.
    copied = 2 * n * (4 + 4 + 4) + 2 * n + 2 * n
    assert moved["optax.adamw, master copy"] == pytest.approx(copied, abs=scalars)


def test_wrong_implementation_fails_the_report(python, tmp_path):
    run = python(
        *("-c", WRONG_IMPLEMENTATION, "--dry-run", "--out", tmp_path),
        *("--implementations", "interpret", "--leaf-sets", "64^2"),
    )
    assert run.returncode == 1, run.stdout + run.stderr
    report = read(tmp_path)
    assert not report["passed"]
    for check in report["checks"]:
        assert not check["passed"]
        assert check["codes_differing"] > report["check_limits"]["codes_differing"]


@pytest.mark.parametrize(
    "args",
    [["--dry-run"], ["--dry-run", "--out", RESULTS], []],
    ids=["no folder", "folder of results", "no GPU"],
)
def test_refuses_to_make_up_results(python, args):
    before = set(RESULTS.iterdir())
    assert python("-m", "benchmarks.gpu_report", *args).returncode == 2
    assert set(RESULTS.iterdir()) == before


@pytest.mark.parametrize("codec", [optax_flash.Companded8(), optax_flash.Companded4()])
def test_places_are_in_the_order_of_what_codes_stand_for(codec):
    codes = np.arange(2**codec.bits, dtype=np.uint8)
    values = codec.decode_groups(codes[:, None], (np.ones(codes.shape, np.float32),))
    values = np.asarray(values)[:, 0]
    packed = codec.pack(codes[None])
    place = np.ravel(gpu_checks.places(codec, "mu", packed))
    order = np.argsort(place, kind="stable")
    assert np.all(np.diff(values[order])[np.diff(place[order]) > 0] > 0)
    assert place.max() - place.min() == 2 * (2 ** (codec.bits - 1) - 1)
