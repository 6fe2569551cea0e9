"""The families of models: one record each, used for reading, writing and checking their folders.

To add a family:

1. Add a :class:`Family` to ``FAMILIES``: its ``model_type`` and architecture, how its tensors are
   made of our leaves, its switches (fields of ``ModelConfig``), how its config.json says which
   layers slide, what it leaves out, what it must have, and what is written for it.
2. Add cases to ``CASES`` of ``scripts/make_goldens.py``, tied and untied, and run it (with torch).
3. What is truly new about it goes into ``transformer`` behind a switch of ``ModelConfig``.

``tests/models/test_families.py`` then asks the same of it as of all others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from opd_jax.models.params import ParamSpec


@dataclasses.dataclass(frozen=True)
class Row:
    """How one Hugging Face tensor is made of one of our leaves.

    Attributes:
      name: tensor name, with ``{}`` for the number of the layer and, of an expert's, its own.
      leaf: path in our parameters.
      groups: per axis of the Hugging Face tensor, which of our axes it merges, major first; our
        axes are counted without those that ``{}`` stands for.
      part: of a tensor that several leaves share, the axis they lie along, which of them this is
        and of how many; None: it is all of it.
    """

    name: str
    leaf: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    part: tuple[int, int, int] | None = None

    @property
    def num_stacked(self) -> int:
        """Leading axes of our leaf that a tensor has one entry of: layers, and experts."""
        return self.name.count("{}")

    def shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        sizes = spec.shape[self.num_stacked :]
        shape = [math.prod(sizes[axis] for axis in group) for group in self.groups]
        if self.part is not None:
            axis, _, num = self.part
            shape[axis] *= num
        return tuple(shape)

    def names(self, spec: ParamSpec, layers: Sequence[int]) -> dict[tuple[int, ...], str]:
        """Index into the leading axes of our leaf -> tensor.

        Args:
          spec: of the leaf.
          layers: numbers of the layers that the leaf holds.
        """
        stacked = [range(size) for size in spec.shape[: self.num_stacked]]
        return {
            index: self.name.format(layers[index[0]], *index[1:]) if index else self.name
            for index in itertools.product(*stacked)
        }


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart; the defaults are a plain Llama.

    Attributes:
      name: ``model_type`` of config.json.
      architecture: the class of transformers that is a causal language model of it.
      rows: its tensors, without the head, which is the same in all families; those of a kind of
        layer that a model has none of are left out.
      fused: the other way in which some of its tensors are written.
      switches: fields of ``ModelConfig`` that are the same in all its models.
      slides: which layers do by its config.json: ``never``; ``always``, where a window is given;
        ``switched``, all by ``use_sliding_window``; ``late``, so switched from
        ``max_window_layers`` on; ``mostly``, all but every n-th. ``layer_types`` goes before the
        last two.
      full_every: n of ``mostly``, where config.json does not say.
      has_local_rope: sliding layers have a rope of their own.
      head_dim: where config.json does not say; None: width / number of heads.
      defaults: of fields that config.json leaves out.
      plain: fields of config.json and the only value of each that is implemented; a field that is
        absent or null will do.
      writes: fields that its config.json is written with beside those of all families.
    """

    name: str
    architecture: str
    rows: tuple[Row, ...]
    fused: tuple[Row, ...] = ()
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    slides: Literal["never", "always", "switched", "late", "mostly"] = "never"
    full_every: int = 0
    has_local_rope: bool = False
    head_dim: int | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plain: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    writes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _layer(name: str, leaf: str, *groups: tuple[int, ...]) -> Row:
    return Row("model.layers.{}." + name, ("layers", leaf), groups)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The experts' tensors, under the names that a family has for them."""
    return (
        _layer(f"{block}.gate.weight", "router", (1,), (0,)),
        _layer(f"{block}.experts.{{}}.{gate}.weight", "expert_gate", (1,), (0,)),
        _layer(f"{block}.experts.{{}}.{up}.weight", "expert_up", (1,), (0,)),
        _layer(f"{block}.experts.{{}}.{down}.weight", "expert_down", (1,), (0,)),
    )


