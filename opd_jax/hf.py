"""Hugging Face folders: config.json and safetensors to and from our parameters.

One table per family names every tensor and says how its axes are made of ours; it is used in both
directions. Nothing is guessed: a tensor that is unknown, missing, duplicated or of the wrong shape is
an error, and so is a config field that changes the maths in a way the model does not implement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opd_jax import mesh as meshlib
from opd_jax import model, params
from opd_jax.attention import Rope
from opd_jax.model import ModelConfig
from opd_jax.params import ParamSpec
from opd_jax.pytrees import Params

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Row:
    """How one Hugging Face tensor is made of one of our leaves.

    Attributes:
      name: tensor name, with ``{}`` for the layer number.
      leaf: path in our parameters.
      groups: per axis of the Hugging Face tensor, which of our (per-layer) axes it merges, major first.
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


def _layer(name: str, leaf: str, *groups: tuple[int, ...]) -> Row:
    return Row("model.layers.{}." + name, ("layers", leaf), groups)


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
_HEAD = Row("lm_head.weight", ("head",), ((0,), (1,)))
TABLES: dict[str, tuple[Row, ...]] = {
    "llama": _DENSE,
    "qwen2": (
        *_DENSE,
        _layer("self_attn.q_proj.bias", "q_bias", (0, 1, 2)),
        _layer("self_attn.k_proj.bias", "k_bias", (0, 1)),
        _layer("self_attn.v_proj.bias", "v_bias", (0, 1)),
    ),
    "qwen3": (
        *_DENSE,
        _layer("self_attn.q_norm.weight", "q_norm", (0,)),
        _layer("self_attn.k_norm.weight", "k_norm", (0,)),
    ),
}


def table(cfg: ModelConfig) -> tuple[Row, ...]:
    """The rows of a model's family, with the head where it is not tied."""
    return TABLES[cfg.model_type] if cfg.tied else (*TABLES[cfg.model_type], _HEAD)


# --- reading the config ---------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}: expected a Hugging Face model folder (config.json and "
            "*.safetensors); download the whole model or correct the path"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): expected a Hugging Face {path.name}; the file is "
            "damaged, so fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__}: expected an object; fetch it again"
        )
    return value


def _folder(path) -> Path:
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"model folder {path} does not exist: expected a local Hugging Face folder (config.json "
            "and *.safetensors); download the model first or correct the path"
        )
    return path


def generation_eos(path) -> tuple[int, ...]:
    """Ids that end generation, from generation_config.json, else from config.json; () if neither."""
    path = _folder(path)
    for name in ("generation_config.json", "config.json"):
        if name != "config.json" and not (path / name).exists():
            continue
        eos = _json(path / name).get("eos_token_id")
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return ()


def read_config(path, *, dtype=jnp.float32) -> ModelConfig:
    """The model config of a Hugging Face folder.

    Raises:
      FileNotFoundError: the folder or its config.json is missing.
      ValueError: damaged JSON, or a model that is not implemented here.
    """
    path = _folder(path) / "config.json"
    return parse_config(_json(path), dtype=dtype, source=str(path))


def parse_config(raw: dict[str, Any], *, dtype=jnp.float32, source="config.json") -> ModelConfig:
    """The model config that the fields of a config.json mean, with transformers' own defaults.

    Raises:
      ValueError: a missing field, or one that asks for something that is not implemented here.
    """
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{source}: model_type {kind!r} is not supported: expected one of "
            f"{', '.join(ARCHITECTURES)}; choose a model of these families"
        )
    for name in raw.get("architectures") or ():
        if name != ARCHITECTURES[kind]:
            raise ValueError(
                f"{source}: architecture {name!r} is not supported: expected one of "
                f"{', '.join(ARCHITECTURES.values())}; choose a causal language model"
            )
    _refuse(raw, kind, source)

    def need(name: str):
        if raw.get(name) is None:
            raise ValueError(
                f"{source}: field {name!r} is missing: expected a {kind} config with it; fetch the "
                "model's original config.json"
            )
        return raw[name]

    width, num_heads = need("hidden_size"), need("num_attention_heads")
    head_dim = raw.get("head_dim") or (128 if kind == "qwen3" else width // num_heads)
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
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        max_positions=need("max_position_embeddings"),
        dtype=dtype,
    )


