"""Making an optimizer state without its uncompressed form ever being in memory."""

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_flash import meshes
from optax_flash.fusion import untraced
from optax_flash.transforms import _shardings

PyTree = Any


def compiled(init: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """Runs an init function under jit when it is given real arrays.

    Outside of jit a wrapped optimizer's float32 moments would all be made before the
    first is encoded: 8 bytes a parameter for Adam, at the moment when memory is
    scarcest. Under jit only the codes are. The state is sharded like the params, as
    ``jnp.zeros_like`` does outside of jit; factors are, along the axes that they share.
    """

    @functools.wraps(init)
    def wrapped(params: PyTree) -> PyTree:
        leaves = jax.tree.leaves(params)
        concrete = all(
            isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
            for x in leaves
        )
        if not leaves or not concrete:
            return init(params)
        try:
            return compiled_init(params, leaves)
        except untraced.ERRORS:
            # It may still run as it does without us; an update says more.
            return init(params)

    def compiled_init(params: PyTree, leaves: list[jax.Array]) -> PyTree:
        shardings = _shardings.own(params)
        if shardings is None:
            # A state of zeros does not depend on the params, so jit would not follow.
            with jax.default_device(next(iter(leaves[0].devices()))):
                return jax.jit(init)(params)
        with meshes.context(shardings[0].mesh):
            # A new function each time: a cached trace would not run init again.
            state = jax.eval_shape(lambda p: init(p), params)
            out = _shardings.of_tree(state, params, shardings, shardings[0].mesh)
            return jax.jit(init, out_shardings=out)(params)

    return wrapped


def as_arrays(tree: PyTree) -> PyTree:
    """The tree with arrays in place of Python's numbers; itself if there are none."""

    def is_number(x: Any) -> bool:
        return isinstance(x, numbers.Number) and not hasattr(x, "dtype")

    if not any(map(is_number, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.result_type(x)) if is_number(x) else x, tree
    )


def like_float32(x: Any) -> Any:
    """A param as the wrapped optimizer sees it: half precision becomes float32.

    So do 8-bit floats. What is not real floating stays as it is.
    """
    if not hasattr(x, "dtype"):
        return x
    if jnp.dtype(x.dtype).itemsize >= 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
    # Not through jnp, which costs several times as much to trace.
    return jax.lax.convert_element_type(x, np.dtype(np.float32))


def in_float32(x: jax.Array) -> jax.Array:
    """A gradient in float32; complex numbers stay complex."""
    return x.astype(float32_of(x))


def float32_of(x: Any) -> Any:
    """The dtype of a first moment: float32, or the param's own if that is complex."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.complexfloating) else jnp.float32


def not_constant(state: PyTree) -> PyTree:
    """The same state, of which the compiler does not know that it is zeros.

    XLA would encode the zeros while it compiles, element by element: seconds for a
    state that takes milliseconds to make.
    """
    zero = jax.lax.optimization_barrier(jnp.zeros([], jnp.float32))

    def add(x: Any) -> Any:
        # Scalars cost nothing, and may be weakly typed, which adding would change.
        large = getattr(x, "ndim", 0) > 0 and jnp.issubdtype(x.dtype, jnp.floating)
        return x + zero.astype(x.dtype) if large else x

    return jax.tree.map(add, state)
