"""Grading: the table of answers, generated structures, the named graders, adversarial text."""

import importlib.util
import random
import subprocess
import sys
import time

import pytest
from answers import ANSWERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_jax.evaluate import cleaning, equality, finding, grading, judge


@pytest.mark.parametrize(("kind", "answer", "gold", "is_right"), ANSWERS)
def test_answers_of_every_kind(kind, answer, gold, is_right):
    text = answer if kind == "text" else f"so \\boxed{{{answer}}}"
    verdict = grading.math(text, gold)
    assert verdict.correct is is_right, verdict
    assert verdict.reason


def test_the_table_is_no_list_of_rights():
    assert len(ANSWERS) > 200
    assert min(sum(is_right is side for *_, is_right in ANSWERS) for side in (True, False)) > 90
    assert len({row[1:] for row in ANSWERS}) == len(ANSWERS)


# Any one entry of a structure flips the verdict.

ENTRIES = st.one_of(
    st.integers(-50, 50).map(str),
    st.tuples(st.integers(-9, 9), st.integers(2, 9)).map(lambda f: rf"\frac{{{f[0]}}}{{{f[1]}}}"),
    st.integers(1, 9).map(lambda n: f"0.{n}5"),
    st.integers(1, 9).map(lambda n: rf"{n}\sqrt{{2}}"),
    st.integers(1, 9).map(lambda n: rf"\frac{{\pi}}{{{n + 1}}}"),
    st.integers(-9, 9).map(lambda n: f"x+{n}" if n >= 0 else f"x{n}"),
)


def matrix(entries, columns, name="pmatrix"):
    rows = [entries[i : i + columns] for i in range(0, len(entries), columns)]
    return rf"\begin{{{name}}}" + r" \\ ".join(" & ".join(row) for row in rows) + rf"\end{{{name}}}"


FORMS = {
    "column": lambda e: matrix(e, 1),
    "row": lambda e: matrix(e, len(e), "bmatrix"),
    "matrix": lambda e: matrix(e, 2) if len(e) % 2 == 0 else matrix(e, len(e)),
    "nested": lambda e: "[[" + "], [".join(e) + "]]",
    "tuple": lambda e: r"\left(" + ", ".join(e) + r"\right)",
    "angle": lambda e: r"\langle " + ", ".join(e) + r" \rangle",
    "set": lambda e: r"\{" + ", ".join(e) + r"\}",
    "list": lambda e: ", ".join(e),
    "words": lambda e: ", ".join(e[:-1]) + r" \text{ and } " + e[-1],
    "ways": lambda e: r" \text{ or } ".join(f"x = {part}" for part in e),
    "named": lambda e: ", ".join(f"{'abcdef'[i]} = {part}" for i, part in enumerate(e)),
    "half open": lambda e: f"[{e[0]}, {e[1]})",
    "closed": lambda e: f"[{e[0]}, {e[1]}]",
    "union": lambda e: rf"({e[0]}, {e[1]}) \cup [{e[0]}, \infty)",
    "pairs": lambda e: ", ".join(f"({part}, 7)" for part in e),
    "system": lambda e: r"\begin{cases} " + r" \\ ".join(
        f"{'abcdef'[i]} = {part}" for i, part in enumerate(e)
    ) + r"\end{cases}",
    "bounds": lambda e: rf"{e[0]} \le t < {e[1]}",
}  # fmt: skip
USED = {"half open": 2, "closed": 2, "union": 2, "bounds": 2}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_one_changed_entry_flips_the_verdict(data):
    form = data.draw(st.sampled_from(sorted(FORMS)))
    entries = data.draw(st.lists(ENTRIES, min_size=2, max_size=6))
    gold = FORMS[form](entries)
    assert grading.is_correct(rf"\boxed{{{gold}}}", gold)
    spaced = gold.replace(", ", " ,  ").replace("frac", "dfrac")
    assert grading.is_correct(rf"\boxed{{{spaced}}}", gold)
    place = data.draw(st.integers(0, USED.get(form, len(entries)) - 1))
    other = data.draw(ENTRIES)
    if equality.compare(other, entries[place])[0]:
        return
    changed = [*entries[:place], other, *entries[place + 1 :]]
    assert not grading.is_correct(rf"\boxed{{{FORMS[form](changed)}}}", gold), changed
    dropped = entries[:place] + entries[place + 1 :]
    if len(dropped) > 1 and form not in USED:
        assert not grading.is_correct(rf"\boxed{{{FORMS[form](dropped)}}}", gold)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=6, unique=True), st.randoms())
