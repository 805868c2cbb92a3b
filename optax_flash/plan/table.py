"""A plan as a table. Needs ``rich``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optax_flash.plan.planner import Plan

WIDTH = 88


def render(plan: "Plan") -> Any:
    """What ``rich`` prints.

    Raises:
      ImportError: ``rich`` is missing.
    """
    try:
        from rich.console import Group
        from rich.table import Table
    except ImportError:
        raise ImportError(
            'A plan prints with rich: pip install "optax_flash[report]"'
        ) from None

    table = Table(title=plan.title)
    table.add_column("on each device")
    table.add_column("GiB", justify="right")
    table.add_column("bytes a parameter", justify="right")
    for name, count in plan.component_bytes.items():
        table.add_row(name, gib(count), _each(plan, count))
    table.add_section()
    table.add_row("total", gib(plan.total), _each(plan, plan.total))
    table.add_section()
    for name, count in plan.baselines.items():
        table.add_row(name, gib(count), _each(plan, count))
    return Group(table, *remarks(plan))


def as_text(plan: "Plan") -> str:
    """The table and the remarks, without colours."""
    group = render(plan)
    from rich.console import Console

    console = Console(width=WIDTH)
    with console.capture() as capture:
        console.print(group)
    return capture.get()


def remarks(plan: "Plan") -> list[str]:
    """What is to be said of a plan beside its numbers."""
    room = f"{gib(plan.usable)} GiB of {gib(plan.device.memory)}"
    verb = "fits into" if plan.fits else "does not fit into"
    lines = [f"A batch of {plan.batch} x {plan.length} {verb} {room}."]
    if plan.largest_batch is None:
        lines.append("Activations are not in it: nobody knows the architecture.")
    else:
        lines.append(f"The largest batch that fits: {plan.largest_batch}.")
        lines.append(_pairs("Activations", plan.activations))
    lines.append(_pairs("Gradients at the peak", plan.gradients))
    lines += [f"Saved against {k}: {gib(v)} GiB." for k, v in plan.saved.items()]
    return lines


def gib(count: int) -> str:
    """Bytes as GiB, with two decimals."""
    return f"{count / 2**30:.2f}"


def _each(plan: "Plan", count: int) -> str:
    if not plan.params:
        return "-"
    return f"{count * plan.devices / plan.params:.3f}"


def _pairs(name: str, counts: dict[str, int]) -> str:
    both = ", ".join(f"{gib(count)} GiB {how}" for how, count in counts.items())
    return f"{name}: {both}."
