"""What a plan says, and how it prints."""

import dataclasses

from optax_flash.plan.devices import Device
from optax_flash.plan.shards import STATE
from optax_flash.reports import table

COMPONENTS: tuple[str, ...] = (
    "weights",
    *STATE,
    "gradients",
    "activations",
)
"""What a plan counts."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`plan` returns. Prints as a table.

    All bytes are those of one device.

    Attributes:
      title: what was planned.
      params: numbers that the model has, on all devices together.
      devices: how many devices.
      batch: examples in a step, on all devices together.
      length: tokens of each.
      component_bytes: bytes by component at the moment when the step takes most, see
        :data:`COMPONENTS`. Their sum is the compiler's peak: arguments, outputs and
        temporaries, less what is aliased.
      gradients: bytes of gradients held then, by "all at once" and "released".
      activations: bytes of activations then, by "kept" and "rematerialized"; empty for
        params without an architecture, whose activations are unknown.
      device: the device.
      usable: bytes of it that a step may take.
      largest_batch: of the examples that fit, on all devices together; None where
        activations are not known, 0 where nothing fits.
      baselines: bytes that the same step takes with other optimizers, by their name.
    """

    title: str
    params: int
    devices: int
    batch: int
    length: int
    component_bytes: dict[str, int]
    gradients: dict[str, int]
    activations: dict[str, int]
    device: Device
    usable: int
    largest_batch: int | None
    baselines: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.component_bytes.values())

    @property
    def fits(self) -> bool:
        """Whether they are usable on the device."""
        return self.total <= self.usable

    @property
    def saved(self) -> dict[str, int]:
        """Bytes that each baseline takes more."""
        return {name: count - self.total for name, count in self.baselines.items()}

    def __str__(self) -> str:
        counts = [*self.component_bytes.items(), None, ("total", self.total), None]
        counts += self.baselines.items()
        rows = [("on each device", "GiB", "bytes a parameter"), None]
        rows += [x and (x[0], gib(x[1]), self._each(x[1])) for x in counts]
        return "\n".join([self.title, table.text(rows), *self._remarks()])

    def _each(self, count: int) -> str:
        """Bytes of one parameter, on all devices together."""
        return f"{count * self.devices / self.params:.3f}" if self.params else "-"

    def _remarks(self) -> list[str]:
        """What is to be said beside the numbers."""
        room = f"{gib(self.usable)} GiB of {gib(self.device.memory)}"
        verb = "fits into" if self.fits else "does not fit into"
        lines = [f"A batch of {self.batch} x {self.length} {verb} {room}."]
        if self.largest_batch is None:
            lines.append(
                "Activations are not included: the model's architecture is unknown."
            )
        else:
            lines.append(f"The largest batch that fits: {self.largest_batch}.")
            lines.append(_pairs("Activations", self.activations))
        lines.append(_pairs("Gradients at the peak", self.gradients))
        lines += [f"Saved against {k}: {gib(v)} GiB." for k, v in self.saved.items()]
        return lines


def gib(count: int) -> str:
    """Bytes as GiB, with two decimals."""
    return f"{count / 2**30:.2f}"


def _pairs(name: str, counts: dict[str, int]) -> str:
    both = ", ".join(f"{gib(count)} GiB {how}" for how, count in counts.items())
    return f"{name}: {both}."
