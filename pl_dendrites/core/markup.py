"""A table, as text where it is printed and as HTML where a notebook or a page shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Name", "Table", "Text", "html_table", "html_text", "in_notebook"]

# A notebook is one page: rules apply inside our root alone, and colours are those of its theme, light or dark.
_STYLE = """<style>
.pl-dendrites { overflow-x: auto; }
.pl-dendrites table { margin: 0 0 .8em; border-collapse: collapse; color: inherit; font-variant-numeric: tabular-nums; }
.pl-dendrites caption { padding: .3em .7em; color: inherit; font-weight: 600; text-align: left; caption-side: top; }
.pl-dendrites table th, .pl-dendrites table td { padding: .3em .7em; border: 0; text-align: right; }
.pl-dendrites table th, .pl-dendrites table td { vertical-align: top; }
.pl-dendrites table tr { border-bottom: 1px solid rgb(128 128 128 / 35%); }
.pl-dendrites table .words { max-width: 40em; text-align: left; }
</style>"""


class Name(str):
    """What something is called in the user's code: shown in the letters of code."""


# A cell, or a sentence in parts.
Text = str | Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; printed, it is text.

    Attributes:
        title: what it shows.
        columns: their titles; the first is that of the rows' titles.
        rows: the cells.
        words: columns of words, which begin on the left, as the first does; others are of numbers.

    Example:
        >>> print(Table("Layers", ("layer", "type", "neurons"), [(Name("net.0"), "Linear", "8")], words=("type",)))
        layer  type    neurons
        net.0  Linear        8
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Text]]
    words: Sequence[str] = ()

    def of_words(self, column: str) -> bool:
        """Whether a column is of words."""
        return column in self.words or column == self.columns[0]

    def __str__(self) -> str:
        cells = (self.columns, *self.rows)
        rows = [[text if isinstance(text, str) else "".join(text) for text in row] for row in cells]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        align = [str.ljust if self.of_words(column) else str.rjust for column in self.columns]
        lines = ([put(text, width) for put, text, width in zip(align, row, widths, strict=True)] for row in rows)
        return "\n".join("  ".join(line).rstrip() for line in lines)


def html_text(text: Text) -> str:
    """HTML of a text, in which nothing that it holds means anything to a browser.

    Example:
        >>> html_text(["see ", Name("<net>")])
        'see <code>&lt;net&gt;</code>'
    """
    parts = [text] if isinstance(text, str) else text
    return "".join(f"<code>{escape(part)}</code>" if isinstance(part, Name) else escape(part) for part in parts)


def html_table(table: Table) -> str:
    """HTML of a table, which scrolls by itself where it is wide.

    Example:
        >>> "<td>1 &lt; 2</td>" in html_table(Table("", ("a", "b"), [("", "1 < 2")]))
        True
    """

    def cell(start: str, text: Text, column: str) -> str:
        kind = ' class="words"' if table.of_words(column) else ""
        return f"<{start}{kind}>{html_text(text)}</{start[:2]}>"

    head = "".join(cell('th scope="col"', column, column) for column in table.columns)
    rows = (
        "<tr>"
        + cell('th scope="row"', row[0], table.columns[0])
        + "".join(cell("td", text, column) for text, column in zip(row[1:], table.columns[1:], strict=True))
        + "</tr>"
        for row in table.rows
    )
    title = escape(table.title)
    return (
        f'<div class="wide" role="region" aria-label="{title}" tabindex="0">\n<table>\n<caption>{title}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>\n</div>"
    )


def in_notebook(*tables: Table) -> str:
    """What ``_repr_html_`` returns for an object that is shown as tables; those without rows are left out.

    Example:
        >>> in_notebook(Table("Layers", ("layer", "neurons"), [("net.0", "8")])).count("<table>")
        1
    """
    return "\n".join([f'{_STYLE}\n<div class="pl-dendrites">', *(html_table(t) for t in tables if t.rows), "</div>"])
