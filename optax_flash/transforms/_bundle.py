"""Work on many leaves, traced at the cost of a few.

A model has hundreds of leaves and a handful of shapes. A jitted function is traced once
for each shape, but calling it costs a tenth of a millisecond or two in tracing and
lowering, for every leaf. Here leaves that agree in shape, dtype and configuration go
through it in bundles, and the bundle is traced once too.
"""

import collections
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

SIZE = 8
"""Leaves in a bundle; the rest of a kind makes a smaller one."""


def map_leaves(
    f: Callable[..., Any],
    configurations: Sequence[Hashable],
    shared: Any,
    *columns: Sequence[Any],
) -> list[Any]:
    """``f(configuration, shared, *row)`` for every row, in bundles.

    Args:
      f: a module-level function.
      configurations: the first argument for each row, static.
      shared: the second argument, a tree of arrays, the same for all.
      *columns: one for each further argument, with a tree of arrays for each row.

    Returns:
      The result for each row.
    """
    rows = list(zip(*columns, strict=True))
    kinds: dict[tuple[Hashable, Hashable], list[int]] = collections.defaultdict(list)
    for i, (configuration, row) in enumerate(zip(configurations, rows, strict=True)):
        kinds[configuration, _signature(row)].append(i)
    results: list[Any] = [None] * len(rows)
    for (configuration, _), members in kinds.items():
        for start in range(0, len(members), SIZE):
            bundle = members[start : start + SIZE]
            outputs = _call_bundle(f, configuration, shared, [rows[i] for i in bundle])
            for i, output in zip(bundle, outputs, strict=True):
                results[i] = output
    return results


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call_bundle(
    f: Callable[..., Any], configuration: Hashable, shared: Any, rows: list[Any]
) -> list[Any]:
    return [_call(f, configuration, shared, row) for row in rows]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(
    f: Callable[..., Any], configuration: Hashable, shared: Any, row: tuple[Any, ...]
) -> Any:
    return f(configuration, shared, *row)


def _signature(row: tuple[Any, ...]) -> Hashable:
    """What rows must share to share a trace."""
    leaves, structure = jax.tree.flatten(row)
    return structure, tuple(jax.typeof(x) for x in leaves)
