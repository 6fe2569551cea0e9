"""Answers of one model to a file of prompts."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file

from opd_jax import cli
from opd_jax.data import tokenizer as tokenizers
from opd_jax.evaluate import generate as command

# What a child to be killed runs: hanging in the third batch, of which a line is written.
CHILD = tiny_run.hanging_child(2, '{"index": 9, "sam', whole=1)

tiny, one_device, workdir = tiny_run.tiny, tiny_run.one_device, tiny_run.workdir


def argv(tiny, out, **flags):
    given = {
        "model": tiny / "student",
        "prompts": tiny / "prompts.jsonl",
        "out": out,
        "max-new": 6,
        "batch": 8,
    }
    given |= {name.replace("_", "-"): value for name, value in flags.items()}
    return ["generate", *(f"--{name}={value}" for name, value in given.items())]


def generate(tiny, out, **flags):
    return cli.main(argv(tiny, out, **flags))


@pytest.mark.usefixtures("one_device")
def test_one_line_per_answer(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "answers.jsonl"
    assert generate(tiny, out, samples=2, temperature=1.0) == 0
    lines = tiny_run.read_lines(out)
    assert [line["index"] for line in lines] == [i for i in range(12) for _ in range(2)]
    assert [line["sample"] for line in lines] == [0, 1] * 12
    prompts = tiny_run.read_lines(tiny / "prompts.jsonl")
    tokenizer = tokenizers.load(tiny / "student")
    for line in lines:
        assert line.keys() == {
            *("index", "sample", "prompt", "prompt_ids", "completion", "completion_ids"),
            *("tokens", "truncated", "answer", "correct", "found", "reason"),
        }
        assert prompts[line["index"]]["prompt"] in line["prompt"]
        assert line["answer"] == prompts[line["index"]]["answer"]
        assert 1 <= line["tokens"] <= 6
        assert line["tokens"] == len(line["completion_ids"])
        assert tokenizer.decode(line["prompt_ids"]) == line["prompt"]
        decoded = tokenizer.decode(line["completion_ids"], skip_special_tokens=True)
        assert decoded == line["completion"]
        assert line["truncated"] == (line["completion_ids"][-1] != tokenizer.eos_token_id)
        assert type(line["correct"]) is bool
    assert len({line["completion"] for line in lines}) > 12  # the two samples are two draws
    said = capsys.readouterr().out
    assert "wrote 24 answers" in said
    share = sum(line["correct"] for line in lines) / 24
    unparsed = sum(line["found"] is None for line in lines) / 24
    assert f"accuracy {share:.1%} of 24, unparsed {unparsed:.1%}" in said
    assert all(line["reason"] for line in lines)


@pytest.mark.usefixtures("one_device")
def test_the_batch_size_does_not_change_an_answer(tiny, tmp_path):
    assert generate(tiny, tmp_path / "a", batch=8, temperature=1.0) == 0
    assert generate(tiny, tmp_path / "b", batch=5, temperature=1.0) == 0
    assert generate(tiny, tmp_path / "c", batch=8, temperature=1.0, seed=1) == 0
    first, again, other = (tiny_run.read_lines(tmp_path / name) for name in "abc")
    assert first == again
    assert first != other


def test_slots_change_no_byte_whoever_goes_on(tiny, tmp_path, monkeypatch, capsys):
    """On four batch shards, of whose second batch half only fills up; then on one device."""
    flags = {"samples": 2, "temperature": 1.0}
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def fail(*args):
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(command, "_finish", fail)  # all is there, and not yet in its place
        assert generate(tiny, out, **flags, slots=4, mesh_fsdp=2, mesh_model=2) == 1
    file = partial / "answers.jsonl"
    split = file.read_text()
    file.write_text("".join(split.splitlines(keepends=True)[:7]))
    tiny_run.use_one_device(monkeypatch)
    capsys.readouterr()
    assert generate(tiny, out, **flags, slots=3) == 0
    assert "has answers to 3 of 12 prompts: going on" in capsys.readouterr().out
    assert generate(tiny, tmp_path / "in-step", **flags) == 0
    assert out.read_text() == split == (tmp_path / "in-step").read_text()


@pytest.mark.usefixtures("one_device")
def test_a_killed_command_goes_on_and_writes_the_same(tiny, tmp_path, capsys):
    flags = {"samples": 2, "temperature": 1.0, "batch": 2}
    assert generate(tiny, tmp_path / "whole", **flags) == 0
    out, partial = tmp_path / "killed", tmp_path / "killed.partial"
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, *argv(tiny, out, **flags)],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert any("HANGS" in line for line in child.stdout)
        capsys.readouterr()
        assert generate(tiny, out, **flags) == 1  # while it is written
        child.kill()
    assert "is being written by another process" in capsys.readouterr().err
    assert not out.exists()
    for other in ({"seed": 1}, {"max_new": 5}, {"limit": 7}, {"model": tiny / "teacher"}):
        assert generate(tiny, out, **(flags | other)) == 1
        assert "holds answers of another command" in capsys.readouterr().err
    assert generate(tiny, out, **(flags | {"batch": 3})) == 0
    assert "has answers to 4 of 12 prompts: going on" in capsys.readouterr().out
    assert out.read_text() == (tmp_path / "whole").read_text()
    assert not partial.exists()


@pytest.mark.usefixtures("one_device")
def test_a_damaged_file_of_answers_is_named(tiny, tmp_path, capsys, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def fail(*args):
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(command, "_finish", fail)  # all is there, and not yet in its place
        assert generate(tiny, out, limit=2) == 1
    capsys.readouterr()
    file = partial / "answers.jsonl"
    whole = file.read_text()
    first, second = whole.splitlines(keepends=True)
    for body, part in (
        (second, "line 1 is sample 0 of prompt 1: expected (0, 0)"),
        ('{"index": 0}\n', "line 1: field 'sample' is missing"),
        (whole + first, "line 3 is sample 0 of prompt 0: expected no more"),
    ):
        file.write_text(body)
        assert generate(tiny, out, limit=2) == 1
        assert part in capsys.readouterr().err
    file.write_text(whole)
    (partial / "command.json").write_text("{")
    assert generate(tiny, out, limit=2) == 1
    assert f"remove {partial}" in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_a_prompt_that_stands_there_twice_is_answered_once(tiny, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    texts = ["1 + 1 = ?", "2 + 2 = ?", "1 + 1 = ?", "3 + 3 = ?", "2 + 2 = ?"]
    tiny_run.write_lines(prompts, [{"question": text} for text in texts])
    columns = json.dumps({"prompt": "question"})
    flags = {"prompts": prompts, "columns": columns, "samples": 2, "temperature": 1.0}
    assert generate(tiny, tmp_path / "out", **flags) == 0
    assert "2 prompts stood there more than once" in capsys.readouterr().out
    lines = tiny_run.read_lines(tmp_path / "out")
    assert [line["index"] for line in lines] == [0, 0, 1, 1, 3, 3]


@pytest.mark.usefixtures("one_device")
def test_limit_and_prompts_without_an_answer(tiny, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    tiny_run.write_lines(prompts, [{"prompt": f"{i} + {i + 2} = ?"} for i in range(12)])
    assert generate(tiny, tmp_path / "out", prompts=prompts, limit=3) == 0
    lines = tiny_run.read_lines(tmp_path / "out")
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert all("answer" not in line for line in lines)
    assert "accuracy" not in capsys.readouterr().out


def test_on_eight_devices_the_answers_are_the_same(tiny, tmp_path, monkeypatch):
    assert generate(tiny, tmp_path / "eight") == 0
    tiny_run.use_one_device(monkeypatch)
    assert generate(tiny, tmp_path / "one") == 0
    assert tiny_run.read_lines(tmp_path / "eight") == tiny_run.read_lines(tmp_path / "one")


def test_an_existing_file_is_refused(tiny, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    out.write_text("mine\n")
    assert generate(tiny, out) == 1
    message = capsys.readouterr().err
    assert str(out) in message
    assert "another --out" in message
    assert out.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"model": "absent/model"}, "absent/model"),
        ({"prompts": "absent.jsonl"}, "absent.jsonl"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new": 0}, "max-new"),
        ({"samples": 0}, "samples"),
        ({"batch": 0}, "batch"),
        ({"slots": -8}, "slots is -8 for batches of 8 rows over 8 batch shards"),
        ({"slots": 3}, "a multiple of 8 up to 8; set --slots, or raise --batch"),
        ({"slots": 16}, "slots is 16 for batches of 8 rows"),
        ({"limit": -1}, "limit"),
        ({"max_new": 64}, "max-new"),
        ({"samples": 2}, "temperature"),
        ({"top_p": 0}, "top-p"),
        ({"columns": "question"}, "columns"),
        ({"columns": '{"prompt": 3}'}, "columns"),
        ({"template": "[]"}, "template"),
    ],
)
def test_what_cannot_be_generated_is_named(tiny, tmp_path, capsys, flags, part):
    assert generate(tiny, tmp_path / "out", **flags) == 1
    message = capsys.readouterr().err
    assert part in message
    assert "expected" in message
    assert not (tmp_path / "out").exists()


def test_lines_are_json_with_text_as_it_is(tiny, tmp_path, monkeypatch):
    tiny_run.use_one_device(monkeypatch)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "né?"}) + "\n")
    assert generate(tiny, tmp_path / "out", prompts=prompts) == 0
    assert "né?" in (tmp_path / "out").read_text()


def damage(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.usefixtures("one_device")
def test_a_model_that_training_would_refuse_is_refused(tiny, tmp_path, capsys):
    copy = tiny_run.copy_folder(tiny, tmp_path / "copy")
    damage(copy / "student", lambda t: t["model.norm.weight"].__setitem__(2, np.nan))
    assert generate(tiny, tmp_path / "a", model=copy / "student") == 1
    assert "tensor model.norm.weight holds 1 of" in capsys.readouterr().err
    config = copy / "teacher" / "config.json"
    raw = json.loads(config.read_text()) | {"vocab_size": 600}
    config.write_text(json.dumps(raw))
    damage(
        copy / "teacher",
        lambda t: t.update({k: v[:600].copy() for k, v in t.items() if "embed" in k}),
    )
    assert generate(tiny, tmp_path / "b", model=copy / "teacher") == 1
    assert "has 600 output rows and its tokenizer 631 ids" in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_ids_are_counted_to_the_highest_one(tiny, tmp_path):
    """A vocabulary with holes: its size is not the number of its entries."""
    copy = tiny_run.copy_folder(tiny, tmp_path / "copy")
    path = copy / "student" / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    unused = [
        t for t, i in vocab.items() if 20 < i < 600 and not any(c in t for c in "0123456789 +=?")
    ]
    merged = {
        part
        for m in raw["model"]["merges"]
        for part in (m if isinstance(m, list) else m.split(" "))
    }
    merged |= {"".join(m if isinstance(m, list) else m.split(" ")) for m in raw["model"]["merges"]}
    holes = [t for t in unused if t not in merged][:20]
    assert len(holes) > 5
    for token in holes:
        del vocab[token]
    path.write_text(json.dumps(raw))
    tokenizer = tokenizers.load(copy / "student")
    assert tokenizers.num_ids(tokenizer, 640, "student") == 631 > len(tokenizer)
    assert generate(tiny, tmp_path / "a", model=copy / "student", temperature=1.0, samples=8) == 0


@pytest.mark.usefixtures("one_device")
def test_logits_that_are_not_finite_are_told(tiny, tmp_path, capsys):
    copy = tiny_run.copy_folder(tiny, tmp_path / "copy")
    damage(copy / "student", lambda t: t["model.norm.weight"].__setitem__(slice(None), 3e38))
    assert generate(tiny, tmp_path / "a", model=copy / "student") == 1
    assert "are not finite" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("one_device")
def test_a_run_answers_as_what_it_exports(tiny, tmp_path, workdir, capsys):
    exported = tmp_path / "exported"
    assert cli.main(["export", f"--workdir={workdir}", "--step=2", f"--out={exported}"]) == 0
    assert generate(tiny, tmp_path / "a", model=f"{workdir}@2", temperature=1.0) == 0
    assert generate(tiny, tmp_path / "b", model=exported, temperature=1.0) == 0
    assert generate(tiny, tmp_path / "c", model=workdir, temperature=1.0) == 0
    of_run, of_export, newest = ((tmp_path / name).read_text() for name in "abc")
    assert of_run == of_export
    assert newest != of_run
    assert generate(tiny, tmp_path / "d", model=f"{workdir}@3") == 1
    assert "has no checkpoint of step '3'" in capsys.readouterr().err


def test_a_mesh_changes_no_greedy_answer(tiny, tmp_path):
    assert generate(tiny, tmp_path / "a") == 0
    assert generate(tiny, tmp_path / "b", mesh_fsdp=2, mesh_model=2) == 0
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
