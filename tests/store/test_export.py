"""A checkpoint leaves as a Hugging Face folder with the same bits."""

import json

import jax
import numpy as np
import pytest
import tiny_run

from opd_jax import cli
from opd_jax.models import hf

tiny, workdir = tiny_run.tiny, tiny_run.workdir
PLAN = tiny_run.PLAN


def exported(folder):
    cfg, tree = hf.load(folder)
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    return cfg, {f".params{jax.tree_util.keystr(path)}": np.asarray(x) for path, x in named}


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


def test_the_folder_has_tokenizer_and_stop_ids(workdir, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["export", f"--workdir={workdir}", f"--out={out}"]) == 0
    assert (out / "tokenizer.json").is_file()
    eos = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert eos in (2, [2])


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
