"""A run saved on one mesh goes on, is exported, tabulated and analysed on any other.

Every command is the real one, in processes of its own, but for those that only read what a run
left: they share one. ``scripts/test`` does a few pairs of layouts, ``.ci/run`` all of them.
"""

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import layouts
import numpy as np
import pytest
import tiny_run
from layouts import LAYOUTS

from opd_jax.store import checkpoint_record

tiny = tiny_run.tiny
# Eight devices of one process have the mesh, and so the shards, of "two-by-four": they are a target
# of the quick pairs alone.
NAMES = [name for name in LAYOUTS if name != "2x2x2"]
QUICK = [("one", "two-processes"), ("two-processes", "2x2x2")]
PAIRS = sorted({*QUICK, *itertools.product(NAMES, NAMES)})
HALF, WHOLE = 2, 4
PLAN = {
    "rock__mode": "ema",
    "rock__top_k": 8,
    "checkpoint__every": HALF,
    "eval__every": HALF,
    "eval__prompts": 4,
    "eval__kl_prompts": 4,
    "log__samples_every": 1,
    "log__samples": 8,
}
# On another mesh sums are taken in another order.
RTOL = 2e-3
COMPARED = ("loss", "kl_nats", "grad_norm", "lr", "eval/kl_nats")
LOST_S = 100.0  # heartbeats of 60 s, and a busy machine
# What a run trains, and of what: a dense student of a dense teacher, or of one with experts, which
# the student may have, too; adapters of a frozen student; a student of two teachers. Each as keys
# beside PLAN; of all but the first few programs are compiled.
KINDS = {
    "dense": {},
    "experts": {"eval__every": 0},
    "adapters": {"lora__rank": 4, "lora__alpha": 8.0, "eval__every": 0},
    "all-experts": {"eval__every": 0, "train__load_balance": 0.01},
    "teachers": {"eval__every": 0},
}
# Of the other kinds: the layout with most of everything onto itself, where bits are compared, onto
# another number of processes and of devices, and back.
FEW = [
    ("two-by-four", "two-by-four"),
    ("two-by-four", "fsdp2-model2"),
    ("fsdp2-model2", "two-by-four"),
]


def keys_of(kind, folder):
    return KINDS[kind] | (tiny_run.several(folder) if kind == "teachers" else {})


def command(folder, workdir, layout, **keys):
    return [*tiny_run.argv(folder, workdir, **PLAN | keys), *layout.flags]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """The folder of a pair whose teacher is a mixture of experts."""
    return tiny_run.make_folder(tmp_path_factory.mktemp("sparse"), teacher=tiny_run.SPARSE)


@pytest.fixture(scope="module")
def all_sparse(tmp_path_factory):
    """The folder of a pair whose models are both mixtures of experts."""
    folder, experts = tmp_path_factory.mktemp("all-sparse"), tiny_run.SPARSE
    return tiny_run.make_folder(folder, teacher=experts, student=experts)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The folder of a student and its two teachers."""
    return tiny_run.make_teachers(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes, once per layout, a run of WHOLE steps whose process ended after HALF (by a kill)."""
    folder = tmp_path_factory.mktemp("saved")

    def make(pair: Path, name: str, steps: int, kind: str = "dense"):
        workdir = folder / f"{kind}-{name}-{steps}"
        if not workdir.exists():
            layout = LAYOUTS[name]
            # The schedule is that of all steps, so the run is stopped and not asked for fewer.
            code = STOP.format(step=steps) if steps < WHOLE else ""
            status = 128 + signal.SIGTERM if steps < WHOLE else 0
            argv = command(pair, workdir, layout, train__steps=WHOLE, **keys_of(kind, pair))
            layouts.run(layout, argv, status=status, code=code)
        return workdir

    return make


STOP = """
import signal
from opd_jax.run import train
step = train._Loop._step
def stopping(self, state, batch, index):
    result = step(self, state, batch, index)
    if index + 1 == {step}:
        signal.raise_signal(signal.SIGTERM)
    return result
train._Loop._step = stopping
"""


def prompts(workdir):
    return [
        [sample["prompt"] for sample in line["samples"]]
        for line in tiny_run.read_lines(workdir / "samples.jsonl")
    ]


def in_turn(*commands):
    """Run commands one after the other in one process of one device: to start takes longest."""
    code = "".join(f"assert cli.main({argv!r}) == 0\n" for argv in commands[:-1])
    layouts.run(LAYOUTS["one"], commands[-1], code=f"from opd_jax import cli\n{code}")


def reading(workdir, out):
    """The commands that export the weights and the table of types into a folder."""
    out.mkdir()
    return (
        ["export", f"--workdir={workdir}", f"--out={out / 'model'}"],
        ["table", f"--workdir={workdir}", f"--out={out / 'types.csv'}"],
    )


def written(out):
    """Bytes of the exported weights and of the table of types."""
    return (out / "model" / "model.safetensors").read_bytes(), (out / "types.csv").read_bytes()


def check(folder, saved, tmp_path, source, target, kind="dense"):
    """Go on from ``source`` on ``target`` and compare with the run that was never stopped."""
    workdir, layout = tmp_path / "run", LAYOUTS[target]
    shutil.copytree(saved(folder, source, HALF, kind), workdir)
    keys = keys_of(kind, folder)
    layouts.run(layout, command(folder, workdir, layout, train__steps=WHOLE, **keys))
    whole = saved(folder, source, WHOLE, kind)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["is_finished"]
    uninterrupted = json.loads((whole / "summary.json").read_text())["compiles_by_program"]
    assert summary["compiles_by_program"] == uninterrupted
    assert prompts(workdir) == prompts(whole)
    found, expected = tiny_run.curve(workdir), tiny_run.curve(whole)
    if source == target:
        assert found == expected
        outs = tmp_path / "found", tmp_path / "expected"
        in_turn(*reading(workdir, outs[0]), *reading(whole, outs[1]))
        assert written(outs[0]) == written(outs[1])
        return
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name in COMPARED:
            if name in other:
                np.testing.assert_allclose(line[name], other[name], rtol=RTOL, err_msg=name)


