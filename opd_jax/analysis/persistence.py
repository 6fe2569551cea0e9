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
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from opd_jax import checkpoint
from opd_jax.analysis import collect, models, select, stats
from opd_jax.analysis.corpus import Corpus, Occurrences, TypeStats
from opd_jax.analysis.models import Pair
from opd_jax.data import Example
from opd_jax.pytrees import Params

GROUPS = ("rock", "control", "high_kl", "all")
NOTE = (
    "Groups are selected on half of the problems and every number but the naive ones is measured "
    "on the other half, so selection cannot make a group look as if it had learned. alignment: "
    "the corpus of `from`, scored by `to` minus by `from`; context_drift: model `to`, its own "
    "corpus minus that of `from`; both: their sum, each model on its own corpus, as published. "
    "delta is of mean KL per position of the group, low and high its 95 % bootstrap interval over "
    "problems with p_bootstrap; p is Wilcoxon's over the means of the types, which takes types as "
    "independent; p_adjusted and p_bootstrap_adjusted are Benjamini-Hochberg over all of both. "
    "control: types matched to the rocks on count, none of them a rock, as far as counts allow; "
    "high_kl: largest mean KL among the other types. naive: measured where it was selected."
)
_CHUNK = 1000  # resamples at a time: their weights are [resamples, problems]
_SHOWN = 20  # types of a group that are listed


class PersistenceError(ValueError):
    """The matrix cannot be analysed; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Every corpus scored by every model.

    Attributes:
      models: names in the order of training.
      corpora: names; a corpus that a model wrote has the model's name.
      cells: by (model, corpus) index the scored positions, or the file that holds them.
    """

    models: tuple[str, ...]
    corpora: tuple[str, ...]
    cells: Mapping[tuple[int, int], Occurrences | Path]

    def cell(self, model: str, corpus: str) -> Occurrences:
        """The scored positions of one cell; read from its file each time, to keep memory small."""
        found = self.cells[self.models.index(model), self.corpora.index(corpus)]
        return Occurrences.load(found) if isinstance(found, Path) else found