HEAD = Row("lm_head.weight", ("head",), ((0,), (1,)))
_BODY = (
    Row("model.embed_tokens.weight", ("embed",), ((0,), (1,))),
    _layer("self_attn.q_proj.weight", "q", (1, 2, 3), (0,)),
    _layer("self_attn.k_proj.weight", "k", (1, 2), (0,)),
    _layer("self_attn.v_proj.weight", "v", (1, 2), (0,)),
    _layer("self_attn.o_proj.weight", "o", (3,), (0, 1, 2)),
    _layer("mlp.gate_proj.weight", "gate", (1,), (0,)),
    _layer("mlp.up_proj.weight", "up", (1,), (0,)),
    _layer("mlp.down_proj.weight", "down", (1,), (0,)),
    Row("model.norm.weight", ("final_norm",), ((0,),)),
)
# Where the norms are, the same name means different things.
_PRE_NORMS = (
    _layer("input_layernorm.weight", "attn_norm", (0,)),
    _layer("post_attention_layernorm.weight", "ffn_norm", (0,)),
)
_POST_NORMS = (
    _layer("post_attention_layernorm.weight", "attn_post_norm", (0,)),
    _layer("post_feedforward_layernorm.weight", "ffn_post_norm", (0,)),
)
_BOTH_NORMS = (
    _layer("input_layernorm.weight", "attn_norm", (0,)),
    _layer("pre_feedforward_layernorm.weight", "ffn_norm", (0,)),
    *_POST_NORMS,
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
_QK_NORM_WHOLE = (
    _layer("self_attn.q_norm.weight", "q_norm", (0, 1, 2)),
    _layer("self_attn.k_norm.weight", "k_norm", (0, 1)),
)
# As transformers 5 holds experts, and writes them with save_original_format=False.
_GATE_UP = "model.layers.{}.mlp.experts.gate_up_proj"
_FUSED_EXPERTS = (
    _layer("mlp.gate.weight", "router", (1,), (0,)),
    Row(_GATE_UP, ("layers", "expert_gate"), ((0,), (2,), (1,)), part=(1, 0, 2)),
    Row(_GATE_UP, ("layers", "expert_up"), ((0,), (2,), (1,)), part=(1, 1, 2)),
    _layer("mlp.experts.down_proj", "expert_down", (0,), (2,), (1,)),
)
# Fields that would change what the weights compute.
_PLAIN = {
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "quantization_config": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
# In most families it also puts a bias on the output projection.
_NO_BIAS = {"attention_bias": False}
_OLMO = {"norms": "post", "qk_norm": True, "qk_norm_whole": True}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            (*_BODY, *_PRE_NORMS),
            plain=_PLAIN | _SILU | _NO_BIAS,
            writes=_SILU | _NO_BIAS,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            (*_BODY, *_PRE_NORMS, *_QKV_BIAS),
            switches={"qkv_bias": True},
            slides="late",
            plain=_PLAIN | _SILU,
            writes=_SILU,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            (*_BODY, *_PRE_NORMS, *_QK_NORM),
            switches={"qk_norm": True},
            slides="late",
            head_dim=128,
            plain=_PLAIN | _SILU | _NO_BIAS,
            writes=_SILU | _NO_BIAS,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            (*_BODY, *_PRE_NORMS),
            slides="always",
            defaults={"sliding_window": 4096},
            plain=_PLAIN | _SILU,
            writes=_SILU,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            (
                *_BODY,
                *_PRE_NORMS,
                *_QK_NORM,
                *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
            ),
            fused=_FUSED_EXPERTS,
            switches={"qk_norm": True},
            slides="switched",
            defaults={
                "num_local_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
            },
            plain=_PLAIN | _SILU | _NO_BIAS,
            writes=_SILU | _NO_BIAS,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            (*_BODY, *_PRE_NORMS, *_experts("block_sparse_moe", "w1", "w3", "w2")),
            fused=_FUSED_EXPERTS,
            slides="always",
            defaults={
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
            },
            plain=_PLAIN | _SILU,
            writes=_SILU,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            (*_BODY, *_BOTH_NORMS, *_QK_NORM),
            switches={
                "qk_norm": True,
                "norms": "both",
                "norm_offset": True,
                "activation": "gelu_tanh",
                "scaled_embed": True,
            },
            slides="mostly",
            full_every=6,
            has_local_rope=True,
            head_dim=256,
            defaults={
                "sliding_window": 4096,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "query_pre_attn_scalar": 256,
                "tie_word_embeddings": True,
            },
            plain=_PLAIN | _GELU | _NO_BIAS | {"use_bidirectional_attention": False},
            writes=_GELU | _NO_BIAS,
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            (*_BODY, *_POST_NORMS, *_QK_NORM_WHOLE),
            switches=_OLMO,
            defaults={"rms_norm_eps": 1e-5},
            plain=_PLAIN | _SILU | _NO_BIAS,
            writes=_SILU | _NO_BIAS,
        ),
        Family(
            "olmo3",
            "Olmo3ForCausalLM",
            (*_BODY, *_POST_NORMS, *_QK_NORM_WHOLE),
            switches=_OLMO,
            slides="mostly",
            full_every=4,
            has_local_rope=True,
            defaults={"sliding_window": 4096, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
            plain=_PLAIN | _SILU | _NO_BIAS,
            writes=_SILU | _NO_BIAS,
        ),
    )
}
