"""The GPU report as a Markdown page and as a chart."""

import pathlib
from collections.abc import Mapping
from typing import Any

Report = Mapping[str, Any]

BYTES_NOTE = """\
Bytes moved are what a step cannot avoid: arrays that it updates read and written \
once, gradients read once. Share of copy: bytes moved over the time, over the \
bandwidth of copying a large array on this device ({copies}; the larger counts). Leaf \
sets that fit in the device's cache can exceed it."""

LOOP_NOTE = """\
"Single steps" are called from Python one by one; with many or small leaves that is \
mostly the time of the calls. "In a loop" are {steps} steps in one compiled loop, as \
inside of a larger compiled train step."""


def title(report: Report) -> str:
    if report["dry_run"]:
        return "Dry run on a CPU: these figures say nothing about any GPU"
    return f"Optimizer steps on {report['device']['kind']}"


def markdown(report: Report) -> str:
    """The whole page."""
    copies = ", ".join(
        f"{dtype} {bandwidth:,.1f} GB/s"
        for dtype, bandwidth in report["copy_gb_per_second"].items()
    )
    parts = [
        f"# {title(report)}",
        f"{report['date']}, `{report['command']}`. "
        + ", ".join(f"{name} {v}" for name, v in report["versions"].items())
        + ".",
        report["method"],
        LOOP_NOTE.format(steps=report["loop_steps"]),
        BYTES_NOTE.format(copies=copies),
        "Weights and gradients of each contender are in its row. JAX contenders donate "
        "params and state.",
    ]
    for name, leaf_set in report["leaf_sets"].items():
        parts += [heading(name, leaf_set), timing_table(report, leaf_set)]
        parts += [absent_list(leaf_set)]
    parts += ["## Comparison with plain JAX on the same device", check_table(report)]
    if report.get("chart", "").startswith("not drawn"):
        parts.append(f"Chart: {report['chart']}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(name: str, leaf_set: Mapping[str, Any]) -> str:
    leaves = len(leaf_set["shapes"])
    return (
        f"## {name}: {leaf_set['parameters']:,} parameters in "
        f"{leaves} {'leaf' if leaves == 1 else 'leaves'}"
    )


def timing_table(report: Report, leaf_set: Mapping[str, Any]) -> str:
    copy = max(report["copy_gb_per_second"].values())
    rows = [
        "| contender | weights | gradients | bytes moved per parameter | single steps, "
        "ms | share of copy | in a loop, ms | share of copy |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, contender in report["contenders"].items():
        timings = [
            leaf_set[key].get(name, {}) for key in ("single_steps", "compiled_loop")
        ]
        measured = [t for t in timings if "step_ms" in t]
        if not measured:
            continue
        per_parameter = measured[0]["moved_bytes"] / leaf_set["parameters"]
        cells = [name, contender["weights"], contender["gradients"]]
        cells.append(f"{per_parameter:.2f}")
        for t in timings:
            if "step_ms" in t:
                share = t["moved_gb_per_second"] / copy
                cells += [f"{t['step_ms']:.4f}", f"{share:.0%}"]
            else:
                cells += ["absent", ""]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def absent_list(leaf_set: Mapping[str, Any]) -> str:
    lines = []
    for key, label in (
        ("single_steps", "single steps"),
        ("compiled_loop", "in a loop"),
    ):
        for name, t in leaf_set[key].items():
            if "absent" in t:
                lines.append(f"- {name}, {label}: {t['absent']}")
    return "\n".join(["Absent:", "", *lines]) if lines else ""


def check_table(report: Report) -> str:
    limits = report["check_limits"]
    rows = [
        "| implementation | case | "
        + " | ".join(name.replace("_", " ") for name in limits)
        + " | verdict |",
        "|---|---|" + "---:|" * len(limits) + "---|",
        "| at most | | " + " | ".join(f"{x:g}" for x in limits.values()) + " | |",
    ]
    for result in report["checks"]:
        if "absent" in result:
            verdict = f"absent: {result['absent']}"
        else:
            verdict = "passed" if result["passed"] else "**failed**"
            verdict += f": {result['error']}" if "error" in result else ""
        cells = [result["implementation"], result["case"]]
        cells += [f"{result[x]:.2g}" if x in result else "" for x in limits]
        rows.append("| " + " | ".join([*cells, verdict]) + " |")
    return "\n".join(rows)


def draw_chart(report: Report, path: pathlib.Path) -> str:
    """Bars of the milliseconds of a step; the file's name, or why there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "not drawn: matplotlib is not installed"
    leaf_sets = report["leaf_sets"]
    names = list(report["contenders"])
    height = 0.9 + len(leaf_sets) * (0.32 * len(names) + 0.9)
    figure = Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(title(report))
    all_axes = figure.subplots(len(leaf_sets), squeeze=False)[:, 0]
    for axes, (set_name, leaf_set) in zip(all_axes, leaf_sets.items(), strict=True):
        for offset, key, label in (
            (-0.2, "single_steps", "single steps"),
            (0.2, "compiled_loop", "in a compiled loop"),
        ):
            timings = [leaf_set[key].get(name, {}) for name in names]
            values = [t.get("step_ms", 0.0) for t in timings]
            places = [i + offset for i in range(len(names))]
            bars = axes.barh(places, values, height=0.38, label=label)
            texts = [
                f"{t['step_ms']:.3f}" if "step_ms" in t else "absent" for t in timings
            ]
            axes.bar_label(bars, texts, padding=3, fontsize=8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(
            f"{set_name}, {leaf_set['parameters']:,} parameters", fontsize=11
        )
        axes.set_xlabel("ms for one step")
    all_axes[0].legend(fontsize=9)
    figure.savefig(path, dpi=120)
    return path.name
