"""``memory_report``: what an optimizer will keep in memory, from shapes alone."""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flash.io import convert
from optax_flash.reports import table
from optax_flash.transforms import _arguments, _boxes, _init, _inside, _mirror

COMPONENTS: tuple[str, ...] = (
    "weights",
    "residual",
    "codes",
    "scales",
    "other state",
    "gradients",
)
"""What is counted. "other state" is all of the state that is not in codes."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Params of one kind: equal shapes, and paths that differ in numbers only.

    Attributes:
      name: their path, with ``*`` for numbers that differ.
      leaves: how many params.
      params: how many numbers they hold together.
      component_bytes: bytes by component, see :data:`COMPONENTS`.
      stock_bytes: the same for the stock optimizer: float32 weights, state, gradients.
    """

    name: str
    leaves: int
    params: int
    component_bytes: dict[str, int]
    stock_bytes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What :func:`memory_report` returns. Prints as a table.

    Attributes:
      rows: a row for each kind of param, and one, with no params, for the rest of the
        state (counters and the like).
    """

    rows: tuple[Row, ...]

    @property
    def params(self) -> int:
        """How many numbers the params hold."""
        return sum(row.params for row in self.rows)

    @property
    def component_bytes(self) -> dict[str, int]:
        """Bytes by component, of all params."""
        return {c: sum(row.component_bytes[c] for row in self.rows) for c in COMPONENTS}

    @property
    def stock_bytes(self) -> dict[str, int]:
        """Bytes by component of the stock optimizer."""
        return {c: sum(row.stock_bytes[c] for row in self.rows) for c in COMPONENTS}

    @property
    def bytes_per_param(self) -> float:
        """All components over the number of params; 0 where there are none."""
        return _each(self.component_bytes, self.params)

    @property
    def stock_bytes_per_param(self) -> float:
        """The same for the stock optimizer."""
        return _each(self.stock_bytes, self.params)

    def __str__(self) -> str:
        header = ["params", "leaves", "numbers", *COMPONENTS, "total", "stock"]
        leaves = sum(row.leaves for row in self.rows)
        total = Row("all", leaves, self.params, self.component_bytes, self.stock_bytes)
        rows = [header, None, *map(_cells, self.rows), None, _cells(total)]
        return f"bytes per parameter\n{table.text(rows)}"


def memory_report(
    tx: optax.GradientTransformation, params: optax.Params
) -> MemoryReport:
    """Counts what training holds between steps: weights, state and gradients.

    Nothing is allocated; shapes are enough. Gradients are counted in the dtype of the
    params. The stock optimizer is ``tx`` without this library: the same
    transformations on float32 weights, with float32 gradients.

    Args:
      tx: any transformation, however deeply it wraps ours.
      params: arrays or ``jax.ShapeDtypeStruct``, in the dtypes they will be trained in.

    Returns:
      A :class:`MemoryReport`; ``print`` it for a table.

    Example:
      >>> import jax, jax.numpy as jnp, optax_flash
      >>> params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)}
      >>> tx = optax_flash.master_weights(optax_flash.adamw8(1e-3))
      >>> report = optax_flash.memory_report(tx, params)
      >>> f"{report.bytes_per_param:.3f} of {report.stock_bytes_per_param:.0f}"
      '7.125 of 16'
    """
    call = "memory_report(tx, params)"
    _arguments.check_transformation(tx, (params,), call)
    _arguments.check_params(params, call)
    params = _init.as_arrays(_mirror.arrays_of(params))
    state = _boxes.unboxed(jax.eval_shape(lambda p: tx.init(p), params))
    params = _boxes.unboxed(params)
    stock_state = jax.eval_shape(convert.decoded, state)
    of_param = _bytes_of_params(state, params)
    stock_of_param = _bytes_of_params(stock_state, params)
    in_codes = _bytes_in_codes(state)

    paths = _mirror.leaf_paths(params)
    groups = collections.defaultdict(list)
    for path, leaf in zip(paths, jax.tree.leaves(params), strict=True):
        groups[re.sub(r"\d+", "*", path), tuple(leaf.shape)].append((path, leaf))
    rows = []
    for (name, shape), members in groups.items():
        ours, stock = dict.fromkeys(COMPONENTS, 0), dict.fromkeys(COMPONENTS, 0)
        for path, leaf in members:
            size = math.prod(leaf.shape)
            for component in ("weights", "gradients"):
                ours[component] += size * jnp.dtype(leaf.dtype).itemsize
                stock[component] += size * max(jnp.dtype(leaf.dtype).itemsize, 4)
            for component, count in in_codes[path].items():
                ours[component] += count
            ours["other state"] += of_param[path] - sum(in_codes[path].values())
            stock["other state"] += stock_of_param[path]
        name = members[0][0] if len(members) == 1 else name
        name = f"{name} {list(shape)}"
        rows.append(
            Row(name, len(members), len(members) * math.prod(shape), ours, stock)
        )
    rows.append(_rest(state, stock_state, of_param, stock_of_param))
    return MemoryReport(tuple(rows))


def _bytes_of_params(state: Any, params: Any) -> collections.Counter[str]:
    """Bytes of the state that mirror a param, by its path."""
    paths = _mirror.leaf_paths(params)
    counts: collections.Counter[str] = collections.Counter()
    parts, _ = _mirror.split_state(state, params)
    for part in parts:
        # Where the params are a single array, any number would mirror it.
        if isinstance(part, _mirror.Mirror) and _is_state_field(part, paths):
            for path, x in zip(paths, part.entries, strict=True):
                counts[path] += _nbytes(x)
    return counts


def _is_state_field(part: _mirror.Mirror, paths: list[str]) -> bool:
    return len(paths) > 1 or getattr(part.tree, "ndim", 0) > 0


def _bytes_in_codes(state: Any) -> dict[str, collections.Counter[str]]:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for entry, codes, scales in _inside.stored(state):
        kind = "residual" if scales is None else "codes"
        counts[entry.path][kind] += _nbytes(codes)
        counts[entry.path]["scales"] += 0 if scales is None else _nbytes(scales)
    return counts


def _rest(
    state: Any,
    stock_state: Any,
    of_param: collections.Counter[str],
    stock_of_param: collections.Counter[str],
) -> Row:
    """What belongs to no param: counters, hyperparameters."""
    ours, stock = dict.fromkeys(COMPONENTS, 0), dict.fromkeys(COMPONENTS, 0)
    ours["other state"] = _total(state) - of_param.total()
    stock["other state"] = _total(stock_state) - stock_of_param.total()
    return Row("(no param)", 0, 0, ours, stock)


def _each(component_bytes: dict[str, int], params: int) -> float:
    return sum(component_bytes.values()) / params if params else 0.0


def _total(tree: Any) -> int:
    return sum(_nbytes(x) for x in jax.tree.leaves(tree))


def _nbytes(x: Any) -> int:
    if not hasattr(x, "shape"):
        return 0
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize


def _cells(row: Row) -> list[str]:
    """A row's numbers as text: bytes per parameter, or bytes where there is none."""

    def cell(count: int) -> str:
        if not row.params:
            return f"{count} B" if count else "-"
        return f"{count / row.params:.3f}" if count else "-"

    numbers = [row.component_bytes[component] for component in COMPONENTS]
    numbers += [sum(row.component_bytes.values()), sum(row.stock_bytes.values())]
    return [row.name, str(row.leaves), f"{row.params:,}", *map(cell, numbers)]
