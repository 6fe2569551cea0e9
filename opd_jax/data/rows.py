"""Files of prompts as people have them: every row as a dict, with its number, whatever the format.

=============================== ==================================================================
JSON lines                      one object a line; blank lines are skipped and counted as lines
a JSON array                    of objects
either of them, gzipped         told by the first bytes, as all formats are, not by the name
parquet                         one file; read by pyarrow
a saved dataset                 a folder of ``datasets``' ``save_to_disk``, one split; read by it
=============================== ==================================================================

Nothing that a row says is checked here. pyarrow and datasets are needed for their own formats only.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Row = Mapping[str, Any]

FORMATS = "JSON lines or a JSON array (or one of them as .gz), parquet, or a saved datasets folder"
_MAX_UNPACKED = 1 << 30  # bytes of a .gz; little can unpack to very much
_BOM = b"\xef\xbb\xbf"
_OTHER = {  # first bytes of what people have, and what to do with it
    b"PK\x03\x04": "a zip archive: unpack it",
    b"BZh": "bzip2: unpack it",
    b"\xfd7zXZ": "xz: unpack it",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it",
    b"ARROW1": "an Arrow file: save it as parquet",
    b"version https://git-lfs": "a pointer of Git LFS, not the file: fetch it by git lfs pull",
}


class Table(NamedTuple):
    """What a file is, and its rows: (line of a JSON-lines file or row of another, from 1; row)."""

    kind: str
    rows: Iterator[tuple[int, Row]]


def read(path: Path) -> Table:
    """Open a file, or a saved dataset, and look what it is.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is empty or of another format. Its rows raise it for what is malformed, named
        as file:line.
      ImportError: the library that reads the format is missing.
    """
    if path.is_dir():
        return Table("a saved dataset", _saved(path))
    if not path.is_file():
        raise FileNotFoundError(
            f"prompt file {path} does not exist: expected {FORMATS}; set the path of the prompts"
        )
    with path.open("rb") as stream:
        first = stream.read(32)
    if first.startswith(b"PAR1"):
        return Table("parquet", _parquet(path))
    for start, what in _OTHER.items():
        if first.startswith(start):
            raise ValueError(f"prompt file {path} is {what}; expected {FORMATS}")
    data, packed = path.read_bytes(), ""
    if first.startswith(b"\x1f\x8b"):
        data, packed = _unpacked(path, data), "gzipped "
    data = data.removeprefix(_BOM).rstrip()
    if not data:
        raise ValueError(f"prompt file {path} is empty: expected {FORMATS}; fill it")
    if data.lstrip().startswith(b"["):
        return Table(f"{packed}JSON array", _array(path, data))
    return Table(f"{packed}JSON lines", _lines(path, data))


def _unpacked(path: Path, data: bytes) -> bytes:
    """The content of a .gz, unless it is damaged or too large."""
    with contextlib.closing(gzip.open(path)) as stream:
        try:
            data = stream.read(_MAX_UNPACKED + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"prompt file {path} is gzipped and damaged ({error}): expected a whole file; copy "
                "it again"
            ) from error
    if len(data) > _MAX_UNPACKED:
        raise ValueError(
            f"prompt file {path} unpacks to more than {_MAX_UNPACKED} bytes: expected a file of "
            "prompts; split it"
        )
    return data


def _lines(path: Path, data: bytes) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            value = _parsed(line, f"{path}:{number}", "one object a line")
            yield number, _object(value, f"{path}:{number}")


def _array(path: Path, data: bytes) -> Iterator[tuple[int, Row]]:
    rows = _parsed(data, f"{path}", "one JSON array of objects")
    if not rows:
        raise ValueError(f"prompt file {path} is an empty array: expected objects in it; fill it")
    for number, value in enumerate(rows, start=1):
        yield number, _object(value, f"{path}:{number}")


def _parsed(data: bytes, where: str, expected: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start} is not UTF-8: save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error}): expected {expected}; mend it, or give {FORMATS}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep a list
        raise ValueError(f"{where}: {error}") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: found {kind(value)}: expected a JSON object; write {{...}}")
    return value


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    reader = _library("pyarrow.parquet", path, "parquet")
    try:
        number = 0
        for batch in reader.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, without_nulls(row)
    except Exception as error:  # of pyarrow's own, many kinds
        raise ValueError(
            f"prompt file {path} cannot be read as parquet ({error}): expected a whole file; copy "
            "it again"
        ) from error


def _saved(path: Path) -> Iterator[tuple[int, Row]]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if part.is_dir())
        raise ValueError(
            f"{path} holds the splits {', '.join(splits)}: expected one; give the path of a split, "
            f"such as {path / splits[0] if splits else path / 'train'}"
        )
    if not (path / "state.json").is_file():
        raise ValueError(
            f"{path} is a folder and holds no dataset saved by save_to_disk: expected {FORMATS}; "
            "give the path of a file"
        )
    library = _library("datasets", path, "a saved dataset")
    try:
        for number, row in enumerate(library.load_from_disk(str(path)), start=1):
            yield number, without_nulls(dict(row))
    except Exception as error:  # of the library's own, many kinds
        raise ValueError(
            f"the dataset in {path} cannot be read ({error}): expected what save_to_disk wrote; "
            "save it again"
        ) from error


def _library(name: str, path: Path, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{path} is {what}, which {package} reads, and that cannot be imported ({error}): "
            f"pip install {package}, or save the prompts as JSON lines"
        ) from error


def without_nulls(value: Any) -> Any:
    """A value without the fields that are null: Arrow gives every struct all fields of its type."""
    if isinstance(value, Mapping):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    """What a value is, in words, for messages."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number"}
    name = names.get(type(value), "a number" if isinstance(value, float) else repr(value)[:40])
    return f"an empty {name.split()[-1]}" if value in ([], {}) else name
