"""Prompt files as people have them: each kind is read to the same rows, or refused in words."""

import gzip
import json
import sys

import pytest

from opd_jax.data import prompts as prompt_files
from opd_jax.data import rows
from opd_jax.data.prompts import DataSpec, Record

USER = [{"role": "user", "content": "1 + 1"}]
REPLY = {"role": "assistant", "content": "2"}
SHAREGPT = [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2"}]
PARTS = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1"}]
PLAIN = [{"prompt": "1 + 1", "answer": "2"}, {"prompt": "2 + 2", "answer": "4"}]


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def packed(data: bytes) -> bytes:
    """Gzipped without the time of day: a test's input is the same in every process."""
    return gzip.compress(data, mtime=0)


def read(path, data, **fields):
    path.write_bytes(data)
    said: list[str] = []
    found = prompt_files.read(path, DataSpec(**fields), say=said.append)
    return found, said


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("p.jsonl", lines(PLAIN), "JSON lines"),
        ("p.jsonl", lines(PLAIN).rstrip(), "JSON lines"),
        ("p.jsonl", b"\xef\xbb\xbf" + lines(PLAIN).replace(b"\n", b"\r\n"), "JSON lines"),
        ("p.json", json.dumps(PLAIN).encode(), "JSON array"),
        ("p.json", b"\xef\xbb\xbf\r\n" + json.dumps(PLAIN, indent=2).encode(), "JSON array"),
        ("p.jsonl.gz", packed(lines(PLAIN)), "gzipped JSON lines"),
        ("p.json.gz", packed(json.dumps(PLAIN).encode()), "gzipped JSON array"),
        ("p.txt", packed(b"\xef\xbb\xbf" + lines(PLAIN)), "gzipped JSON lines"),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, data, kind):
    found, said = read(tmp_path / name, data)
    assert found == [Record("1 + 1", "2", None, 1), Record("2 + 2", "4", None, 2)]
    assert said == [f"read {tmp_path / name}: {kind}, 2 rows with `prompt` and `answer`"]


def test_blank_lines_are_skipped_and_counted(tmp_path):
    data = b"\n" + lines(PLAIN[:1]) + b"  \r\n\n" + lines(PLAIN[1:])
    found, _ = read(tmp_path / "p.jsonl", data)
    assert [(each.prompt, each.line) for each in found] == [("1 + 1", 2), ("2 + 2", 5)]


@pytest.mark.parametrize(
    ("row", "fields", "wanted"),
    [
        ({"prompt": USER}, {}, (USER, None, None)),
        ({"prompt": USER, "completion": [REPLY]}, {}, (USER, None, "2")),
        ({"messages": [*USER, REPLY], "answer": 2}, {}, (USER, "2", "2")),
        ({"messages": [*USER, REPLY, *USER]}, {}, ([*USER, REPLY, *USER], None, None)),
        ({"messages": [{"role": "user", "content": PARTS, "name": "x"}]}, {}, None),
        ({"conversations": SHAREGPT}, {}, (USER, None, "2")),
        ({"conversations": [*SHAREGPT, *SHAREGPT]}, {}, ([*USER, REPLY, *USER], None, "2")),
        ({"prompt": "a", "answer": ["2", 2.5]}, {}, ("a", ("2", "2.5"), None)),
        ({"prompt": "a", "answer": [2]}, {}, ("a", "2", None)),
        ({"prompt": "a", "answer": 10**400}, {}, ("a", str(10**400), None)),  # no float holds it
        ({"prompt": "", "messages": USER}, {}, (USER, None, None)),
        (
            {"question": "a", "ground_truth": 7},
            {"columns": (("prompt", "question"), ("answer", "ground_truth"))},
            ("a", "7", None),
        ),
        (
            {"prompt": USER, "reward_model": {"ground_truth": "7"}},
            {"columns": (("answer", "reward_model.ground_truth"),)},
            (USER, "7", None),
        ),
        ({"dialogue": USER, "prompt": "b"}, {"columns": (("messages", "dialogue"),)}, None),
        ({"a.b": "x", "a": {"b": "y"}}, {"columns": (("prompt", "a.b"),)}, ("x", None, None)),
        (
            {"prompt": "a"},
            {"system": "Be brief."},
            (
                [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
                None,
                None,
            ),
        ),
        (
            {"messages": [{"role": "system", "content": "own"}, *USER]},
            {"system": "Be brief."},
            ([{"role": "system", "content": "own"}, *USER], None, None),
        ),
    ],
)
def test_rows_of_every_shape(tmp_path, row, fields, wanted):
    (found,), _ = read(tmp_path / "p.jsonl", lines([row]), **fields)
    if "name" in str(row):
        wanted = ([{"role": "user", "content": "1 + 1", "name": "x"}], None, None)
    wanted = wanted or (USER, None, None)
    assert (found.prompt, found.answer, found.completion) == wanted


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"question": "a"}, {}, "--config.data.columns.prompt=question"),
        ({"prompt": USER, "conversations": SHAREGPT}, {}, "found `prompt` and `conversations`"),
        (
            {"conversations": [{"from": "bot", "value": "a"}]},
            {},
            r"`conversations\[0\]` is from 'bot': expected one of",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            {},
            r"content\[0\] is of type 'image_url': expected text only",
        ),
        ({"messages": [*USER, REPLY], "completion": "2"}, {}, "and there is a `completion`"),
        ({"prompt": "a", "completion": USER}, {}, "expected one, the assistant's"),
        (
            {"prompt": "a"},
            {"columns": (("answer", "gold"),)},
            "no row has 'gold', which data.columns names as answer",
        ),
        ({"prompt": "a"}, {"columns": (("prompt", "question"),)}, "exactly one of `question`"),
    ],
)
def test_rows_that_are_refused(tmp_path, row, fields, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "p.jsonl", lines([row]), **fields)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[]", "is an empty array"),
        (b'[{"prompt": "a"}, 7]', r"p:2: found a number"),
        (b'[{"prompt": "a"}', r"p: not JSON .*expected one JSON array"),
        (b'[{"prompt": "a"}, {"prompt": 5}]', r"p:2: `prompt` is a number"),
        (b'{\n"prompt": "a"\n}', r"p:1: not JSON .*one object a line"),
        (b"question,answer\na,b\n", r"p:1: not JSON .*JSON array"),
        (b"PK\x03\x04...", "is a zip archive: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (packed(lines(PLAIN))[:-9], "gzipped and damaged"),
        (packed(b" \n"), "is empty"),
    ],
)
def test_files_that_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "p", data)


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_MAX_UNPACKED", 20)
    with pytest.raises(ValueError, match="unpacks to more than 20 bytes"):
        read(tmp_path / "p.gz", packed(lines(PLAIN)))


