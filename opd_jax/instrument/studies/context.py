r"""The context-consistent variant of Rock Tokens (arXiv 2605.09253, second version).

A persistent high-loss occurrence has KL of at least :math:`\tau_{pre}` under the undistilled
student and at least :math:`\tau_{post}` under the distilled one, on the same text; both thresholds
are quantiles here. Its context vector is the mean of the distilled student's last hidden states
over the tokens t - w to t + w of the answer. It is retained if at least a share :math:`\eta` of the
*other* persistent occurrences of its type have a cosine of at least :math:`\gamma` with it. Then

.. math:: CCR(v) = \frac{\text{retained occurrences of } v}{Freq(v)}, \qquad
          R_{ctx}(v) = R(v)\, CCR(v)

The paper gives no parameter values and no code, so all of them are swept; the k types of highest
R_ctx are selected where it has a threshold without a value. The negative control
replaces the contexts of a type's persistent occurrences by those of as many occurrences of the same
type drawn without regard to loss: what it retains is due to gamma and eta alone. (To shuffle
contexts among the persistent occurrences would change nothing, as only their set matters.)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from opd_jax import mesh as meshlib
from opd_jax.instrument import shares
from opd_jax.instrument.corpus import Corpus, Occurrences, TypeStats
from opd_jax.instrument.ranking import PLAIN, Rule
from opd_jax.instrument.workbench import Workbench
from opd_jax.models import transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.pytrees import Params
from opd_jax.store.pair import Pair

GRID: Mapping[str, tuple[float, ...]] = {
    "window": (2, 4, 8),
    "gamma": (0.8, 0.9, 0.95),
    "eta": (0.25, 0.5, 0.75),
    "tau_pre": (0.5, 0.8),
    "tau_post": (0.5, 0.8),
}
_LIMITS = {"gamma": (-1, 1), "eta": (0, 1), "tau_pre": (0, 1), "tau_post": (0, 1)}
CAP = 128  # occurrences of a type that are compared with one another
CANDIDATES = 4  # types that are looked at, as a multiple of k
NOTE = (
    "persistent: KL at or above the tau_pre quantile under the undistilled student and the "
    "tau_post quantile under the distilled one, on the same text; control: as many occurrences of "
    "the same type drawn without regard to loss, which is what gamma and eta retain by themselves; "
    "density: median over answers of the share of tokens whose type is selected"
)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """One point of the grid.

    Attributes:
      window: tokens on either side.
      gamma: least cosine of two contexts that agree.
      eta: least share of the other occurrences that must agree.
      tau_pre, tau_post: quantiles of KL before and after distillation.

    Raises:
      ValueError: a value outside its range.
    """

    window: int = 4
    gamma: float = 0.9
    eta: float = 0.5
    tau_pre: float = 0.8
    tau_post: float = 0.8

    def __post_init__(self):
        for name, (low, high) in _LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name} {getattr(self, name)}: expected {low} to {high}; change the grid"
                )
        if self.window < 0 or self.window != int(self.window):
            raise ValueError(
                f"window {self.window}: expected a number of tokens from 0; change the grid"
            )


@dataclasses.dataclass(frozen=True)
class Search:
    """What is tried, and on how much.

    Attributes:
      grid: values of each parameter; every combination is tried. A parameter that is not there
        keeps its default.
      default: the combination that is told type by type; it joins the grid.
      cap: occurrences per type whose contexts are compared, drawn at random where there are more.
      candidates: types, by R, that are looked at; ``CANDIDATES * k`` where None. As R_ctx is at
        most R, a row says whether more could have changed it (``is_exact``).
      seed: of the draws.
    """

    grid: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=lambda: GRID)
    default: Parameters = Parameters()
    cap: int = CAP
    candidates: int | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The occurrences of each candidate that are compared, for one pair of thresholds."""

    number: np.ndarray  # i64, persistent occurrences of each candidate, drawn or not
    persistent: Sequence[np.ndarray]  # positions drawn among them
    control: Sequence[np.ndarray]  # as many positions drawn among all of the type


