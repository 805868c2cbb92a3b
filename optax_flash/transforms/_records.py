"""What transformations note about their storage while they are being described.

Codecs are configuration of a transformation, not part of its state. ``collect`` makes
every ``init`` that runs inside it, however deeply wrapped, say how it stores each leaf;
``uncompressed`` makes it return the state that optax alone would have, ``configured``
the state with its configuration beside it.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import jax
import optax


class Record(NamedTuple):
    """How one leaf of an optimizer state, or one param's residual, is stored.

    Attributes:
      path: of the param, such as ``"decoder/kernel"``.
      field: of the state, such as ``"mu"``, or ``"residual"``.
      codec: ``repr`` of the codec.
      shape: of the array that the codes stand for.
      group: how many neighbours along its last axis share a scale.
      code_bytes: bytes of its codes.
      scale_bytes: bytes of its scales.
    """

    path: str
    field: str
    codec: str
    shape: tuple[int, ...]
    group: int
    code_bytes: int
    scale_bytes: int


_records: contextvars.ContextVar[list[Record] | None] = contextvars.ContextVar(
    "optax_flash_records", default=None
)


@contextlib.contextmanager
def collect() -> Iterator[list[Record]]:
    """Gives the list into which inits put their records while the context is open."""
    records: list[Record] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def active() -> bool:
    """Whether somebody collects."""
    return _records.get() is not None


def add(record: Record) -> None:
    """Puts a record where somebody collects."""
    records = _records.get()
    if records is not None:
        records.append(record)


_uncompressed: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "optax_flash_uncompressed", default=False
)


@contextlib.contextmanager
def uncompressed() -> Iterator[None]:
    """Makes inits return the wrapped transformation's own float32 state."""
    token = _uncompressed.set(True)
    try:
        yield
    finally:
        _uncompressed.reset(token)


def is_uncompressed() -> bool:
    """Whether the wrapped transformation's own state is asked for."""
    return _uncompressed.get()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Configured:
    """A transformation's state, and what it does not say about its storage.

    A pytree node that wrappers carry along, so it stands where the state would.

    Attributes:
      state: what init returns.
      params: what init was given, by the wrappers: masked, for example.
      config: of the transformation.
    """

    state: Any
    params: Any
    config: Any = dataclasses.field(metadata={"static": True})


_configured: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "optax_flash_configured", default=False
)


@contextlib.contextmanager
def configured() -> Iterator[None]:
    """Makes inits return their state as :class:`Configured`."""
    token = _configured.set(True)
    try:
        yield
    finally:
        _configured.reset(token)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Makes inits say nothing, and return the state that updates take."""
    tokens = [(x, x.set(y)) for x, y in _PLAIN]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


_PLAIN: tuple[tuple[contextvars.ContextVar[Any], Any], ...] = (
    (_records, None),
    (_uncompressed, False),
    (_configured, False),
)


def with_config(state: Any, params: Any, config: Hashable) -> Any:
    """The state of an init, configured where that is asked for."""
    return Configured(state, params, config) if _configured.get() else state


def describe(tx: optax.GradientTransformation, params: Any) -> Any:
    """What :func:`configured` inits make of params or their shapes: shapes."""
    with configured():
        # A new function each time: a cached trace would not run init again.
        return jax.eval_shape(lambda p: tx.init(p), params)
