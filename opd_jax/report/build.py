"""One HTML page of runs, a sweep and their Rock Tokens: no network, nothing beside the file.

It tells the story first (``story``: better, what changed, what it cost, how made), then the curves
and the instrument, each a section of its own module. What the files do not hold is left out and
listed at the end with the command that adds it. The page's own text is in ``page/`` (a template, a
style sheet, three small scripts). Everything comes from files, so no model is needed.
"""

from __future__ import annotations

import collections
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from opd_jax.files import write_atomic
from opd_jax.report import (
    knockout_section,
    markup,
    outcome,
    page_data,
    rock_section,
    run_section,
    story,
    style,
    sweep_section,
)
from opd_jax.report.markup import Section
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs
from opd_jax.store.run_files import RunFiles

MARKER = "<!-- a report of opd-jax -->"
_SCRIPTS = ("page.js", "table.js", "reader.js")
# In the line of links, where a heading is a whole question.
_NAMES = {
    "better": "Better?",
    "answers": "Answers",
    "cost": "Cost",
    "made": "How made",
    "rocks": "Rock Tokens",
    "knockout": "Knockout",
    "reader": "Token by token",
    "more": "To add",
}
# What runs must share to stand in one picture: key of run.json, and what the message calls it.
_SAME = {
    "student.path": "student",
    "teacher.path": "teacher",
    "teacher.paths": "teachers",
    "kl.vocab_size": "vocabulary",
    "stop_ids": "vocabulary",
    "data.heldout": "held-out file",
}


def report(
    runs: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    rocks: str | os.PathLike | None = None,
    sweep: str | os.PathLike | None = None,
    knockout: str | os.PathLike | None = None,
) -> None:
    """Write the page; an older report is replaced, and what is missing is left out with a word.

    Args:
      runs: workdirs of ``opd-jax train``, at least one unless there is a sweep.
      out: an .html file.
      rocks: OUT of ``opd-jax rocks``.
      sweep: workdir of ``opd-jax sweep``.
      knockout: OUT of ``opd-jax knockout``.

    Raises:
      ValueError: nothing to report, or ``out`` is a file of something else.
      WorkdirError: a file is missing or damaged, or the runs cannot be compared.
      OSError: the page cannot be written.
    """
    out = Path(out)
    _check_out(out)
    if not runs and sweep is None:
        raise ValueError(
            "nothing to report: found no run and no sweep; expected at least one; give RUN or "
            "--sweep=DIR"
        )
    found = {name: Path(run) for name, run in _names(runs).items()}
    swept = sweep_section.read(Path(sweep)) if sweep is not None else None
    every = found | {
        f"{a}/{p.name}": p for a, ps in (swept or {}).get("runs", {}).items() for p in ps
    }
    check_comparable(every)
    files = {name: run_files.read(path) for name, path in found.items()}
    folder = Path(rocks) if rocks is not None else None
    if folder is not None:
        run = next(iter(every.values()))
        rock_section.check(folder, run, workdirs.teachers(run_files.record(run)).values())
    with matplotlib.rc_context(style.STYLE):
        page = _page(found, files, swept, folder, Path(knockout) if knockout else None)
    # A half of a surrogate pair, which JSON can hold, has no UTF-8.
    write_atomic(out, page.encode("utf-8", "replace").decode("utf-8"))


def check_comparable(runs: Mapping[str, Path]) -> None:
    """Check that runs have one student, teacher, vocabulary and held-out file.

    Raises:
      WorkdirError: they do not; names each difference with both values.
    """
    described = {name: _identity(path) for name, path in runs.items()}
    first, *others = described
    for other in others:
        differences = [
            f"  {_SAME[key]} ({key}): {described[first][key]!r} and {described[other][key]!r}"
            for key in _SAME
            if described[first][key] != described[other][key]
        ]
        if differences:
            raise workdirs.WorkdirError(
                "\n".join([f"{runs[first]} and {runs[other]} cannot be compared:", *differences])
                + "\nexpected runs of one student, teacher, vocabulary and held-out file; write a "
                "report for each"
            )


def _identity(run: Path) -> dict[str, Any]:
    record = run_files.record(run)
    values = record["config"] | {"stop_ids": record.get("stop_ids")}
    found = {key: values.get(key) or None for key in _SAME}
    return {k: os.path.normpath(v) if isinstance(v, str) and v else v for k, v in found.items()}


def _check_out(out: Path) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"cannot write {out}: expected an .html file; give another --out")
    if not out.exists():
        return
    start = out.read_bytes()[:4096] if out.is_file() else b""
    if MARKER.encode() not in start:
        raise ValueError(
            f"{out} exists and is no report: expected a new file or an older report, which would "
            "be replaced; give another --out or move it away"
        )


def _names(runs: Sequence[str | os.PathLike]) -> dict[str, Path]:
    """Runs by the name of their folder, or by their path where two have one name."""
    paths = list(dict.fromkeys(Path(run) for run in runs))
    counts = collections.Counter(path.resolve().name for path in paths)
    return {p.resolve().name if counts[p.resolve().name] == 1 else str(p): p for p in paths}


def _page(
    found: Mapping[str, Path],
    files: Mapping[str, RunFiles],
    swept: Mapping[str, Any] | None,
    folder: Path | None,
    knockout: Path | None,
) -> str:
    outcomes = {name: outcome.read(path) for name, path in found.items()}
    types = rock_section.types(folder)  # before any figure: a damaged table is said at once
    # The story first, then the instrument. A further section is one more line here.
    made = [
        story.better(outcomes, found),
        story.changed(outcomes),
        story.cost(found),
        story.made(found),
        run_section.section(found, files, outcomes),
        sweep_section.section(swept),
        rock_section.rocks(folder),
        types,
        knockout_section.section(knockout),
        rock_section.reader(folder, found, files),
    ]
    sections = [section for section in made if section.body]
    if more := markup.more([absent for section in made for absent in section.absent]):
        sections.append(Section("more", "What can be added", more))
    title = _title(files, swept)
    subtitle = ", ".join([*found, *(["a sweep"] if swept else []), *(["rocks"] if folder else [])])
    data = {name: value for section in sections for name, value in section.data.items()}
    parts = {
        "marker": MARKER,
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "nav": "".join(
            f'<a href="#{one.name}">{html.escape(_NAMES.get(one.name, one.heading))}</a>'
            for one in sections
        ),
        "main": story.tiles(outcomes, found) + "".join(map(str, sections)),
        "footer": "Made by opd-jax report from the files of the runs. Intervals and nulls are "
        "those of the commands that measured them.",
        "css": markup.resource("page.css"),
        "script": "\n".join(markup.resource(name) for name in _SCRIPTS),
        "data": page_data.script_json(data),
    }
    return markup.filled(markup.resource("page.html"), parts)


def _title(files: Mapping[str, RunFiles], swept: Mapping[str, Any] | None) -> str:
    every = (run for runs in (swept or {}).get("runs", {}).values() for run in runs)
    models = next(iter(files.values())) if files else run_files.read(next(every))
    return f"Distilling {models.teacher} into {models.student}"
