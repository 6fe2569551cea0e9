"""Several runs of a sweep at once: the same results, dealt devices, failures and signals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_run

from opd_jax import processes
from opd_jax.run import crew

tiny = tiny_run.tiny
ARMS = """
import runpy

from opd_jax import config


def get_config(arg=""):
    args = config.parse_arg(arg, arm="full")
    c = runpy.run_path({base!r})["get_config"]()
    c.eval.every, c.eval.prompts, c.eval.kl_prompts, c.eval.batch = 4, 8, 8, 8
    if args.arm == "ema":
        c.rock.mode, c.rock.top_k, c.rock.start = "ema", 4, 1
    if args.arm == "broken":
        c.data.prompts = "nowhere.jsonl"
    return c
"""


def start(tiny, tmp_path, *flags, arms="full,ema", seeds=2):
    """The command in a process of its own, on one CPU device."""
    file = tmp_path / "arms.py"
    file.write_text(ARMS.format(base=str(tiny / "config.py")))
    argv = [f"--config={file}", f"--arms={arms}", f"--seeds={seeds}", *flags]
    environ = dict(os.environ)
    environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    return subprocess.Popen(
        crew.command("sweep", *argv),
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read(path):
    return json.loads(path.read_text())


def without_clock(path):
    """``sweep.json`` without times and folders."""
    found = read(path)
    for row in found["arms"]:
        del row["runs"], row["metrics"]["seconds"], row["metrics"]["step_s"]
    return found


def test_several_at_once_give_what_one_by_one_does(tiny, tmp_path):
    alone = start(tiny, tmp_path, f"--workdir={tmp_path / 'alone'}")
    out = alone.communicate()[0]
    assert alone.returncode == 0, out
    beside = start(tiny, tmp_path, f"--workdir={tmp_path / 'beside'}", "--at-once=2")
    out = beside.communicate()[0]
    assert beside.returncode == 0, out
    assert without_clock(tmp_path / "alone/sweep.json") == without_clock(
        tmp_path / "beside/sweep.json"
    )
    assert "== 1/4: full/seed-0; its console: " in out
    assert "ema/seed-1 done in " in out
    assert "against full" in out
    console = (tmp_path / "beside/full/seed-0.log").read_text()
    assert "held out, step 4" in console
    begun, ended = ([] for _ in range(2))
    for path in (tmp_path / "beside").rglob("run.json"):
        begun.append(path.stat().st_mtime)
        ended.append((path.parent / "summary.json").stat().st_mtime)
    assert sorted(begun)[1] < sorted(ended)[0]  # two at the same time


def test_a_signal_reaches_all_of_them_and_the_same_command_goes_on(tiny, tmp_path):
    workdir = tmp_path / "sweep"
    flags = (f"--workdir={workdir}", "--at-once=2", "--config.train.steps=60")
    flags += ("--config.eval.every=60",)
    child = start(tiny, tmp_path, *flags, seeds=1)
    lines = [workdir / arm / "seed-0" / "metrics.jsonl" for arm in ("full", "ema")]
    deadline = time.monotonic() + 300
    while not all(path.exists() and path.read_text().count('"loss"') > 1 for path in lines):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    out = child.communicate(timeout=120)[0]
    assert child.returncode == 128 + signal.SIGTERM, out
    # On a busy machine one may be at its end before the other has begun.
    told = {path: path.parent / "summary.json" for path in lines}
    done = {path for path, end in told.items() if end.exists() and read(end)["is_finished"]}
    left = [path for path in lines if path not in done]
    assert left
    assert f"stopped by SIGTERM, {len(left)} runs left; the same command goes on" in out
    for path in left:
        console = path.parent.with_suffix(".log").read_text()
        assert "stopped by SIGTERM at step" in console
    again = start(tiny, tmp_path, *flags, seeds=1)
    out = again.communicate(timeout=300)[0]
    assert again.returncode == 0, out
    assert "resuming" in left[0].parent.with_suffix(".log").read_text()
    assert (workdir / "sweep.json").exists()


def test_a_run_that_fails_is_told_and_takes_no_other_with_it(tmp_path, capsys):
    code = "import sys, time; time.sleep(float(sys.argv[1])); print(*sys.argv[2:]); sys.exit({})"
    tasks = [
        crew.Task(name, (sys.executable, "-c", code.format(status), wait, f"says {name}"), log)
        for name, status, wait in (("a", 0, "1.5"), ("b", 3, "0"), ("c", 0, "0"))
        for log in [tmp_path / f"{name}.log"]
    ]
    said = []
    with pytest.raises(crew.CrewError, match=r"b failed with status 3; .*b\.log ends:\n  says b\n"):
        crew.run(tasks, [crew.Place({})] * 2, processes.Stop(), say=said.append)
    assert any(line.startswith("a done in") for line in said)
    assert not (tmp_path / "c.log").exists()


def test_the_machine_is_dealt_out(monkeypatch, tmp_path):
    found = crew.places(2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert [place.environ for place in found] == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "2,3"},
    ]
    with pytest.raises(crew.CrewError, match=r"5 runs at once on 4 GPUs.*lower --at-once"):
        crew.places(5, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 0\necho 1\n")
    fake.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert [p.environ["CUDA_VISIBLE_DEVICES"] for p in crew.places(2, {})] == ["0", "1"]
        patch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
        # What jax is told not to use is not dealt out.
        cores = [place.cores for place in crew.places(2, {"JAX_PLATFORMS": "cpu"})]
        assert cores == [{0, 2}, {1, 3}]
        with pytest.raises(crew.CrewError, match="5 runs at once on 4 CPU cores"):
            crew.places(5, {"JAX_PLATFORMS": "cpu"})
    with pytest.raises(crew.CrewError, match=r"on a TPU: expected 1.*--only"):
        crew.places(2, {"JAX_PLATFORMS": "tpu"})


def test_a_process_keeps_to_its_cores_and_variables(tmp_path):
    cores = frozenset(sorted(os.sched_getaffinity(0))[:1])
    # It looks a second later than it starts: whoever starts it gives it its cores at once.
    code = "import os, time; time.sleep(1); print(sorted(os.sched_getaffinity(0)), *{})"
    code = code.format("[os.environ['CUDA_VISIBLE_DEVICES']]")
    task = crew.Task("a", (sys.executable, "-c", code), tmp_path / "a.log")
    place = crew.Place({"CUDA_VISIBLE_DEVICES": "7"}, cores)
    assert crew.run([task], [place], processes.Stop(), say=lambda line: None)
    assert (tmp_path / "a.log").read_text().split() == [str(sorted(cores)), "7"]


def test_more_at_once_than_cores_are_refused_before_anything_runs(tiny, tmp_path):
    child = start(tiny, tmp_path, f"--workdir={tmp_path / 'x'}", "--at-once=512", seeds=256)
    out = child.communicate()[0]
    assert child.returncode == 1
    assert "512 runs at once on" in out
    assert "lower --at-once" in out
    assert not (tmp_path / "x").exists()
