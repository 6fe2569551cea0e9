"""What stands beside the weights of a written Hugging Face folder: configs and tokenizer.

A model that was made from another one takes over that one's files. They are copied and not written
anew: transformers 4 and 5 write tokenizers in forms that the other does not read, and lose fields.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax.models.hf_config import config_json, model_folder, read_json, text_fields
from opd_jax.models.transformer import ModelConfig

# Every file that transformers reads a tokenizer of text from, and those it is made from.
TOKENIZER = (
    "tokenizer*",  # tokenizer.json, tokenizer_config.json, tokenizer.model
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",  # sentencepiece
    "*.tiktoken",
    "tekken.json",
    "chat_template*",  # .jinja, .json
    "chat_templates/*",
    "additional_chat_templates/*",
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(
    folder: Path,
    cfg: ModelConfig,
    dtype,
    source=None,
    tokenizer=None,
    eos_ids: Sequence[int] = (),
) -> None:
    """Write ``config.json``, ``generation_config.json`` and the tokenizer: see :func:`hf.save`.

    Raises:
      ValueError: both ``source`` and ``tokenizer`` are given, or a config of ``source`` is damaged.
      FileNotFoundError: a file of ``source`` is not there.
    """
    if source is not None and tokenizer is not None:
        raise ValueError(
            "both source and tokenizer are given: expected one of them, as each brings the "
            "tokenizer's files; leave one out"
        )
    fields: dict[str, Any] = {}
    generation: dict[str, Any] | None = None
    if source is not None:
        source = model_folder(source)
        copy_tokenizer(source, folder)
        fields = text_fields(source)
        if (source / "generation_config.json").exists():
            generation = read_json(source / "generation_config.json")
    elif tokenizer is not None:
        _save_tokenizer(folder, tokenizer)
        fields = {name: getattr(tokenizer, name, None) for name in _IDS}
        fields = {name: value for name, value in fields.items() if value is not None}
    if eos_ids:
        fields["eos_token_id"] = list(eos_ids) if len(eos_ids) > 1 else eos_ids[0]
    if generation is None:
        generation = {name: fields[name] for name in _IDS if fields.get(name) is not None}
    elif eos_ids:
        generation["eos_token_id"] = fields["eos_token_id"]
    write_json(folder / "config.json", {**fields, **config_json(cfg, dtype)})
    write_json(folder / "generation_config.json", generation)


def write_json(path: Path, value) -> None:
    """Write a JSON file as the configs of a model folder are written."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer byte for byte; links, as in a download cache, become files."""
    for path in sorted({path for pattern in TOKENIZER for path in source.glob(pattern)}):
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(
                f"{path} is a link to a file that is gone: expected the tokenizer's file; finish "
                "the download of the model, or fetch it again"
            )
        if not path.is_file():
            continue
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _save_tokenizer(folder: Path, tokenizer) -> None:
    """Write a tokenizer that is in memory, in a form that transformers 4 and 5 read alike.

    transformers 5 writes the name of a class that 4 does not have, a list where 4 wants a table,
    and arguments of the call that loaded it.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if not path.exists() or not (folder / "tokenizer.json").exists():
        return
    raw = read_json(path)
    for name in ("backend", "is_local", "local_files_only"):
        raw.pop(name, None)
    if isinstance(raw.get("extra_special_tokens"), list):
        raw["additional_special_tokens"] = raw.pop("extra_special_tokens")
    raw["tokenizer_class"] = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is
    write_json(path, raw)
