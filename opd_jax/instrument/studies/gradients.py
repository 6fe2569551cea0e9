r"""Gradient geometry: how hard each type pulls on the student, and whether with the others.

With :math:`g_i` the exact gradient of the reverse KL at position i with respect to the logits and
:math:`\bar g_t` its mean over the :math:`n_t` positions that predict type t (arXiv 2605.09253,
section 2),

* ``mean_norm`` is :math:`E\|g\|`, what one occurrence weighs; ``norm_of_mean`` is
  :math:`\|\bar g_t\|`, which shrinks with :math:`n_t` even where occurrences have nothing to do
  with one another. ``norm_at`` m compares types at equal n: the root mean square norm of the mean
  of m occurrences drawn without replacement (at m = 1 it would be that of g itself, which is above
  ``mean_norm`` where norms vary; none for types with fewer occurrences), in closed form

  .. math:: \frac{1}{m}\,\overline{\|g\|^2} + \Big(1-\frac1m\Big)
            \frac{\|\sum g_i\|^2 - \sum\|g_i\|^2}{n(n-1)};

* ``cos_balanced`` and ``cos_global`` are cosines with :math:`\sum_t \bar g_t` (types weigh alike)
  and :math:`\sum_i g_i` (positions do); ``_loo`` leaves the type's own part out of the sum;
  ``contribution_*`` is :math:`n_t \langle\bar g_t, G\rangle/\|G\|`, which for the global sum adds
  up over all types to its norm;
* ``param_norm_of_mean`` and ``param_cos_global`` say the same of the exact gradient of the output
  head, :math:`g h^\top`.

All is exact: every occurrence counts, none is sampled or capped. The passes are those of
``passes``; a position costs three head-sized matmuls in the first, and three more, for its
type's own head gradient, where the type is reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from opd_jax import mesh as meshlib
from opd_jax import processes, stats
from opd_jax.instrument import controls
from opd_jax.instrument.corpus import Corpus, Occurrences
from opd_jax.instrument.studies import passes
from opd_jax.instrument.studies.passes import Logits
from opd_jax.instrument.workbench import Workbench
from opd_jax.store.pair import Pair

NUM_RANDOM = 200  # of the group "random", as in compute_logit_gradients.py of the paper's code
MATCHED = (2, 8)  # occurrences that norms are compared at
_NAMES = (
    "mean_norm",
    "norm_of_mean",
    "cos_balanced",
    "cos_global",
    "cos_balanced_loo",
    "cos_global_loo",
    "contribution_balanced",
    "contribution_global",
    "param_norm_of_mean",
    "param_cos_global",
)
# A rest smaller than this share of the whole is rounding: the type is (nearly) all there is.
_NO_REST = 1e-4


def study(bench: Workbench) -> dict[str, Any]:
    """Tell the gradients of the rocks and of other groups; what ``gradients.json`` holds.

    Also writes the lists of the types with the largest mean gradient, and of those whose mean
    gradient is most in line with all types': selection by the gradient itself.
    """
    flags, sums = bench.flags, bench.sums
    how: dict[str, Any] = {"batch": flags.batch, "say": processes.indented(bench.say, "  ")}
    ranked = rank_types(bench.corpus, bench.pair, bench.found, min_count=2, **how)
    entries = bench.folder.read("lists/lists.json")
    for name in ("norm", "alignment"):
        value_V = np.where(sums.count >= 2, ranked[name], -np.inf)
        order = np.argsort(-value_V, kind="stable")
        ids = order[np.isfinite(value_V[order])][: flags.k]
        entries[f"top_gradient_{name}"] = bench.write_list(f"top_gradient_{name}", ids)
    bench.folder.write("lists/lists.json", entries)
    return geometry(
        bench.corpus,
        bench.pair,
        bench.found,
        disjoint_groups(bench),
        token_text=bench.pair.text,
        **how,
    )


def disjoint_groups(bench: Workbench) -> dict[str, np.ndarray]:
    """Types by group: rocks, highest mean KL, like frequency, and random others; disjoint."""
    groups = {"rock": bench.rocks}
    taken = set(bench.rocks.tolist())
    for name, how in (("high_kl", "top_mean_kl"), ("control", "hungarian")):
        ids = controls.choose(bench.sums, bench.rocks, how, rule=bench.rule)
        groups[name] = np.array([i for i in ids.tolist() if i not in taken], int)
        taken |= set(groups[name].tolist())
    others = np.flatnonzero(bench.sums.count >= 2)
    others = others[~np.isin(others, list(taken))]
    rng = np.random.default_rng(bench.flags.seed)
    groups["random"] = np.sort(rng.permutation(others)[:NUM_RANDOM])
    return {name: ids for name, ids in groups.items() if len(ids)}


def geometry(
    corpus: Corpus,
    pair: Pair,
    occurrences: Occurrences,
    groups: Mapping[str, Any],
    *,
    token_text: Callable[[int], str],
    batch: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Report the gradients of some types, and of groups of them: what ``gradients.json`` holds.

    Args:
      corpus, pair, occurrences: the text, the models, and how the latter score the former.
      groups: ids by group name.
      token_text: printable text of an id.
      batch: answers at a time, rounded up to the mesh; does not change the result.
      say: receives progress.

    Raises:
      ValueError: occurrences of another corpus, or ids that do not occur.

    **Sharding**: answers over the batch axes, vocabulary over ``model``.
    """
    count_V = _count(corpus, pair, occurrences)
    ids = _checked(groups, count_V)
    with jax.set_mesh(pair.mesh):
        size = meshlib.batch_rows(min(batch, len(corpus.answers)), pair.mesh)
        found = passes.logits(corpus, pair, ids, count_V, batch=size, has_head=True, say=say)
        head = passes.heads(corpus, pair, ids, count_V, found.head_VD, batch=size, say=say)
    rows = _types(ids, corpus.token_id, count_V, found, head)
    named = {
        group: [
            {"token_id": int(i), "token": token_text(int(i)), "group": group} | rows[int(i)]
            for i in members
        ]
        for group, members in groups.items()
    }
    parts = [rows[int(i)]["contribution_global"] for i in ids]
    summed = None if None in parts else float(np.sum(parts)) + found.rest_contribution
    return {
        "k": len(groups.get("rock", ())),
        "types": list(itertools.chain.from_iterable(named.values())),
        "groups": [_group(name, members) for name, members in named.items()],
        "identities": {
            "contributions_global": summed,  # of the types above and of all others together
            "norm_global": found.norm["global"],
            "sum_of_global": found.total_global,  # over the vocabulary: 0
        },
        "norm_global": found.norm["global"],
        "norm_balanced": found.norm["balanced"],
        "param_norm_global": head["norm_global"],
    }


