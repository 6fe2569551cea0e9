"""The first sections of a page: is the student better, what changed, what did it cost, how made.

Each takes runs by name and says in words what ``outcome`` and the files of the run hold.
"""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_jax import config, stats
from opd_jax.report import markup, style
from opd_jax.report.accuracy import Measured
from opd_jax.report.markup import Absent, Row, Section
from opd_jax.report.outcome import KINDS, Outcome, Problem
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs

EACH = 3  # examples of a kind
MAX_TEXT = 4000  # characters of an answer; its middle is left out, since its end decides
_MEANS = {
    "fixed": "wrong before, right after",
    "broken": "right before, wrong after",
    "still right": "right before and after",
    "still wrong": "wrong before and after",
}
_OF_THIS_RUN = (
    "Brackets are 95% intervals over problems, of the run as it is: another seed may come out "
    "elsewhere, which opd-jax sweep --seeds=N measures."
)
_GRADE = Absent(
    "accuracy before and after, with its interval",
    "opd-jax train --config.data.heldout=FILE --config.eval.every=N, where FILE has an answer to "
    "each prompt",
)
_TEACHER = Absent("the teacher's accuracy, the ceiling", "opd-jax train, run anew by this version")
_TEXTS = Absent("the answers side by side", "opd-jax train, run anew by this version")


def better(outcomes: Mapping[str, Outcome], runs: Mapping[str, Path]) -> Section:
    """Is it better, by how much, how sure, how far below the teacher."""
    parts, absent = [], []
    for name, outcome in outcomes.items():
        heading = f"<h3>{html.escape(name)}</h3>" if len(outcomes) > 1 else ""
        summary = run_files.summary(runs[name])
        words = [*verdict(outcome), *_kl(summary), *_prediction(runs[name])]
        told = "".join(markup.text(line, "" if i else "lead") for i, line in enumerate(words))
        parts.append(f"{heading}{told}{_scale(outcome)}" if words else "")
        absent += [] if outcome.after else [_GRADE]
        absent += [] if outcome.teacher or not outcome.after else [_TEACHER]
    if any(outcome.change for outcome in outcomes.values()):
        parts.append(markup.text(_OF_THIS_RUN))
    return Section("better", "Is it better?", "".join(parts), tuple(absent))


def verdict(outcome: Outcome) -> list[str]:
    """What the accuracies say, in at most two paragraphs; none where nothing was graded."""
    before, after, change = outcome.before, outcome.after, outcome.change
    if after is None:
        return []
    if before is None:
        return [f"Accuracy on held-out problems is {after}; before training it was not measured."]
    asked = sum(outcome.counts.values())
    of = f" of {asked:,} held-out problems" if asked else " of the held-out problems"
    moved = f"from {before} to {after}{of}"
    if change is None or outcome.p_mcnemar is None:
        return [f"Accuracy went {moved}; the answers were not kept, so no test can be made."]
    # One answer a problem: the exact test. Several: that of the interval, on their shares.
    p = outcome.p_mcnemar if outcome.samples == 1 else change.p
    if stats.verdict(p, None) == "undecided":
        head = f"No difference was found: right answers went {moved}"
    else:
        word = "Yes: right answers rose" if change.delta > 0 else "No: right answers fell"
        head = f"{word} {moved}"
    test = "exact McNemar" if outcome.samples == 1 else "paired bootstrap"
    lines = [f"{head}, {points(change)}, {style.p_value(p)} ({test})."]
    if told := _way(outcome):
        lines.append(told)
    return lines


def _way(outcome: Outcome) -> str:
    before, after, teacher = outcome.before, outcome.after, outcome.teacher
    if before is None or after is None or teacher is None:
        return ""
    gap = f"; it is {points(outcome.gap, '')} below it" if outcome.gap else ""
    if outcome.gap and outcome.gap.delta <= 0:
        gap = ""
    if outcome.way is None:
        return f"The teacher, at {teacher}, was not above the student to begin with."
    if outcome.way < 0:
        return f"That is further from the teacher's {teacher} than before{gap}."
    if outcome.way > 1:
        return f"That is above the teacher's {teacher}."
    return (
        f"That is {outcome.way:.0%} of the way from {before.value:.1%} to the teacher's "
        f"{teacher}{gap}."
    )


