"""Correctness and speed of the fused kernels on one GPU, beside other optimizers.

    python -m benchmarks.gpu_report

Compares codes and weights with those of plain JAX on the same device, times all
contenders in one run, relates the bytes that they move to the bandwidth of a copy, and
writes benchmarks/results/gpu_report_<device>.json, .md and .png. Ends with status 1
where a comparison fails. Contenders that are not installed or fail are listed with the
reason: jax_triton, flashoptim-jax, torch and flashoptim come from PyPI.

``--dry-run --out FOLDER`` takes the same path in small on a CPU. Its figures mean
nothing.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

# JAX and PyTorch share the device's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import optax_flash  # noqa: E402
from benchmarks.contenders import (  # noqa: E402
    LOOP_STEPS,
    Absent,
    Shapes,
    flashoptim_jax,
    optax_float32,
    optax_master_copy,
    ours,
    require,
)
from benchmarks.gpu_checks import CASES, LIMITS, check  # noqa: E402
from benchmarks.gpu_page import draw_chart, markdown  # noqa: E402
from benchmarks.gpu_plan import DRY, REAL, Plan  # noqa: E402
from benchmarks.rounds import METHOD, alternate, reason, timed_calls  # noqa: E402
from benchmarks.torch_contenders import flashoptim, torch_fused  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "jax-triton",
    "optax",
    "flashoptim-jax",
    "flashoptim",
    "torch",
    "triton",
)


def contenders(implementations: tuple[str, ...]) -> list[Any]:
    kinds = [(name, finished) for name in implementations for finished in (False, True)]
    return [
        *[ours(*kind) for kind in kinds],
        ours(None, finished=True),
        ours(None, finished=True, name="adamw4"),
        optax_float32(),
        optax_master_copy(),
        flashoptim_jax(fused=True),
        torch_fused(),
        flashoptim(),
    ]


def run_checks(plan: Plan) -> list[dict[str, Any]]:
    """Every implementation and case; an implementation that raises has failed."""
    results = []
    for implementation in plan.implementations:
        for case in CASES:
            result: dict[str, Any] = {"implementation": implementation, "case": case}
            try:
                if implementation == "triton":
                    require("jax_triton")
                result |= check(
                    implementation, case, plan.check_shapes, plan.check_steps
                )
            except Absent as absent:
                result["absent"] = reason(absent)
            except Exception as error:
                result |= {"passed": False, "error": reason(error)}
            results.append(result)
            print(f"check  {implementation:10} {case:28} {verdict(result)}", flush=True)
    return results


def verdict(result: Mapping[str, Any]) -> str:
    if "absent" in result:
        return f"absent: {result['absent']}"
    if result["passed"]:
        return "passed"
    return f"FAILED {result.get('error', '')}".strip()


class CopyRun:
    """Copies one array into another of the same size."""

    def __init__(self, dtype: Any, nbytes: int):
        self._source = jnp.ones(nbytes // jnp.dtype(dtype).itemsize, dtype)
        self._target = jnp.zeros_like(self._source)
        # The target is donated to be written to.
        self._copy = jax.jit(
            lambda source, target: jnp.copy(source), donate_argnums=1, keep_unused=True
        )

    def __call__(self) -> None:
        self._target = self._copy(self._source, self._target)

    def sync(self) -> None:
        self._target.block_until_ready()


def copy_bandwidth(nbytes: int, rounds: int) -> dict[str, float]:
    """Bytes read and written in a second while an array is copied, in GB/s."""
    bandwidths = {}
    for dtype in ("uint8", "bfloat16"):
        run = CopyRun(dtype, nbytes)
        timed_calls(run, 3)
        seconds = [timed_calls(run, 20) / 20 for _ in range(rounds)]
        bandwidths[dtype] = 2 * nbytes / statistics.median(seconds) / 1e9
    return bandwidths


def time_leaf_set(
    shapes: Shapes, entrants: list[Any], plan: Plan, looped: bool, deadline: float
) -> dict[str, dict[str, Any]]:
    """One entry for each contender: figures, or why there are none."""
    timed = alternate(
        entrants,
        shapes,
        rounds=plan.rounds,
        seconds=plan.seconds,
        looped=looped,
        deadline=deadline,
    )
    return {
        name: result if "absent" in result else figures(result)
        for name, result in timed.items()
    }


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    seconds = statistics.median(result["seconds"])
    return {
        "step_ms": 1e3 * seconds,
        "moved_bytes": result["moved_bytes"],
        "moved_gb_per_second": result["moved_bytes"] / seconds / 1e9,
        "calls_in_a_round": result["calls"],
        "step_ms_of_rounds": [1e3 * s for s in result["seconds"]],
    }


def versions() -> dict[str, str]:
    found = {
        "optax_flash": optax_flash.__version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_device() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "memory_limit": (device.memory_stats() or {}).get("bytes_limit"),
    }


def parse(args: list[str]) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--implementations", nargs="+", help="xla is one, too")
    parser.add_argument("--leaf-sets", nargs="+", help="time only these")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--minutes", type=float, help="no timing begins after these")
    parsed = parser.parse_args(args)
    if parsed.dry_run and (
        parsed.out is None or parsed.out.resolve() == RESULTS.resolve()
    ):
        parser.error("--dry-run needs --out with a folder that is not for results")
    plan = DRY if parsed.dry_run else REAL
    if parsed.leaf_sets:
        unknown = set(parsed.leaf_sets) - set(plan.leaf_sets)
        if unknown:
            parser.error(f"leaf sets are {list(plan.leaf_sets)}, not {sorted(unknown)}")
        chosen = {name: plan.leaf_sets[name] for name in parsed.leaf_sets}
        plan = plan._replace(leaf_sets=chosen)
    if parsed.implementations:
        plan = plan._replace(implementations=tuple(parsed.implementations))
    plan = plan._replace(
        rounds=parsed.rounds or plan.rounds, minutes=parsed.minutes or plan.minutes
    )
    return parsed, plan


def main(args: list[str] | None = None) -> int:
    args = sys.argv[1:] if args is None else args
    parsed, plan = parse(args)
    deadline = time.monotonic() + 60 * plan.minutes
    if parsed.dry_run:
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        print("JAX finds no GPU here. Without one there is only --dry-run.")
        return 2
    device = describe_device()
    kind = f"dry run {device['platform']}" if parsed.dry_run else device["kind"]
    slug = re.sub("[^a-z0-9]+", "-", kind.lower()).strip("-")
    folder = parsed.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_report_{slug}.json"

    entrants = contenders(plan.implementations)
    checks = run_checks(plan)
    report: dict[str, Any] = {
        "dry_run": parsed.dry_run,
        "command": " ".join(["python", "-m", "benchmarks.gpu_report", *args]),
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": versions(),
        "method": METHOD,
        "passed": all(result.get("passed", True) for result in checks),
        "check_limits": LIMITS,
        "checks": checks,
        "copy_gb_per_second": copy_bandwidth(plan.copy_bytes, plan.rounds),
        "loop_steps": LOOP_STEPS,
        "contenders": {
            c.name: {"weights": c.weights, "gradients": c.gradients} for c in entrants
        },
        "leaf_sets": {
            name: {
                "shapes": [list(shape) for shape in shapes],
                "parameters": sum(map(math.prod, shapes)),
                "single_steps": {},
                "compiled_loop": {},
            }
            for name, shapes in plan.leaf_sets.items()
        },
    }
    for looped, key in ((False, "single_steps"), (True, "compiled_loop")):
        for name, shapes in plan.leaf_sets.items():
            timed = time_leaf_set(shapes, entrants, plan, looped, deadline)
            report["leaf_sets"][name][key] = timed
            # Kept after each set, in case a contender takes the process with it.
            write(path, report)
            print(f"timed  {name}, {key.replace('_', ' ')}", flush=True)
    report["chart"] = draw_chart(report, path.with_suffix(".png"))
    write(path, report)
    page = markdown(report)
    path.with_suffix(".md").write_text(page)
    print(page)
    print(f"Written: {path} and .md beside it; chart: {report['chart']}")
    return 0 if report["passed"] else 1


def write(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
