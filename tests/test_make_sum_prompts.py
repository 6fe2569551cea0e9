"""scripts/make_sum_prompts.py and the grader beside it: sums with their answers, told in words."""

import json
import re
import runpy
from pathlib import Path

import pytest

from opd_jax import config
from opd_jax.evaluate import grading

SCRIPTS = Path(__file__).parent.parent / "scripts"
main = runpy.run_path(str(SCRIPTS / "make_sum_prompts.py"))["main"]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sets_are_disjoint_repeatable_and_right(tmp_path):
    assert main([f"--out={tmp_path / 'a'}", "--train=300", "--heldout=50"]) == 0
    assert main([f"--out={tmp_path / 'b'}", "--train=300", "--heldout=50"]) == 0
    train, heldout = (read(tmp_path / "a" / f"{name}.jsonl") for name in ("train", "heldout"))
    for name in ("train", "heldout"):
        a, b = ((tmp_path / side / f"{name}.jsonl").read_bytes() for side in "ab")
        assert a == b
    asked = [row["messages"][0]["content"] for row in (*train, *heldout)]
    assert len({*asked}) == len(asked) == 350
    for text, row in zip(asked, (*train, *heldout), strict=True):
        assert sum(map(int, re.findall(r"\d+", text))) == int(row["answer"])
    plain = sum(text.startswith("What is") for text in asked)
    assert 10 < plain < 70  # about a tenth


def test_more_than_there_are_is_refused(tmp_path, capsys):
    assert main([f"--out={tmp_path / 'a'}", "--train=5000"]) == 1
    assert "at most 2592 in all; change --train or --heldout" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("text", "is_right", "is_unparsed"),
    [
        ("Tom has 6 + 7 = 13 coins now.", True, False),
        ("13 coins, since 6 + 7.", False, False),
        ("He has -13.", False, False),
        ("He has many.", False, True),
    ],
)
def test_the_last_number_is_the_answer(text, is_right, is_unparsed):
    judge = grading.named(f"{SCRIPTS / 'last_number.py'}:last_number")
    verdict = judge(text, "13")
    assert (verdict.correct, verdict.is_unparsed) == (is_right, is_unparsed)


def test_the_recipe_resolves_in_both_stages(monkeypatch):
    monkeypatch.chdir(SCRIPTS.parent)  # its grader is named from there
    file = "configs/smollm2_sums.py"
    for argument, stage in (("steps=5", "on_policy"), ("stage=1,answers=a.jsonl", "off_policy")):
        given, _ = config.load([f"--config={file}:{argument}"])
        run = config.resolve(given)
        assert run.train.stage == stage
        grading.named(run.eval.grader)
    given, _ = config.load(["--config=configs/opd.py:base=smollm2_sums,steps=7"])
    assert config.resolve(given).train.steps == 7
