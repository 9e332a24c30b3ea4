"""How a table is laid out: the columns in which something stands, aligned for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def filled(columns: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The rows of a table, its titles first, without the columns in which nothing stands."""
    kept = {title: cells for title, cells in columns.items() if any(cells)}
    return [list(kept), *(list(row) for row in zip(*kept.values(), strict=True))]


def aligned(rows: Sequence[Sequence[str]], words: Collection[str]) -> list[str]:
    """The lines of a table, its titles first. Columns titled in ``words`` are flush left, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (c.ljust(w) if title in words else c.rjust(w) for title, c, w in zip(rows[0], row, widths, strict=True))
        return "  ".join(padded).rstrip()

    return [line(row) for row in rows]


def markdown(rows: Sequence[Sequence[str]], words: Collection[str]) -> list[str]:
    """The same lines as Markdown."""
    rule = [":--" if title in words else "--:" for title in rows[0]]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
