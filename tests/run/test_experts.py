"""A dense student learns from a teacher of experts, with the real commands, on one device and more.

On a mesh two devices share the experts of each layer. Then what such a pair cannot be.
"""

import csv
import dataclasses
import functools
import json

import jax
import layouts
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file

from opd_jax import cli, mesh
from opd_jax.models import hf, params, transformer
from opd_jax.models.architecture import Experts, LayerKind

tiny = tiny_run.tiny
TENSOR = "model.layers.1.mlp.experts.3.up_proj.weight"
EXPERTS = Experts(num=4, top_k=2, ffn=24)
# The last layer has experts, the first has none, as where mlp_only_layers names it.
MODEL = dataclasses.replace(
    tiny_run.MODEL,
    model_type="qwen3_moe",
    experts=EXPERTS,
    pattern=(LayerKind(), LayerKind(is_sparse=True)),
)
PLAN = {
    "train__steps": 2,
    "rock__mode": "ema",
    "rock__top_k": 8,
    "rock__every": 1,
    "eval__every": 2,
    "eval__prompts": 4,
    "eval__kl_prompts": 4,
    "rollout__samples": 1,
}
RTOL = 2e-3  # of the resume matrix: on another mesh sums are taken in another order


def write_model(folder, cfg, seed):
    """A random model with preferences, in each of its parts."""
    tree = params.init(transformer.specs(cfg), jax.random.key(seed))
    tree = jax.tree.map(lambda x: x * tiny_run.EMBED_SCALE if x.std() > 0 else x, tree)
    hf.save(folder, cfg, tree, source=folder.parent / "student")


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """The tiny pair with a teacher of experts."""
    folder = tmp_path_factory.mktemp("experts") / "pair"
    tiny_run.copy_folder(tiny, folder)
    for file in (folder / "teacher").iterdir():
        file.unlink()
    write_model(folder / "teacher", MODEL, 3)
    return folder


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    """The workdirs of one run: of this process's first device, and of a command of four."""
    folder, layout = tmp_path_factory.mktemp("trained"), layouts.LAYOUTS["fsdp2-model2"]
    layouts.run(layout, [*tiny_run.argv(pair, folder / "four", **PLAN), *layout.flags])
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert tiny_run.train(pair, folder / "one", **PLAN) == 0
    return folder / "one", folder / "four"


def test_a_run_gives_the_same_numbers_on_a_mesh(trained):
    one, four = map(tiny_run.curve, trained)
    assert [line["step"] for line in one] == [line["step"] for line in four]
    compared = 0
    for line, other in zip(one, four, strict=True):
        for name in ("loss", "kl_nats", "grad_norm", "eval/kl_nats"):
            if name in line:
                np.testing.assert_allclose(other[name], line[name], rtol=RTOL, err_msg=name)
                assert line[name] > 1e-3  # the two models differ
                compared += 1
    assert compared > 3 * PLAN["train__steps"]
    for workdir in trained:
        assert json.loads((workdir / "summary.json").read_text())["is_finished"]


def types(out):
    with (out / "types.csv").open() as file:
        return list(csv.DictReader(file))


def test_rocks_of_a_run_are_the_same_on_a_mesh(trained, tmp_path, monkeypatch):
    argv = ["rocks", f"--run={trained[1]}", "--k=4", "--max-new=6", "--batch=4"]
    axes = ["--mesh-fsdp=2", "--mesh-model=2"]
    assert cli.main([*argv, *axes, f"--out={tmp_path / 'more'}"]) == 0
    tiny_run.use_one_device(monkeypatch)
    assert cli.main([*argv, f"--out={tmp_path / 'one'}"]) == 0
    one, more = types(tmp_path / "one"), types(tmp_path / "more")
    assert len(one) > 4
    assert [row["token_id"] for row in one] == [row["token_id"] for row in more]
    for column, rtol in {"count": 0, "kl_sum": RTOL, "kl_mean": RTOL}.items():
        pairs = [(float(b[column]), float(a[column])) for a, b in zip(one, more, strict=True)]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=rtol, err_msg=column)


