"""Fingerprints of what a run was started on, so that a resume can tell that a file has changed.

A model folder is told apart file by file. Small files are read whole. Of a file above
``WHOLE_BYTES`` its size, its first ``HEAD_BYTES`` (in safetensors the names, shapes and places of
all tensors) and ``SAMPLES`` blocks spread evenly over it are read: 5 MiB of a shard of 4 GiB, so
that a folder of 60 GB costs about 80 MiB of reading. Training touches every tensor, so other
weights show in some block; an edit of single numbers of a large file may not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

WHOLE_BYTES = 1 << 30
HEAD_BYTES = 1 << 20
SAMPLES, SAMPLE_BYTES = 1024, 4096
# What loading a model and its tokenizer reads.
_CONFIG = ("config.json", "generation_config.json", "model.safetensors.index.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates/*",
    "additional_chat_templates/*",
    "vocab.json",
    "merges.txt",
    "*.model",
)
_WEIGHTS = ("model*.safetensors",)

Files = Mapping[str, str]  # name inside the folder -> fingerprint


def of_file(path: Path) -> str:
    """Fingerprint of one file, 16 hex digits.

    Raises:
      OSError: it cannot be read.
    """
    state = hashlib.blake2b(digest_size=8)
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= WHOLE_BYTES:
            while block := stream.read(1 << 22):
                state.update(block)
            return state.hexdigest()
        state.update(f"{size}\n".encode())
        state.update(stream.read(HEAD_BYTES))
        for index in range(SAMPLES):
            stream.seek(HEAD_BYTES + (size - HEAD_BYTES - SAMPLE_BYTES) * index // (SAMPLES - 1))
            state.update(stream.read(SAMPLE_BYTES))
    return state.hexdigest()


def of_model(folder: Path, *, weights: bool = True) -> dict[str, str]:
    """Fingerprints of the files of a model folder that make the model.

    Args:
      folder: a Hugging Face folder.
      weights: False leaves out the weights: what is left makes tokenizer and shapes.

    Raises:
      OSError: a file cannot be read.
    """
    patterns = (*_CONFIG, *_TOKENIZER, *(_WEIGHTS if weights else ()))
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): of_file(path) for path in sorted(found)}


def changes(old: Files, new: Files) -> list[str]:
    """What differs between two folders, a phrase per file; empty if nothing does."""
    told = []
    for name in sorted({*old, *new}):
        if name not in new:
            told.append(f"{name} is gone")
        elif name not in old:
            told.append(f"{name} is new")
        elif old[name] != new[name]:
            told.append(f"{name} is another ({old[name]} then, {new[name]} now)")
    return told
