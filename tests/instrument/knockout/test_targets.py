"""Types and lists as people have them, and what is refused."""

import json

import pytest

from opd_jax import files
from opd_jax.data import tokenizer as tokenizers
from opd_jax.instrument.knockout import targets
from opd_jax.instrument.knockout.request import KnockoutError

NUM = 600


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(files.path_of("embedded:student"))


@pytest.fixture
def read(tokenizer, tmp_path):
    def read(content, name="lists.json", groups=""):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return targets.read(str(path), groups, tokenizer, NUM)

    return read


def table(tokenizer, ids, **columns):
    rows = [",".join(["token_id", "token", *columns])]
    for place, i in enumerate(ids):
        token = tokenizers.token_text(tokenizer, i).replace('"', '""')
        rows.append(",".join([str(i), f'"{token}"', *(str(c[place]) for c in columns.values())]))
    return "\n".join(rows) + "\n"


def test_a_table_gives_its_ids_in_order_and_its_numbers(tokenizer, read):
    found = read(table(tokenizer, [22, 19, 30], kl_mean=[0.5, "", 2], kind=["a"] * 3), "t.csv")
    assert found.ids == (22, 19, 30)
    assert found.groups == {}
    assert found.table["kl_mean"] == (0.5, None, 2.0)
    assert "kind" not in found.table


def test_a_table_from_a_spreadsheet_and_one_with_short_rows(tokenizer, read):
    assert read("\ufefftoken_id,count\r\n22,3\r\n19\r\n", "t.csv").table["count"] == (3.0, None)


def test_lists_of_ids_and_of_texts(tokenizer, read, tmp_path):
    found = read({"digits": ["1", 22, 22], "other": [30]})
    (one,) = tokenizer.encode("1", add_special_tokens=False)
    assert found.groups["digits"][0] == one
    assert found.groups == {"digits": found.groups["digits"], "other": (30,)}
    assert found.ids == (*found.groups["digits"], 30)
    assert read([22, 19]).ids == (22, 19)
    assert read([22, 19]).groups == {}
    assert targets.read("19, 22", "", tokenizer, NUM).ids == (19, 22)


def test_what_rocks_writes(tokenizer, read, tmp_path):
    (tmp_path / "rock.json").write_text("[22, 19]")
    (tmp_path / "next_ranks.json").write_text("[30, 31]")
    (tmp_path / "complement.json").write_text("[]")
    found = read({"rock": {"types": 2}, "next_ranks": {"types": 2}, "complement": {"types": 0}})
    assert found.ids == (22, 19)
    assert found.groups == {"rock": (22, 19), "next_ranks": (30, 31)}
    with pytest.raises(KnockoutError, match="list 'gone', is described and not there"):
        read({"gone": {"types": 1}})


def test_the_published_words_as_far_as_they_are_tokens(tokenizer):
    found = targets.read("19", "paper", tokenizer, NUM)
    assert found.groups == {}
    assert len(found.missing) == sum(map(len, targets.WORDS.values())) == 26


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ({"empty": []}, "l.json", "list 'empty', has no tokens"),
        ([], "l.json", "has no tokens"),
        ([600], "l.json", "has id 600: expected 0 to 599"),
        ([-1], "l.json", "has id -1"),
        (["nosuchtoken"], "l.json", "'nosuchtoken', which is not one token"),
        ([1.5], "l.json", "has 1.5: expected ids or texts"),
        ([True], "l.json", "has True"),
        (3, "l.json", "holds int"),
        ("{", "l.json", "not JSON"),
        ({"a": "19"}, "l.json", "expected a list"),
        ("id\n3\n", "t.csv", "has columns id and 1 rows: expected token_id"),
        ("", "t.csv", "has columns none and 0 rows"),
        ("token_id,token\n", "t.csv", "has columns token_id, token and 0 rows"),
        ("token_id,count\n19,3\n20,1,4\n", "t.csv", "row 3, has more cells than the 2 columns"),
        ([""], "l.json", "has '', which is not one token"),
        ("token_id\nx\n", "t.csv", "expected ids in token_id"),
        ("token_id\n3\n3\n", "t.csv", "has an id twice"),
        ("token_id,token\n19,zebra\n", "t.csv", "has token 'zebra' at id 19, the model has"),
    ],
)
def test_what_is_no_target_is_refused(read, content, name, message):
    with pytest.raises(ValueError, match=message):
        read(content, name)


def test_a_file_that_is_not_there(tokenizer):
    with pytest.raises(FileNotFoundError, match=r"--types=no.csv is no file and no list of ids"):
        targets.read("no.csv", "", tokenizer, NUM)
    with pytest.raises(KnockoutError, match="--types has id 600"):
        targets.read("3,600", "", tokenizer, NUM)
