"""Moments against the raw state of a checkpoint, and tests that find what was planted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny_run

from opd_jax import optim
from opd_jax.instrument.corpus import Occurrences
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.studies import second_moments
from opd_jax.instrument.studies.second_moments import Moments, OptimizerError
from opd_jax.models import hf, params, transformer
from opd_jax.store import checkpoint
from opd_jax.store import workdir as workdirs

tiny, one_device = tiny_run.tiny, tiny_run.one_device
V, PROBLEMS, LENGTH = 200, 60, 400
RULE = Rule(min_count=2)
KEYS = dict(checkpoint__every=2, optim__b2=0.9)


def trained(tiny, path, **keys):
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert tiny_run.train(tiny, path, **keys) == 0
    return path


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    return trained(tiny, tmp_path_factory.mktemp("optimizer") / "run", **KEYS)


@pytest.mark.parametrize("step", [2, 4])
def test_moments_are_those_of_the_checkpoint(tiny, workdir, one_device, step):
    leaves, _, _ = tiny_run.saved(tiny, workdir, step, **KEYS)

    def leaf(part):
        (found,) = (x for name, x in leaves.items() if part in name and "layers" not in name)
        return found.astype(np.float64)

    first = leaf(".mu['embed']") / (1 - 0.9**step)
    second = leaf(".nu['embed']") / (1 - 0.9**step)  # b1 and b2 are equal here
    found = second_moments.moments(workdir, step)
    assert found.second_moment.shape == (640,)
    assert found.second_moment.dtype == np.float64
    np.testing.assert_allclose(found.second_moment, second.mean(1), rtol=1e-5)
    expected = (np.abs(first) / (np.sqrt(second) + 1e-8)).mean(1)
    np.testing.assert_allclose(found.effective_step, expected, rtol=1e-4)
    assert found.second_moment.max() > 0


def test_an_untied_head_has_moments_of_its_own(tmp_path):
    cfg = dataclasses.replace(tiny_run.MODEL, tied=False)
    weights = params.init(transformer.specs(cfg), jax.random.key(0))
    hf.save(tmp_path / "student", cfg, weights, tokenizer=None)
    spec = optim.OptimSpec(clip=0.0, steps=5)
    grads = jax.tree.map(jnp.zeros_like, weights)
    grads["head"] = jax.random.normal(jax.random.key(1), grads["head"].shape)
    opt = optim.make(spec).init(weights)
    _, opt = optim.make(spec).update(grads, opt, weights)
    with checkpoint.open(tmp_path) as saves:
        saves.save(1, {"opt": opt, "params": weights}, {})
    config = {"student.path": str(tmp_path / "student"), "student.param_dtype": "float32"}
    config |= {f"optim.{name}": value for name, value in dataclasses.asdict(spec).items()}
    workdirs.write_run(tmp_path, {"config": config})
    found = second_moments.moments(tmp_path, 1)
    expected = np.mean(np.asarray(grads["head"], np.float64) ** 2, axis=1)
    np.testing.assert_allclose(found.second_moment, expected, rtol=1e-5)
    np.testing.assert_allclose(found.effective_step, 1, rtol=1e-4)  # after one step: the sign


def test_the_two_decays_are_told_apart():
    spec = second_moments.OptimSpec(b1=0.5, b2=0.9, eps=1e-3)
    first, second = np.full((1, 2), 0.75, np.float32), np.full((1, 2), 0.76, np.float32)
    (nu,), (step,) = (
        np.asarray(x) for x in second_moments._rows(first, second, np.int32(2), spec=spec)
    )
    assert nu == pytest.approx(0.76 / 0.19)
    assert step == pytest.approx(1.0 / (2.0 + 1e-3))


def occurrences(token_id, kl):
    problem = np.repeat(np.arange(PROBLEMS, dtype=np.int32), LENGTH)
    zero = np.zeros(len(kl), np.float32)
    rest = [zero] * 4
    place = np.zeros_like(problem)
    return Occurrences(problem, problem, place, token_id, kl.astype(np.float32), *rest, V)


def planted(decrease_of, second_of, noise=0.3, seed=0):
    """A corpus before and after, and moments; functions of (expected count, KL by type, rng)."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, V + 1) ** 0.7
    token_id = rng.choice(V, PROBLEMS * LENGTH, p=share / share.sum()).astype(np.int32)
    # Training saw other text: the moments know how frequent a type is, not its count in this one.
    kl_V, count_V = rng.uniform(0.5, 2.0, V), share / share.sum() * len(token_id)
    decrease_V = decrease_of(count_V, kl_V, rng)
    luck_V = np.exp(rng.normal(0, noise, (PROBLEMS, V)))  # of a type in an answer
    kl = kl_V[token_id] * luck_V[np.repeat(np.arange(PROBLEMS), LENGTH), token_id]
    after = kl_V[token_id] * np.exp(-decrease_V)[token_id]
    found = Moments(second_of(count_V, kl_V, decrease_V, rng), rng.uniform(0.1, 1.0, V))
    return occurrences(token_id, kl), occurrences(token_id, after), found


