"""What the teacher reaches: measured once as the student is, kept, and told beside it."""

import json

import pytest
import tiny_run

tiny, one_device = tiny_run.tiny, tiny_run.one_device
GRADER = "def even(text, gold):\n    return sum(map(ord, text)) % 2 == 0\n"
KEYS = {"eval__every": 2, "eval__batch": 8, "train__steps": 2}
KEYS |= {"eval__samples": 2, "eval__temperature": 1.0}


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "graders.py").write_text(GRADER)
    return KEYS | {"eval__grader": f"{tmp_path / 'graders.py'}:even"}


@pytest.mark.usefixtures("one_device")
def test_the_teacher_is_graded_as_a_student_would_be(tiny, tmp_path, keys, capsys):
    assert tiny_run.train(tiny, tmp_path / "run", **keys) == 0
    told = capsys.readouterr().out
    found = summary(tmp_path / "run")["teacher"]
    as_student = {"student__path": str(tiny / "teacher"), "train__steps": 0}
    assert tiny_run.train(tiny, tmp_path / "same", **keys | as_student) == 0
    before = summary(tmp_path / "same")["before"]
    own = ("accuracy", "accuracy_low", "accuracy_high", "unparsed_share")
    assert 0 < found["accuracy"] < 1  # the test could fail
    assert {name: found[name] for name in own} == {name: before[name] for name in own}
    assert found["kl_nats"] is None
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    file = json.loads((tmp_path / "run" / "teacher.json").read_text())
    assert file["result"] == found
    right = [x for row in file["correct"] for x in row]
    assert sum(right) / len(right) == found["accuracy"]
    assert [sum(map(ord, t)) % 2 == 0 for row in file["text"] for t in row] == right
    assert f"teacher: accuracy {found['accuracy']:.1%} [" in told


@pytest.mark.usefixtures("one_device")
def test_it_is_measured_once_a_run_and_only_where_asked(tiny, tmp_path, keys):
    run = tmp_path / "run"
    assert tiny_run.train(tiny, run, **keys | {"checkpoint__every": 1}) == 0
    file = json.loads((run / "teacher.json").read_text())
    file["result"]["accuracy"] = 0.123
    (run / "teacher.json").write_text(json.dumps(file))
    assert tiny_run.train(tiny, run, **keys | {"checkpoint__every": 1, "train__steps": 3}) == 0
    assert summary(run)["teacher"]["accuracy"] == 0.123
    assert tiny_run.train(tiny, tmp_path / "off", **keys, eval__teacher="False") == 0
    assert summary(tmp_path / "off")["teacher"] is None
    assert not (tmp_path / "off" / "teacher.json").exists()


@pytest.mark.usefixtures("one_device")
def test_samples_say_what_was_expected_and_whether_it_came(tiny, tmp_path, keys, capsys):
    more = {"log__samples_every": 1, "log__samples": 3, "train__steps": 1, "eval__every": 0}
    assert tiny_run.train(tiny, tmp_path / "run", **keys | more) == 0
    (line,) = tiny_run.read_lines(tmp_path / "run" / "samples.jsonl")
    prompts = {row["prompt"]: row["answer"] for row in tiny_run.read_lines(tiny / "prompts.jsonl")}
    for sample in line["samples"]:
        (gold,) = (answer for prompt, answer in prompts.items() if prompt in sample["prompt"])
        assert sample["gold"] == gold
        assert sample["correct"] == (sum(map(ord, sample["text"])) % 2 == 0)
    assert line["samples"][0]["prompt"] == line["samples"][1]["prompt"]  # two answers to each
    assert f"expected '{line['samples'][0]['gold']}'" in capsys.readouterr().out


@pytest.mark.usefixtures("one_device")
def test_a_run_does_not_go_on_with_another_grader(tiny, tmp_path, keys, capsys):
    run = tmp_path / "run"
    assert tiny_run.train(tiny, run, **keys | {"checkpoint__every": 1}) == 0
    own = tmp_path / "graders.py"
    kept = own.read_text()
    own.write_text(kept.replace("== 0", "== 1"))
    before = (run / "metrics.jsonl").read_bytes()
    assert tiny_run.train(tiny, run, **keys | {"checkpoint__every": 1, "train__steps": 3}) == 1
    told = capsys.readouterr().err
    assert "was started on another grader than" in told
    assert "graders.py is another" in told
    assert (run / "metrics.jsonl").read_bytes() == before
    own.write_text(kept)
    assert tiny_run.train(tiny, run, **keys | {"checkpoint__every": 1, "train__steps": 3}) == 0
