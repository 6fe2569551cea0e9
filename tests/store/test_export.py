"""A checkpoint leaves as a Hugging Face folder with the same bits."""

import dataclasses
import json
import math
import shutil
import signal

import jax
import layouts
import numpy as np
import pytest
import tiny_run
from huggingface_hub import ModelCard

from opd_jax import cli
from opd_jax.models import hf, transformer
from opd_jax.store import export

tiny, workdir = tiny_run.tiny, tiny_run.workdir
PLAN = tiny_run.PLAN


def exported(folder):
    cfg, tree = hf.load(folder)
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    return cfg, {f".params{jax.tree_util.keystr(path)}": np.asarray(x) for path, x in named}


def test_every_device_gets_its_share_of_the_model():
    deep = dataclasses.replace(tiny_run.MODEL, num_layers=jax.device_count())
    template = export._spread(transformer.specs(deep), np.float32)
    leaves = jax.tree.leaves(template)
    whole = sum(math.prod(leaf.shape) for leaf in leaves)
    share = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert share == whole / jax.device_count() > 0
    assert all(leaf.sharding.spec[0] is None for leaf in jax.tree.leaves(template["layers"]))


@pytest.mark.parametrize("step", [None, 2, 4])
def test_the_folder_holds_the_parameters_of_the_step(tiny, workdir, tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    flags = [] if step is None else [f"--step={step}"]
    assert cli.main(["export", f"--workdir={workdir}", f"--out={out}", *flags]) == 0
    cfg, found = exported(out)
    assert cfg == tiny_run.MODEL
    tiny_run.use_one_device(monkeypatch)
    leaves, _, _ = tiny_run.saved(tiny, workdir, step or 4, **PLAN)
    expected = {name: x for name, x in leaves.items() if name.startswith(".params")}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
        assert found[name].dtype == x.dtype


def test_the_folder_has_the_students_tokenizer_and_the_stop_ids(tiny, workdir, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["export", f"--workdir={workdir}", f"--out={out}"]) == 0
    ours = {"config.json", "generation_config.json", "model.safetensors"}
    found, given = ({f.name: f.read_bytes() for f in x.iterdir()} for x in (out, tiny / "student"))
    assert found.keys() - ours - {"README.md"} == given.keys() - ours
    for name in given.keys() - ours:
        assert found[name] == given[name], name
    eos = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert eos in (2, [2])
    assert not any(f.is_symlink() for f in out.iterdir())


def test_the_folder_has_a_model_card(workdir, tmp_path):
    assert cli.main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'my-model'}"]) == 0
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert (card.data.base_model, card.data.library_name) == (None, "transformers")
    text = str(card)
    assert "# my-model" in text
    assert "Exported at step 4." in text
    assert "--config=config.py --workdir=run --config.train.steps=4" in text
    assert "/tmp" not in text
    assert str(workdir.parent) not in text


def test_a_run_without_summary_and_grades_has_a_card(workdir, tmp_path):
    """As one that was killed after a checkpoint."""
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    for name in ("summary.json", "graded.jsonl", "metrics.jsonl"):
        (copy / name).unlink()
    assert cli.main(["export", f"--workdir={copy}", f"--out={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Exported at step 4." in text
    assert "Before and after" not in text


def test_a_home_is_expanded(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(workdir)
    assert cli.main(["export", "--workdir=~/run", "--out=~/out"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_another_tokenizer_than_the_runs_is_refused(tmp_path, workdir, tiny, capsys):
    """The run's own tokenizer is gone, so that the folder would hold one of other ids."""
    copy, student = tmp_path / "run", tmp_path / "student"
    shutil.copytree(workdir, copy)
    shutil.copytree(tiny / "student", student)
    (student / "tokenizer_config.json").write_text("{}")
    record = json.loads((copy / "run.json").read_text())
    record["config"]["student.path"] = str(student)
    (copy / "run.json").write_text(json.dumps(record))
    assert cli.main(["export", f"--workdir={copy}", f"--out={tmp_path / 'out'}"]) == 1
    assert "tokenizer_config.json is another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Hangs with all but the weights written, to be killed.
WAITING = """
import time
from opd_jax.models import hf, transformer
from opd_jax.store import export
def waiting(file, values, beside=None):
    print("writing", flush=True)
    time.sleep(600)
hf.write_shard = waiting
"""


def waiting(workdir, out):
    argv = ["export", f"--workdir={workdir}", f"--out={out}"]
    (started,) = layouts.start(layouts.LAYOUTS["one"], argv, code=WAITING)
    while (line := started.stdout.readline()) != "writing\n":
        assert line, started.wait()
    return started


def test_a_killed_export_leaves_nothing_for_ever(workdir, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["export", f"--workdir={workdir}", f"--out={out}"]
    started = waiting(workdir, out)
    try:
        assert cli.main(argv) == 1  # the other one lives
        assert f"{out} is being written by another process" in capsys.readouterr().err
        assert (tmp_path / ".out.partial" / "folder" / "tokenizer.json").is_file()
    finally:
        started.send_signal(signal.SIGKILL)
        started.communicate()
    assert [f.name for f in tmp_path.iterdir()] == [".out.partial"]
    assert cli.main(argv) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.ci
def test_where_one_process_cannot_write_all_end(workdir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    argv = ["export", f"--workdir={workdir}", f"--out={tmp_path}"]
    text = layouts.run(layouts.LAYOUTS["two-processes"], argv, status=1)
    assert f"{tmp_path} exists and is not an empty folder" in text
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_the_dtype_can_be_chosen(workdir, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["export", f"--workdir={workdir}", f"--out={out}", "--dtype=bfloat16"]) == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    _, halved = exported(out)
    (tmp_path / "full").mkdir()
    assert cli.main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'full'}"]) == 0
    _, full = exported(tmp_path / "full")
    for name, x in full.items():
        np.testing.assert_allclose(halved[name], x, rtol=2**-8)


def test_an_existing_folder_is_refused(workdir, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(["export", f"--workdir={workdir}", f"--out={tmp_path}"]) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path} exists and is not an empty folder" in message
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--step=7"], ("7", "[2, 4]", "name another step")),
        (["--dtype=float7"], ("float7", "bfloat16", "--dtype")),
    ],
)
def test_what_cannot_be_exported_is_named(workdir, tmp_path, capsys, flags, parts):
    assert cli.main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", *flags]) == 1
    message = capsys.readouterr().err
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["export", f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"]) == 1
    assert f"{tmp_path} has no run.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # looking does not write
