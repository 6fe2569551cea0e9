"""Tasks: the forms that data sets have, and what is refused by name."""

import dataclasses
import json

import pytest

from opd_jax.config import path_of
from opd_jax.data import tokenizer as tokenizers
from opd_jax.evaluate import judge, tasks
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
        (  # ARC
            {"question": "Which?", "answerKey": "3",
             "choices": {"text": CHOICES, "label": ["1", "2", "3"]}},
            "Which?", "C", "choice",
        ),
        (  # MMLU-Pro
            {"question": "Which?", "options": CHOICES, "answer": "B", "answer_index": 1},
            "Which?", "B", "choice",
        ),
        (  # MedQA
            {"question": "Which?", "options": {"A": "red", "B": "blue"}, "answer": "blue",
             "answer_idx": "B"},
            "Which?", "B", "choice",
        ),
        ({"question": "Sum?", "choices": [3, 4, 5], "answer": 5}, "Sum?", "C", "choice"),
        ({"question": "Sum?", "choices": ["3", "1", "5"], "answer": 1}, "Sum?", "B", "choice"),
        (  # MathArena
            {"problem_idx": 3, "problem": "2/4?", "answer": r"\frac{1}{2}", "problem_type": ["x"]},
            "2/4?", r"\frac{1}{2}", "math",
        ),
        ({"question": "a + b?", "a": 1, "b": 2, "answer": "3"}, "a + b?", "3", "math"),
        ({"question": "2+2?", "answer": "4", "grade": "4th", "rubrics": ["a", "b"]}, "2+2?", "4",
         "math"),
        ({"prompt": [{"role": "user", "content": "hi"}], "answer": "ho"},
         [{"role": "user", "content": "hi"}], "ho", "math"),
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
        # What would be asked, or graded, otherwise than it is meant.
        ({"question": "a", "answer": "A", "choises": CHOICES}, "`choises` looks like `choices`"),
        ({"question": "a", "answer": "A", "graders": "exact"}, "`graders` looks like `grader`"),
        ({"question": "a", "answer": "B", "A": "x", "B": "y"}, 'write "choices": [...]'),
        (
            {"question": "a", "answer": "A", "choices": ["x", "y"], "options": ["x", "y"]},
            "found `choices` and `options`",
        ),
        ({"question": "a", "answer": "1", "Answer": "2"}, "found `answer` twice"),
        ({"question": "a", "answer": "1", "answerKey": "2"}, "found `answer` and `answerkey`"),
        ({"question": "a", "answer": "A", "choices": ["B", "A"]}, "may mean A (B) and B (A)"),
        ({"question": "a", "answer": 1, "choices": [1, 2]}, "may mean A (1) and B (2)"),
        (
            {"question": "a", "answer": 1, "choices": {"text": ["x", "y"], "label": ["1", "2"]}},
            "may mean A (x) and B (y)",
        ),
        (
            {"question": "a", "answer": "C", "choices": {"text": ["x", "y"], "label": ["1", "2"]}},
            "one of the labels 1, 2",
        ),
        (
            {"question": "a", "answer": "A", "choices": {"text": ["x", "y"], "label": ["A"]}},
            "2 texts and 1 labels",
        ),
        ({"question": "a", "answer": 0, "choices": [None, "y"]}, "`choices` is None"),
        ({"question": "a", "answer": 0, "choices": [{"x": 1}, "y"]}, "`choices` is {'x': 1}"),
        ({"question": "a", "answer": True}, "`answer` is True"),
        ({"question": "a", "answer": float("nan")}, "`answer` is nan"),
        ({"question": "a", "answer": float("inf")}, "`answer` is inf"),
        ({"question": "a", "answer": "1", "id": [1]}, "`id` is [1]"),
        ({"question": "a", "answer": "1", "id": "0"}, "the `id` '0' is that of line 1 too"),
        # What its grader cannot use is known before anything is sampled.
        ({"question": "a", "answer": "many", "grader": "numeric"}, "is no number"),
        ({"question": "a", "answer": "4", "grader": "choice"}, "has no letter"),
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
    with pytest.raises(ValueError, match="is a folder: expected a regular file"):
        tasks.read(str(tmp_path))
    with pytest.raises(tasks.TaskError, match="limit is -1"):
        tasks.read_all(write(tmp_path, {"question": "a", "answer": "1"}), limit=-1)
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


def test_an_expression_needs_math_verify_before_anything_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "is_installed", lambda: False)
    tasks.read(write(tmp_path, {"question": "a", "answer": "1/2"}, {"question": "b", "answer": 2}))
    with pytest.raises(judge.JudgeError, match=r"pip install 'opd-jax\[eval\]'"):
        tasks.read(write(tmp_path, {"question": "a", "answer": r"\sqrt{2}+x"}))


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
    given = {"max_prompt": 500, "now": "2026-01-02T03:04:05Z"} | given
    return tasks.prompts(task, form, tokenizer, **given)[0]


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
