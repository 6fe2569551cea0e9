"""Pieces of HTML that a report is put together from; every text is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from opd_jax.report import style


def plates(plates: Sequence[style.Plate]) -> str:
    """Figures with their titles and notes."""
    return "".join(
        f'<div class="plate"><figure><figcaption><h3>{html.escape(plate.title)}</h3>'
        f'<p class="note">{html.escape(plate.note)}</p></figcaption>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(plate.title)}">'
        f"{style.page_svg(plate.figure, plate.name, plate.title)}</div></figure></div>"
        for plate in plates
    )


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose first column names its rows; a cell is a text, or a text and one below it."""
    cells = "".join(
        f'<th scope="col"{" class=text" if not i else ""}>{html.escape(name)}</th>'
        for i, name in enumerate(head)
    )
    lines = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (  # the caption stays in sight where the table scrolls
        f'<p class="note">{html.escape(caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
        f'<table aria-label="{html.escape(caption)}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cell(cell: str | tuple[str, str]) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    text, small = (html.escape(part) for part in cell)
    return text + (f"<br><small>{small}</small>" if small else "")


def missing(what: str, command: str) -> str:
    """A line in place of something that is not there, with the command that makes it."""
    return (
        f'<p class="missing">{html.escape(what)} Made by <code>{html.escape(command)}</code>.</p>'
    )
