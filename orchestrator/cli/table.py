"""Tables of text for a terminal. Pure."""

from collections.abc import Collection, Sequence


def lines(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[str]) -> list[str]:
    """Columns as wide as needed; those whose headers are in `left` stand left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    found = []
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        found.append("  " + "  ".join(cells).rstrip())
    return found
