"""What a Hugging Face config.json says, as a :class:`ModelConfig`, and the way back.

A field that changes the maths in a way the model does not implement is an error. ``hf_rope`` and
``hf_layers`` read and write the rotary fields and those of single layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Required

import jax.numpy as jnp
import pydantic
from typing_extensions import TypedDict

from opd_jax import records
from opd_jax.models import hf_composite, hf_layers, hf_rope
from opd_jax.models.architecture import ModelConfig
from opd_jax.models.families import FAMILIES, Family
from opd_jax.models.hf_composite import Composite

Size = Annotated[int, pydantic.Field(ge=1, le=1 << 26)]
Positive = hf_rope.Positive
Number = Annotated[int, pydantic.Field(ge=0, lt=1 << 31)]
Id = Annotated[int, pydantic.Field(ge=0, lt=1 << 31)]
Ids = Id | list[Id] | None


@pydantic.with_config(records.OPEN)
class HubConfig(TypedDict, total=False):
    """The fields of a config.json that are read here, in all families."""

    model_type: Required[str]
    architectures: list[str] | None
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, pydantic.Field(ge=1, le=10_000)]
    num_attention_heads: Size
    num_key_value_heads: Size | None
    head_dim: Annotated[int, pydantic.Field(ge=2, le=1 << 16, multiple_of=2)] | None
    max_position_embeddings: Annotated[int, pydantic.Field(ge=1, lt=1 << 31)]
    rms_norm_eps: Annotated[float, pydantic.Field(gt=0, lt=1)]
    rope_theta: Positive | None
    rope_local_base_freq: Positive | None
    rope_scaling: hf_rope.RopeFields | None
    rope_parameters: hf_rope.RopeFields | None
    tie_word_embeddings: bool | None
    use_sliding_window: bool | None
    sliding_window: Number | None
    sliding_window_pattern: Size | None
    max_window_layers: Number | None
    layer_types: list[str] | None
    query_pre_attn_scalar: Size | None
    num_experts: Number | None
    num_local_experts: Number | None
    num_experts_per_tok: Size | None
    moe_intermediate_size: Size | None
    norm_topk_prob: bool | None
    decoder_sparse_step: Size | None
    mlp_only_layers: list[int] | None
    eos_token_id: Ids
    text_config: dict[str, Any] | None


@pydantic.with_config(records.OPEN)
class Stops(TypedDict, total=False):
    """The ids that end generation, in generation_config.json or config.json."""

    eos_token_id: Ids
    text_config: Stops | None


def read_json(path: Path, kind: Any = dict[str, Any]) -> Any:
    """The JSON object in a file of a model folder.

    Args:
      path: the file.
      kind: the type that it is checked against.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not JSON, or not of that kind.
    """
    try:
        return records.read(path, kind, change="the file is damaged, so fetch it again")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}: expected a Hugging Face model folder (config.json "
            "and *.safetensors); download the whole model or correct the path"
        ) from None


def model_folder(path) -> Path:
    """The folder as a path.

    Raises:
      FileNotFoundError: it does not exist.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"model folder {path} does not exist: expected a local Hugging Face folder "
            "(config.json and *.safetensors); download the model first or correct the path"
        )
    return path


def generation_eos(path) -> tuple[int, ...]:
    """Ids that end generation, from generation_config.json, else config.json; () if in neither."""
    path = model_folder(path)
    for name in ("generation_config.json", "config.json"):
        if name != "config.json" and not (path / name).exists():
            continue
        found = read_json(path / name, Stops)
        eos = found.get("eos_token_id")
        eos = (found.get("text_config") or {}).get("eos_token_id") if eos is None else eos
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return ()


def read_config(path, *, dtype=jnp.float32) -> ModelConfig:
    """The model config of a Hugging Face folder.

    Raises:
      FileNotFoundError: the folder or its config.json is missing.
      ValueError: damaged JSON, or a model that is not implemented here.
    """
    path = model_folder(path) / "config.json"
    return parse_config(dict(read_json(path, HubConfig)), dtype=dtype, source=str(path))


