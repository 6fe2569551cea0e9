r"""Do the types that carry the KL keep it? A matrix of models against corpora.

Published comparisons let every checkpoint answer for itself and compare mean KL by type. Three
things are then one number: the student changed, the text changed, and the types were chosen
because they scored high on the very positions that are compared. Here every model
:math:`\theta_i` scores every corpus :math:`C_j` (teacher-forced), types are selected on one half
of the *problems* and measured on the other, and with :math:`K_{ij}` the mean KL of a group

.. math:: K_{bb} - K_{aa} = \underbrace{(K_{ba} - K_{aa})}_{\text{alignment: same text}}
   + \underbrace{(K_{bb} - K_{ba})}_{\text{context drift: same model}}

splits the published difference from checkpoint a to b exactly (arXiv 2605.09253, sec. 2).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from opd_jax import processes, stats
from opd_jax.instrument import controls, shares
from opd_jax.instrument.corpus import TypeStats
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.studies import matrix, pooled
from opd_jax.instrument.studies.matrix import Matrix
from opd_jax.instrument.workbench import Workbench

MARGIN = math.log(1.1)  # of a contrast: one group keeps a tenth more of its KL than the other
NOTE = (
    "Groups are selected on half of the problems and every number but the naive ones is measured "
    "on the other half, so selection cannot make a group look as if it had learned. alignment: "
    "the corpus of `from`, scored by `to` minus by `from`; context_drift: model `to`, its own "
    "corpus minus that of `from`, another mix of the group's types included; both: their sum, each "
    "model on its own corpus, as published. delta is of mean KL per position of the group; low, "
    "high and p_bootstrap are by resampling problems, and p_bootstrap_adjusted is "
    "Benjamini-Hochberg over all tests of that kind. p_types is Wilcoxon's over the means of the "
    "types, as published: it takes types as independent, though the same problems move them all, "
    "and rejects far too often; it decides nothing here. contrasts: log of how much of its KL one "
    "group keeps over how much the other does; p_equivalent is of a difference of {margin:.0%} or "
    "more, small where they keep as much. control: types matched to the rocks on count, none of "
    "them a rock, as far as counts allow; high_kl: largest mean KL among the other types. naive: "
    "measured where it was selected."
)
_SHOWN = 20  # types of a group that are listed

Cell = tuple[str, str]  # names of a model and of the corpus that it scored


class PersistenceError(ValueError):
    """The matrix cannot be analysed; the message says why and what to do."""


def study(bench: Workbench) -> dict[str, Any]:
    """What becomes of the rocks' KL over training; what ``persistence.json`` holds."""
    assert bench.subject.student.run is not None  # the study is left out otherwise
    lab = bench.lab
    scores = matrix.of_run(
        bench.folder.path,
        bench.subject.student.run,
        bench.pair,
        rows=lab.rows,
        steps=bench.flags.checkpoints or None,
        **lab.writing,
        say=processes.indented(bench.say, "  "),
    )
    return analyse(
        scores,
        k=bench.flags.k,
        rule=bench.rule.at_least(2),  # on half of the problems a mean over one position is none
        seed=bench.flags.seed,
        token_text=bench.pair.text,
    )


