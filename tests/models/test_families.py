"""What every family must do, whatever its switches: one suite over the goldens."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.special
from gradients import gradient, spread
from safetensors.numpy import load_file

from opd_jax import mesh
from opd_jax.models import hf, transformer
from opd_jax.models.families import FAMILIES
from opd_jax.pytrees import Prompt
from opd_jax.rollout import decode
from opd_jax.rollout.sampling import Sampler

HERE = Path(__file__).parents[1]
GOLDENS = HERE / "goldens"
CASES = sorted(path.name for path in GOLDENS.iterdir())
# What is compiled anew for each: one case of every family, and one of each way of mixing layers.
TIED = [case for case in CASES if case.endswith("_tied")]
MIXED = ["qwen2_tied_sliding", "qwen3_moe_untied_mixed_sharded"]
# Every leaf is in one of these, and layers of which some slide.
GRADIENTS = ["olmo3_tied", "qwen2_untied", "qwen3_moe_tied"]
GRID = {"data": 2, "fsdp": 2, "model": 2}
logits = jax.jit(transformer.logits, static_argnames="cfg")


@functools.cache
def golden(case):
    """Config, parameters and what transformers computes of them."""
    return *hf.load(GOLDENS / case), load_file(GOLDENS / case / "expected.safetensors")


def four(x):
    """As many rows as the mesh divides; one number of them, so that a case compiles once."""
    return np.concatenate([x, x[:1]])


def forward(cfg, tree, ids, valid):
    return np.asarray(logits(tree, ids, cfg=cfg, valid_BT=valid))


def assert_logits(folder, expected):
    cfg, tree = hf.load(folder)
    ids, valid = four(expected["ids"]), four(expected["valid"])
    found, wanted = forward(cfg, tree, ids, valid), four(expected["logits"])
    np.testing.assert_allclose(found[valid], wanted[valid], atol=1e-5, rtol=0)


def test_every_family_is_here_tied_and_untied():
    kinds = {(cfg.model_type, cfg.tied) for cfg, *_ in map(golden, CASES)}
    assert kinds == {(name, tied) for name in FAMILIES for tied in (True, False)}


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    """Under ragged left padding, and beyond the window where layers slide."""
    cfg, _, expected = golden(case)
    assert not expected["valid"].all()
    assert expected["valid"].sum(1).min() > (cfg.window or 0)
    assert_logits(GOLDENS / case, expected)


def make_goldens():
    spec = importlib.util.spec_from_file_location(
        "make_goldens", HERE.parent / "scripts" / "make_goldens.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.ci
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_live(case, tmp_path):
    goldens = make_goldens()
    assert sorted(goldens.CASES) == CASES
    theirs = goldens.build(*goldens.CASES[case], seed=100)
    theirs.save_pretrained(tmp_path / case)
    expected = {k: v.numpy() for k, v in goldens.expected(theirs, seed=100).items()}
    assert_logits(tmp_path / case, expected)


@pytest.mark.ci
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_an_export_to_the_same_logits(case, tmp_path):
    """Those of the folder it came from, computed here: processors round differently."""
    import torch
    import transformers

    cfg, tree, expected = golden(case)
    hf.save(tmp_path / case, cfg, tree, max_shard_bytes=12_000)
    valid = torch.tensor(expected["valid"])

    def theirs(folder):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        assert not any(report[kind] for kind in kinds)
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(expected["ids"]).long(),
                attention_mask=valid.long(),
                position_ids=(valid.long().cumsum(-1) - 1).clamp(min=0),
            ).logits
        return out.numpy()[expected["valid"]]

    found = theirs(tmp_path / case)
    np.testing.assert_array_equal(found, theirs(GOLDENS / case))
    np.testing.assert_allclose(found, expected["logits"][expected["valid"]], atol=1e-4, rtol=0)


# --- export and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", [2**30, 9_000])
def test_export_and_import_are_bitwise_inverse(case, limit, tmp_path):
    cfg, tree, _ = golden(case)
    hf.save(tmp_path / "out", cfg, tree, max_shard_bytes=limit)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (limit < 2**30)
    again_cfg, again = hf.load(tmp_path / "out")
    assert again_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("fused")])
def test_export_writes_the_tensors_and_the_fields_that_it_read(case, tmp_path):
    cfg, tree, _ = golden(case)
    hf.save(tmp_path / "out", cfg, tree)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = {}
    for file in GOLDENS.joinpath(case).glob("model*.safetensors"):
        theirs |= load_file(file)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    given, found = (
        json.loads((folder / "config.json").read_text())
        for folder in (GOLDENS / case, tmp_path / "out")
    )
    # The same layers without experts may be said in several ways.
    found |= {k: given[k] for k in ("decoder_sparse_step", "mlp_only_layers") if k in given}
    found["rope_parameters"] = merged(found["rope_parameters"], given["rope_parameters"])
    assert {k: v for k, v in found.items() if k in given and given[k] != v} == {}


def merged(found, given):
    """Those of the fields that were given: ours have all numbers, theirs may leave out defaults."""
    return {
        name: merged(found[name], value) if isinstance(value, dict) else found[name]
        for name, value in given.items()
    }


# --- where it runs --------------------------------------------------------------------------------


def test_every_leaf_has_its_gradient_checked():
    leaves = {case: set(transformer.specs(golden(case)[0])["layers"]) for case in CASES}
    assert set().union(*leaves.values()) == set().union(*(leaves[case] for case in GRADIENTS))


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_on_a_mesh_and_on_one_device_agree(case):
    cfg, tree, expected = golden(case)
    ids, valid = four(expected["ids"]), four(expected["valid"])
    alone_grads, alone = gradient(tree, ids, valid, cfg=cfg)
    with jax.set_mesh(mesh.make(**GRID)):
        placed = spread(tree, cfg)
        grads, out = gradient(placed, ids, valid, cfg=cfg)
    np.testing.assert_allclose(np.asarray(out)[valid], np.asarray(alone)[valid], atol=1e-5)
    for (path, grad), leaf in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(placed), strict=True
    ):
        assert grad.sharding == leaf.sharding, path
        assert np.abs(grad).max() > 0, path
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), b, atol=2e-5), grads, alone_grads
    )


@pytest.mark.parametrize("case", TIED + MIXED)
def test_padding_and_later_tokens_do_not_reach_the_logits(case):
    cfg, tree, expected = golden(case)
    ids, valid = four(expected["ids"]), four(expected["valid"])
    before = forward(cfg, tree, ids, valid)
    other = np.where(valid, ids, (ids + 7) % cfg.vocab_size)
    other[:, 15:] = (other[:, 15:] + 1) % cfg.vocab_size
    changed = forward(cfg, tree, other, valid)
    early = valid & (np.arange(ids.shape[1]) < 15)
    np.testing.assert_array_equal(changed[early], before[early])
    assert (np.abs(changed - before).max(-1) > 1e-3)[:, 15:].all()


@pytest.mark.parametrize("case", TIED + MIXED)
def test_a_rollout_is_a_prefill_and_decoding_that_equal_the_full_forward(case):
    """On a mesh, from ragged prompts, and on beyond the window where layers slide."""
    cfg, tree, _ = golden(case)
    width, new, starts = 8, 12, np.array([0, 2, 5, 7], np.int32)
    ids = np.random.default_rng(0).integers(cfg.vocab_size, size=(4, width), dtype=np.int32)
    sampler = Sampler(vocab_size=cfg.vocab_size, stop_ids=(3,), pad_id=3)
    with jax.set_mesh(mesh.make(**GRID)):
        answers = decode.sample(
            spread(tree, cfg),
            Prompt(ids_BP=ids, start_B=starts),
            jax.random.key(1),
            cfg=cfg,
            sampler=sampler,
            max_new=new,
        )
    answers = jax.tree.map(np.asarray, answers)
    assert answers.mask_BT[:, width].all()
    assert answers.mask_BT[:, width + 5].any()
    valid = (np.arange(width + new) >= starts[:, None]) & (
        answers.mask_BT | (np.arange(width + new) < width)
    )
    out = scipy.special.log_softmax(forward(cfg, tree, answers.ids_BT, valid), axis=-1)
    expected = np.take_along_axis(out[:, :-1], answers.ids_BT[:, 1:, None], axis=-1)[:, :, 0]
    scored = answers.mask_BT[:, 1:]
    np.testing.assert_allclose(answers.logp_BT[:, 1:][scored], expected[scored], atol=2e-5)
