"""Finished params: an update that already is the new param."""

from typing import Any, NoReturn

import jax


class FinishedParam:
    """An opaque leaf of an updates tree: adding it to the old param gives the new one.

    ``optax.apply_updates`` computes ``param + update``. Where the new param is known,
    an additive update would be rounded on the way; this leaf returns the param itself
    from ``__radd__``. It has no arithmetic, so a transformation placed after the one
    that made it fails instead of changing a param behind its residual's back.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_flash import FinishedParam
      >>> updates = {"w": FinishedParam(jnp.ones(2), "w")}
      >>> optax.apply_updates({"w": jnp.zeros(2)}, updates)
      {'w': Array([1., 1.], dtype=float32)}
    """

    __slots__ = ("name", "param")

    def __init__(self, param: jax.Array, name: str):
        self.param = param
        self.name = name

    def __radd__(self, old: jax.Array) -> jax.Array:
        if old.shape != self.param.shape or old.dtype != self.param.dtype:
            raise TypeError(
                f"The finished param {self.name!r} is {self.param.dtype}"
                f"{list(self.param.shape)}, but is applied to {old.dtype}"
                f"{list(old.shape)}. Apply the updates to the params that update saw."
            )
        return self.param

    def __repr__(self) -> str:
        # Appears in JAX's own message where a transformation takes this for an array.
        return (
            f"<finished param {self.name!r}: nothing but optax.apply_updates may "
            "follow master_weights(finished=True). Make it the outermost "
            "transformation, or pass finished=False>"
        )

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        raise TypeError(f"Cannot compute with {self!r}.")

    __add__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __abs__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = __float__ = __array__ = _refuse
    astype = _refuse
