"""Derivatives that go through updates: carried beside codes, which have none."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flash.fusion import ops
from optax_flash.transforms import _entries
from optax_flash.transforms._rules import Field

PyTree = Any


def with_carried(state: Any) -> Any:
    """The same state, which carries derivatives from here on."""
    if state.carried is not None:
        return state
    zeros = iter([derivative_of(x.decoded()) for x in _entries.entries(state)])

    def carried(scales: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: None if isinstance(x, optax.MaskedNode) else next(zeros),
            scales,
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )

    fields = {key.removesuffix(_SCALES): x for key, x in sorted(state.scales.items())}
    return state._replace(
        carried={f"{name}{_CARRIED}": carried(x) for name, x in fields.items()}
    )


def leaves(state: Any) -> list[Any]:
    """What carries the derivatives of each leaf in codes; None where nothing does."""
    return jax.tree.leaves(state.carried) or [None] * len(state.codecs.leaves)


_SCALES = "_scales"
_CARRIED = "_carried"


def key_of(field: Field) -> str:
    return f"{field.name}{_CARRIED}"


def column(state: Any, field: Field, structure: Any) -> list[Any]:
    """What carries the derivatives of a field's entries; None where nothing does."""
    if state.carried is None:
        return [None] * structure.num_leaves
    return structure.flatten_up_to(state.carried[key_of(field)])


def derivative_of(x: jax.Array) -> jax.Array:
    """Zeros whose derivative is the array's, which its codes cannot have."""
    return ops.Elementwise(_zeros, None, _itself)(x)[0]


def with_derivative(x: jax.Array, carried: jax.Array | None) -> jax.Array:
    """The array, with the derivative that was carried beside its codes."""
    if carried is None:
        return x
    return ops.Elementwise(_first, None, _sum)(x, carried)[0]


def _zeros(static: None, x: jax.Array) -> tuple[jax.Array]:
    del static
    return (jnp.zeros_like(x, dtype=jnp.float32),)


def _itself(static: None, x: jax.Array) -> tuple[jax.Array]:
    del static
    return (x.astype(jnp.float32),)


def _first(static: None, x: jax.Array, carried: jax.Array) -> tuple[jax.Array]:
    del static, carried
    return (x,)


def _sum(static: None, x: jax.Array, carried: jax.Array) -> tuple[jax.Array]:
    del static
    return (x + carried,)
