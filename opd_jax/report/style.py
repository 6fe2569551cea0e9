"""How figures look: one palette, one font, and the same figure as a file or inside a page.

Figures are drawn with matplotlib's objects, not pyplot: no backend is chosen for the caller and no
figure stays open.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

FORMATS = (".png", ".svg", ".pdf")

# Hues of Okabe and Ito's palette, which colour-blind readers tell apart; grey for the rest.
MAIN, ACCENT, MUTED, INK = "#0072B2", "#D55E00", "#9AA5B1", "#2B2F36"
GREEN, PURPLE, SKY, AMBER = "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
GRID, PAPER = "#E6E9ED", "#FFFFFF"
SERIES = (MAIN, ACCENT, GREEN, PURPLE, AMBER, SKY)
LINES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))  # once more round the hues

# A page may be dark: there a colour of a figure is a variable of the page's style sheet.
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    MAIN: "blue",
    ACCENT: "orange",
    GREEN: "green",
    PURPLE: "purple",
    SKY: "sky",
    AMBER: "amber",
}

TOKEN_FONT = "DejaVu Sans Mono"  # comes with matplotlib and has the glyphs of visible whitespace
LOG_SPAN = 10.0  # values that span more than this factor are drawn on a log axis
MAX_LABEL = 14  # characters of a token

STYLE: dict[Any, Any] = {
    "text.usetex": False,
    "text.parse_math": False,  # a token may hold dollar signs
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.hashsalt": "opd-jax",  # the same figure gives the same bytes
}

# In the title's row, at the right: there it covers no curve and no bar.
LEGEND: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1.0, 1.0),
    "borderaxespad": 0.1,
    "ncols": 2,
    "handlelength": 1.2,
    "handletextpad": 0.5,
    "columnspacing": 1.2,
}


@dataclasses.dataclass(frozen=True)
class Plate:
    """A figure with what a page says beside it.

    Attributes:
      name: of its file and of its place in a page.
      title: the question it answers.
      note: what it shows and what to compare it with, one or two sentences of measured numbers.
      figure: drawn inside STYLE's context.
    """

    name: str
    title: str
    note: str
    figure: Figure


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches, whose layout makes room for labels of any length."""
    made = Figure(figsize=(width, height), layout="constrained")
    made.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03)  # pyright: ignore
    return made


def check_format(out: str | os.PathLike) -> Path:
    """The path of a figure whose extension names a type that can be drawn.

    Raises:
      ValueError: it does not.
    """
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise ValueError(
            f"cannot draw {out}: its extension is {out.suffix!r}; expected one of "
            f"{', '.join(FORMATS)}; give another --out"
        )
    return out


def save(drawn: Figure, out: str | os.PathLike) -> None:
    """Write a figure; its folder is made, an older file replaced. Call inside STYLE's context.

    Raises:
      ValueError: the extension is none of FORMATS.
      OSError: the file cannot be written.
    """
    out = check_format(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Without a date, the same figure gives the same bytes; PNG has none.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(out.suffix.lower())
    drawn.savefig(out, dpi=180, metadata=metadata)


def page_svg(drawn: Figure, name: str, label: str) -> str:
    """A figure as an ``<svg>`` element for an HTML page.

    Text stays text in the page's fonts, colours become ``var(--ink)`` and so on, and ids start with
    ``name``, so that figures do not take each other's clip paths.

    Args:
      drawn: the figure. Call inside STYLE's context.
      name: unique in the page.
      label: what a screen reader says.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # Only inside tags: a token may well read 'id="x"' or '#ffffff'.
    text = re.sub(r"<[^>]+>", lambda tag: _page_tag(tag.group(), name), text)
    width, height = drawn.get_size_inches() * 72
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" '
        # Narrower than that a figure cannot be read and scrolls.
        f'style="min-width: {0.7 * width:g}pt; max-width: {width:g}pt" role="img" '
        f'aria-label="{_attribute(label)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)


def _page_tag(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'href="#', f'href="#{name}-', tag)
    tag = tag.replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        tag = re.sub(colour, f"var(--{variable})", tag, flags=re.IGNORECASE)
    return tag


def _attribute(text: str) -> str:
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(char, entity)
    return text


def token_label(text: str) -> str:
    """A token as its axis label: cut if long, and what the font cannot show as a code point."""
    if len(text) > MAX_LABEL:
        text = text[: MAX_LABEL - 1] + "…"
    return "".join(c if ord(c) in _glyphs() else f"U+{ord(c):04X}" for c in text)


def plain(value: float, _: int = 0) -> str:
    """A tick as a plain number."""
    return f"{value:g}"


def percent(value: float, _: int = 0) -> str:
    """A tick of a share, as per cent; above 1 there is only room for labels."""
    return f"{100 * value:g}%" if value < 1.0 + 1e-9 else ""


def measured(number: float | None, digits: int = 3) -> str:
    """A number for a text; a dash where nothing was measured."""
    return "–" if number is None or math.isnan(number) else f"{number:.{digits}g}"


def intervals(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[float],
    color: str,
    label: str | None = None,
) -> None:
    """Draw "delta" as points and "low" to "high" as bars; a row may have no interval."""
    for row, place in zip(rows, places, strict=True):
        if row["low"] is not None:
            axes.hlines(place, row["low"], row["high"], color=color, linewidth=2)
    axes.plot([row["delta"] for row in rows], places, "o", color=color, markersize=6, label=label)


def log_ticks(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Make an axis logarithmic with plain numbers at 1, 2 and 5."""
    getattr(axes, f"set_{axis}scale")("log")
    target = getattr(axes, f"{axis}axis")
    low, high = getattr(axes, f"get_{axis}lim")()
    subs = (1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)
    target.set_major_locator(LogLocator(subs=subs))
    target.set_major_formatter(FuncFormatter(plain))
    target.set_minor_formatter(NullFormatter())
    axes.tick_params(axis=axis, which="minor", length=0)


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(findfont(TOKEN_FONT)).get_charmap())