def composite(path) -> Composite | None:
    """What a folder is where its model has several parts, of which one is read; None: it is one.

    Raises:
      FileNotFoundError, ValueError: as :func:`read_config`.
    """
    path = model_folder(path) / "config.json"
    return hf_composite.of(read_json(path, HubConfig), str(path))


def text_fields(path) -> dict[str, Any]:
    """The fields of a folder's config.json, of a model of several parts those of the text part."""
    raw, whole = read_json(model_folder(path) / "config.json"), composite(path)
    return raw if whole is None else whole.text_fields(raw)


def parse_config(raw: dict[str, Any], *, dtype=jnp.float32, source="config.json") -> ModelConfig:
    """The model config that the fields of a config.json mean, with transformers' own defaults.

    Raises:
      ValueError: a missing field, or one that asks for something that is not implemented here.
    """
    if (whole := hf_composite.of(raw, source)) is not None:
        source += ": text_config"
        change = "fetch the model's original config.json"
        raw = records.check(whole.text_fields(raw), HubConfig, where=source, change=change)
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{source}: model_type {kind!r} is not supported: expected one of "
            f"{', '.join(FAMILIES)}; choose a model of these families"
        )
    family = FAMILIES[kind]
    for name in raw.get("architectures") or ():
        if name != family.architecture:
            raise ValueError(
                f"{source}: architecture {name!r} is not supported: expected one of "
                f"{', '.join(f.architecture for f in FAMILIES.values())}; choose a causal "
                "language model"
            )
    _refuse(raw, family, source)

    def need(name: str):
        if raw.get(name) is None:
            raise ValueError(
                f"{source}: field {name!r} is missing: expected a {kind} config with it; fetch the "
                "model's original config.json"
            )
        return raw[name]

    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
        need(name)
    rope, local_rope = hf_rope.read(raw, family, source)
    raw = {**family.defaults, **raw}
    width, num_heads = raw["hidden_size"], raw["num_attention_heads"]
    layers = hf_layers.read(raw, family, source)
    return ModelConfig(
        model_type=kind,
        vocab_size=need("vocab_size"),
        width=width,
        ffn=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or family.head_dim or width // num_heads,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=rope,
        local_rope=local_rope,
        tied=bool(raw.get("tie_word_embeddings", False)),
        query_scalar=raw.get("query_pre_attn_scalar") if _has_scalar(family) else None,
        max_positions=need("max_position_embeddings"),
        dtype=dtype,
        **layers,
        **family.switches,
    )


def _has_scalar(family: Family) -> bool:
    return "query_pre_attn_scalar" in family.defaults


def _refuse(raw: dict[str, Any], family: Family, source: str) -> None:
    """Raise for fields whose value would silently change what the weights compute."""
    for name, expected in family.plain.items():
        found = raw.get(name)
        if found is not None and found != expected:
            raise ValueError(
                f"{source}: {name}={found!r} is not supported: expected {expected!r}; choose a "
                "model without it (or save it in plain form with transformers)"
            )


def config_json(cfg: ModelConfig, dtype) -> dict[str, Any]:
    """The config.json of a model, readable by transformers 4 and 5."""
    family = FAMILIES[cfg.model_type]
    name = jnp.dtype(dtype).name
    raw = {
        "architectures": [family.architecture],
        "model_type": cfg.model_type,
        "dtype": name,
        "torch_dtype": name,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.ffn,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions,
        "tie_word_embeddings": cfg.tied,
        "use_cache": True,
        **hf_rope.fields(cfg.rope, cfg.local_rope, family),
        **hf_layers.fields(cfg, family),
    }
    if _has_scalar(family):
        raw["query_pre_attn_scalar"] = cfg.query_scalar
    return raw | dict(family.writes)
