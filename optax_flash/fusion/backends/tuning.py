"""Sizes of tiles, by device."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel divides its leaf.

    Attributes:
      elements: of a tile, which one block of threads handles; a power of two.
      num_warps: of a block: 32 threads each.
    """

    elements: int = 2048
    num_warps: int = 4


DEFAULT = Config()
"""16 elements a thread: 16 bytes of codes, which is the widest load."""

CONFIGS: Mapping[str, Config] = MappingProxyType({})
"""By the beginning of a device's kind, where something else measured better."""


def config_for(device_kind: str) -> Config:
    """The configuration for a device such as ``"NVIDIA H100 80GB HBM3"``."""
    for beginning, config in CONFIGS.items():
        if device_kind.startswith(beginning):
            return config
    return DEFAULT
