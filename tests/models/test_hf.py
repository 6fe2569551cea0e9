import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax import mesh
from opd_jax.models import hf, hf_config, params, transformer
from opd_jax.models.rope import Rope

HERE = Path(__file__).parents[1]
GOLDENS = HERE / "goldens"
logits = jax.jit(transformer.logits, static_argnames="cfg")


def assert_logits(folder, expected, *, atol=1e-5, rtol=0.0):
    cfg, tree = hf.load(folder)
    valid = expected["valid"]
    out = logits(tree, expected["ids"], cfg=cfg, valid_BT=valid)
    np.testing.assert_allclose(
        np.asarray(out)[valid], expected["logits"][valid], atol=atol, rtol=rtol
    )


def copied(case, tmp_path):
    """A copy of a golden, to be damaged."""
    target = tmp_path / "model"
    shutil.copytree(GOLDENS / case, target)
    (target / "expected.safetensors").unlink()
    return target


@pytest.fixture
def folder(tmp_path):
    return copied("llama_tied", tmp_path)


def edit(folder, **fields):
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.ci
def test_smollm2_equals_transformers():
    import torch
    import transformers

    path = os.environ["OPD_JAX_SMOLLM2"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    text = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
        "May. How many clips did she sell altogether? Let us think step by step. In May it was 24."
    )
    row = np.array(transformers.AutoTokenizer.from_pretrained(path)(text)["input_ids"])[:32]
    ids = np.stack([row, np.roll(row, 9)])
    valid = np.arange(32)[None] >= np.array([[0], [9]])
    mask = torch.tensor(valid).long()
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(ids),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        )
    expected = {"ids": ids.astype(np.int32), "valid": valid, "logits": out.logits.numpy()}
    # Logits reach 35, where transformers' own f32 run is 1.5e-4 from its f64 run: rounding needs a
    # relative part.
    assert_logits(path, expected, atol=1e-4, rtol=1e-5)


# --- both directions ------------------------------------------------------------------------------


def test_a_mesh_gets_the_same_values_in_place(tmp_path):
    grid = mesh.make(data=2, fsdp=2, model=2)
    for case in ("qwen2_untied", "qwen3_tied", "mixtral_untied_fused"):
        cfg, alone = hf.load(GOLDENS / case)
        _, placed = hf.load(GOLDENS / case, mesh=grid)
        jax.tree.map(np.testing.assert_array_equal, placed, alone)
        places = params.shardings(transformer.specs(cfg), grid)
        assert jax.tree.map(lambda x: x.sharding, placed) == places
    hf.save(tmp_path / "out", cfg, placed, max_shard_bytes=9_000)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "out")[1], alone)


@pytest.mark.parametrize(
    ("case", "what"), [("llama_tied", r"\d key/value heads"), ("mixtral_tied", r"\d experts")]
)
def test_a_mesh_that_does_not_divide_is_refused(case, what):
    with pytest.raises(ValueError, match=rf"has .*{what}.*--config\.mesh\.model"):
        hf.load(GOLDENS / case, mesh=mesh.make(data=1, fsdp=1, model=8))


def test_dtypes_of_both_directions(tmp_path):
    cfg, tree = hf.load(GOLDENS / "qwen3_tied", dtype=jnp.bfloat16)
    assert cfg.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
    hf.save(tmp_path / "same", cfg, tree)
    hf.save(tmp_path / "wide", cfg, tree, dtype=jnp.float32)
    for name, dtype in (("same", "bfloat16"), ("wide", "float32")):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == dtype
        assert load_file(tmp_path / name / "model.safetensors")["model.norm.weight"].dtype == dtype
        _, again = hf.load(tmp_path / name, dtype=jnp.bfloat16)
        jax.tree.map(np.testing.assert_array_equal, again, tree)


