"""Several teachers, of which each prompt names its own, in whole runs of the command.

The reference runs each model on one unpadded row at a time, against the teacher of that row.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tokenizers import AddedToken

from opd_jax import api, cli
from opd_jax.data import tokenizer as tokenizers
from opd_jax.evaluate import heldout
from opd_jax.models import hf, transformer
from opd_jax.plan import chips, programs
from opd_jax.run import assemble, entry, initial

tiny, one_device = tiny_run.tiny, tiny_run.one_device
ALL = {"train__steps": 3, "checkpoint__every": 1, "train__microbatches": 2}
ALL |= {"log__samples_every": 1, "log__samples": 8, "data__shuffle": False}
ALL |= {"eval__every": 3, "eval__kl_prompts": 6, "eval__batch": 4}
MESH = {"mesh__fsdp": 2, "mesh__model": 2, "eval__batch": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny pair and a further teacher, deeper and wider, and prompts of either."""
    folder = tiny_run.make_teachers(tmp_path_factory.mktemp("several"))
    tokenizer = tokenizers.load(folder / "student")
    tokenizer.add_tokens([AddedToken("<more>")])
    tiny_run.make_model(folder / "foreign", tiny_run.MODEL, 7, tokenizer)
    return folder


def flags(folder, **keys):
    return tiny_run.several(folder) | keys


@functools.cache
def model(folder):
    return hf.load(folder)


@functools.partial(jax.jit, static_argnames="cfg")
def logits(tree, ids, cfg):
    return transformer.logits(tree, ids, cfg=cfg)


def logp(folder, prompt, answer, num_ids):
    """[answer, V] float64, of one row that begins in the first column; nothing reads behind it."""
    cfg, tree = model(folder)
    row = [*prompt, *answer]
    z = np.asarray(logits(tree, jnp.array([row + [0] * (48 - len(row))]), cfg), np.float64)
    z = z[0, len(prompt) - 1 : len(row) - 1, :num_ids]
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def reverse(folder, who, prompt, answer):
    """KL(student || teacher) of every id of an answer."""
    tokenizer = tokenizers.load(folder / "student")
    prompt, num_ids = tokenizer.encode(prompt), tokenizers.num_ids(tokenizer, 640, "student")
    teacher = folder / {"sums": "teacher", "digits": "other"}[who]
    p, q = (logp(each, prompt, answer, num_ids) for each in (folder / "student", teacher))
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.fixture(scope="module")
def run(folder):
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert tiny_run.train(folder, folder / "run", **flags(folder, **ALL)) == 0
    return folder / "run"


