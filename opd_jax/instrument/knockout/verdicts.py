"""What the decoded answers come to: ``census.csv`` and ``summary.json``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from opd_jax.data import tokenizer as tokenizers
from opd_jax.evaluate import metrics
from opd_jax.instrument.knockout import effects, ledger, substitution
from opd_jax.instrument.knockout.answered import ABSENT, NULL, Arm, Baseline, Job
from opd_jax.instrument.knockout.ledger import Ledger, Line
from opd_jax.instrument.knockout.request import Request
from opd_jax.instrument.knockout.targets import Targets
from opd_jax.store import pair as pairs

Done = Sequence[tuple[Job, Line]]
_COLUMNS = (
    *("token_id", "token", "family", "rank", "occurrences", "problems", "held", "base", "delta"),
    *(
        "low",
        "high",
        "base_held",
        "delta_held",
        "low_held",
        "high_held",
        "down",
        "up",
        "changed",
        "unparsed",
    ),
    *("p", "p_bootstrap", "p_adjusted", "bonferroni", "category", "category_all"),
    *("category_published", "substitute", "substitute_share"),
)
_DIGITS = 6


def by_arm(done: Done) -> dict[str, list[tuple[Job, Line]]]:
    """Answers by the name of their arm, without those of the checks."""
    found: dict[str, list[tuple[Job, Line]]] = {}
    for job, line in done:
        if job.arm.family not in (NULL, ABSENT):
            found.setdefault(job.arm.name, []).append((job, line))
    return found


def outcomes(done: Done, baseline: Baseline) -> np.ndarray:
    """Right or wrong under one arm, float64 [N, K]: the baseline's where nothing was decoded."""
    correct_NK = baseline.correct_NK.copy()
    for job, line in done:
        correct_NK[job.row, job.sample] = line["correct"]
    return correct_NK


def on_first_half(done: Done, baseline: Baseline) -> dict[int, dict[str, float]]:
    """Change of accuracy of the types banned alone, by task, on the first half of the problems."""
    task_N = np.array([row.task.name for row in baseline.rows])
    found: dict[int, dict[str, float]] = {}
    for some in by_arm(done).values():
        arm = some[0][0].arm
        if arm.family == "single":
            change_N = (outcomes(some, baseline) - baseline.correct_NK).mean(axis=1)
            found[arm.ids[0]] = {
                str(task): float(change_N[(task_N == task) & ~baseline.is_second_N].mean())
                for task in dict.fromkeys(task_N.tolist())
                if np.any((task_N == task) & ~baseline.is_second_N)
            }
    return found


