"""scripts/make_reasoning_prompts.py: questions are stripped and split; CI draws them for real."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_reasoning_prompts.py"
SPEC = importlib.util.spec_from_file_location("make_reasoning_prompts", SCRIPT)
prompts = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = prompts  # where dataclasses look their module up
SPEC.loader.exec_module(prompts)
TASKS = {task.name: task for task in prompts.TASKS}


class FakeGym:
    """Stands in for reasoning-gym: question i is 'i + 1 =', or the only one there is."""

    def __init__(self, different: int):
        self.different = different

    def create_dataset(self, name, size, seed, **settings):
        for i in range(size):
            i %= self.different
            yield {"question": f"{name}: {i} + 1 =", "answer": str(i + 1)}


@pytest.mark.parametrize(
    ("task", "question", "wanted"),
    [
        (
            "chain_sum",
            "State the final answer to the following arithmetic problem: 4 - 1 - 7 =",
            "What is 4 - 1 - 7?",
        ),
        (
            "gsm_symbolic",
            "How many pens? Give the result as your final answer. Do not include units.",
            "How many pens?",
        ),
        (
            "leg_counting",
            "Your task is to count how many legs there are in total when given a list of animals."
            "\n\nNow, how many legs are there in total if you have 2 cats?\n",
            "How many legs are there in total if you have 2 cats?",
        ),
        ("simple_equations", "Solve for b: 4*b = 12", "Solve for b: 4*b = 12."),
    ],
)
def test_the_answer_format_of_reasoning_gym_is_stripped(task, question, wanted):
    assert prompts.clean(question, TASKS[task]) == wanted


def test_the_questions_of_two_digits_are_told_alike():
    for task, question, wanted in zip(
        prompts.DIGITS,
        (
            "State the final answer to the following arithmetic problem: 8 - 0 =",
            "Solve the following multiplication: 8 * 0. Give only the result as your final answer.",
        ),
        ("What is 8 - 0?", "What is 8 * 0?"),
        strict=True,
    ):
        assert prompts.clean(question, task) == wanted


def test_sets_are_disjoint_repeatable_and_hold_the_shares(monkeypatch):
    monkeypatch.setattr(prompts, "import_reasoning_gym", lambda: FakeGym(10_000))
    train, heldout = prompts.make(200, 20, seed=3, max_chars=150)
    assert prompts.make(200, 20, seed=3, max_chars=150) == (train, heldout)
    assert (len(train), len(heldout)) == (200, 20)
    contents = [line["messages"][0]["content"] for line in train + heldout]
    assert len(set(contents)) == 220
    assert all(content.endswith(prompts.INSTRUCTION) for content in contents)
    assert sum(line["task"] == "gsm_symbolic" for line in heldout) == 8


def test_a_task_with_too_few_questions_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prompts, "import_reasoning_gym", lambda: FakeGym(2))
    assert prompts.main([f"--out={tmp_path / 'new'}", "--train=100"]) == 1
    assert "gave 2 different questions" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.ci
def test_real_sums_of_two_digits_are_no_longer_than_asked_for(tmp_path):
    flags = ("--set=digits", "--train=170", "--heldout=110")
    assert prompts.main([f"--out={tmp_path}", *flags]) == 0
    lines = [
        json.loads(line)
        for name in ("train", "heldout")
        for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
    ]
    contents = [line["messages"][0]["content"] for line in lines]
    assert len({*contents}) == len(lines) == 280
    told = re.compile(r"What is (\d) ([-+*]) (\d)[?] Answer in one short sentence[.]")
    for line, content in zip(lines, contents, strict=True):
        first, sign, second = told.fullmatch(content).groups()
        a, b = int(first), int(second)
        assert int(line["answer"]) == {"+": a + b, "-": a - b, "*": a * b}[sign]


@pytest.mark.ci
def test_real_prompts_are_short_and_have_integer_answers(tmp_path):
    assert prompts.main([f"--out={tmp_path}", "--train=60", "--heldout=20", "--seed=1"]) == 0
    for name, count in (("train", 60), ("heldout", 20)):
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == count
        assert {line["task"] for line in lines} == set(TASKS)
        for line in lines:
            int(line["answer"])
            assert len(line["messages"][0]["content"]) <= 150 + len(prompts.INSTRUCTION) + 1
