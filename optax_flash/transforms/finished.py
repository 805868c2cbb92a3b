"""Finished params: an update that already is the new param."""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp

_ADVICE = (
    "nothing but optax.apply_updates may follow master_weights(finished=True): make it "
    "the outermost transformation, or pass finished=False"
)


class _Explained(type):
    """JAX prints the type of what is no array; this type says what to do."""

    def __repr__(cls) -> str:
        return f"<class {cls.__name__!r}: {_ADVICE}>"


class FinishedParam(metaclass=_Explained):
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

    __slots__ = ("_name", "_param")
    __array_ufunc__ = None  # NumPy arrays, too, leave the addition to __radd__.

    def __init__(self, param: jax.Array, name: str):
        self._param = param
        self._name = name

    def __radd__(self, old: jax.Array) -> jax.Array:
        new = self._param
        shape, dtype = jnp.shape(old), jnp.result_type(old)
        if shape != new.shape or dtype != new.dtype:
            raise TypeError(
                f"The finished param {self._name!r} is {new.dtype}{list(new.shape)}, "
                f"but is applied to {dtype}{list(shape)}. Apply the updates to "
                "the params that update saw."
            )
        return new

    def __repr__(self) -> str:
        return f"<finished param {self._name!r}: {_ADVICE}>"

    def _refuse(self, *args: Any) -> NoReturn:
        del args
        raise TypeError(f"Cannot compute with {self!r}.")

    __add__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __abs__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = __float__ = _refuse

    def __getattr__(self, name: str) -> Any:
        # Whoever asks for a shape, a dtype or astype takes this for an array. Python's
        # own protocols, __jax_array__ among them, must hear that there is none.
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()
