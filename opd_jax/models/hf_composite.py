"""Folders of models of several parts, of which the text part is read as a model of its own.

Its config is nested in theirs, and its tensors are named otherwise. The other parts, such as a
vision tower, are left out: of what is read, and of what is exported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from opd_jax.models.families import FAMILIES

# Fields of config.json that stand beside the parts, and hold for the text part as well.
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
_SHARED += ("tie_word_embeddings",)
_PARTS = ("text_config", "vision_config", "audio_config", "language_config", "thinker_config")
_SUFFIX = "ForConditionalGeneration"


@dataclasses.dataclass(frozen=True)
class Composite:
    """What sets a model of several parts apart from that of its text part.

    Attributes:
      name: ``model_type`` of config.json.
      architecture: the class of transformers.
      family: ``model_type`` of the text part.
      prefixes: how names of its tensors begin, and what stands there in a model of that family.
      others: how those of the other parts begin.
      defaults: of fields that ``text_config`` leaves out.
    """

    name: str
    architecture: str
    family: str
    prefixes: Mapping[str, str]
    others: tuple[str, ...]
    defaults: Mapping[str, Any]

    def own_name(self, tensor: str) -> str | None:
        """The name of a tensor in a model of the text part alone; None: it is of another part."""
        if tensor.startswith(self.others):
            return None
        for prefix, own in self.prefixes.items():
            if tensor.startswith(prefix):
                return own + tensor.removeprefix(prefix)
        return tensor

    def text_fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of config.json that a model of the text part alone would have."""
        beside = {name: raw[name] for name in _SHARED if raw.get(name) is not None}
        own = {k: v for k, v in (raw.get("text_config") or {}).items() if k != "architectures"}
        return {"model_type": self.family, **self.defaults, **beside, **own}


# As transformers before 4.52 writes tensors, which published folders have, and as it does since.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_VISION = ("vision_tower.", "multi_modal_projector.")
COMPOSITES: dict[str, Composite] = {
    composite.name: composite
    for composite in (
        Composite(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            "gemma3_text",
            _PREFIXES,
            (*_VISION, *(f"model.{name}" for name in _VISION)),
            {
                "vocab_size": 262_208,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "max_position_embeddings": 131_072,
            },
        ),
    )
}


def of(raw: Mapping[str, Any], source: str) -> Composite | None:
    """What the model of a config.json is; None: a model of text alone, or none of any kind.

    Raises:
      ValueError: it has several parts and is not implemented here.
    """
    kind, names = raw.get("model_type"), raw.get("architectures") or []
    if kind in FAMILIES:
        return None
    found = COMPOSITES.get(str(kind))
    known = ", ".join(composite.architecture for composite in COMPOSITES.values())
    parts = [name for name in _PARTS if isinstance(raw.get(name), dict)]
    is_other = found is None and (parts or any(name.endswith(_SUFFIX) for name in names))
    if is_other or (found is not None and any(name != found.architecture for name in names)):
        raise ValueError(
            f"{source}: {', '.join(names) or kind} (model_type {kind!r}) is made of several parts "
            f"({', '.join(parts) or 'text and others'}): expected {known}, of which the text part "
            f"is read, or a causal language model of {', '.join(FAMILIES)}; choose one of those"
        )
    return found