def points(change: stats.Interval, sign: str = "+") -> str:
    """``+27.7 points [21.1, 34.4]``."""
    ends = ""
    if change.low is not None and change.high is not None:
        ends = f" [{100 * change.low:.1f}, {100 * change.high:.1f}]"
    return f"{100 * change.delta:{sign}z.1f} points{ends}"


def _kl(summary: Mapping[str, Any]) -> list[str]:
    before, after = ((summary.get(side) or {}).get("kl_nats") for side in ("before", "after"))
    if before is None or after is None:
        return []
    word = "fell" if after < before else "rose" if after > before else "stayed"
    return [
        f"KL(student ‖ teacher) on held-out prompts {word} from {style.measured(before)} to "
        f"{style.measured(after)} nats a token."
    ]


def _prediction(run: Path) -> list[str]:
    told = workdirs.setting(run_files.record(run), "prediction")
    return [f"Written down before the run: {told}"] if told else []


def _scale(outcome: Outcome) -> str:
    """Before, after and teacher on one scale from 0 to 100%, their intervals as bands."""
    rows = (("before", outcome.before), ("after", outcome.after), ("teacher", outcome.teacher))
    lines = "".join(_track(name, value) for name, value in rows if value)
    return f'<div class="scale">{lines}</div>' if lines else ""


def _track(name: str, value: Measured) -> str:
    low, high = value.ends or (value.value, value.value)
    places = f"--at:{value.value:.2%};--low:{low:.2%};--wide:{high - low:.2%}"
    return f'<div class="{name}"><span>{name}</span><i style="{places}"></i><b>{value}</b></div>'


def changed(outcomes: Mapping[str, Outcome]) -> Section:
    """What changed in the answers: a table of four counts, and examples of each kind."""
    parts, absent = [], []
    last = list(outcomes)[-1] if outcomes else ""
    for name, outcome in outcomes.items():
        if outcome.p_mcnemar is None:
            absent += [_GRADE] if outcome.after is None else [_TEXTS]
            continue
        heading = f"<h3>{html.escape(name)}</h3>" if len(outcomes) > 1 else ""
        parts.append(heading + _counts(outcome))
        if not outcome.problems:
            absent.append(_TEXTS)
        elif name == last:
            parts.append(_examples(outcome))
        else:
            parts.append(markup.text(f"Its answers: opd-jax report with {name} as the last run."))
    return Section("answers", "What changed in the answers?", "".join(parts), tuple(absent))


