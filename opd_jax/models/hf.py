"""Hugging Face folders to and from (config, parameters).

One table per family names every tensor and says how its axes are made of ours; it is used in both
directions. Nothing is guessed: a tensor that is unknown, missing, duplicated or of the wrong shape
is an error that names it.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from opd_jax import mesh as meshlib
from opd_jax import processes
from opd_jax.files import new_folder
from opd_jax.models import hf_folder, params, streaming
from opd_jax.models.architecture import NUM_INPUTS, ModelConfig, check_mesh, layers_with, specs
from opd_jax.models.families import FAMILIES, HEAD, Row
from opd_jax.models.hf_config import composite, generation_eos, model_folder, read_config
from opd_jax.models.hf_weights import INDEX, SINGLE, Weights, reader
from opd_jax.models.linear import Adapted
from opd_jax.pytrees import Params

__all__ = ["check", "generation_eos", "load", "read_config", "save"]


def table(cfg: ModelConfig, written: Collection[str] = ()) -> list[Row]:
    """The tensors of a model, in the form in which a folder with those ``written`` has them."""
    family, declared = FAMILIES[cfg.model_type], specs(cfg)
    rows = [row for row in (*family.rows, HEAD) if _has(declared, row.leaf)]
    fused = [row for row in family.fused if _has(declared, row.leaf)]
    if not (_all_names(fused, cfg) - _all_names(rows, cfg)) & set(written):
        return rows
    leaves = {row.leaf for row in fused}
    return [row for row in rows if row.leaf not in leaves] + fused


def _has(declared, leaf: Sequence[str]) -> bool:
    return leaf[-1] in (declared[leaf[0]] if len(leaf) > 1 else declared)


def _all_names(rows: list[Row], cfg: ModelConfig) -> set[str]:
    return {name for row in rows for name in _names(row, cfg).values()}


def _names(row: Row, cfg: ModelConfig) -> dict[tuple[int, ...], str]:
    """Index into the leading axes of a row's leaf -> tensor."""
    return row.names(_at(specs(cfg), row.leaf), layers_with(cfg, row.leaf[-1]))


def _drop_equal_head(weights: Weights, source: Path) -> None:
    """Accept a written-out head of a tied model if it is the embedding; raise if it is not."""
    if HEAD.name not in weights.files or "model.embed_tokens.weight" not in weights.files:
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
    del weights.files[HEAD.name]


@contextlib.contextmanager
def _opened(path, cfg: ModelConfig) -> Iterator[tuple[Weights, list[Row]]]:
    """The weights of a folder, checked by name, shape and type, and how they are read."""
    path, declared = model_folder(path), specs(cfg)
    whole = composite(path)
    named = str if whole is None else whole.own_name
    with contextlib.closing(Weights(path, named)) as weights:
        if cfg.tied:
            _drop_equal_head(weights, path)
        rows = table(cfg, weights.files)
        shapes = {row: row.shape(_at(declared, row.leaf)) for row in rows}
        weights.check({name: shapes[row] for row in rows for name in _names(row, cfg).values()})
        yield weights, rows


def check(path) -> None:
    """Check all of a folder that can be checked without reading values.

    Raises:
      FileNotFoundError, ValueError: as :func:`load`.
    """
    with _opened(path, read_config(path)):
        pass


def load(
    path,
    *,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    num_ids: int | None = None,
    placed: Params | None = None,
) -> tuple[ModelConfig, Params]:
    """Read a Hugging Face folder into (config, parameters), both in ``dtype``.

    Everything is checked that can be without reading values, then the files are read one after the
    other, a layer or an expert at a time: the host holds little more than the largest tensor, of
    which each process reads what its devices hold.

    Args:
      path: the folder.
      dtype: of the parameters, and the compute dtype of the config.
      mesh: where given, each device reads its own part of each tensor.
      num_ids: ids that the tokenizer has: rows of the vocabulary from there on are unused, and may
        hold anything.
      placed: the sharding of each parameter, where it is another than the mesh gives.

    Raises:
      FileNotFoundError: no folder, no config.json, no weights, or a listed shard is missing.
      ValueError: a damaged file; an unsupported model; an unknown, missing, duplicate or mis-shaped
        tensor; one whose values are not finite; a mesh that does not divide a dimension.
    """
    cfg = read_config(path, dtype=dtype)
    declared, dtype = specs(cfg), jnp.dtype(dtype)
    if mesh is not None:
        check_mesh(cfg, mesh)
        placed = params.shardings(declared, mesh)
    tree: Params = {"layers": {}}
    with _opened(path, cfg) as (weights, rows):
        names = {row: _names(row, cfg) for row in rows}
        order = {file: number for number, file in enumerate(weights.files.values())}
        steps = []
        for number, row in enumerate(rows):
            shape = _at(declared, row.leaf).shape
            place = None if placed is None else _at(placed, row.leaf)
            cut = streaming.blocks(shape, place, dtype, lead=row.num_stacked)
            for start in cut.starts():
                at = (*start, *[0] * row.num_stacked)[: row.num_stacked]
                steps.append((order[weights.files[names[row][at]]], number, start, cut))
        # File by file, from its beginning on: the same on every process, as the programs must be.
        for _, number, start, cut in sorted(steps, key=lambda step: step[:3]):
            row = rows[number]
            read = reader(weights, row, names[row], _at(declared, row.leaf), dtype, num_ids)
            of_leaf = _at(tree, row.leaf[:-1])
            so_far = of_leaf.get(row.leaf[-1])
            of_leaf[row.leaf[-1]] = streaming.written(cut, dtype, read, so_far, start)
    return cfg, tree


