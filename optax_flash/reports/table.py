"""Tables as plain text."""

from collections.abc import Collection, Sequence

Row = Sequence[str]


def text(rows: Sequence[Row | None], left: Collection[int] = (0,)) -> str:
    """Rows in columns that are two spaces apart.

    Args:
      rows: of as many cells each, the first of them the header; None for a rule.
      left: the columns whose cells are aligned on the left. Others are numbers.
    """
    columns = list(zip(*filter(None, rows), strict=True))
    widths = [max(map(len, column)) for column in columns]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(row: Row) -> str:
        cells = zip(range(len(widths)), row, widths, strict=True)
        return "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, cell, width in cells
        ).rstrip()

    return "\n".join(rule if row is None else line(row) for row in rows)
