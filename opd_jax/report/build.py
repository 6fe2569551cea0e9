"""One HTML page of runs, a sweep and their Rock Tokens: no network, nothing beside the file.

The page's own text is in ``page/`` (a template, a style sheet, three small scripts); here is what
goes into it. Everything comes from files that the commands left, so no model is needed.
"""

from __future__ import annotations

import collections
import html
import importlib.resources
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from opd_jax.files import write_atomic
from opd_jax.report import accuracy, curve_figures, markup, page_data, rock_figures, style
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs
from opd_jax.store.run_files import RunFiles

MARKER = "<!-- a report of opd-jax -->"
_SCRIPTS = ("page.js", "table.js", "reader.js")
# What runs must share to stand in one picture: key of run.json, and what the message calls it.
_SAME = {
    "student.path": "student",
    "teacher.path": "teacher",
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
) -> None:
    """Write the page; an older report is replaced, and what is missing is left out with a word.

    Args:
      runs: workdirs of ``opd-jax train``, at least one unless there is a sweep.
      out: an .html file.
      rocks: OUT of ``opd-jax rocks``.
      sweep: workdir of ``opd-jax sweep``.

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
    swept = _read_sweep(Path(sweep)) if sweep is not None else None
    every = found | {
        f"{a}/{p.name}": p for a, ps in (swept or {}).get("runs", {}).items() for p in ps
    }
    check_comparable(every)
    files = {name: run_files.read(path) for name, path in found.items()}
    folder = Path(rocks) if rocks is not None else None
    if folder is not None:
        _check_rocks(folder, next(iter(every.values())))
    with matplotlib.rc_context(style.STYLE):
        page = _page(found, files, swept, folder)
    out.parent.mkdir(parents=True, exist_ok=True)
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
    found = {key: values.get(key) for key in _SAME}
    return {k: os.path.normpath(v) if isinstance(v, str) and v else v for k, v in found.items()}


def _check_rocks(folder: Path, run: Path) -> None:
    manifest = rock_figures.read(folder, "rocks.json")
    if manifest is None:
        raise workdirs.WorkdirError(
            f"{folder} has no rocks.json: expected the folder that opd-jax rocks --out=DIR made; "
            "give another --rocks, or let it end first"
        )
    teachers = [run_files.model_name(str(manifest.get("teacher", "")))]
    teachers.append(run_files.model_name(str(_identity(run)["teacher.path"] or "")))
    if all(teachers) and teachers[0] != teachers[1]:
        raise workdirs.WorkdirError(
            f"{folder} and {run} cannot be shown together:\n  teacher: {teachers[0]!r} and "
            f"{teachers[1]!r}\nexpected rocks measured against the teacher of the runs; give "
            "another --rocks"
        )


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


def _read_sweep(folder: Path) -> dict[str, Any]:
    """``sweep.json`` with the paths of its runs by arm under "runs", wherever it lies now."""
    path = folder / "sweep.json"
    if not path.exists():
        raise workdirs.WorkdirError(
            f"{folder} has no sweep.json: expected the workdir of an opd-jax sweep that has ended; "
            "give another --sweep, or run the same sweep command to its end"
        )
    sweep = run_files.load(path, run_files.Sweep)
    arms = sweep["arms"]
    runs = {a["arm"]: [folder.joinpath(*Path(run).parts[-2:]) for run in a["runs"]] for a in arms}
    return {**sweep, "runs": runs}


def _page(
    found: Mapping[str, Path],
    files: Mapping[str, RunFiles],
    swept: Mapping[str, Any] | None,
    folder: Path | None,
) -> str:
    arms = {a: [run_files.read(p) for p in ps] for a, ps in (swept or {}).get("runs", {}).items()}
    models = next(iter(files.values())) if files else next(iter(arms.values()))[0]
    sections = []
    if found:
        plates = [curve_figures.runs(files)]
        body = _run_table(found) + markup.plates(plates)
        sections.append(("training", "Training", body))
    with run_files.used(Path("sweep.json")):
        sections.append(("sweep", "Arms and seeds", _sweep(swept, arms)))
    data: dict[str, Any] = {"heat": page_data.HEAT}
    sections.append(("rocks", "Rock Tokens", _rocks(folder)))
    if folder is not None:
        table, data["types"] = _types(folder)
        sections.append(("types", "Every type", table))
    data["answers"] = _answers(folder, found, files)
    rocks = folder is not None and (folder / "reader.json").exists()
    sections.append(("reader", "Read the answers", _reader(data["answers"], rocks)))
    title = f"Distilling {models.teacher} into {models.student}"
    subtitle = ", ".join([*found, *(["a sweep"] if swept else []), *(["rocks"] if folder else [])])
    main = _tiles(found, folder) + "".join(
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{heading}</h2>{body}</section>'
        for name, heading, body in sections
    )
    parts = {
        "marker": MARKER,
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "nav": "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections),
        "main": main,
        "footer": "Made by opd-jax report from the files of the runs. Intervals and nulls are "
        "those of the commands that measured them.",
        "css": _resource("page.css"),
        "script": "\n".join(_resource(name) for name in _SCRIPTS),
        "data": page_data.script_json(data),
    }
    return _filled(_resource("page.html"), parts)


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Fill a template's holes in one pass: nothing that was filled in is looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda hole: parts[hole[1]], template)


def _resource(name: str) -> str:
    folder = importlib.resources.files("opd_jax.report") / "page"
    return (folder / name).read_text(encoding="utf-8").strip()


def _tiles(found: Mapping[str, Path], folder: Path | None) -> str:
    """The few numbers one looks for first: of the last run, then of its rocks."""
    tiles: list[tuple[str, str, str]] = []
    if found:
        name, path = list(found.items())[-1]
        summary = run_files.summary(path)
        before, after = summary.get("before") or {}, summary.get("after") or {}
        ends = accuracy.intervals(path)
        if after.get("accuracy") is not None:
            own = ends.get(summary["steps"])
            small = f"{_accuracy(after['accuracy'], own).partition(' ')[2]}; " if own else ""
            small += f"before {_accuracy(before.get('accuracy'), ends.get(0))}; {name}"
            tiles.append(("Accuracy, held out", _number(after["accuracy"], "accuracy"), small))
        if after.get("kl_nats") is not None:
            small = f"before {_number(before.get('kl_nats'), 'kl_nats')}; {name}"
            tiles.append(("KL, held out", _number(after["kl_nats"], "kl_nats"), small))
    summary = rock_figures.read(folder, "summary.json") if folder else None
    if folder and summary:
        with run_files.used(folder / "summary.json"):
            tiles += _rock_tiles(summary)
    cells = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}"
        f"<small>{html.escape(small)}</small></dd></div>"
        for label, value, small in tiles
    )
    return f'<dl class="tiles">{cells}</dl>' if tiles else ""


def _rock_tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    k = summary["k"]
    numbers = {name: summary[name] for name in ("coverage", "split_half", "density_median")}
    beside = {n: summary[n] for n in ("coverage_null", "split_half_null", "density_corpus")}
    (coverage, halves, median), (null, found, whole) = numbers.values(), beside.values()
    size = f"{summary['problems']:,} problems, {summary['tokens']:,} tokens"
    small = f"null {null:.1%}; {size}"
    if summary.get("coverage_low") is not None:  # an older folder has none
        low, high = summary["coverage_low"], summary["coverage_high"]
        small = f"[{low:.1%}, {high:.1%}], {small}"
    return [
        (f"KL in the top {k} types", f"{coverage:.1%}", small),
        ("Found again, Jaccard", f"{halves:.2f}", f"null {found:.2f}"),
        ("Rocks in an answer", f"{median:.1%}", f"whole corpus {whole:.1%}"),
    ]


def _run_table(found: Mapping[str, Path]) -> str:
    sides, intervals, steps = {}, {}, {}
    for name, path in found.items():
        summary = run_files.summary(path)
        sides[name] = [summary.get("before") or {}, summary.get("after") or {}]
        ends = accuracy.intervals(path)
        intervals[name] = [ends.get(0), ends.get(summary["steps"])]
        steps[name] = _number(summary.get("steps"), "steps")
    keys = [  # without those that no run measured
        key
        for key in ("accuracy", "kl_nats", "mean_length")
        if any(side.get(key) is not None for pair in sides.values() for side in pair)
    ]
    head = ["run", "steps", *(f"{curve_figures.METRICS[key]}, before → after" for key in keys)]
    rows = [
        [name, steps[name], *(_before_after(k, pair, intervals[name]) for k in keys)]
        for name, pair in sides.items()
    ]
    return markup.table("Before and after, on held-out prompts", head, rows)


def _before_after(
    key: str, pair: Sequence[Mapping[str, Any]], ends: Sequence[accuracy.Ends | None]
) -> str:
    if key == "accuracy":
        told = [_accuracy(side.get(key), own) for side, own in zip(pair, ends, strict=True)]
    else:
        told = [_number(side.get(key), key) for side in pair]
    return " → ".join(told)


def _accuracy(value: float | None, ends: accuracy.Ends | None) -> str:
    return "–" if value is None or not math.isfinite(value) else accuracy.told(value, ends)


def _sweep(sweep: Mapping[str, Any] | None, arms: Mapping[str, Sequence[RunFiles]]) -> str:
    if sweep is None:
        return markup.missing(
            "No sweep was given.", "opd-jax sweep --config=FILE --arms=full,rock --workdir=DIR"
        )
    metrics = [m for m in curve_figures.METRICS if any(m in a["metrics"] for a in sweep["arms"])]
    compared = {(row["arm"], row["metric"]): row for row in sweep["comparisons"]}
    rows = []
    for arm in sweep["arms"]:
        row: list[Any] = [
            arm["arm"],
            "–" if arm["masked_share"] is None else f"{arm['masked_share']:.1%}",
            arm["normaliser"],
            str(len(arm["seeds"])),
        ]
        for metric in metrics:
            small = ""
            difference = compared.get((arm["arm"], metric))
            if difference and difference["delta"] is not None:
                p = _number(difference["p_adjusted"], "p")
                small = f"Δ {_interval(difference, metric, 'delta')}, p {p}"
                small += f": {difference['verdict']}" if difference.get("verdict") else ""
            row.append((_interval(arm["metrics"].get(metric), metric, "mean"), small))
        rows.append(row)
    head = [
        "arm",
        "masked",
        "normaliser",
        "seeds",
        *(curve_figures.METRICS[metric] for metric in metrics),
    ]
    caption = (
        f"Mean over seeds [interval]; Δ is the difference from {sweep['baseline']} [interval] with "
        f"its p after correction{_of_problems(sweep)}."
    )
    start = sweep.get("start") or {}
    measured = [metric for metric in metrics if start.get(metric) is not None]
    if measured:
        ends = sweep.get("start_interval") or {}
        told = (ends["low"], ends["high"]) if ends.get("low") is not None else None
        values = (
            f"{curve_figures.METRICS[m]} "
            + (_accuracy(start[m], told) if m == "accuracy" else _number(start[m], m))
            for m in measured
        )
        caption += f" Step 0: {'; '.join(values)}."
    plates = [curve_figures.arms(arms, sweep["baseline"])]
    if any(row["delta"] is not None for row in sweep["comparisons"]):
        plates.append(curve_figures.comparisons(sweep))
    note = f'<p class="note">{html.escape(str(sweep.get("note") or ""))}</p>'
    return markup.table(caption, head, rows) + note + markup.plates(plates)


def _of_problems(sweep: Mapping[str, Any]) -> str:
    """What p stands for where every arm has one seed."""
    if max(len(arm["seeds"]) for arm in sweep["arms"]) > 1:
        return ""
    return ", of these runs on further problems and not of the arms, since there is one seed"


def _rocks(folder: Path | None) -> str:
    if folder is None:
        return markup.missing("No rocks were given.", "opd-jax rocks --run=RUN --out=DIR")
    manifest = rock_figures.read(folder, "rocks.json") or {}
    with run_files.used(folder / "rocks.json"):
        said = ", ".join(f"{k} {manifest[k]}" for k in ("student", "teacher", "writer", "prompts"))
    text = f'<p class="note">Measured with {html.escape(said)}.</p>'
    text += markup.plates(rock_figures.plates(folder))
    if not (folder / "selection.json").exists():
        text += markup.missing("The selection is not there.", "opd-jax rocks --run=RUN --out=DIR")
    for name, question in rock_figures.studies(folder).items():
        if not (folder / f"{name}.json").exists():
            text += markup.missing(
                f"Not computed: {question}", f"opd-jax rocks --run=RUN --out=DIR --with={name}"
            )
    return text


def _types(folder: Path) -> tuple[str, dict[str, Any] | None]:
    if not (folder / "types.csv").exists():
        return markup.missing(
            "The table of types is not there.", "opd-jax rocks --run=RUN --out=DIR"
        ), None
    with run_files.used(folder / "types.csv"):
        data, count = page_data.types(folder / "types.csv")
    note = f"All {count:,} types that were seen"
    if count > page_data.MAX_TYPES:
        note = f"The first {page_data.MAX_TYPES:,} of {count:,} types by rank; types.csv has all"
    return _filled(_resource("types.html"), {"note": note}), data


def _answers(
    folder: Path | None, found: Mapping[str, Path], files: Mapping[str, RunFiles]
) -> list[dict[str, Any]]:
    reader = rock_figures.read(folder, "reader.json") if folder else None
    if folder and reader:
        with run_files.used(folder / "reader.json"):
            return page_data.from_reader(reader)
    rocks = {name: files[name].rocks for name in found}
    parts = [page_data.from_samples(path, name, rocks[name]) for name, path in found.items()]
    return [answer for part in parts for answer in part][: page_data.MAX_ANSWERS]


def _reader(answers: Sequence[Mapping[str, Any]], has_rocks: bool) -> str:
    if not answers:
        return markup.missing(
            "No answers were kept.",
            "opd-jax rocks --run=RUN --out=DIR, or train with --config.log.samples_every=N",
        )
    low, high = page_data.HEAT
    ticks = [
        f"{10.0**power:g}" for power in range(round(math.log10(low)), round(math.log10(high)) + 1)
    ]
    ramp = "".join(f"<span>{tick}</span>" for tick in ticks[:-1]) + f"<span>{ticks[-1]}+</span>"
    parts = {
        "ramp": ramp,
        "outlined": "among the types with most KL when the run ended",
        "gated": "",
    }
    if has_rocks:  # their weights are those of a gate that training need not have had
        parts["outlined"] = "a rock"
        parts["gated"] = (
            '<span><span class="t gated">token</span> a gate of the rocks would freeze it</span>'
        )
    return _filled(_resource("reader.html"), parts)


def _interval(row: Mapping[str, Any] | None, metric: str, middle: str) -> str:
    if row is None or row.get(middle) is None:
        return "–"
    # A change of a share is in percentage points.
    unit = " points" if middle == "delta" and metric in curve_figures.SHARES else ""
    numbers = [_number(row.get(name), metric) for name in (middle, "low", "high")]
    text, low, high = (n.removesuffix("%") if unit else n for n in numbers)
    return f"{text}{unit}" if row.get("low") is None else f"{text}{unit} [{low}, {high}]"


def _number(value: float | None, metric: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if metric in curve_figures.SHARES:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
