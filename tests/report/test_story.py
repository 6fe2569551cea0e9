"""The story of a run on the page: its words and tables equal the numbers of its files."""

import html
import json
import re

import numpy as np
import pytest
import rocks_out
from scipy import stats as scipy_stats

from opd_jax import stats
from opd_jax.report import accuracy, build, outcome, story
from opd_jax.store import workdir as workdirs

HOSTILE, answered, change = rocks_out.HOSTILE, rocks_out.make_answers, rocks_out.change
BEFORE, AFTER, TAUGHT = rocks_out.BEFORE, rocks_out.AFTER, rocks_out.TAUGHT


def words(page):
    """The page as a reader sees it."""
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story")
    run = answered(folder / "run")
    build.report([run], folder / "r.html")
    return run, (folder / "r.html").read_text(encoding="utf-8")


def section(page, name):
    return re.search(rf'<section id="{name}".*?</section>', page, re.DOTALL)[0]


def test_the_first_sentence_holds_the_numbers_of_the_files(made):
    run, page = made
    summary = json.loads((run / "summary.json").read_text())
    told = words(section(page, "better"))
    ends = [
        f"{side['accuracy']:.1%} [{side['accuracy_low']:.1%}, {side['accuracy_high']:.1%}]"
        for side in (summary["before"], summary["after"], summary["teacher"])
    ]
    assert f"Yes: right answers rose from {ends[0]} to {ends[1]} of 60 held-out problems" in told
    # (38 - 20) of (57 - 20)
    assert f"That is {18 / 37:.0%} of the way from 33.3% to the teacher's {ends[2]}" in told
    p = scipy_stats.binomtest(4, 4 + 22).pvalue  # an independent one: 22 fixed, 4 broken
    assert f"p {p:.2g} (exact McNemar)" in told
    interval = stats.paired_bootstrap(np.float64(BEFORE), np.float64(AFTER))
    assert f"+30.0 points [{100 * interval.low:.1f}, {100 * interval.high:.1f}]" in told
    below = stats.paired_bootstrap(np.float64(AFTER), np.float64(TAUGHT))
    assert f"it is 31.7 points [{100 * below.low:.1f}, {100 * below.high:.1f}] below it" in told
    assert "fell from 8.30 to 0.200 nats" in told


def test_the_counts_are_those_of_the_verdicts(made):
    _, page = made
    cells = re.findall(r"<b>(\d+)</b> (still right|broken|fixed|still wrong)", page)
    assert dict((kind, int(n)) for n, kind in cells) == {
        "still right": 16,
        "broken": 4,
        "fixed": 22,
        "still wrong": 18,
    }


def test_each_kind_has_its_first_examples_side_by_side(made):
    _, page = made
    answers = section(page, "answers")
    problems = [int(i) for i in re.findall(r"Problem (\d+), expected", answers)]
    assert problems == [20, 21, 22, 0, 1, 2, 4, 5, 6, 42, 43, 44]
    first = words(re.search(r"<article.*?</article>", answers, re.DOTALL)[0])
    for said in ("What is 20?", "old answers 20", "new answers 20", "top answers 20", "20<b>"):
        assert said in first
    assert re.findall(r"[✓✗] \w+", first) == ["✗ wrong", "✓ right", "✓ right"]
    assert "wrong before, right after, the first 3 of 22" in words(answers)


def test_hostile_text_stays_text(made):
    _, page = made
    assert "<img" not in page
    assert "alert(1)</script>" not in page
    assert page.count("<script") == 2  # its own
    assert html.escape(HOSTILE) in page


def test_cost_and_command_are_said(made):
    run, page = made
    cost = words(section(page, "cost"))
    assert "3m13s for 40 steps" in cost
    assert "31.8% of the columns" in cost
    change(run / "run.json", command=["opd-jax", "train", "--config=a b.py"], devices=DEVICES)
    lines = [{"step": i, "kl_nats": 1.0, "tokens_per_s": 50.0, "step_s": 2.0} for i in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sections = [story.cost({"run": run}), story.made({"run": run})]
    cost, made_of = (words(one.body) for one in sections)
    assert "300, 2 a second" in cost
    assert "4 TPU v5e in 2 processes" in cost
    assert "opd-jax train \\\n  '--config=a b.py'" in made_of
    for said in ("embedded:student", "embedded:teacher", "learning rate", "prompts"):
        assert said in made_of


DEVICES = {"count": 4, "kind": "TPU v5e", "platform": "tpu", "processes": 2}


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        ([i in (*range(19), 30) for i in range(60)], "No difference was found: right answers went"),
        ([i < 4 for i in range(60)], "No: right answers fell from 33.3%"),
        ([True] * 60, "That is above the teacher's 95.0%"),
    ],
)
def test_what_is_not_better_is_said(tmp_path, after, wanted):
    run = answered(tmp_path / "run", after=after)
    assert wanted in words(story.better({"run": outcome.read(run)}, {"run": run}).body)


