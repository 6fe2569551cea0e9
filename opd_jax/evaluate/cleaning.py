r"""What an answer says, without how it is set: fonts, delimiters, spacing, Unicode, escapes.

What comes out is plain LaTeX on one line. A row separator ``\\`` stays what it is: a backslash that
belongs to it is never taken for the start of a spacing command.
"""

from __future__ import annotations

import re
import unicodedata

# What NFKC would turn into something else: a power into a digit, a fraction into two numbers.
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SIGNS = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ",
    "⋅": r"\cdot ", "∙": r"\cdot ", "∗": "*", "÷": r"\div ", "∕": "/", "⁄": "/", "π": r"\pi ",
    "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "≈": r"\approx ",
    "°": "°", "⟨": r"\langle ", "⟩": r"\rangle ", "θ": r"\theta ", "“": '"', "”": '"', "’": "'",
    "‘": "'", "′": "'", "\u200b": "", "\ufeff": "",
}  # fmt: skip
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))
_POWER = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_BASE = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")

_SPELLINGS = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom",
    "tbinom": r"\binom", "leq": r"\le ", "geq": r"\ge ", "leqslant": r"\le ",
    "geqslant": r"\ge ", "neq": r"\ne ", "lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}",
    "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "varnothing": r"\emptyset ",
    "ast": "*", "colon": ":", "degree": "°", "degrees": "°", "thickapprox": r"\approx ",
    "simeq": r"\approx ", "pounds": " ", "euro": " ", "percent": "%", "prime": "'", "vert": "|",
    "nicefrac": r"\frac", "sfrac": r"\frac", "checkmark": " ", "R": r"\mathbb{R}",
    "lor": " or ", "land": " and ", "lvert": "|", "rvert": "|", "mid": "|",
    "ldots": "...", "dots": "...", "cdots": "...",
}  # fmt: skip
_COMMAND = re.compile(rf"\\({'|'.join(_SPELLINGS)})(?![a-zA-Z])")
_DROPPED = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|"
    r"mathstrut|strut|boldmath|bf|rm|it|sf|tt|large|Large|normalsize|centering|hfill|notag)"
    r"(?![a-zA-Z])\s?\.?"
)
_SPACING = re.compile(r"\\\\|\\(?:[,;:> ]|quad(?![a-zA-Z])|qquad(?![a-zA-Z]))|[~\s]")
_GAP = re.compile(r"\\[hv]space\*?\s*\{[^{}]*\}|\\h?phantom\s*\{[^{}]*\}|\\!")
# Commands around an argument that stays, and whether it stands apart, as words do.
_WRAPPER = re.compile(
    r"\\(?P<text>text(?:rm|bf|it|sf|tt|normal|up|md)?|mathrm|mbox|hbox|emph)\s*\{|"
    r"\\(?:math(?:bf|it|sf|tt|cal|frak|scr|normal|ord|op)|boldsymbol|bm|pmb|underline|uline|"
    r"operatorname\*?|ensuremath|cancel|xout)\s*\{"
)
_COLOUR = re.compile(r"\\(?:textcolor\s*\{[^{}]*\}|color\s*\{[^{}]*\})")
# Thousands: marked ones everywhere, 1{,}000 and 1\,000 and 1\ 000.
_THOUSANDS = re.compile(
    r"(?<=\d)\s?(?:\{,\}|\\,|\\!|\\;|\\:|\\ |,\\!|~|\u2009|\u202f)\s?(?=\d{3}(?!\d))"
)
_ROW = re.compile(r"\\\\\[[0-9.]+(?:pt|em|ex|mm|cm)\]")


_SYSTEM = re.compile(
    r"\\begin\{(cases|aligned|align\*?|gathered|split)\}(.*?)\\end\{\1\}", re.DOTALL
)
_CLOCK = re.compile(r"(?<=[0-9])\s*([apAP])\.?\s?[mM]\b\.?")


