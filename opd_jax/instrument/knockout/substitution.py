"""What the model says in place of a banned token, and what a teacher thinks of it.

At the first banned id an arm's answer and the baseline's have the same context, so what stands
there in the arm is what the model says instead. With a teacher, the log-probability that it gives
to both, and the KL per token of the rest of both answers, which is where a substitution leads.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax import stats
from opd_jax.instrument import collect
from opd_jax.instrument.corpus import Corpus
from opd_jax.instrument.knockout.answered import Baseline, Job
from opd_jax.instrument.knockout.ledger import Line
from opd_jax.store.pair import Pair

_TOP = 5  # substitutes that are told
_SCORED = 64  # answers of an arm that the teacher reads, at most

Done = Sequence[tuple[Job, Line]]


def said_instead(done: Done, baseline: Baseline, text: Callable[[int], str]) -> dict[str, Any]:
    """What stands at the first banned id of the answers of one arm.

    Args:
      done: its answers.
      baseline: the answers without.
      text: of an id.
    """
    said: collections.Counter[int] = collections.Counter()
    banned: collections.Counter[int] = collections.Counter()
    for job, line in done:
        banned[int(baseline.answers[job.row][job.sample].ids[job.differs])] += 1
        if line["ids"]:
            said[line["ids"][0]] += 1
    return {
        "answers": len(done),
        "banned": _told(banned, text),
        "substitutes": _told(said, text),
        "different": len(said),
    }


def _told(counts: collections.Counter[int], text: Callable[[int], str]) -> list[dict[str, Any]]:
    total = counts.total()
    return [
        {"token_id": i, "token": text(i), "share": count / total}
        for i, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_TOP]
    ]


def local(done: Done, baseline: Baseline) -> dict[str, Any]:
    """What became of the answers that were banned at one place: do they come back?

    Returns:
      Shares of answers: ``same_answer`` (the answer found is the baseline's), ``said_later`` (the
      banned id stands behind the ban); and ``rejoined``, the mean share of the baseline's rest that
      both answers end with.
    """
    same, later, rejoined = [], [], []
    for job, line in done:
        old = baseline.answers[job.row][job.sample]
        same.append(line["found"] == old.found)
        rest, new = old.ids[job.differs + 1 :], np.array(line["ids"][1:], int)
        later.append(bool(np.isin(new[job.end - job.differs - 1 :], job.arm.ids).any()))
        shared = min(len(rest), len(new))
        if len(rest):
            differs = np.flatnonzero(rest[len(rest) - shared :] != new[len(new) - shared :])
            ends_with = shared - 1 - int(differs[-1]) if len(differs) else shared
            rejoined.append(ends_with / len(rest))
    return {
        "same_answer": float(np.mean(same)),
        "said_later": float(np.mean(later)),
        "rejoined": float(np.mean(rejoined)) if rejoined else None,
    }


def with_teacher(
    arms: Mapping[str, Done],
    baseline: Baseline,
    pair: Pair,
    *,
    batch: int,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Score the answers of arms, and the baseline's to the same problems, by a teacher.

    Args:
      arms: answers by the name of the arm; of each at most 64 are scored, drawn by lot.
      baseline: the answers without.
      pair: the model as student, and the teacher.
      batch: answers at a time.
      seed: of the lot and of the bootstrap.
      say: receives lines of progress.

    Returns:
      By arm, in nats: ``logp_banned`` and ``logp_substitute``, the teacher's mean log-probability
      of both at the first banned id; ``kl_before`` and ``kl_after``, mean KL per token of the rest
      of both answers, and their difference with its interval over problems.
    """
    chosen: dict[str, list[tuple[Job, Line]]] = {}
    for number, (name, done) in enumerate(arms.items()):
        rng = np.random.default_rng((seed, 5, number))
        some = np.sort(rng.permutation(len(done))[:_SCORED]).tolist()
        chosen[name] = [done[place] for place in some]
    texts: dict[tuple[int, int, str], np.ndarray] = {}
    for name, done in chosen.items():
        for job, line in done:
            old = baseline.answers[job.row][job.sample].ids
            texts[job.row, job.sample, ""] = old
            texts[job.row, job.sample, name] = np.array([*old[: line["start"]], *line["ids"]])
    if not texts:
        return {}
    keys = list(texts)
    corpus = Corpus(
        info={"writer": pair.student_name, "tokenizer_size": pair.vocab_size},
        prompts=[np.array(baseline.rows[row].example.ids, np.int32) for row, _, _ in keys],
        answers=[texts[key].astype(np.int32) for key in keys],
        problem_A=np.array([row for row, _, _ in keys], np.int32),
        truncated_A=np.zeros(len(keys), bool),
    )
    found = collect.score(corpus, pair, batch=batch, say=say)
    begins = dict(zip(keys, corpus.offset_A[:-1].tolist(), strict=True))
    result = {}
    for name, done in chosen.items():
        banned, substitute, before, after, problems = [], [], [], [], []
        for job, _ in done:
            old, new = (begins[job.row, job.sample, key] for key in ("", name))
            place, length = job.differs, len(texts[job.row, job.sample, name])
            banned.append(float((found.logp - found.log_ratio)[old + place]))
            substitute.append(float((found.logp - found.log_ratio)[new + place]))
            whole = len(texts[job.row, job.sample, ""])
            if place + 1 < min(length, whole):
                before.append(float(found.kl[old + place + 1 : old + whole].mean()))
                after.append(float(found.kl[new + place + 1 : new + length].mean()))
                problems.append(job.row)
        row: dict[str, Any] = {
            "answers": len(done),
            "logp_banned": float(np.mean(banned)),
            "logp_substitute": float(np.mean(substitute)),
        }
        if problems:
            names = np.unique(problems)
            change = np.subtract(after, before)
            by_problem = [change[np.array(problems) == n].mean() for n in names]
            told = stats.bootstrap(by_problem, seed=seed)
            row |= {"kl_before": float(np.mean(before)), "kl_after": float(np.mean(after))}
            row |= {"change": told.delta, "low": told.low, "high": told.high, "p": told.p}
        result[name] = row
    return result
