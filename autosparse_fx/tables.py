"""Tables as text and as HTML."""

import html
from collections.abc import Sequence

Row = Sequence[str]


def text_table(header: Row, rows: Sequence[Row], totals: Sequence[Row] = (), left: int = 2) -> str:
    """Columns side by side, the first ``left`` of them aligned to the left, with rules around the rows."""
    every = [header, *rows, *totals]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]

    def line(row: Row) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(header), rule, *map(line, rows)]
    return "\n".join([*lines, rule, *map(line, totals)] if totals else lines)


def html_table(header: Row, rows: Sequence[Row], totals: Sequence[Row] = (), left: int = 2) -> str:
    """The same as an HTML table, with every cell escaped."""

    def line(row: Row, tag: str) -> str:
        style = [' style="text-align:left"' if i < left else "" for i in range(len(row))]
        cells = "".join(f"<{tag}{s}>{html.escape(c)}</{tag}>" for s, c in zip(style, row, strict=True))
        return f"<tr>{cells}</tr>"

    head = f"<thead>{line(header, 'th')}</thead>"
    body = f"<tbody>{''.join(line(row, 'td') for row in rows)}</tbody>"
    foot = f"<tfoot>{''.join(line(row, 'th') for row in totals)}</tfoot>" if totals else ""
    return f"<table>{head}{body}{foot}</table>"


class Tabular:
    """What is shown as a table with notes below: printed as text, as HTML where a notebook shows it."""

    def _table(self) -> tuple[Row, list[Row], list[Row]]:
        """The header, the rows, and the totals."""
        raise NotImplementedError

    def _notes(self) -> list[str]:
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join([text_table(*self._table()), *self._notes()])

    def _repr_html_(self) -> str:
        return html_table(*self._table()) + "".join(f"<div>{html.escape(note)}</div>" for note in self._notes())


def short(number: float, unit: str = "") -> str:
    """A count to four digits: ``8.178 G``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.4g} {prefix}{unit}"
    return f"{number:.4g} {unit}".rstrip()