def test_the_export_of_a_run_is_the_student(trained, tmp_path):
    """What the command writes is dense, whatever taught it."""
    assert cli.main(["export", f"--workdir={trained[1]}", f"--out={tmp_path / 'model'}"]) == 0
    cfg, tree = hf.load(tmp_path / "model")
    assert (cfg.model_type, cfg.experts) == ("qwen3", None)
    assert "router" not in tree["layers"]


# --- what cannot be used: told in one message, before anything is written -------------------------


def set_fields(**fields):
    """Damage to config.json; what does not divide is known from there."""

    def damage(teacher):
        raw = json.loads((teacher / "config.json").read_text())
        (teacher / "config.json").write_text(json.dumps(raw | fields))

    return damage


def without(name):
    """Damage to the weights: a tensor is missing."""

    def damage(teacher):
        tensors = load_file(teacher / "model.safetensors")
        del tensors[name]
        save_file(tensors, teacher / "model.safetensors")

    return damage


def without_file(teacher):
    """Damage to the weights, in several files: one is missing."""
    cfg, tree = hf.load(teacher)
    (teacher / "model.safetensors").unlink()
    hf.save(teacher.parent / "sharded", cfg, tree, max_shard_bytes=12_000)
    for file in (teacher.parent / "sharded").glob("model*"):
        file.rename(teacher / file.name)
    index = json.loads((teacher / "model.safetensors.index.json").read_text())["weight_map"]
    (teacher / index[TENSOR]).unlink()


FIVE = {"num_experts": 5, "num_local_experts": 5}
BAD = {
    "experts": (set_fields(**FIVE), {"model": 2}, ["teacher has 5 experts", "divisor of 1;"]),
    "heads": (set_fields(), {"model": 4}, ["student has 2 key/value heads", "a divisor of 2;"]),
    "vocabulary": (set_fields(vocab_size=641), {"model": 2}, ["641 rows of the vocabulary"]),
    "width": (set_fields(), {"fsdp": 3}, ["16 features", "fsdp", "a divisor of 16;"]),
    "a tensor": (without(TENSOR), {}, [f"missing tensors: {TENSOR};", "teacher"]),
    "a file": (without_file, {}, ["files, missing are: model-000", "finish the download"]),
    "an expert more": (set_fields(**FIVE), {}, ["missing tensors", "experts.4.down_proj"]),
    "an expert less": (
        set_fields(num_experts=3, num_local_experts=3),
        {},
        ["unknown tensors: model.layers.1.mlp.experts.3.down_proj"],
    ),
    "more than there are": (set_fields(num_experts_per_tok=9), {}, ["9 experts per token of 4"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_before_anything_is_written(pair, tmp_path, what, monkeypatch, capsys):
    damage, axes, words = BAD[what]
    folder, num = tmp_path / "pair", axes.get("model", 1) * axes.get("fsdp", 1)
    tiny_run.copy_folder(pair, folder)
    damage(folder / "teacher")
    patched = functools.partial(mesh.make, devices=jax.devices()[:num])
    monkeypatch.setattr(mesh, "make", patched)
    sizes = {f"mesh__{axis}": size for axis, size in axes.items()}
    prompts = {"train__prompts": 6}  # divide over as many shards as are asked for here
    assert tiny_run.train(folder, tmp_path / "run", **sizes, **prompts) == 1
    message = capsys.readouterr().err
    for word in (*words, *(f"--config.mesh.{axis}" for axis in axes)):
        assert word in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_commands_without_a_config_name_their_own_flags(pair, tmp_path, capsys):
    """Eight devices share two heads: told before answers are begun."""
    out, prompts = tmp_path / "answers.jsonl", pair / "prompts.jsonl"
    argv = ["generate", f"--model={pair / 'teacher'}", f"--prompts={prompts}", f"--out={out}"]
    assert cli.main([*argv, "--mesh-model=8"]) == 1
    message = capsys.readouterr().err
    assert "the model has 2 key/value heads" in message
    assert "choose --mesh-model" in message
    assert "--config" not in message
    assert list(tmp_path.iterdir()) == []
