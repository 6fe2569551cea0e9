"""Pieces of HTML that a report is put together from; every text is escaped here."""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax.report import style

Row = tuple[str, str]  # a name and what it is
_NOTE = 160  # characters of a note that are read at once, about


@dataclasses.dataclass(frozen=True)
class Absent:
    """Something that the page could show and the files do not hold.

    Attributes:
      what: it is, as a noun.
      command: that adds it.
    """

    what: str
    command: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page; one without a body is left out, and what it lacks listed at the end.

    Attributes:
      name: of its place in the page.
      heading: as text.
      body: HTML.
      absent: what it could hold as well.
      data: for the page's scripts, by name.
    """

    name: str
    heading: str
    body: str = ""
    absent: tuple[Absent, ...] = ()
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f'<section id="{self.name}" aria-labelledby="{self.name}-title">'
            f'<h2 id="{self.name}-title">{html.escape(self.heading)}</h2>{self.body}</section>'
        )


def plates(plates: Sequence[style.Plate]) -> str:
    """Figures with their titles, what to see in them, and notes."""
    return "".join(
        f'<div class="plate"><figure><figcaption><h3>{html.escape(plate.title)}</h3>'
        f"{text(plate.see, 'see')}{note(plate.note)}</figcaption>"
        f"{style.page_svgs(plate)}</figure></div>"
        for plate in plates
    )


def text(words: str, kind: str = "note") -> str:
    """A paragraph; nothing where there are no words."""
    return f'<p class="{kind}">{html.escape(words)}</p>' if words else ""


def note(words: str) -> str:
    """A note, of which a long one shows its first sentences and opens on request."""
    ends = [match.end() for match in re.finditer(r"[.] ", words) if match.end() > _NOTE]
    if len(words) < 2 * _NOTE or not ends:
        return text(words)
    first, rest = words[: ends[0]].rstrip(), words[ends[0] :]
    return (
        f"{text(first)}<details><summary>More</summary>{text(rest[:1].upper() + rest[1:])}"
        "</details>"
    )


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose first column names its rows; a cell is a text, or a text and one below it.

    In a narrow window every row is a card, where each cell stands beside its heading.
    """
    cells = "".join(
        f'<th scope="col"{" class=text" if not i else ""}>{html.escape(name)}</th>'
        for i, name in enumerate(head)
    )
    lines = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(
            f'<td data-label="{html.escape(name)}"><span>{_cell(cell)}</span></td>'
            for name, cell in zip(head[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f"{text(caption)}"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
        f'<table class="cards" aria-label="{html.escape(caption)}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cell(cell: str | tuple[str, str]) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    words, small = (html.escape(part) for part in cell)
    return words + (f"<br><small>{small}</small>" if small else "")


def facts(rows: Sequence[Row]) -> str:
    """Names and what they are, one under the other; nothing where there is none."""
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(told)}</dd></div>"
        for name, told in rows
    )
    return f'<dl class="facts">{cells}</dl>' if cells else ""


def tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers: label, number, and what to read beside it."""
    cells = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}"
        f"<small>{html.escape(small)}</small></dd></div>"
        for label, value, small in rows
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def more(absent: Sequence[Absent]) -> str:
    """What can be added, each with the command that adds it."""
    lines = "".join(
        f"<li>{html.escape(one.what)}: can be added with "
        f"<code>{html.escape(one.command)}</code></li>"
        for one in dict.fromkeys(absent)
    )
    return f'<ul class="more">{lines}</ul>' if lines else ""


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Fill a template's holes in one pass: nothing that was filled in is looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda hole: parts[hole[1]], template)


def resource(name: str) -> str:
    """A file of ``page/``."""
    folder = importlib.resources.files("opd_jax.report") / "page"
    return (folder / name).read_text(encoding="utf-8").strip()
