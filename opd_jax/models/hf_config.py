"""What a Hugging Face config.json says, as a :class:`ModelConfig`, and the way back.

Both spellings of the rotary fields are read (``rope_theta`` with ``rope_scaling``, and the newer
``rope_parameters``) and both are written. A field that changes the maths in a way the model does
not implement is an error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Required

import jax.numpy as jnp
import pydantic
from typing_extensions import TypedDict

from opd_jax import records
from opd_jax.models.families import FAMILIES, Family
from opd_jax.models.rope import Rope
from opd_jax.models.transformer import ModelConfig

Size = Annotated[int, pydantic.Field(ge=1, le=1 << 26)]
Positive = Annotated[float, pydantic.Field(gt=0)]
Id = Annotated[int, pydantic.Field(ge=0, lt=1 << 31)]
Ids = Id | list[Id] | None


@pydantic.with_config(records.OPEN)
class RopeFields(TypedDict, total=False):
    """Rotary fields of a config.json."""

    rope_type: str | None
    type: str | None
    rope_theta: Positive | None
    factor: Positive | None
    original_max_position_embeddings: Size | None
    low_freq_factor: Positive | None
    high_freq_factor: Positive | None
    beta_fast: Positive | None
    beta_slow: Positive | None
    truncate: bool | None
    attention_factor: Positive | None
    mscale: float | None
    mscale_all_dim: float | None
    partial_rotary_factor: float | None


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
    rope_scaling: RopeFields | None
    rope_parameters: RopeFields | None
    tie_word_embeddings: bool | None
    use_sliding_window: bool | None
    sliding_window: int | None
    max_window_layers: int | None
    layer_types: list[str] | None
    eos_token_id: Ids


@pydantic.with_config(records.OPEN)
class Stops(TypedDict, total=False):
    """The ids that end generation, in generation_config.json."""

    eos_token_id: Ids


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
        eos = read_json(path / name, Stops).get("eos_token_id")
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


def parse_config(raw: dict[str, Any], *, dtype=jnp.float32, source="config.json") -> ModelConfig:
    """The model config that the fields of a config.json mean, with transformers' own defaults.

    Raises:
      ValueError: a missing field, or one that asks for something that is not implemented here.
    """
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

    width, num_heads = need("hidden_size"), need("num_attention_heads")
    head_dim = raw.get("head_dim") or family.head_dim or width // num_heads
    return ModelConfig(
        model_type=kind,
        vocab_size=need("vocab_size"),
        width=width,
        ffn=need("intermediate_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw, source),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_positions=need("max_position_embeddings"),
        dtype=dtype,
    )


def _refuse(raw: dict[str, Any], family: Family, source: str) -> None:
    """Raise for fields whose value would silently change what the weights compute."""
    for name, expected in family.plain.items():
        found = raw.get(name)
        if found is not None and found != expected:
            raise ValueError(
                f"{source}: {name}={found!r} is not supported: expected {expected!r}; choose a "
                "model without it (or save it in plain form with transformers)"
            )
    num_layers = raw.get("num_hidden_layers") or 0
    sliding = "sliding_attention" in (raw.get("layer_types") or ())
    if raw.get("use_sliding_window") and raw.get("sliding_window") and not raw.get("layer_types"):
        sliding = raw.get("max_window_layers", 28) < num_layers
    if sliding:
        raise ValueError(
            f"{source}: sliding-window attention is active (window {raw.get('sliding_window')}): "
            "expected full attention in every layer; set use_sliding_window to false if the model "
            "was trained with full attention, else choose another model"
        )


def _rope(raw: dict[str, Any], source: str) -> Rope:
    # Older files say rope_theta and rope_scaling, newer ones keep both in rope_parameters.
    old, new = (
        {name: value for name, value in (raw.get(group) or {}).items() if value is not None}
        for group in ("rope_scaling", "rope_parameters")
    )
    fields = {**new, **old}
    theta = new.get("rope_theta", old.get("rope_theta", raw.get("rope_theta") or 10_000.0))
    written = {x["rope_theta"] for x in (old, new, raw) if x.get("rope_theta") is not None}
    clash = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    if len(written) > 1 or clash:
        raise ValueError(
            f"{source}: rope_parameters {new} and rope_theta={raw.get('rope_theta')}, "
            f"rope_scaling={old} disagree: expected one spelling, or both with equal values; "
            "remove the wrong one"
        )
    kind = fields.get("rope_type", fields.get("type", "default"))
    common: dict[str, Any] = {"theta": float(theta)}
    if fields.get("partial_rotary_factor") not in (None, 1.0):
        kind = f"{kind} with partial_rotary_factor={fields['partial_rotary_factor']}"
    if kind == "default":
        return Rope(**common)
    if kind not in ("llama3", "yarn"):
        raise ValueError(
            f"{source}: rope type {kind!r} is not supported: expected 'default', 'llama3' or "
            "'yarn'; choose a model with one of these"
        )
    original = fields.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    common |= {"original_positions": int(original or 0), "kind": kind}
    try:
        if kind == "llama3":
            return Rope(
                **common,
                factor=float(fields["factor"]),
                low_freq_factor=float(fields["low_freq_factor"]),
                high_freq_factor=float(fields["high_freq_factor"]),
            )
        factor = fields.get("factor") or raw["max_position_embeddings"] / original
        return Rope(
            **common,
            factor=float(factor),
            beta_fast=float(fields.get("beta_fast") or 32),
            beta_slow=float(fields.get("beta_slow") or 1),
            truncate=bool(fields.get("truncate", True)),
            attention_factor=_yarn_attention(fields, factor),
        )
    except KeyError as error:
        raise ValueError(
            f"{source}: rope type {kind!r} lacks {error}: expected all its numbers; fetch the "
            "model's original config.json"
        ) from None


def _yarn_attention(fields: dict[str, Any], factor: float) -> float | None:
    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])
    above, below = fields.get("mscale"), fields.get("mscale_all_dim")
    if not (above and below) or factor <= 1:
        return None
    return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)


def config_json(cfg: ModelConfig, dtype) -> dict[str, Any]:
    """The config.json of a model, readable by transformers 4 and 5."""
    rope: dict[str, Any] = {"rope_type": "default" if cfg.rope.kind == "plain" else cfg.rope.kind}
    if cfg.rope.kind != "plain":
        rope["factor"] = cfg.rope.factor
        rope["original_max_position_embeddings"] = cfg.rope.original_positions
    if cfg.rope.kind == "llama3":
        rope["low_freq_factor"] = cfg.rope.low_freq_factor
        rope["high_freq_factor"] = cfg.rope.high_freq_factor
    if cfg.rope.kind == "yarn":
        rope["beta_fast"], rope["beta_slow"] = cfg.rope.beta_fast, cfg.rope.beta_slow
        rope["truncate"] = cfg.rope.truncate
        if cfg.rope.attention_factor is not None:
            rope["attention_factor"] = cfg.rope.attention_factor
    name = jnp.dtype(dtype).name
    raw = {
        "architectures": [FAMILIES[cfg.model_type].architecture],
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
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions,
        "tie_word_embeddings": cfg.tied,
        "rope_theta": cfg.rope.theta,
        "rope_scaling": None if cfg.rope.kind == "plain" else rope,
        "rope_parameters": {**rope, "rope_theta": cfg.rope.theta},
        "use_cache": True,
    }
    return raw | dict(FAMILIES[cfg.model_type].writes)
