"""What the teacher reads in the place of the student's prompt."""

import json

import pytest

from opd_jax import config
from opd_jax.data import prompts as prompt_files
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.prompts import DataSpec
from opd_jax.rules import RuleError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 3 = ?"},
]
ROW = {"prompt": "2 + 3 = ?", "answer": ["5", "5.0"], "extra": {"hint": 7}}


def teacher(tmp_path, row, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return prompt_files.read(path, DataSpec(**fields))[0].teacher


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(config.path_of("embedded:student"))


def test_a_frame_is_filled_from_the_row(tmp_path):
    frame = "{prompt} {{{answer}}} {extra.hint}"
    assert teacher(tmp_path, ROW) is None
    assert teacher(tmp_path, ROW, teacher_prompt=frame) == "2 + 3 = ? {5} 7"
    named = {"question": "1?", "gold": "2"}
    columns = (("prompt", "question"), ("answer", "gold"))
    own = teacher(tmp_path, named, columns=columns, teacher_prompt="{prompt}{answer}{gold}")
    assert own == "1?22"


def test_in_a_chat_it_takes_the_place_of_the_last_message(tmp_path):
    own = teacher(tmp_path, {"messages": CHAT, "answer": 5}, teacher_prompt="{prompt} ({answer})")
    assert own == [CHAT[0], {"role": "user", "content": "2 + 3 = ? (5)"}]
    replied = {"messages": [*CHAT, {"role": "assistant", "content": "five"}]}
    assert teacher(tmp_path, replied, teacher_prompt="{prompt}") == CHAT
    asked = teacher(tmp_path, ROW, teacher_prompt="{prompt}", system="Be brief.")
    assert asked == CHAT


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"prompt": "2 + 3 = ?"}], ids=str)
def test_a_system_prompt_of_its_own_takes_the_place_of_the_students(tmp_path, row):
    own = teacher(
        tmp_path, row | {"answer": "5"}, teacher_system="Say {answer}.", system="Be long."
    )
    assert own == [{"role": "system", "content": "Say 5."}, CHAT[1]]


def test_a_column_alone_may_hold_the_whole_prompt(tmp_path):
    row = ROW | {"messages_of_teacher": CHAT[1:], "ids": [5, 6]}
    own = teacher(tmp_path, row, teacher_prompt="{messages_of_teacher}", system="Be brief.")
    assert own == CHAT
    assert teacher(tmp_path, row, teacher_prompt="{ids}") == (5, 6)
    for_ids = {"prompt_ids": [1, 2], "own": [3]}
    assert teacher(tmp_path, for_ids, teacher_prompt="{own}") == (3,)


def test_it_is_rendered_as_the_students_and_counted(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": CHAT[1:], "answer": 5}, {"messages": CHAT[1:], "answer": "5" * 99}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = DataSpec(max_prompt=64)
    spec = DataSpec(max_prompt=64, teacher_prompt="{prompt} Hint: {answer}")
    said = []
    (first, _), _ = prompt_files.examples(path, plain, tokenizer)
    (own,), counts = prompt_files.examples(path, spec, tokenizer, say=said.append)
    chat = [{"role": "user", "content": "2 + 3 = ? Hint: 5"}]
    assert list(own.teacher_ids) == tokenizers.render(tokenizer, chat)
    assert own.ids == first.ids
    assert str(counts) == "1 prompts kept, 1 dropped as too long"
    assert f"as the teacher sees it, {len(own.teacher_ids)} ids" in said[1]
    # Another prompt of the teacher is another run, of the same prompts.
    assert prompt_files.digest([own]) != prompt_files.digest([first])
    both = [prompt_files.digest([row], has_completions=False) for row in (own, first)]
    assert both[0] == both[1]
    longer = DataSpec(max_prompt=64, max_teacher_prompt=200, teacher_prompt=spec.teacher_prompt)
    assert len(prompt_files.examples(path, longer, tokenizer)[0]) == 2


@pytest.mark.parametrize(
    ("row", "frame", "message"),
    [
        (ROW, "{hint}", "`hint`, which data.teacher_prompt names, is not there"),
        (ROW, "{extra}", "`extra`, which data.teacher_prompt names, is an object"),
        (ROW | {"hint": ""}, "{hint}", "the teacher's text by data.teacher_prompt"),
        (ROW | {"own": []}, "{own}", "is an empty list"),
        (ROW | {"own": [{"role": "user"}]}, "{own}", "`own[0]` content is missing"),
        (ROW | {"own": [1, -2]}, "{own}", "`own[1]` is -2: expected a token id"),
        (ROW | {"own": [{"role": "assistant", "content": "5"}]}, "{own}", "expected the turn to"),
        ({"prompt_ids": [1]}, "{prompt}", "the prompt is ids"),
        ({"prompt": "2?"}, "{answer}", "`answer`, which data.teacher_prompt names, is not there"),
    ],
)
def test_a_row_that_has_it_not_is_named(tmp_path, row, frame, message):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: ") as error:
        teacher(tmp_path, row, teacher_prompt=frame)
    assert message in str(error.value)


def test_ids_that_the_vocabulary_has_not_are_named(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW | {"own": [10**6]}) + "\n")
    with pytest.raises(ValueError, match="the teacher's prompt has the id 1000000"):
        prompt_files.examples(path, DataSpec(teacher_prompt="{own}"), tokenizer)


@pytest.mark.parametrize("frame", ["{", "}", "{}", "{ }", "{a!r}", "{a:>3}", "\\boxed{}"])
def test_what_is_no_frame_is_refused(frame):
    for name in ("teacher_prompt", "teacher_system"):
        with pytest.raises(RuleError, match=rf"data\.{name} is .*\{{NAME\}} is a column"):
            DataSpec(**{name: frame})
