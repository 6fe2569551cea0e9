"""Arms side by side: hand-made workdirs whose numbers are known, recomputed another way."""

import json
import math

import numpy as np
import pytest
import tiny_run
from scipy import stats as reference

from opd_jax import spec, stats
from opd_jax.rock import RockConfig
from opd_jax.run import arms, standings
from opd_jax.store import workdir as workdirs

SEEDS = 3
STEPS = 4
PROBLEMS = 40
EVAL = {"kl_gated": None, "kl_ungated": 0.5, "truncated_share": 0.0}


def run_of(seed, **changed):
    groups = {name: cls() for name, cls in spec.GROUPS.items()}
    return spec.RunConfig(seed=seed, **(groups | {"train": spec.TrainSpec(steps=STEPS)} | changed))


def write(
    folder, *, right, kl, shares, steps=STEPS, digest="a", seconds=10.0, index=None, lr=(0.1,)
):
    """The files of a finished run; ``right`` is one list of samples per problem."""
    folder.mkdir(parents=True)
    after = EVAL | {
        "accuracy": float(np.mean(right)) if len(right) else None,
        "kl_nats": kl,
        "mean_length": 20.0,
    }
    before = after | {"accuracy": 0.25, "kl_nats": 2.0}
    told = {"before": before, "after": after, "steps": steps, "seconds": seconds}
    summary = tiny_run.SUMMARY | told
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({"config": {}, "data": digest}))
    lines = [{"step": 0, "eval/accuracy": 0.5}]
    lines += [  # the first step compiles
        {"step": i + 1, "loss": 1.0, "gated_share": share, "lr": lr[i % len(lr)]}
        | {"step_s": 9.0 if i == 0 else seconds / 10}
        for i, share in enumerate(shares)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = list(range(len(right))) if index is None else index
    graded = [
        {"step": 0, "index": index, "correct": [[False]] * len(index)},
        {"step": steps, "index": index, "correct": [list(map(bool, x)) for x in right]},
    ]
    (folder / "graded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in graded))


@pytest.fixture
def made(tmp_path):
    """Jobs of two arms and what was put into them: {arm: {"right": [S, P, 2], "kl": [S]}}."""
    rng = np.random.default_rng(3)
    jobs, truth = [], {}
    for arm, rate in (("full", 0.5), ("rock", 0.7)):
        right = rng.random((SEEDS, PROBLEMS, 2)) < rate
        truth[arm] = {"right": right, "kl": rng.normal(1.0 if arm == "full" else 0.8, 0.1, SEEDS)}
    for seed in range(SEEDS):
        for arm, given in truth.items():
            folder = tmp_path / arm / f"seed-{seed}"
            write(
                folder,
                right=given["right"][seed],
                kl=float(given["kl"][seed]),
                shares=[0.0] * STEPS if arm == "full" else [0.0, 0.0, 0.2 + seed / 10, 0.4],
                seconds=10.0 + seed,
            )
            rock = RockConfig() if arm == "full" else RockConfig(mode="ema", start=2)
            jobs.append(arms.Job(arm, run_of(seed, rock=rock), folder))
    return jobs, truth


def test_means_carry_student_intervals(made):
    jobs, truth = made
    result = arms.summarise(jobs, "full")
    assert [row["arm"] for row in result["arms"]] == ["full", "rock"]
    for row in result["arms"]:
        assert row["seeds"] == [0, 1, 2]
        assert row["runs"] == [str(job.folder) for job in jobs if job.arm == row["arm"]]
        assert row["normaliser"] == "tokens"
        assert set(row["metrics"]) == {*arms.METRICS}
        found = row["metrics"]["kl_nats"]
        given = truth[row["arm"]]["kl"]
        low, high = reference.t.interval(
            0.95, SEEDS - 1, loc=given.mean(), scale=reference.sem(given)
        )
        assert found["values"] == given.tolist()
        assert (found["mean"], found["low"], found["high"]) == pytest.approx(
            (given.mean(), low, high)
        )
        accuracy = truth[row["arm"]]["right"].reshape(SEEDS, -1).mean(axis=1)
        assert row["metrics"]["accuracy"]["values"] == pytest.approx(accuracy.tolist())
        assert row["metrics"]["seconds"]["mean"] == 11.0
        assert row["metrics"]["step_s"]["values"] == pytest.approx([1.0, 1.1, 1.2])
        empty = {"mean": None, "low": None, "high": None, "values": [None] * SEEDS}
        assert row["metrics"]["kl_gated"] == empty


def test_start_is_before_training(made):
    start = arms.summarise(made[0], "full")["start"]
    assert (start["accuracy"], start["kl_nats"]) == (0.25, 2.0)
    assert start["seconds"] is None
    assert set(start) == {*arms.METRICS}


def test_masked_share_counts_from_the_start_of_the_gate(made):
    result = arms.summarise(made[0], "full")
    assert result["arms"][0]["masked_share"] == 0.0
    assert result["arms"][1]["masked_share"] == pytest.approx(np.mean([0.3, 0.35, 0.4]))


def test_kl_is_compared_by_a_paired_t_test(made):
    jobs, truth = made
    (found,) = [x for x in arms.summarise(jobs, "full")["comparisons"] if x["metric"] == "kl_nats"]
    test = reference.ttest_rel(truth["rock"]["kl"], truth["full"]["kl"])
    interval = test.confidence_interval(0.95)
    assert found["arm"] == "rock"
    assert found["delta"] == pytest.approx(np.mean(truth["rock"]["kl"] - truth["full"]["kl"]))
    assert (found["low"], found["high"], found["p"]) == pytest.approx(
        (interval.low, interval.high, test.pvalue)
    )


def test_accuracy_is_compared_by_resampled_problems_and_seeds_by_student(made):
    jobs, truth = made
    (found,) = [x for x in arms.summarise(jobs, "full")["comparisons"] if x["metric"] == "accuracy"]
    change = truth["rock"]["right"].mean(axis=2) - truth["full"]["right"].mean(axis=2)
    assert found["delta"] == pytest.approx(change.mean())
    rng = np.random.default_rng(11)  # another stream: only the law of the interval can agree
    drawn = np.array(
        [change[:, rng.integers(PROBLEMS, size=PROBLEMS)].mean() for _ in range(20_000)]
    )
    drawn += reference.sem(change.mean(axis=1)) * rng.standard_t(SEEDS - 1, size=len(drawn))
    assert (found["low"], found["high"]) == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.02
    )
    p = 2 * min(np.mean(drawn <= 0), np.mean(drawn >= 0))
    assert found["p"] == pytest.approx(p, abs=0.01)


def test_p_values_are_adjusted_over_all_comparisons(made, tmp_path):
    jobs, truth = made
    for seed in range(SEEDS):
        folder = tmp_path / "third" / f"seed-{seed}"
        right, kl = truth["full"]["right"][seed], float(truth["full"]["kl"][seed])
        write(folder, right=right, kl=kl + 0.01 * (seed - 1), shares=[0.5] * STEPS)
        jobs.append(arms.Job("third", run_of(seed), folder))
    found = arms.summarise(jobs, "full")["comparisons"]
    assert [(x["arm"], x["metric"]) for x in found] == [
        (arm, name) for arm in ("rock", "third") for name in ("accuracy", "kl_nats")
    ]
    p = [x["p"] for x in found]
    order = np.argsort(p)
    expected = np.empty(4)
    smallest = 1.0
    for rank in range(4, 0, -1):  # Benjamini and Hochberg 1995, step-up by hand
        smallest = min(smallest, p[order[rank - 1]] * 4 / rank)
        expected[order[rank - 1]] = smallest
    assert [x["p_adjusted"] for x in found] == pytest.approx(expected.tolist())
    assert found[2]["delta"] == 0
    assert found[2]["p"] == 1


def test_another_baseline_turns_the_sign(made):
    jobs, _ = made
    against = [arms.summarise(jobs, name)["comparisons"] for name in ("full", "rock")]
    for a, b in zip(*against, strict=True):
        assert a["delta"] == pytest.approx(-b["delta"])
    assert {x["arm"] for x in against[1]} == {"full"}


def test_one_seed_has_no_interval_of_kl(made):
    result = arms.summarise(made[0][:2], "full")
    accuracy, kl = result["comparisons"]
    assert kl["delta"] is not None
    assert kl["low"] is kl["high"] is kl["p"] is kl["p_adjusted"] is None
    assert (kl["verdict"], kl["p_equivalent"]) == ("not tested", None)
    assert accuracy["test"] == "paired bootstrap over problems"
    assert accuracy["low"] < accuracy["delta"] < accuracy["high"]
    assert accuracy["p_adjusted"] == accuracy["p"]
    assert result["arms"][0]["metrics"]["kl_nats"]["low"] is None
    assert "one seed" in result["note"]
    assert "not for the arms" in result["note"]
    low, high = (result["arms"][0]["metrics"]["accuracy"][end] for end in ("low", "high"))
    right = made[1]["full"]["right"][0].mean(axis=1)
    assert (low, high) == pytest.approx(stats.share_interval(right))
    assert "p, problems" in standings.table(result)[0]


def one_answer_each(tmp_path, lost, won, alike):
    """Two runs of one seed, graded on one answer a problem."""
    base = [[1]] * lost + [[0]] * won + [[1]] * alike
    arm = [[0]] * lost + [[1]] * won + [[1]] * alike
    jobs = []
    for name, right in (("full", base), ("rock", arm)):
        write(tmp_path / name, right=right, kl=1.0, shares=[0.0] * STEPS)
        jobs.append(arms.Job(name, run_of(0), tmp_path / name))
    return jobs


def test_one_answer_each_of_one_seed_is_compared_by_mcnemar(tmp_path):
    found = arms.summarise(one_answer_each(tmp_path, 2, 9, 30), "full")["comparisons"][0]
    assert found["test"] == "McNemar, exact, over problems"
    assert found["p"] == pytest.approx(reference.binomtest(2, 11).pvalue)
    assert found["delta"] == pytest.approx(7 / 41)


def test_as_good_as_takes_a_margin_and_enough_problems(tmp_path):
    few = one_answer_each(tmp_path / "few", 3, 3, 30)
    many = one_answer_each(tmp_path / "many", 3, 3, 2000)
    words = [arms.summarise(jobs, "full")["comparisons"][0]["verdict"] for jobs in (few, many)]
    assert words == ["undecided", "equivalent"]
    wide = arms.summarise(few, "full", margins=arms.Margins(accuracy=0.5))
    assert wide["comparisons"][0]["verdict"] == "equivalent"
    assert wide["margins"] == {"accuracy": 0.5, "kl": 0.05}
    with pytest.raises(ValueError, match="--margin is 0"):
        arms.Margins(accuracy=0.0)
    with pytest.raises(ValueError, match="--margin-kl is 5"):
        arms.Margins(kl=5)


def test_equivalence_of_kl_is_of_the_baselines_kl(made):
    jobs, truth = made
    margins = arms.Margins(kl=0.9)
    (found,) = [
        x
        for x in arms.summarise(jobs, "full", margins=margins)["comparisons"]
        if x["metric"] == "kl_nats"
    ]
    margin = 0.9 * truth["full"]["kl"].mean()
    change = truth["rock"]["kl"] - truth["full"]["kl"]
    sides = [
        reference.ttest_1samp(change, -margin, alternative="greater").pvalue,
        reference.ttest_1samp(change, margin, alternative="less").pvalue,
    ]
    assert found["margin"] == pytest.approx(margin)
    assert found["p_equivalent"] == pytest.approx(max(sides))


def test_accuracy_of_an_arm_has_the_spread_of_problems_and_seeds(made):
    jobs, truth = made
    row = arms.summarise(jobs, "full")["arms"][1]["metrics"]["accuracy"]
    right = truth["rock"]["right"].mean(axis=2)
    over_seeds = reference.t.interval(
        0.95, SEEDS - 1, right.mean(), reference.sem(right.mean(axis=1))
    )
    assert row["low"] < over_seeds[0] < over_seeds[1] < row["high"]


def test_without_answers_only_kl_is_compared(tmp_path):
    jobs = []
    for arm in ("full", "rock"):
        write(tmp_path / arm, right=[], kl=1.0, shares=[0.0] * STEPS)
        (tmp_path / arm / "graded.jsonl").unlink()
        jobs.append(arms.Job(arm, run_of(0), tmp_path / arm))
    result = arms.summarise(jobs, "full")
    assert [x["metric"] for x in result["comparisons"]] == ["kl_nats"]
    assert result["arms"][0]["metrics"]["accuracy"]["mean"] is None
    assert standings.table(result)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps": 3}, ("has 3 steps", "expected 4", "train.steps")),
        ({"lr": (0.1, 0.2)}, ("other learning rates", "one schedule", "another --workdir")),
        ({"digest": "b"}, ("digest b", "(a)", "another --workdir")),
        ({"index": [*range(1, 11)]}, ("graded on 10 prompts", "to pair them")),
    ],
)
def test_runs_that_do_not_pair_are_refused(tmp_path, changed, words):
    right = np.ones((10, 1), bool)
    jobs = []
    for arm, keys in (("full", {}), ("rock", changed)):
        write(tmp_path / arm, right=right, kl=1.0, shares=[0.0] * STEPS, **keys)
        jobs.append(arms.Job(arm, run_of(0), tmp_path / arm))
    with pytest.raises(workdirs.WorkdirError) as error:
        arms.summarise(jobs, "full")
    for word in words:
        assert word in str(error.value)


