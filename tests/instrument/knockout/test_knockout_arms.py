"""Which arms follow from a baseline, and which from the census on its first half."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from opd_jax.instrument.knockout import arms, outlook
from opd_jax.instrument.knockout.answered import Answer, Arm, Baseline
from opd_jax.instrument.knockout.request import KnockoutError, Request
from opd_jax.instrument.knockout.targets import Targets

V = 40


def request(*families, **more):
    given: dict[str, Any] = {"model": "m", "tasks": "t", "types": "1", "out": "o"}
    return Request(**given, families=families or ("single",), **more)


@pytest.fixture(scope="module")
def baseline():
    """Sixty problems; type i is held by about 60 / (i + 1) of them."""
    rng = np.random.default_rng(0)
    answers = []
    for _ in range(60):
        ids = [i for i in range(30) if rng.random() < 1 / (i + 1)]
        answers.append([Answer(np.array([*ids, 39], np.int32), bool(rng.random() < 0.6), "x")])
    return Baseline([None] * 60, answers, 64, seed=3)  # type: ignore[list-item]


def test_arms_of_all_families_that_follow_from_the_baseline(baseline):
    count_V = baseline.counts(V)
    targets = Targets((33, 5, 0, 1, 2), {"mine": (1, 2, 33), "gone": (33,)})
    asked = request("single", "control", "local", "pair", "group", "cumulative", top=3, local=2,
                    pairs=2, orders=2)  # fmt: skip
    found = arms.first(asked, targets, baseline, count_V)
    by = {f: [arm for arm in found if arm.family == f] for f in asked.families}
    assert [arm.ids for arm in by["single"]] == [(5,), (0,), (1,)]  # 33 never occurs
    assert not {arm.ids[0] for arm in by["control"]} & {5, 0, 1}
    assert [(arm.ids, arm.window) for arm in by["local"][:2]] == [((5,), 1), ((0,), 1)]
    assert len(by["local"]) == 4
    assert [arm.ids for arm in by["pair"]] == [(5, 0)]
    assert by["group"][0].ids == (1, 2, 33)
    shares = [count_V[list(arm.ids)].sum() for arm in by["group"]]
    assert "gone" not in str(by["group"])
    assert shares[2] == pytest.approx(shares[0], rel=0.2)  # matched in their share
    assert len({frozenset(arm.ids) for arm in by["cumulative"]}) == len(by["cumulative"])
    assert max(len(arm.ids) for arm in by["cumulative"]) == 3
    room = arms.width(asked, targets)
    assert max(len(arm.ids) for arm in found) <= room
    assert len({arm.name for arm in found}) == len(found)


@pytest.mark.parametrize("seed", range(5))
def test_no_control_is_a_target_or_ends_answers(seed):
    """A stop id is in every answer; without it types 3 to 9 are like the ten targets."""
    rng = np.random.default_rng(seed)
    draws = [rng.choice(30, size=12) for _ in range(40)]
    answers = [[Answer(np.array([*ids, 39], np.int32), True, "x")] for ids in draws]
    baseline = Baseline([None] * 40, answers, 64, seed=seed)  # type: ignore[list-item]
    count_V, top = baseline.counts(V), tuple(range(10))
    asked = request("single", "control", "local", "group", top=10, local=3)
    found = arms.first(asked, Targets(top, {"mine": (0, 1, 12)}), baseline, count_V, [39])
    matched = [arm for arm in found if "control" in arm.name]
    assert len(matched) == 13
    assert not {i for arm in matched for i in arm.ids} & {*top, 39}
    others = [arm.ids for arm in found if arm.name.startswith("group mine, ")]
    assert len(others) == 2
    assert all(39 not in ids for ids in others)
    assert [arm.ids for arm in found if arm.name.startswith("local 2")] == [(2,)]
    asked = request("single", "group", groups="paper")
    change = {i: {"a": 0.01 * i} for i in top}
    drawn = [arm for arm in arms.second(asked, change, count_V, seed, [39]) if "random" in arm.name]
    assert len(drawn) == 2
    assert not {i for arm in drawn for i in arm.ids} & {*top, 39}


def test_a_stop_id_that_is_a_target_is_banned(baseline):
    asked = request("single", "control")
    found = arms.first(asked, Targets((39,), {}), baseline, baseline.counts(V), [39])
    assert [arm.ids for arm in found if arm.family == "single"] == [(39,)]


def test_what_makes_no_arm_is_refused(baseline):
    count_V = baseline.counts(V)
    for asked, groups in (
        (request("group"), {}),
        (request("group"), {"gone": (33,), "lost": (34,)}),
        (request("pair"), {}),
    ):
        with pytest.raises(KnockoutError, match=r"no arms of \w+: expected at least one"):
            arms.first(asked, Targets((0,), groups), baseline, count_V)
    named = Targets((0,), {"a": (1,), "a, hungarian": (2,), "gone": (33,)})
    assert arms.unseen(named, count_V) == ["gone"]
    with pytest.raises(KnockoutError, match="two arms are named 'group a, hungarian'"):
        arms.first(request("group"), named, baseline, count_V)


def test_groups_and_orders_that_follow_from_the_first_half_are_measured_on_the_second(baseline):
    rng = np.random.default_rng(1)
    change = {i: {"a": d, "b": 2 * d} for i, d in enumerate(rng.normal(size=12) / 50)}
    asked = request("single", "group", "cumulative", groups="paper")
    found = {arm.name: arm for arm in arms.second(asked, change, baseline.counts(V), 0)}
    order = sorted(change, key=lambda i: change[i]["a"])
    assert found["group top5_cornerstone"].ids == tuple(order[:5])
    assert found["group top10_stumbling"].ids == tuple(order[::-1][:10])
    assert found["group cross_task_cornerstones"].ids == tuple(
        i for i in change if change[i]["a"] <= -0.005
    )
    assert "group top20_cornerstone" not in found  # there are 12
    assert found["cornerstones first, first 2"].ids == tuple(order[:2])
    assert not {*found["group random_control_a"].ids} & {*change}
    assert all(arm.is_second for arm in found.values())
    for arm in found.values():
        assert all(baseline.is_second_N[job.row] for job in baseline.jobs(arm))
    assert baseline.is_second_N.sum() == 30


def test_a_local_ban_takes_an_occurrence_by_lot():
    ids = np.array([7, 1, 7, 2, 7, 39], np.int32)
    baseline = Baseline([None] * 300, [[Answer(ids, True, None)]] * 300, 64, seed=0)  # type: ignore
    jobs = baseline.jobs(Arm("local 7", "local", (7,), 2))
    places = np.bincount([job.first for job in jobs], minlength=5)
    assert places[[1, 3]].sum() == 0
    assert min(places[[0, 2, 4]]) > 70
    assert all((job.end, job.differs) == (job.first + 2, job.first) for job in jobs)


def test_the_null_arm_takes_padding_or_what_never_occurs(baseline):
    assert arms.null(baseline, 30, 40, 4, [39]).ids == (30, 31, 32, 33)
    unused = [i for i in range(V) if not baseline.counts(V)[i] and i != 38]  # 38 would stop
    assert {30, 37} < {*unused}
    assert arms.null(baseline, 40, 40, 8, [38]).ids == tuple(unused[:8])
    every = dataclasses.replace(
        baseline, answers=[[Answer(np.arange(V, dtype=np.int32), True, None)]]
    )
    with pytest.raises(KnockoutError, match="all 40 ids occur"):
        arms.null(every, 40, 40, 4, [39])


def test_the_outlook_is_that_of_the_flips_there_can_be(baseline):
    some = [Arm(f"single {i}", "single", (i,)) for i in (0, 25)]
    common, rare = outlook.of(some, baseline, 0.8)
    assert common.held == 60
    right = int(baseline.correct_NK.sum())
    assert common.fall is not None
    assert 0 < common.fall < right / 60
    assert rare.held < 10
    assert (rare.fall, rare.rise) == (None, None)
    told = "\n".join(outlook.lines(some, baseline, request(effect=0.3)))
    assert "2 arms, held by" in told
    assert "7 flips in one direction" in told
    assert (
        f"1 of 2 arms of single are held by too few problems for 30 points: single 25 ({rare.held})"
        in told
    )
    with pytest.raises(KnockoutError, match="too few problems: 60 of them"):
        outlook.check(some[1:], baseline, request(effect=0.3))
    outlook.check(some, baseline, request(effect=0.3))


def test_orders_need_the_effects_they_are_chosen_by():
    with pytest.raises(KnockoutError, match="cumulative without single"):
        request("cumulative")
    with pytest.raises(KnockoutError, match="group, --groups=paper, without single"):
        request("group", groups="paper")
