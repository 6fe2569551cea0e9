"""The rotary fields of a config.json, as :class:`Rope`, and the way back.

Both spellings are read (``rope_theta`` with ``rope_scaling``, and the newer ``rope_parameters``)
and both are written. Where sliding layers have a rope of their own, the newer spelling has one
group of fields for either kind of layer, and the older one an extra base.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import pydantic
from typing_extensions import TypedDict

from opd_jax import records
from opd_jax.models.families import Family
from opd_jax.models.rope import Rope

Positive = Annotated[float, pydantic.Field(gt=0)]
_DEFAULT_THETA = 10_000.0
_FULL, _SLIDING = "full_attention", "sliding_attention"


@pydantic.with_config(records.OPEN)
class RopeNumbers(TypedDict, total=False):
    """Rotary fields of one kind of layer."""

    rope_type: str | None
    type: str | None
    rope_theta: Positive | None
    factor: Positive | None
    original_max_position_embeddings: Annotated[int, pydantic.Field(ge=1, le=1 << 26)] | None
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
class RopeFields(RopeNumbers, total=False):
    """Rotary fields of a config.json: for all layers, or for each kind of layer."""

    full_attention: RopeNumbers | None
    sliding_attention: RopeNumbers | None


def read(raw: dict[str, Any], family: Family, source: str) -> tuple[Rope, Rope | None]:
    """The rope of full layers, and that of sliding ones where it is another.

    Raises:
      ValueError: the two spellings disagree, or a kind that is not implemented.
    """
    old, new = _given(raw, "rope_scaling"), _given(raw, "rope_parameters")
    if not family.has_local_rope:
        return _rope(raw, old, new, family.defaults.get("rope_theta", _DEFAULT_THETA), source), None
    per_kind = {kind: new.pop(kind, None) or {} for kind in (_FULL, _SLIDING)}
    theta = family.defaults["rope_theta"]
    full = _rope(raw, old, new | _without_null(per_kind[_FULL]), theta, source)
    theta = family.defaults.get("rope_local_base_freq", theta)
    if "rope_local_base_freq" in family.defaults:
        raw = raw | {"rope_theta": raw.get("rope_local_base_freq")}
    return full, _rope(raw, {}, _without_null(per_kind[_SLIDING]), theta, source)


def _given(raw: dict[str, Any], group: str) -> dict[str, Any]:
    return _without_null(raw.get(group) or {})


def _without_null(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _rope(raw: dict[str, Any], old, new, default_theta: float, source: str) -> Rope:
    fields = {**new, **old}
    theta = new.get("rope_theta", old.get("rope_theta", raw.get("rope_theta") or default_theta))
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
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"{source}: rope type {kind!r} is not supported: expected 'default', 'linear', "
            "'llama3' or 'yarn'; choose a model with one of these"
        )
    common["kind"] = kind
    try:
        if kind == "linear":
            return Rope(**common, factor=float(fields["factor"]))
        original = fields.get("original_max_position_embeddings")
        original = original or raw.get("max_position_embeddings")
        common["original_positions"] = int(original or 0)
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


def fields(rope: Rope, local: Rope | None, family: Family) -> dict[str, Any]:
    """The rotary fields of a config.json, readable by transformers 4 and 5."""
    scaling = _numbers(rope)
    older = {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "plain" else scaling,
    }
    newer = {**scaling, "rope_theta": rope.theta}
    if local is None:
        return older | {"rope_parameters": newer}
    if "rope_local_base_freq" in family.defaults:
        older["rope_local_base_freq"] = local.theta
    sliding = {**_numbers(local), "rope_theta": local.theta}
    return older | {"rope_parameters": {_FULL: newer, _SLIDING: sliding}}


def _numbers(rope: Rope) -> dict[str, Any]:
    numbers: dict[str, Any] = {"rope_type": "default" if rope.kind == "plain" else rope.kind}
    if rope.kind == "plain":
        return numbers
    numbers["factor"] = rope.factor
    if rope.kind != "linear":
        numbers["original_max_position_embeddings"] = rope.original_positions
    if rope.kind == "llama3":
        numbers["low_freq_factor"] = rope.low_freq_factor
        numbers["high_freq_factor"] = rope.high_freq_factor
    if rope.kind == "yarn":
        numbers["beta_fast"], numbers["beta_slow"] = rope.beta_fast, rope.beta_slow
        numbers["truncate"] = rope.truncate
        if rope.attention_factor is not None:
            numbers["attention_factor"] = rope.attention_factor
    return numbers
