"""The families of models: one record each, used for reading, writing and checking their folders.

To add a family:

1. Add a :class:`Family` to ``FAMILIES``: its ``model_type`` and architecture, how its tensors are
   made of our leaves, what differs from a plain Llama, which fields of a config.json must have the
   one value that is implemented, and which it writes.
2. Add a case to ``CASES`` of ``scripts/make_goldens.py`` and run it (with torch) for a golden.
3. What is truly new about it goes into ``transformer`` behind a field of ``ModelConfig``.

``tests/models/test_families.py`` then asks the same of it as of all others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from opd_jax.models.params import ParamSpec


@dataclasses.dataclass(frozen=True)
class Row:
    """How one Hugging Face tensor is made of one of our leaves.

    Attributes:
      name: tensor name, with ``{}`` for the layer number.
      leaf: path in our parameters.
      groups: per axis of the Hugging Face tensor, which of our per-layer axes it merges, major
        first.
    """

    name: str
    leaf: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def is_stacked(self) -> bool:
        """Whether our leaf holds all layers."""
        return self.leaf[0] == "layers"

    def shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        sizes = spec.shape[1:] if self.is_stacked else spec.shape
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)

    def names(self, num_layers: int) -> list[str]:
        """All tensor names of this row, in layer order."""
        return [self.name.format(i) for i in range(num_layers)] if self.is_stacked else [self.name]


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart; the defaults are a plain Llama.

    Attributes:
      name: ``model_type`` of config.json.
      architecture: the class of transformers that is a causal language model of it.
      rows: its tensors, without the head, which is the same in all families.
      qkv_bias, qk_norm: see ``ModelConfig``.
      head_dim: where config.json does not say; None: width / number of heads.
      plain: fields of config.json and the only value of each that is implemented; a field that is
        absent or null will do.
      writes: fields that its config.json is written with beside those of all families.
    """

    name: str
    architecture: str
    rows: tuple[Row, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    plain: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    writes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _layer(name: str, leaf: str, *groups: tuple[int, ...]) -> Row:
    return Row("model.layers.{}." + name, ("layers", leaf), groups)


HEAD = Row("lm_head.weight", ("head",), ((0,), (1,)))
_DENSE = (
    Row("model.embed_tokens.weight", ("embed",), ((0,), (1,))),
    _layer("input_layernorm.weight", "attn_norm", (0,)),
    _layer("self_attn.q_proj.weight", "q", (1, 2, 3), (0,)),
    _layer("self_attn.k_proj.weight", "k", (1, 2), (0,)),
    _layer("self_attn.v_proj.weight", "v", (1, 2), (0,)),
    _layer("self_attn.o_proj.weight", "o", (3,), (0, 1, 2)),
    _layer("post_attention_layernorm.weight", "ffn_norm", (0,)),
    _layer("mlp.gate_proj.weight", "gate", (1,), (0,)),
    _layer("mlp.up_proj.weight", "up", (1,), (0,)),
    _layer("mlp.down_proj.weight", "down", (1,), (0,)),
    Row("model.norm.weight", ("final_norm",), ((0,),)),
)
_QKV_BIAS = (
    _layer("self_attn.q_proj.bias", "q_bias", (0, 1, 2)),
    _layer("self_attn.k_proj.bias", "k_bias", (0, 1)),
    _layer("self_attn.v_proj.bias", "v_bias", (0, 1)),
)
_QK_NORM = (
    _layer("self_attn.q_norm.weight", "q_norm", (0,)),
    _layer("self_attn.k_norm.weight", "k_norm", (0,)),
)
# Fields that would change what the weights compute.
_PLAIN = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "quantization_config": None,
}
# In these families it also puts a bias on the output projection.
_NO_BIAS = {"attention_bias": False}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            _DENSE,
            plain=_PLAIN | _NO_BIAS,
            writes=_NO_BIAS,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            (*_DENSE, *_QKV_BIAS),
            qkv_bias=True,
            plain=_PLAIN,
            writes={"use_sliding_window": False},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            (*_DENSE, *_QK_NORM),
            qk_norm=True,
            head_dim=128,
            plain=_PLAIN | _NO_BIAS,
            writes=_NO_BIAS,
        ),
    )
}


def rows(model_type: str, *, tied: bool) -> tuple[Row, ...]:
    """The tensors of a model: those of its family, with the head where it is not tied."""
    found = FAMILIES[model_type].rows
    return found if tied else (*found, HEAD)