def analysed(monkeypatch, workdir, before, after, found, **settings):
    monkeypatch.setattr(second_moments, "moments", lambda run_dir, step: found)
    settings = dict(k=10, vocab_size=V, rule=RULE, steps=[4], draws=500, seed=1) | settings
    return second_moments.run(workdir, before, after, **settings)


def rho(result, test, measure="second_moment"):
    (row,) = (r for r in result["tests"] if r["test"] == test and r["measure"] == measure)
    return row


def test_a_held_back_type_is_seen_at_equal_count(workdir, monkeypatch):
    case = planted(
        lambda count, kl, rng: rng.uniform(0, 2, V),
        lambda count, kl, decrease, rng: count * np.exp(-2 * decrease),
    )
    result = analysed(monkeypatch, workdir, *case)
    for given in ("", "_given_count", "_given_count_and_kl"):
        row = rho(result, f"with_decrease{given}")
        assert row["rho"] < -0.5
        assert row["p_adjusted"] < 0.05
    assert rho(result, "with_count")["rho"] > 0.1
    assert rho(result, "with_decrease_given_count", "effective_step")["p_adjusted"] > 0.05


def test_what_frequency_alone_does_goes_away_at_equal_count(workdir, monkeypatch):
    rejected = 0
    for seed in range(8):
        case = planted(
            lambda count, kl, rng: 4 - 1.3 * np.log10(count) + rng.normal(0, 0.3, V),
            lambda count, kl, decrease, rng: count * np.exp(rng.normal(0, 0.3, V)),
            seed=seed,
        )
        result = analysed(monkeypatch, workdir, *case)
        assert rho(result, "with_count")["rho"] > 0.7
        assert rho(result, "with_decrease")["rho"] < -0.45
        assert rho(result, "with_decrease")["p_adjusted"] < 0.05
        held = rho(result, "with_decrease_given_count")
        assert 0.6 < held["reliability"] < 0.95
        rejected += held["p"] <= 0.05
    assert rejected < 3  # of 8 at 5%: three or more in 6 of 1000


def test_luck_before_training_is_no_decrease(workdir, monkeypatch):
    # A second moment that follows the true KL, and nothing learned: at equal *measured* KL a large
    # moment means bad luck in measuring, which must not come back as a decrease.
    case = planted(
        lambda count, kl, rng: np.zeros(V),
        lambda count, kl, decrease, rng: kl,
        noise=2.0,
    )
    result = analysed(monkeypatch, workdir, *case)
    row = rho(result, "with_decrease_given_count_and_kl")
    assert row["types"] > 100
    assert row["p_adjusted"] > 0.05


