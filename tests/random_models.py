"""A small model of no use, and prompts for it.

Its weights are large enough that what is sampled depends on the whole context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opd_jax.models import transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.pytrees import Params, Prompt

SMALL = ModelConfig(
    "qwen3",
    vocab_size=64,
    width=16,
    ffn=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


def drawn_weights(cfg: ModelConfig) -> Params:
    """The same for the same model."""
    rng = np.random.default_rng(0)

    def draw(spec):
        if spec.std == 0:
            return np.full(spec.shape, spec.mean, np.float32)
        return rng.normal(scale=0.3, size=spec.shape).astype(np.float32)

    return jax.tree.map(draw, transformer.specs(cfg)) | {
        "embed": rng.normal(size=(cfg.vocab_size, cfg.width)).astype(np.float32)
    }


def drawn_prompts(rows: int, width: int, starts: Sequence[int] = ()) -> Prompt:
    """The same for the same shape; the first rows start at ``starts``, the others somewhere."""
    rng = np.random.default_rng(1)
    start_B = rng.integers(0, width, size=rows).astype(np.int32)
    start_B[: len(starts)] = starts
    ids_BP = rng.integers(0, 60, size=(rows, width)).astype(np.int32)
    ids_BP[np.arange(width)[None] < start_B[:, None]] = 1
    host: Any = (ids_BP, start_B)  # numpy arrays
    return Prompt(*host)