def study(bench: Workbench) -> dict[str, Any]:
    """Which rocks stay in like contexts; what ``context.json`` holds."""
    told = run(
        bench.corpus,
        bench.pair,
        bench.before(),
        bench.found,
        bench.flags.k,
        rule=dataclasses.replace(bench.rule, score="rock"),
        search=Search(seed=bench.flags.seed),
        token_text=bench.pair.text,
        batch=bench.flags.batch,
    )
    if bench.rule.score != "rock":
        other = f"the rocks here are the top {bench.flags.k} by Rock Score, which contexts weigh"
        bench.say(f"  {other}, and not by --score={bench.rule.score}")
        told["note"] += f"; {other}, not those by {bench.rule.score}"
    return told


def run(
    corpus: Corpus,
    pair: Pair,
    before: Occurrences,
    after: Occurrences,
    k: int,
    *,
    rule: Rule = PLAIN,
    search: Search = Search(),
    token_text: Callable[[int], str],
    batch: int = 16,
) -> dict[str, Any]:
    """Select types by R_ctx over a grid of parameters, beside the negative control.

    Args:
      corpus: the text.
      pair: its student, the distilled one, gives the context vectors.
      before, after: the corpus scored under the undistilled and the distilled student.
      k: number of types selected.
      rule: which types may be selected; its score is the Rock Score, which R_ctx weighs.
      search: the parameters that are tried.
      token_text: text of an id.
      batch: rows of a forward pass.

    Returns:
      A JSON-ready dict, ``context.json``.

    Raises:
      ValueError: a parameter without meaning, another score, or two scorings of different text.
    """
    if rule.score != "rock":
        raise ValueError(
            f"rule.score is {rule.score!r}: expected 'rock', the score that contexts weigh; pass "
            "another rule"
        )
    for name, scored in (("before", before), ("after", after)):
        if not np.array_equal(scored.token_id, corpus.token_id):
            raise ValueError(
                f"{name} has {len(scored)} positions, the corpus {corpus.num_positions}, or other "
                "ids: expected both students scored on this corpus; score it again"
            )
    default = search.default
    points = _points(search.grid, default)
    sums = TypeStats.of_occurrences(after)
    rocks_k = rule.rocks(sums, k)
    ranked = rule.rank(sums)
    looked_at = ranked[: max(k, search.candidates or CANDIDATES * k)]
    left_out = float(sums.kl_sum[ranked[len(looked_at)]]) if len(looked_at) < len(ranked) else 0.0
    drawn = _draw(before, after, looked_at, points, search)
    used = np.unique(
        np.concatenate([p for d in drawn.values() for p in (*d.persistent, *d.control)])
    )

    tell = functools.partial(_row, after, sums, looked_at, rocks_k=rocks_k, left_out=left_out)
    rows, told = [], []
    for window in sorted({point.window for point in points}):
        unit_ND = states(corpus, pair, used, window=window, batch=batch)
        unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), 1e-30)
        for taus, found in drawn.items():
            here = [point for point in points if (point.window, _taus(point)) == (window, taus)]
            kept, control = (
                _retained(unit_ND, used, chosen, found.number, here)
                for chosen in (found.persistent, found.control)
            )
            for point in here:
                ccr, by_chance = (x[point] / sums.count[looked_at] for x in (kept, control))
                rows.append(dataclasses.asdict(point) | tell(ccr) | {"control": tell(by_chance)})
                if point == default:
                    told = _types(sums, looked_at, ccr, by_chance, token_text)
    return {
        "k": k,
        "cap": search.cap,
        "candidates": len(looked_at),
        "grid": rows,
        "default": next(row for row in rows if row.items() >= dataclasses.asdict(default).items()),
        "types": told,
        "note": NOTE,
    }


