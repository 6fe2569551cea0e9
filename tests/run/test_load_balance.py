"""The load-balancing loss of a student with experts, through the real command."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_run

from opd_jax import mesh
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf, params, transformer
from opd_jax.models.architecture import Experts, LayerKind

one_device = tiny_run.one_device
NUM, TOP_K, WEIGHT = 8, 2, 0.5
MODEL = dataclasses.replace(
    tiny_run.MODEL,
    model_type="qwen3_moe",
    experts=Experts(num=NUM, top_k=TOP_K, ffn=12),
    pattern=(LayerKind(), LayerKind(is_sparse=True)),
)
# All prompts and answers are given, so that what is compared is what was computed of them.
KEYS = {
    "train__stage": "off_policy",
    "kl__direction": "forward",
    "data__shuffle": False,
    "train__steps": 2,
    "optim__name": "sgd",  # Adam would show any gradient, however small, as one step
    "train__load_balance": WEIGHT,
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """The tiny pair with a student of experts, and answers of unequal lengths."""
    folder = tiny_run.make_folder(tmp_path_factory.mktemp("sparse"))
    tokenizer = tokenizers.load(folder / "student")
    tree = params.init(transformer.specs(MODEL), jax.random.key(3))
    tree["embed"] *= tiny_run.EMBED_SCALE
    tree["layers"]["router"] *= 50.0  # else all experts are chosen alike
    hf.save(folder / "experts", MODEL, tree, tokenizer=tokenizer)
    rows = [{"prompt": f"{i} + 2 = ?", "completion": "1" * (1 + i % 5)} for i in range(16)]
    tiny_run.write_lines(folder / "answers.jsonl", rows)
    return folder


def trained(sparse, workdir, sizes, monkeypatch, **keys):
    """The metrics of a run on a mesh."""
    make, devices = mesh.make, jax.devices()[: int(np.prod(sizes))]
    axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__model"), sizes, strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(mesh, "make", lambda *given: make(*given, devices=devices))
        keys |= {"student__path": sparse / "experts", "data__prompts": sparse / "answers.jsonl"}
        assert tiny_run.train(sparse, workdir, **KEYS, **axes, **keys) == 0
    return tiny_run.curve(workdir)


def test_pieces_and_meshes_do_not_change_it(sparse, tmp_path, monkeypatch):
    whole = trained(sparse, tmp_path / "whole", (2, 2, 2), monkeypatch)
    pieces = trained(sparse, tmp_path / "pieces", (1, 1, 1), monkeypatch, train__microbatches=4)
    names = ("loss", "grad_norm", "divergence", "load_balance_loss", "fullest_expert_share")
    for a, b in zip(whole, pieces, strict=True):
        assert {k: b[k] for k in names} == pytest.approx({k: a[k] for k in names}, rel=2e-4)
        assert a["loss"] == pytest.approx(
            a["divergence"] + WEIGHT * a["load_balance_loss"], rel=1e-5
        )
        assert a["load_balance_loss"] > 1.01 * TOP_K  # its least, where all get the same
        assert 1 / NUM < a["fullest_expert_share"] <= 1 / TOP_K
    first, second = whole
    assert first["load_balance_loss"] != second["load_balance_loss"]


@pytest.mark.usefixtures("one_device")
def test_of_a_student_without_experts_it_is_refused(sparse, tmp_path, capsys):
    assert tiny_run.train(sparse, tmp_path / "run", train__load_balance=0.01) == 1
    message = capsys.readouterr().err
    assert "train.load_balance is 0.01: expected 0, since the student (qwen3) has no" in message
    assert "set --config.train.load_balance=0" in message
    assert not (tmp_path / "run").exists()
