"""Where a response says its answer: thoughts, tags, boxes, cut ones."""

import pytest

from opd_jax.evaluate import finding
from opd_jax.evaluate.finding import NO_ANSWER, UNFINISHED_ANSWER, UNFINISHED_THOUGHT


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$x=\boxed{1}$, $\boxed{2}$ or $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{1}. So \boxed{1}", "1"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"\boxed 7", "7"),
        (r"$\boxed\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"so $\boxed42$", "42"),
        (r"write it in \boxed form.", None),
        (r"\boxedness{7}", None),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\{a\}}", r"\{a\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"{ } } { \boxed{5", None),
        (r"\boxed{5} but \boxed{6", None),
        (r"\boxed{5} in \boxed{", "5"),
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
        ("The answer is therefore 6, since 2 * 3 = 6.", "6"),
        ("The answer is\n$$\n6\n$$\nas was to be shown.", "6"),
        ("The answer is 1. No, the answer is **2**.", "2"),
        ("The answers are 1 and 2", None),
        ("I get 42", None),
        ("", None),
        ("42", None),
        ("<answer>42</answer>", "42"),
        ("<answer>\n \\boxed{42} \n</answer> I am sure: \\boxed{43}", "42"),
        ("<answer>The answer is 42.</answer>", "42"),
        ("<answer>41</answer><answer>42</answer>", "42"),
        ("write <answer></answer>: \\boxed{42}", "42"),
        ("<answer>42", None),
        ("<answer>41</answer> <answer>42", None),
    ],
)
def test_the_marked_answer_is_found(text, answer):
    assert finding.find(text).answer == answer


@pytest.mark.parametrize("tag", ["think", "thinking", "Thought", "reasoning"])
def test_a_thought_is_no_answer(tag):
    def find(text, **given):
        return finding.find(text.replace("think", tag), **given)

    assert find(r"<think>\boxed{1}</think>\boxed{2}").answer == "2"
    assert find(r"\boxed{1}</think>\boxed{2}").answer == "2"
    assert find(r"<think>\boxed{1}</think>\boxed{2}<think>\boxed{3}</think>").missing == NO_ANSWER
    for text in (
        r"<think>\boxed{1}",
        r"\boxed{1}<think>",
        r"<think>a</think>\boxed{1}<think>no, \boxed{2}",
        r"<think><answer>1</answer>",
    ):
        assert find(text) == finding.Found(None, UNFINISHED_THOUGHT)
    assert find(r"<think>\boxed{1}</think>").missing == NO_ANSWER
    assert find(r"\boxed{1}", in_thought=True).missing == UNFINISHED_THOUGHT
    assert find(r"\boxed{1}</think>\boxed{2}", in_thought=True).answer == "2"


def test_other_marks_of_thoughts_are_known():
    for left, right in (
        ("[THINK]", "[/THINK]"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("◁think▷", "◁/think▷"),
    ):
        assert finding.find(rf"{left}\boxed{{1}}{right}\boxed{{2}}").answer == "2"
        assert finding.find(rf"{left}\boxed{{1}}").missing == UNFINISHED_THOUGHT


def test_a_prompt_that_opens_a_thought():
    assert finding.opens_thought("<|user|>2 + 2?<|assistant|><think>\n")
    assert not finding.opens_thought("<|user|>think in <think></think>.<|assistant|>")
    assert not finding.opens_thought("2 + 2?")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"so \boxed{42} and th", "42"),
        (r"so \boxed{4", None),
        (r"so \boxed 4", None),
        (r"so $\boxed 4$ and", "4"),
        ("<answer>42</answer>", "42"),
        ("<answer>4", None),
        ("#### 4", None),
        ("#### 42\n", "42"),
        ("The answer is 4", None),
        ("The answer is 4.", None),
        ("The answer is 42. So", "42"),
        ("The answer is 42.\n", "42"),
        ("The answer is $42$", "42"),
        ("The answer is **42**", "42"),
    ],
)
def test_a_cut_response_counts_if_its_answer_is_complete(text, answer):
    found = finding.find(text, truncated=True)
    assert (found.answer or "").strip("$*") == (answer or "")
    assert (found.missing == UNFINISHED_ANSWER) is (answer is None)