def test_runs_whose_prompts_are_used_up_are_equally_long(tmp_path):
    jobs = []
    for arm in ("full", "rock"):
        write(tmp_path / arm, right=[[1]], kl=1.0, shares=[0.0] * 3, steps=3)
        jobs.append(arms.Job(arm, run_of(0, data=spec.DataSpec(epochs=1)), tmp_path / arm))
    assert arms.summarise(jobs, "full")["comparisons"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], (None, None)),
        ([1.0, None], (None, None)),
        ([2.0], (2.0, None)),
        ([0.0, 0.0], (0.0, 1.0)),
        ([1.0, 1.0], (1.0, 0.5)),  # two signs; no p is 0
    ],
)
def test_over_seeds_says_nothing_it_does_not_know(values, expected):
    found = arms.over_seeds(values)
    assert (found["mean"], found["p"]) == expected


def test_the_table_shows_every_arm_and_the_note(made):
    result = arms.summarise(made[0], "full")
    lines = standings.table(result)
    assert "against full" in lines[0]
    assert lines[1].startswith("full ")
    assert "35.0%" in lines[2]
    accuracy, kl = result["comparisons"]
    assert f"{kl['delta']:+.4f} [{kl['low']:+.4f}, {kl['high']:+.4f}]" in lines[5]
    assert lines[2].endswith(accuracy["verdict"])
    row = result["arms"][1]["metrics"]["accuracy"]
    assert f"{row['mean']:.1%} [{row['low']:.1%}, {row['high']:.1%}]" in lines[2]
    points = [f"{100 * accuracy[key]:+.1f}" for key in ("delta", "low", "high")]
    assert f"{points[0]} [{points[1]}, {points[2]}]" in lines[2]
    assert "p >= 2 points" in lines[0]
    assert "p >= 5%" in lines[3]
    assert max(len(line) for line in lines) <= 132
    low, high = stats.wilson(0, PROBLEMS)  # as it was graded
    interval = f"[{low:.1%}, {high:.1%}]"
    assert lines[6] == f"before training: accuracy 25.0% {interval}, KL 2.0000 nats"
    assert " ".join(lines[7:]) == result["note"]
    assert all(math.isfinite(x["p_adjusted"]) for x in result["comparisons"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
