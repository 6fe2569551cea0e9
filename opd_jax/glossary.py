"""What every configuration key means: read from the dataclasses themselves, printed as help.

A field is described beside it (``# ...``) or in the section ``Attributes:`` of its class; what it
may be is what the rule of its field expects. Nothing is written twice.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

from opd_jax import config
from opd_jax.spec import GROUPS, ConfigError, RunConfig

_WIDTH = 100
_BAR = r"\|"  # in a cell of a table in Markdown
_HEAD = """# Configuration

Written by `opd-jax help --markdown > configs/README.md` from the dataclasses of the package; a
test keeps it current.

A config is a Python file with `get_config(arg)`; the files here say in their first lines how they
are run, what comes out and how long it takes. Every key of a file may be set again on the command
line, `--config.KEY=VALUE`: `opd-jax train --config=configs/demo.py --workdir=runs/demo
--config.rock.mode=ema`. Pairs are set name by name, `--config.data.template.enable_thinking=False`,
lists as Python writes them, `--config.data.buckets='(64,128)'`. `opd-jax help KEY` prints one key
or a group. An unknown key, and a value that is none of those in the last column, ends the command
before anything is written."""
_OTHERS = {  # keys that are no field of a group
    "seed": "of all draws: prompts, samples, the gate",
    "rock.ids_file": "a JSON list of the gated ids of static; empty: none",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
      name: dotted, as after ``--config.``.
      meaning: in a few words.
      type: in Python's notation.
      default: its value.
      expected: what it may be, as the rule of the field says; empty where its type says all.
    """

    name: str
    meaning: str
    type: str
    default: Any
    expected: str = ""

    @property
    def told(self) -> str:
        """The meaning, with the choices where it names the constant that has them."""
        told = self.meaning.rstrip(".")
        if self.expected.startswith("one of "):
            told = re.sub(r"one of [A-Z]+", self.expected, told)
        return told

    def __str__(self) -> str:
        head, told = f"  {self.name} ({self.type}, {self.default!r})", self.told
        if self.expected and self.expected not in told:
            told += f" [{self.expected}]"
        return "\n".join(
            [
                head,
                *textwrap.wrap(told, _WIDTH - 6, initial_indent=" " * 6, subsequent_indent=" " * 6),
            ]
        )


@functools.cache
def keys() -> dict[str, Key]:
    """Every key that can be set, by name, in the order of the groups."""
    found = {}
    for name, default in config.flatten(config.defaults()).items():
        group, _, field = name.rpartition(".")
        cls = GROUPS.get(group, RunConfig)
        hint = {f.name: str(f.type) for f in dataclasses.fields(cls)}.get(field, "str")
        meaning = _OTHERS.get(name) or meanings(cls).get(field, "")
        found[name] = Key(name, meaning, hint, default, _expected(cls).get(field, ""))
    return found


def text(named: str = "") -> str:
    """The description of all keys, of one group, or of one key.

    Raises:
      ConfigError: there is no such key; names the nearest.
    """
    known = keys()
    chosen = [key for name, key in known.items() if _is_under(name, named.removeprefix("config."))]
    if not chosen:
        near = difflib.get_close_matches(named, [*known, *GROUPS], 3, 0.4)
        raise ConfigError(
            f"there is no key {named!r}: expected a group ({', '.join(GROUPS)}) or a key"
            f"{', such as ' + ', '.join(near) if near else ''}; correct it"
        )
    lines, group = [], None
    for key in sorted(chosen, key=lambda key: "." in key.name):  # those of no group first
        now = key.name.rpartition(".")[0]
        if now != group and now:
            lines.append(f"\n{now}: {_first_sentence(GROUPS[now])}")
        group = now
        lines.append(str(key))
    return "\n".join(lines).lstrip("\n")


def page() -> str:
    """The description of all keys as a Markdown page."""
    lines = _HEAD.splitlines()
    known = keys()
    for group in ("", *GROUPS):
        chosen = [key for name, key in known.items() if name.rpartition(".")[0] == group]
        about = _first_sentence(GROUPS[group]) if group else "Keys of no group."
        lines += ["", f"## {group or 'The run'}", "", about.replace("``", "`"), ""]
        lines += ["| key | type | default | meaning | values |", "|---|---|---|---|---|"]
        for key in chosen:
            cells = (f"`{key.name}`", f"`{key.type}`", f"`{key.default!r}`", key.told, key.expected)
            lines.append(f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |")
    return "\n".join(lines)


def _is_under(name: str, named: str) -> bool:
    return not named or name == named or name.startswith(f"{named}.")


def _first_sentence(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """What the fields of a dataclass mean: the comment beside each, or its entry in Attributes."""
    inherited = _of_bases(cls, meanings)
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = inherited | dict(_attributes(inspect.getdoc(cls) or ""))
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            beside = comments.get(node.end_lineno or node.lineno)
            if beside:
                found[node.target.id] = beside
    return found


def _of_bases(cls: type, told: Callable[[type], dict[str, str]]) -> dict[str, str]:
    """What is told of the fields that a dataclass has from others."""
    bases = [base for base in cls.__bases__ if dataclasses.is_dataclass(base)]
    return {name: text for base in bases for name, text in told(base).items()}


def _attributes(doc: str) -> Iterator[tuple[str, str]]:
    """Names and texts of the section ``Attributes:`` of a docstring; ``a, b: text`` is of both."""
    _, _, section = doc.partition("Attributes:\n")
    section = re.split(r"\n\n", section)[0]
    for entry in re.split(r"\n(?=  \S)", "\n" + section):
        names, colon, told = entry.strip().partition(": ")
        for name in names.split(", ") if colon else ():
            yield name, " ".join(told.split()).replace("``", "")


@functools.cache
def _expected(cls: type) -> dict[str, str]:
    """What the rules of a dataclass expect of its fields, where the values do not matter."""
    post = getattr(cls, "__post_init__", None)
    if post is None:
        return {}
    module = inspect.getmodule(cls)
    found: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(post)))):
        if not (isinstance(node, ast.Tuple) and len(node.elts) == 3):
            continue
        name, _, told = node.elts
        if not isinstance(name, ast.Constant):
            continue
        if isinstance(told, ast.Constant):
            said = str(told.value)
        elif isinstance(told, ast.JoinedStr):
            said = "".join(_part(part, vars(module)) for part in told.values)
            said = re.sub(rf" \([^()]*{_OPEN}[^()]*\)", "", said)  # "up to rock.decay (0.99)"
        else:
            continue
        if _OPEN not in said:
            found.setdefault(str(name.value), []).append(said)
    inherited = _of_bases(cls, _expected)
    return inherited | {name: "; ".join(said) for name, said in found.items()}


_OPEN = "\0"  # what only a value tells


def _part(part: ast.expr, names: dict[str, Any]) -> str:
    """A piece of a message: its text, or the value of a constant of the module."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
        value = names.get(part.value.id)
        return ", ".join(map(str, value)) if isinstance(value, tuple) else _OPEN
    return _OPEN
