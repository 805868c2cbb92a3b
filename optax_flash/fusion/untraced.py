"""Updates that jax cannot trace, as they compute with NumPy or Python's numbers."""

import warnings
from collections.abc import Callable, Iterable, Set
from typing import Any, TypeVar

import jax
import jax.core

ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
)
"""What jax raises where Python asks an array of a traced function for its value."""

ADVICE = (
    "a schedule or a transformation takes the value of an array: by float(), int(), "
    "bool(), an if, or by NumPy, as in float(np.interp(count, ...)). Compute with "
    "jax.numpy (jnp.interp, jnp.where), or take a schedule of optax. Numbers that only "
    "Python knows come in by optax.inject_hyperparams, whose state they are set in "
    "between two steps"
)

T = TypeVar("T")


class CannotTrace(TypeError):
    """An update takes values of arrays where they have none."""


def run(
    function: Callable[[], T],
    left_out: Set[str],
    error: Exception,
    operands: Iterable[Any],
    implementation: str | None,
) -> T:
    """Runs an update that could not be traced, one operation after another.

    Args:
      function: runs it on the operands.
      left_out: what needs a trace and did not run, once the function has returned.
      error: what tracing raised.
      operands: arrays.
      implementation: what was asked for.

    Raises:
      TypeError: arrays have no values here either, or a kernel was asked for. The
        message says what to do.
    """
    if implementation not in (None, "xla"):
        raise TypeError(
            f"implementation={implementation!r} does not fit: the update cannot be "
            f"compiled, as {ADVICE}."
        ) from error
    if any(isinstance(x, jax.core.Tracer) for x in operands):
        raise CannotTrace(f"The update cannot be traced: {ADVICE}.") from error
    try:
        results = function()
    except ERRORS:
        raise CannotTrace(f"The update cannot be traced: {ADVICE}.") from error
    without = f"without {' and '.join(sorted(left_out))}, " if left_out else ""
    warnings.warn(
        "The update is slow, and needs memory for a whole state that is not in codes: "
        f"it runs {without}one operation after another, as {ADVICE}.",
        stacklevel=2,
    )
    return results