def test_groups_have_their_medians_by_step(workdir, monkeypatch):
    case = planted(lambda c, k, rng: np.ones(V), lambda c, k, d, rng: np.arange(V) + 1.0)
    result = analysed(monkeypatch, workdir, *case, steps=None, vocab_size=V - 5)
    assert result["steps"] == [2, 4]
    groups = {row["group"]: row for row in result["groups"]}
    assert list(groups) == ["rock", "control", "high_kl", "rest", "unseen"]
    kl_sum = np.bincount(case[0].token_id, case[0].kl.astype(float), minlength=V)
    rocks = np.argsort(-kl_sum)[:10]
    assert groups["rock"]["second_moment"] == [float(np.median(rocks + 1.0))] * 2
    share = np.isin(case[0].token_id, rocks).mean()
    assert groups["rock"]["token_share"] == pytest.approx(share)
    assert groups["unseen"]["types"] == 0
    assert groups["unseen"]["second_moment"] == [None, None]
    assert "tied" in result["note"]
    assert "b2=0.9" in result["note"]
    assert result["optimizer"]["name"] == "adamw"
    json.dumps(result, allow_nan=False)
    raw = [row["p"] for row in result["tests"]]
    adjusted = [row["p_adjusted"] for row in result["tests"]]
    np.testing.assert_allclose(adjusted, scipy.stats.false_discovery_control(raw))


def test_unseen_rows_leave_the_padding_out(workdir, monkeypatch):
    before, after, found = planted(lambda c, k, r: np.ones(V), lambda c, k, d, r: np.ones(V))
    chosen = before.token_id < 150
    case = before.where(chosen), after.where(chosen), found
    result = analysed(monkeypatch, workdir, *case, vocab_size=190)
    assert result["groups"][-1]["types"] == 40


def test_a_real_run_from_checkpoint_to_result(workdir, one_device):
    rng = np.random.default_rng(0)
    token_id = rng.integers(0, 40, 2000).astype(np.int32)
    problem = np.repeat(np.arange(20, dtype=np.int32), 100)
    zero = np.zeros(2000, np.float32)
    before, after = (
        Occurrences(problem, problem, problem, token_id, rng.exponential(size=2000), *[zero] * 4,
                    vocab_size=640)
        for _ in range(2)
    )  # fmt: skip
    result = second_moments.run(workdir, before, after, k=5, vocab_size=640, rule=RULE, draws=50)
    found = second_moments.moments(workdir, 4)
    assert result["groups"][-1]["second_moment"][1] == np.median(found.second_moment[40:])
    assert result["groups"][-1]["types"] == 600


def test_scores_of_two_corpora_are_refused(workdir):
    before, after, _ = planted(lambda c, k, r: np.ones(V), lambda c, k, d, r: np.ones(V))
    with pytest.raises(OptimizerError, match=r"24000 positions before and 10 .*score the same"):
        second_moments.run(
            workdir, before, after.where(np.arange(10)), k=5, vocab_size=V, rule=RULE
        )


def test_a_step_without_checkpoint_is_named(workdir):
    before, after, _ = planted(lambda c, k, r: np.ones(V), lambda c, k, d, r: np.ones(V))
    with pytest.raises(OptimizerError, match=r"steps \[2, 4\], not of \[3\].*give other steps"):
        second_moments.run(workdir, before, after, k=5, vocab_size=V, rule=RULE, steps=[3])


@pytest.mark.parametrize("name", ["sgd", "signsgd"])
def test_other_optimizers_train_and_have_no_second_moment(tiny, tmp_path, name):
    path = trained(tiny, tmp_path / name, optim__name=name, train__steps=2, optim__lr=1e-3)
    lines = tiny_run.read_lines(path / "metrics.jsonl")
    assert len(lines) == 2
    assert all(np.isfinite(line["loss"]) for line in lines)
    with pytest.raises(OptimizerError, match=rf"'{name}', which keeps no second.*'adamw'.*give"):
        second_moments.moments(path, 2)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(workdirs.WorkdirError, match=r"has no run\.json"):
        second_moments.moments(tmp_path, 1)
    assert not list(tmp_path.iterdir())
