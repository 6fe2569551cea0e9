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
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import offset_copy

from opd_jax.files import replacing

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
_MIDDLE = 8.0  # inches; a wider figure needs a wider page to be read, see page.css
_MOST = 330  # points that a narrow drawing is stretched to
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
      see: one plain sentence, for a reader who knows no statistics: what to look at.
      narrow: the same drawn in ``NARROW``, for a telephone; None: there is only the one.
    """

    name: str
    title: str
    note: str
    figure: Figure
    see: str = ""
    narrow: Figure | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the panels of a figure go: beside each other, or for a telephone one below the other.

    Attributes:
      width: most inches of a figure.
      label: characters of a name beside an axis, before its line breaks.
      is_narrow: every panel has the whole width.
    """

    width: float = 10.5
    label: int = 40
    is_narrow: bool = False

    def panels(
        self, count: int, width: float, height: float, *, sharey: bool = False
    ) -> tuple[Figure, list[Axes]]:
        """A figure of so many panels, each of this size in inches, in as many rows as it takes."""
        columns = 1 if self.is_narrow else max(1, min(count, int(self.width / width)))
        rows = -(-count // columns)
        wide = self.width if self.is_narrow else columns * width
        made = figure(wide, rows * height)
        grid = made.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
        for spare in grid[count:]:
            spare.remove()
        return made, list(grid[:count])

    def names(self, labels: Sequence[str]) -> list[str]:
        """Names beside an axis, in lines that leave room for the axis."""
        return ["\n".join(textwrap.wrap(name, self.label)) or name for name in labels]

    def legend(self, axes: Axes, **other: Any) -> None:
        """A legend that covers nothing: in the title's row, or below the panel."""
        if not self.is_narrow:
            axes.legend(**LEGEND | other)
            return
        _break_lines(axes)
        drop = -22 - 13 * len(axes.get_xlabel().splitlines())  # points, past ticks and label
        below = offset_copy(axes.transAxes, axes.figure, y=drop, units="points")  # pyright: ignore
        place = {"loc": "upper right", "bbox_to_anchor": (1.0, 0.0), "bbox_transform": below}
        axes.legend(**LEGEND | {"fontsize": 8.5} | other | {"ncols": 2} | place)

    def shared_legend(self, drawn: Figure, axes: Axes, columns: int) -> None:
        """One legend for all panels, below them."""
        handles, labels = axes.get_legend_handles_labels()
        look: dict[str, Any] = {"ncols": columns}
        if self.is_narrow:
            look = {"ncols": min(columns, 2), "fontsize": 8.5, "columnspacing": 1.2}
        drawn.legend(handles, labels, loc="outside lower center", **look)


WIDE = Layout()
NARROW = Layout(width=3.8, label=15, is_narrow=True)


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches, whose layout makes room for labels of any length."""
    made = Figure(figsize=(width, height), layout="constrained")
    made.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03)  # pyright: ignore
    return made


def with_narrow(wide: Sequence[Plate], narrow: Sequence[Plate]) -> list[Plate]:
    """Plates that hold both drawings of each figure. Call inside STYLE's context."""
    for plate in narrow:
        for axes in plate.figure.axes:
            _break_lines(axes)
    return [
        dataclasses.replace(plate, narrow=other.figure)
        for plate, other in zip(wide, narrow, strict=True)
    ]


def _break_lines(axes: Axes) -> None:
    """Break the title and the label of a narrow panel where they would leave it at the right."""
    if title := axes.get_title("left"):
        axes.set_title("\n".join(textwrap.wrap(title, 28)), loc="left")
    if label := axes.get_xlabel():  # it may reach to the left, below the names of rows
        axes.set_xlabel("\n".join(textwrap.wrap(label, 42)), loc="right")


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
    # Without a date, the same figure gives the same bytes; PNG has none.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(out.suffix.lower())
    with replacing(out, "wb") as stream:
        drawn.savefig(stream, format=out.suffix[1:].lower(), dpi=180, metadata=metadata)


def page_svgs(plate: Plate) -> str:
    """The figure of a plate for an HTML page, whose style sheet shows the drawing that fits."""
    wide = page_svg(plate.figure, plate.name, plate.title, "wide" if plate.narrow else "")
    if plate.narrow is None:
        return f'<div class="fig">{wide}</div>'
    kind = "broad" if plate.figure.get_size_inches()[0] > _MIDDLE else "middle"
    narrow = page_svg(plate.narrow, f"{plate.name}-narrow", plate.title, "narrow")
    return f'<div class="fig {kind}">{wide}{narrow}</div>'


def page_svg(drawn: Figure, name: str, label: str, kind: str = "") -> str:
    """A figure as an ``<svg>`` element for an HTML page.

    Text stays text in the page's fonts, colours become ``var(--ink)`` and so on, and ids start with
    ``name``, so that figures do not take each other's clip paths.

    Args:
      drawn: the figure. Call inside STYLE's context.
      name: unique in the page.
      label: what a screen reader says.
      kind: class of the element.
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
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width: {_MOST if kind == "narrow" else width:g}pt" role="img" '
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


class Percent(Formatter):
    """Ticks of a share as per cent, all with as many digits as the finest of them needs.

    Above 1 there is only room for labels of points, no tick is written there.
    """

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """All ticks of an axis."""
        ticks = [100 * value for value in values]
        fits = (n for n in range(4) if all(abs(round(t, n) - t) < 1e-6 for t in ticks))
        digits = next(fits, 4)
        return [f"{tick:z.{digits}f}%" if tick < 100 + 1e-6 else "" for tick in ticks]


def measured(number: float | None, digits: int = 3) -> str:
    """A number for a text, its zeros kept (0.200); a dash where nothing was measured."""
    if number is None or not math.isfinite(number):
        return "–"
    if abs(number) >= 10**digits - 0.5:
        return f"{number:,.0f}"
    return f"{number:z#.{digits}g}".rstrip(".")


def p_value(p: float) -> str:
    """``p 0.034``, of which a very small one is only said to be that."""
    return f"p {measured(p, 2)}" if p >= 1e-4 else "p < 0.0001"


def step_ticks(axes: Axes, steps: Sequence[int], most: int = 9) -> None:
    """Put the ticks of an axis of steps where something was evaluated, the ends always."""
    steps = sorted(set(steps))
    if len(steps) == 1 and not axes.dataLim.width:
        axes.set_xticks(steps)
        return
    if len(steps) < 2:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
        return
    least = (steps[-1] - steps[0]) / most
    kept = [steps[0]]
    for step in steps[1:-1]:
        if step - kept[-1] >= least and steps[-1] - step >= least:
            kept.append(step)
    axes.set_xticks([*kept, steps[-1]])


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
