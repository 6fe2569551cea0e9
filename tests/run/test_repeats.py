"""Evaluation seeds of a sweep: measured beside the runs, averaged within them, and resumable."""

import json
import shutil

import numpy as np
import pytest
import tiny_run

from opd_jax.run import repeats, sweep, train
from opd_jax.spec import ConfigError
from opd_jax.store import workdir as workdirs

tiny, one_device = tiny_run.tiny, tiny_run.one_device
pytestmark = pytest.mark.usefixtures("one_device")
FILE = """
import runpy

from opd_jax import config


def get_config(arg=""):
    args = config.parse_arg(arg, arm="full")
    c = runpy.run_path({base!r})["get_config"]()
    c.train.steps = 2
    c.eval.every, c.eval.prompts, c.eval.kl_prompts, c.eval.batch = 2, 8, 8, 8
    c.eval.temperature, c.eval.grader = 1.0, {grader!r}
    if args.arm == "ema":
        c.rock.mode, c.rock.top_k, c.rock.start = "ema", 4, 1
    return c
"""
GRADER = "def even(text, gold):\n    return sum(map(ord, text)) % 2 == 0\n"


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "graders.py").write_text(GRADER)
    path = folder / "arms.py"
    text = FILE.format(base=str(tiny / "config.py"), grader=f"{folder / 'graders.py'}:even")
    path.write_text(text)
    return path


def argv(file, workdir, *flags, eval_seeds=3, seeds=2):
    flags = [*flags, f"--eval-seeds={eval_seeds}", f"--seeds={seeds}"]
    return [f"--config={file}", "--arms=full,ema", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert sweep.main(argv(file, workdir)) == 0
    return workdir


def read(path):
    return json.loads(path.read_text())


def test_a_run_is_the_mean_of_its_evaluations(whole):
    result = read(whole / "sweep.json")
    spreads = {"accuracy": [], "kl_nats": []}
    for row in result["arms"]:
        assert row["evaluation_seeds"] == [0, 1, 2]
        for number, seed in enumerate((0, 1)):
            folder = whole / row["arm"] / f"seed-{seed}"
            own = [read(folder / "summary.json")["after"]]
            own += [read(folder / f"evaluations/seed-{n}.json")["result"] for n in (1, 2)]
            for name in ("accuracy", "kl_nats", "mean_length"):
                values = [found[name] for found in own]
                assert row["metrics"][name]["values"][number] == pytest.approx(np.mean(values))
            assert len({found["kl_nats"] for found in own}) == 3  # other draws each time
    for name in spreads:
        for row in result["arms"]:
            per_run = []
            for seed in (0, 1):
                folder = whole / row["arm"] / f"seed-{seed}"
                own = [read(folder / "summary.json")["after"][name]]
                own += [read(repeats.path(folder, n))["result"][name] for n in (1, 2)]
                per_run.append(np.var(own, ddof=1))
            expected = np.sqrt(np.mean(per_run))
            assert row["metrics"][name]["evaluation_sd"] == pytest.approx(expected)
    assert "each run evaluated 3 times, averaged" in result["note"]


def test_problems_pair_by_their_mean_over_evaluations(whole):
    result = read(whole / "sweep.json")
    accuracy = next(row for row in result["comparisons"] if row["metric"] == "accuracy")
    means = {}
    for arm in ("full", "ema"):
        right = []
        for seed in (0, 1):
            folder = whole / arm / f"seed-{seed}"
            lines = [tiny_run.read_lines(folder / "graded.jsonl")[-1]]
            lines += [read(repeats.path(folder, n)) for n in (1, 2)]
            assert len({json.dumps(line["index"]) for line in lines}) == 1
            right.append(np.mean([np.mean(line["correct"], axis=1) for line in lines], axis=0))
        means[arm] = np.mean(right)
    assert accuracy["delta"] == pytest.approx(means["ema"] - means["full"])


def test_evaluation_seed_0_is_the_runs_own_draw(tiny, whole, file, monkeypatch):
    """The number alone makes the difference: 0 measured again gives what the run wrote."""
    folder = whole / "full" / "seed-0"
    run = sweep._resolve(str(file), "full", [])
    path = repeats.path(folder, 7)
    key = repeats.heldout.evaluation_key
    with monkeypatch.context() as patch:
        patch.setattr(repeats.heldout, "evaluation_key", lambda seed, number=0: key(seed))
        assert repeats.measure(run, folder, [7])
    try:
        found, own = read(path), read(folder / "summary.json")["after"]
        assert found["result"] == pytest.approx(own, nan_ok=True)
        last = tiny_run.read_lines(folder / "graded.jsonl")[-1]
        assert (found["correct"], found["text"]) == (last["correct"], last["text"])
    finally:
        path.unlink()


def test_a_run_with_adapters_is_evaluated_with_them_merged(file, tmp_path):
    """Its checkpoint holds the adapters alone; evaluation 0 again is the run's own."""
    flags = ("--config.lora.rank=2", "--arms=full")
    assert sweep.main(argv(file, tmp_path, *flags, eval_seeds=2, seeds=1)) == 0
    folder = tmp_path / "full" / "seed-0"
    own, other = read(folder / "summary.json")["after"], read(repeats.path(folder, 1))["result"]
    assert own["kl_nats"] != other["kl_nats"]
    run = sweep._resolve(str(file), "full", ["--config.lora.rank=2"])
    key = repeats.heldout.evaluation_key
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats.heldout, "evaluation_key", lambda seed, number=0: key(seed))
        assert repeats.measure(run, folder, [7])
    assert read(repeats.path(folder, 7))["result"] == pytest.approx(own, nan_ok=True)


