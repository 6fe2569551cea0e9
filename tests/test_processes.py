"""How the processes of a run find one another, and what a user is told when they do not."""

import jax
import numpy as np
import pytest

from opd_jax import cli, processes

VARIABLES = (*processes.FLAGS.values(), *processes._CLUSTERS)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def joined(monkeypatch) -> list[dict]:
    """What jax is asked to join, call by call."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    return calls


@pytest.mark.parametrize(
    ("variables", "joins"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, True),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234", "SLURM_NTASKS": "4"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "auto"}, True),
    ],
    ids=str,
)
def test_processes_join_where_there_are_several(monkeypatch, joined, variables, joins):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.join(processes.take_flags([])[1])
    assert len(joined) == joins


def test_processes_join_once(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joined twice"))
    processes.join({})


def test_flags_may_stand_anywhere_and_win_over_variables(monkeypatch, joined):
    monkeypatch.setenv("JAX_PROCESS_ID", "7")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    argv = ["--out=x", "--coordinator", "host:1", "--step=2", "--process-index=1"]
    rest, given = processes.take_flags(argv)
    assert rest == ["--out=x", "--step=2"]
    processes.join(given)
    (call,) = joined
    assert call["coordinator_address"] == "host:1"
    assert (call["num_processes"], call["process_id"]) == (3, 1)
    assert call["heartbeat_timeout_seconds"] <= 120  # a lost process is noticed in a bounded time
    assert call["cluster_detection_method"] == "deactivate"  # which would take devices away


def test_without_flags_jax_finds_the_others(monkeypatch, joined):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    processes.join({})
    assert joined[0]["cluster_detection_method"] is None


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--coordinator=host:1"], ["--num-processes", "--process-index", "JAX_PROCESS_ID"]),
        (["--num-processes=2", "--process-index=0"], ["--coordinator"]),
        (["--coordinator=host:1", "--num-processes=2"], ["--process-index"]),
        (["--coordinator=host:1", "--num-processes=two", "--process-index=0"], ["'two'"]),
        (["--coordinator=host:1", "--num-processes=2", "--process-index=2"], ["0 to 1"]),
        (["--coordinator=host:1", "--num-processes=0", "--process-index=0"], ["of --num-proc"]),
        (["--coordinator=host:1", "--num-processes=2", "--process-index=-1"], ["whole number"]),
        (["--coordinator=host", "--num-processes=2", "--process-index=0"], ["HOST:PORT"]),
        (["--coordinator"], ["has no value"]),
        (["--coordinator="], ["has no value"]),
    ],
    ids=str,
)
def test_incomplete_or_wrong_flags_are_one_clear_error(capsys, joined, flags, parts):
    assert cli.main(["generate", "--model=x", "--prompts=y", "--out=z", *flags]) == 1
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert "Traceback" not in message
    assert joined == []


def test_one_process_needs_no_others(joined):
    processes.join({"coordinator": "host:1", "num-processes": "1", "process-index": "0"})
    assert joined == []


def test_a_coordinator_that_never_answers_is_a_clear_error(monkeypatch):
    def fail(**_):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    given = {"coordinator": "host:1", "num-processes": "2", "process-index": "1"}
    with pytest.raises(processes.ProcessesError, match=r"could not join.*Barrier.*host:1"):
        processes.join(given)


def test_only_a_lost_process_is_explained_as_one(monkeypatch):
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    assert processes.explain(lost) is None  # a process alone can lose nobody
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "lost another process" in str(processes.explain(lost))
    assert processes.explain(jax.errors.JaxRuntimeError("INTERNAL: wrong shape")) is None


def test_alone_everything_is_agreed_at_once():
    assert processes.agreed(5) == processes.largest(5) == 5
    assert processes.agreed_text("täxt") == "täxt"
    assert np.ndim(processes.meet("nothing")) == 0
