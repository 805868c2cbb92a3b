"""How the arrays of a state are stored: what a state says of itself."""

import dataclasses
import functools
import sys
from typing import Any, TypeVar

import jax
import numpy as np

S = TypeVar("S")

VERSION = 3
"""Of the storage formats. It changes whenever old codes would decode differently."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """How one array of a state is stored.

    Attributes:
      path: of the param, such as ``"decoder/kernel"``.
      field: of the state, such as ``"mu"``, or ``"residual"``.
      codec: a Codec, or the ResidualCodec of a residual, which is its own codes.
      shape: of the array that the codes stand for.
      dtype: of that array, as the wrapped transformation made it; of the codes of a
        residual.
      at: the codes' place among the leaves of the tree that holds them, which is
        ``inner_state`` or ``residual``.
      factor: whether the array is a low-rank factor.
    """

    path: str
    field: str
    codec: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    at: int
    factor: bool = False

    @property
    def name(self) -> str:
        """The param's path and the field, such as ``"decoder/kernel/mu"``."""
        return f"{self.path}/{self.field}"

    def describe(self) -> str:
        """The codec; of a factor also its shape, which tells the rank."""
        return f"{self.codec!r}" + (f" of {list(self.shape)}" if self.factor else "")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StateCodecs:
    """The codecs of a state: a part of its structure, not of its arrays.

    ``jax.jit``, ``jax.eval_shape``, ``jax.lax.scan`` and whatever else keeps a tree's
    structure carry it along.

    Attributes:
      leaves: what is stored in codes, in the order of the state's scales.
      tracked: the paths of the params that are not frozen, where the state has a digest
        of them; see :func:`optax_flash.changed_params`.
      version: of the storage formats.
    """

    leaves: tuple[Stored, ...] = ()
    tracked: tuple[str, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        register_with_flax()

    @functools.cached_property
    def by_name(self) -> dict[str, Stored]:
        """What is stored in codes, by name."""
        return {leaf.name: leaf for leaf in self.leaves}

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.leaves, self.tracked, self.version))

    def __hash__(self) -> int:
        # Every call of a jitted step asks for it.
        return self._hash

    def __reduce__(self) -> Any:
        # Not the hash, which is another one in another process.
        return StateCodecs, (self.leaves, self.tracked, self.version)

    def __repr__(self) -> str:
        return f"<StateCodecs: {len(self.leaves)} arrays in codes>"

    def describe(self) -> dict[str, Any]:
        """Version and codecs as plain data."""
        leaves = {leaf.name: leaf.describe() for leaf in self.leaves}
        return {"version": self.version, "leaves": leaves}


def register_with_flax() -> None:
    """Teaches Flax's serialization, if it is imported, what a state's codecs are.

    Its msgpack knows no static nodes. It stores their description, which is compared
    when a state is read.
    """
    serialization: Any = sys.modules.get("flax.serialization")
    register = getattr(serialization, "register_serialization_state", None)
    if register is not None:
        register(StateCodecs, StateCodecs.describe, _read_codecs, override=True)


def known_to_flax(state: type[S]) -> type[S]:
    """A class of states whose ``codecs`` Flax's serialization can write and read.

    Flax may be imported when a state has long been made, where a checkpoint is written.
    It takes a field from a NamedTuple and then looks for its class among those that it
    knows, so it is told when the field is taken.

    Args:
      state: a NamedTuple with a field ``codecs``.
    """
    cls: Any = state
    field = cls.codecs

    def codecs(self: Any) -> StateCodecs:
        register_with_flax()
        return field.__get__(self)

    cls.codecs = property(codecs, doc=field.__doc__)
    return state


def _read_codecs(target: StateCodecs, saved: dict[str, Any]) -> StateCodecs:
    """The codecs of the state that is read into, if the one that was saved has them."""
    compare(saved, target.describe())
    return target


def compare(saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises where two descriptions of a state differ.

    Args:
      saved: ``{"version": int, "leaves": {"path/field": codec}}`` of what was saved.
      expected: the same of what it is read into.
    """
    if saved.get("version") != expected["version"]:
        raise ValueError(
            f"The checkpoint has format version {saved.get('version')!r}, this "
            f"optax_flash reads {expected['version']}. Convert it: to_optax_state in "
            "the release that wrote it, from_optax_state in this one."
        )
    found = saved.get("leaves", {})
    for name in [*expected["leaves"], *found]:
        there = found.get(name, "no codes")
        here = expected["leaves"].get(name, "no codes")
        if there != here:
            raise ValueError(
                f"The checkpoint stores {name!r} as {there}, this transformation as "
                f"{here}. Make the transformation with the checkpoint's codecs, bits, "
                "rank and min_size; or restore with the transformation that saved it, "
                "and convert with optax_flash.to_optax_state and from_optax_state."
            )
