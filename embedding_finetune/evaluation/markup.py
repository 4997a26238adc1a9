"""Pieces of HTML that the sections of the report share."""

from collections.abc import Sequence
from html import escape

COLOURS = 6
"""Of models; the template has a class for each, m0 and so on."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows. It escapes the texts."""
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr>"]
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'
