"""A teacher that ends its answers by another id than its student: the demo's, ids exchanged."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from opd_jax import config

ENDS, OTHER = 2, 0  # the student's end of an answer, and the id that the teacher is to end by


def make_teacher(folder: Path) -> Path:
    """The embedded teacher with the head's rows of both ids exchanged, and its other end."""
    shutil.copytree(config.path_of("embedded:teacher"), folder)
    weights = load_file(folder / "model.safetensors")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).copy()
    head[[ENDS, OTHER]] = head[[OTHER, ENDS]]
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    for name, fields in {
        "config.json": {"tie_word_embeddings": False, "eos_token_id": OTHER},
        "generation_config.json": {"eos_token_id": OTHER},
    }.items():
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | fields))
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    text = {i: token for token, i in tokens.items()}[OTHER]
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": text}))
    assert np.all(head[ENDS] != head[OTHER])
    return folder
