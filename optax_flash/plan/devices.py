"""Accelerators, and how much memory each has."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
      name: as on the command line.
      memory: bytes that its driver reports.
      fraction: how much of it JAX takes by default. For GPUs
        ``XLA_PYTHON_CLIENT_MEM_FRACTION`` sets another.
    """

    name: str
    memory: int
    fraction: float = 0.75


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h100-80gb", 84_978_434_048),
        Device("h200-141gb", 141 * 10**9),
        Device("b200-180gb", 180 * 10**9),
        Device("a100-40gb", 40 * GIB),
        Device("a100-80gb", 80 * GIB),
        Device("l40s-48gb", 45 * GIB),
        Device("l4-24gb", 22 * GIB),
        Device("rtx-4090-24gb", 24 * GIB),
        Device("v5e-16gb", 16 * GIB, 0.95),
        Device("v5p-95gb", 95 * GIB, 0.95),
        Device("v6e-32gb", 32 * GIB, 0.95),
    )
}
"""Known devices by name."""
