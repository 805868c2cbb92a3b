"""Looking up a name, with an error that lists the known ones."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def look_up(kind: str, known: Mapping[str, T], name: str) -> T:
    """``known[name]``.

    Raises:
      ValueError: there is no such name. The message lists those that there are.
    """
    if name not in known:
        raise ValueError(f"{kind} {name!r} is not known; these are: {', '.join(known)}")
    return known[name]