def of(
    arms: Sequence[Arm],
    done: Done,
    baseline: Baseline,
    targets: Targets,
    request: Request,
    tokenizer: Any,
    mesh: Mesh | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All that ``summary.json`` holds, beside what the caller knows.

    Args:
      arms: all of them.
      done: their answers.
      baseline: the answers without.
      targets: where types come from.
      request: what is asked for.
      tokenizer: of the model.
      mesh: for the teacher.
      say: receives lines.
    """

    def text(token_id: int) -> str:
        return tokenizers.token_text(tokenizer, token_id)

    seed, answered = request.settings.seed, by_arm(done)
    count_V = baseline.counts(max(max(i for arm in arms for i in arm.ids) + 1, 1))
    families: dict[str, Any] = {}
    change: dict[tuple[int, ...], np.ndarray] = {}
    for name in dict.fromkeys(arm.family for arm in arms):
        some = [arm for arm in arms if arm.family == name and arm.name in answered]
        if not some:
            continue
        found = []
        for arm in some:
            used_N = baseline.used(arm)
            arm_NK = outcomes(answered[arm.name], baseline)
            held_N = np.zeros(len(used_N), bool)
            held_N[[job.row for job, _ in answered[arm.name]]] = True
            found.append(
                effects.effect(baseline.correct_NK[used_N], arm_NK[used_N], held_N[used_N], seed)
            )
            if name in ("single", "pair"):
                change[arm.ids] = (arm_NK - baseline.correct_NK).mean(axis=1)
        rows = effects.judged(found, request.margin)
        for arm, row in zip(some, rows, strict=True):
            row |= _told(arm, answered[arm.name], baseline, count_V, text)
        families[name] = effects.family(rows) | {"rows": rows}
    result: dict[str, Any] = {
        "settings": {
            "samples": request.settings.samples,
            "temperature": request.settings.temperature,
            "max_new": request.settings.max_new,
            "seed": seed,
            "margin": request.margin,
            "window": request.window,
        },
        "problems": len(baseline.rows),
        "baseline": _baseline(baseline),
        "noise": _noise(families),
        "families": families,
        "interactions": effects.interactions(change, seed),
    }
    single = families.get("single")
    if single and targets.table:
        place = {i: number for number, i in enumerate(targets.ids)}
        order = [place[row["ids"][0]] for row in single["rows"]]
        table = {name: [column[i] for i in order] for name, column in targets.table.items()}
        result["correlations"] = {
            key: effects.correlations(table, [row[key] for row in single["rows"]], seed)
            for key in ("delta", "delta_held")
        }
    if request.teacher:
        say(f"scoring substitutions against {request.teacher}")
        pair = pairs.open_pair(
            request.model, request.teacher, mesh=mesh, dtype=request.dtype, say=say
        )
        scored = {
            arm.name: answered[arm.name]
            for arm in arms
            if arm.family in ("single", "local") and arm.name in answered
        }
        result["teacher"] = request.teacher
        result["substitutions"] = substitution.with_teacher(
            scored, baseline, pair, batch=request.batch, seed=seed, say=say
        )
    return result


def _told(
    arm: Arm, done: Done, baseline: Baseline, count_V: np.ndarray, text: Callable[[int], str]
) -> dict[str, Any]:
    """What an arm is, and what its answers say."""
    row: dict[str, Any] = {
        "arm": arm.name,
        "ids": list(arm.ids),
        "tokens": [text(i) for i in arm.ids],
        "occurrences": int(count_V[list(arm.ids)].sum()),
        "second_half": arm.is_second,
        "changed": len(done),
        "unparsed": sum(line["found"] is None for _, line in done) / len(done),
        "down_unparsed": sum(
            line["found"] is None and baseline.answers[job.row][job.sample].correct
            for job, line in done
        ),
        "said": substitution.said_instead(done, baseline, text),
    }
    if arm.window is not None:
        row |= substitution.local(done, baseline)
    return row


def _baseline(baseline: Baseline) -> dict[str, Any]:
    samples = [
        [metrics.Sample(a.correct, a.found, False, len(a.ids)) for a in found]
        for found in baseline.answers
    ]
    accuracy = metrics.summarise(samples, [1])["pass@1"]
    return {
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "tokens": sum(len(a.ids) for found in baseline.answers for a in found),
        "types": len(np.unique(np.concatenate([a.ids for f in baseline.answers for a in f]))),
    }


def _noise(families: Mapping[str, Any]) -> dict[str, Any]:
    """Flips that a ban makes in either direction, of all answers that it changed, by family."""
    return {
        name: {
            "changed": sum(row["changed"] for row in family["rows"]),
            "down": sum(row["down"] for row in family["rows"]),
            "up": sum(row["up"] for row in family["rows"]),
        }
        for name, family in families.items()
    }


def census_csv(result: Mapping[str, Any]) -> str:
    """The table of the types that were banned alone."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for name in ("single", "control"):
        for rank, row in enumerate(result["families"].get(name, {"rows": []})["rows"], 1):
            said = row["said"]["substitutes"]
            values = row | {
                "token_id": row["ids"][0],
                "token": row["tokens"][0],
                "family": name,
                "rank": rank,
                "bonferroni": int(row["bonferroni"]),
                "substitute": said[0]["token"] if said else "",
                "substitute_share": said[0]["share"] if said else None,
            }
            writer.writerow([_cell(values[column]) for column in _COLUMNS])
    return stream.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    return "" if value is None else value


def write(folder: Ledger, result: Mapping[str, Any]) -> None:
    """Write the table, then the summary, which says that all is done."""
    folder.write(ledger.CENSUS, census_csv(result))
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    folder.write(ledger.SUMMARY, text + "\n")
