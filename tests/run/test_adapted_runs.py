"""A run with LoRA from its first step to its export, through the commands that users call."""

import functools
import json
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file

from opd_jax import cli, mesh
from opd_jax.models import hf, peft
from opd_jax.run import train
from opd_jax.store import checkpoint_record
from opd_jax.store import pair as pairs

tiny = tiny_run.tiny
LORA = {"lora__rank": 4, "lora__alpha": 8.0}
PLAN = LORA | {"checkpoint__every": 2, "eval__every": 2, "eval__batch": 8}
SCALE = 8.0 / 4


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A finished run with adapters, and checkpoints of steps 2 and 4; tests do not write to it."""
    path = tmp_path_factory.mktemp("adapted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert tiny_run.train(tiny, path, **PLAN) == 0
    return path


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    tiny_run.use_one_device(monkeypatch)


def model(ref):
    """The parameters that a reference stands for, as numpy."""
    return jax.tree.map(np.asarray, pairs.open_model(str(ref)).load())


def merged_by_hand(tiny, workdir, step):
    """Base plus adapters from the files, in numpy."""
    _, base = hf.load(tiny / "student")
    base = jax.tree.map(np.asarray, base)
    leaves, _, _ = tiny_run.saved(tiny, workdir, step, **PLAN)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        a, b = (leaves[f".params['layers']['{name}']['{side}']"] for side in "ab")
        w = base["layers"][name]
        change = [x.reshape(-1, 4) @ y.reshape(4, -1) for x, y in zip(a, b, strict=True)]
        base["layers"][name] = w + SCALE * np.reshape(change, w.shape)
    return base


def agree(found, expected, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, atol=atol, rtol=1e-5)
    jax.tree.map(close, found, expected)


def test_a_checkpoint_holds_adapters_alone(tiny, whole, tmp_path):
    record = checkpoint_record.read(whole / "checkpoints" / "4")
    params = {name for name in record["leaves"] if name.startswith("params")}
    assert len(params) == 14
    assert all(name.rpartition(".")[2] in ("a", "b") for name in params)
    moments = [name for name in record["leaves"] if ".mu." in name or ".nu." in name]
    assert len(moments) == 28
    assert not any("embed" in name for name in record["leaves"])


def test_every_command_gets_merged_weights(tiny, whole, tmp_path):
    expected = merged_by_hand(tiny, whole, 4)
    _, base = hf.load(tiny / "student")
    assert np.abs(expected["layers"]["up"] - base["layers"]["up"]).max() > 1e-3
    agree(model(whole), expected)
    agree(model(f"{whole}@2"), merged_by_hand(tiny, whole, 2))
    agree(model(f"{whole}@0"), jax.tree.map(np.asarray, base), 0)
    assert cli.main(["export", f"--workdir={whole}", f"--out={tmp_path / 'out'}"]) == 0
    agree(model(tmp_path / "out"), expected)
    halved = ["export", f"--workdir={whole}", f"--out={tmp_path / 'half'}", "--dtype=bfloat16"]
    assert cli.main(halved) == 0
    agree(model(tmp_path / "half"), expected, 0.01)
    found = [
        cli.main(["generate", f"--model={ref}", f"--prompts={tiny / 'prompts.jsonl'}",
                  f"--out={tmp_path / name}", "--max-new=5", "--limit=4"])
        for ref, name in ((whole, "a.jsonl"), (tmp_path / "out", "b.jsonl"))
    ]  # fmt: skip
    assert found == [0, 0]
    ids = [[row["completion_ids"] for row in tiny_run.read_lines(tmp_path / name)]
           for name in ("a.jsonl", "b.jsonl")]  # fmt: skip
    assert ids[0] == ids[1]


def test_step_0_is_the_student(tiny, whole, tmp_path):
    """Evaluated before training, and sampled from in the first step, as it is without adapters."""
    assert tiny_run.train(tiny, tmp_path / "run", **(PLAN | {"lora__rank": 0})) == 0
    plain, ours = tiny_run.curve(tmp_path / "run"), tiny_run.curve(whole)
    assert ours[0] == plain[0]
    for name in ("kl_nats", "loss", "mean_length", "student_entropy_nats"):
        assert ours[1][name] == plain[1][name], name
    assert ours[1]["grad_norm"] != plain[1]["grad_norm"]
    assert "rounded_share" not in ours[1]


def stopped_at_2(self, state, batch, index, run=train._Loop._step):
    result = run(self, state, batch, index)
    if index + 1 == 2:
        signal.raise_signal(signal.SIGTERM)
    return result


def test_a_resume_is_bit_for_bit(tiny, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "_step", stopped_at_2)
        assert tiny_run.train(tiny, tmp_path / "run", **PLAN) == 128 + signal.SIGTERM
    assert tiny_run.train(tiny, tmp_path / "run", **PLAN) == 0
    (found, rest, _), (expected, other, _) = (
        tiny_run.saved(tiny, path, **PLAN) for path in (tmp_path / "run", whole)
    )
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    assert rest["data"] == other["data"]
    assert tiny_run.curve(tmp_path / "run") == tiny_run.curve(whole)


def test_a_resume_on_another_mesh_agrees(tiny, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "_step", stopped_at_2)
        assert tiny_run.train(tiny, tmp_path / "run", **PLAN) == 128 + signal.SIGTERM
    monkeypatch.undo()
    split = PLAN | {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2}
    assert mesh.make(2, 2, 2).size == 8
    assert tiny_run.train(tiny, tmp_path / "run", **split) == 0
    for line, other in zip(tiny_run.curve(tmp_path / "run"), tiny_run.curve(whole), strict=True):
        for name in ("loss", "kl_nats", "grad_norm", "eval/kl_nats"):
            if name in other:
                np.testing.assert_allclose(line[name], other[name], rtol=2e-3, err_msg=name)
    assert cli.main(["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 0
    tiny_run.use_one_device(monkeypatch)
    agree(model(tmp_path / "out"), merged_by_hand(tiny, whole, 4), 2e-3)


def test_a_changed_base_is_refused(tiny, tmp_path, capsys):
    folder = tiny_run.copy_folder(tiny, tmp_path / "copy")
    workdir = tmp_path / "run"
    assert tiny_run.train(folder, workdir, **PLAN, train__steps=2) == 0
    before = (workdir / "run.json").read_text()
    shutil.copy(tiny / "teacher" / "model.safetensors", folder / "student" / "model.safetensors")
    capsys.readouterr()
    assert tiny_run.train(folder, workdir, **PLAN, train__steps=4) == 1
    told = capsys.readouterr().err
    assert "another student" in told
    assert "model.safetensors is another" in told
    assert (workdir / "run.json").read_text() == before
    for argv in (
        ["export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}"],
        ["generate", f"--model={workdir}", f"--prompts={tiny}/prompts.jsonl",
         f"--out={tmp_path / 'x.jsonl'}"],
    ):  # fmt: skip
        assert cli.main(argv) == 1
        assert "model.safetensors is another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_exported_in_pefts_layout(tiny, whole, tmp_path):
    out = tmp_path / "adapter"
    assert cli.main(["export", f"--workdir={whole}", f"--out={out}", "--adapter"]) == 0
    given = json.loads((out / peft.CONFIG).read_text())
    assert (given["peft_type"], given["r"], given["lora_alpha"]) == ("LORA", 4, 8)
    assert given["target_modules"] == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    tensors = load_file(out / peft.WEIGHTS)
    assert len(tensors) == 2 * 7 * 2
    weights = load_file(tiny / "student" / "model.safetensors")
    assert cli.main(["export", f"--workdir={whole}", f"--out={tmp_path / 'merged'}"]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    changed = 0
    for name, w in weights.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in tensors:
            a, b = (tensors[f"{module}.lora_{side}.weight"] for side in "AB")
            w = w + SCALE * b @ a
            changed += 1
        np.testing.assert_allclose(merged[name], w, atol=1e-6, err_msg=name)
    assert changed == 14
    card = (out / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert "library_name: peft" in card
    assert (out / "tokenizer.json").read_bytes() == (
        tiny / "student" / "tokenizer.json"
    ).read_bytes()


@pytest.fixture(scope="module")
def second(tiny, whole, tmp_path_factory):
    """A run with other adapters, from the merged weights and the rock state of the first one."""
    path = tmp_path_factory.mktemp("second") / "run"
    keys = PLAN | {"init_from": f"{whole}@2", "init_keep": "rock"}
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert tiny_run.train(tiny, path, **keys) == 0
    return path


def test_a_run_goes_on_from_the_merged_weights_of_another(tiny, whole, second, tmp_path):
    first = tiny_run.curve(second)[0]
    at_2 = next(x for x in tiny_run.curve(whole) if x["step"] == 2 and "eval/kl_nats" in x)
    np.testing.assert_allclose(first["eval/kl_nats"], at_2["eval/kl_nats"], rtol=1e-4)
    # Its own base is merged already, so that there are two adapters on each weight.
    assert cli.main(["export", f"--workdir={second}", f"--out={tmp_path / 'out'}"]) == 0
    agree(model(tmp_path / "out"), model(second))
    # A run that trains the whole student may begin there, too.
    keys = {"init_from": str(second), "train__steps": 1}
    assert tiny_run.train(tiny, tmp_path / "full", **keys) == 0
    leaves, _, _ = tiny_run.saved(tiny, tmp_path / "full", **keys)
    moved = leaves[".params['layers']['q']"] - model(second)["layers"]["q"]
    assert 0 < np.abs(moved).max() < 0.02


def test_adapters_of_what_another_run_began_from(tiny, second, whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", f"--workdir={second}", f"--out={out}", "--adapter"]) == 1
    told = capsys.readouterr().err
    assert f"belong to {whole}@2" in told
    assert "leave --adapter out" in told
    copy = tmp_path / "run"
    shutil.copytree(second, copy)
    record = json.loads((copy / "run.json").read_text())
    record["init_from"]["files"]["checkpoint 2"] = "0"
    (copy / "run.json").write_text(json.dumps(record))
    assert cli.main(["export", f"--workdir={copy}", f"--out={out}"]) == 1
    told = capsys.readouterr().err
    assert "no weights of its own, which has changed since: checkpoint 2 is another" in told
    record["init_from"]["name"] = f"{tmp_path}/gone@2"
    (copy / "run.json").write_text(json.dumps(record))
    assert cli.main(["export", f"--workdir={copy}", f"--out={out}"]) == 1
    assert f"holds adapters of {tmp_path}/gone@2 and no weights" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"lora__targets": "q_proj,lm_head"}, ["lm_head", "q_proj, k_proj", "lora.targets"]),
        ({"lora__rank": 17}, ["lora.rank is 17", "at most 16", "--config.lora.rank"]),
        ({"lora__rank": -1}, ["lora.rank is -1", "at least 0"]),
        ({"lora__alpha": 0.0}, ["lora.alpha is 0.0", "above 0"]),
        ({"init_from": "x", "init_keep": "optimizer"}, ["init_keep", "adapters are new"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tiny, tmp_path, capsys, keys, parts):
    assert tiny_run.train(tiny, tmp_path / "run", **(LORA | keys)) == 1
    told = capsys.readouterr().err
    assert all(part in told for part in parts), told
    assert not (tmp_path / "run").exists()


def test_a_run_stays_what_it_is(tiny, whole, capsys):
    assert tiny_run.train(tiny, whole, **(PLAN | {"lora__rank": 0})) == 1
    assert "lora.rank: this run was started with 4, now it is 0" in capsys.readouterr().err


def test_what_has_no_adapters_exports_none(tiny, tmp_path, whole, capsys):
    assert tiny_run.train(tiny, tmp_path / "run", train__steps=1) == 0
    argv = ["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--adapter"]
    assert cli.main(argv) == 1
    assert "has no adapters (lora.rank is 0)" in capsys.readouterr().err
    argv = ["export", f"--workdir={whole}", f"--out={tmp_path / 'out'}", "--adapter"]
    assert cli.main([*argv, "--dtype=bfloat16"]) == 1
    assert "leave --dtype out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_optimizer_stage_wants_moments_of_types(tiny, whole, tmp_path, capsys):
    argv = ["rocks", f"--run={whole}", "--k=4", "--max-new=4", f"--out={tmp_path / 'rocks'}"]
    assert cli.main([*argv, "--with=optimizer"]) == 1
    assert "trained adapters alone (lora.rank 4)" in capsys.readouterr().err
    assert cli.main([*argv[:-1], f"--out={tmp_path / 'plain'}"]) == 0
    assert json.loads((tmp_path / "plain" / "summary.json").read_text())["k"] == 4
