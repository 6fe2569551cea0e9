"""Do other writers' answers to the same prompts have the same rocks?

The student, the same before training, and the teacher write; the pair scores. The student before
training is also scored on its own text: if that concentrates as much, concentration comes before
distillation and is no trace of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_jax import processes
from opd_jax.instrument import null, selection, shares
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.tally import Tally, shuffled
from opd_jax.instrument.workbench import Workbench


def study(bench: Workbench) -> dict[str, Any]:
    """Compare the corpora of all writers; what ``references.json`` holds."""
    subject, lab = bench.subject, bench.lab
    found = {"student": bench.found} if subject.writer == subject.student.name else {}
    found = found or {"corpus": bench.found}
    notes = [f"{next(iter(found))}: written by {subject.writer}"]
    writers = {"student": subject.student.name}
    if subject.student.run is not None:
        writers["undistilled"] = f"{subject.student.run}@0"
    else:
        bench.say("  undistilled: left out, the student is no trained step of a run (see --run)")
    for name, ref in (writers | {"teacher": subject.teacher.name}).items():
        if ref == subject.writer:
            continue  # these are the answers that are there
        folder = bench.folder.path / "references" / name
        bench.say(f"  {name}: answering and scoring")
        corpus = lab.write(folder / "corpus", ref, processes.indented(bench.say, "    "))
        found[name] = lab.scored(folder / "scores.npz", corpus)
        notes.append(f"{name}: written by {ref}")
        if name == "undistilled":
            own = folder / "own_scores.npz"
            student = None if own.exists() else lab.load(ref)
            found["undistilled_own"] = lab.scored(own, corpus, student)
            notes.append(f"undistilled_own: the same text, scored by {ref} itself")
    ranked = {name: bench.rule.rank(TypeStats.of_occurrences(x)) for name, x in found.items()}
    k = min(bench.flags.k, *(len(ids) for ids in ranked.values()))
    return {
        "k": k,
        "corpora": [_reference(name, x, k, bench) for name, x in found.items()],
        "jaccard": [
            [shares.jaccard(a[:k], b[:k]) for b in ranked.values()] for a in ranked.values()
        ],
        **jaccard_by_chance(list(found.values()), k, rule=bench.rule, seed=bench.flags.seed),
        "joint_metrics": (
            selection.joint_metrics(
                bench.found, found["teacher"], k, rule=bench.rule, seed=bench.flags.seed
            )
            if "teacher" in found
            else []
        ),
        "note": (
            f"{'; '.join(notes)}. Scored by {subject.student.name} against {subject.teacher.name} "
            f"unless said otherwise. jaccard: overlap of the top {k} types of each two corpora; "
            "jaccard_null: the same with the KL of either shuffled among its positions, "
            "jaccard_null_within among those of each problem; joint_metrics: stability of the "
            "minimum over this corpus and the teacher's; "
            f"{null.covered(len(np.unique(bench.found.problem)))}; {null.NOTE}"
        ),
    }


def jaccard_by_chance(
    corpora: Sequence[Occurrences], k: int, *, rule: Rule, seed: int
) -> dict[str, list[list[float]]]:
    """Mean overlap of the top ``k`` types of each two corpora, the KL of either shuffled.

    Writers of one language share its frequent types: this much they agree whatever the type has to
    do with its KL. ``jaccard_null`` shuffles among all positions of a corpus,
    ``jaccard_null_within`` among those of each problem.
    """
    result = {}
    for name in ("jaccard_null", "jaccard_null_within"):
        rng = np.random.default_rng(seed)
        total = np.zeros((len(corpora), len(corpora)))
        for _ in range(selection.PERMUTATIONS):
            tops = []
            for found in corpora:
                group = found.problem if name.endswith("within") else np.zeros(len(found), int)
                kl = shuffled(found.kl, group, rng)
                tops.append(rule.rank(TypeStats.of(found.token_id, kl, found.vocab_size))[:k])
            total += [[shares.jaccard(a, b) for b in tops] for a in tops]
        result[name] = (total / selection.PERMUTATIONS).tolist()
    return result


def _reference(name: str, found: Occurrences, k: int, bench: Workbench) -> dict[str, Any]:
    sums = TypeStats.of_occurrences(found)
    (row,) = null.coverage(
        Tally.of(found),
        [k],
        rule=bench.rule,
        resamples=selection.RESAMPLES,
        permutations=selection.PERMUTATIONS,
        rng=np.random.default_rng(bench.flags.seed),
    )
    return {
        "name": name,
        **selection.size_of(found),
        "kl_nats": float(found.kl.mean(dtype=np.float64)),
        "coverage": row["value"],
        "coverage_low": row["low"],
        "coverage_high": row["high"],
        "coverage_in_sample": row["in_sample"],
        "coverage_null": row["null"],
        "coverage_null_within": row["null_within"],
        "density_median": selection.density_row(found, sums, k, bench.rule)["median"],
        "types_seen": int(sums.seen.sum()),
    }
