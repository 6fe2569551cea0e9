"""The command ``opd-jax eval``: what it writes, that it resumes, and what it refuses."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny_run

from opd_jax import cli
from opd_jax.evaluate import results
from opd_jax.store import workdir as workdirs

tiny, one_device, workdir = tiny_run.tiny, tiny_run.one_device, tiny_run.workdir

# What a child to be killed runs: hanging after the second batch.
CHILD = tiny_run.hanging_child(2, '{"task": "first", "in')


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Two tasks: sums of two widths, and a choice."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{i} + {i + 2} = ?", "answer": str(2 * i + 2)} for i in range(10)]
    rows[3]["id"] = "the third"
    tiny_run.write_lines(folder / "first.jsonl", rows)
    rows = [{"question": f"Is {i} red?", "choices": ["yes", "no"], "answer": 1} for i in range(3)]
    tiny_run.write_lines(folder / "second.jsonl", rows)
    return folder


def argv(tiny, task, out, *rest, model=None, **flags):
    given = {"tasks": f"{task}/first.jsonl,{task}/second.jsonl", "out": out, "max-new": 6}
    given |= {"batch": 4, "format": "raw"}
    given |= {name.replace("_", "-"): value for name, value in flags.items()}
    models = model or [tiny / "student"]
    return ["eval", *map(str, models), *(f"--{k}={v}" for k, v in given.items()), *rest]


def evaluate(tiny, task, out, **flags):
    return cli.main(argv(tiny, task, out, **flags))


@pytest.fixture(scope="module")
def sampled(tiny, task, tmp_path_factory):
    out = tmp_path_factory.mktemp("evals") / "sampled"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert evaluate(tiny, task, out, samples=3, temperature=1.0) == 0
    return out


def lines_of(out):
    return tiny_run.read_lines(out / results.LINES)


def test_every_response_is_kept_with_its_verdict(sampled, task):
    lines = lines_of(sampled)
    assert [(x["task"], x["index"], x["sample"]) for x in lines] == [
        (name, index, j)
        for name, n in (("first", 10), ("second", 3))
        for index in range(n)
        for j in range(3)
    ]
    for line in lines:
        assert line.keys() - {"prompt"} == {
            *("task", "index", "id", "sample", "response", "gold", "grader", "correct", "reason"),
            *("found", "tokens", "truncated"),
        }
        assert ("prompt" in line) is (line["sample"] == 0)
        assert 1 <= line["tokens"] <= 6
        assert line["reason"]
        assert line["grader"] == ("math" if line["task"] == "first" else "choice")
    assert lines[9]["id"] == "the third"
    assert lines[30]["prompt"].endswith("Is 0 red?\nA. yes\nB. no")
    assert len({x["response"] for x in lines}) > 20  # samples are draws


def test_the_summary_is_that_of_the_lines(sampled, capsys):
    found = json.loads((sampled / results.SUMMARY).read_text())
    lines = [line for line in lines_of(sampled) if line["task"] == "first"]
    measures = found["first"]["measures"]
    share = sum(x["correct"] for x in lines) / 30
    assert measures["pass@1"]["value"] == pytest.approx(share)
    assert measures["unparsed_share"]["value"] == pytest.approx(
        sum(x["found"] is None for x in lines) / 30
    )
    assert measures["truncated_share"]["value"] == pytest.approx(
        sum(x["truncated"] for x in lines) / 30
    )
    assert measures["avg@3"] == measures["pass@1"]
    assert {"pass@2", "pass@3", "maj@3", "accuracy_untruncated", "mean_length"} <= measures.keys()
    assert sum(found["first"]["reasons"].values()) == 30


@pytest.mark.usefixtures("one_device")
def test_batch_and_other_tasks_change_no_response(tiny, task, sampled, tmp_path, capsys):
    given = {"samples": 3, "temperature": 1.0, "batch": 7, "tasks": f"{task}/second.jsonl"}
    assert evaluate(tiny, task, tmp_path / "b", **given) == 0
    assert lines_of(tmp_path / "b") == [x for x in lines_of(sampled) if x["task"] == "second"]
    said = capsys.readouterr().out
    assert "second  pass@1" in said
    assert "3 of 3 problems: right" in said
    assert re.search(r"3 of 3 problems: right .*, took \d+s", said)


def test_on_eight_devices_in_slots_the_responses_are_the_same(tiny, task, sampled, tmp_path):
    given = {"samples": 3, "temperature": 1.0, "mesh_model": 2, "mesh_fsdp": 2, "slots": 4}
    assert evaluate(tiny, task, tmp_path / "eight", **given) == 0
    ours, theirs = lines_of(tmp_path / "eight"), lines_of(sampled)
    assert [x["response"] for x in ours] == [x["response"] for x in theirs]


def test_a_killed_evaluation_goes_on(tiny, task, sampled, tmp_path, monkeypatch, capsys):
    out = tmp_path / "killed"
    command = argv(tiny, task, out, samples=3, temperature=1.0)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *command],
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        for line in child.stdout:
            if "HANGS" in line:
                break
        tiny_run.use_one_device(monkeypatch)
        assert cli.main(command) == 1  # while the other process writes
        assert "is being written by another process" in capsys.readouterr().err
        child.send_signal(signal.SIGKILL)
    text = (out / results.LINES).read_text()
    assert len(text.splitlines()) == 25
    assert not text.endswith("\n")
    # One more half-written problem, as a kill inside a batch leaves it.
    whole = text.splitlines(keepends=True)
    (out / results.LINES).write_text("".join(whole[:20]))
    assert cli.main(command) == 0
    assert "has 6 of 13 problems: going on" in capsys.readouterr().out
    assert lines_of(out) == lines_of(sampled)
    summaries = [(folder / results.SUMMARY).read_text() for folder in (out, sampled)]
    assert summaries[0] == summaries[1]
    began = time.monotonic()
    assert cli.main(command) == 0  # done: nothing is sampled again
    assert "pass@1" in capsys.readouterr().out
    assert time.monotonic() - began < 20


@pytest.mark.usefixtures("one_device")
def test_another_evaluation_is_refused(tiny, task, sampled, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(sampled, out)
    before = (out / results.LINES).read_bytes()
    same = {"samples": 3, "temperature": 1.0}
    changed = tmp_path / "first.jsonl"
    shutil.copy(task / "second.jsonl", tmp_path)
    tiny_run.write_lines(changed, [{"question": "1 + 1 = ?", "answer": "2"}])
    for flags, part in (
        (same | {"max_new": 5}, "max_new was 6 and is 5"),
        (same | {"seed": 1}, "seed was 0 and is 1"),
        (same | {"temperature": 0.5}, "temperature was 1.0 and is 0.5"),
        (same | {"format": "chat"}, "format was 'raw' and is 'chat'"),
        (same | {"tasks": f"{task}/second.jsonl"}, "task first is there only once"),
        (same | {"tasks": f"{changed},{task}/second.jsonl"}, "task first is changed"),
        (same | {"model": [tiny / "teacher"]}, "model model.safetensors is another"),
    ):
        assert evaluate(tiny, task, out, **flags) == 1
        message = capsys.readouterr().err
        assert "holds another evaluation" in message
        assert part in message
    assert (out / results.LINES).read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"samples": 2}, "temperature 0, at which all are the same"),
        ({"max_new": 64}, "max-new is 64"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"batch": 0}, "batch is 0"),
        ({"slots": -1}, "slots is -1 for batches of 4 rows"),
        ({"slots": 5}, "a multiple of 1 up to 4; set --slots, or raise --batch"),
        ({"limit": -1}, "limit is -1"),
        ({"k": "2"}, "k is (2,): expected 1 to --samples 1"),
        ({"k": "two"}, "k is 'two'"),
        ({"grader": "maths"}, "there is no grader 'maths'"),
        ({"format": "text"}, "format is 'text'"),
        ({"template": "1"}, "template is '1'"),
        ({"tasks": "absent.jsonl"}, "'absent.jsonl' does not exist"),
        ({"model": ["absent"]}, "'absent' is no model"),
        ({"model": [""]}, "is no model"),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_what_cannot_be_evaluated_is_named(tiny, task, tmp_path, capsys, flags, part):
    assert evaluate(tiny, task, tmp_path / "out", **flags) == 1
    message = capsys.readouterr().err
    assert part in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_flags_that_are_missing(tiny, task, tmp_path, capsys):
    for rest, part in (
        (["eval", "x", "--tasks=a"], "no --out given"),
        (["eval", "x", f"--out={tmp_path}/o"], "no --tasks given"),
        (["eval", "--tasks=a", f"--out={tmp_path}/o"], "no model given"),
    ):
        assert cli.main(rest) == 1
        assert part in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_a_folder_with_other_files_is_left_alone(tiny, task, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert evaluate(tiny, task, tmp_path) == 1
    assert "holds 'notes.txt' and no eval.json" in capsys.readouterr().err
    assert evaluate(tiny, task, tmp_path / "notes.txt") == 1
    assert "notes.txt is a file: expected the folder" in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_damaged_lines_are_named(tiny, task, sampled, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(sampled, out)
    lines = (out / results.LINES).read_text().splitlines(keepends=True)
    (out / results.LINES).write_text("".join([lines[1], *lines[1:]]))
    assert evaluate(tiny, task, out, samples=3, temperature=1.0) == 1
    assert "line 1 is sample 1 of first problem 0" in capsys.readouterr().err
    (out / results.LINES).write_text("".join([lines[0], "{}\n", *lines[2:]]))
    assert evaluate(tiny, task, out, samples=3, temperature=1.0) == 1
    assert "is damaged in line 2: field 'task' is missing" in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_a_users_grader_and_a_run(tiny, task, workdir, tmp_path, capsys):
    """A checkpoint of a run, graded by a function whose file is a part of what is evaluated."""
    own = tmp_path / "own.py"
    own.write_text("def grade(text, gold):\n    return len(text) > 0\n")
    out = tmp_path / "out"
    flags = {"grader": f"{own}:grade", "tasks": f"{task}/first.jsonl", "model": [f"{workdir}@2"]}
    assert evaluate(tiny, task, out, **flags) == 0
    assert all(line["reason"] in ("right", "wrong") for line in lines_of(out))
    assert json.loads((out / results.RECORD).read_text())["model"] == f"{workdir}@2"
    own.write_text("def grade(text, gold):\n    return len(text) > 1\n")
    assert evaluate(tiny, task, out, **flags) == 1
    assert f"grader {own}:grade was" in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_seeds_and_comparisons(tiny, task, tmp_path, capsys):
    """Two models together, and each against the other, greedy and over seeds."""
    base, arm, both = tmp_path / "base", tmp_path / "arm", tmp_path / "both"
    models = [tiny / "student", tiny / "teacher"]
    assert evaluate(tiny, task, base, tasks=f"{task}/first.jsonl") == 0
    assert evaluate(tiny, task, arm, tasks=f"{task}/first.jsonl", model=models[1:]) == 0
    assert evaluate(tiny, task, both, tasks=f"{task}/first.jsonl", model=models) == 0
    said = capsys.readouterr().out
    assert "mean over 2 models (training seeds):" in said
    inside = sorted(path.name for path in both.iterdir() if path.is_dir())
    assert len(inside) == 2
    means = json.loads((both / results.SEEDS).read_text())
    assert means["models"] == [str(model) for model in models]
    mean = means["tasks"]["first"]["unparsed_share"]
    assert mean["value"] == pytest.approx(
        sum(x["found"] is None for folder in (base, arm) for x in lines_of(folder)) / 20
    )
    assert f"unparsed_share        {mean['value']:.1%} (" in said.partition("mean over")[2]
    assert [lines_of(both / name) for name in inside] == [lines_of(base), lines_of(arm)]

    table = tmp_path / "compared.json"
    assert cli.main(["eval", "--compare", str(base), str(arm), f"--out={table}"]) == 0
    said = capsys.readouterr().out
    assert "McNemar, exact" in said
    (row,) = json.loads(table.read_text())["tasks"]
    shares = [sum(x["correct"] for x in lines_of(folder)) / 10 for folder in (base, arm)]
    assert (row["base"], row["arm"]) == tuple(shares)
    assert cli.main(["eval", "--compare", str(base), str(arm), f"--out={table}"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "--compare", str(both), str(both)]) == 0
    said = capsys.readouterr().out
    assert "over seeds and problems" in said
    assert "undecided" in said  # ten problems of which none changes prove nothing
    assert f"paired by their names: {inside[0]} with {inside[0]}, {inside[1]} with" in said

    # A model that is not among those named would be a part of their mean.
    third = tiny_run.copy_folder(tiny, tmp_path / "other") / "student"
    for named, part in (
        ([models[0], third], f"holds the evaluation of {inside[1]}, which is not among"),
        ([models[0], models[0]], "name every model once"),
    ):
        assert evaluate(tiny, task, both, tasks=f"{task}/first.jsonl", model=named) == 1
        assert part in capsys.readouterr().err
    assert sorted(path.name for path in both.iterdir() if path.is_dir()) == inside


DATED = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.usefixtures("one_device")
def test_what_is_resumed_on_another_day_asks_what_it_asked_before(
    tiny, task, tmp_path, monkeypatch
):
    """A chat template may write the date: Llama 3's does."""
    folder = tiny_run.copy_folder(tiny, tmp_path / "pair") / "student"
    (folder / "chat_template.jinja").write_text(DATED)
    out = tmp_path / "out"
    flags = {"model": [folder], "tasks": f"{task}/first.jsonl", "format": "chat"}
    monkeypatch.setattr(workdirs, "timestamp", lambda: "2026-01-31T23:59:00Z")
    assert evaluate(tiny, task, out, **flags) == 0
    whole = (out / results.LINES).read_bytes()
    assert "31 January 2026" in lines_of(out)[0]["prompt"]
    (out / results.LINES).write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    monkeypatch.setattr(workdirs, "timestamp", lambda: "2026-02-01T00:01:00Z")
    assert evaluate(tiny, task, out, **flags) == 0
    assert (out / results.LINES).read_bytes() == whole
    assert evaluate(tiny, task, tmp_path / "new", **flags) == 0
    assert "01 February 2026" in lines_of(tmp_path / "new")[0]["prompt"]


