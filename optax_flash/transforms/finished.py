"""Finished params: an update that already is the new param."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np

_ADVICE = (
    "only optax.apply_updates may use the updates of master_weights. Make it the "
    "outermost transformation: what is chained behind it or wrapped around it belongs "
    "inside, as in master_weights(optax.chain(...)). For updates that are read, "
    "selected, returned or measured (as Optimistix's OptaxMinimiser measures them), "
    "but never changed, pass finished=False"
)


class _Explained(type):
    """JAX prints the type of what is no array; this type says what to do."""

    def __repr__(cls) -> str:
        return f"<class {cls.__name__!r}: {_ADVICE}>"


class FinishedParam(metaclass=_Explained):
    """An opaque leaf of an updates tree: adding it to the old param gives the new one.

    ``optax.apply_updates`` computes ``param + update``. Where the new param is known,
    an additive update would be rounded on the way; this leaf returns the param itself
    from ``__radd__``. It has no other arithmetic, so a transformation placed after the
    one that made it fails instead of changing a param behind its residual's back.

    Args:
      param: the new param.
      name: its path, for errors.
      old: the param that update saw. Adding to any other array raises: that array may
        be an accumulator of updates, whose sum with a param means nothing.

    Raises:
      TypeError: anything is computed with it: an operator of :data:`REFUSED` (``abs``,
        ``-``, ``*``, ``<``, an index and the like), an attribute that arrays have, or a
        function of NumPy or JAX; or it is added to an array other than ``old``. The
        message says what to do.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_flash import FinishedParam
      >>> params = {"w": jnp.zeros(2)}
      >>> updates = {"w": FinishedParam(jnp.ones(2), "w", params["w"])}
      >>> optax.apply_updates(params, updates)
      {'w': Array([1., 1.], dtype=float32)}
    """

    __slots__ = ("_name", "_old", "_param")

    def __init__(self, param: jax.Array, name: str, old: Any):
        self._param = param
        self._name = name
        # Not the array itself: outside of jit that would keep its buffer alive.
        self._old = id(old)

    def __radd__(self, old: Any) -> jax.Array:
        if id(old) != self._old:
            new = self._param
            raise TypeError(
                f"The finished param {self._name!r}, {new.dtype}{list(new.shape)}, is "
                f"added to {_describe(old)}. Apply the updates to the params that "
                f"update saw, the very same arrays; {_ADVICE}."
            )
        return self._param

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any
    ) -> jax.Array:
        # How NumPy arrays begin what ends in __radd__.
        added = ufunc is np.add and method == "__call__" and inputs[1] is self
        if added and not kwargs:
            return self.__radd__(inputs[0])
        self._refuse(f"numpy.{ufunc.__name__}")

    def __repr__(self) -> str:
        return f"<finished param {self._name!r}: {_ADVICE}>"

    def _refuse(self, operation: str) -> NoReturn:
        raise TypeError(f"{operation}: cannot compute with {self!r}.")

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        # Whoever asks for a shape, a dtype or astype takes this for an array. Python's
        # own protocols, __jax_array__ among them, must hear that there is none.
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")


REFUSED = tuple(
    f"__{name}__"
    for name in (
        "abs add and array bool complex divmod eq float floordiv ge getitem gt "
        "index int invert iter le len lshift lt matmul mod mul ne neg or pos pow rand "
        "rdivmod rfloordiv rlshift rmatmul rmod rmul ror round rpow rrshift rshift "
        "rsub rtruediv rxor sub truediv xor"
    ).split()
)
"""The operators of an array that raise: all but the one that applies an update."""


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: FinishedParam, *args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        self._refuse(name.strip("_"))

    return refuse


for _name in REFUSED:
    setattr(FinishedParam, _name, _refusing(_name))


def _describe(x: Any) -> str:
    is_array = hasattr(x, "shape") and hasattr(x, "dtype")
    return f"another {x.dtype}{list(x.shape)}" if is_array else repr(x)
