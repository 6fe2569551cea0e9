"""Weights of models of no use, large enough that what is sampled depends on the whole context."""

from __future__ import annotations

import jax
import numpy as np

from opd_jax.models import transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.pytrees import Params


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
