"""Which rows of a table are among the quick tests."""

from collections.abc import Collection, Iterable

import pytest


def quick(names: Collection, rows: Iterable) -> list:
    """Rows to parametrize by: the named ones, and in the full tier all others.

    A tuple is a row of several arguments.
    """

    def full(row):
        values = row if isinstance(row, tuple) else (row,)
        return pytest.param(*values, marks=pytest.mark.full)

    return [row if row in names else full(row) for row in rows]