def test_columns_that_look_like_answers_and_are_not_used_are_said(tmp_path):
    row = {"prompt": "a", "Solution": "b", "target": None, "reward": {"ground_truth": "c"}}
    _, said = read(tmp_path / "p.jsonl", lines([row, {"prompt": "a"}]))
    assert said[1].endswith(
        "Solution, reward.ground_truth may hold answers and are not used; to grade by one: "
        "--config.data.columns.answer=Solution"
    )
    _, said = read(tmp_path / "p.jsonl", lines([row]), columns=(("answer", "Solution"),))
    assert "reward.ground_truth may hold answers and is not used" in said[1]


@pytest.mark.parametrize(
    "columns",
    [
        (("question", "prompt"),),  # the wrong way round
        (("prompt", "a"), ("prompt", "b")),
        (("prompt", "a"), ("messages", "b")),
        (("prompt", ""),),
    ],
)
def test_columns_that_cannot_be_meant(columns):
    with pytest.raises(ValueError, match=r"data\.columns is .*pairs of one of"):
        DataSpec(columns=columns)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_missing_library_is_named_with_what_to_install(tmp_path, monkeypatch, kind):
    path, package = tmp_path / "p", {"parquet": "pyarrow", "saved": "datasets"}[kind]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    if kind == "parquet":
        path.write_bytes(b"PAR1....")
    else:
        path.mkdir()
        (path / "state.json").write_text("{}")
    with pytest.raises(ImportError, match=f"pip install {package}, or save"):
        prompt_files.read(path)


def test_folders_that_are_no_dataset_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no dataset saved by save_to_disk"):
        prompt_files.read(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds the splits train: .*such as .*/train"):
        prompt_files.read(tmp_path)


# Messages of which one has a field that the other lacks, which Arrow fills with nulls.
ARROW = [
    {"messages": USER, "answer": 2, "gold": None},
    {"messages": [{**USER[0], "name": "x"}, REPLY], "answer": None, "gold": None},
]
FROM_ARROW = [Record(USER, "2", None, 1), Record([{**USER[0], "name": "x"}], None, "2", 2)]


@pytest.mark.ci
def test_parquet_is_read_as_json_lines_are(tmp_path):
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]

    pq.write_table(pa.Table.from_pylist(ARROW), tmp_path / "p.parquet")
    assert prompt_files.read(tmp_path / "p.parquet") == FROM_ARROW
    whole = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        prompt_files.read(tmp_path / "cut")


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore")  # of its pickling, while it writes
def test_a_saved_dataset_is_read_as_json_lines_are(tmp_path):
    import datasets  # pyright: ignore[reportMissingImports]

    made = datasets.Dataset.from_list(ARROW)
    made.save_to_disk(str(tmp_path / "one"))
    assert prompt_files.read(tmp_path / "one") == FROM_ARROW
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "all"))
    assert prompt_files.read(tmp_path / "all" / "train") == FROM_ARROW
    with pytest.raises(ValueError, match="holds the splits train"):
        prompt_files.read(tmp_path / "all")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the dataset in .* cannot be read"):
        prompt_files.read(tmp_path / "one")