class Tokenizer:
    """Stands in for a transformers tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_export_carries_tokenizer_and_special_ids(tmp_path):
    cfg, tree = hf.load(GOLDENS / "qwen3_tied")
    hf.save(tmp_path / "one", cfg, tree, tokenizer=Tokenizer())
    hf.save(tmp_path / "two", cfg, tree, tokenizer=Tokenizer(), eos_ids=(2, 7))
    assert (tmp_path / "one" / "tokenizer.json").exists()
    raw = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], "pad_token_id" in raw) == (1, 2, False)
    assert hf.generation_eos(tmp_path / "one") == (2,)
    assert hf.generation_eos(tmp_path / "two") == (2, 7)


def test_generation_eos_prefers_the_generation_config(folder):
    assert hf.generation_eos(folder) == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert hf.generation_eos(folder) == (5, 6)
    (folder / "generation_config.json").unlink()
    assert hf.generation_eos(folder) == (2,)
    edit(folder, eos_token_id=None)
    assert hf.generation_eos(folder) == ()
    assert hf.generation_eos(GOLDENS / "gemma3_text_tied") == (1, 7)


def test_export_refuses_a_folder_that_holds_something(folder):
    cfg, tree = hf.load(folder)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        hf.save(folder, cfg, tree)


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    class Broken(Tokenizer):
        def save_pretrained(self, folder):
            super().save_pretrained(folder)
            raise OSError("disk full")

    cfg, tree = hf.load(GOLDENS / "qwen3_tied")
    with pytest.raises(OSError, match="disk full"):
        hf.save(tmp_path / "out", cfg, tree, tokenizer=Broken())
    assert not list(tmp_path.iterdir())


# --- config.json ----------------------------------------------------------------------------------


def test_both_rope_spellings_mean_the_same(folder):
    shutil.copy(GOLDENS / "llama_untied_llama3" / "config.json", folder)
    new = hf.read_config(folder)
    assert new.rope == Rope(500.0, "llama3", 8.0, 8, 1.0, 4.0)
    numbers = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = numbers.pop("rope_theta")
    edit(folder, rope_parameters=None, rope_theta=theta, rope_scaling=numbers)
    assert hf.read_config(folder) == new
    edit(folder, rope_scaling={**numbers, "type": "llama3", "rope_type": None})
    edit(folder, rope_parameters={**numbers, "rope_theta": 400.0})
    with pytest.raises(ValueError, match="disagree"):
        hf.read_config(folder)


def test_plain_rope_of_older_files(folder):
    edit(folder, rope_parameters=None, rope_theta=77)
    assert hf.read_config(folder).rope == Rope(theta=77.0)
    edit(folder, rope_theta=None)
    assert hf.read_config(folder).rope == Rope(theta=10_000.0)


def test_yarn_attention_factor(folder):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    edit(folder, rope_parameters={**yarn, "attention_factor": 1.5, "beta_fast": 16})
    rope = hf.read_config(folder).rope
    assert (rope.attention_factor, rope.beta_fast, rope.beta_slow) == (1.5, 16.0, 1.0)
    edit(folder, rope_parameters={**yarn, "mscale": 1.0, "mscale_all_dim": 1.0})
    assert hf.read_config(folder).rope.attention_factor == 1.0


def test_head_dim_defaults(folder):
    edit(folder, head_dim=None)
    assert hf.read_config(folder).head_dim == 4


def test_config_round_trip_keeps_everything():
    rope = Rope(1e6, "yarn", 4.0, 4096, attention_factor=1.2, beta_fast=16.0, truncate=False)
    cfg = transformer.ModelConfig(
        "qwen3", 64, 32, 48, 3, 4, 2, 16, 1e-5, rope, tied=True, qk_norm=True, max_positions=99
    )
    assert hf_config.parse_config(hf_config.config_json(cfg, jnp.float32)) == cfg


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported: expected one of llama, qwen2, qwen3"),
        ({"architectures": ["LlamaForTokenClassification"]}, "expected one of LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
    ],
)
def test_configs_that_would_compute_something_else_are_refused(folder, fields, words):
    edit(folder, **fields)
    with pytest.raises(ValueError, match=words):
        hf.load(folder)


@pytest.mark.parametrize(
    ("case", "fields", "words"),
    [
        ("mistral_tied", {"layer_types": ["full_attention"] * 2}, "a way that mistral does not"),
        ("mistral_tied", {"layer_types": ["sliding_attention"]}, "1 entries.*each of 2 layers"),
        ("qwen2_tied", {"layer_types": ["full_attention", "local"]}, r"unknown are: \['local'\]"),
        ("qwen3_tied", {"layer_types": ["sliding_attention"] * 2}, "sliding_window=None"),
        ("gemma3_text_tied", {"sliding_window": 0}, "sliding_window=0"),
        ("gemma3_text_tied", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3_text_tied", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma3_text_tied", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("qwen3_moe_tied", {"num_experts_per_tok": 5}, "5 experts per token of 4"),
        ("qwen3_moe_tied", {"num_local_experts": 3}, r"unknown tensors: .*experts\.3\."),
        ("qwen3_moe_tied", {"moe_intermediate_size": 13}, r"experts\..* is F32 .*expected shape"),
        ("qwen3_moe_tied", {"mlp_only_layers": [1]}, r"missing tensors: .*1\.mlp\.gate_proj"),
    ],
)
def test_layers_that_are_not_as_their_family_has_them_are_refused(tmp_path, case, fields, words):
    folder = copied(case, tmp_path)
    edit(folder, **fields)
    with pytest.raises(ValueError, match=words):
        hf.load(folder)


def test_a_missing_expert_is_named(tmp_path):
    folder = copied("mixtral_tied", tmp_path)
    edit_tensors(folder, lambda x: x.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"))
    with pytest.raises(
        ValueError, match=r"missing tensors: \S+layers\.1\S+experts\.2\.w3\.weight;"
    ):
        hf.load(folder)


def test_an_expert_that_is_not_finite_is_named(tmp_path):
    folder, name = copied("qwen3_moe_tied", tmp_path), "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors[name].__setitem__((3, 0), np.nan))
    with pytest.raises(ValueError, match=rf"tensor {re.escape(name)} holds 1 of"):
        hf.load(folder)


def test_defaults_of_a_family(tmp_path):
    """As transformers has them where config.json is silent."""
    folder = copied("gemma3_text_tied", tmp_path)
    left_out = ("layer_types", "rope_parameters", "query_pre_attn_scalar", "sliding_window")
    edit(folder, **dict.fromkeys((*left_out, "head_dim", "tie_word_embeddings")))
    edit(folder, num_hidden_layers=8)
    cfg = hf.read_config(folder)
    assert [kind.is_sliding for kind in cfg.kinds] == [True] * 5 + [False] + [True] * 2
    assert (cfg.window, cfg.head_dim, cfg.query_scalar, cfg.tied) == (4096, 256, 256, True)
    assert (cfg.rope, cfg.local_rope) == (Rope(theta=1e6), Rope(theta=1e4))
    older = {"rope_theta": 7e5, "rope_local_base_freq": 7e3, "sliding_window_pattern": 2}
    edit(folder, **older, rope_scaling={"rope_type": "linear", "factor": 8.0})
    cfg = hf.read_config(folder)
    assert [kind.is_sliding for kind in cfg.kinds] == [True, False] * 4
    assert (cfg.rope, cfg.local_rope) == (Rope(7e5, "linear", 8.0), Rope(theta=7e3))


def test_an_inactive_sliding_window_is_fine(folder):
    edit(folder, use_sliding_window=False, sliding_window=4096, max_window_layers=1)
    assert hf.read_config(folder).num_layers == 2


# --- damaged folders ------------------------------------------------------------------------------


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: expected a local Hugging Face"):
        hf.load(tmp_path / "absent")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected safetensors weights"):
        hf.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hf.load(folder)


def test_damaged_files(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .* fetch it again"):
        hf.load(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged \(not JSON"):
        hf.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        hf.load(folder)


def test_tensors_that_do_not_belong_are_named(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.q_proj.lora_A"] = np.zeros((2, 2), np.float32)
        del tensors["model.layers.1.mlp.up_proj.weight"]

    edit_tensors(folder, change)
    with pytest.raises(
        ValueError, match=r"unknown .*0\.self_attn\.q_proj\.lora_A; missing .*1\.mlp\.up_proj"
    ):
        hf.load(folder)


def test_old_rotary_buffers_are_no_weights(folder):
    _, before = hf.load(folder)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit_tensors(folder, lambda tensors: tensors.update(buffer))
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder)[1], before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_that_are_not_finite_are_named(folder, name, value, dtype):
    edit_tensors(
        folder,
        lambda tensors: tensors[name].__setitem__((3, *[0] * (tensors[name].ndim - 1)), value),
    )
    with pytest.raises(
        ValueError, match=rf"model: tensor {re.escape(name)} holds 1 of .*\[3"
    ) as error:
        hf.load(folder, dtype=dtype)
    assert "expected finite weights" in str(error.value)


def test_weights_beyond_a_dtype_are_named(folder):
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 1e6))
    hf.load(folder, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight holds 1e\+06.*float16"):
        hf.load(folder, dtype=jnp.float16)


@pytest.mark.parametrize("axes", [None, {"fsdp": 4, "model": 2}])
def test_rows_of_unused_ids_may_hold_anything(folder, axes):
    """They are never looked up and masked; a NaN would still reach the gradient of the states."""
    grid = axes and mesh.make(**axes, devices=jax.devices())
    _, before = hf.load(folder, mesh=grid)
    edit_tensors(
        folder,
        lambda tensors: tensors["model.embed_tokens.weight"].__setitem__(slice(40, 44), np.nan),
    )
    with pytest.raises(ValueError, match="not finite"):
        hf.load(folder, mesh=grid)
    with pytest.raises(ValueError, match="not finite"):
        hf.load(folder, mesh=grid, num_ids=41)
    _, tree = hf.load(folder, mesh=grid, num_ids=40)
    expected = np.asarray(before["embed"]).copy()
    expected[40:44] = 0
    np.testing.assert_array_equal(tree["embed"], expected)


@pytest.mark.parametrize("value", [np.zeros((5, 16), np.float32), np.zeros((48, 16), np.int8)])
def test_shape_and_dtype_of_tensors_are_checked(folder, value):
    edit_tensors(folder, lambda tensors: tensors.update({"model.embed_tokens.weight": value}))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is .*expected shape \(48, 16\)"):
        hf.load(folder)


def test_a_written_head_of_a_tied_model_must_be_the_embedding(folder):
    def write(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(folder, write)
    assert "head" not in hf.load(folder)[1]
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((47, 3), 9.0))
    with pytest.raises(ValueError, match=r"lm_head\.weight .* differs"):
        hf.load(folder)


def test_sharded_folders(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / "qwen3_untied_sharded", folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    again = load_file(shards[0]) | load_file(shards[1])
    save_file(again, shards[1])
    with pytest.raises(ValueError, match="repeats tensors of another file"):
        hf.load(folder)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        hf.load(folder)
    save_file(again, folder / "model.safetensors")
    with pytest.raises(ValueError, match="holds both"):
        hf.load(folder)


def test_config_and_weights_of_different_models(folder):
    edit(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"unknown tensors: model\.layers\.1"):
        hf.load(folder)
    edit(folder, num_hidden_layers=2, intermediate_size=25)
    with pytest.raises(ValueError, match=r"gate_proj\.weight is F32 \(24, 16\).*\(25, 16\)"):
        hf.load(folder)


def test_remat_and_dtype_do_not_enter_the_export():
    cfg, _ = hf.load(GOLDENS / "llama_tied")
    other = dataclasses.replace(cfg, remat="full", dtype="bfloat16")
    same = hf_config.config_json(cfg, jnp.float32)
    assert hf_config.config_json(other, jnp.float32) == same
