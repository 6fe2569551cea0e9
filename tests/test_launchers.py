"""scripts/slurm.sh and scripts/tpu_pod.sh, with stand-ins for srun, scontrol and gcloud that act.

The processes that they start are real ones, which train and find one another.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from layouts import CACHE_OF_EACH, DEADLINE_S, EACH_KEEPS, free_port

ROOT = Path(__file__).parents[1]
tiny = tiny_run.tiny

# Starts the tasks, passes a signal on to each, and ends with the largest of their statuses.
SRUN = """#!{python}
import json, os, signal, subprocess, sys

words = sys.argv[1:]
at = words.index("bash")
number = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(words[at:], env=os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"}})
    for i in range(number)
]
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
with open({log!r}, "a") as stream:
    stream.write(json.dumps(["srun", *words]) + "\\n")
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!{python}
import json, os, sys

with open({log!r}, "a") as stream:
    stream.write(json.dumps(["scontrol", *sys.argv[1:]]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\n127.0.0.2")
elif os.environ.get("NO_REQUEUE"):
    sys.exit("requests may not be queued again")
"""
# The command; its third step waits until the test has seen that the signal was passed on.
COMMAND = """#!{python}
import os, sys, time
{keeps}
from opd_jax import cli
from opd_jax.run import train

step = train._Loop._step

def waiting(self, state, batch, index):
    if index == 2 and not os.path.exists({told!r}):
        open(f"{told}-{{os.getpid()}}", "w").close()
        while not os.path.exists({told!r}):
            time.sleep(0.05)
    return step(self, state, batch, index)

train._Loop._step = waiting
sys.exit(cli.main(sys.argv[1:]))
"""


def script(path: Path, text: str, **names) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(python=sys.executable, **names))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def variables(folder: Path, **more: str) -> dict[str, str]:
    """Of the environment of a launcher, its stand-ins first on PATH."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
    quick = os.environ["XLA_FLAGS"]  # soon compiled: gloo gives a process that is late 30 seconds
    return kept | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{quick} --xla_force_host_platform_device_count=2",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **CACHE_OF_EACH,
        "PYTHONUNBUFFERED": "1",
        **more,
    }


# What gloo says of a partner that is not there within 30 seconds: on a busy machine, of a slow one.
MISSED = "Gloo context initialization failed"
TRIES = 6


def missed(output: Path, before: int) -> bool:
    return MISSED in output.read_text()[before:]


def wait_for(what, process: subprocess.Popen, output: Path, again=None) -> subprocess.Popen:
    """Wait until something holds while a launcher runs; ``again`` starts one that gloo ended."""
    deadline = time.monotonic() + DEADLINE_S
    before, tries = len(output.read_text()), 1
    while not what():
        if process.poll() is not None and again and tries < TRIES and missed(output, before):
            before, tries, process = len(output.read_text()), tries + 1, again()
            deadline = time.monotonic() + DEADLINE_S
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
    return process


def ended(start, output: Path) -> int:
    """Status of what is started, again where gloo ended it: the same command resumes."""
    for _ in range(TRIES):
        before = len(output.read_text())
        status = start().wait(DEADLINE_S)
        if status == 0 or not missed(output, before):
            break
    return status


def wait(told: Path) -> bool:
    """Whether both processes of COMMAND wait in their third step."""
    return len(list(told.parent.glob(f"{told.name}-*"))) >= 2


# --- Slurm ----------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path):
    """Starts scripts/slurm.sh as a job of two nodes would."""
    log, told = tmp_path / "asked.jsonl", tmp_path / "told"
    log.touch()
    script(tmp_path / "bin" / "srun", SRUN, log=str(log))
    script(tmp_path / "bin" / "scontrol", SCONTROL, log=str(log))
    command = script(tmp_path / "opd-jax", COMMAND, told=str(told), keeps=EACH_KEEPS)
    copy = shutil.copy(ROOT / "scripts" / "slurm.sh", tmp_path / "slurm_script")  # as Slurm does

    def start(argv, output: Path, **more: str) -> subprocess.Popen:
        env = variables(
            tmp_path,
            SLURM_JOB_ID="7",
            SLURM_NTASKS="2",
            SLURM_JOB_NUM_NODES="2",
            SLURM_JOB_NODELIST="n[1-2]",
            SLURM_SUBMIT_DIR=str(ROOT),
            OPD_JAX=str(command),
            OPD_JAX_PORT=str(free_port()),
        )
        with output.open("a") as stream:
            return subprocess.Popen(
                ["bash", copy, *argv],
                stdout=stream,
                stderr=stream,
                env={k: v for k, v in (env | more).items() if v},
            )

    start.told, start.log = told, log
    return start


def asked(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_slurm_job_that_is_stopped_saves_queues_again_and_resumes(tiny, tmp_path, slurm):
    output = tmp_path / "job.log"
    keys = {"checkpoint__every": 0, "mesh__fsdp": 2}
    argv = tiny_run.argv(tiny, tmp_path / "run", **keys)[1:]
    start = functools.partial(slurm, argv, output)
    job = wait_for(lambda: wait(slurm.told), start(), output, start)
    job.send_signal(signal.SIGTERM)  # as --signal=B:TERM@120 does
    wait_for(lambda: "told to stop" in output.read_text(), job, output)
    job.send_signal(signal.SIGTERM)  # and again, which must not end a process that saves
    slurm.told.touch()
    assert job.wait(DEADLINE_S) == 128 + signal.SIGTERM, output.read_text()
    text = output.read_text()
    assert "stopped by SIGTERM at step 3, saved" in text
    assert "queued again and resumes" in text
    assert asked(slurm.log)[-1] == ["scontrol", "requeue", "7"]
    run = next(words for words in asked(slurm.log) if words[0] == "srun")
    assert any(w.startswith("--coordinator=127.0.0.1:") for w in run)
    assert "--num-processes=2" in run

    again = functools.partial(start, SLURM_RESTART_COUNT="1")
    assert ended(again, output) == 0, output.read_text()
    assert "resuming" in output.read_text()
    assert "start 2: 2 processes on 2 nodes" in output.read_text()
    assert "slurm.sh: finished" in output.read_text()
    whole = tiny_run.argv(tiny, tmp_path / "whole", **keys)[1:]
    assert ended(functools.partial(slurm, whole, output), output) == 0, output.read_text()
    assert len(tiny_run.curve(tmp_path / "run")) == 4
    assert tiny_run.curve(tmp_path / "run") == tiny_run.curve(tmp_path / "whole")


ECHO = """#!{python}
import os, sys
print("ran", sys.argv[1:], "device", os.environ.get("JAX_LOCAL_DEVICE_IDS"),
      "cpus", os.environ.get("SRUN_CPUS_PER_TASK"))
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        ({"STATUS": "1"}, 1, "ended with status 1 and is not queued again"),
        ({"STATUS": "143"}, 143, "queued again and resumes"),
        ({"STATUS": "143", "NO_REQUEUE": "1"}, 143, "sbatch with the same arguments resumes"),
        ({"SLURM_JOB_NUM_NODES": "1"}, 0, "device 0"),  # two tasks share a node
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_PER_TASK": "1"}, 0, "device None"),
        ({"SLURM_CPUS_PER_TASK": "6"}, 0, "device None cpus 6"),
        ({"SLURM_NTASKS": "1", "OPD_JAX_PORT": ""}, 0, "'--coordinator=127.0.0.1:61447', '--num-"),
    ],
)
def test_what_a_slurm_job_makes_of_its_tasks(tmp_path, slurm, more, status, words):
    command = script(tmp_path / "echo", ECHO)
    output = tmp_path / "job.log"
    job = slurm(["--config=a b.py", "--workdir=w"], output, OPD_JAX=str(command), **more)
    assert job.wait(DEADLINE_S) == status
    text = output.read_text()
    assert words in text
    assert "ran ['train', '--config=a b.py', '--workdir=w', " in text
    assert "'--process-index=0']" in text


@pytest.mark.parametrize(
    ("argv", "more", "status", "words"),
    [
        (["--workdir=w"], {}, 2, "expected --config=FILE and --workdir=DIR"),
        (["--config=c", "--workdir=w", "--num-processes=2"], {}, 2, "found --num-processes=2"),
        (["--config=c", "--workdir=w"], {"SLURM_JOB_ID": ""}, 1, "start it by sbatch"),
        (["--config=c", "--workdir=w"], {"OPD_JAX": "/no/such"}, 1, "found no /no/such"),
        (["--help"], {"SLURM_JOB_ID": ""}, 0, "sbatch --nodes=2"),
    ],
)
def test_a_slurm_script_refuses_before_anything_is_started(
    tmp_path, slurm, argv, more, status, words
):
    output = tmp_path / "job.log"
    assert slurm(argv, output, **more).wait(DEADLINE_S) == status
    assert words in output.read_text()
    assert not any(words[0] == "srun" for words in asked(slurm.log))


# --- Cloud TPU ------------------------------------------------------------------------------------

# Two workers, each a folder; a slice's state is in a file. A created slice has an empty disk, with
# what pip would install already there.
GCLOUD = """#!{python}
import json, os, shutil, subprocess, sys
from pathlib import Path

folder, state = Path({folder!r}), Path({folder!r}) / "state"
words = sys.argv[1:]
with open(folder / "asked.jsonl", "a") as stream:
    stream.write(json.dumps(words) + "\\n")
assert words[:3] == ["compute", "tpus", "tpu-vm"] and "--zone=z" in words, words
homes = [folder / "worker0", folder / "worker1"]
if words[3] == "describe":
    sys.exit(print(state.read_text()) if state.exists() else "NOT_FOUND")
if words[3] == "delete":
    state.unlink()
if words[3] == "create":
    state.write_text("READY")
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(folder / "installed", home / "opd_jax" / ".venv")
if words[3] == "scp":
    for home in homes:
        shutil.copy(words[4], home)
if words[3] == "ssh":
    if not state.exists() or state.read_text() != "READY":
        sys.exit("no connection")
    (text,) = (w.removeprefix("--command=") for w in words if w.startswith("--command="))
    address = (folder / "address").read_text()
    started = [
        subprocess.Popen(
            ["bash", "-c", text],
            env=os.environ
            | {{"HOME": str(home), "JAX_PROCESS_ID": str(i), "JAX_NUM_PROCESSES": "2"}}
            | {{"JAX_COORDINATOR_ADDRESS": address}},
        )
        for i, home in enumerate(homes)
    ]
    codes = [each.wait() for each in started]
    if not state.exists() or state.read_text() != "READY":
        sys.exit("connection lost")
    sys.exit(max(codes))
"""
PYTHON = """#!/bin/bash
echo "$@" >>{log!r}
"""


@pytest.fixture
def pod(tmp_path):
    """Starts scripts/tpu_pod.sh, with a stand-in for gcloud."""
    told = tmp_path / "told"
    script(tmp_path / "bin" / "gcloud", GCLOUD, folder=str(tmp_path))
    script(tmp_path / "installed" / "bin" / "python", PYTHON, log=str(tmp_path / "pip.log"))
    script(tmp_path / "installed" / "bin" / "opd-jax", COMMAND, told=str(told), keeps=EACH_KEEPS)
    pinned = [ROOT / "scripts" / "requirements.lock", ROOT / "pyproject.toml"]
    (tmp_path / "installed" / ".installed-requirements.lock").write_bytes(
        b"".join(path.read_bytes() for path in pinned)
    )

    def start(argv, output: Path) -> subprocess.Popen:
        (tmp_path / "address").write_text(f"127.0.0.1:{free_port()}")
        with output.open("a") as stream:
            return subprocess.Popen(
                [ROOT / "scripts" / "tpu_pod.sh", *argv],
                stdout=stream,
                stderr=stream,
                env=variables(tmp_path),
            )

    start.told = told
    yield start
    for path in tmp_path.glob("worker*/opd_jax/run.pid"):  # it outlives whoever started it
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(path.read_text()), signal.SIGKILL)


CREATE = ["--zone=z", "--type=v5litepod-16", "--runtime=v2-alpha-tpuv5-lite", "--spot"]
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what git has is copied")


def of_gcloud(tmp_path) -> list[str]:
    return [words[3] for words in asked(tmp_path / "asked.jsonl")]


def pids(tmp_path) -> list[int]:
    return [int((tmp_path / f"worker{i}/opd_jax/run.pid").read_text()) for i in (0, 1)]


@needs_git
def test_a_preempted_slice_saves_is_created_again_and_resumes(tiny, tmp_path, pod):
    output = tmp_path / "out.log"
    argv = tiny_run.argv(tiny, tmp_path / "run", checkpoint__every=0, mesh__fsdp=2)[1:]
    start = functools.partial(pod, ["train", "mine", *CREATE, "--", *argv], output)
    launched = wait_for(lambda: wait(pod.told), start(), output, start)
    (tmp_path / "state").write_text("PREEMPTED")
    for pid in pids(tmp_path):  # as a worker that shuts down does
        os.kill(pid, signal.SIGTERM)
    pod.told.touch()
    status, before = launched.wait(DEADLINE_S), output.read_text()
    if status and MISSED in before.rpartition("deleting it")[2]:
        status = ended(start, output)
    assert status == 0, output.read_text()
    text = output.read_text()
    assert "stopped by SIGTERM at step 3, saved" in text
    assert "mine is PREEMPTED: deleting it" in text
    assert f"resuming {tmp_path / 'run'} at step 3" in text
    assert [line["step"] for line in tiny_run.curve(tmp_path / "run")] == [1, 2, 3, 4]
    told = of_gcloud(tmp_path)
    assert [told.count(what) for what in ("create", "delete", "scp")] == [2, 1, 2]
    (created, _) = (words for words in asked(tmp_path / "asked.jsonl") if words[3] == "create")
    assert created[4:] == [
        "mine", "--zone=z", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite",
        "--spot",
    ]  # fmt: skip
    assert "jax[tpu]" in (tmp_path / "pip.log").read_text()
    assert (tmp_path / "worker1" / "opd_jax" / "configs" / "demo.py").exists()


# Runs until it is told to stop.
WAITING = """#!/bin/bash
echo "began $*" >>{log!r}
trap 'sleep 0.3; echo saved; exit 143' TERM
while true; do sleep 0.05; done
"""


@needs_git
def test_a_run_goes_on_without_its_launcher_and_can_be_stopped(tmp_path, pod):
    log = tmp_path / "began.log"
    script(tmp_path / "installed" / "bin" / "opd-jax", WAITING, log=str(log))
    outputs = [tmp_path / f"{i}.log" for i in range(3)]
    argv = ["train", "mine", *CREATE, "--", "--config=a b.py", "--workdir=w"]
    first = pod(argv, outputs[0])
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) == 2, first, outputs[0])
    first.kill()  # the launcher alone
    first.wait()
    second = pod(argv, outputs[1])
    wait_for(lambda: "start 1" in outputs[1].read_text(), second, outputs[1])
    time.sleep(1.0)
    assert pod(["stop", "mine", "--zone=z"], outputs[2]).wait(DEADLINE_S) == 0
    assert outputs[2].read_text().count("has ended") == 2
    assert second.wait(DEADLINE_S) == 143
    assert outputs[1].read_text().count("saved") == 2
    assert "the same command resumes" in outputs[1].read_text()
    assert log.read_text() == "began train --coordinator=auto --config=a b.py --workdir=w\n" * 2
    assert of_gcloud(tmp_path).count("scp") == 1  # installed once
    assert pod(["stop", "mine", "--zone=z"], outputs[2]).wait(DEADLINE_S) == 0
    assert "no run on" in outputs[2].read_text()


RUN = ["--", "--config=c", "--workdir=w"]


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        ([], 2, "expected train or stop"),
        (["start", "mine"], 2, "found 'start'"),
        (["train", "--zone=z"], 2, "found no name"),
        (["train", "mine", *RUN], 2, "found no --zone"),
        (["train", "mine", "--zone=z", "--config=c"], 2, "found --config=c"),
        (["train", "mine", "--zone=z", "--", "--config=c"], 2, "expected --config=FILE and --work"),
        (["train", "mine", "--zone=z", "--type=v5e", *RUN], 2, "expected both"),
        (["train", "mine", "--zone=z", "--tries=1x", *RUN], 2, "--tries=1x"),
        (["train", "mine", "--zone=z", *RUN], 1, "there is no slice mine"),
        (["--help"], 0, "--type=TYPE"),
    ],
)
def test_a_pod_script_refuses_before_anything_is_started(tmp_path, pod, argv, status, words):
    output = tmp_path / "out.log"
    (tmp_path / "asked.jsonl").touch()
    assert pod(argv, output).wait(DEADLINE_S) == status
    assert words in output.read_text()
    assert not {*of_gcloud(tmp_path)} & {"ssh", "create", "scp"}


@needs_git
@pytest.mark.parametrize("state", ["CREATING", "PREEMPTED"])
def test_a_slice_that_is_not_ready_is_told_of(tmp_path, pod, state):
    (tmp_path / "state").write_text(state)
    assert pod(["train", "mine", "--zone=z", *RUN], tmp_path / "out.log").wait(DEADLINE_S) == 1
    assert f"mine is {state}: expected" in (tmp_path / "out.log").read_text()
