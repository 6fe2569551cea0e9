"""Make the parity goldens: tiny random Hugging Face models with the logits that transformers gives.

    pip install torch==2.13.0 transformers==5.23.0
    python scripts/make_goldens.py --out=tests/goldens

Each case is a folder as ``save_pretrained`` writes it, with ``expected.safetensors`` beside the
weights: ``ids`` [B, T], ``valid`` [B, T] (ragged left padding) and ``logits`` [B, T, V]. The
tests then need neither torch nor a download. Takes seconds on CPU, gives the same files each time.
"""

import argparse
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
}
BATCH, TIME, PADS = 3, 20, (0, 3, 11)
# The stretched kinds start from 8 positions, so that 20 tokens lie well beyond.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8,
}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
QWEN2 = {"head_dim": None}  # this family has no such field: hidden_size / num_attention_heads
LATE = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
FULL, SLIDING = "full_attention", "sliding_attention"
BOTH = {"layer_types": [SLIDING, FULL, SLIDING], "num_hidden_layers": 3, "sliding_window": 5}
LOCAL = {"rope_type": "default", "rope_theta": 50.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0}
GEMMA3 = BOTH | {"query_pre_attn_scalar": 6, "eos_token_id": [1, 7]}
OLMO = {"eos_token_id": 2}
CASES = {
    "llama_tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": PLAIN}),
    "llama_untied_llama3": ("llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": PLAIN, **QWEN2}),
    "qwen2_untied": ("qwen2", {"tie_word_embeddings": False, "rope_parameters": PLAIN, **QWEN2}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, "rope_parameters": PLAIN}),
    "qwen3_untied_yarn": ("qwen3", {"tie_word_embeddings": False, "rope_parameters": YARN}),
    "qwen3_untied_sharded": ("qwen3", {"tie_word_embeddings": False, "rope_parameters": PLAIN}),
    "qwen2_tied_sliding": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": PLAIN, **QWEN2, **LATE},
    ),
    "qwen3_untied_sliding": (
        "qwen3",
        {
            "tie_word_embeddings": False,
            "rope_parameters": PLAIN,
            **BOTH,
            "use_sliding_window": True,
        },
    ),
    "mistral_tied": (
        "mistral",
        {"tie_word_embeddings": True, "rope_parameters": PLAIN, "sliding_window": 5},
    ),
    "mistral_untied": (
        "mistral",
        {"tie_word_embeddings": False, "rope_parameters": PLAIN, "sliding_window": None},
    ),
    "qwen3_moe_tied": (
        "qwen3_moe",
        {"tie_word_embeddings": True, "rope_parameters": PLAIN, "num_experts": 4, **MOE},
    ),
    "qwen3_moe_untied_mixed_sharded": (
        "qwen3_moe",
        {
            "tie_word_embeddings": False,
            "rope_parameters": PLAIN,
            "num_experts": 4,
            **MOE,
            "norm_topk_prob": False,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    "mixtral_tied": (
        "mixtral",
        {"tie_word_embeddings": True, "rope_parameters": PLAIN, "num_local_experts": 4},
    ),
    "mixtral_untied_fused": (
        "mixtral",
        {"tie_word_embeddings": False, "rope_parameters": PLAIN, "num_local_experts": 4},
    ),
    "gemma3_text_tied": (
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {FULL: PLAIN, SLIDING: LOCAL},
            **GEMMA3,
        },
    ),
    "gemma3_text_untied_linear": (
        "gemma3_text",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {FULL: LINEAR, SLIDING: LOCAL},
            **GEMMA3,
        },
    ),
    "olmo2_tied": ("olmo2", {"tie_word_embeddings": True, "rope_parameters": PLAIN, **OLMO}),
    "olmo2_untied": ("olmo2", {"tie_word_embeddings": False, "rope_parameters": PLAIN, **OLMO}),
    "olmo3_tied": (
        "olmo3",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {FULL: YARN, SLIDING: PLAIN},
            **BOTH,
            **OLMO,
        },
    ),
    "olmo3_untied": (
        "olmo3",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {FULL: PLAIN, SLIDING: PLAIN},
            **BOTH,
            **OLMO,
        },
    ),
}


def build(kind: str, fields: dict, seed: int) -> transformers.PreTrainedModel:
    """A random model whose every tensor matters: larger weights, norms off 1, biases off 0."""
    fields = SIZES | fields
    if fields["head_dim"] is None:
        del fields["head_dim"]
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=draw)
            middle = 0 if kind.startswith("gemma") else 1  # which stores norms less 1
            value.copy_(middle + 0.2 * noise if "norm" in name else 0.3 * noise)
    return model.eval()


def expected(model: transformers.PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """Random ids under ragged left padding, and the logits there."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (BATCH, TIME), generator=draw)
    valid = torch.arange(TIME)[None] >= torch.tensor(PADS)[:, None]
    positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=valid.long(), position_ids=positions)
    return {"ids": ids.int(), "valid": valid, "logits": out.logits.contiguous()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the case folders")
    out = parser.parse_args().out
    for seed, (name, (kind, fields)) in enumerate(CASES.items()):
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        model = build(kind, fields, seed)
        limit = "12KB" if name.endswith("sharded") else "1MB"
        is_fused = name.endswith("fused")
        model.save_pretrained(folder, max_shard_size=limit, save_original_format=not is_fused)
        tensors = expected(model, seed)
        save_file(tensors, folder / "expected.safetensors")
        print(f"{name}: logits of std {tensors['logits'].std():.2f}")


if __name__ == "__main__":
    main()
