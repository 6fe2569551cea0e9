"""The sections of the instrument: the rocks, every type, and the answers token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax.report import markup, page_data, rock_figures, style
from opd_jax.report.markup import Absent, Section
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs
from opd_jax.store.run_files import RunFiles

_MADE = "opd-jax rocks --run=RUN --out=DIR"
_SHOWN = f"{_MADE}, then opd-jax report RUN --rocks=DIR"


def check(folder: Path, run: Path, teachers: Iterable[str]) -> None:
    """Check that a folder is of ``opd-jax rocks`` and of a teacher that the runs have.

    Raises:
      WorkdirError: it is not.
    """
    manifest = rock_figures.read(folder, "rocks.json")
    if manifest is None:
        raise workdirs.WorkdirError(
            f"{folder} has no rocks.json: expected the folder that opd-jax rocks --out=DIR made; "
            "give another --rocks, or let it end first"
        )
    own = run_files.model_name(str(manifest.get("teacher", "")))
    theirs = [run_files.model_name(teacher) for teacher in teachers]
    if own and all(theirs) and own not in theirs:
        raise workdirs.WorkdirError(
            f"{folder} and {run} cannot be shown together:\n  teacher: {own!r} and "
            f"{' or '.join(map(repr, theirs))}\nexpected rocks measured against the teacher of the "
            "runs; give another --rocks"
        )


def rocks(folder: Path | None) -> Section:
    """Figures of the rocks, with their null and control. Call inside STYLE's context."""
    heading = ("rocks", "Rock Tokens: which tokens carry the KL?")
    if folder is None:
        return Section(*heading, absent=(Absent("which tokens carry the KL", _SHOWN),))
    manifest = rock_figures.read(folder, "rocks.json") or {}
    with run_files.used(folder / "rocks.json"):
        said = ", ".join(f"{k} {manifest[k]}" for k in ("student", "teacher", "writer", "prompts"))
    body = markup.text(f"Measured with {said}.")
    body += tiles(folder)
    wide, narrow = (rock_figures.plates(folder, layout) for layout in (style.WIDE, style.NARROW))
    body += markup.plates(style.with_narrow(wide, narrow))
    absent = []
    if not (folder / "selection.json").exists():
        absent.append(Absent("the selection of the rocks", _MADE))
    for name, question in rock_figures.studies(folder).items():
        if not (folder / f"{name}.json").exists():
            absent.append(Absent(f"the study “{question}”", f"{_MADE} --with={name}"))
    return Section(*heading, body, tuple(absent))


def tiles(folder: Path) -> str:
    """The few numbers of the rocks that one looks for first."""
    summary = rock_figures.read(folder, "summary.json")
    if not summary:
        return ""
    with run_files.used(folder / "summary.json"):
        return markup.tiles(_numbers(summary))


def _numbers(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
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


def types(folder: Path | None) -> Section:
    """The table of all types, which the page's script fills."""
    heading = ("types", "Every type")
    if folder is None or not (folder / "types.csv").exists():
        absent = () if folder is None else (Absent("the table of all types", _MADE),)
        return Section(*heading, absent=absent)
    with run_files.used(folder / "types.csv"):
        data, count = page_data.types(folder / "types.csv")
    note = f"All {count:,} types that were seen"
    if count > page_data.MAX_TYPES:
        note = f"The first {page_data.MAX_TYPES:,} of {count:,} types by rank; types.csv has all"
    body = markup.filled(markup.resource("types.html"), {"note": note})
    return Section(*heading, body, data={"types": data})


def reader(
    folder: Path | None, found: Mapping[str, Path], files: Mapping[str, RunFiles]
) -> Section:
    """Answers whose tokens are coloured by their KL, which the page's script fills."""
    heading = ("reader", "Read the answers token by token")
    answers = _answers(folder, found, files)
    if not answers:
        made = "opd-jax rocks --run=RUN --out=DIR, or train with --config.log.samples_every=N"
        return Section(*heading, absent=(Absent("answers token by token", made),))
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
    if folder is not None and (folder / "reader.json").exists():
        parts["outlined"] = "a rock"  # their weights are those of a gate that is not there yet
        parts["gated"] = (
            '<span><span class="t gated">token</span> a gate of the rocks would freeze it</span>'
        )
    body = markup.filled(markup.resource("reader.html"), parts)
    return Section(*heading, body, data={"answers": answers, "heat": page_data.HEAT})


def _answers(
    folder: Path | None, found: Mapping[str, Path], files: Mapping[str, RunFiles]
) -> Sequence[dict[str, Any]]:
    told = rock_figures.read(folder, "reader.json") if folder else None
    if folder and told:
        with run_files.used(folder / "reader.json"):
            return page_data.from_reader(told)
    parts = [page_data.from_samples(path, name, files[name].rocks) for name, path in found.items()]
    return [answer for part in parts for answer in part][: page_data.MAX_ANSWERS]