def states(
    corpus: Corpus, pair: Pair, chosen: np.ndarray, *, window: int, batch: int
) -> np.ndarray:
    """Context vectors of some positions: mean final hidden state of the tokens around them.

    The state of a token is the student's at the token itself, so it has read the token; windows
    end where the answer does.

    Args:
      corpus: the text.
      pair: its student runs, on its mesh.
      chosen: positions in the flat order of the corpus, ascending.
      window: tokens on either side.
      batch: rows of a forward pass, rounded up to the mesh.

    Returns:
      f32 [len(chosen), D].
    """
    out_ND = np.empty((len(chosen), pair.cfg.student.width), np.float32)
    batch = meshlib.batch_rows(min(batch, len(corpus.answers)), pair.mesh)
    bounds = np.searchsorted(chosen, corpus.offset_A)  # of each answer, in chosen
    for rollout, index_B in corpus.batches(batch, pad_id=pair.sampler.pad_id):
        rows = [slice(bounds[i], bounds[i + 1]) if i >= 0 else slice(0, 0) for i in index_B]
        most = int(max(row.stop - row.start for row in rows))
        if not most:
            continue
        begin = int(np.asarray(rollout.mask_BT).argmax(axis=1).max())  # of the answers, in all rows
        first_BM = np.full((batch, 1 << (most - 1).bit_length()), begin, np.int32)  # few shapes
        last_BM = first_BM.copy()
        for line, (index, row) in enumerate(zip(index_B, rows, strict=True)):
            place = corpus.position[chosen[row]]
            end = begin + len(corpus.answers[max(index, 0)]) - 1
            first_BM[line, : len(place)] = begin + np.maximum(place - window, 0)
            last_BM[line, : len(place)] = np.minimum(begin + place + window, end)
        whole = (rollout.ids_BT, rollout.start_B, first_BM, last_BM)
        on_device = meshlib.to_global(meshlib.own_rows(whole), pair.mesh)
        with jax.set_mesh(pair.mesh):
            mean_BMD = meshlib.to_host(
                _window_means(pair.student, *on_device, cfg=pair.cfg.student)
            )
        for line, row in enumerate(rows):
            out_ND[row] = mean_BMD[line, : row.stop - row.start]
    return out_ND


@functools.partial(jax.jit, static_argnames=("cfg",))
def _window_means(
    params: Params,
    ids_BT: Int[Array, "B T"],
    start_B: Int[Array, " B"],
    first_BM: Int[Array, "B M"],
    last_BM: Int[Array, "B M"],
    *,
    cfg: ModelConfig,
) -> Float[Array, "B M D"]:
    """Mean final hidden state from ``first`` to ``last``, both included, f32."""
    valid_BT = jnp.arange(ids_BT.shape[1])[None, :] >= start_B[:, None]
    h_BTD, _ = transformer.hidden(
        params, ids_BT, transformer.positions(valid_BT), valid_BT, cfg=cfg
    )

    def local(h_BTD, first_BM, last_BM):
        running_BTD = jnp.cumsum(h_BTD.astype(jnp.float32), axis=1)
        running_BTD = jnp.pad(running_BTD, ((0, 0), (1, 0), (0, 0)))
        take = lambda at_BM: jnp.take_along_axis(running_BTD, at_BM[:, :, None], axis=1)  # noqa: E731
        length_BM = (last_BM - first_BM + 1).astype(jnp.float32)
        return (take(last_BM + 1) - take(first_BM)) / length_BM[:, :, None]

    if not meshlib.is_active():
        return local(h_BTD, first_BM, last_BM)
    rows, states = P(meshlib.BATCH, None), P(meshlib.BATCH, None, None)
    return jax.shard_map(local, in_specs=(states, rows, rows), out_specs=states, check_vma=False)(
        h_BTD, first_BM, last_BM
    )


def _points(grid: Mapping[str, Sequence[float]], default: Parameters) -> list[Parameters]:
    """Every combination of the grid, and the default, in order."""
    names = [field.name for field in dataclasses.fields(Parameters)]
    unknown = sorted(set(grid) - set(names))
    if unknown:
        raise ValueError(f"grid names {unknown}: expected some of {names}; change the grid")
    values: list[Sequence[Any]] = [grid.get(name, (getattr(default, name),)) for name in names]
    points = {Parameters(*point) for point in itertools.product(*values)} | {default}
    return sorted(points, key=dataclasses.astuple)


def _taus(point: Parameters) -> tuple[float, float]:
    return point.tau_pre, point.tau_post


