"""The further questions of ``opd-jax rocks`` (``--with``): each stage fills one JSON file.

What the analyses themselves do is said in their modules; here they get the corpus, the models and
the rocks of a folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.instrument import collect, null, outputs, selection
from opd_jax.instrument import controls as select
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.workbench import Workbench

NUM_RANDOM = 200  # types of the group "random", as in compute_logit_sums.py of the paper's code


def references(bench: Workbench) -> dict[str, Any]:
    """Do other writers' answers to the same prompts have the same rocks?

    The student, the same before training, and the teacher write; the pair scores. The student
    before training is also scored on its own text: if that concentrates as much, concentration
    comes before distillation and is no trace of it.
    """
    found = {"student": bench.found} if bench.writer_name == bench.student.name else {}
    found = found or {"corpus": bench.found}
    notes = [f"{next(iter(found))}: written by {bench.writer_name}"]
    writers = {"student": bench.student.name}
    if bench.student.run is not None:
        writers["undistilled"] = f"{bench.student.run}@0"
    else:
        bench.say("  undistilled: left out, the student is no trained step of a run (see --run)")
    for name, ref in (writers | {"teacher": bench.teacher.name}).items():
        if ref == bench.writer_name:
            continue  # these are the answers that are there
        folder = bench.out / "references" / name
        bench.say(f"  {name}: answering and scoring")
        corpus = collect.write(
            folder / "corpus",
            bench.pair,
            bench.rows,
            **bench.writer(ref),
            **bench.writing,
            say=lambda line: bench.say(f"    {line}"),
        )
        found[name] = bench.scored(folder / "scores.npz", corpus)
        notes.append(f"{name}: written by {ref}")
        if name == "undistilled":
            own = folder / "own_scores.npz"
            student = None if own.exists() else bench.load(ref)
            found["undistilled_own"] = bench.scored(own, corpus, student)
            notes.append(f"undistilled_own: the same text, scored by {ref} itself")
    ranked = {name: bench.rule.rank(TypeStats.of_occurrences(x)) for name, x in found.items()}
    k = min(bench.flags.k, *(len(ids) for ids in ranked.values()))
    return {
        "k": k,
        "corpora": [_reference(name, x, k, bench) for name, x in found.items()],
        "jaccard": [
            [select.jaccard(a[:k], b[:k]) for b in ranked.values()] for a in ranked.values()
        ],
        "jaccard_null": jaccard_by_chance(
            list(found.values()), k, rule=bench.rule, seed=bench.flags.seed
        ),
        "joint_metrics": (
            selection.joint_metrics(
                bench.found, found["teacher"], k, rule=bench.rule, seed=bench.flags.seed
            )
            if "teacher" in found
            else []
        ),
        "note": (
            f"{'; '.join(notes)}. Scored by {bench.student.name} against {bench.teacher.name} "
            f"unless said otherwise. jaccard: overlap of the top {k} types of each two corpora; "
            "jaccard_null: the same with the KL of either shuffled; joint_metrics: stability of "
            f"the minimum over this corpus and the teacher's; {null.NOTE}"
        ),
    }


def jaccard_by_chance(
    corpora: Sequence[Occurrences], k: int, *, rule: select.Rule, seed: int
) -> list[list[float]]:
    """Mean overlap of the top ``k`` types of each two corpora, the KL of either shuffled.

    Writers of one language share its frequent types: this much they agree whatever the type has to
    do with its KL.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros((len(corpora), len(corpora)))
    for _ in range(selection.PERMUTATIONS):
        tops = []
        for found in corpora:
            sums = TypeStats.of(found.token_id, rng.permutation(found.kl), found.vocab_size)
            tops.append(rule.rank(sums)[:k])
        total += [[select.jaccard(a, b) for b in tops] for a in tops]
    return (total / selection.PERMUTATIONS).tolist()


def _reference(name: str, found: Occurrences, k: int, bench: Workbench) -> dict[str, Any]:
    sums = TypeStats.of_occurrences(found)
    (row,) = null.coverage(
        null.Table.of(found),
        [k],
        rule=bench.rule,
        resamples=selection.RESAMPLES,
        permutations=selection.PERMUTATIONS,
        rng=np.random.default_rng(bench.flags.seed),
    )
    return {
        "name": name,
        "tokens": len(found),
        "kl_nats": float(found.kl.mean(dtype=np.float64)),
        "coverage": row["value"],
        "coverage_low": row["low"],
        "coverage_high": row["high"],
        "coverage_null": row["null"],
        "density_median": selection.density_row(found, sums, k, bench.rule)["median"],
        "types_seen": int(sums.seen.sum()),
    }


