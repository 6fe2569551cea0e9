r"""Does Adam's second moment hold the rocks back?

The conjecture (arXiv 2605.09253, sec. 2; left untested there): frequent types inflate the second
moment :math:`\hat\nu` of their rows, so that their effective step
:math:`|\hat\mu| / (\sqrt{\hat\nu} + \epsilon)` shrinks and their KL stays. Frequency alone moves
both, so groups are compared with types of like count, and whether a high second moment goes with
less decrease of KL is asked at equal count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import config as settings
from opd_jax import optim, stats
from opd_jax.instrument import controls, correlation
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.correlation import Correlation
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.studies import persistence
from opd_jax.instrument.workbench import Workbench
from opd_jax.models import hf_config, params, transformer
from opd_jax.optim import OptimSpec
from opd_jax.spec import ModelSpec
from opd_jax.store import checkpoint, hub
from opd_jax.store import workdir as workdirs

GROUPS = ("rock", "control", "high_kl", "rest", "unseen")
MEASURES = ("second_moment", "effective_step")
_MIN_TYPES = 20  # below, a rank correlation says nothing
NOTE = (
    "second_moment: bias-corrected, mean over the row of a type in the output head{tied}; "
    "effective_step: mean over the row of |first moment| / (sqrt(second moment) + eps), in units "
    "of the learning rate, without weight decay; both of the clipped gradient (a group's value is "
    "its median over types). rest: types seen and in no other group. The moments forget with "
    "b1={b1} and b2={b2} a step, so a checkpoint tells of its last steps. Every other parameter "
    "has moments too, which are not read. Tests are rank correlations over types; decrease is "
    "log(mean KL before / after) on one half of the problems; count and KL that are held equal are "
    "measured on either half of the other half, so a chance high value cannot appear as a "
    "decrease, and their noise is accounted for (reliability: correlation of the two measurements "
    "of the noisiest; no rho below {least}). With "
    "decrease the conjecture expects rho below 0 for second_moment and above 0 for "
    "effective_step; with count the opposite. Moments are read after the decrease that they are "
    "to explain: a type whose KL has fallen has smaller gradients since, which alone gives "
    "second_moment a rho below 0, so the first checkpoints say most. p is from permutations of "
    "types, or from resampled types where something is held equal; p_adjusted Benjamini-Hochberg "
    "over all tests."
)


class OptimizerError(ValueError):
    """A run's optimizer state cannot be analysed; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Adam's state of the rows of the vocabulary at a checkpoint; [V] f64 each.

    Attributes:
      second_moment: mean of the bias-corrected second moment over the row.
      effective_step: mean of \\|first\\| / (sqrt(second) + eps) over the row.
    """

    second_moment: np.ndarray
    effective_step: np.ndarray


def study(bench: Workbench) -> dict[str, Any]:
    """How Adam treats the rocks; what ``optimizer.json`` holds."""
    assert bench.subject.student.run is not None  # the study is left out otherwise
    return run(
        bench.subject.student.run,
        bench.before(),
        bench.found,
        k=bench.flags.k,
        vocab_size=bench.pair.vocab_size,
        rule=bench.rule.at_least(2),
        seed=bench.flags.seed,
    )


def run(
    run_dir: str | Path,
    before: Occurrences,
    after: Occurrences,
    *,
    k: int,
    vocab_size: int,
    steps: Sequence[int] | None = None,
    rule: Rule,
    seed: int = 0,
    draws: int = 2000,
) -> dict[str, Any]:
    """Compare the optimizer's treatment of rocks with that of other types.

    Args:
      run_dir: workdir of an AdamW run.
      before: a corpus scored by the student before training; rocks are selected on it.
      after: the same corpus scored by the trained student.
      k: number of rocks.
      rule: how rocks are ranked; to be tested, a type needs its ``min_count`` positions in either
        half of the problems, and one in either half of the first.
      vocab_size: real ids; rows of padding are left out.
      steps: checkpoints; default all.
      seed: of the split, the permutations and the resamples.
      draws: permutations or resamples, per test.

    Returns:
      The content of ``optimizer.json``.

    Raises:
      OptimizerError: no Adam, no checkpoint, or scores of two corpora.
      WorkdirError: ``run_dir`` is no run.
      CheckpointError: a damaged checkpoint.
    """
    if not np.array_equal(before.token_id, after.token_id):
        raise OptimizerError(
            f"{len(before)} positions before and {len(after)} after training, of different ids: "
            "expected one corpus scored twice; score the same corpus with both students"
        )
    cfg, spec, record = _adam(run_dir)
    with checkpoint.open(run_dir) as saves:
        kept = saves.steps()
    steps = kept if steps is None else sorted(steps)
    if not steps or {*steps} - {*kept}:
        raise OptimizerError(
            f"{run_dir} has checkpoints of steps {kept}, not of {sorted({*steps} - {*kept})}: "
            "expected at least one; give other steps, or train until one is saved"
        )
    seen = TypeStats.of_occurrences(before)
    chosen = persistence.select_groups(seen, k, rule)
    groups = _groups(seen, chosen, vocab_size)
    outcome = _outcome(before, after, rule.min_count, seed)
    measured: dict[str, list[list[float | None]]] = {name: [] for name in MEASURES}
    tests: list[dict[str, Any]] = []
    for step in steps:
        found = moments(run_dir, step)
        for measure in MEASURES:
            value_V = getattr(found, measure)
            measured[measure].append([_median(value_V[ids]) for ids in groups.values()])
            tests += [
                {"step": step, "measure": measure} | row
                for row in _tests(value_V, outcome, draws, seed)
            ]
    for row, p in zip(tests, stats.bh_adjusted([row["p"] for row in tests]), strict=True):
        row["p_adjusted"] = float(p)
    tied = " (tied: it is the embedding, and as an input has gradient too)" if cfg.tied else ""
    return {
        "steps": list(steps),
        "control_residual": controls.residual(seen, chosen["rock"], chosen["control"]),
        "optimizer": {n: record[f"optim.{n}"] for n in ("name", "lr", "b1", "b2", "eps", "clip")},
        "groups": [
            {
                "group": name,
                "types": len(ids),
                "token_share": float(seen.count[ids].sum() / seen.count.sum()),
                "count_median": _median(seen.count[ids]),
                **{measure: [row[g] for row in measured[measure]] for measure in MEASURES},
            }
            for g, (name, ids) in enumerate(groups.items())
        ],
        "tests": tests,
        "note": NOTE.format(tied=tied, b1=spec.b1, b2=spec.b2, least=correlation.MIN_RELIABILITY),
    }


def moments(run_dir: str | Path, step: int) -> Moments:
    """Read Adam's state of the head's rows at a checkpoint, and nothing else of it.

    Where embedding and head are tied these are the embedding's rows. Both moments of the table lie
    on one device: for a model larger than an accelerator's memory set ``JAX_PLATFORMS=cpu``.

    Raises:
      OptimizerError: a run without Adam.
      WorkdirError: ``run_dir`` is no run.
      CheckpointError: no such checkpoint, or a damaged one.
    """
    cfg, spec, record = _adam(run_dir)
    stored = ModelSpec(param_dtype=record["student.param_dtype"]).stored_dtype("float32")
    weights = params.abstract(transformer.specs(cfg), jnp.dtype(stored))
    state = jax.eval_shape(optim.make(spec).init, weights)
    table = "embed" if cfg.tied else "head"
    template, named = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        kind = next((kind for kind in ("mu", "nu") if kind in parts and parts[-1] == table), None)
        if parts[-1] == "count" and "count" not in named:  # Adam's; the schedule's comes later
            kind = "count"
        if kind is not None:
            named[kind] = ".".join(["opt", *parts])
            template[named[kind]] = leaf
    with checkpoint.open(run_dir) as saves:
        found = saves.restore(template, step, partial=True)[0]
    first, second, count = (found[named[kind]] for kind in ("mu", "nu", "count"))
    rows = _rows(first, second, count, spec=spec)
    return Moments(*(np.asarray(x, np.float64) for x in rows))


@jax.jit(static_argnames="spec")
def _rows(first_VD, second_VD, count, *, spec: OptimSpec):
    count = count.astype(jnp.float32)
    first_VD = first_VD.astype(jnp.float32) / (1 - spec.b1**count)
    second_VD = second_VD.astype(jnp.float32) / (1 - spec.b2**count)
    step_VD = jnp.abs(first_VD) / (jnp.sqrt(second_VD) + spec.eps)
    return jnp.mean(second_VD, axis=1), jnp.mean(step_VD, axis=1)


def _adam(run_dir: str | Path):
    """(student's config, optimizer spec, flat config of the run).

    Raises:
      OptimizerError: a run without Adam, or one of adapters.
      WorkdirError: no run.
    """
    told = workdirs.require_run(run_dir)
    record = {key: workdirs.setting(told, key) for key in settings.recorded()}
    if record["optim.name"] != "adamw":
        raise OptimizerError(
            f"{run_dir} was trained with optim.name {record['optim.name']!r}, which keeps no "
            "second moment: expected 'adamw'; give another run, or leave the optimizer stage out"
        )
    if record["lora.rank"]:
        raise OptimizerError(
            f"{run_dir} trained adapters alone (lora.rank {record['lora.rank']}), and the rows of "
            "types have no moments: expected a run that trains the whole student; give another "
            "run, or leave the optimizer stage out"
        )
    spec = OptimSpec(**{f.name: record[f"optim.{f.name}"] for f in dataclasses.fields(OptimSpec)})
    return hf_config.read_config(hub.folder(record["student.path"], "config")), spec, record


def _groups(
    seen: TypeStats, chosen: dict[str, np.ndarray], vocab_size: int
) -> dict[str, np.ndarray]:
    rest = seen.seen.copy()
    for ids in chosen.values():
        rest[ids] = False
    unseen = np.flatnonzero(~seen.seen[:vocab_size])
    groups = chosen | {"rest": np.flatnonzero(rest), "unseen": unseen}
    return {name: groups[name] for name in GROUPS}


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What the corpus says of the types that have enough positions.

    Attributes:
      ids: of the types.
      decrease: of their log mean KL, on half B of the problems.
      count, kl: positions and mean KL before training, on two quarters that make up half A.
    """

    ids: np.ndarray
    decrease: np.ndarray
    count: tuple[np.ndarray, np.ndarray]
    kl: tuple[np.ndarray, np.ndarray]


def _outcome(before: Occurrences, after: Occurrences, min_count: float, seed: int) -> _Outcome:
    half_a, half_b = persistence.split(before.problem, seed)
    on_b = np.isin(before.problem, half_b)
    quarters = [half_a[::2], half_a[1::2]]  # a problem is in a half by chance, so in a quarter too
    parts = [before.where(np.isin(before.problem, quarter)) for quarter in quarters]
    known = [TypeStats.of_occurrences(part) for part in parts]
    whole = TypeStats.total(known)
    old, new = (TypeStats.of_occurrences(found.where(on_b)) for found in (before, after))
    enough = (whole.count >= min_count) & (old.count >= min_count)
    enough &= known[0].seen & known[1].seen
    ids = np.flatnonzero(enough & (whole.kl_sum > 0) & (old.kl_sum > 0) & (new.kl_sum > 0))
    return _Outcome(
        ids,
        np.log(old.mean[ids] / new.mean[ids]),
        (known[0].count[ids], known[1].count[ids]),
        (known[0].mean[ids], known[1].mean[ids]),
    )


def _tests(value_V, outcome: _Outcome, draws: int, seed: int) -> list[dict[str, Any]]:
    value, count = value_V[outcome.ids], np.sum(outcome.count, axis=0)
    asked = {
        "with_count": lambda: correlation.plain(value, count, permutations=draws, seed=seed),
        "with_decrease": lambda: correlation.plain(
            value, outcome.decrease, permutations=draws, seed=seed
        ),
        "with_decrease_given_count": lambda: correlation.partial(
            value, outcome.decrease, [outcome.count], resamples=draws, seed=seed
        ),
        "with_decrease_given_count_and_kl": lambda: correlation.partial(
            value, outcome.decrease, [outcome.count, outcome.kl], resamples=draws, seed=seed
        ),
    }
    types = len(outcome.ids)
    rows = []
    for name, ask in asked.items():
        found = ask() if types >= _MIN_TYPES else Correlation(None, 1.0)
        rows.append({"test": name, **dataclasses.asdict(found), "types": types})
    return rows


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None
