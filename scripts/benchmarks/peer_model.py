"""Make a model for the peer benchmark: ``python peer_model.py JOB.json RESULT.json``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import toolkit
from peer_job import EOS, PAD, UNKNOWN, Shape, word
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_jax.models import hf
from opd_jax.models.params import init
from opd_jax.models.rope import Rope
from opd_jax.models.transformer import ModelConfig, specs


def write_model(
    folder: str, shape: Shape, *, seed: int, sharper: float, deeper: float, max_positions: int
) -> None:
    """Write a Hugging Face folder of random weights with a tokenizer of one word per id.

    Args:
      sharper: times the usual initial embedding, which is the head.
      deeper: times the usual initial weights of what a layer adds.
    """
    cfg = ModelConfig(
        model_type="llama",
        vocab_size=shape.vocab,
        width=shape.width,
        ffn=shape.ffn,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        norm_eps=1e-5,
        rope=Rope(theta=100_000.0),
        tied=True,
        max_positions=max_positions,
    )
    words = {word(i): i for i in range(shape.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word(UNKNOWN)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=word(PAD),
        eos_token=word(EOS),
        unk_token=word(UNKNOWN),
    )
    tree = init(specs(cfg), jax.random.key(seed), jnp.float32)
    # With the usual initial values both models would copy the last id, or be uniform, and every
    # direction of KL would be one number. Depth must count, and the teacher be the surer one.
    tree["embed"] = tree["embed"] * sharper
    for name in ("o", "down"):
        tree["layers"][name] = tree["layers"][name] * deeper
    hf.save(folder, cfg, tree, tokenizer=fast)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Write the model of a job: the arguments of :func:`write_model`."""
    write_model(job.pop("folder"), Shape(**job.pop("shape")), **job)
    return {}


if __name__ == "__main__":
    toolkit.serve(run)
