"""Plans as stacked bars. Needs ``matplotlib``."""

import os
from collections.abc import Mapping

from optax_flash.plan.result import COMPONENTS, Plan


def save(plans: Mapping[str, Plan], path: str | os.PathLike[str]) -> None:
    """Draws a bar for each plan, and a line for what its device has.

    Args:
      plans: by the name under the bar.
      path: of the image; its suffix tells the format.

    Raises:
      ImportError: ``matplotlib`` is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            'A chart is drawn by matplotlib: pip install "optax_flash[plan]"'
        ) from None

    figure = Figure(figsize=(2.5 + 1.6 * len(plans), 4.5), layout="constrained")
    axes = figure.add_subplot()
    bottoms = [0.0] * len(plans)
    for component in COMPONENTS:
        heights = [p.component_bytes[component] / 2**30 for p in plans.values()]
        axes.bar(list(plans), heights, bottom=bottoms, label=component, width=0.6)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    for name, usable in {
        p.device.name: p.usable / 2**30 for p in plans.values()
    }.items():
        axes.axhline(usable, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"usable of {name}",
            (0.01, usable),
            (0, 3),
            ("axes fraction", "data"),
            "offset points",
        )
    axes.set_ylabel("GiB on each device")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
