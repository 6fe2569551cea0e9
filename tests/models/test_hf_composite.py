"""The text part of a folder with several parts: made from a model of text alone by renaming."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax.models import hf, hf_composite, hf_config

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = ("gemma3_text_tied", "gemma3_text_untied_linear")
# How transformers before 4.52, and published folders, and transformers since name tensors.
SPELLINGS = {
    "old": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    "new": {"model.": "model.language_model.", "lm_head.": "lm_head."},
}
VISION = {
    "old": ("vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.norm"),
    "new": ("model.vision_tower.vision_model.norm.weight", "model.multi_modal_projector.norm"),
}
TOP = ("eos_token_id", "bos_token_id", "pad_token_id")


def wrap(case, folder, spelling):
    """The same model as the text part of a Gemma3ForConditionalGeneration."""
    shutil.copytree(GOLDENS / case, folder)
    text = json.loads((folder / "config.json").read_text())
    whole = {name: text.pop(name) for name in TOP if name in text} | {"eos_token_id": [1, 106]}
    text.pop("architectures")
    whole |= {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"hidden_size": 8, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    }
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "generation_config.json").unlink(missing_ok=True)
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        old, new = next(p for p in SPELLINGS[spelling].items() if name.startswith(p[0]))
        tensors[new + name.removeprefix(old)] = value
    tensors |= {name: np.full((3,), np.nan, np.float32) for name in VISION[spelling]}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_text_part_is_the_model_and_is_exported_alone(case, spelling, tmp_path):
    folder = wrap(case, tmp_path / "whole", spelling)
    cfg, tree = hf.load(folder)
    expected, leaves = hf.load(GOLDENS / case)
    assert cfg == expected
    assert hf.generation_eos(folder) == (1, 106)
    jax.tree.map(np.testing.assert_array_equal, tree, leaves)
    hf.save(tmp_path / "out", cfg, tree, source=folder)
    again, saved = hf.load(tmp_path / "out")
    assert again == expected
    jax.tree.map(np.testing.assert_array_equal, saved, leaves)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert not {"text_config", "vision_config", "mm_tokens_per_image"} & raw.keys()
    assert raw["eos_token_id"] == [1, 106]


def test_fields_that_published_folders_leave_out():
    """As gemma-3-4b-it has it, whose other numbers are those of transformers' own defaults."""
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152},
    }
    cfg = hf_config.parse_config(raw)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.vocab_size) == (8, 4, 256, 262_208)
    assert (cfg.tied, cfg.window, cfg.max_positions) == (True, 1024, 131_072)
    assert (cfg.rope.factor, cfg.rope.theta) == (8.0, 1e6)
    assert [i for i, kind in enumerate(cfg.kinds) if not kind.is_sliding] == [5, 11, 17, 23, 29]


@pytest.mark.parametrize(
    ("kind", "architecture", "parts"),
    [
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", ["vision_config"]),
        ("llama4", "Llama4ForConditionalGeneration", ["text_config", "vision_config"]),
        ("mistral3", "Mistral3ForConditionalGeneration", ["text_config", "vision_config"]),
        ("gemma3", "Gemma3ForSequenceClassification", ["text_config"]),
        ("paligemma", "PaliGemmaForConditionalGeneration", []),
    ],
)
def test_others_are_refused_by_name(kind, architecture, parts):
    raw = {"model_type": kind, "architectures": [architecture], **{key: {} for key in parts}}
    with pytest.raises(ValueError, match="several parts") as error:
        hf_config.parse_config(raw)
    for word in (architecture, *parts, *hf_composite.COMPOSITES, "Gemma3ForConditionalGeneration"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"text_config": {"hidden_size": -1}}, "text_config.*hidden_size"),
        ({"text_config": None}, "text_config: field 'hidden_size' is missing"),
    ],
)
def test_what_the_text_part_cannot_be(change, named, tmp_path):
    folder = wrap(CASES[0], tmp_path / "whole", "old")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=named):
        hf.read_config(folder)


def test_a_tensor_in_both_spellings(tmp_path):
    folder = wrap(CASES[0], tmp_path / "whole", "old")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"repeats tensors.*model\.norm\.weight"):
        hf.load(folder)
