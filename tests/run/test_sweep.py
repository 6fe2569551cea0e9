"""The sweep end to end on tiny runs: what it trains, goes on with, compares and refuses."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
import tiny_run
from scipy import stats as reference

from opd_jax.run import budget, comparable, sweep, train
from opd_jax.spec import ConfigError
from opd_jax.store import checkpoint
from opd_jax.store import workdir as workdirs

tiny, one_device = tiny_run.tiny, tiny_run.one_device
pytestmark = pytest.mark.usefixtures("one_device")
ARMS = """
from pathlib import Path
import runpy

from opd_jax import config


def get_config(arg=""):
    args = config.parse_arg(arg, arm="full", norm="tokens", k=4)
    c = runpy.run_path({base!r})["get_config"]()
    c.train.normaliser = args.norm
    c.eval.every, c.eval.prompts, c.eval.kl_prompts, c.eval.batch = 4, 8, 8, 8
    if args.arm == "ema":
        c.rock.mode, c.rock.top_k, c.rock.start = "ema", args.k, 1
    if args.arm in ("first", "tip"):
        c.position.mode, c.position.keep, c.position.window = args.arm, 0.5, 2
        c.prediction = "no better than chance" if args.arm == "tip" else ""
    if args.arm == "random":
        c.rock.mode, c.rock.share, c.rock.start = "random", 0.3, 1
    if args.arm == "fast":
        c.optim.lr = 1.0
    return c