def _draw(
    before: Occurrences,
    after: Occurrences,
    looked_at: np.ndarray,
    points: Sequence[Parameters],
    search: Search,
) -> dict[tuple[float, float], _Drawn]:
    """Draw occurrences of every candidate, by one random order for all thresholds."""
    rng, cap = np.random.default_rng(search.seed), search.cap
    by_type = np.argsort(after.token_id, kind="stable")
    bounds = np.searchsorted(after.token_id[by_type], [looked_at, looked_at + 1])
    shuffled = [rng.permutation(by_type[low:high]) for low, high in bounds.T]
    others = [rng.permutation(positions) for positions in shuffled]
    drawn = {}
    for tau_pre, tau_post in sorted({_taus(point) for point in points}):
        is_high = before.kl >= np.quantile(before.kl, tau_pre)
        is_high &= after.kl >= np.quantile(after.kl, tau_post)
        chosen = [positions[is_high[positions]] for positions in shuffled]
        drawn[tau_pre, tau_post] = _Drawn(
            np.array([len(positions) for positions in chosen]),
            [positions[:cap] for positions in chosen],
            [
                positions[: min(len(persistent), cap)]
                for positions, persistent in zip(others, chosen, strict=True)
            ],
        )
    return drawn


def _retained(
    unit_ND: np.ndarray,
    used: np.ndarray,
    chosen: Sequence[np.ndarray],
    number: np.ndarray,
    points: Sequence[Parameters],
) -> dict[Parameters, np.ndarray]:
    """Retained occurrences of each candidate at each point, scaled up from those drawn."""
    result = {point: np.zeros(len(chosen)) for point in points}
    for place, positions in enumerate(chosen):
        if len(positions) < 2:
            continue  # no other occurrence to agree with
        own_MD = unit_ND[np.searchsorted(used, positions)]
        cosine_MM = own_MD @ own_MD.T
        np.fill_diagonal(cosine_MM, -np.inf)
        for gamma in {point.gamma for point in points}:
            rho_M = np.sum(cosine_MM >= gamma, axis=1) / (len(positions) - 1)
            for point in points:
                if point.gamma == gamma:
                    result[point][place] = np.mean(rho_M >= point.eta) * number[place]
    return result


def _selected(score: np.ndarray, looked_at: np.ndarray, k: int) -> np.ndarray:
    """Ids of the ``k`` highest positive scores, ties to the smaller id."""
    order = np.lexsort((looked_at, -score))
    return looked_at[order[score[order] > 0][:k]]


def _row(
    after: Occurrences,
    sums: TypeStats,
    looked_at: np.ndarray,
    ccr: np.ndarray,
    *,
    rocks_k: np.ndarray,
    left_out: float,
) -> dict[str, Any]:
    """What R_ctx selects, and how much of it the Rock Score had selected."""
    score = sums.kl_sum[looked_at] * ccr
    ids = _selected(score, looked_at, len(rocks_k))
    is_in = np.isin(looked_at, ids)
    least = float(score[is_in].min()) if len(ids) == len(rocks_k) else 0.0
    retained = float(np.sum((ccr * sums.count[looked_at])[is_in]))
    return {
        "rocks_kept": len(np.intersect1d(ids, rocks_k)),
        "types": len(ids),
        "median_ccr": float(np.median(ccr[np.isin(looked_at, rocks_k)])),
        "density": float(np.median(shares.density(after, ids).token_share)),
        "retained_share": retained / len(after),
        "jaccard_with_rock_score": shares.jaccard(ids, rocks_k),
        "is_exact": least >= left_out,
    }


def _types(
    sums: TypeStats,
    looked_at: np.ndarray,
    ccr: np.ndarray,
    by_chance: np.ndarray,
    token_text: Callable[[int], str],
) -> list[dict[str, Any]]:
    score = sums.kl_sum[looked_at] * ccr
    return [
        {
            "token_id": int(looked_at[i]),
            "token": token_text(int(looked_at[i])),
            "rock_score": float(sums.kl_sum[looked_at[i]]),
            "ccr": float(ccr[i]),
            "control_ccr": float(by_chance[i]),
            "score": float(score[i]),
        }
        for i in np.lexsort((looked_at, -score))
    ]
