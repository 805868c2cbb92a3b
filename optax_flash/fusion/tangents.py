"""Whether jax is differentiating, by arrays at hand, while Python runs."""

from collections.abc import Iterable
from typing import Any, NoReturn

import jax
import jax.core
import jax.numpy as jnp


def moves(arrays: Iterable[Any]) -> bool:
    """Whether one of the arrays has a tangent, under ``jax.jvp``, ``grad`` or the like.

    Inside of a function that is only traced (by ``jit``, ``scan`` or ``cond``) none has
    one yet. No equation is left behind.
    """
    traced = [
        x
        for x in arrays
        if isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if not traced:
        return False
    try:
        _look(traced)
    except _Moves:
        return True
    except _Still:
        return False
    raise AssertionError("either the function or its rule is called")


class _Moves(Exception):
    """The rule was called."""


class _Still(Exception):
    """The function was called."""


# Where something moves, jax calls the rule at once instead of the function. Leaving by
# an exception keeps jax from tracing a call of it where nothing does.
@jax.custom_jvp
def _look(arrays: list[jax.Array]) -> NoReturn:
    del arrays
    raise _Still


@_look.defjvp
def _(primals: Any, tangents: Any) -> NoReturn:
    del primals, tangents
    raise _Moves