def split(problem: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Halve the problems at random: (A, B), sorted ids.

    Raises:
      PersistenceError: fewer than two problems.
    """
    problems = np.unique(problem)
    if len(problems) < 2:
        raise PersistenceError(
            f"the corpus answers {len(problems)} problem: expected at least 2, one to select on "
            "and one to measure on; raise --limit"
        )
    mixed = np.random.default_rng(seed).permutation(problems)
    half = len(problems) // 2
    return np.sort(mixed[:half]), np.sort(mixed[half:])


def select_groups(seen: TypeStats, k: int, rule: Rule) -> dict[str, np.ndarray]:
    """Choose rocks, their frequency-matched control, and the other types of largest mean KL.

    Args:
      seen: sums by type.
      k: most types of each group; there are fewer where fewer can be selected.
      rule: how rocks are ranked. ``high_kl`` needs two positions in any case, since one is no
        mean.

    Returns:
      Ids by group: "rock", "control", "high_kl"; no rock is in the other two.

    Raises:
      SelectError: no type can be selected.
    """
    k = min(k, max(len(rule.rank(seen)), 1))  # a part of the answers shows fewer types than all
    rock = rule.rocks(seen, k)
    high = Rule("mean", min_count=max(rule.min_count, 2)).rank(seen)
    return {
        "rock": rock,
        "control": controls.choose(seen, rock, "hungarian"),
        "high_kl": high[~np.isin(high, rock)][:k],
    }


def analyse(
    scores: Matrix,
    *,
    k: int,
    rule: Rule,
    seed: int = 0,
    resamples: int = 10_000,
    margin: float = MARGIN,
    token_text: Callable[[int], str] = str,
    select_on: Cell | None = None,
) -> dict[str, Any]:
    """Say what each group's mean KL does from checkpoint to checkpoint, and why.

    Args:
      scores: the matrix; needs the corpus of every model.
      k: number of rocks; fewer where half of the problems shows fewer types.
      rule: how rocks are ranked.
      seed: of the split and of the bootstrap.
      resamples: of the bootstrap over problems.
      margin: the smallest log ratio of two groups that counts, for the test of equivalence.
      token_text: text of an id, for the lists of types.
      select_on: the cell to select on. Default: the first model on the first corpus, because a
        selection at the end picks types *for having stayed high*, and a selection before training
        asks what becomes of types that nothing about the outcome has chosen.

    Returns:
      The content of ``persistence.json``; groups without a type are left out.

    Raises:
      PersistenceError: a model has no corpus of its own, an unknown ``select_on``, or too few
        problems to split.
      SelectError: no type can be selected on one half of the problems, or a bad rule.
    """
    select_on = select_on or (scores.models[0], scores.corpora[0])
    _check(scores, select_on)
    chosen_on = scores.cell(*select_on)
    half_a, half_b = split(chosen_on.problem, seed)
    seen = TypeStats.of_occurrences(chosen_on.where(np.isin(chosen_on.problem, half_a)))
    groups = select_groups(seen, k, rule)
    residual = controls.residual(seen, groups["rock"], groups["control"])
    groups["all"] = np.flatnonzero(seen.seen)
    groups = {name: ids for name, ids in groups.items() if len(ids)}
    member_GV = np.zeros((len(groups), chosen_on.vocab_size), bool)
    for row, (name, ids) in enumerate(groups.items()):
        member_GV[row, ids if name != "all" else slice(None)] = True

    pairs = _pairs(scores.models)
    compared = sorted(
        {cell for pair in pairs for cells in _cells(*pair).values() for cell in cells}
    )
    measured = _measure(scores, compared, half_b, member_GV)
    naive = _measure(scores, (), half_a, member_GV).mean
    drawn = pooled.bootstrap({cell: measured.sums[cell] for cell in compared}, resamples, seed)
    tests, contrasts = [], []
    for a, b in pairs:
        for effect, (old, new) in _cells(a, b).items():
            about = {"effect": effect, "from": a, "to": b}
            rows = _changes(measured, naive, drawn, old, new, member_GV)
            tests += [
                {"group": name} | about | row for name, row in zip(groups, rows, strict=True) if row
            ]
            contrasts += [
                row | about for row in _contrasts(list(groups), measured, drawn, old, new, margin)
            ]
    _adjust(tests, "p_bootstrap")
    _adjust(contrasts, "p_bootstrap")
    _adjust(contrasts, "p_equivalent")
    return {
        "models": list(scores.models),
        "corpora": list(scores.corpora),
        "select_on": list(select_on),
        "problems": {"select": len(half_a), "measure": len(half_b)},
        "control_residual": residual,
        "groups": [
            {
                "group": name,
                "types": len(ids),
                "token_share": shares.token_share(seen, ids),
                "matrix": _grid(scores, measured.mean, g),
                "naive_matrix": _grid(scores, naive, g),
                "members": [] if name == "all" else _members(ids, seen, token_text),
            }
            for g, (name, ids) in enumerate(groups.items())
        ],
        "tests": tests,
        "contrasts": contrasts,
        "margin": margin,
        "note": NOTE.format(margin=math.expm1(margin)),
    }


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What half of the problems say of the cells.

    Attributes:
      sums: KL and positions by problem and group, [2, problems, groups].
      mean: KL per position of each group, [groups].
      types: sums by type, of the cells that are compared.
    """

    sums: Mapping[Cell, np.ndarray]
    mean: Mapping[Cell, np.ndarray]
    types: Mapping[Cell, TypeStats]

    def problems(self, old: Cell, new: Cell, group: int) -> int:
        """Problems with a position of the group in both cells: what an interval rests on."""
        counts = [self.sums[cell][1][:, group] > 0 for cell in (old, new)]
        return int(min(np.sum(count) for count in counts))


def _measure(
    scores: Matrix, compared: Sequence[Cell], half: np.ndarray, member_GV: np.ndarray
) -> _Measured:
    sums, types = {}, {}
    for cell in itertools.product(scores.models, scores.corpora):
        found = scores.cell(*cell)
        sums[cell] = pooled.by_problem(found, half, member_GV)
        if cell in compared:
            types[cell] = TypeStats.of_occurrences(found.where(np.isin(found.problem, half)))
    return _Measured(sums, {cell: pooled.mean(table.sum(1)) for cell, table in sums.items()}, types)


def _changes(
    measured: _Measured,
    naive: Mapping[Cell, np.ndarray],
    drawn: Mapping[Cell, np.ndarray],
    old: Cell,
    new: Cell,
    member_GV: np.ndarray,
) -> list[dict[str, Any] | None]:
    """Per group the change from one cell to another; None where one of them has no position."""
    rows = []
    for g, member_V in enumerate(member_GV):
        before, after = measured.mean[old][g], measured.mean[new][g]
        if not np.isfinite(after - before):
            rows.append(None)
            continue
        p, types = _wilcoxon(measured.types[old], measured.types[new], member_V)
        rows.append(
            {
                "delta": float(after - before),
                "relative": float(after / before - 1) if before else None,
                **pooled.interval(
                    float(after - before),
                    drawn[new][:, g] - drawn[old][:, g],
                    measured.problems(old, new, g),
                ),
                "p_types": p,
                "types": types,
                "naive_delta": _number(naive[new][g] - naive[old][g]),
            }
        )
    return rows


def _contrasts(
    names: list[str],
    measured: _Measured,
    drawn: Mapping[Cell, np.ndarray],
    old: Cell,
    new: Cell,
    margin: float,
) -> list[dict[str, Any]]:
    """How much more (above 0) of its KL one group keeps than another, as a log ratio."""
    change_G = _log(measured.mean[new]) - _log(measured.mean[old])
    change_RG = _log(drawn[new]) - _log(drawn[old])
    a, rows = names.index("rock"), []
    for other in ("control", "high_kl"):
        if other in names and np.isfinite(change_G[[a, b := names.index(other)]]).all():
            ratio, drawn_R = float(change_G[a] - change_G[b]), change_RG[:, a] - change_RG[:, b]
            units = min(measured.problems(old, new, g) for g in (a, b))
            rows.append(
                {"groups": ["rock", other], "log_ratio": ratio}
                | pooled.interval(ratio, drawn_R, units, margin)
            )
    return rows


def _cells(a: str, b: str) -> dict[str, tuple[Cell, Cell]]:
    """By effect the two cells whose difference it is."""
    return {
        "alignment": ((a, a), (b, a)),
        "context_drift": ((b, a), (b, b)),
        "both": ((a, a), (b, b)),
    }


def _check(scores: Matrix, select_on: Cell) -> None:
    model, corpus = select_on
    alone = [name for name in scores.models if name not in scores.corpora]
    if alone:
        raise PersistenceError(
            f"models {alone} have no corpus of their own among {list(scores.corpora)}: expected "
            "one per model, since context drift compares them; score those corpora as well"
        )
    if model not in scores.models or corpus not in scores.corpora:
        raise PersistenceError(
            f"selection on model {model!r} and corpus {corpus!r}: expected a model of "
            f"{list(scores.models)} and a corpus of {list(scores.corpora)}; change select_on"
        )


def _pairs(models: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each model with the next, and the first with the last."""
    pairs = list(itertools.pairwise(models))
    return pairs + ([(models[0], models[-1])] if len(models) > 2 else [])


def _wilcoxon(old: TypeStats, new: TypeStats, member_V: np.ndarray) -> tuple[float, int]:
    """Signed-rank p of the types' means, and the number of types seen in both corpora."""
    both = member_V & old.seen & new.seen
    delta = (new.mean - old.mean)[both]
    moved = delta[delta != 0]
    p = float(np.asarray(scipy.stats.wilcoxon(moved))[1]) if len(moved) else 1.0
    return p, int(both.sum())


def _adjust(rows: list[dict[str, Any]], name: str) -> None:
    """Add the adjusted values of all p-values of a name, taken as one family."""
    for row, p in zip(rows, stats.bh_adjusted([row[name] for row in rows]), strict=True):
        row[f"{name}_adjusted"] = float(p)


def _grid(scores: Matrix, value: Mapping[tuple[str, str], np.ndarray], g: int) -> list[list]:
    return [[_number(value[m, c][g]) for c in scores.corpora] for m in scores.models]


def _members(ids, seen: TypeStats, token_text: Callable[[int], str]) -> list[dict[str, Any]]:
    return [
        {"token_id": int(i), "token": token_text(int(i)), "count": int(seen.count[i])}
        | {"kl_mean": float(seen.mean[i])}
        for i in ids[:_SHOWN]
    ]


def _log(x: np.ndarray) -> np.ndarray:
    return np.log(x, out=np.full_like(x, np.nan), where=x > 0)


def _number(x: float) -> float | None:
    """A float for JSON; None where it is not defined."""
    return float(x) if np.isfinite(x) else None
