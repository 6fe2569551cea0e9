"""A run that takes seconds: a random pair with the demo's tokenizer, prompts and a config file."""

import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from opd_jax import cli, config, mesh, processes
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf, params, transformer
from opd_jax.models.architecture import Experts, LayerKind
from opd_jax.run import assemble, initial
from opd_jax.run import train as training
from opd_jax.spec import RunConfig
from opd_jax.store import checkpoint

CONFIG = """
from opd_jax import config


def get_config(arg=""):
    c = config.defaults()
    c.student.path = {folder!r} + "/student"
    c.teacher.path = {folder!r} + "/teacher"
    c.data.prompts = c.data.heldout = {folder!r} + "/prompts.jsonl"
    c.data.max_prompt = 48
    c.rollout.samples = 2
    c.rollout.max_new = 6
    c.train.prompts = 4
    c.train.steps = 4  # kept by most tests: the schedule is a part of the compiled step
    c.optim.lr = 1e-2
    c.checkpoint.every = 0
    c.log.samples_every = 0
    return c
"""
# What a child to be killed runs: the command on the first device, hanging before its fourth step.
CHILD = """
import sys
import time

import jax

from opd_jax import cli, mesh
from opd_jax.run import train

make, step = mesh.make, train._Loop._step


def hang(self, state, batch, index):
    if index == 3:
        time.sleep(600)
    return step(self, state, batch, index)


mesh.make = lambda *axes: make(*axes, devices=jax.devices()[:1])
train._Loop._step = hang
sys.exit(cli.main(sys.argv[1:]))
"""
# What a child to be killed runs: the command on the first device, hanging in an append of answers.
_APPENDING = """
import sys, time
import jax
from opd_jax import cli, files, mesh

make, append = mesh.make, files.append
calls = []


def hang(stream, lines):
    if len(calls) == {before}:
        append(stream, lines[:{whole}])
        stream.write({half!r})
        stream.flush()
        print("HANGS", flush=True)
        time.sleep(600)
    calls.append(1)
    append(stream, lines)


files.append = hang
mesh.make = lambda *a, **k: make(*a, **(k | {{"devices": jax.devices()[:1]}}))
sys.exit(cli.main(sys.argv[1:]))
"""


def hanging_child(before: int, half: str, *, whole: int = 0) -> str:
    """Python code for a command that hangs after so many appended batches.

    Args:
      before: batches that are whole.
      half: what stands of the line that it hangs in.
      whole: lines of the same batch before that.
    """
    return _APPENDING.format(before=before, half=half, whole=whole)


# What a summary.json has beside what a test is about.
SUMMARY = {
    "before": {},
    "after": {},
    "steps": 4,
    "seconds": 1.0,
    "compiles": 3,
    "first_step_s": 1.0,
    "median_s": {"step": 0.1},
    "phase_share": {"update": 1.0},
    "is_finished": True,
    "rocks": [],
}
EMBED_SCALE = 20.0  # a fresh model is uniform over the vocabulary; this one has preferences
PLAN = {"train__steps": 4, "checkpoint__every": 2}  # of the run that `workdir` holds
MODEL = transformer.ModelConfig(
    model_type="qwen3",
    vocab_size=640,
    width=16,
    ffn=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=True,
    tied=True,
    max_positions=64,
)
SPARSE = dataclasses.replace(  # a mixture of experts, of which each token uses two
    MODEL,
    model_type="qwen3_moe",
    experts=Experts(num=4, top_k=2, ffn=8),
    pattern=(LayerKind(is_sparse=True),) * MODEL.num_layers,
)


def make_model(folder: Path, cfg: transformer.ModelConfig, seed: int, tokenizer: Any) -> None:
    """Write a model of drawn weights."""
    tree = params.init(transformer.specs(cfg), jax.random.key(seed))
    tree["embed"] = tree["embed"] * EMBED_SCALE
    hf.save(folder, cfg, tree, tokenizer=tokenizer)


