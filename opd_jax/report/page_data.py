"""What the table and the reader of a report show: types and answers, ready for JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax.data import tokenizer
from opd_jax.report import style
from opd_jax.store import hub, run_files
from opd_jax.store import workdir as workdirs

MAX_TYPES = 2000  # rows a browser sorts at once
MAX_ANSWERS = 24
HEAT = (0.01, 10.0)  # nats at the ends of the reader's colour scale

# Of types.csv: name, heading, how it is shown, what it is, and how wide a window shows it
# (a class of page.css; "": every one).
COLUMNS = (
    ("rank", "rank", "number", "rocks first, then by the score that selects them", ""),
    ("token", "token", "token", "spaces and line ends are made visible", ""),
    ("token_id", "id", "number", "row of the vocabulary", "from-middle"),
    ("group", "kind", "text", "kind of token", "from-middle"),
    ("member", "rock", "flag", "among the top K", "from-middle"),
    ("count", "count", "number", "occurrences in the corpus", "from-small"),
    ("token_share", "of tokens", "share", "share of all tokens", "from-middle"),
    ("share", "of KL", "share", "share of all KL (Rock Score over its sum)", ""),
    ("kl_mean", "mean KL", "number", "nats", ""),
    ("kl_std", "std of KL", "number", "nats, over occurrences", "from-wide"),
    ("log_ratio_mean", "log ratio", "number", "mean one-sample estimate of KL, nats", "from-wide"),
    ("entropy_mean", "entropy", "number", "of the student, mean, nats", "from-wide"),
    (
        "teacher_entropy_mean",
        "teacher's",
        "number",
        "entropy of the teacher, mean, nats",
        "from-wide",
    ),
)
_FIELDS = ("kl", "entropy", "teacher_entropy", "logp", "teacher_logp", "score", "rank", "rock")
_FIELDS += ("weight",)
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def types(path: Path) -> tuple[dict[str, Any], int]:
    """The first rows of ``types.csv`` by rank, and how many it has.

    Raises:
      WorkdirError: it cannot be read or lacks a column.
    """
    # Not splitlines(): a token may hold a line end of Unicode, and csv reads quoted ones itself.
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            table = list(csv.DictReader(stream))
        rows = [[_cell(row[name], kind) for name, _, kind, *_ in COLUMNS] for row in table]
    except (OSError, KeyError, ValueError) as error:
        raise workdirs.WorkdirError(
            f"{path} cannot be read ({type(error).__name__}: {error}); expected the columns "
            f"{', '.join(column[0] for column in COLUMNS)}; run opd-jax rocks again"
        ) from error
    rows.sort(key=lambda row: row[0])
    columns = [
        dict(zip(("name", "label", "kind", "title", "place"), c, strict=True)) for c in COLUMNS
    ]
    return {"columns": columns, "rows": rows[:MAX_TYPES]}, len(rows)


def _cell(text: str, kind: str) -> Any:
    if kind in ("text", "token"):
        return visible(text) if kind == "token" else text.replace("_", " ")
    if kind == "flag":
        return text.lower() in ("true", "1")
    number = float(text) if text else math.nan
    return int(number) if number.is_integer() else short(number)


def from_reader(reader: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers of OUT's ``reader.json``."""
    return [
        _answer(
            f"problem {answer['problem']}",
            answer["prompt"],
            answer["tokens"],
            truncated=answer["truncated"],
            more=f"written by {answer['writer']}",
        )
        for answer in reader["answers"][:MAX_ANSWERS]
    ]


def from_samples(run: Path, name: str, rocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The newest answers of a run's ``samples.jsonl``; none if it wrote none.

    The file holds ids and their KL; the text comes from the run's tokenizer where it is still
    there, and what was not written is not shown.

    Args:
      run: its folder.
      name: of the run, for the reader's list.
      rocks: rows of its ``summary.json``, highest share first; they are marked.
    """
    path = run / "samples.jsonl"
    lines = run_files.load_lines(path, run_files.SamplesLine) if path.exists() else []
    if not lines:
        return []
    text_of = _text_of(run_files.record(run)["config"])
    rank = {row["token_id"]: place for place, row in enumerate(rocks, 1)}
    found = []
    for sample in lines[-1]["samples"][:MAX_ANSWERS]:
        if "kl_nats" not in sample:  # nothing to colour by: the run had no teacher
            continue
        ids = sample["ids"]
        tokens = {
            "id": ids,
            "text": [text_of(i) for i in ids],
            "kl": sample["kl_nats"],
            "rank": [rank.get(i) for i in ids],
            "rock": [i in rank for i in ids],
        }
        about = f"written in training, step {lines[-1]['step']}"
        label = f"{name}, sample {len(found) + 1}"
        found.append(
            _answer(label, sample["prompt"], tokens, truncated=sample.get("truncated"), more=about)
        )
    return found


def _text_of(settings: Mapping[str, Any]) -> Callable[[int], str]:
    for key in ("student.path", "teacher.path"):
        try:
            loaded = tokenizer.load(hub.folder(settings.get(key, ""), "tokenizer"))
        except (OSError, ValueError):  # moved since: the report is about the run, not the model
            continue
        return lambda i: tokenizer.token_text(loaded, i)
    return lambda i: f"<id:{i}>"


def _answer(
    name: str, prompt: str, tokens: Mapping[str, Any], *, truncated: bool | None, more: str
) -> dict[str, Any]:
    kl = [value for value in tokens["kl"] if value is not None]
    mean = f", mean KL {style.measured(math.fsum(kl) / len(kl))} nats" if kl else ""
    ending = ", cut by length" if truncated else ""
    values = {field: [short(v) for v in tokens.get(field, [])] for field in _FIELDS}
    return {
        "name": name,
        "about": f"{name}: {more}, {len(tokens['id'])} tokens{ending}{mean}",
        "prompt": prompt,
        "tokens": values | {"id": tokens["id"], "text": [visible(text) for text in tokens["text"]]},
    }


def visible(text: str) -> str:
    """A token with its whitespace made visible; an empty one as a sign."""
    return "".join(_VISIBLE.get(char, char) for char in text) or "∅"


def short(value: Any) -> Any:
    """A number with five significant digits; None where it is not finite."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def script_json(value: Any) -> str:
    """JSON that is safe inside ``<script type="application/json">``.

    No ``<`` is left, so no text can end the element or open a comment, and what is not ASCII is
    escaped, so no encoding can change it.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
