"""The arms of a knockout: which ids are banned together, and beside which controls.

What is chosen by looking at an arm's effect is measured on other problems: groups and orders that
follow from the census are chosen on one half of the problems and decoded on the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from opd_jax.instrument import controls
from opd_jax.instrument.corpus import TypeStats
from opd_jax.instrument.knockout.answered import NULL, Arm, Baseline
from opd_jax.instrument.knockout.request import PAPER, KnockoutError, Request
from opd_jax.instrument.knockout.targets import Targets

SIZES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200)  # of cumulative arms, as published
_CROSS = 0.005  # change of accuracy on every task that makes a published cross-task group


def width(request: Request, targets: Targets) -> int:
    """Room for banned ids in every row of the one program, known before anything is decoded."""
    most = [4, request.top if request.has("cumulative") else 1]
    if request.has("group"):
        most += [4 * len(ids) for ids in targets.groups.values()] + [20]
    return 1 << (max(most) - 1).bit_length()


def null(baseline: Baseline, num_ids: int, rows: int, room: int, stops: Sequence[int]) -> Arm:
    """The arm that changes nothing: rows of padding, else ids that no answer holds.

    Raises:
      KnockoutError: there is no such id.
    """
    padded = np.arange(num_ids, rows)
    unused_V = baseline.counts(num_ids) == 0
    unused_V[list(stops)] = False
    ids = padded if len(padded) else np.flatnonzero(unused_V)
    if not len(ids):
        raise KnockoutError(
            f"all {num_ids} ids occur in the baseline and the model has no padded rows: expected "
            "an id for the null arm, which never occurs; answer fewer problems (--limit)"
        )
    return Arm(NULL, NULL, tuple(int(i) for i in ids[:room]))


def singles(request: Request, targets: Targets, count_V: np.ndarray) -> list[Arm]:
    """The first types that occur, one by one.

    Raises:
      KnockoutError: none does.
    """
    ids = [i for i in targets.ids if count_V[i]][: request.top]
    if not ids:
        raise KnockoutError(
            f"none of {len(targets.ids)} types occurs in the answers of {request.model}: expected "
            "some that do, a ban of others changes nothing; give other --types or more problems"
        )
    return [Arm(f"single {i}", "single", (i,)) for i in ids]


def first(
    request: Request,
    targets: Targets,
    baseline: Baseline,
    count_V: np.ndarray,
    stops: Sequence[int] = (),
) -> list[Arm]:
    """All arms that follow from the baseline alone.

    Args:
      request: what is asked for.
      targets: what is to be banned.
      baseline: the answers without.
      count_V: occurrences in them.
      stops: ids that end an answer, which are no control: their ban makes every answer run on.

    Raises:
      KnockoutError: there is no arm, or two of one name.
    """
    alone = singles(request, targets, count_V)
    ids = np.array([arm.ids[0] for arm in alone])
    found = alone if request.has("single") else []
    if request.has("control"):
        matched = _matched(count_V, ids, "hungarian", never=stops)
        found = found + [Arm(f"control {i}", "control", (i,)) for i in matched]
    if request.has("local"):
        chosen = ids[: request.local]
        matched = _matched(count_V, chosen, "hungarian", never=[*ids, *stops])
        for kind, some in (("local", chosen.tolist()), ("local control", matched)):
            found = found + [Arm(f"{kind} {i}", "local", (i,), request.window) for i in some]
    if request.has("pair"):
        pairs = itertools.combinations(ids[: request.pairs].tolist(), 2)
        found = found + [Arm(f"pair {a} {b}", "pair", (a, b)) for a, b in pairs]
    if request.has("cumulative"):
        orders = {
            f"random {number + 1}": np.random.default_rng((baseline.seed, 3, number))
            .permutation(ids)
            .tolist()
            for number in range(request.orders)
        }
        found = found + _nested(orders, is_second=False)
    if request.has("group"):
        found = found + _groups(targets, count_V, width(request, targets), stops)
    if not found:
        raise KnockoutError(
            f"no arms of {', '.join(request.families)}: expected at least one; groups need a file "
            "of lists (--groups), of which one occurs in the answers, and pairs two types "
            "(--types, --top)"
        )
    _check_names(found)
    return found


def unseen(targets: Targets, count_V: np.ndarray) -> list[str]:
    """Names of the lists of which no id occurs, and which are no arm therefore."""
    return [name for name, ids in targets.groups.items() if not any(count_V[i] for i in ids)]


def _groups(targets: Targets, count_V: np.ndarray, room: int, stops: Sequence[int]) -> list[Arm]:
    """Named lists as far as they occur, each with types of the same share of all tokens."""
    found = []
    for name, ids in targets.groups.items():
        seen = np.array([i for i in ids if count_V[i]], int)
        if not len(seen):
            continue
        found.append(Arm(f"group {name}", "group", tuple(ids)))
        for how in ("hungarian", "share_matched"):
            matched = _matched(count_V, seen, how, never=stops)
            if matched and len(matched) <= room:
                found.append(Arm(f"group {name}, {how}", "group", tuple(matched)))
    return found


def _matched(count_V: np.ndarray, ids: np.ndarray, how: str, *, never: Sequence[int]) -> list[int]:
    """Types that occur as ``ids`` do, none of ``never`` among them."""
    pool_V = count_V.astype(float)
    pool_V[[i for i in never if i not in ids]] = 0
    nothing = np.zeros(len(pool_V))
    return controls.choose(TypeStats(pool_V, nothing, nothing), ids, how).tolist()


def _check_names(found: Sequence[Arm]) -> None:
    names = [arm.name for arm in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise KnockoutError(
            f"two arms are named {twice[0]!r}: expected a name for each; rename a list of --groups"
        )


def _nested(orders: Mapping[str, Sequence[int]], *, is_second: bool) -> list[Arm]:
    """Arms of more and more ids, each set of ids once."""
    found: dict[frozenset[int], Arm] = {}
    for name, order in orders.items():
        for k in sorted({k for k in SIZES if k < len(order)} | {len(order)}):
            arm = Arm(f"{name}, first {k}", "cumulative", tuple(order[:k]), is_second=is_second)
            found.setdefault(frozenset(arm.ids), arm)
    return [*found.values()]


def second(
    request: Request,
    change: Mapping[int, Mapping[str, float]],
    count_V: np.ndarray,
    seed: int,
    stops: Sequence[int] = (),
) -> list[Arm]:
    """The arms that follow from the census on the first half of the problems.

    Args:
      request: what is asked for.
      change: change of accuracy on the first half by type and task.
      count_V: occurrences in the baseline.
      seed: of the published random groups.
      stops: ids that end an answer; in no random group.
    """
    overall = {i: float(np.mean(list(tasks.values()))) for i, tasks in change.items()}
    falling = sorted(overall, key=lambda i: (overall[i], i))
    rising = sorted(overall, key=lambda i: (-overall[i], i))
    found = []
    if request.has("cumulative"):
        orders = {"cornerstones first": falling, "stumbling blocks first": rising}
        found += _nested(orders, is_second=True)
    if request.has("group") and request.groups == PAPER:
        sets = {f"top{k}_cornerstone": falling[:k] for k in (5, 10, 20) if len(falling) >= k}
        sets |= {f"top{k}_stumbling": rising[:k] for k in (5, 10) if len(rising) >= k}
        if len(next(iter(change.values()), {})) > 1:
            several = {i: list(tasks.values()) for i, tasks in change.items()}
            sets["cross_task_cornerstones"] = [i for i, x in several.items() if max(x) <= -_CROSS]
            sets["cross_task_stumbling"] = [i for i, x in several.items() if min(x) >= _CROSS]
        apart = {*change, *stops}
        others = np.array([i for i in np.flatnonzero(count_V).tolist() if i not in apart], int)
        drawn = np.random.default_rng((seed, 4)).permutation(others)
        for name, some in (("a", drawn[:10]), ("b", drawn[10:20])):
            sets[f"random_control_{name}"] = some.tolist()
        found += [
            Arm(f"group {name}", "group", tuple(ids), is_second=True)
            for name, ids in sets.items()
            if 0 < len(ids) <= 20
        ]
    return found
