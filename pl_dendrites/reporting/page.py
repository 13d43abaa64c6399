"""A page of headings, tables and pictures, written as HTML that stands alone or as Markdown with pictures beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from pl_dendrites.core.markup import Name, Table, Text, html_table, html_text
from pl_dendrites.reporting.figures import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Block", "Facts", "Heading", "Items", "Paragraph", "Picture", "in_frame", "to_html", "to_markdown"]


_LEAD = ' class="lead"'


@dataclass(frozen=True)
class Heading:
    """Of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; the first of a page, which sums it up, stands out."""

    text: Text
    stands_out: bool = False


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: Sequence[Text]
    ordered: bool = False


@dataclass(frozen=True)
class Facts:
    """What is seen first: ``(what, value, remark)`` each."""

    facts: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: a part of a file's name.
        shows: the text for those who do not see it.
        draw: draws it in given colours.
    """

    name: str
    shows: str
    draw: Callable[[Theme], Figure]


Block = Heading | Paragraph | Items | Facts | Table | Picture


# -- HTML ---------------------------------------------------------------------------------------------------------


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """One file, with no script and nothing from elsewhere; pictures are in it twice, for light and dark screens.

    Example:
        >>> page = to_html("A & B", [Paragraph(["see ", Name("<net>")])])
        >>> "<p>see <code>&lt;net&gt;</code></p>" in page, "<h1>A &amp; B</h1>" in page
        (True, True)
    """
    template = Template(files("pl_dendrites.reporting").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(map(_html_block, blocks)))


def in_frame(title: str, blocks: Iterable[Block]) -> str:
    """The page as HTML for a notebook: a document of its own, in a frame that can be drawn longer.

    Example:
        >>> in_frame("A", [Paragraph("b")])[:47]
        '<iframe title="A" srcdoc="&lt;!DOCTYPE html&gt;'
    """
    page = escape(to_html(title, blocks)).replace("\n", "&#10;")  # one line, that Markdown takes it as it is
    style = "width: 100%; height: 40rem; border: 0; resize: vertical"
    return f'<iframe title="{escape(title)}" srcdoc="{page}" style="{style}"></iframe>'


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{escape(block.text)}</h2>"
    if isinstance(block, Paragraph):
        return f"<p{_LEAD if block.stands_out else ''}>{html_text(block.text)}</p>"
    if isinstance(block, Items):
        tag = "ol" if block.ordered else "ul"
        return f"<{tag}>\n" + "\n".join(f"<li>{html_text(item)}</li>" for item in block.items) + f"\n</{tag}>"
    if isinstance(block, Facts):
        facts = (
            f"<div><dt>{escape(what)}</dt><dd><strong>{escape(value)}</strong> {escape(remark)}</dd></div>"
            for what, value, remark in block.facts
        )
        return '<dl class="facts">\n' + "\n".join(facts) + "\n</dl>"
    return html_table(block) if isinstance(block, Table) else _html_picture(block)


def _html_picture(picture: Picture) -> str:
    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(_drawn(picture.draw(theme), "svg")).decode()
        for theme in (LIGHT, DARK)
    )
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(picture.shows)}" src="{light}"></picture></figure>'
    )


def _drawn(figure: Figure, kind: str) -> bytes:
    import matplotlib

    file = BytesIO()
    # Without a date, and with names of its parts that are not drawn by lot, the same run gives the same picture.
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": kind}):
        figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()


# -- Markdown -----------------------------------------------------------------------------------------------------


def to_markdown(title: str, blocks: Iterable[Block], path: Path) -> str:
    r"""Markdown as GitHub reads it; pictures are written beside the page.

    Args:
        title: of the page.
        blocks: what is on it.
        path: where the page will be.

    Example:
        >>> print(to_markdown("Growth", [Items(["a * b", Name("net.0")])], Path("page.md")))
        # Growth
        <BLANKLINE>
        * a \* b
        * `net.0`
        <BLANKLINE>
    """
    return "\n\n".join([f"# {_markdown(title)}", *(_markdown_block(block, path) for block in blocks)]) + "\n"


def _markdown_block(block: Block, path: Path) -> str:
    if isinstance(block, Heading):
        return f"## {_markdown(block.text)}"
    if isinstance(block, Paragraph):
        return _markdown(block.text)
    if isinstance(block, Items):
        return "\n".join(f"{'1.' if block.ordered else '*'} {_markdown(item)}" for item in block.items)
    if isinstance(block, Facts):
        return "\n".join(
            f"* {_markdown(what)}: **{_markdown(value)}** {_markdown(remark)}".rstrip()
            for what, value, remark in block.facts
        )
    if isinstance(block, Picture):
        picture = path.with_name(f"{path.stem}-{block.name}.png")
        picture.write_bytes(_drawn(block.draw(LIGHT), "png"))
        return f"![{_markdown(block.shows)}](<{picture.name}>)"
    words = {block.columns[0], *block.words}
    rule = ["---" if column in words else "---:" for column in block.columns]
    rows = [[_markdown(cell, in_table=True) for cell in row] for row in (block.columns, *block.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def _markdown(text: Text, in_table: bool = False) -> str:
    parts = [text] if isinstance(text, str) else text
    return "".join(_code(part, in_table) if isinstance(part, Name) else _plain(part) for part in parts)


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.splitlines()))


def _code(text: str, in_table: bool) -> str:
    text = " ".join(text.splitlines())
    # A fence longer than any in the text. In a table, a bar would end the cell even there.
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    code = f"{fence}{space}{text}{space}{fence}"
    return code.replace("|", "\\|") if in_table else code