def _counts(outcome: Outcome) -> str:
    counts = outcome.counts
    rows = "".join(
        f'<tr><th scope="row">{side} before</th>'
        + "".join(
            f'<td class="{kind.replace(" ", "-")}"><b>{counts[kind]:,}</b> {kind}</td>'
            for kind in (KINDS[is_before, True], KINDS[is_before, False])
        )
        + "</tr>"
        for side, is_before in (("right", True), ("wrong", False))
    )
    several = (
        f" A problem has up to {outcome.samples} answers; it counts as right where more than half "
        "of them are."
        if outcome.samples > 1
        else ""
    )
    assert outcome.p_mcnemar is not None
    words = (
        f"Of {sum(counts.values()):,} problems {counts['fixed']:,} were fixed and "
        f"{counts['broken']:,} broken; were both equally likely, so large a difference would have "
        f"{style.p_value(outcome.p_mcnemar)} (exact McNemar).{several}"
    )
    return (
        f"{markup.text(words, '')}"
        '<table class="square" aria-label="Problems by verdict before and after"><thead><tr>'
        '<td></td><th scope="col">right after</th><th scope="col">wrong after</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _examples(outcome: Outcome) -> str:
    parts = []
    for kind in KINDS.values():
        own = [problem for problem in outcome.problems if problem.kind == kind]
        if not own:
            continue
        count = outcome.counts[kind]
        shown = f"the first {EACH} of {count:,}" if count > EACH else f"all {count:,}"
        is_open = " open" if kind in ("fixed", "broken") else ""
        parts.append(
            f"<details{is_open}><summary>{kind.capitalize()}: {_MEANS[kind]}, {shown}</summary>"
            f"{''.join(_example(problem) for problem in own[:EACH])}</details>"
        )
    return "".join(parts)


def _example(problem: Problem) -> str:
    replies = "".join(
        f'<div class="{"right" if reply.is_correct else "wrong"}"><h4>{who} '
        f"<span>{_verdict(reply.is_correct, reply.reason)}</span></h4>"
        f"<pre>{html.escape(_cut(reply.text))}</pre></div>"
        for who, reply in problem.replies.items()
    )
    gold = html.escape(" or ".join(problem.gold))
    return (
        f'<article class="problem"><p class="note">Problem {problem.index}, expected '
        f"<b>{gold}</b></p><pre>{html.escape(_cut(problem.prompt.strip()))}</pre>"
        f'<div class="replies">{replies}</div></article>'
    )


def _verdict(is_correct: bool, reason: str) -> str:
    return html.escape(("✓ right" if is_correct else "✗ wrong") + (f": {reason}" if reason else ""))


def _cut(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"


def cost(runs: Mapping[str, Path]) -> Section:
    """What the runs cost: time, tokens, devices, padding."""
    return Section("cost", "What did it cost?", _each(runs, _cost))


def _each(runs: Mapping[str, Path], rows: Any) -> str:
    return "".join(
        (f"<h3>{html.escape(name)}</h3>" if len(runs) > 1 else "") + markup.facts(rows(path))
        for name, path in runs.items()
    )


def _cost(run: Path) -> list[Row]:
    summary, record = run_files.summary(run), run_files.record(run)
    lines = run_files.metrics(run)
    tokens = math.fsum(
        (line.get("tokens_per_s") or 0.0) * (line.get("step_s") or 0.0) for line in lines
    )
    found = [("wall-clock", f"{duration(summary['seconds'])} for {summary['steps']:,} steps")]
    if not summary["is_finished"]:
        by = summary.get("stopped_by")
        found.append(("ended", f"stopped{f' by {by}' if by else ''}, not finished"))
    if median := summary["median_s"].get("step"):
        first = summary.get("first_step_s")
        more = f"; the first, with compiling, {duration(first)}" if first else ""
        found.append(("a step", f"{style.measured(median)} s (median){more}"))
    if shares := summary["phase_share"]:
        largest = sorted(shares.items(), key=lambda item: -item[1])
        told = ", ".join(f"{name} {share:.0%}" for name, share in largest if share >= 0.005)
        found.append(("of the time", told))
    if tokens and math.isfinite(tokens):
        rate = f", {tokens / summary['seconds']:,.0f} a second" if summary["seconds"] else ""
        found.append(("tokens trained on", f"{round(tokens):,}{rate}"))
    with run_files.used(run / "run.json"):
        if devices := record.get("devices"):
            several = f" in {devices['processes']} processes" if devices["processes"] > 1 else ""
            found.append(("devices", f"{devices['count']} {devices['kind']}{several}"))
    if (padding := summary.get("padding_share")) is not None:
        found.append(("padding", f"{padding:.1%} of the columns of the updates"))
    return [*found, ("programs compiled", f"{summary['compiles']:,}")]


def made(runs: Mapping[str, Path]) -> Section:
    """The command, the models, the learning rate, the prompts, and what else was set."""
    parts = []
    for name, path in runs.items():
        record = run_files.record(path)
        heading = f"<h3>{html.escape(name)}</h3>" if len(runs) > 1 else ""
        command = " \\\n  ".join(shlex.quote(word) for word in record.get("command") or [])
        command = command.replace(" \\\n  ", " ", 1)  # the program and its command in one line
        told = f'<pre class="command">{html.escape(command)}</pre>' if command else ""
        with run_files.used(path / "run.json"):
            parts.append(heading + told + markup.facts(_recipe(record)) + _settings(record))
    return Section("made", "How was it made?", "".join(parts))


def _recipe(record: Mapping[str, Any]) -> list[Row]:
    def of(key: str) -> Any:
        return workdirs.setting(record, key)

    rows = of("rollout.samples")
    answers = f"{rows} answer{'s' * (rows != 1)} each of up to {of('rollout.max_new')} tokens"
    batch = f"{of('train.prompts')} a step, {answers}"
    told = [
        ("student", of("student.path")),
        ("teacher", of("teacher.path")),
        ("teachers", "; ".join(f"{name}: {path}" for name, path in of("teacher.paths"))),
        ("prompts", "; ".join(filter(None, (of("data.prompts"), batch)))),
        ("held-out prompts", of("data.heldout")),
        ("learning rate", f"{of('optim.lr'):g}, {of('optim.name')}, {of('train.steps'):,} steps"),
        ("objective", f"{of('kl.direction')} KL at temperature {of('kl.temperature'):g}"),
        ("gate", of("rock.mode")),
        ("seed", str(of("seed"))),
        ("started", record.get("time", "")),
    ]
    if resumed := record.get("resumed"):
        told.append(("resumed", f"{len(resumed)} time{'s' * (len(resumed) > 1)}"))
    if versions := record.get("versions"):
        told.append(("versions", ", ".join(f"{name} {v}" for name, v in versions.items())))
    return [(name, str(value)) for name, value in told if value not in ("", None)]


def _settings(record: Mapping[str, Any]) -> str:
    """The keys that differ from their defaults."""
    defaults = config.recorded()
    other = [
        (key, f"{_shown(value)} (default {_shown(defaults[key][1])})")
        for key, value in record["config"].items()
        if key in defaults and _shown(value) != _shown(defaults[key][1])
    ]
    if not other:
        return ""
    return (
        f"<details><summary>{len(other)} settings that are not the defaults</summary>"
        f"{markup.facts(other)}</details>"
    )


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def tiles(outcomes: Mapping[str, Outcome], runs: Mapping[str, Path]) -> str:
    """The few numbers one looks for first, of the last run."""
    if not runs:
        return ""
    name, path = list(runs.items())[-1]
    outcome, summary = outcomes[name], run_files.summary(path)
    found: list[tuple[str, str, str]] = []
    if outcome.after:
        value, _, ends = str(outcome.after).partition(" ")
        beside = [ends, f"before {outcome.before or '–'}"]
        beside += [f"teacher {outcome.teacher}"] if outcome.teacher else []
        small = "; ".join(text for text in (*beside, name if len(runs) > 1 else "") if text)
        found.append(("Accuracy, held out", value, small))
    if outcome.way is not None and outcome.before and outcome.teacher:
        ends = f"from {outcome.before.value:.1%} to {outcome.teacher.value:.1%}"
        found.append(("Of the way to the teacher", f"{outcome.way:.0%}", ends))
    kl = [(summary.get(side) or {}).get("kl_nats") for side in ("before", "after")]
    if kl[1] is not None:
        small = f"nats; before {style.measured(kl[0])}"
        found.append(("KL, held out", style.measured(kl[1]), small))
    small = f"{summary['steps']:,} steps"
    found.append(("Time", duration(summary["seconds"]), small))
    return markup.tiles(found)


def duration(seconds: float) -> str:
    """``45.0 s``, ``3m13s``, ``2h05m``."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{style.measured(seconds)} s"
    hours, left = divmod(minutes, 60)
    return f"{hours}h{left:02d}m" if hours else f"{minutes}m{rest:02d}s"