def test_several_answers_to_a_problem_are_compared_by_their_shares(tmp_path):
    run = answered(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "graded.jsonl").read_text().splitlines()]
    for line, right in zip(lines, ([True, False, False], [True, True, False]), strict=True):
        line |= {"correct": [right] * 60, "text": [["a"] * 3] * 60, "reason": [["r"] * 3] * 60}
    (run / "graded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = outcome.read(run)
    assert found.change.delta == pytest.approx(1 / 3)
    assert found.counts == {"fixed": 60, "broken": 0, "still right": 0, "still wrong": 0}
    told = words(story.better({"run": found}, {"run": run}).body)
    assert "(paired bootstrap)" in told
    assert "McNemar" not in told
    assert "counts as right where more than half" in words(story.changed({"run": found}).body)


def test_only_problems_that_both_evaluations_hold_are_compared(tmp_path):
    run = answered(tmp_path / "run")
    first, last = (json.loads(x) for x in (run / "graded.jsonl").read_text().splitlines())
    for name in ("index", "correct", "text", "reason"):  # the order of the file does not matter
        last[name] = last[name][:29:-1]
    (run / "graded.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(last) + "\n")
    found = outcome.read(run)
    assert sum(found.counts.values()) == 30
    assert found.counts["fixed"] == 12
    assert found.counts["still wrong"] == 18


def test_a_run_of_an_older_version_still_gives_a_page(tmp_path):
    run = rocks_out.make_run(tmp_path / "run")  # no text, no questions, no teacher
    build.report([run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "from 30.0% [19.1%, 43.8%] to 70.0% [56.2%, 80.9%]" in words(section(page, "better"))
    assert "of the way" not in words(page)
    assert "<article" not in page
    more = words(section(page, "more"))
    for what in ("the teacher's accuracy, the ceiling", "the answers side by side"):
        assert f"{what}: can be added with" in more
    (run / "graded.jsonl").unlink()
    change(run / "summary.json", before={"kl_nats": 8.3}, after={"kl_nats": 0.3})
    build.report([run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "fell from 8.30 to 0.300 nats" in words(section(page, "better"))
    assert '<section id="answers"' not in page
    assert "accuracy before and after, with its interval: can be added" in words(page)


def test_a_run_that_measured_nothing_but_its_training(tmp_path):
    run = rocks_out.make_run(tmp_path / "run")
    (run / "graded.jsonl").unlink()
    lines = [json.dumps({"step": i, "kl_nats": 1.0 / i}) for i in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    change(run / "summary.json", before={}, after={})
    build.report([run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert '<section id="better"' not in page
    assert "What did it cost?" in page


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher.json", {"how": {}}),
        ("questions.json", [{"index": "0"}]),
        ("graded.jsonl", {"step": 0, "index": [0, 1], "correct": [[True]]}),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, value):
    run = answered(tmp_path / "run")
    (run / name).write_text(json.dumps(value) + "\n" + json.dumps(value) + "\n")
    if name.endswith("json"):
        rocks_out.write(run / name, value)
    with pytest.raises(workdirs.WorkdirError, match=rf"{name} is damaged"):
        build.report([run], tmp_path / "r.html")


def test_several_runs_have_each_their_verdict(tmp_path):
    runs = [answered(tmp_path / name) for name in ("one", "two")]
    build.report(runs, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert section(page, "better").count("Yes: right answers rose") == 2
    assert section(page, "better").count("another seed may come out elsewhere") == 1
    assert section(page, "answers").count("<article") == 12  # of the last one alone
    assert "<h3>one</h3>" in page


def test_the_way_to_the_teacher():
    assert accuracy.way(0.3, 0.5, 0.8) == pytest.approx(0.4)
    assert accuracy.way(0.3, 0.2, 0.8) == pytest.approx(-0.2)
    assert accuracy.way(0.8, 0.9, 0.8) is None


def test_a_long_answer_keeps_its_beginning_and_its_end():
    cut = story._cut("a" * 3000 + "b" * 3000)
    assert cut.startswith("a" * 2000)
    assert cut.endswith("b" * 2000)
    assert "2,000 characters left out" in cut


@pytest.mark.parametrize(
    ("seconds", "told"), [(12.34, "12.3 s"), (59.6, "1m00s"), (193, "3m13s"), (7500, "2h05m")]
)
def test_durations(seconds, told):
    assert story.duration(seconds) == told