def test_every_prompt_is_taught_by_the_teacher_that_it_names(folder, run):
    line = tiny_run.read_lines(run / "samples.jsonl")[0]
    by_teacher = {"sums": [], "digits": []}
    for number, sample in enumerate(line["samples"]):
        row = tiny_run.read_lines(folder / "rows.jsonl")[number // 2]
        assert sample["teacher"] == row["teacher"]
        expected = reverse(folder, row["teacher"], row["prompt"], sample["ids"])
        np.testing.assert_allclose(sample["kl_nats"], expected, rtol=2e-4, atol=2e-5)
        by_teacher[row["teacher"]] += list(expected)
    other = reverse(folder, "digits", row["prompt"], sample["ids"])
    assert row["teacher"] == "digits" or np.abs(expected - other).max() > 1e-3  # they differ
    step = tiny_run.read_lines(run / "metrics.jsonl")
    (step,) = (line for line in step if line["step"] == 1 and "loss" in line)
    for name, values in by_teacher.items():
        assert step[f"kl_nats/{name}"] == pytest.approx(np.mean(values), rel=1e-4)
    assert step["loss"] == pytest.approx(
        np.mean([*by_teacher["sums"], *by_teacher["digits"]]), rel=1e-4
    )


@pytest.mark.usefixtures("one_device")
def test_evaluation_is_against_the_teacher_of_each_prompt(folder, run):
    keys = flags(folder, **ALL)
    summary = json.loads((run / "summary.json").read_text())
    for when in ("before", "after"):
        kl = summary[when]
        assert min(kl["kl_nats/sums"], kl["kl_nats/digits"]) < kl["kl_nats"]
        assert kl["kl_nats"] < max(kl["kl_nats/sums"], kl["kl_nats/digits"])
    # What can be reached: each teacher's answers to its own problems, in the order of the file.
    found = json.loads((run / "teacher.json").read_text())
    parts = assemble.assemble(tiny_run.resolved(folder, **keys), say=lambda line: None)
    teachers = initial.teacher_params(parts)
    assert isinstance(teachers, tuple)
    texts = {}
    with jax.set_mesh(parts.mesh):
        for name, tree, cfg in zip(parts.cfg.names, teachers, parts.cfg.teachers, strict=True):
            own = [row for row in parts.heldout if row.taught_by == name]
            key = jax.random.split(heldout.evaluation_key(0))[0]
            _, graded = heldout.answered(
                tree, own, parts.tokenizer, key, parts.mesh, cfg=cfg, plan=parts.plan
            )
            texts |= dict(zip(graded.index, graded.text, strict=True))
    assert found["index"] == [row.index for row in parts.heldout]
    assert [tuple(each) for each in found["text"]] == [texts[i] for i in found["index"]]
    right = [x for row in found["correct"] for x in row]
    assert summary["teacher"]["accuracy"] == np.mean(right)
    assert summary["teacher"]["kl_nats"] is None


@pytest.mark.usefixtures("one_device")
def test_a_resumed_run_goes_on_bit_for_bit_and_other_teachers_are_refused(
    folder, run, tmp_path, capsys
):
    keys = flags(folder, **ALL)
    stopped = tmp_path / "stopped"
    tiny_run.stop_after(folder, stopped, 1, **keys)
    swapped = keys | {"teacher__paths__sums": folder / "other"}
    assert tiny_run.train(folder, stopped, **swapped) == 1
    assert "teacher.paths" in capsys.readouterr().err
    # The order of the flags means nothing.
    backwards = {"teacher__paths__digits": folder / "other"} | keys
    assert list(backwards) != list(keys)
    assert tiny_run.train(folder, stopped, **backwards) == 0
    assert tiny_run.curve(stopped) == tiny_run.curve(run)
    leaves = [tiny_run.saved(folder, place, **keys)[0] for place in (run, stopped)]
    jax.tree.map(np.testing.assert_array_equal, *leaves)
    inputs = json.loads((run / "run.json").read_text())["inputs"]
    assert {"teacher sums", "teacher digits"} <= {*inputs}
    assert inputs["teacher sums"] != inputs["teacher digits"]
    # Whoever teaches a prompt is a part of what the run was started on, and so are the weights.
    parts = assemble.assemble(tiny_run.resolved(folder, **keys), say=lambda line: None)
    old, one = entry.inputs(parts), dataclasses.replace(parts.rows[0], taught_by="digits")
    other = dataclasses.replace(parts, rows=(one, *parts.rows[1:]))
    assert entry.inputs(other)["prompts"] != old["prompts"]
    record = json.loads((run / "run.json").read_text())
    record["inputs"]["teacher digits"]["files"]["config.json"] = "0" * 16
    (stopped / "run.json").write_text(json.dumps(record))
    assert tiny_run.train(folder, stopped, **keys) == 1
    assert "another teacher digits" in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_teachers_that_rest_in_host_memory_give_the_same_bit_for_bit(folder, run, tmp_path, capsys):
    keys = flags(folder, **ALL, teacher__offload=True)
    assert tiny_run.train(folder, tmp_path / "rests", **keys) == 0
    assert "rests in host memory" in capsys.readouterr().out
    assert tiny_run.curve(tmp_path / "rests") == tiny_run.curve(run)


def test_a_mesh_gives_the_numbers_of_one_device(folder, run, tmp_path):
    keys = flags(folder, **ALL | {"train__steps": 1, "eval__every": 0} | MESH)
    assert tiny_run.train(folder, tmp_path / "mesh", **keys) == 0
    of_step = lambda place: [x for x in tiny_run.curve(place) if x["step"] == 1][-1]  # noqa: E731
    found, expected = of_step(tmp_path / "mesh"), of_step(run)
    for name in ("loss", "kl_nats/sums", "kl_nats/digits", "mean_length"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.usefixtures("one_device")
def test_other_commands_know_of_several_teachers(folder, run, tmp_path, capsys):
    assert cli.main(["rocks", f"--run={run}", f"--out={tmp_path / 'rocks'}"]) == 1
    message = capsys.readouterr().err
    assert "has several teachers (digits " in message
    assert f"--student={run} --teacher=MODEL" in message
    assert not (tmp_path / "rocks").exists()
    assert cli.main(["report", str(run), f"--out={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Distilling other and teacher into student" in page
    assert f"sums: {folder / 'teacher'}" in page
    assert cli.main(["export", f"--workdir={run}", f"--out={tmp_path / 'model'}"]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "several teachers, of which each prompt has one: `other` (digits), `teacher`" in card


def test_its_programs_are_planned(folder):
    given = tiny_run.resolved(folder, **flags(folder, **ALL | MESH))
    parts = programs.assembly(given, chips.machine("cpu:8"), say=lambda line: None)
    with jax.set_mesh(parts.mesh):
        names = [each.name for each in programs.of_run(parts)]
    assert names == ["sample", "teacher", "train", "answers", "evaluation"]
    needs = {need.what: need.num_bytes for need in assemble.needs(parts)}
    assert 0 < needs["the teacher sums"] < needs["the teacher digits"]
    with pytest.raises(ValueError, match="several teachers"):
        programs.assembly(given, chips.machine("cpu:8"), teacher=str(folder / "other"))


@pytest.mark.usefixtures("one_device")
def test_a_teacher_that_nobody_names_is_told(folder, tmp_path, capsys):
    keys = flags(folder, **ALL, teacher__paths__code=folder / "other") | {"train__steps": 0}
    assert tiny_run.train(folder, tmp_path / "run", **keys | {"eval__every": 0}) == 0
    told = capsys.readouterr().out
    assert "warning: no prompt of" in told
    assert "has the teacher code" in told
    assert "0 by code, 6 by digits, 6 by sums" in told


def test_the_call_in_python_takes_several(monkeypatch, tmp_path):
    monkeypatch.setattr(api.train, "train", lambda run, workdir, **rest: run)
    teachers = {"sums": "embedded:teacher", "keep": "embedded:student"}
    run: Any = api.distill("embedded:student", teachers, "rows.jsonl", tmp_path)
    assert run.teacher.paths == (("keep", "embedded:student"), ("sums", "embedded:teacher"))
    assert list(run.teachers) == ["keep", "sums"]
    assert run.teachers["sums"].path == "embedded:teacher"


ONE = {"teacher__paths__sums": None, "teacher__paths__digits": None}


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"data__prompts": "prompts.jsonl"},
         ("prompts.jsonl:1: `teacher` is missing", "one of digits, sums",
          "--config.data.columns.teacher")),
        ({"data__heldout": "prompts.jsonl", "eval__every": 1},
         ("prompts.jsonl:1: `teacher` is missing",)),
        ({"teacher__paths__sums": None, "teacher__paths__math": "other"},
         ("rows.jsonl:1: `teacher` is the string 'sums'", "one of digits, math",
          "--config.teacher.paths.NAME")),
        ({"data__columns__teacher": "answer"}, ("`answer` is the string '2'",)),
        (ONE | {"teacher__path": "teacher"},
         ("rows.jsonl:1: `teacher` is the string 'sums', and the run has one teacher",
          "--config.teacher.paths.NAME=MODEL")),
        (ONE | {"teacher__path": "teacher", "data__columns__teacher": "answer"},
         ("data.columns is", "--config.teacher.paths.NAME=MODEL")),
        (ONE, ("teacher.path is ''", "set --config.teacher.path")),
        ({"teacher__path": "teacher"},
         ("teacher.path is", "nothing beside teacher.paths", "--config.teacher.path")),
        ({"teacher__paths__a.b": "other"}, ("teacher.paths is", "letters, digits")),
        ({"teacher__paths__digits": "nowhere"}, ("nowhere",)),
        ({"teacher__paths__digits": "foreign"},
         ("teacher.paths.digits: student and teacher tokenizers differ", "'<more>'")),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("one_device")
def test_what_cannot_be_is_refused(folder, tmp_path, capsys, keys, parts):
    paths = ("data__prompts", "data__heldout", "teacher__path")
    given = flags(folder)
    for key, value in keys.items():
        is_path = value and (key in paths or key.startswith("teacher__paths"))
        given[key] = folder / value if is_path else value
    given = {key: value for key, value in given.items() if value is not None}
    assert tiny_run.train(folder, tmp_path / "run", **given) == 1
    message = capsys.readouterr().err
    for part in parts:
        assert part in message
    assert not (tmp_path / "run" / "run.json").exists()
