"""What a config.json says of single layers: which of them slide, and which have experts."""

from __future__ import annotations

from typing import Any

from opd_jax.models.architecture import Experts, LayerKind, ModelConfig
from opd_jax.models.families import Family

_WORDS = {"full_attention": False, "sliding_attention": True}
_WINDOW_LAYERS = 28  # where max_window_layers is not given


def read(raw: dict[str, Any], family: Family, source: str) -> dict[str, Any]:
    """The fields of :class:`ModelConfig` that a config.json says layer by layer.

    Raises:
      ValueError: a layer of a kind that is not implemented, or fields that disagree.
    """
    num_layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    slides = _slides(raw, family, num_layers, source)
    experts = _experts(raw, family, source)
    sparse = _sparse(raw, num_layers) if experts else [False] * num_layers
    if any(slides) and not window:
        raise ValueError(
            f"{source}: layers slide, and sliding_window={window!r}: expected a number of tokens; "
            "fetch the model's original config.json"
        )
    return {
        "pattern": tuple(LayerKind(a, b) for a, b in zip(slides, sparse, strict=True)),
        "window": window if any(slides) else None,
        "experts": experts if any(sparse) else None,
    }


def _slides(raw: dict[str, Any], family: Family, num_layers: int, source: str) -> list[bool]:
    window, types = raw.get("sliding_window"), raw.get("layer_types")
    switched = bool(raw.get("use_sliding_window") and window)
    first = raw.get("max_window_layers")
    late = [
        switched and i >= (_WINDOW_LAYERS if first is None else first) for i in range(num_layers)
    ]
    if types is not None:
        unknown = sorted({str(word) for word in types} - _WORDS.keys())
        if unknown or len(types) != num_layers:
            raise ValueError(
                f"{source}: layer_types has {len(types)} entries, unknown are: {unknown or 'none'};"
                f" expected one of {', '.join(_WORDS)} for each of {num_layers} layers; choose "
                "another model"
            )
        types = [_WORDS[word] for word in types]
    if family.slides in ("late", "mostly") and types is not None:
        return types
    if family.slides == "mostly":
        every = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern")
        return [(i + 1) % (every or family.full_every) != 0 for i in range(num_layers)]
    by_family = {
        "never": [False] * num_layers,
        "always": [bool(window)] * num_layers,
        "switched": [switched] * num_layers,
        "late": late,
    }[family.slides]
    if (types or (late if family.slides == "never" else by_family)) != by_family:
        raise ValueError(
            f"{source}: sliding-window attention is asked for (window {window}) in a way that "
            f"{family.name} does not have: expected "
            f"{'no window' if not any(by_family) else 'a window'} in every layer; set "
            "use_sliding_window to false if the model was trained with full attention, else choose "
            "another model"
        )
    return by_family


def _experts(raw: dict[str, Any], family: Family, source: str) -> Experts | None:
    if not any(row.leaf[-1] == "router" for row in family.rows):
        return None
    num = raw.get("num_experts")  # transformers 5 writes it under Mixtral's name
    num = raw["num_local_experts"] if num is None else num
    if not num:
        return None
    try:
        return Experts(
            num=num,
            top_k=raw["num_experts_per_tok"],
            ffn=raw.get("moe_intermediate_size") or raw["intermediate_size"],
            is_normalised=bool(raw.get("norm_topk_prob", True)),
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _sparse(raw: dict[str, Any], num_layers: int) -> list[bool]:
    step, dense = raw.get("decoder_sparse_step") or 1, set(raw.get("mlp_only_layers") or ())
    return [(i + 1) % step == 0 and i not in dense for i in range(num_layers)]


def fields(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    """The fields of a config.json that say it again, readable by transformers 4 and 5."""
    found: dict[str, Any] = {}
    slides = [kind.is_sliding for kind in cfg.kinds]
    if family.slides != "never":
        found["sliding_window"] = cfg.window
    if family.slides in ("late", "switched"):
        found["use_sliding_window"] = any(slides)
    if family.slides == "late" and not any(slides):
        del found["sliding_window"]  # switched off: the source's stays as it was
    if family.slides == "late" and any(slides) and slides == sorted(slides):
        found["max_window_layers"] = slides.index(True)
    if any(slides) and family.slides in ("late", "mostly"):
        words = {slide: word for word, slide in _WORDS.items()}
        found["layer_types"] = [words[slide] for slide in slides]
    if cfg.experts is not None:
        found |= _expert_fields(cfg, family)
    return found


def _expert_fields(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    assert cfg.experts is not None
    found: dict[str, Any] = {
        "num_local_experts": cfg.experts.num,
        "num_experts_per_tok": cfg.experts.top_k,
    }
    if "norm_topk_prob" not in family.defaults:
        return found
    return found | {
        "num_experts": cfg.experts.num,
        "moe_intermediate_size": cfg.experts.ffn,
        "norm_topk_prob": cfg.experts.is_normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, kind in enumerate(cfg.kinds) if not kind.is_sparse],
    }