def _at(tree, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


# --- writing --------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A tensor to write."""

    name: str
    row: Row
    index: tuple[int, ...]  # into the leading axes of our leaf
    layer: int  # -1: of none
    shape: tuple[int, ...]


def _tensors(cfg: ModelConfig) -> list[_Tensor]:
    """Every tensor to write, one layer after the other."""
    declared, entries = specs(cfg), []
    for row in table(cfg):
        shape, layers = row.shape(_at(declared, row.leaf)), layers_with(cfg, row.leaf[-1])
        for index, name in _names(row, cfg).items():
            layer = layers[index[0]] if index else -1
            entries.append(_Tensor(name, row, index, layer, shape))
    # Rows come grouped by leaf; a stable sort by layer puts each layer's tensors into one shard.
    return sorted(entries, key=lambda entry: entry.layer)


class _Fetch:
    """Values of tensors on the host; a layer's array is fetched once for all its experts."""

    def __init__(self, tree: Params, dtype):
        self.tree, self.dtype = tree, dtype
        self.held: tuple[Any, Any] = (None, None)

    def __call__(self, tensor: _Tensor) -> np.ndarray:
        leaf, (layer, *rest) = _at(self.tree, tensor.row.leaf), tensor.index or (None,)
        key = (tensor.row.leaf, layer)
        if self.held[0] != key:
            part = leaf if layer is None else jax.tree.map(lambda x: x[layer], leaf)
            self.held = (key, _merged(meshlib.to_host(part), tensor.row.leaf[-1]))
        value = self.held[1][tuple(rest)]
        order = [axis for group in tensor.row.groups for axis in group]
        return np.ascontiguousarray(value.transpose(order).reshape(tensor.shape).astype(self.dtype))


def _merged(value: Any, leaf: str) -> np.ndarray:
    """An array on the host; of a layer's adapted weight what it stands for."""
    return np.asarray(value.merged(NUM_INPUTS[leaf])) if isinstance(value, Adapted) else value


def _shards(entries: list[_Tensor], itemsize: int, limit: int) -> Iterator[list[_Tensor]]:
    shard, size = [], 0
    for entry in entries:
        num_bytes = math.prod(entry.shape) * itemsize
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
      tree: its parameters, stacked by layer; adapted ones are merged, layer by layer.
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
    weight_map, total, fetch = {}, 0, _Fetch(tree, dtype)
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        values = {}
        for tensor in shard:
            value = fetch(tensor)
            if folder is not None:
                values[tensor.name] = value
            total += value.nbytes
            weight_map[tensor.name] = file
        if folder is not None:
            write_shard(folder / file, values)
    if folder is not None and len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        hf_folder.write_json(folder / INDEX, index)


def write_shard(file: Path, values: dict[str, np.ndarray], beside: str = "config.json") -> None:
    """Write tensors as a file of a model folder, with the mode of the file ``beside`` it.

    Raises:
      OSError: they cannot be written.
    """
    try:
        save_file(values, file, metadata={"format": "pt"})
    except SafetensorError as error:
        num_bytes = sum(value.nbytes for value in values.values())
        raise OSError(
            f"writing {num_bytes} bytes to {file} failed ({error}): expected a writable disk with "
            "room; free space or choose another folder"
        ) from error
    # The library makes files that only their owner can read; give them the folder's usual mode.
    shutil.copymode(file.parent / beside, file)
