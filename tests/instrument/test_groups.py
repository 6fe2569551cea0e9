import numpy as np
import pytest

from opd_jax.instrument import groups
from opd_jax.instrument.corpus import Occurrences, TypeStats


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" $", "math_delimiter"),
        ("␣$", "math_delimiter"),
        ("\\", "math_delimiter"),
        ("\\[", "math_delimiter"),
        ("}{", "math_delimiter"),
        (" \\frac", "math_delimiter"),
        ("$.", "math_delimiter"),
        ("}\n", "math_delimiter"),
        (" ", "whitespace_markup"),
        ("⏎⏎", "whitespace_markup"),
        (" **", "whitespace_markup"),
        ("---\n\n", "whitespace_markup"),
        ("###", "whitespace_markup"),
        (".\n\n", "whitespace_markup"),
        ("7", "digit"),
        (" 12", "digit"),
        ("0.5", "digit"),
        (".", "punctuation"),
        (" (", "punctuation"),
        ("—", "punctuation"),
        ("->", "punctuation"),
        ("=", "punctuation"),
        (" the", "function_word"),
        ("␣of", "function_word"),
        ("If", "function_word"),
        (" equation", "content"),
        ("don’t", "content"),
        ("'s", "content"),
        ("_1", "content"),
        ("数", "content"),
        ("<|im_end|>", "special"),
        ("<0xE2>", "special"),
        ("<unused 631>", "special"),
        ("", "special"),
    ],
)
def test_kind_of_a_token_by_its_text(text, wanted):
    assert wanted in groups.GROUPS
    assert groups.group(text, at_line_start_share=0.0) == wanted


def test_place_decides_between_marker_and_word_and_between_bullet_and_operator():
    for text in ("Wait", " So", "If"):
        assert groups.group(text, at_line_start_share=0.9) == "discourse_marker"
        assert groups.group(text, at_line_start_share=0.5) != "discourse_marker"
    for text in ("-", " *"):
        assert groups.group(text, at_line_start_share=0.9) == "whitespace_markup"
        assert groups.group(text, at_line_start_share=0.1) == "punctuation"
    assert groups.group("7", at_line_start_share=1.0) == "digit"


TEXTS = ["So", " we", ".", "\n", "**", " end", ".\n\n", "3", ". "]


def occurrences(answers, kl=None):
    """Occurrences of answers given as lists of ids."""
    token_id = np.concatenate([np.array(a, np.int32) for a in answers])
    answer = np.repeat(np.arange(len(answers), dtype=np.int32), [len(a) for a in answers])
    position = np.concatenate([np.arange(len(a), dtype=np.int32) for a in answers])
    kl = np.ones(len(token_id), np.float32) if kl is None else np.asarray(kl, np.float32)
    return Occurrences(answer, answer, position, token_id, kl, kl, kl, kl, kl, len(TEXTS) + 1)


def test_line_starts_are_counted_through_marks_and_not_across_answers():
    found = occurrences([[0, 1, 2, 4, 0, 5, 3], [1, 3, 3, 0, 1, 8, 5], [7, 0, 4, 1]])
    share = groups.line_start_share(found, lambda i: TEXTS[i])
    assert share[0] == 3 / 4  # So: the answer, after '. **', after line breaks; not after '3'
    assert share[1] == 1 / 4  # we: where it opens the second answer; not after 'So **'
    assert share[7] == 1  # 3: it opens an answer, whatever the one before ended with
    assert share[5] == 1 / 2  # end: after '. ', not after So
    assert share[3] == 1 / 3  # the second of two line breaks
    assert share[9] == 0  # not seen


def test_line_starts_do_not_depend_on_the_order_of_positions():
    found = occurrences([[0, 1, 2, 4, 0, 5, 3], [1, 3, 3, 0, 1, 8, 5]])
    mixed = found.where(np.random.default_rng(0).permutation(len(found)))
    share = groups.line_start_share(found, lambda i: TEXTS[i])
    assert np.array_equal(share, groups.line_start_share(mixed, lambda i: TEXTS[i]))


def test_table_adds_up_to_the_corpus():
    found = occurrences([[0, 1, 1, 2, 7, 3], [0, 5, 2]], kl=[1, 2, 3, 4, 5, 6, 7, 8, 9])
    stats = TypeStats.of_occurrences(found)
    kind = groups.of_types(found, lambda i: TEXTS[i])
    assert kind[0] == "discourse_marker"
    assert set(kind) == {0, 1, 2, 3, 5, 7}
    rows = {row["group"]: row for row in groups.table(stats, kind, np.array([1, 7]))}
    assert list(rows) == list(groups.GROUPS)
    assert rows["function_word"] == {
        "group": "function_word",
        "types": 1,
        "rocks": 1,
        "token_share": 2 / 9,
        "kl_share": 5 / 45,
        "rock_token_share": 2 / 9,
    }
    assert rows["digit"]["rocks"] == 1
    assert rows["special"]["types"] == 0
    for name, total in (("types", 6), ("rocks", 2), ("token_share", 1), ("kl_share", 1)):
        assert sum(row[name] for row in rows.values()) == pytest.approx(total)
