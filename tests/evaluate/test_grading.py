"""Grading: tables of answers, adversarial text, expressions with and without math-verify."""

import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest

from opd_jax.evaluate import grading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("1,024", 1024),
        ("1,234,567.50", Fraction("1234567.5")),
        ("1{,}024", 1024),
        (r"1\,024", 1024),
        ("-0", 0),
        ("-7", -7),
        ("−7", -7),
        ("- 7", -7),
        ("+5", 5),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("5.00", 5),
        ("$5", 5),
        ("-$5", -5),
        (r"\$1,024.00", 1024),
        ("$-5$", -5),
        ("50%", 50),
        (r"50\%", 50),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("1e-3", Fraction(1, 1000)),
        (r"5 \text{ cm}", 5),
        (r"90^\circ", 90),
        (r"\(42\)", 42),
        ("**42**.", 42),
        (r"\text{42}", 42),
    ],
)
def test_number_is_exact(text, value):
    assert grading.number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "$",
        "-",
        ".",
        "x",
        "1,2",
        "1,00,000",
        "1.2.3",
        "3/4/5",
        "1/0",
        r"\frac{1}{0}",
        "--5",
        "5$3",
        "1 2",
        "5 dollars",
        r"5\text{ million}",
        "1e999999999",
        "٣",
        "nan",
        "inf",
        "2^3",
        "9" * 500,
    ],
)
def test_number_refuses_what_is_not_plain(text):
    assert grading.number(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\{a\}}", r"\{a\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"{ } } { \boxed{5", None),
        (r"\boxed{5} but \boxed{6", "5"),
        (r"\boxed{5 and \boxed{6}", "6"),
        (r"Use \boxed{}. #### 8", None),
        ("Use \\boxed{}.\n#### 8", "8"),
        ("a\n#### 1\nb\n#### 2", "2"),
        ("#### Step 1\nThe answer is 9.", "9"),
        ("#### 4\nand more text", "4"),
        ("text\n#### x + 1\n", "x + 1"),
        ("#### 3\nThe answer is 4.", "3"),
        ("#### 3\n\\boxed{5}", "5"),
        ("The answer is 3.5. Check: 7/2.", "3.5"),
        ("The answer is 5\r\nso", "5"),
        ("The answer is -5 and the answer is", "-5 and the answer is"),
        ("The answer is", None),
        ("the ANSWER IS: 12", "12"),
        ("Answer: 1,024", "1,024"),
        ("**Answer:** 6", "6"),
        ("Answer:\n\n6\nbye", "6"),
        ("The answer is 1. No, the answer is **2**.", "2"),
        ("The answers are 1 and 2", None),
        ("I get 42", None),
        ("", None),
        ("42", None),
    ],
)
def test_extract_finds_the_marked_answer(text, answer):
    assert grading.extract(text) == answer


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1,024", "1024"),
        (r"\frac{1}{2}", "0.5"),
        ("0.50", "1/2"),
        ("-0", "0"),
        ("x = 5", "5"),
        ("yes", "Yes"),
        (r"\text{Monday}", "monday"),
        ("(B)", "B"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("x + 1", "x+1"),
    ],
)
def test_equal_answers_without_math_verify(answer, gold, monkeypatch):
    monkeypatch.setattr(grading, "_verify", None)
    assert grading.is_correct(rf"so \boxed{{{answer}}}", gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1,024", "1025"),
        ("0.3333", "1/3"),
        ("5", "-5"),
        ("5 or 6", "5"),
        ("5$3", "53"),
        ("on", "no"),
        ("a", "A"),
        ("AB", "A"),
        ("y = 5", "6"),
        ("1" * 401, "1"),
        ("", "0"),
    ],
)
def test_different_answers_without_math_verify(answer, gold, monkeypatch):
    monkeypatch.setattr(grading, "_verify", None)
    assert not grading.is_correct(f"Answer: {answer}", gold)


def test_the_last_number_of_a_text_is_not_an_answer():
    assert not grading.is_correct("so we get 42", "42")
    assert not grading.is_correct(r"I was told to use \boxed{}: 42", "42")


def test_a_gold_may_be_a_worked_solution():
    assert grading.is_correct("#### 18", "She makes 9 * 2 = 18.\n#### 18")
    assert not grading.is_correct("#### 9", "She makes 9 * 2 = 18.\n#### 18")


@pytest.mark.parametrize("gold", ["", "  "])
def test_an_empty_gold_is_an_error(gold):
    with pytest.raises(ValueError, match="gold answer is empty"):
        grading.is_correct("#### 1", gold)


EXPRESSIONS = [
    ("1+x", "x+1", True),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    (r"\{2, 1\}", r"\{1,2\}", True),
    (r"\pi/2", r"\frac{\pi}{2}", True),
    ("x-1", "x+1", False),
    ("(2,1)", "(1,2)", False),
    ("9^{9^{9^9}}", "x+1", False),
    ("(((", "x+1", False),
    ("\x00\ud800", "x+1", False),
]


@pytest.mark.parametrize(("answer", "gold", "expected"), EXPRESSIONS)
def test_expressions(answer, gold, expected):
    assert grading.is_correct(rf"\boxed{{{answer}}}", gold) is expected


def test_expressions_off_the_main_thread():
    results = {}

    def grade():
        for answer, gold, _ in [EXPRESSIONS[1], EXPRESSIONS[4], EXPRESSIONS[8]]:
            results[answer] = grading.is_correct(rf"\boxed{{{answer}}}", gold)

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert list(results.values()) == [True, False, False]


def test_a_failing_process_is_an_error_and_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(threading, "main_thread", lambda: None)
    failed = subprocess.CompletedProcess([], 1, "", "no such module")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match=r"exit 1.*no such module"):
        grading.is_correct(r"\boxed{x-1}", "x+1")


def test_a_missing_math_verify_is_an_error_and_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'opd-jax\[eval\]'"):
        grading.is_correct(r"\boxed{1+x}", "x+1")
    assert grading.is_correct(r"\boxed{x + 1}", "x+1")
    assert not grading.is_correct(r"\boxed{x+1}", "5")
    assert not grading.is_correct("no idea", "x+1")


def test_importing_grading_does_not_import_sympy():
    code = "import sys, opd_jax.evaluate.grading\nsys.exit(bool({'sympy', 'jax'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        "\\" * 300_000,
        r"\boxed{" * 30_000,
        "#### a\n" * 30_000,
        "answer is " * 30_000,
        "answer" + " " * 300_000,
        r"\boxed{" + ". " * 300_000 + "}",
        "#### " + "$" * 300_000,
        "answer: " + "*" * 300_000,
        "{" * 300_000 + "}" * 300_000,
    ],
    ids=["slashes", "boxes", "hashes", "answers", "spaces", "dots", "dollars", "stars", "braces"],
)
def test_adversarial_text_is_graded_in_linear_time(text):
    start = time.process_time()
    assert not grading.is_correct(text, "5")
    assert time.process_time() - start < 5
