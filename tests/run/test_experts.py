"""A dense student and a teacher of experts that cannot be used together, or on a mesh."""

import dataclasses
import functools
import json

import jax
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
