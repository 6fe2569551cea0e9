"""Tasks: the forms that data sets have, and what is refused by name."""

import dataclasses
import json

import pytest

from opd_jax.config import path_of
from opd_jax.data import tokenizer as tokenizers
from opd_jax.evaluate import tasks
from opd_jax.evaluate.tasks import Form


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(path_of("embedded:student"))


def write(tmp_path, *rows, name="task"):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


CHOICES = ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("row", "question", "answer", "grader"),
    [
        ({"problem": "2+2?", "answer": "4", "level": 1, "unique_id": "x"}, "2+2?", "4", "math"),
        ({"Problem": "2+2?", "Answer": 4, "Solution": r"\boxed{5}"}, "2+2?", "4", "math"),
        ({"problem": "2+2?", "solution": r"so \boxed{4}"}, "2+2?", "4", "math"),
        ({"question": "2+2?", "answer": "2+2=4\n#### 4"}, "2+2?", "4", "math"),
        ({"question": "Which?", "choices": CHOICES, "answer": "B"}, "Which?", "B", "choice"),
        ({"question": "Which?", "choices": CHOICES, "answer": 1}, "Which?", "B", "choice"),
        ({"question": "Which?", "choices": CHOICES, "answer": "green"}, "Which?", "B", "choice"),
        ({"question": "Which?", "choices": CHOICES, "answer": "(c)"}, "Which?", "C", "choice"),
        (
            {"question": "Which?", "choices": {"text": CHOICES, "label": []}, "answer": "A"},
            "Which?", "A", "choice",
        ),
        ({"prompt": "Say hi", "answer": "hi", "grader": "exact"}, "Say hi", "hi", "exact"),
        (
            {"messages": [{"role": "user", "content": "hi"}], "answer": "ho"},
            [{"role": "user", "content": "hi"}], "ho", "math",
        ),
    ],
)  # fmt: skip
def test_the_forms_that_data_sets_have(tmp_path, row, question, answer, grader):
    (problem,) = tasks.read(write(tmp_path, row)).problems
    assert problem.question == question
    assert (problem.answer, problem.grader) == (answer, grader)
    assert problem.id == "0"


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"question": "a", "prompt": "b", "answer": "1"}, "found `prompt` and `question`"),
        ({"quesion": "a", "answer": "1"}, "('quesion' looks like `question`)"),
        ({"question": "a", "anwser": "1"}, "('anwser' looks like `answer`)"),
        ({"question": " ", "answer": "1"}, "`question` is ' ': expected a string"),
        ({"question": "a", "answer": ""}, "`answer` is ''"),
        ({"question": "a", "answer": [1]}, "`answer` is [1]"),
        ({"question": "a", "answer": "D", "choices": CHOICES}, "expected a letter up to C"),
        ({"question": "a", "answer": 3, "choices": CHOICES}, "expected 0 to 2"),
        ({"question": "a", "answer": "A", "choices": ["x"]}, "2 to 26 texts"),
        ({"question": "a", "answer": "1", "grader": "maths"}, "there is no grader 'maths'"),
        ({"messages": [], "answer": "1"}, "`messages` is no list"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "1"}, "assistant's"),
        ([1], "found list: expected a JSON object"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(tmp_path, row, part):
    path = write(tmp_path, {"question": "a", "answer": "1"}, row)
    with pytest.raises(tasks.TaskError) as caught:
        tasks.read(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert part in str(caught.value)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="--tasks"):
        tasks.read_all(str(tmp_path / "absent.jsonl"))
    with pytest.raises(tasks.TaskError, match="no task given"):
        tasks.read_all(" , ")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(tasks.TaskError, match="holds no problem"):
        tasks.read(str(tmp_path / "empty.jsonl"))
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(tasks.TaskError, match=r"bad.jsonl:1: not JSON"):
        tasks.read(str(tmp_path / "bad.jsonl"))
    path = write(tmp_path, {"question": "a", "answer": "1"})
    with pytest.raises(tasks.TaskError, match="two tasks are called 'task'"):
        tasks.read_all(f"{path},{path}")


def test_limit_and_digest(tmp_path):
    rows = [{"question": str(i), "answer": "1"} for i in range(4)]
    path = write(tmp_path, *rows)
    assert [p.index for p in tasks.read(path, limit=2).problems] == [0, 1]
    whole = tasks.read(path)
    assert tasks.read(write(tmp_path, *rows, name="copy")).digest == whole.digest
    assert tasks.read(path, grader="exact").digest != whole.digest
    assert tasks.read(path, limit=2).digest != whole.digest


def render(tmp_path, tokenizer, row, form, **given):
    task = tasks.read(write(tmp_path, row))
    return tasks.prompts(task, form, tokenizer, max_prompt=given.pop("max_prompt", 500))[0]


def test_how_a_problem_becomes_a_prompt(tmp_path, tokenizer):
    row = {"question": "2 + 2?", "answer": "4"}
    raw = render(tmp_path, tokenizer, row, Form("raw", "Think."))
    assert raw.text.endswith("2 + 2?\nThink.")
    chat = render(tmp_path, tokenizer, row, Form("chat", "Think."))
    messages = [{"role": "user", "content": "2 + 2?\nThink."}]
    assert list(chat.ids) == tokenizers.render(tokenizer, messages)
    assert render(tmp_path, tokenizer, row, Form(instruction="Think.")) == chat  # has a template
    as_messages = {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}
    assert render(tmp_path, tokenizer, as_messages, Form("chat", "Think.")).ids == chat.ids
    with pytest.raises(tasks.TaskError, match="--format=raw"):
        render(tmp_path, tokenizer, as_messages, Form("raw"))


def test_options_are_written_below_the_question(tmp_path, tokenizer):
    row = {"question": "Which?", "choices": CHOICES, "answer": "B"}
    text = render(tmp_path, tokenizer, row, Form("raw", "Letter.")).text
    assert text.endswith("Which?\nA. red\nB. green\nC. blue\nLetter.")


def test_a_system_message_stands_first(tmp_path, tokenizer):
    task = tasks.read(write(tmp_path, {"question": "2 + 2?", "answer": "4"}))
    asked = tasks._asked(task.problems[0], Form(system="Be brief."), True)
    assert [message["role"] for message in asked] == ["system", "user"]
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "2"}]
    problem = dataclasses.replace(task.problems[0], question=own)
    assert tasks._asked(problem, Form(system="Be brief."), True) == own


def test_a_prompt_without_room_is_refused(tmp_path, tokenizer):
    row = {"question": "word " * 200, "answer": "4"}
    with pytest.raises(tasks.TaskError, match=r"task.jsonl:1: the prompt has \d+ ids"):
        render(tmp_path, tokenizer, row, Form("raw"), max_prompt=50)


def test_an_unknown_format():
    with pytest.raises(tasks.TaskError, match="expected one of auto, chat, raw"):
        Form("text")