@pytest.mark.parametrize(
    ("source", "target"),
    [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.ci) for pair in PAIRS],
)
def test_a_run_goes_on_on_any_layout(tiny, saved, tmp_path, source, target):
    check(tiny, saved, tmp_path, source, target)


@pytest.mark.ci
@pytest.mark.parametrize(("source", "target"), FEW)
def test_so_does_one_with_a_teacher_of_experts(sparse, saved, tmp_path, source, target):
    check(sparse, saved, tmp_path, source, target, "experts")


@pytest.mark.ci
@pytest.mark.parametrize(("source", "target"), FEW)
def test_so_does_one_of_adapters(tiny, saved, tmp_path, source, target):
    check(tiny, saved, tmp_path, source, target, "adapters")
    record = checkpoint_record.read(tmp_path / "run" / "checkpoints" / str(WHOLE))
    assert not any("embed" in name for name in record["leaves"])


@pytest.mark.ci
@pytest.mark.parametrize(("source", "target"), FEW[:2])
def test_so_does_one_whose_models_both_have_experts(all_sparse, saved, tmp_path, source, target):
    check(all_sparse, saved, tmp_path, source, target, "all-experts")


@pytest.mark.ci
@pytest.mark.parametrize(("source", "target"), FEW[:2])
def test_so_does_one_of_two_teachers(several, saved, tmp_path, source, target):
    check(several, saved, tmp_path, source, target, "teachers")
    line = tiny_run.curve(tmp_path / "run")[-1]
    assert line["kl_nats/sums"] > 0 < line["kl_nats/digits"]


@pytest.mark.parametrize(
    "name", ["two-processes", *(pytest.param(n, marks=pytest.mark.ci) for n in NAMES[:-1])]
)
def test_what_a_layout_saved_is_read_by_all_commands(tiny, saved, tmp_path, name):
    workdir = saved(tiny, name, HALF)
    out = tmp_path / "rocks"
    argv = ["rocks", f"--run={workdir}", "--k=4", "--max-new=4", f"--out={out}"]
    in_turn(*reading(workdir, tmp_path / "read"), argv)
    weights, table = written(tmp_path / "read")
    assert len(weights) > 1000
    assert table.count(b"\n") == tiny_run.MODEL.vocab_size + 1
    assert json.loads((out / "summary.json").read_text())["k"] == 4


def test_two_processes_read_what_one_saved(tiny, saved, tmp_path):
    """The commands beside training, in several processes: one writes, and the same bytes."""
    workdir = saved(tiny, "one", HALF)
    alone, together = tmp_path / "alone", tmp_path / "together"
    in_turn(*reading(workdir, alone))
    for argv in reading(workdir, together):
        layouts.run(LAYOUTS["two-processes"], argv)
    assert written(together) == written(alone)


def test_processes_of_different_configs_refuse_each_other(tiny, tmp_path):
    """Before anything is written; each says what it differs in."""
    layout = LAYOUTS["two-processes"]
    argv = command(tiny, tmp_path / "run", layout)
    results = layouts.finish(layouts.start(layout, argv, code=OTHERWISE))
    assert [status for status, _ in results] == [1, 1], results
    assert "optim.lr is 0.5, 0.01 there" in results[1][1]
    assert "another process differs" in results[0][1]
    assert all("start the same command on all" in text for _, text in results)
    assert not (tmp_path / "run").exists()


OTHERWISE = """
if "--process-index=1" in sys.argv:
    sys.argv.append("--config.optim.lr=0.5")
"""


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.ci), 1])
def test_when_one_process_is_killed_the_other_ends(tiny, saved, tmp_path, victim):
    workdir, layout = tmp_path / "run", LAYOUTS["two-processes"]
    shutil.copytree(saved(tiny, "two-processes", HALF), workdir)
    argv = command(tiny, workdir, layout, train__steps=WHOLE)
    started = layouts.start(layout, argv, code=HANG)
    lines = workdir / "metrics.jsonl"
    deadline = time.monotonic() + layouts.DEADLINE_S
    while f'"step": {HALF + 1},' not in lines.read_text():
        assert all(p.poll() is None for p in started), layouts.finish(started)
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(started[victim].pid, signal.SIGKILL)
    begun = time.monotonic()
    results = layouts.finish(started)
    assert time.monotonic() - begun < LOST_S
    status, text = results[1 - victim]
    # Either a collective fails first, or jax's own watch over the processes ends this one.
    told = {1: "lost another process", -signal.SIGABRT: "another task died"}
    assert status in told, text
    assert told[status] in text
    assert "Traceback" not in text
    layouts.run(LAYOUTS["one"], command(tiny, workdir, LAYOUTS["one"], train__steps=WHOLE))
    assert json.loads((workdir / "summary.json").read_text())["is_finished"]


# Its fourth step comes when somebody has been killed.
HANG = """
import time
from opd_jax.run import train
step = train._Loop._step
def waiting(self, state, batch, index):
    if index == 3:
        time.sleep(5)
    return step(self, state, batch, index)
train._Loop._step = waiting
"""