def test_order_counts_where_it_should(numbers, shuffle):
    mixed = list(numbers)
    shuffle.shuffle(mixed)
    entries, others = [str(n) for n in numbers], [str(n) for n in mixed]
    for form in ("tuple", "column", "row", "named"):
        is_right = grading.is_correct(rf"\boxed{{{FORMS[form](others)}}}", FORMS[form](entries))
        assert is_right is (mixed == numbers)
    for form in ("set", "list", "words", "ways", "pairs"):
        assert grading.is_correct(rf"\boxed{{{FORMS[form](others)}}}", FORMS[form](entries))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(-(10**6), 10**6), st.integers(0, 400), st.sampled_from([1, -1, 2]), st.booleans()
)
def test_numbers_of_any_size_differ_in_their_last_digit(number, exponent, by, is_small):
    power = -exponent if is_small else exponent
    gold, answer = (rf"{n} \times 10^{{{power}}}" for n in (number, number + by))
    assert grading.is_correct(rf"\boxed{{{number}e{power}}}", gold)
    assert not grading.is_correct(rf"\boxed{{{answer}}}", gold)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(r"\{}[]()$&,;=<>|_^.!%°' 012axπ√") | st.characters(), max_size=40))
def test_no_text_breaks_the_grader(text):
    for gold in ("5", r"\begin{pmatrix}1\\2\end{pmatrix}", "[1,2)", "Monday", "B"):
        for response in (text, rf"\boxed{{{text}}}", f"<answer>{text}</answer>"):
            verdict = grading.math(response, gold)
            assert isinstance(verdict.correct, bool)
            assert verdict.is_unparsed is (verdict.found is None)


def test_random_latex_neither_breaks_it_nor_takes_long():
    parts = [r"\frac", r"\sqrt", "{", "}", "(", ")", "1", "23", "x", "+", "-", "^", "_", r"\cup",
             r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", ",", r"\pm", "=", r"\le", r"\int",
             r"\infty", "!", r"\{", r"\}", r"\left", r"\right", "9^", r"\text{a}"]  # fmt: skip
    draws = random.Random(0)
    start = time.monotonic()
    for _ in range(300):
        text = " ".join(draws.choices(parts, k=draws.randint(1, 30)))
        grading.math(rf"\boxed{{{text}}}", draws.choice(["5", "x^2+1", "(1,2)", r"\{1,x\}"]))
    assert time.monotonic() - start < 60


def test_a_verdict_takes_no_longer_than_its_bound(monkeypatch):
    monkeypatch.setattr(judge, "SECONDS", 0.3)
    monkeypatch.setattr(equality, "SECONDS", 1.0)
    slow = [rf"\int_0^1 x^{{\sin x + {n}}} e^{{x^{{x}}}} dx" for n in range(12)]
    judge.ask("x+9", "9+x")
    start = time.monotonic()
    verdict = grading.math(r"\boxed{\{" + ", ".join(slow) + r"\}}", r"\{1,2\}")
    assert not verdict.correct
    gold = ", ".join(f"x^{n}" for n in range(12))
    verdict = grading.math(r"\boxed{" + ", ".join(slow) + "}", gold)
    assert not verdict.correct
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("text", "unparsed", "reason"),
    [
        ("I get 42", True, finding.NO_ANSWER),
        ("<think> 42", True, finding.UNFINISHED_THOUGHT),
        (r"\boxed{4", True, finding.UNFINISHED_ANSWER),
        (r"\boxed{41}", False, equality.OTHER_NUMBER),
        (r"\boxed{Monday}", False, equality.OTHER_KIND),
        (r"\boxed{" + "1" * 500 + "}", False, equality.TOO_LONG),
    ],
)
def test_a_response_without_an_answer_is_told_apart(text, unparsed, reason):
    verdict = grading.math(text, "42")
    assert not verdict.correct
    assert (verdict.is_unparsed, verdict.reason) == (unparsed, reason)


