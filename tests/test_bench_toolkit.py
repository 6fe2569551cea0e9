"""The toolkit of the benchmarks: time, result files, child processes; and who imports whom."""

import argparse
import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "scripts" / "benchmarks"
sys.path.insert(0, str(FOLDER))
toolkit = importlib.import_module("toolkit")
sys.path.remove(str(FOLDER))


def imported(file: Path) -> set[str]:
    """The first words of the modules that a file imports, at its top or inside."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_no_benchmark_is_a_library_or_bears_the_name_of_what_it_measures():
    files = list(FOLDER.glob("*.py"))
    runnable = {f.stem for f in files if f.stem.startswith(("bench_", "worker_"))}
    assert runnable >= {"bench_peers", "bench_kl", "bench_gate", "bench_scaling", "worker_trl"}
    package = Path(__file__).parent.parent / "opd_jax"
    measured = {f.stem for f in package.rglob("*.py")} | {f.name for f in package.iterdir()}
    for file in files:
        assert not imported(file) & runnable, file.name
        assert file.stem not in measured


@pytest.mark.parametrize("name", ["toolkit", "peer_job"])
def test_what_workers_import_needs_the_standard_library_alone(name):
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import {name}"
    # -S: without site-packages, as in the environment of a peer that lacks jax and this package.
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_calls_are_timed_in_turns_after_one_that_compiles():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert set(toolkit.interleaved(calls, 3)) == {"a", "b"}
    assert "".join(order) == "ab" * 4
    toolkit.interleaved(calls, 1, is_warm=True)
    assert "".join(order) == "ab" * 5


def test_summary_is_median_and_relative_range():
    assert toolkit.summary([1.0, 9.0, 2.0]) == {"seconds": 2.0, "spread": 4.0}


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many"])
def test_counts_are_whole_and_positive(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected a whole number.*give one"):
        toolkit.whole(text)
    assert toolkit.whole("7") == 7


def test_results_are_written_with_machine_and_work(tmp_path):
    out = tmp_path / "new" / "kl.json"
    toolkit.write(out, toolkit.machine_and_device(), "the work", [{"seconds": 1.5}])
    record = json.loads(out.read_text())
    assert record["work"] == "the work"
    assert record["results"] == [{"seconds": 1.5}]
    assert record["machine"]["cores"] >= 1


def test_columns_are_as_wide_as_their_widest_cell():
    assert toolkit.aligned([("a", "bc", ""), ("long", "d", "e")]) == ["a     bc", "long  d   e"]


CHILD = """
import sys, time
sys.path.insert(0, {folder!r})
import toolkit

def run(job):
    if job["do"] == "raise":
        raise ValueError("no such thing")
    if job["do"] == "exit":
        import os
        os._exit(3)
    if job["do"] == "sleep":
        time.sleep(60)
    return {{"doubled": 2 * job["number"]}}

toolkit.serve(run, ["pytest", "no-such-package"])
"""


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("raise", "ValueError: no such thing (log: "),
        ("exit", "ended with status 3 and no result (log: "),
        ("sleep", "took longer than --timeout=1 s (log: "),
    ],
)
def test_a_child_that_fails_says_why(tmp_path, do, reason):
    assert run_child(tmp_path, {"do": do}, timeout=1 if do == "sleep" else 60)["failed"].startswith(
        reason
    )


def test_a_child_answers_its_job(tmp_path):
    result = run_child(tmp_path, {"do": "", "number": 21})
    assert result == {"doubled": 42, "versions": {"pytest": pytest.__version__}}
    # The answer of the first must not stand for one that a second never gave.
    assert "failed" in run_child(tmp_path, {"do": "exit"})


def run_child(folder: Path, job, timeout=60.0):
    script = folder / "child.py"
    script.write_text(CHILD.format(folder=str(FOLDER)))
    return toolkit.run_child(
        Path(sys.executable),
        script,
        job,
        folder=folder / "runs",
        name="child",
        environment={},
        timeout=timeout,
    )
