"""The embedded pair: what its folders hold, and that its generator states true arithmetic."""

import importlib
import itertools
import json
import operator
import random
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import opd_jax
from opd_jax.data import prompts as prompt_files
from opd_jax.data import tokenizer
from opd_jax.models import hf

ROOT = Path(__file__).parents[1]
PAIR = Path(opd_jax.__file__).parent / "demo_pair"
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("make_demo_pair")


@pytest.fixture
def problems(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("demo_problems")


@pytest.fixture
def ids():
    return tokenizer.load(PAIR / "teacher")


def value_of(equations: list[tuple[str, str, str, str]]) -> str:
    """Check every equation, and that each goes on from a value before it; give the last value."""
    known = set()
    for left, op, right, value in equations:
        if op == "/":
            assert int(left) % int(right) == 0
        assert OPERATIONS[op](int(left), int(right)) == int(value)
        assert not known or known & {left, right}
        known.add(value)
    return equations[-1][3]


def test_the_pair_is_small_enough_to_ship():
    assert sum(f.stat().st_size for f in PAIR.rglob("*") if f.is_file()) <= 8_000_000


def test_both_models_are_qwen3_and_share_one_tokenizer(ids):
    teacher, _ = hf.load(PAIR / "teacher")
    student, _ = hf.load(PAIR / "student")
    assert teacher.model_type == student.model_type == "qwen3"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (PAIR / "teacher" / name).read_bytes() == (PAIR / "student" / name).read_bytes()
    assert len(ids) <= teacher.vocab_size == student.vocab_size
    for folder in ("teacher", "student"):
        assert hf.generation_eos(PAIR / folder) == (ids.convert_tokens_to_ids("<|im_end|>"),)


def test_the_committed_tokenizer_is_the_one_that_the_script_trains(script):
    made = script.make_tokenizer(list(script.tokenizer_texts()))
    committed = json.loads((PAIR / "teacher" / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(made.backend_tokenizer.to_str())["model"] == committed["model"]


def test_every_digit_is_a_token_and_text_survives(ids):
    text = "Ava: 12 + 305 = 317.\n- $4\\times12=48$ \\boxed{48}"
    tokens = ids.tokenize(text)
    assert [t for t in tokens if any(c.isdigit() for c in t)] == re.findall(r"\d", text)
    assert ids.decode(ids.encode(text)) == text


def test_the_prompts_are_rendered_as_a_chat(ids):
    rendered = ids.decode(tokenizer.render(ids, [{"role": "user", "content": "How many?"}]))
    assert rendered == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"


def test_the_committed_prompts_are_disjoint_and_those_of_the_generator(script):
    made = dict(zip(("train", "heldout"), script.prompts(), strict=True))
    questions = {}
    for name, wanted in made.items():
        records = prompt_files.read(PAIR / "prompts" / f"{name}.jsonl")
        questions[name] = [record.prompt[0]["content"] for record in records]
        assert questions[name] == [problem.question for problem in wanted]
        assert [record.answer for record in records] == [problem.answer for problem in wanted]
        assert len(set(questions[name])) == len(questions[name])
    assert len(questions["train"]) >= 3000
    assert len(questions["heldout"]) == 300
    assert not set(questions["train"]) & set(questions["heldout"])


def test_the_teacher_writes_true_equations_up_to_the_answer(problems):
    rng = random.Random(0)
    for problem in itertools.islice(problems.problems(11), 500):
        text = problems.teacher_text(problem, rng)
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text)
        assert len(equations) in (2, 3)
        assert value_of(equations) == problem.answer
        assert text.endswith(f"\nAnswer: {problem.answer}")
        assert "$" not in text
        assert "boxed" not in text


def test_the_student_writes_the_same_equations_in_latex(problems):
    rng = random.Random(0)
    for problem in itertools.islice(problems.problems(12), 500):
        text = problems.student_text(problem, rng)
        plain = text.replace(r"\times", "*").replace(r"\div", "/")
        equations = re.findall(r"\n- \$(\d+)([-+*/])(\d+)=(\d+)\$", plain)
        assert len(equations) in (2, 3)
        assert value_of(equations) == problem.answer
        assert text.endswith(rf"\boxed{{{problem.answer}}}")
        assert "Answer" not in text


def test_every_number_of_a_solution_comes_from_the_question_or_an_earlier_step(problems):
    words = {"2": "twice"}
    for problem in itertools.islice(problems.problems(13), 500):
        given = set(re.findall(r"\d+", problem.question))
        given |= {digit for digit, word in words.items() if word in problem.question}
        for step in problem.steps:
            assert {str(step.left), str(step.right)} <= given
            given.add(str(step.value))
            assert max(step.left, step.right, step.value) <= problems.LIMIT


def test_lessons_mix_the_styles_as_asked_and_leave_heldout_questions_out(script, problems, ids):
    first = [p.question for p in itertools.islice(problems.problems(5), 40)]
    recipe = script.dataclasses.replace(script.STUDENT, problems=400)
    rows = script.lessons(recipe, 5, frozenset(first[:20]), ids)
    texts = [ids.decode(row.completion) for row in rows]
    share = sum("Answer:" in text for text in texts) / len(texts)
    assert abs(share - recipe.teacher_share) < 0.1
    assert all(text.endswith("<|im_end|>") for text in texts)
    assert [row.text for row in rows[:20]] == first[20:]


def test_the_teacher_is_good_and_the_student_is_not(script, ids):
    _, heldout = script.prompts()
    found = {}
    for name in ("teacher", "student"):
        cfg, params = hf.load(PAIR / name, dtype=jnp.float32)
        found[name] = script.accuracy(params, cfg, heldout[:64], ids)
    assert found["teacher"] >= 0.85
    assert found["student"] <= 0.55