def rank_types(
    corpus: Corpus,
    pair: Pair,
    occurrences: Occurrences,
    *,
    min_count: int = 2,
    batch: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, np.ndarray]:
    """Score every type by its mean gradient, for lists selected by the gradient itself.

    Returns:
      f64 [V] each, -inf where a type occurs less than ``min_count`` times: ``norm``, that of the
      mean gradient; ``alignment``, its cosine with the sum of all types' mean gradients.

    Raises:
      ValueError: occurrences of another corpus.

    **Sharding**: as in :func:`geometry`.
    """
    count_V = _count(corpus, pair, occurrences)
    ids = np.flatnonzero(count_V >= max(min_count, 1))
    with jax.set_mesh(pair.mesh):
        size = meshlib.batch_rows(min(batch, len(corpus.answers)), pair.mesh)
        found = passes.logits(corpus, pair, ids, count_V, batch=size, say=say)
    norm_V, alignment_V = np.full((2, len(count_V)), -np.inf)
    own = found.beside["balanced"]
    norm_V[ids] = own["norm"]
    product = own["norm"] * found.norm["balanced"]
    alignment_V[ids] = np.divide(own["dot"], product, out=np.zeros(len(ids)), where=product > 0)
    return {"norm": norm_V, "alignment": alignment_V}


def norm_at(m: int, count: int, sum_of_squares: float, square_of_sum: float) -> float | None:
    """Root mean square norm of the mean of ``m`` of ``count`` vectors, None with fewer than m."""
    if count < m:
        return None
    own = sum_of_squares / count
    cross = (square_of_sum - sum_of_squares) / (count * (count - 1)) if count > 1 else 0.0
    return float(np.sqrt(max(own / m + (1 - 1 / m) * cross, 0.0)))