def gradients(bench: Workbench) -> dict[str, Any]:
    """Do the rocks' gradients pull with the rest, and how hard?

    Also writes the lists of the types with the largest mean gradient, and of those whose mean
    gradient is most in line with all types': selection by the gradient itself.
    """
    from opd_jax.instrument.studies import gradients as geometry

    flags, sums = bench.flags, bench.sums
    ranked = geometry.rank_types(
        bench.corpus, bench.pair, bench.found, min_count=2, batch=flags.batch
    )
    entries = bench.read("lists/lists.json")
    for name in ("norm", "alignment"):
        value_V = np.where(sums.count >= 2, ranked[name], -np.inf)
        order = np.argsort(-value_V, kind="stable")
        ids = order[np.isfinite(value_V[order])][: flags.k]
        entries[f"top_gradient_{name}"] = write_list(bench, f"top_gradient_{name}", ids)
    bench.write("lists/lists.json", entries)
    return geometry.geometry(
        bench.corpus,
        bench.pair,
        bench.found,
        gradient_groups(bench),
        token_text=bench.pair.text,
        seed=flags.seed,
        batch=flags.batch,
    )


def gradient_groups(bench: Workbench) -> dict[str, np.ndarray]:
    """Types by group: rocks, highest mean KL, like frequency, and random others; disjoint."""
    groups = {"rock": bench.rocks}
    taken = set(bench.rocks.tolist())
    for name, how in (("high_kl", "top_mean_kl"), ("control", "hungarian")):
        ids = select.controls(bench.sums, bench.rocks, how, rule=bench.rule)
        groups[name] = np.array([i for i in ids.tolist() if i not in taken], int)
        taken |= set(groups[name].tolist())
    others = np.flatnonzero(bench.sums.count >= 2)
    others = others[~np.isin(others, list(taken))]
    rng = np.random.default_rng(bench.flags.seed)
    groups["random"] = np.sort(rng.permutation(others)[:NUM_RANDOM])
    return {name: ids for name, ids in groups.items() if len(ids)}


def write_list(
    bench: Workbench, name: str, ids: np.ndarray, residual: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a list of ids that a training run can gate, and return its entry in ``lists.json``."""
    bench.write(f"lists/{name}.json", ids.tolist())
    return outputs.list_entry(bench.sums, ids, residual)


def context(bench: Workbench) -> dict[str, Any]:
    """Which rocks stay when only high-loss occurrences in like contexts count?"""
    from opd_jax.instrument.studies import context as contexts

    told = contexts.run(
        bench.corpus,
        bench.pair,
        bench.before(),
        bench.found,
        bench.flags.k,
        token_text=bench.pair.text,
        skip_top=bench.rule.skip_top,
        min_count=bench.rule.min_count,
        batch=bench.flags.batch,
        seed=bench.flags.seed,
    )
    if bench.rule.score != "rock":
        other = f"the rocks here are the top {bench.flags.k} by Rock Score, which contexts weigh"
        bench.say(f"  {other}, and not by --score={bench.rule.score}")
        told["note"] += f"; {other}, not those by {bench.rule.score}"
    return told


def persistence(bench: Workbench) -> dict[str, Any]:
    """Do the rocks' KL values fall over training, on the same text and on new text?"""
    from opd_jax.instrument.studies import matrix
    from opd_jax.instrument.studies import persistence as persistences

    assert bench.student.run is not None  # the stage is left out otherwise
    scores = matrix.of_run(
        bench.out,
        bench.student.run,
        bench.pair,
        rows=bench.rows,
        steps=bench.flags.checkpoints or None,
        **bench.writing,
        say=lambda line: bench.say(f"  {line}"),
    )
    return persistences.analyse(
        scores,
        k=bench.flags.k,
        seed=bench.flags.seed,
        token_text=bench.pair.text,
        **_ranking(bench),
    )


def optimizer(bench: Workbench) -> dict[str, Any]:
    """Does Adam's second moment hold the rocks back?"""
    from opd_jax.instrument.studies import second_moments

    assert bench.student.run is not None  # the stage is left out otherwise
    return second_moments.run(
        bench.student.run,
        bench.before(),
        bench.found,
        k=bench.flags.k,
        vocab_size=bench.pair.vocab_size,
        seed=bench.flags.seed,
        **_ranking(bench),
    )


def _ranking(bench: Workbench) -> dict[str, Any]:
    """How rocks are selected on half of the problems: a mean over one position is none."""
    rule = bench.rule
    return {
        "score": rule.score,
        "skip_top": rule.skip_top,
        "min_count": max(rule.min_count, 2),
    }


STAGES = {
    "references": references,
    "gradients": gradients,
    "context": context,
    "persistence": persistence,
    "optimizer": optimizer,
}
NEED_RUN = ("context", "persistence", "optimizer")  # they look back at the student before training