def test_the_verdict_says_what_was_found_and_why():
    assert grading.math(r"\boxed{1/2}", "0.5") == grading.Verdict(True, "same number", "1/2")
    assert grading.math(r"\boxed{1+x}", "x+1") == grading.Verdict(True, "same expression", "1+x")
    assert grading.math(r"\boxed{(1,3)}", "(1,2)").reason == "another entry"


def test_a_thought_that_the_prompt_opened_and_a_cut_answer():
    assert not grading.math(r"\boxed{5}", "5", in_thought=True).correct
    assert grading.math(r"so</think> \boxed{5}", "5", in_thought=True).correct
    assert not grading.math("The answer is 5", "5", truncated=True).correct
    assert grading.math("The answer is 5", "5").correct


def test_a_gold_may_be_a_worked_solution():
    assert grading.is_correct("#### 18", "She makes 9 * 2 = 18.\n#### 18")
    assert not grading.is_correct("#### 9", "She makes 9 * 2 = 18.\n#### 18")


@pytest.mark.parametrize(
    ("text", "golds", "is_right", "found"),
    [
        (r"\boxed{2}", ("1", "2"), True, "2"),
        (r"\boxed{1}", ("1", "no number"), True, "1"),
        (r"\boxed{3}", ("1", "2"), False, "3"),
        ("no answer", ("1", "2"), False, None),
        (r"\boxed{12}", "12", True, "12"),  # one gold, not its letters
        (r"\boxed{1}", "12", False, "1"),
    ],
)
def test_any_accepted_answer_will_do(text, golds, is_right, found):
    verdict = grading.any_of(grading.math, text, golds)
    assert (verdict.correct, verdict.found) == (is_right, found)


@pytest.mark.parametrize("gold", ["", "  "])
def test_an_empty_gold_is_an_error(gold):
    for name in ("math", "numeric", "choice", "exact"):
        grader = grading.GRADERS[name]
        with pytest.raises(ValueError, match="gold answer is empty"):
            grader("#### 1", gold)


def test_the_last_number_of_a_text_is_not_an_answer():
    assert not grading.is_correct("so we get 42", "42")
    assert not grading.is_correct(r"I was told to use \boxed{}: 42", "42")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1,024", "1024"),
        (r"\frac{1}{2}", "0.5"),
        ("0.50", "1/2"),
        ("-0", "0"),
        ("x = 5", "5"),
        ("2^{10}", "1024"),
        ("5 apples", "5"),
        ("yes", "Yes"),
        (r"\text{Monday}", "monday"),
        ("(B)", "B"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\begin{pmatrix} 2/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("x + 1", "x+1"),
    ],
)
def test_equal_answers_without_math_verify(answer, gold, monkeypatch):
    monkeypatch.setattr(judge, "ask", None)
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
    monkeypatch.setattr(judge, "ask", None)
    assert not grading.is_correct(f"Answer: {answer}", gold)


def test_a_missing_math_verify_is_an_error_and_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    judge.ask.cache_clear()
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
        r"\boxed 1 and " * 30_000,
        r"\boxed{1}, " * 30_000,
        "#### a\n" * 30_000,
        "answer is " * 30_000,
        "answer" + " " * 300_000,
        r"\boxed{" + ". " * 300_000 + "}",
        "#### " + "$" * 300_000,
        "answer: " + "*" * 300_000,
        "{" * 300_000 + "}" * 300_000,
        "<think>" * 30_000 + "</think>" * 30_000,
        "<answer>" * 30_000,
        r"\boxed{" + r"\text{" * 60 + "}" * 61,
        r"\boxed{" + "(" * 390 + "}",
        r"\boxed{" + "1," * 190 + "1}",
        r"\boxed{" + "2^" * 190 + "2}",
        r"\boxed{" + "x=" * 190 + "2}",
    ],
)
def test_adversarial_text_is_graded_in_linear_time(text):
    start = time.process_time()
    assert not grading.is_correct(text, "5")
    assert time.process_time() - start < 5


def test_cleaning_leaves_row_separators_alone():
    assert cleaning.clean(r"1 \\ 2") == r"1 \\ 2"
    assert cleaning.clean(r"1 \\[3pt] 2") == r"1 \\ 2"
    assert cleaning.clean(r"1 & \frac12 \\\frac12 & 1") == r"1 & \frac12 \\\frac12 & 1"