def _refuse(raw: dict[str, Any], kind: str, source: str) -> None:
    """Raise for fields whose value would silently change what the weights compute."""
    plain = {
        "hidden_act": "silu",
        "mlp_bias": False,
        "attention_bias": False,  # in llama and qwen3 it also puts a bias on o_proj
        "partial_rotary_factor": 1.0,
        "rope_interleaved": False,
        "quantization_config": None,
    }
    if kind == "qwen2":
        del plain["attention_bias"]  # not a field of this family: its biases are fixed
    for name, expected in plain.items():
        found = raw.get(name)
        if found is not None and found != expected:
            raise ValueError(
                f"{source}: {name}={found!r} is not supported: expected {expected!r}; choose a model "
                "without it (or save it in plain form with transformers)"
            )
    num_layers = raw.get("num_hidden_layers") or 0
    sliding = "sliding_attention" in (raw.get("layer_types") or ())
    if raw.get("use_sliding_window") and raw.get("sliding_window") and not raw.get("layer_types"):
        sliding = raw.get("max_window_layers", 28) < num_layers
    if sliding:
        raise ValueError(
            f"{source}: sliding-window attention is active (window {raw.get('sliding_window')}): "
            "expected full attention in every layer; set use_sliding_window to false if the model was "
            "trained with full attention, else choose another model"
        )


def _rope(raw: dict[str, Any], source: str) -> Rope:
    # Older files say rope_theta and rope_scaling, newer ones keep both in rope_parameters.
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    fields = {**new, **old}
    theta = new.get("rope_theta", old.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    written = {x["rope_theta"] for x in (old, new, raw) if x.get("rope_theta") is not None}
    clash = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    if len(written) > 1 or clash:
        raise ValueError(
            f"{source}: rope_parameters {new} and rope_theta={raw.get('rope_theta')}, "
            f"rope_scaling={old} disagree: expected one spelling, or both with equal values; remove "
            "the wrong one"
        )
    kind = fields.get("rope_type", fields.get("type", "default"))
    common = {"theta": float(theta)}
    if fields.get("partial_rotary_factor") not in (None, 1.0):
        kind = f"{kind} with partial_rotary_factor={fields['partial_rotary_factor']}"
    if kind == "default":
        return Rope(**common)
    if kind not in ("llama3", "yarn"):
        raise ValueError(
            f"{source}: rope type {kind!r} is not supported: expected 'default', 'llama3' or 'yarn'; "
            "choose a model with one of these"
        )
    original = fields.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    common |= {"original_positions": int(original or 0), "kind": kind}
    try:
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            return Rope(**common, **{name: float(fields[name]) for name in names})
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
            f"{source}: rope type {kind!r} lacks {error}: expected all its numbers; fetch the model's "
            "original config.json"
        ) from None


def _yarn_attention(fields: dict[str, Any], factor: float) -> float | None:
    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])
    above, below = fields.get("mscale"), fields.get("mscale_all_dim")
    if not (above and below) or factor <= 1:
        return None
    return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)


# --- reading the weights --------------------------------------------------------------------------


class _Weights:
    """All tensors of a folder by name, read lazily; every open file is a memory map."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.folder = folder
        self.handles: dict[str, Any] = {}
        for file in self._files():
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} cannot be read as safetensors ({error}): expected an intact file; it is "
                    "damaged or cut short, so fetch it again"
                ) from error
            twice = sorted(self.handles.keys() & set(handle.keys()))
            if twice:
                raise ValueError(
                    f"{file} repeats tensors of another file: {_some(twice)}; expected each tensor "
                    "once; remove the stale file or save the model again"
                )
            self.handles |= dict.fromkeys(handle.keys(), handle)

    def _files(self) -> list[Path]:
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.exists() and index.exists():
            raise ValueError(
                f"{self.folder} holds both {SINGLE} and {INDEX}: expected one of them, since they may "
                "be different weights; remove the stale one"
            )
        if single.exists():
            return [single]
        if not index.exists():
            raise FileNotFoundError(
                f"no {SINGLE} or {INDEX} in {self.folder}: expected safetensors weights; download "
                "them, or convert a *.bin checkpoint with transformers' save_pretrained"
            )
        files = [self.folder / x for x in sorted(set(_json(index).get("weight_map", {}).values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent or not files:
            raise FileNotFoundError(
                f"{index} lists {len(files)} files, missing are: {_some(absent)}; expected every "
                "listed file; finish the download"
            )
        return files

    def slice(self, name: str):
        return self.handles[name].get_slice(name)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise unless exactly the expected tensors are there, in their shapes, as floats."""
        # A buffer that old exports wrote out; it follows from the config.
        found = {name for name in self.handles if not name.endswith(".rotary_emb.inv_freq")}
        unknown, missing = sorted(found - expected.keys()), sorted(expected.keys() - found)
        if unknown or missing:
            raise ValueError(
                f"{self.folder}: unknown tensors: {_some(unknown)}; missing tensors: {_some(missing)}; "
                "expected exactly those of its config.json; check that config and weights belong "
                "together and that the model is a plain one (no adapter, no quantization)"
            )
        for name, shape in expected.items():
            view = self.slice(name)
            if tuple(view.get_shape()) != shape or view.get_dtype() not in FLOATS:
                raise ValueError(
                    f"{self.folder}: tensor {name} is {view.get_dtype()} {tuple(view.get_shape())}: "
                    f"expected shape {shape} and one of {FLOATS} by its config.json; check that "
                    "config and weights belong together"
                )


