"""Shapes of published models, for plans of runs whose models are not here yet.

They are the fields of the ``config.json`` files at huggingface.co/Qwen that decide shapes. A folder
that is there always comes first; ``hub:`` before a name fetches its ``config.json`` instead, which
is also done for names that are not known here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from opd_jax.files import path_of
from opd_jax.models import hf_config
from opd_jax.models.architecture import ModelConfig
from opd_jax.spec import ConfigError
from opd_jax.store import hub

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40_960,
    "eos_token_id": 151_645,
}


def _dense(width: int, ffn: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return _QWEN3 | {
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


_EXPERTS = {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _dense(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": _dense(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": _dense(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": _dense(4096, 12_288, 36, 32, tied=False),
    "Qwen3-14B": _dense(5120, 17_408, 40, 40, tied=False),
    "Qwen3-32B": _dense(5120, 25_600, 64, 64, tied=False),
    "Qwen3-30B-A3B": _dense(2048, 6144, 48, 32, tied=False) | _EXPERTS,
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A model without its weights.

    Attributes:
      cfg: as it is read from its folder.
      eos_ids: that end its generation.
      source: where that was found, in words.
    """

    cfg: ModelConfig
    eos_ids: tuple[int, ...]
    source: str


def shapes(name: str, dtype: Any, change: str) -> Shapes:
    """The shapes of a model folder, of which ``config.json`` is enough, or of a published model.

    Args:
      name: a folder, ``embedded:NAME``, a path that ends in the name of a known model, or a name
        on the Hub, of which the config alone is fetched.
      dtype: that it computes in.
      change: the flag that says otherwise.

    Raises:
      ConfigError: it is none of them.
      HubError: a name on the Hub that cannot be fetched.
      ValueError: the config is damaged, or of a model that is not implemented here.
    """
    folder = Path(path_of(name))
    if hub.parse(name) and (name.startswith(hub.PREFIX) or folder.name not in MODELS):
        folder = Path(hub.folder(hub.pin(name), "config"))
    if (folder / "config.json").exists():
        eos = hf_config.generation_eos(folder)
        return Shapes(hf_config.read_config(folder, dtype=dtype), eos, f"{name}/config.json")
    if folder.name not in MODELS:
        raise ConfigError(
            f"{name!r} has no config.json and is not known by name: expected a folder with one, "
            "owner/name on the Hub, or "
            f"a path that ends in one of {', '.join(MODELS)}; set {change}"
        )
    raw = MODELS[folder.name]
    cfg = hf_config.parse_config(dict(raw), dtype=dtype, source=folder.name)
    return Shapes(cfg, (raw["eos_token_id"],), f"{folder.name} as published")