def make_folder(
    folder: Path,
    teacher: transformer.ModelConfig = MODEL,
    student: transformer.ModelConfig = MODEL,
) -> Path:
    """Write ``student``, ``teacher``, ``prompts.jsonl`` and ``config.py``."""
    tokenizer = tokenizers.load(config.path_of("embedded:student"))
    make_model(folder / "student", student, 1, tokenizer)
    make_model(folder / "teacher", teacher, 2, tokenizer)
    rows = [{"prompt": f"{i} + {i + 2} = ?", "answer": str(2 * i + 2)} for i in range(12)]
    write_lines(folder / "prompts.jsonl", rows)
    (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
    return folder


def make_teachers(folder: Path) -> Path:
    """The same, a deeper and wider teacher ``other``, and ``rows.jsonl``, which name one each."""
    make_folder(folder)
    other = dataclasses.replace(MODEL, width=24, num_layers=3)
    make_model(folder / "other", other, 7, tokenizers.load(folder / "student"))
    rows = read_lines(folder / "prompts.jsonl")
    for row, who in zip(rows, "sdsdddssdsds", strict=True):
        row["teacher"] = {"s": "sums", "d": "digits"}[who]
    write_lines(folder / "rows.jsonl", rows)
    return folder


def several(folder: Path) -> dict[str, Any]:
    """Keys of a run of that folder."""
    rows = {"data__prompts": folder / "rows.jsonl", "data__heldout": folder / "rows.jsonl"}
    teachers = {"teacher__paths__sums": folder / "teacher"}
    teachers |= {"teacher__paths__digits": folder / "other"}
    return {"teacher__path": "", **teachers, **rows}


def copy_folder(source: Path, target: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(source, target)
    (target / "config.py").write_text(CONFIG.format(folder=str(target)))
    return target


def write_lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def argv(folder: Path, workdir: Path, **keys) -> list[str]:
    """The command line of a run; ``train__steps=3`` is ``--config.train.steps=3``."""
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in keys.items()]
    return ["train", f"--config={folder / 'config.py'}", f"--workdir={workdir}", *flags]


def train(folder: Path, workdir: Path, **keys) -> int:
    """Run the command in this process and return its exit status."""
    return cli.main(argv(folder, workdir, **keys))


def stop_after(folder: Path, workdir: Path, steps: int, **keys) -> None:
    """Run in this process until a wish to stop comes with a step, as by SIGTERM."""
    with processes.Stop() as stop:

        def on_step(step, values):
            stop.number = signal.SIGTERM * (step == steps)

        result = training.train(resolved(folder, **keys), str(workdir), stop=stop, on_step=on_step)
    assert not result["is_finished"]


def start(folder: Path, workdir: Path, **keys) -> subprocess.Popen:
    """Run the command in a process of its own that hangs after three steps, to be killed."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *argv(folder, workdir, **keys)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def resolved(folder: Path, **keys) -> RunConfig:
    """The config of a run, without running it."""
    given, _ = config.load(argv(folder, folder / "unused", **keys)[1:], workdir=None)
    return config.resolve(given)


def saved(folder: Path, workdir: Path, step: int | None = None, **keys):
    """(leaves by name as numpy, the other saved state, step) of a checkpoint of the run."""
    parts = assemble.assemble(resolved(folder, **keys), say=lambda line: None)
    with checkpoint.open(workdir) as saves, jax.set_mesh(parts.mesh):
        state, rest, step = saves.restore(initial.saved(initial.state_template(parts)), step)
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        leaves[jax.tree_util.keystr(path)] = np.asarray(
            jax.random.key_data(leaf) if is_key else leaf
        )
    return leaves, rest, step


def curve(workdir: Path) -> list[dict]:
    """``metrics.jsonl`` without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if not k.endswith("_s")}
        for line in read_lines(workdir / "metrics.jsonl")
    ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The folder of the pair; tests do not write to it."""
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory) -> Path:
    """The folder of a finished run with checkpoints of steps 2 and 4; tests do not write to it."""
    path = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        assert train(tiny, path, **PLAN) == 0
    return path


def use_one_device(patch: pytest.MonkeyPatch) -> None:
    """Give every run the first device only, which compiles and runs faster than eight."""
    patch.setattr(mesh, "make", functools.partial(mesh.make, devices=jax.devices()[:1]))


@pytest.fixture
def one_device(monkeypatch) -> None:
    """:func:`use_one_device` for the length of a test."""
    use_one_device(monkeypatch)
