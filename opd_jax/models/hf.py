"""Hugging Face folders to and from (config, parameters).

One table per family names every tensor and says how its axes are made of ours; it is used in both
directions. Nothing is guessed: a tensor that is unknown, missing, duplicated or of the wrong shape
is an error that names it.
"""

from __future__ import annotations

import contextlib
import math
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
from typing_extensions import TypedDict

from opd_jax import mesh as meshlib
from opd_jax import processes, records
from opd_jax.files import new_folder
from opd_jax.models import families, hf_folder, params, transformer
from opd_jax.models.families import HEAD, Row
from opd_jax.models.hf_config import (
    generation_eos,
    model_folder,
    read_config,
    read_json,
)
from opd_jax.models.params import ParamSpec
from opd_jax.models.transformer import ModelConfig
from opd_jax.pytrees import Params

__all__ = ["generation_eos", "load", "read_config", "save"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


class Index(TypedDict):
    """What ``model.safetensors.index.json`` holds."""

    weight_map: dict[str, str]  # tensor -> file


def table(cfg: ModelConfig) -> tuple[Row, ...]:
    """The tensors of a model."""
    return families.rows(cfg.model_type, tied=cfg.tied)


# --- reading the weights --------------------------------------------------------------------------


class _Weights:
    """All tensors of a folder by name, read lazily; every open file is a memory map."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.folder = folder
        self.handles: dict[str, Any] = {}
        for file in self._files():
            records.regular(file)
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} cannot be read as safetensors ({error}): expected an intact file; it "
                    "is damaged or cut short, so fetch it again"
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
                f"{self.folder} holds both {SINGLE} and {INDEX}: expected one of them, since they "
                "may be different weights; remove the stale one"
            )
        if single.exists():
            return [single]
        if not index.exists():
            raise FileNotFoundError(
                f"no {SINGLE} or {INDEX} in {self.folder}: expected safetensors weights; download "
                "them, or convert a *.bin checkpoint with transformers' save_pretrained"
            )
        listed = set(read_json(index, Index)["weight_map"].values())
        outside = sorted(name for name in listed if Path(name).name != name or name in ("", ".."))
        if outside:
            raise ValueError(
                f"{index} lists {_some(outside)}: expected names of files in that folder; the "
                "index is damaged or not to be trusted, so fetch the model again"
            )
        files = [self.folder / name for name in sorted(listed)]
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
                f"{self.folder}: unknown tensors: {_some(unknown)}; missing tensors: "
                f"{_some(missing)}; "
                "expected exactly those of its config.json; check that config and weights belong "
                "together and that the model is a plain one (no adapter, no quantization)"
            )
        for name, shape in expected.items():
            view = self.slice(name)
            if tuple(view.get_shape()) != shape or view.get_dtype() not in FLOATS:
                raise ValueError(
                    f"{self.folder}: tensor {name} is {view.get_dtype()} "
                    f"{tuple(view.get_shape())}: "
                    f"expected shape {shape} and one of {FLOATS} by its config.json; check that "
                    "config and weights belong together"
                )


def _some(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"


def _reader(
    weights: _Weights, row: Row, spec: ParamSpec, dtype, num_ids: int | None
) -> Callable[[Any], np.ndarray]:
    """A function from an index into our leaf to its values, reading no more than that from disk.

    Values that are not finite raise, but for rows of a vocabulary table from ``num_ids`` on, which
    no id looks up: they become 0, since a masked logit of NaN would still reach the gradient.
    """
    order = [axis for group in row.groups for axis in group]
    names = row.names(spec.shape[0])
    is_table = num_ids is not None and row.leaf in (("embed",), ("head",))
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
            with np.errstate(over="ignore"):  # told below, by name
                block[i] = part.transpose(np.argsort(order))
            unused = block[i, max(num_ids - spans[0][0], 0) :] if is_table else block[i, :0]
            if not _is_finite(unused):
                unused[~np.isfinite(unused)] = 0
            if not _is_finite(block[i]):
                raise ValueError(_not_finite(weights.folder, name, part, dtype))
        seen[spans] = block if row.is_stacked else block[0]
        return seen[spans]

    return read


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype == jnp.bfloat16:  # numpy's own test takes ten times as long for it
        return not np.any((values.view(np.uint16) & 0x7F80) == 0x7F80)
    return bool(np.isfinite(values).all())


def _not_finite(folder: Path, name: str, values: np.ndarray, dtype) -> str:
    values = np.asarray(values, np.float32)
    bad = ~np.isfinite(values)
    if not bad.any():
        return (
            f"{folder}: tensor {name} holds {np.abs(values).max():.3g}: expected numbers that "
            f"{jnp.dtype(dtype).name} can hold; choose float32 or bfloat16 for the model's dtype "
            "and param_dtype"
        )
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    return (
        f"{folder}: tensor {name} holds {int(bad.sum())} of {bad.size} values that are not finite, "
        f"first {values[where]} at {list(where)}: expected finite weights; the file is damaged, or "
        "the model diverged before it was saved; fetch it again, or take an earlier one"
    )


def _drop_equal_head(weights: _Weights, source: Path) -> None:
    """Accept a written-out head of a tied model if it is the embedding; raise if it is not."""
    if HEAD.name not in weights.handles or "model.embed_tokens.weight" not in weights.handles:
        return
    head, embed = weights.slice(HEAD.name), weights.slice("model.embed_tokens.weight")
    same, num_rows = head.get_shape() == embed.get_shape(), head.get_shape()[0]
    for start in range(0, num_rows if same else 0, 16_384):
        rows = slice(start, min(start + 16_384, num_rows))
        same = same and np.array_equal(head[rows, :], embed[rows, :], equal_nan=True)
    if not same:
        raise ValueError(
            f"{source}: config.json ties the head to the embedding, but lm_head.weight "
            f"{tuple(head.get_shape())} differs from model.embed_tokens.weight "
            f"{tuple(embed.get_shape())}: expected equal values; set tie_word_embeddings to "
            "false or remove lm_head.weight"
        )
    del weights.handles[HEAD.name]


def load(
    path, *, dtype=jnp.float32, mesh: Mesh | None = None, num_ids: int | None = None
) -> tuple[ModelConfig, Params]:
    """Read a Hugging Face folder into (config, parameters), both in ``dtype``.

    Args:
      path: the folder.
      dtype: of the parameters, and the compute dtype of the config.
      mesh: where given, each device reads its own part of each tensor.
      num_ids: ids that the tokenizer has: rows of the vocabulary from there on are unused, and may
        hold anything.

    Raises:
      FileNotFoundError: no folder, no config.json, no weights, or a listed shard is missing.
      ValueError: a damaged file; an unsupported model; an unknown, missing, duplicate or mis-shaped
        tensor; one whose values are not finite; a mesh that does not divide a dimension.
    """
    path = model_folder(path)
    cfg = read_config(path, dtype=dtype)
    declared = transformer.specs(cfg)
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
            read = _reader(weights, row, spec, jnp.dtype(dtype), num_ids)
            if placed is None:
                leaf = jax.device_put(read((slice(None),) * len(spec.shape)))
            else:
                leaf = jax.make_array_from_callback(spec.shape, _at(placed, row.leaf), read)
            _at(tree, row.leaf[:-1])[row.leaf[-1]] = leaf
    return cfg, tree


def _at(tree, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


# --- writing --------------------------------------------------------------------------------------


def _tensors(cfg: ModelConfig) -> list[tuple[str, Row, int, tuple[int, ...]]]:
    """(name, row, layer, shape) of every tensor to write, one layer after the other."""
    declared = transformer.specs(cfg)
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
    source=None,
    tokenizer=None,
    dtype=None,
    eos_ids: Sequence[int] = (),
    card: str | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a Hugging Face folder that transformers (and :func:`load`) read.

    The folder appears whole or not at all. In a multi-process run every process must call this; the
    first one writes. Parameters may lie on any devices: tensors are fetched one at a time.

    Args:
      path: a folder that does not exist yet, or is empty.
      cfg: the model.
      tree: its parameters, stacked by layer.
      source: Hugging Face folder that the model was made from. Its tokenizer files are taken over
        as they are, and so are the fields of its configs that say nothing of the weights.
      tokenizer: without ``source``, a transformers tokenizer to put beside the weights; gives the
        special ids.
      dtype: of the written weights; None keeps that of the parameters.
      eos_ids: ids that end generation, where they are others than the source's or the tokenizer's.
      card: text of ``README.md``.
      max_shard_bytes: a larger model is split into several files.

    Raises:
      FileExistsError: the folder holds something, or is being written by another process.
      FileNotFoundError: a file of ``source`` is not there.
      ProcessesError: on the other processes, where the first one cannot write.
      OSError: it cannot be written; nothing is left behind.
    """
    path = Path(path).expanduser()
    dtype = jnp.dtype(tree["embed"].dtype if dtype is None else dtype)
    folder: Path | None = None  # of the process that writes

    with contextlib.ExitStack() as stack:

        def begin() -> None:
            nonlocal folder
            folder = stack.enter_context(new_folder(path))
            hf_folder.write(folder, cfg, dtype, source, tokenizer, eos_ids)
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")

        processes.on_first(begin)
        _save_weights(folder, cfg, tree, dtype, max_shard_bytes)
    processes.meet(f"saved {path}")  # nobody goes on to read a folder that is not there yet


def _save_weights(folder: Path | None, cfg, tree, dtype, limit: int) -> None:
    """Write the weights; without a folder only take part in fetching them."""
    shards = list(_shards(_tensors(cfg), dtype.itemsize, limit))
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        values = {}
        for name, row, layer, shape in shard:
            value = _to_hf(_at(tree, row.leaf), row, layer, shape, dtype)
            if folder is not None:
                values[name] = value
            total += value.nbytes
            weight_map[name] = file
        if folder is not None:
            _write_shard(folder / file, values)
    if folder is not None and len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        hf_folder.write_json(folder / INDEX, index)


def _write_shard(file: Path, values: dict[str, np.ndarray]) -> None:
    try:
        save_file(values, file, metadata={"format": "pt"})
    except SafetensorError as error:
        num_bytes = sum(value.nbytes for value in values.values())
        raise OSError(
            f"writing {num_bytes} bytes to {file} failed ({error}): expected a writable disk with "
            "room; free space or choose another folder"
        ) from error
    # The library makes files that only their owner can read; give them the folder's usual mode.
    shutil.copymode(file.parent / "config.json", file)