def test_more_seeds_are_measured_without_training_again(whole, file, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "sweep"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "ema" / "seed-1" / "evaluations")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("seed-?.json")}
    monkeypatch.setattr(train, "train", lambda *args, **keys: pytest.fail("trained again"))
    assert sweep.main(argv(file, copy)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "4 runs, 3 of them finished" in capsys.readouterr().out
    same = [read(place / "sweep.json") for place in (whole, copy)]
    assert same[0]["comparisons"] == same[1]["comparisons"]
    assert sweep.main(argv(file, copy, eval_seeds=1)) == 0
    found = read(copy / "sweep.json")
    assert [row["evaluation_seeds"] for row in found["arms"]] == [[0], [0]]
    assert "evaluation_sd" not in found["arms"][0]["metrics"]["kl_nats"]


def test_a_damaged_or_foreign_evaluation_is_named(whole, file, tmp_path):
    copy = tmp_path / "sweep"
    shutil.copytree(whole, copy)
    path = copy / "ema" / "seed-0" / "evaluations" / "seed-1.json"
    good = read(path)
    path.write_text("{")
    with pytest.raises(workdirs.WorkdirError, match=r"seed-1\.json"):
        sweep.main(argv(file, copy))
    path.write_text(json.dumps(good | {"index": good["index"][::-1]}))
    with pytest.raises(workdirs.WorkdirError, match="of other prompts"):
        sweep.main(argv(file, copy))
    path.write_text(json.dumps(good | {"step": 1}))  # of an earlier end: measured again
    assert sweep.main(argv(file, copy)) == 0
    assert read(path) == good


def test_the_teacher_is_measured_once_a_sweep(whole, file, tmp_path, capsys):
    files = sorted(whole.rglob("teacher.json"))
    assert len(files) == 4
    assert len({path.read_text() for path in files}) == 1  # draws would differ by the run's seed
    other = tmp_path / "other"
    flags = argv(file, other, "--config.eval.max_new=3", eval_seeds=1, seeds=1)
    shutil.copytree(whole / "full", other / "lent")  # asked otherwise: not taken over
    assert sweep.main(flags) == 0
    found = {path.read_text() for path in (other / "ema").rglob("teacher.json")}
    assert found != {files[0].read_text()}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--eval-seeds=0", ("eval_seeds 0", "at least 1", "--eval-seeds")),
        ("--at-once=0", ("at_once 0", "at least 1", "--at-once")),
        ("--only=full/seed-9", ("'full/seed-9'", "full/seed-0, ema/seed-0", "--only")),
    ],
)
def test_flags_that_make_no_sense_are_refused(file, tmp_path, flag, words):
    with pytest.raises(ConfigError) as error:
        sweep.main([*argv(file, tmp_path / "sweep"), flag])
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "sweep").exists()
