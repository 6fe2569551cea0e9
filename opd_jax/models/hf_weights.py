"""Reading the safetensors files of a folder: lazily, checked, and no more than is asked for."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from opd_jax import records
from opd_jax.models.families import Row
from opd_jax.models.hf_config import read_json
from opd_jax.models.params import ParamSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
_MOST_OPEN = 2  # a block of layers may lie in two


class Index(TypedDict):
    """What ``model.safetensors.index.json`` holds."""

    weight_map: dict[str, str]  # tensor -> file


class Weights:
    """All tensors of a folder by name, read lazily.

    An open file is a memory map, whose pages count as this process's: few are open at a time.

    Attributes:
      folder: that holds them.
      files: tensor -> file, in the order of the files.
    """

    def __init__(self, folder: Path, own_name: Callable[[str], str | None] = str):
        """Open a folder.

        Args:
          folder: that holds them.
          own_name: what a tensor is called here; None: it is left out.
        """
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._written: dict[str, str] = {}  # tensor -> its name in the file
        self._open: dict[Path, Any] = {}  # the one used last is the last
        for file in self._listed():
            pairs = [(own_name(name), name) for name in sorted(self._handle(file).keys())]
            found = [(name, written) for name, written in pairs if name is not None]
            counts = collections.Counter([*self.files, *(name for name, _ in found)])
            twice = [name for name, count in sorted(counts.items()) if count > 1]
            if twice:
                raise ValueError(
                    f"{file} repeats tensors of another file: {_some(twice)}; expected each tensor "
                    "once; remove the stale file or save the model again"
                )
            self.files |= dict.fromkeys(sorted(name for name, _ in found), file)
            self._written |= dict(found)

    def _handle(self, file: Path) -> Any:
        handle = self._open.pop(file, None)
        if handle is None:
            records.regular(file)
            try:
                handle = safe_open(file, framework="numpy").__enter__()
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} cannot be read as safetensors ({error}): expected an intact file; it "
                    "is damaged or cut short, so fetch it again"
                ) from error
        self._open[file] = handle
        if len(self._open) > _MOST_OPEN:
            self._close(next(iter(self._open)))
        return handle

    def _close(self, file: Path) -> None:
        self._open.pop(file).__exit__(None, None, None)

    def close(self) -> None:
        """Give up every open file."""
        for file in tuple(self._open):
            self._close(file)

    def _listed(self) -> list[Path]:
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
        """A tensor of which nothing has been read yet."""
        return self._handle(self.files[name]).get_slice(self._written[name])

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise unless exactly the expected tensors are there, in their shapes, as floats."""
        # A buffer that old exports wrote out; it follows from the config.
        found = {name for name in self.files if not name.endswith(".rotary_emb.inv_freq")}
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


def reader(
    weights: Weights,
    row: Row,
    names: dict[tuple[int, ...], str],
    spec: ParamSpec,
    dtype,
    num_ids: int | None,
) -> Callable[[Any], np.ndarray]:
    """A function from an index into our leaf to its values, reading no more than that from disk.

    Values that are not finite raise, but for rows of a vocabulary table from ``num_ids`` on, which
    no id looks up: they become 0, since a masked logit of NaN would still reach the gradient.
    """
    order = [axis for group in row.groups for axis in group]
    lead = row.num_stacked
    is_table = num_ids is not None and row.leaf in (("embed",), ("head",))

    def read(index) -> np.ndarray:
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
        sizes = [stop - start for start, stop in spans]
        cut = _cut(row, spans[lead:], spec.shape[lead:])
        block = np.empty(sizes, dtype)
        for at in itertools.product(*(range(size) for size in sizes[:lead])):
            name = names[tuple(i + span[0] for i, span in zip(at, spans, strict=False))]
            part = weights.slice(name)[cut].reshape([sizes[lead:][axis] for axis in order])
            values = block[at]
            with np.errstate(over="ignore"):  # told below, by name
                values[...] = part.transpose(np.argsort(order))
            unused = values[max(num_ids - spans[0][0], 0) :] if is_table else values[:0]
            if not _is_finite(unused):
                unused[~np.isfinite(unused)] = 0
            if not _is_finite(values):
                raise ValueError(_not_finite(weights.folder, name, part, dtype))
        return block

    return read


def _cut(row: Row, spans, full) -> tuple[slice, ...]:
    """Which values of a tensor a block of our leaf needs."""
    cut = []
    for first, *rest in row.groups:  # a mesh only ever splits the major axis of a group
        inner = math.prod(full[axis] for axis in rest)
        cut.append(slice(spans[first][0] * inner, spans[first][1] * inner))
    if row.part is not None:
        axis, which, _ = row.part
        before = which * math.prod(full[a] for a in row.groups[axis])
        cut[axis] = slice(cut[axis].start + before, cut[axis].stop + before)
    return tuple(cut)


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