def run(
    out: str | Path,
    run_dir: str | Path,
    pair: Pair,
    *,
    rows: Sequence[Example],
    k: int,
    max_new: int,
    steps: Sequence[int] | None = None,
    with_teacher: bool = False,
    temperature: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch: int = 16,
    min_count: float = 2,
    score: str = "rock",
    skip_top: int = 0,
    resamples: int = 10_000,
    select_on: tuple[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Let the checkpoints of a run answer, score each other's answers, and analyse the matrix.

    Corpora go to ``out/corpora/NAME``, scores to ``out/scores/MODEL-on-CORPUS.npz``; what is there
    is not done again.

    Args:
      out: folder of the results.
      run_dir: workdir of the run.
      pair: gives teacher, tokenizer and mesh; its student has the run's architecture.
      rows: prompts that every corpus answers.
      k, min_count, score, skip_top, resamples, seed: see :func:`analyse`.
      select_on: also; the models and corpora are named ``step-N``.
      steps: checkpoints; default all. Step 0, the student before training, is always there.
      with_teacher: also score a corpus that the teacher writes, which no checkpoint has seen.
      max_new, temperature, samples, batch: see :func:`collect.write`.
      say: receives lines of progress.

    Returns:
      The content of ``persistence.json``.

    Raises:
      PersistenceError: the run has not kept a step that is asked for, or has kept none.
      CorpusError, ModelError: see :func:`collect.write`, :func:`models.load`.
    """
    out = Path(out)
    students = {f"step-{step}": f"{run_dir}@{step}" for step in _steps(run_dir, steps)}
    answers = functools.partial(
        collect.write,
        pair=pair,
        rows=rows,
        max_new=max_new,
        temperature=temperature,
        samples=samples,
        seed=seed,
        batch=batch,
    )
    corpora = {}
    for name, ref in students.items():
        say(f"persistence: {name} answers {len(rows)} prompts")
        corpora[name] = answers(out / "corpora" / name, writer=models.load(ref, pair), name=name)
    if with_teacher:
        say(f"persistence: the teacher answers {len(rows)} prompts")
        corpora["teacher"] = answers(
            out / "corpora" / "teacher",
            writer=pair.teacher,
            name=pair.teacher_name,
            cfg=pair.cfg.teacher,
        )
    loaders = {name: functools.partial(models.load, ref, pair) for name, ref in students.items()}
    scores = matrix(corpora, loaders, pair, folder=out / "scores", batch=batch, say=say)
    return analyse(
        scores,
        k=k,
        min_count=min_count,
        score=score,
        skip_top=skip_top,
        seed=seed,
        resamples=resamples,
        token_text=pair.text,
        select_on=select_on,
    )


def matrix(
    corpora: Mapping[str, Corpus],
    students: Mapping[str, Callable[[], Params]],
    pair: Pair,
    *,
    folder: Path,
    batch: int = 16,
    say: Callable[[str], None] = print,
) -> Matrix:
    """Score every corpus by every student, forward passes only.

    Each cell is a file of ``folder``, written whole; one that is there and belongs to the corpus
    is kept. A student is loaded only where a cell of its row is missing, one at a time.
    """
    cells = {}
    for i, (model, load) in enumerate(students.items()):
        row = {name: folder / f"{model}-on-{name}.npz" for name in corpora}
        missing = [name for name, path in row.items() if not _is_scored(path, corpora[name])]
        student = load() if missing else None
        for name in missing:
            say(f"persistence: {model} reads the answers of {name}")
            collect.score(corpora[name], pair, student=student, batch=batch).save(row[name])
        cells |= {(i, j): path for j, path in enumerate(row.values())}
    return Matrix(tuple(students), tuple(corpora), cells)


def _steps(run_dir: str | Path, steps: Sequence[int] | None) -> list[int]:
    with checkpoint.open(run_dir) as saves:
        kept = saves.steps()
    wanted = kept if steps is None else list(steps)
    lost = sorted({*wanted} - {0, *kept})
    if lost or not {*wanted} - {0}:
        raise PersistenceError(
            f"{run_dir} has checkpoints of steps {kept}, not of {lost or 'any step after 0'}: "
            "expected at least one to compare with step 0; give other steps, or train with "
            "--config.checkpoint.every and --config.checkpoint.keep"
        )
    return sorted({0, *wanted})


def _is_scored(path: Path, corpus: Corpus) -> bool:
    """Whether the file holds scores of this very corpus."""
    if not path.exists():
        return False
    with np.load(path, allow_pickle=False) as file:
        return np.array_equal(file["token_id"], corpus.token_id)


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


def select_groups(
    seen: TypeStats, k: int, *, min_count: float = 2, score: str = "rock", skip_top: int = 0
) -> dict[str, np.ndarray]:
    """Choose rocks, their frequency-matched control, and the other types of largest mean KL.

    Args:
      seen: sums by type.
      k: number of rocks, and at most of each other group.
      min_count, score, skip_top: see :class:`select.Rule`. ``high_kl`` needs two positions in any
        case, since one is no mean.

    Returns:
      Ids by group: "rock", "control", "high_kl"; no rock is in the other two.
    """
    rock = select.rocks(seen, k, score=score, skip_top=skip_top, min_count=min_count)
    high = select.Rule("mean", min_count=max(min_count, 2)).rank(seen)
    return {
        "rock": rock,
        "control": select.controls(seen, rock, "hungarian"),
        "high_kl": high[~np.isin(high, rock)][:k],
    }


def analyse(
    scores: Matrix,
    *,
    k: int,
    min_count: float = 2,
    score: str = "rock",
    skip_top: int = 0,
    seed: int = 0,
    resamples: int = 10_000,
    token_text: Callable[[int], str] = str,
    select_on: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Say what each group's mean KL does from checkpoint to checkpoint, and why.

    Args:
      scores: the matrix; needs the corpus of every model.
      k: number of rocks.
      min_count, score, skip_top: how rocks are ranked, see :class:`select.Rule`.
      seed: of the split and of the bootstrap.
      resamples: of the bootstrap over problems.
      token_text: text of an id, for the lists of types.
      select_on: (model, corpus) names to select on. Default: the first model on the first corpus,
        because a selection at the end picks types *for having stayed high*, and a selection before
        training asks what becomes of types that nothing about the outcome has chosen.

    Returns:
      The content of ``persistence.json``.

    Raises:
      PersistenceError: a model has no corpus of its own, an unknown ``select_on``, or a split that
        leaves nothing.
    """
    model, corpus = select_on or (scores.models[0], scores.corpora[0])
    _check(scores, model, corpus)
    chosen_on = scores.cell(model, corpus)
    half_a, half_b = split(chosen_on.problem, seed)
    on_a = chosen_on.where(np.isin(chosen_on.problem, half_a))
    seen_a = TypeStats.of_occurrences(on_a)
    groups = select_groups(seen_a, k, min_count=min_count, score=score, skip_top=skip_top)
    member_GV = np.zeros((len(GROUPS), chosen_on.vocab_size), bool)
    for row, name in enumerate(GROUPS):
        member_GV[row, groups.get(name, slice(None))] = True

    pairs = _pairs(scores.models)
    needed = {cell for a, b in pairs for cell in ((a, a), (b, a), (b, b))}
    tables, naive, by_type = {}, {}, {}
    for m in scores.models:
        for c in scores.corpora:
            found = scores.cell(m, c)
            tables[m, c] = _by_problem(found, half_b, member_GV)
            naive[m, c] = _mean(_by_problem(found, half_a, member_GV).sum(1))
            if (m, c) in needed:
                chosen = np.isin(found.problem, half_b)
                by_type[m, c] = TypeStats.of_occurrences(found.where(chosen))
    value = {cell: _mean(table.sum(1)) for cell, table in tables.items()}
    drawn = _bootstrap({cell: tables[cell] for cell in sorted(needed)}, resamples, seed)

    def effects(a: str, b: str) -> dict[str, tuple[tuple[str, str], tuple[str, str]]]:
        return {
            "alignment": ((a, a), (b, a)),
            "context_drift": ((b, a), (b, b)),
            "both": ((a, a), (b, b)),
        }

    tests, contrasts = [], []
    for a, b in pairs:
        for effect, (old, new) in effects(a, b).items():
            about = {"effect": effect, "from": a, "to": b}
            for g, name in enumerate(GROUPS):
                p, types = _wilcoxon(by_type[old], by_type[new], member_GV[g])
                delta_R = drawn[new][:, g] - drawn[old][:, g]
                delta = value[new][g] - value[old][g]
                tests.append(
                    {"group": name, **about, "delta": _number(delta)}
                    | {"relative": _number(_ratio(delta, value[old][g]))}
                    | _interval(delta_R)
                    | {"p": p, "types": types}
                    | {"naive_delta": _number(naive[new][g] - naive[old][g])}
                )
            change_RG = _log(drawn[new]) - _log(drawn[old])
            change_G = _log(value[new]) - _log(value[old])
            for other in (1, 2):
                contrasts.append(
                    {"groups": [GROUPS[0], GROUPS[other]], **about}
                    | {"log_ratio": _number(change_G[0] - change_G[other])}
                    | _interval(change_RG[:, 0] - change_RG[:, other])
                )
    _adjust(tests)
    for row, adjusted in zip(
        contrasts, stats.bh_adjusted([row["p_bootstrap"] for row in contrasts]), strict=True
    ):
        row["p_bootstrap_adjusted"] = float(adjusted)
    return {
        "models": list(scores.models),
        "corpora": list(scores.corpora),
        "select_on": [model, corpus],
        "problems": {"select": len(half_a), "measure": len(half_b)},
        "control_residual": select.residual(seen_a, groups["rock"], groups["control"]),
        "groups": [
            {
                "group": name,
                "types": int(np.sum(member_GV[g] & seen_a.seen)),
                "token_share": float(seen_a.count[member_GV[g]].sum() / len(on_a)),
                "matrix": _grid(scores, value, g),
                "naive_matrix": _grid(scores, naive, g),
                "members": _members(groups.get(name, ()), seen_a, token_text),
            }
            for g, name in enumerate(GROUPS)
        ],
        "tests": tests,
        "contrasts": contrasts,
        "note": NOTE,
    }


def _check(scores: Matrix, model: str, corpus: str) -> None:
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


def _by_problem(found: Occurrences, problems: np.ndarray, member_GV: np.ndarray) -> np.ndarray:
    """KL and positions of each group by problem, [2, problems, groups] f64."""
    place = np.searchsorted(problems, found.problem)
    place = np.minimum(place, len(problems) - 1)
    inside = problems[place] == found.problem
    place, token_id, kl = place[inside], found.token_id[inside], found.kl[inside]
    table = np.zeros((2, len(problems), len(member_GV)))
    for g, member_V in enumerate(member_GV):
        chosen = member_V[token_id]
        for row, weight in enumerate((kl, np.ones_like(kl))):
            table[row, :, g] = np.bincount(
                place[chosen], np.asarray(weight[chosen], np.float64), minlength=len(problems)
            )
    return table


def _mean(sums: np.ndarray) -> np.ndarray:
    """KL per position of (KL, positions), NaN where there is no position."""
    kl, count = sums
    return np.divide(kl, count, out=np.full_like(kl, np.nan), where=count > 0)


def _bootstrap(
    tables: Mapping[tuple[str, str], np.ndarray], resamples: int, seed: int
) -> dict[tuple[str, str], np.ndarray]:
    """Group means under resampled problems, the same draw for every cell: [resamples, groups]."""
    rng = np.random.default_rng([seed, 1])
    num = next(iter(tables.values())).shape[1]
    parts = {cell: [] for cell in tables}
    for first in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - first)
        times_RP = rng.multinomial(num, np.full(num, 1 / num), size).astype(np.float64)
        for cell, (kl_PG, count_PG) in tables.items():
            parts[cell].append(_mean(np.stack([times_RP @ kl_PG, times_RP @ count_PG])))
    return {cell: np.concatenate(part) for cell, part in parts.items()}


def _interval(delta_R: np.ndarray) -> dict[str, float | None]:
    """95 % percentile interval and two-sided p of the bootstrap against 0."""
    delta_R = delta_R[np.isfinite(delta_R)]  # a draw can miss a rare group altogether
    if not len(delta_R):
        return {"low": None, "high": None, "p_bootstrap": 1.0}
    low, high = stats.quantiles(delta_R)
    tail = min(np.sum(delta_R <= 0), np.sum(delta_R >= 0))
    p = min(1.0, 2 * (1 + tail) / (len(delta_R) + 1))
    return {"low": float(low), "high": float(high), "p_bootstrap": float(p)}


def _wilcoxon(old: TypeStats, new: TypeStats, member_V: np.ndarray) -> tuple[float, int]:
    """Signed-rank p of the types' means, and the number of types seen in both corpora."""
    both = member_V & old.seen & new.seen
    delta = (new.mean - old.mean)[both]
    moved = delta[delta != 0]
    p = float(np.asarray(scipy.stats.wilcoxon(moved))[1]) if len(moved) else 1.0
    return p, int(both.sum())


def _adjust(tests: list[dict[str, Any]]) -> None:
    names = ("p", "p_bootstrap")
    adjusted = stats.bh_adjusted([row[name] for name in names for row in tests])
    for i, name in enumerate(names):
        for row, p in zip(tests, adjusted[i * len(tests) :], strict=False):
            row[f"{name}_adjusted"] = float(p)


def _grid(scores: Matrix, value: Mapping[tuple[str, str], np.ndarray], g: int) -> list[list]:
    return [[_number(value[m, c][g]) for c in scores.corpora] for m in scores.models]


def _members(ids, seen: TypeStats, token_text: Callable[[int], str]) -> list[dict[str, Any]]:
    return [
        {"token_id": int(i), "token": token_text(int(i)), "count": int(seen.count[i])}
        | {"kl_mean": float(seen.mean[i])}
        for i in ids[:_SHOWN]
    ]


def _ratio(a: float, b: float) -> float:
    return a / b if b else np.nan


def _log(x: np.ndarray) -> np.ndarray:
    return np.log(x, out=np.full_like(x, np.nan), where=x > 0)


def _number(x: float) -> float | None:
    """A float for JSON; None where it is not defined."""
    return float(x) if np.isfinite(x) else None