"""


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    """A config file with arms."""
    path = tmp_path_factory.mktemp("config") / "arms.py"
    path.write_text(ARMS.format(base=str(tiny / "config.py")))
    return path


def argv(file, workdir, *flags, arms="full,ema", seeds=2):
    return [
        f"--config={file}",
        f"--arms={arms}",
        f"--seeds={seeds}",
        f"--workdir={workdir}",
        *flags,
    ]


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    """The workdir of two arms and two seeds, run without a break."""
    workdir = tmp_path_factory.mktemp("whole") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert sweep.main(argv(file, workdir)) == 0
    return workdir


def result_of(workdir):
    return json.loads((workdir / "sweep.json").read_text())


def without_clock(result, workdir):
    text = json.dumps(result).replace(str(workdir), "")
    plain = json.loads(text)
    for row in plain["arms"]:
        del row["metrics"]["seconds"], row["metrics"]["step_s"]
    return plain


def test_every_run_is_an_ordinary_workdir(whole):
    folders = sorted(str(path.parent.relative_to(whole)) for path in whole.rglob("run.json"))
    assert folders == ["ema/seed-0", "ema/seed-1", "full/seed-0", "full/seed-1"]
    for name in folders:
        record = workdirs.read_run(whole / name)
        assert record["config"]["rock.mode"] == ("ema" if name.startswith("ema") else "off")
        assert record["config"]["seed"] == record["seed"] == int(name[-1])
        assert record["command"][:2] == ["opd-jax", "sweep"]
        with checkpoint.open(whole / name) as saves:
            assert saves.steps() == [4]


def test_the_numbers_are_those_of_the_runs(whole):
    result = result_of(whole)
    assert result["baseline"] == "full"
    after, right, shares = {}, {}, {}
    for row in result["arms"]:
        folders = [whole / row["arm"] / f"seed-{seed}" for seed in (0, 1)]
        assert row["runs"] == [str(folder) for folder in folders]
        after[row["arm"]] = [json.loads((f / "summary.json").read_text())["after"] for f in folders]
        right[row["arm"]] = [
            np.asarray(tiny_run.read_lines(f / "graded.jsonl")[-1]["correct"]).mean(axis=1)
            for f in folders
        ]
        lines = [tiny_run.read_lines(f / "metrics.jsonl") for f in folders]
        shares[row["arm"]] = np.mean(
            [[x["gated_share"] for x in run if "loss" in x and x["step"] > 1] for run in lines]
        )
        for name in ("accuracy", "kl_nats", "mean_length"):
            values = [found[name] for found in after[row["arm"]]]
            assert row["metrics"][name]["values"] == values
            assert row["metrics"][name]["mean"] == pytest.approx(np.mean(values))
        assert row["masked_share"] == pytest.approx(shares[row["arm"]])
    assert shares["full"] == 0 < shares["ema"]
    accuracy, kl = result["comparisons"]
    pairs = [[found["kl_nats"] for found in after[arm]] for arm in ("full", "ema")]
    assert kl["delta"] == pytest.approx(np.subtract(pairs[1], pairs[0]).mean())
    assert kl["p"] == pytest.approx(reference.ttest_rel(pairs[1], pairs[0]).pvalue)
    assert accuracy["delta"] == pytest.approx(np.mean(right["ema"]) - np.mean(right["full"]))
    for side, arm in ((after["full"], "full"), (after["ema"], "ema")):
        assert [x["accuracy"] for x in side] == pytest.approx([x.mean() for x in right[arm]])
    before = [json.loads((whole / f"full/seed-{i}/summary.json").read_text()) for i in (0, 1)]
    assert result["start"]["kl_nats"] == pytest.approx(
        np.mean([found["before"]["kl_nats"] for found in before])
    )


def test_a_finished_sweep_runs_nothing_again(whole, file, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("run.json")}
    monkeypatch.setattr(train, "train", lambda *args, **keys: pytest.fail("ran again"))
    old = result_of(whole)
    assert sweep.main(argv(file, whole)) == 0
    assert result_of(whole) == old
    assert before == {path: path.stat().st_mtime_ns for path in before}
    out = capsys.readouterr().out
    assert "4 runs, 4 of them finished" in out
    assert "against full" in out


def test_fewer_arms_and_seeds_of_a_sweep_are_compared_alone(whole, file, tmp_path):
    old = result_of(whole)
    try:
        assert sweep.main(argv(file, whole, "--baseline=ema", seeds=1)) == 0
        found = result_of(whole)
    finally:
        (whole / "sweep.json").write_text(json.dumps(old))
    assert found["baseline"] == "ema"
    assert [row["seeds"] for row in found["arms"]] == [[0], [0]]


def test_sigterm_stops_the_sweep_and_the_same_command_goes_on(
    file, whole, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "sweep"
    step = train._Loop._step

    def stopped(self, state, batch, index):
        result = step(self, state, batch, index)
        if self.folder.parts[-2:] == ("ema", "seed-0") and index == 1:
            signal.raise_signal(signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "_step", stopped)
        assert sweep.main(argv(file, workdir)) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM, 3 runs left" in capsys.readouterr().out
    assert not (workdir / "sweep.json").exists()
    assert not (workdir / "full" / "seed-1").exists()
    assert sweep.main(argv(file, workdir)) == 0
    assert "at step 2" in capsys.readouterr().out
    assert without_clock(result_of(workdir), workdir) == without_clock(result_of(whole), whole)


def test_a_signal_at_the_end_of_a_run_stops_the_next(file, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "sweep"
    handler = signal.getsignal(signal.SIGTERM)
    summary = train._Loop._summary

    def stopped(self, state, step, *, is_finished):
        signal.raise_signal(signal.SIGTERM)
        return summary(self, state, step, is_finished=is_finished)

    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "_summary", stopped)
        assert sweep.main(argv(file, workdir, seeds=1)) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM, 1 runs left" in capsys.readouterr().out
    assert [path.parent.name for path in workdir.rglob("run.json")] == ["seed-0"]
    assert signal.getsignal(signal.SIGTERM) == handler
    assert sweep.main(argv(file, workdir, seeds=1)) == 0
    assert "2 runs, 1 of them finished" in capsys.readouterr().out


def test_a_run_that_was_killed_is_gone_on_with(file, whole, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    workdir = tmp_path / "sweep"
    step = train._Loop._step

    def killed(self, state, batch, index):
        if self.folder.parts[-2:] == ("ema", "seed-1") and index == 3:
            raise Killed
        return step(self, state, batch, index)

    flags = argv(file, workdir, "--config.checkpoint.every=2")
    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "_step", killed)
        with pytest.raises(Killed):
            sweep.main(flags)
    assert sweep.main(flags) == 0
    resumed = [bool(workdirs.read_run(p.parent).get("resumed")) for p in workdir.rglob("run.json")]
    assert sum(resumed) == 1
    assert without_clock(result_of(workdir), workdir) == without_clock(result_of(whole), whole)


def test_an_arm_may_give_the_file_further_arguments(file, tmp_path):
    workdir = tmp_path / "sweep"
    arms = "full,full:norm=weight,ema:k=2:norm=weight"
    assert sweep.main(argv(file, workdir, "--config.train.steps=4", arms=arms, seeds=1)) == 0
    rows = result_of(workdir)["arms"]
    assert [row["normaliser"] for row in rows] == ["tokens", "weight", "weight"]
    record = workdirs.read_run(workdir / "ema-k=2-norm=weight" / "seed-0")
    assert record["config"]["rock.top_k"] == 2


def test_a_finished_run_of_another_evaluation_is_refused(whole, file):
    with pytest.raises(workdirs.WorkdirError, match=r"eval.prompts: .* 8, now it is 4"):
        sweep.main(argv(file, whole, "--config.eval.prompts=4"))


def test_runs_of_fewer_steps_are_gone_on_with_all_or_none(file, tmp_path):
    workdir = tmp_path / "sweep"
    short, long = "--config.train.steps=2", "--config.train.steps=4"
    assert sweep.main(argv(file, workdir, short, seeds=1)) == 0
    with pytest.raises(workdirs.WorkdirError, match=r"2, then 4 for .* and 4 for .*k=2/seed-0: ex"):
        sweep.main(argv(file, workdir, long, arms="full,ema,ema:k=2", seeds=1))
    assert not (workdir / "ema-k=2").exists()
    assert sweep.main(argv(file, workdir, long, seeds=1)) == 0
    assert sweep.main(argv(file, workdir, long, seeds=1)) == 0
    assert (
        workdirs.read_run(workdir / "ema" / "seed-0")["resumed"][-1]["changed"]["train.steps"] == 4
    )


@pytest.mark.parametrize(
    ("flags", "arms", "words"),
    [
        ([], "full,fast", ("full and fast cannot be compared", "optim.lr: 0.01 in full, 1.0 in")),
        ([], "full,full", ("'full,full'", "different names", "--arms")),
        ([], ",", ("expected different names", "--arms")),
        ([], "full,a/b", ("'full,a/b'", "--arms")),
        (["--baseline=rock"], "full,ema", ("baseline 'rock'", "full, ema", "--baseline")),
        (["--config.seed=3"], "full,ema", ("--config.seed", "--seeds")),
        (["--config.eval.every=0"], "full,ema", ("eval.every is 0", "--config.eval.every")),
        (["--wrkdir=x"], "full,ema", ("wrkdir",)),
        (["--seeds=0"], "full,ema", ("seeds 0", "expected 1 to", "--seeds")),
        ([], "full,ema:q=1", ("'q'", "expected one of")),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    file, tmp_path, flags, arms, words
):
    with pytest.raises(ConfigError) as error:
        sweep.main(argv(file, tmp_path / "sweep", *flags, arms=arms))
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_the_workdir_of_a_run_is_no_place_for_a_sweep(whole, file):
    run = whole / "full" / "seed-0"
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(workdirs.WorkdirError, match="seed-0 is the workdir of a run: expected a"):
        sweep.main(argv(file, run))
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


@pytest.mark.parametrize(("arms", "seeds"), [("full,ema", [0]), (["full"], 2)])
def test_from_python_arms_and_seeds_are_lists(file, tmp_path, arms, seeds):
    with pytest.raises(ConfigError, match=r"expected lists, such as \['full', 'rock'\] and range"):
        sweep.sweep(str(file), arms, seeds, str(tmp_path / "sweep"))


def test_a_seed_counts_once(file, tmp_path):
    with pytest.raises(ConfigError, match=r"seeds \[1, 1\]: expected different ones"):
        sweep.sweep(str(file), ["full"], [1, 1], str(tmp_path / "sweep"))


def test_a_config_file_without_arms_is_refused(tiny, tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(
        "from opd_jax import config\n\n\ndef get_config(arg=''):\n"
        "    config.parse_arg(arg, steps=1)\n    return config.defaults()\n"
    )
    with pytest.raises(ConfigError, match=r"config argument 'arm' is not known.*'steps'"):
        sweep.main(argv(path, tmp_path / "sweep"))


def test_arms_may_differ_in_gate_and_normaliser_alone(tiny):
    base = tiny_run.resolved(tiny)
    gated = tiny_run.resolved(tiny, rock__mode="ema", train__normaliser="weight")
    comparable.check_comparable("a", base, "b", gated)
    with pytest.raises(ConfigError, match=r"train.prompts: 4 in a, 2 in b\n.*give the arms"):
        comparable.check_comparable("a", base, "b", tiny_run.resolved(tiny, train__prompts=2))


def test_arms_that_weigh_positions_bring_their_controls(file, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    assert sweep.main(argv(file, workdir, arms="full,first,tip", seeds=2)) == 0
    result = result_of(workdir)
    assert [row["arm"] for row in result["arms"]] == [
        *("full", "first", "first_shuffled", "tip", "tip_shuffled"),
    ]
    assert result["predictions"] == {"tip": "no better than chance"}
    rows = {(row["arm"], row["metric"]): row for row in result["budget"]}
    assert {*rows} == {(a, m) for a in ("first", "tip") for m in ("accuracy", "kl_nats")}
    for arm in ("first", "tip"):
        row = rows[arm, "kl_nats"]
        assert row["against"] == f"{arm}_shuffled"
        own, other = (next(r for r in result["arms"] if r["arm"] == name)["metrics"]["kl_nats"]
                      for name in (arm, f"{arm}_shuffled"))  # fmt: skip
        assert row["delta"] == pytest.approx(own["mean"] - other["mean"], abs=1e-6)
        for seed in (0, 1):  # the budget is equal batch by batch, until the answers differ
            lines = [
                tiny_run.read_lines(workdir / name / f"seed-{seed}" / "metrics.jsonl")
                for name in (arm, f"{arm}_shuffled")
            ]
            first = [next(line for line in side if "loss" in line) for side in lines]
            assert first[0]["kept_share"] == first[1]["kept_share"] < 1
            assert first[0]["loss"] != first[1]["loss"]
    said = capsys.readouterr().out
    assert "tip_shuffled, its control of equal budget, is run too" in said
    assert "against the same weights dealt to positions at random" in said
    assert "predicted of tip: no better than chance" in said
    record = workdirs.read_run(workdir / "tip" / "seed-0")
    assert record["config"]["prediction"] == "no better than chance"
    assert sweep.main(argv(file, tmp_path / "b", "--no-controls", arms="full,tip", seeds=1)) == 0
    assert len(result_of(tmp_path / "b")["arms"]) == 2


def test_a_gate_on_types_stands_beside_as_many_positions_at_random(file, whole, tmp_path, capsys):
    assert sweep.main(argv(file, whole)) == 0
    assert "ema: no arm gates as many positions at random" in capsys.readouterr().out
    assert result_of(whole)["budget"] == []
    workdir = tmp_path / "sweep"
    shutil.copytree(whole, workdir)
    assert sweep.main(argv(file, workdir, arms="full,ema,random")) == 0
    said, result = capsys.readouterr().out, result_of(workdir)
    assert "no arm gates" not in said
    assert "ema random" in said
    right, kl = {}, {}
    for arm in ("ema", "random"):
        folders = [workdir / arm / f"seed-{seed}" for seed in (0, 1)]
        lines = [tiny_run.read_lines(f / "graded.jsonl")[-1] for f in folders]
        right[arm] = np.mean([np.mean(line["correct"]) for line in lines])
        kl[arm] = [
            json.loads((f / "summary.json").read_text())["after"]["kl_nats"] for f in folders
        ]
    accuracy, nats = result["budget"]
    assert [(row["arm"], row["against"]) for row in (accuracy, nats)] == [("ema", "random")] * 2
    assert accuracy["delta"] == pytest.approx(right["ema"] - right["random"])
    assert nats["delta"] == pytest.approx(np.subtract(kl["ema"], kl["random"]).mean())
    assert nats["p"] == pytest.approx(reference.ttest_rel(kl["ema"], kl["random"]).pvalue)
    masked = {row["arm"]: row["masked_share"] for row in result["arms"]}
    assert nats["masked_share"] == masked["ema"]
    assert nats["masked_share_against"] == masked["random"]


def test_only_a_gate_on_the_same_schedule_is_a_control(tiny):
    def run(mode, **rock):
        rock = {f"rock__{name}": value for name, value in rock.items()}
        return tiny_run.resolved(tiny, rock__mode=mode, **rock)

    dealt, ema = run("random", share=0.3), run("ema", top_k=4)
    assert budget.contrasts({"ema": ema, "dealt": dealt}, {}) == ([("ema", "dealt")], [])
    told = dataclasses.replace(dealt, prediction="the same")
    assert budget.contrasts({"ema": ema, "dealt": told}, {}) == ([("ema", "dealt")], [])
    for changed in ({"inside": 0.5}, {"start": 2}, {"ramp": 2}, {"until": 3}):
        other = run("random", share=0.3, **changed)
        assert budget.contrasts({"ema": ema, "dealt": other}, {}) == ([], ["ema"]), changed
    other = dataclasses.replace(dealt, train=dataclasses.replace(dealt.train, normaliser="weight"))
    assert budget.contrasts({"ema": ema, "dealt": other}, {}) == ([], ["ema"])
    assert budget.contrasts({"off": run("off"), "dealt": dealt}, {}) == ([], [])


def test_plain_distillation_is_always_in(file, whole, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    shutil.copytree(whole, workdir)
    (workdir / "sweep.json").unlink()
    assert sweep.main(argv(file, workdir, arms="ema")) == 0
    assert "full, plain distillation, is run too" in capsys.readouterr().out
    assert result_of(workdir)["comparisons"] == result_of(whole)["comparisons"]
    assert sweep.main(argv(file, workdir, "--baseline=full", arms="ema")) == 0
    assert sweep.main(argv(file, workdir, "--no-controls", arms="ema")) == 0
    assert [row["arm"] for row in result_of(workdir)["arms"]] == ["ema"]


@pytest.mark.parametrize(
    ("arms", "expected", "plain"),
    [
        ("ema,other", ["ema", "other"], "other"),  # which is plain distillation by another name
        ("ema:norm=weight", ["full:norm=weight", "ema:norm=weight"], "full:norm=weight"),
        ("ema:norm=weight,ema", ["full", "ema:norm=weight", "ema"], "full"),
        ("ema:k=2,full:norm=weight", ["full", "ema:k=2", "full:norm=weight"], "full"),
    ],
)
def test_plain_distillation_is_found_or_made(file, arms, expected, plain):
    runs = {arm: sweep._resolve(str(file), arm, []) for arm in arms.split(",")}
    found, name = sweep._with_plain(str(file), runs, [])
    assert ([*found], name) == (expected, plain)


def test_a_file_without_plain_distillation_says_so(tiny, tmp_path, capsys):
    path = tmp_path / "gates.py"
    refused = '    if args.arm == "full":\n        raise config.ConfigError("no such arm")\n'
    plain = ARMS.format(base=str(tiny / "config.py"))
    path.write_text(plain.replace("    c = runpy", f"{refused}    c = runpy"))
    runs = {"ema": sweep._resolve(str(path), "ema", [])}
    assert sweep._with_plain(str(path), runs, []) == (runs, "")
    assert "without plain distillation" in capsys.readouterr().out


def test_margins_come_from_the_config_or_a_flag_and_the_teacher_stands_beside(
    file, whole, tmp_path, capsys
):
    copy = tmp_path / "sweep"
    shutil.copytree(whole, copy)
    assert sweep.main(argv(file, copy, "--config.eval.margin=0.3")) == 0
    found = result_of(copy)
    assert found["margins"] == {"accuracy": 0.3, "kl": 0.05}
    teacher = json.loads((copy / "full" / "seed-0" / "teacher.json").read_text())["result"]
    assert found["teacher"] == teacher
    told = capsys.readouterr().out
    assert f"the teacher: accuracy {teacher['accuracy']:.1%} [" in told
    assert "full: 100.0% of the answers hold none that can be read" in told
    flags = ("--config.eval.margin=0.3", "--margin=0.4", "--margin-kl=0.2")
    assert sweep.main(argv(file, copy, *flags)) == 0
    assert result_of(copy)["margins"] == {"accuracy": 0.4, "kl": 0.2}