def _some(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"


def _reader(weights: _Weights, row: Row, spec: ParamSpec, dtype) -> Callable[[Any], np.ndarray]:
    """A function from an index into our leaf to its values, reading no more than that from disk."""
    order = [axis for group in row.groups for axis in group]
    names = row.names(spec.shape[0])
    seen: dict[tuple, np.ndarray] = {}  # replicas on other local devices ask for the same block

    def read(index) -> np.ndarray:
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
        if spans in seen:
            return seen[spans]
        per = spans[1:] if row.is_stacked else spans
        full = spec.shape[1:] if row.is_stacked else spec.shape
        sizes = [stop - start for start, stop in per]
        cut = []
        for first, *rest in row.groups:  # a mesh only ever splits the major axis of a group
            inner = math.prod(full[axis] for axis in rest)
            cut.append(slice(per[first][0] * inner, per[first][1] * inner))
        layers = names[slice(*spans[0])] if row.is_stacked else names
        block = np.empty((len(layers), *sizes), dtype)
        for i, name in enumerate(layers):
            part = weights.slice(name)[tuple(cut)].reshape([sizes[axis] for axis in order])
            block[i] = part.transpose(np.argsort(order))
        seen[spans] = block if row.is_stacked else block[0]
        return seen[spans]

    return read


def _drop_equal_head(weights: _Weights, source: Path) -> None:
    """Accept a written-out head of a tied model if it is the embedding; raise if it is not."""
    if _HEAD.name not in weights.handles or "model.embed_tokens.weight" not in weights.handles:
        return
    head, embed = weights.slice(_HEAD.name), weights.slice("model.embed_tokens.weight")
    same = head.get_shape() == embed.get_shape()
    for start in range(0, head.get_shape()[0] if same else 0, 16_384):
        rows = slice(start, start + 16_384)
        same = same and np.array_equal(head[rows, :], embed[rows, :])
    if not same:
        raise ValueError(
            f"{source}: config.json ties the head to the embedding, but lm_head.weight "
            f"{tuple(head.get_shape())} differs from model.embed_tokens.weight "
            f"{tuple(embed.get_shape())}: expected equal values; set tie_word_embeddings to false or "
            "remove lm_head.weight"
        )
    del weights.handles[_HEAD.name]


def load(path, *, dtype=jnp.float32, mesh: Mesh | None = None) -> tuple[ModelConfig, Params]:
    """Read a Hugging Face folder into (config, parameters), both in ``dtype``.

    Args:
      path: the folder.
      dtype: of the parameters, and the compute dtype of the config.
      mesh: where given, each device reads its own part of each tensor.

    Raises:
      FileNotFoundError: no folder, no config.json, no weights, or a listed shard is missing.
      ValueError: a damaged file; an unsupported model; an unknown, missing, duplicate or mis-shaped
        tensor; a mesh that does not divide a dimension.
    """
    path = _folder(path)
    cfg = read_config(path, dtype=dtype)
    declared = model.specs(cfg)
    placed = None if mesh is None else params.shardings(declared, mesh)
    tree: Params = {"layers": {}}
    with contextlib.ExitStack() as stack:
        weights = _Weights(path, stack)
        if cfg.tied:
            _drop_equal_head(weights, path)
        rows = [(row, _at(declared, row.leaf)) for row in table(cfg)]
        weights.check(
            {name: row.shape(spec) for row, spec in rows for name in row.names(cfg.num_layers)}
        )
        for row, spec in rows:
            read = _reader(weights, row, spec, jnp.dtype(dtype))
            if placed is None:
                leaf = jax.device_put(read((slice(None),) * len(spec.shape)))
            else:
                leaf = jax.make_array_from_callback(spec.shape, _at(placed, row.leaf), read)
            _at(tree, row.leaf[:-1])[row.leaf[-1]] = leaf
    return cfg, tree


def _at(tree, path: Sequence[str]):
    for key in path:
        tree = tree[key]
    return tree


# --- writing --------------------------------------------------------------------------------------


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
        "architectures": [ARCHITECTURES[cfg.model_type]],
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
    if cfg.model_type == "qwen2":
        raw["use_sliding_window"] = False
    else:
        raw["attention_bias"] = False
    return raw


def _tensors(cfg: ModelConfig) -> list[tuple[str, Row, int, tuple[int, ...]]]:
    """(name, row, layer, shape) of every tensor to write, one layer after the other."""
    declared = model.specs(cfg)
    entries = [
        (name, row, i, row.shape(_at(declared, row.leaf)))
        for row in table(cfg)
        for i, name in enumerate(row.names(cfg.num_layers))
    ]
    # Rows come grouped by leaf; a stable sort by layer puts each layer's tensors into one shard.
    return sorted(entries, key=lambda entry: entry[2] if entry[1].is_stacked else -1)


def _to_hf(leaf: jax.Array, row: Row, layer: int, shape: tuple[int, ...], dtype) -> np.ndarray:
    value = meshlib.to_host(leaf[layer] if row.is_stacked else leaf)
    order = [axis for group in row.groups for axis in group]
    return np.ascontiguousarray(value.transpose(order).reshape(shape).astype(dtype))


def _shards(entries, itemsize: int, limit: int) -> Iterator[list]:
    shard, size = [], 0
    for entry in entries:
        num_bytes = math.prod(entry[3]) * itemsize
        if shard and size + num_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += num_bytes
    yield shard


def save(
    path,
    cfg: ModelConfig,
    tree: Params,
    *,
    tokenizer=None,
    dtype=None,
    eos_ids: Sequence[int] = (),
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a Hugging Face folder that transformers (and :func:`load`) read.

    The folder appears whole or not at all. In a multi-process run every process must call this; the
    first one writes.

    Args:
      path: a folder that does not exist yet, or is empty.
      cfg: the model.
      tree: its parameters, stacked by layer.
      tokenizer: a transformers tokenizer to put beside the weights; gives the special ids.
      dtype: of the written weights; None keeps that of the parameters.
      eos_ids: ids that end generation, where they are more than the tokenizer's one.
      max_shard_bytes: a larger model is split into several files.

    Raises:
      FileExistsError: the folder holds something.
    """
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists and is not an empty folder: expected a new one; choose another path or "
            "remove it"
        )
    dtype = jnp.dtype(tree["embed"].dtype if dtype is None else dtype)
    writes = jax.process_index() == 0
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _save_weights(partial, cfg, tree, dtype, max_shard_bytes, writes)
        if writes:
            _save_config(partial, cfg, dtype, tokenizer, eos_ids)
            os.replace(partial, path)
    except BaseException:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _save_weights(folder: Path, cfg, tree, dtype, limit: int, writes: bool) -> None:
    shards = list(_shards(_tensors(cfg), dtype.itemsize, limit))
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        values = {
            name: _to_hf(_at(tree, row.leaf), row, layer, shape, dtype)
            for name, row, layer, shape in shard
        }
        total += sum(value.nbytes for value in values.values())
        weight_map |= dict.fromkeys(values, file)
        if writes:
            save_file(values, folder / file, metadata={"format": "pt"})
    if writes and len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _save_config(folder: Path, cfg, dtype, tokenizer, eos_ids: Sequence[int]) -> None:
    ids: dict[str, Any] = {}
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(tokenizer, name, None) for name in names}
        ids = {name: value for name, value in ids.items() if value is not None}
    if eos_ids:
        ids["eos_token_id"] = list(eos_ids) if len(eos_ids) > 1 else eos_ids[0]
    _write_json(folder / "config.json", {**config_json(cfg, dtype), **ids})
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