# The other graders.


@pytest.mark.parametrize(
    ("text", "gold", "is_right", "unparsed"),
    [
        (r"\boxed{5 apples}", "5", True, False),
        ("5", "5", True, False),
        ("$5.00", "5", True, False),
        ("I get 5", "5", False, True),
        (r"\boxed{x = 5}", "5", True, False),
        (r"\boxed{6}", "5", False, False),
        (r"\boxed{x}", "5", False, False),
        ("<think>5</think> 5", "5", True, False),
        ("<think>5", "5", False, True),
    ],
)
def test_numeric(text, gold, is_right, unparsed):
    verdict = grading.numeric(text, gold)
    assert (verdict.correct, verdict.is_unparsed) == (is_right, unparsed)


def test_numeric_wants_numbers():
    with pytest.raises(ValueError, match="is no number"):
        grading.numeric("5", "Monday")


@pytest.mark.parametrize(
    ("text", "gold", "is_right", "unparsed"),
    [
        ("B", "B", True, False),
        ("(b)", "B", True, False),
        ("B) Paris", "B", True, False),
        ("**B**", "(B)", True, False),
        ("The answer is (B).", "B", True, False),
        ("Answer: B. Paris is the capital.", "B", True, False),
        (r"\boxed{\text{B}}", "B", True, False),
        ("The correct option is B, since Paris is.", "B", True, False),
        ("So option C is correct.", "B", False, False),
        ("Clearly, option B is the best.", "B", True, False),
        ("A or B", "B", False, True),
        (r"\boxed{A and B}", "B", False, False),
        ("Answer: Paris", "B", False, False),
        ("I do not know", "B", False, True),
        ("<think>B</think>", "B", False, True),
        ("A good question. Paris, I think.", "A", False, True),
    ],
)
def test_choice(text, gold, is_right, unparsed):
    verdict = grading.choice(text, gold)
    assert (verdict.correct, verdict.is_unparsed) == (is_right, unparsed), verdict


@pytest.mark.parametrize(
    ("text", "gold", "is_right", "unparsed"),
    [
        ("Paris", "paris", True, False),
        ("  New\n York. ", "New York", True, False),
        ("The answer is Paris.", "Paris", True, False),
        ("It is Paris", "Paris", False, False),
        ("<think>Paris</think>London", "Paris", False, False),
        ("<think>Paris", "Paris", False, True),
        ("", "Paris", False, True),
        ("0.50", "0.5", False, False),
    ],
)
def test_exact(text, gold, is_right, unparsed):
    verdict = grading.exact(text, gold)
    assert (verdict.correct, verdict.is_unparsed) == (is_right, unparsed), verdict


OWN = """
from opd_jax.evaluate.grading import Verdict


def contains(text, gold):
    return gold in text


def none(text, gold):
    return None


def verdict(text, gold):
    return Verdict(True, "because", "x")


def broken(text, gold):
    return 1 / 0


def strange(text, gold):
    return "yes"


number = 5
"""


def test_a_users_own_grader(tmp_path, monkeypatch):
    path = tmp_path / "own_grader.py"
    path.write_text(OWN)
    contains = grading.named(f"{path}:contains")
    assert contains("a 5 b", "5") == grading.Verdict(True, "right", "a 5 b")
    assert contains("a 6 b", "5") == grading.Verdict(False, "wrong", "a 6 b")
    assert grading.named(f"{path}:none")("a", "b").is_unparsed
    assert grading.named(f"{path}:verdict")("a", "b").reason == "because"
    monkeypatch.syspath_prepend(str(tmp_path))
    assert grading.named("own_grader:contains")("a 5 b", "5").correct
    for name, part in (("broken", "ZeroDivisionError"), ("strange", "'yes'")):
        with pytest.raises(grading.GraderError, match=part):
            grading.named(f"{path}:{name}")("a", "b")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("maths", "expected one of math, numeric, choice, exact"),
        ("absent_module:f", "cannot be imported"),
        ("absent.py:f", "absent.py is no file"),
        ("json:absent", "has no function absent"),
        ("json:", "module:function"),
        (":f", "module:function"),
    ],
)
def test_a_grader_that_is_not_there_is_named(name, part):
    with pytest.raises(grading.GraderError, match=part):
        grading.named(name)