def _types(ids, token_id, count_V, found: Logits, head) -> dict[int, dict[str, Any]]:
    """The numbers of each type."""
    square = found.square.astype(np.float64)
    sizes = (np.sqrt(square), square)
    norm_V, square_V = (np.bincount(token_id, x, minlength=len(count_V)) for x in sizes)
    rows = {}
    for at, token in enumerate(ids.tolist()):
        n = int(count_V[token])
        own, balanced = (
            {k: float(v[at]) for k, v in found.beside[whole].items()}
            for whole in ("global", "balanced")
        )
        square_of_sum = own["norm"] ** 2
        param = head["norm"][token]
        rows[token] = {
            "count": n,
            "mean_norm": float(norm_V[token]) / n,
            "norm_of_mean": own["norm"] / n,
            "norm_at": {
                str(m): norm_at(m, n, float(square_V[token]), square_of_sum) for m in MATCHED
            },
            "cos_balanced": _ratio(balanced["dot"], balanced["norm"] * found.norm["balanced"]),
            "cos_global": _ratio(own["dot"], own["norm"] * found.norm["global"]),
            "cos_balanced_loo": _cos_rest(balanced, found.norm["balanced"]),
            "cos_global_loo": _cos_rest(own, found.norm["global"]),
            "contribution_balanced": _ratio(n * balanced["dot"], found.norm["balanced"]),
            "contribution_global": _ratio(own["dot"], found.norm["global"]),
            "param_norm_of_mean": param / n,
            "param_cos_global": _ratio(head["dot"][token], param * head["norm_global"]),
        }
    return rows


def _cos_rest(part: Mapping[str, float], whole: float) -> float | None:
    if part["rest_norm"] <= _NO_REST * whole:
        return None
    return _ratio(part["rest_dot"], part["norm"] * part["rest_norm"])


def _ratio(value: float, over: float) -> float | None:
    return value / over if over > 0 else None


def _group(name: str, rows: list) -> dict[str, Any]:
    """Medians over the types of a group that have the number, with their exact intervals."""

    def ends(values: list) -> tuple[float | None, ...]:
        values = [x for x in values if x is not None]
        if not values:
            return None, None, None
        found = stats.median(values)
        return found.delta, found.low, found.high

    result: dict[str, Any] = {
        "group": name,
        "types": len(rows),
        "positions": sum(row["count"] for row in rows),
    }
    for key in _NAMES:
        numbers = ends([row[key] for row in rows])
        result |= dict(zip((key, f"{key}_low", f"{key}_high"), numbers, strict=True))
    matched = {m: ends([row["norm_at"][str(m)] for row in rows]) for m in MATCHED}
    for place, key in enumerate(("norm_at", "norm_at_low", "norm_at_high")):
        result[key] = {str(m): numbers[place] for m, numbers in matched.items()}
    return result


def _count(corpus: Corpus, pair: Pair, occurrences: Occurrences) -> np.ndarray:
    """Occurrences by type, [V], of a corpus that was scored as given."""
    if not np.array_equal(corpus.token_id, occurrences.token_id):
        raise ValueError(
            f"the scores have {len(occurrences)} positions and the corpus {corpus.num_positions}, "
            "or other ids: expected the scores of this corpus; score it again with collect.score"
        )
    return np.bincount(corpus.token_id, minlength=pair.cfg.student.vocab_size)


def _checked(groups: Mapping[str, Any], count_V: np.ndarray) -> np.ndarray:
    """All ids of the groups, ascending."""
    for name, ids in groups.items():
        ids = np.asarray(ids, int)
        strange = [i for i in ids.tolist() if not 0 <= i < len(count_V) or not count_V[i]]
        if strange or not len(ids):
            raise ValueError(
                f"group {name!r} has {len(ids)} ids, {len(strange)} of which do not occur in the "
                f"corpus ({strange[:3]}): expected at least one, and only ids that occur; give "
                "types seen"
            )
    if not groups:
        raise ValueError("no groups: expected at least one; pass ids by group name")
    return np.unique(np.concatenate([np.asarray(ids, int) for ids in groups.values()]))
