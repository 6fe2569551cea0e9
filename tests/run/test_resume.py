"""A run that is stopped, killed or damaged goes on to the same bits."""

import contextlib
import json
import shutil
import signal
import time

import numpy as np
import pytest
import tiny_run

from opd_jax.run import train
from opd_jax.store import workdir as workdirs

tiny = tiny_run.tiny
pytestmark = pytest.mark.usefixtures("one_device")
one_device = tiny_run.one_device
PLAN = {
    "train__steps": 4,
    "checkpoint__every": 2,
    "rock__mode": "ema",
    "rock__top_k": 8,
    "eval__every": 2,
    "eval__batch": 8,
}
DEADLINE_S = 240.0  # for a cold start of a child on a busy machine


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert tiny_run.train(tiny, workdir, **PLAN) == 0
    return workdir


def assert_same_run(tiny, workdir, whole):
    found, rest, step = tiny_run.saved(tiny, workdir, **PLAN)
    expected, expected_rest, expected_step = tiny_run.saved(tiny, whole, **PLAN)
    assert step == expected_step == 4
    assert found.keys() == expected.keys()
    for part in (".params", ".opt", ".rock", ".key", ".step"):
        assert any(name.startswith(part) for name in found), part
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    assert rest["data"] == expected_rest["data"]
    assert tiny_run.curve(workdir) == tiny_run.curve(whole)
    for name in ("rocks.jsonl", "graded.jsonl"):
        assert tiny_run.read_lines(workdir / name) == tiny_run.read_lines(whole / name), name


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


@contextlib.contextmanager
def after_step(monkeypatch, number, act):
    """Call ``act`` at the end of step ``number``."""

    def step(self, state, batch, index, run=train._Loop._step):
        result = run(self, state, batch, index)
        if index + 1 == number:
            act()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "_step", step)
        yield


def test_sigterm_saves_exits_143_and_resumes_bit_for_bit(
    tiny, tmp_path, whole, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    with after_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM)):
        assert tiny_run.train(tiny, workdir, **PLAN) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step 3, saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == handler
    assert tiny_run.saved(tiny, workdir, **PLAN)[2] == 3
    assert tiny_run.train(tiny, workdir, **PLAN) == 0
    assert "at step 3" in capsys.readouterr().out
    assert_same_run(tiny, workdir, whole)


def test_sigterm_in_the_last_step_leaves_its_evaluation_to_the_resume(
    tiny, tmp_path, whole, monkeypatch
):
    workdir = tmp_path / "run"
    with after_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM)):
        assert tiny_run.train(tiny, workdir, **PLAN) == 128 + signal.SIGTERM
    stopped = summary(workdir)
    assert (stopped["steps"], stopped["is_finished"]) == (4, False)
    assert tiny_run.train(tiny, workdir, **PLAN) == 0
    assert_same_run(tiny, workdir, whole)
    assert summary(workdir)["after"] == summary(whole)["after"] != stopped["after"]
    kept = [tiny_run.saved(tiny, folder, **PLAN)[1] for folder in (workdir, whole)]
    assert kept[0]["latest"] == kept[1]["latest"]


def test_a_run_without_steps_is_evaluated_once(tiny, tmp_path):
    workdir = tmp_path / "run"
    assert tiny_run.train(tiny, workdir, **(PLAN | {"train__steps": 0, "rock__mode": "off"})) == 0
    assert [line["step"] for line in tiny_run.curve(workdir)] == [0]
    result = summary(workdir)
    assert result["after"] == result["before"]
    assert result["after"]["kl_nats"] > 0


def test_a_run_whose_prompts_are_used_up_stays_as_it_is(tiny, tmp_path, capsys):
    workdir = tmp_path / "run"
    keys = {"train__steps": 4, "data__epochs": 1}  # 12 prompts are 3 steps
    assert tiny_run.train(tiny, workdir, **keys) == 0
    before = summary(workdir)
    assert (before["steps"], before["is_finished"]) == (3, True)
    assert tiny_run.train(tiny, workdir, **keys) == 0
    assert "its prompts are used up" in capsys.readouterr().out.rpartition("resuming")[2]
    assert summary(workdir) == before


def test_kill_9_after_a_save_resumes_bit_for_bit(tiny, tmp_path, whole):
    workdir = tmp_path / "run"
    child = tiny_run.start(tiny, workdir, **PLAN)
    lines = workdir / "metrics.jsonl"
    try:
        first = time.monotonic()
        while not ((workdir / "checkpoints" / "2").is_dir() and lines.read_text().count("\n") == 5):
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() - first < DEADLINE_S
            time.sleep(0.05)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert [line["step"] for line in tiny_run.read_lines(lines)] == [0, 1, 2, 2, 3]
    assert tiny_run.train(tiny, workdir, **PLAN) == 0
    assert_same_run(tiny, workdir, whole)


def test_a_damaged_newest_checkpoint_falls_back(tiny, tmp_path, whole, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    newest = workdir / "checkpoints" / "4"
    largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert tiny_run.train(tiny, workdir, **PLAN) == 0
    out = capsys.readouterr().out
    assert "is damaged" in out
    assert largest.name in out
    assert "trying the one before it" in out
    assert "at step 2" in out
    assert_same_run(tiny, workdir, whole)


def test_a_finished_run_stays_as_it_is(tiny, tmp_path, whole):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    assert tiny_run.train(tiny, workdir, **PLAN) == 0
    assert_same_run(tiny, workdir, whole)


def test_more_steps_may_be_asked_for(tiny, tmp_path, whole):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    assert tiny_run.train(tiny, workdir, **(PLAN | {"train__steps": 5})) == 0
    # Steps, and evaluations at 0, 2, 4 and at the new end.
    assert [line["step"] for line in tiny_run.curve(workdir)] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    assert tiny_run.curve(workdir)[:7] == tiny_run.curve(whole)
    resumed = workdirs.read_run(workdir)["resumed"]
    assert resumed[-1]["changed"] == {"train.steps": 5, "optim.steps": 5}


def test_another_learning_rate_is_refused(tiny, tmp_path, whole, capsys):
    before = tiny_run.read_lines(whole / "metrics.jsonl")
    assert tiny_run.train(tiny, whole, **PLAN, optim__lr=0.5) == 1
    message = capsys.readouterr().err
    assert "optim.lr" in message
    assert "0.01" in message
    assert "0.5" in message
    assert "another --workdir" in message
    assert tiny_run.read_lines(whole / "metrics.jsonl") == before


def test_a_folder_with_other_files_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert tiny_run.train(tiny, tmp_path) == 1
    message = capsys.readouterr().err
    assert "not empty (thesis.tex)" in message
    assert "another --workdir" in message
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_changed_prompts_file_is_refused(tiny, tmp_path, capsys):
    """The data order is restored by index, so other prompts under the same path would be mixed."""
    folder = tiny_run.copy_folder(tiny, tmp_path / "copy")
    assert tiny_run.train(folder, tmp_path / "run") == 0
    rows = tiny_run.read_lines(folder / "prompts.jsonl")
    tiny_run.write_lines(folder / "prompts.jsonl", rows[::-1])
    assert tiny_run.train(folder, tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert "started on other prompts" in message
    assert "another --workdir" in message
