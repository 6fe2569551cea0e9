"""Random small models whose folders look as those on the hub do, tokenizer and all."""

import json
import shutil
from pathlib import Path

import jax
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from opd_jax import config
from opd_jax.models import hf, hf_config, params, transformer

ROWS = 768  # more than ids, as on the hub
# As tokenizer.json of Llama 3 and of Qwen 2.5 and 3 have them.
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]
QWEN_ADDITIONAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|repo_name|>", "<|file_sep|>"]
QWEN3_PLAIN = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
LLAMA_CHAT = (
    "{{- bos_token }}{%- for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{%- endfor %}"
    "{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{%- endif %}"
)
QWEN_CHAT = (
    "{%- if tools %}<|im_start|>system\n# Tools\n{%- for tool in tools %}\n{{ tool | tojson }}"
    "{%- endfor %}<|im_end|>\n{%- elif messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are Qwen.<|im_end|>\n{%- endif %}{%- for message in messages %}<|im_start|>"
    "{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON = {"vocab_size": ROWS, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}


def _trained(split: str, post=None, normalizer=None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if post is not None:
        backend.post_processor = post
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompts = Path(config.path_of("embedded:prompts/heldout.jsonl"))
    backend.train_from_iterator(prompts.read_text().splitlines()[:100], trainer)
    return backend


def _write(folder: Path, backend: Tokenizer, **files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")


def _flags(token: str, is_special: bool) -> dict:
    return {
        "content": token,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": is_special,
    }


def _model(folder: Path, cfg: transformer.ModelConfig, seed: int, **fields) -> None:
    """Add random weights and a config.json in transformers 4's spelling."""
    tree = params.init(transformer.specs(cfg), jax.random.key(seed))
    tree["embed"] = tree["embed"] * 20  # a fresh model is uniform over the vocabulary
    made = folder.with_name(f"{folder.name}-weights")
    hf.save(made, cfg, tree)
    (made / "model.safetensors").rename(folder / "model.safetensors")
    shutil.rmtree(made)
    raw = hf_config.config_json(cfg, "float32") | fields
    for name in ("rope_parameters", "dtype"):
        del raw[name]
    (folder / "config.json").write_text(json.dumps(raw, indent=2))


def llama(folder: Path, seed: int) -> Path:
    """As Llama 3.2: a BOS that the tokenizer itself puts in front, two ids that end."""
    backend = _trained(LLAMA_SPLIT)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in LLAMA_SPECIAL])
    ids = {token: backend.token_to_id(token) for token in LLAMA_SPECIAL}
    bos = LLAMA_SPECIAL[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids[bos])]
    )
    eos = [ids["<|end_of_text|>"], ids["<|eot_id|>"]]
    _write(
        folder,
        backend,
        tokenizer_config={
            "added_tokens_decoder": {str(i): _flags(t, True) for t, i in ids.items()},
            "bos_token": bos,
            "chat_template": LLAMA_CHAT,
            "clean_up_tokenization_spaces": True,
            "eos_token": "<|eot_id|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "pad_token": "<|finetune_right_pad_id|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        special_tokens_map={
            "bos_token": _flags(bos, True) | {"special": True},
            "eos_token": _flags("<|eot_id|>", True),
            "pad_token": "<|finetune_right_pad_id|>",
        },
        generation_config={
            "bos_token_id": ids[bos],
            "do_sample": True,
            "eos_token_id": eos,
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.45.0.dev0",
        },
    )
    cfg = transformer.ModelConfig(
        "llama", width=32, ffn=48, head_dim=8, rope=_llama3(), max_positions=128, **COMMON
    )
    _model(
        folder,
        cfg,
        seed,
        bos_token_id=ids[bos],
        eos_token_id=eos,
        pretraining_tp=1,
        transformers_version="4.45.0.dev0",
    )
    return folder


def _llama3():
    from opd_jax.models.rope import Rope

    return Rope(500_000.0, "llama3", 8.0, 32, 1.0, 4.0)


def qwen2(folder: Path, seed: int) -> Path:
    """As Qwen2.5-Instruct: no BOS, 13 additional special tokens and plain ones for tools."""
    ids = _qwen(folder, QWEN_PLAIN, inline=True)
    cfg = transformer.ModelConfig(
        "qwen2", width=32, ffn=48, head_dim=8, qkv_bias=True, tied=True, max_positions=128, **COMMON
    )
    _model(folder, cfg, seed, **_qwen_fields(ids), attention_dropout=0.0, sliding_window=64)
    return folder


def qwen3(folder: Path, seed: int) -> Path:
    """As Qwen3: tokens for thinking, the chat template in a file of its own and a second one."""
    ids = _qwen(folder, [*QWEN_PLAIN, *QWEN3_PLAIN], inline=False)
    cfg = transformer.ModelConfig(
        "qwen3", width=32, ffn=48, head_dim=16, qk_norm=True, tied=True, max_positions=128, **COMMON
    )
    _model(folder, cfg, seed, **_qwen_fields(ids))
    return folder


def _qwen_fields(ids: dict[str, int]) -> dict:
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "initializer_range": 0.02,
        "max_window_layers": 2,
        "transformers_version": "4.43.1",
    }


def _qwen(folder: Path, plain: list[str], *, inline: bool) -> dict[str, int]:
    backend = _trained(
        QWEN_SPLIT,
        processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        normalizers.NFC(),
    )
    special = ["<|endoftext|>", *QWEN_ADDITIONAL]
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    ids = {token: backend.token_to_id(token) for token in (*special, *plain)}
    template = {"chat_template": QWEN_CHAT} if inline else {}
    vocab = json.loads(backend.to_str())["model"]
    _write(
        folder,
        backend,
        tokenizer_config={
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {str(i): _flags(t, t in special) for t, i in ids.items()},
            "additional_special_tokens": QWEN_ADDITIONAL,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
            **template,
        },
        vocab=vocab["vocab"],
        generation_config={
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "transformers_version": "4.37.0",
        },
    )
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in vocab["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    if not inline:
        (folder / "chat_template.jinja").write_text(QWEN_CHAT)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "plain.jinja").write_text(
            "{% for message in messages %}{{ message.content }}{% endfor %}"
        )
    return ids


FOLDERS = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