@pytest.mark.usefixtures("one_device")
def test_problems_that_stand_there_twice_are_said(tiny, tmp_path, capsys):
    rows = [{"question": f"{i % 2} + 1 = ?", "answer": "1"} for i in range(4)]
    tiny_run.write_lines(tmp_path / "twice.jsonl", rows)
    assert evaluate(tiny, tmp_path, tmp_path / "o", tasks=f"{tmp_path}/twice.jsonl") == 0
    assert "note: 2 of 4 problems of twice were there before" in capsys.readouterr().out


def test_a_comparison_says_what_it_leaves_out_and_what_else_differs(sampled, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(sampled, other)
    record = json.loads((other / results.RECORD).read_text())
    record["tasks"] = record["tasks"][:1]
    record["settings"]["instruction"] = "Think."
    (other / results.RECORD).write_text(json.dumps(record))
    lines = (other / results.LINES).read_text().splitlines(keepends=True)
    (other / results.LINES).write_text("".join(lines[:30]))
    assert cli.main(["eval", "--compare", str(sampled), str(other)]) == 0
    said = capsys.readouterr().out
    assert "note: not in all of them, and left out: second" in said
    assert "also differ in instruction '' and 'Think.'" in said


def test_evaluations_that_cannot_be_compared(sampled, tmp_path, capsys):
    def compare(other, *rest):
        assert cli.main(["eval", "--compare", str(sampled), str(other), *rest]) == 1
        return capsys.readouterr().err

    assert "has no eval.json" in compare(tmp_path)
    assert "is a folder: expected a new file" in compare(sampled, f"--out={tmp_path}")
    (tmp_path / "mine.json").write_text('{"a": 1}')
    assert "holds something else" in compare(sampled, f"--out={tmp_path / 'mine.json'}")
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'
    assert "--compare and a model" in compare(sampled, "some/model")
    assert "--compare and --tasks" in compare(sampled, "--tasks=x.jsonl")
    assert "margin is 0.0" in compare(sampled, "--margin=0")
    copy = tmp_path / "copy"
    shutil.copytree(sampled, copy)
    record = json.loads((copy / results.RECORD).read_text())
    record["tasks"][0]["digest"] = "another"
    (copy / results.RECORD).write_text(json.dumps(record))
    assert "task first of" in compare(copy)
    lines = (copy / results.LINES).read_text().splitlines(keepends=True)
    (copy / results.LINES).write_text("".join(lines[:-1]))
    assert "has 38 of 39 responses" in compare(copy)
