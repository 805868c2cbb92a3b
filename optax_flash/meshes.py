"""How many shards an axis has, and what of a spec an array can have."""

import math
from typing import Any

from jax.sharding import PartitionSpec


def shards(mesh: Any, entry: Any) -> int:
    """The number of shards of an axis with an entry of a spec: None, a name, several.

    Args:
      mesh: a mesh, also an abstract one.
      entry: of a PartitionSpec.
    """
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    return math.prod(mesh.shape[name] for name in names)


def fitted(mesh: Any, spec: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """A spec for an array of ``shape``: axes that do not divide are replicated."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    return PartitionSpec(
        *[
            None if size % shards(mesh, entry) else entry
            for size, entry in zip(shape, entries, strict=True)
        ]
    )