def clean(text: str) -> str:
    """An answer in plain form; what is left out carries no meaning."""
    text = _escapes(text)
    text = _POWER.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _BASE.sub(lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = _VULGAR.sub(_vulgar, text)
    text = _THOUSANDS.sub(",", text)
    text = _SIGN.sub(lambda m: _SIGNS[m[0]], text)
    text = unicodedata.normalize("NFKC", text)
    text = _GAP.sub("", text)
    text = re.sub(r"(?<![a-zA-Z])\{:\}", ":", text)
    text = re.sub(r"\\not ?=", r"\\ne ", text)
    text = re.sub(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\b[Ii]nfinity\b", r"\\infty ", text)
    text = _DROPPED.sub("", text)
    text = _COMMAND.sub(lambda m: _SPELLINGS[m[1]], text)
    text = _ROW.sub(lambda m: "\\\\", text)
    text = re.sub(r"(?<=[\w)\]])\*\*(?=[\w(-])", "^", text).replace("**", " ")
    text = _unwrapped(_COLOUR.sub("", text))
    text = _SYSTEM.sub(_system, text)
    text = _CLOCK.sub(lambda m: f" {m[1].lower()}m", text)
    text = _SPACING.sub(lambda m: m[0] if m[0] == "\\\\" else " ", text)
    text = re.sub(r"\^\s?\{?\s?(?:\\circ(?![a-zA-Z])|°)\s?\}?", "°", text)
    text = text.replace("\\%", "%")
    text = re.sub(r"\\?[$€£¥¢₹₩]", " ", text)
    text = re.sub(r"\\[()\[\]](?!\\)", lambda m: " " if _is_delimiter(m) else m[0], text)
    return peel(re.sub(r" +", " ", text))


def peel(text: str) -> str:
    """Take off what surrounds an answer: emphasis, quotes, one group, a final period."""
    previous = None
    while previous != text:
        previous = text
        text = text.strip().strip('*`"_').strip()
        text = re.sub(r"(?<!\\)[.,;:]$", "", text).strip()
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        for name in (r"\boxed", r"\fbox"):
            start = text.find("{")
            if text.startswith(name) and closing(text, start) == len(text) - 1:
                text = text[start + 1 : -1]
    return text


def closing(text: str, start: int) -> int:
    """Index of the brace that closes the one at ``start``; -1 without one."""
    depth = 0
    if start < 0 or text[start : start + 1] != "{":
        return -1
    for match in re.finditer(r"\\.|[{}]", text[start:]):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if not depth:
                return start + match.start()
    return -1


def key(text: str) -> str:
    """String form in which equal cleaned answers are equal strings."""
    text = re.sub(r"\{([A-Za-z0-9])\}", r"\1", text)  # x^{2} is x^2
    words = re.sub(r"(?<=[A-Za-z]) +(?=[A-Za-z])|(?<=[0-9]) +(?=[0-9])", "\0", text)
    return re.sub(r"\s", "", words).replace("\0", " ")


def _escapes(text: str) -> str:
    """Undo doubled backslashes, as of LaTeX inside JSON; row separators stay."""
    if "\\\\begin" in text:
        return text.replace("\\\\\\\\", "\0").replace("\\\\", "\\").replace("\0", "\\\\")
    if "\\begin" not in text and "&" not in text:
        return re.sub(r"\\\\+(?=[a-zA-Z{}%$])", r"\\", text)
    return text


def _vulgar(match: re.Match) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _system(match: re.Match) -> str:
    """Equations below each other as a list."""
    rows = [row.replace("&", " ").strip(" ,") for row in match[2].split("\\\\")]
    return ", ".join(row for row in rows if row)


def _is_delimiter(match: re.Match) -> bool:
    """Whether a backslash with a bracket opens or closes mathematics, and is no row separator."""
    return match.start() == 0 or match.string[match.start() - 1] != "\\"


def _unwrapped(text: str) -> str:
    """Arguments of fonts in place of the commands."""
    place = 0
    while match := _WRAPPER.search(text, place):
        end = closing(text, match.end() - 1)
        place = match.end()
        if end >= 0:
            gap = " " if match["text"] else ""
            inner = text[match.end() : end]
            text = f"{text[: match.start()]}{gap}{inner}{gap}{text[end + 1 :]}"
            place = match.start()
    return text
