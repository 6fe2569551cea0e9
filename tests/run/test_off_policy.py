"""Training on completions from a file, alone and mixed with the student's own answers."""

import dataclasses
import json
import math
from fractions import Fraction

import jax
import numpy as np
import pytest
import tiny_run

import opd_jax
from opd_jax import cli
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf, transformer
from opd_jax.run import assemble
from opd_jax.spec import TrainSpec

tiny, one_device = tiny_run.tiny, tiny_run.one_device
OFF = {"train__stage": "off_policy", "kl__direction": "forward", "kl__ce": 0.3}


@pytest.fixture(scope="module")
def answers(tiny, tmp_path_factory):
    """Two answers of the teacher to each of the prompts."""
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    flags = {"model": tiny / "teacher", "prompts": tiny / "prompts.jsonl", "out": out}
    flags |= {"samples": 2, "temperature": 1.0, "max-new": 6}
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert cli.main(["generate", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    return out


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def dense(folder, rows, ce):
    """(1 - ce) KL(teacher || student) + ce CE over all completion ids, in float64, row by row."""
    size = tokenizers.num_ids(tokenizers.load(folder / "student"), 640, "student")
    models = [hf.load(folder / name) for name in ("student", "teacher")]
    total = count = 0.0
    for row in rows:
        ids = np.array([row["prompt_ids"] + row["completion_ids"]])
        first = len(row["prompt_ids"])
        logp, logq = (
            log_softmax(np.asarray(transformer.logits(tree, ids, cfg=cfg), np.float64)[0, :, :size])
            for cfg, tree in models
        )
        for place in range(first, ids.shape[1]):
            p, q = logp[place - 1], logq[place - 1]
            total += (1 - ce) * (np.exp(q) * (q - p)).sum() - ce * p[ids[0, place]]
            count += 1
    return total / count


def test_the_loss_is_that_of_the_definition_on_any_mesh(tiny, answers, tmp_path, monkeypatch):
    keys = OFF | {"data__prompts": answers, "data__shuffle": False, "train__steps": 1}
    assert tiny_run.train(tiny, tmp_path / "mesh", mesh__fsdp=2, mesh__model=2, **keys) == 0
    tiny_run.use_one_device(monkeypatch)
    assert tiny_run.train(tiny, tmp_path / "one", **keys) == 0
    rows = tiny_run.read_lines(answers)[:8]  # 4 prompts x 2 samples of the config
    expected = dense(tiny, rows, 0.3)
    for name in ("one", "mesh"):
        (line,) = tiny_run.read_lines(tmp_path / name / "metrics.jsonl")
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
        assert line["mean_length"] == np.mean([row["tokens"] for row in rows])
        assert line["truncated_share"] == np.mean([row["truncated"] for row in rows])
        assert line["on_policy"] == 0
        mixed = 0.7 * line["divergence"] + 0.3 * line["cross_entropy_nats"]
        assert line["loss"] == pytest.approx(mixed, rel=1e-5)


@pytest.mark.usefixtures("one_device")
def test_nothing_is_sampled(tiny, answers, tmp_path, capsys):
    keys = {"data__prompts": answers, "log__samples_every": 1, "optim__lr": 3e-2}
    before = assemble.programs()
    assert tiny_run.train(tiny, tmp_path / "run", **OFF, **keys) == 0
    assert assemble.programs()["sample"] == before["sample"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "rollout" not in summary["median_s"]
    said = capsys.readouterr().out
    assert "(0.7 KL(teacher || student) + 0.3 cross-entropy)" in said
    assert "on the completions of data.prompts" in said
    losses = [line["loss"] for line in tiny_run.read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    written = tiny_run.read_lines(tmp_path / "run" / "samples.jsonl")
    known = {tuple(row["completion_ids"]) for row in tiny_run.read_lines(answers)}
    shown = {tuple(row["ids"]) for line in written for row in line["samples"]}
    assert shown
    assert shown <= known


@pytest.mark.usefixtures("one_device")
def test_cross_entropy_alone_runs_no_teacher(tiny, answers, tmp_path):
    keys = {"data__prompts": answers, "eval__every": 2, "eval__kl_prompts": 4, "train__steps": 2}
    keys |= {"data__heldout": tiny / "prompts.jsonl", "train__stage": "off_policy", "kl__ce": 1.0}
    assert tiny_run.train(tiny, tmp_path / "run", **keys) == 0
    lines = tiny_run.read_lines(tmp_path / "run" / "metrics.jsonl")
    trained = [line for line in lines if "loss" in line]
    assert "kl_nats" not in trained[0]
    assert trained[0]["loss"] == pytest.approx(trained[0]["cross_entropy_nats"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["kl_nats"] > 0  # held out, on the student's own answers


@pytest.mark.usefixtures("one_device")
def test_cross_entropy_alone_needs_no_teacher(tiny, answers, tmp_path, capsys):
    keys = {"data__prompts": answers, "train__steps": 2, "train__stage": "off_policy"}
    keys |= {"kl__ce": 1.0, "log__samples_every": 1, "teacher__path": ""}
    assert tiny_run.train(tiny, tmp_path / "alone", **keys) == 0
    assert "teacher: none" in capsys.readouterr().out
    record = json.loads((tmp_path / "alone" / "run.json").read_text())
    assert sorted(record["inputs"]) == ["prompts", "student"]
    samples = tiny_run.read_lines(tmp_path / "alone" / "samples.jsonl")
    assert samples[0]["samples"]
    assert not any("kl_nats" in sample for line in samples for sample in line["samples"])
    beside = keys | {"teacher__path": tmp_path / "none"}  # named, but nothing compares with it
    beside |= {"eval__every": 2, "eval__kl_prompts": 0, "eval__teacher": False}
    beside |= {"data__heldout": tiny / "prompts.jsonl"}
    assert tiny_run.train(tiny, tmp_path / "graded", **beside) == 0
    curves = [
        [{k: v for k, v in x.items() if "eval/" not in k} for x in tiny_run.curve(tmp_path / name)]
        for name in ("alone", "graded")
    ]
    assert curves[0] == [line for line in curves[1] if "loss" in line]
    capsys.readouterr()
    for more in ({"eval__every": 2, "data__heldout": tiny / "prompts.jsonl"}, {"kl__ce": 0.9}):
        assert tiny_run.train(tiny, tmp_path / "new", **keys | more) == 1
        assert "teacher.path is ''" in capsys.readouterr().err
    assert tiny_run.train(tiny, tmp_path / "new", **keys, data__teacher_prompt="{prompt}") == 1
    message = capsys.readouterr().err
    assert "data.teacher_prompt is '{prompt}'" in message
    assert "nothing here compares with a teacher" in message


@pytest.mark.usefixtures("one_device")
def test_a_mix_goes_by_step_number_also_after_a_resume(tiny, answers, tmp_path):
    keys = {"data__prompts": answers, "train__stage": "mixed", "train__on_policy_share": 0.25}
    keys |= {"kl__direction": "jsd", "checkpoint__every": 1}
    assert tiny_run.train(tiny, tmp_path / "whole", **keys) == 0
    folder = tmp_path / "stopped"
    tiny_run.stop_after(tiny, folder, 2, **keys)
    assert tiny_run.train(tiny, folder, **keys) == 0
    assert tiny_run.curve(folder) == tiny_run.curve(tmp_path / "whole")
    assert [line["on_policy"] for line in tiny_run.curve(folder)] == [0, 0, 0, 1]
    leaves, rest, _ = tiny_run.saved(tiny, tmp_path / "whole", **keys)
    again, resumed, _ = tiny_run.saved(tiny, folder, **keys)
    jax.tree.map(np.testing.assert_array_equal, leaves, again)
    assert rest["data"] == resumed["data"]


@pytest.mark.usefixtures("one_device")
def test_from_python_with_texts_in_a_list(tiny, tmp_path):
    rows = [{"prompt": f"{i} + 1 = ?", "completion": str(i + 1)} for i in range(8)]
    settings = {"train.steps": 1, "train.stage": "off_policy", "kl.direction": "forward"}
    settings |= {"data.max_prompt": 16, "rollout.max_new": 6, "rollout.samples": 1}
    settings |= {"train.prompts": 8, "kl.ce": 0.3, "checkpoint.every": 0}
    seen = []
    opd_jax.distill(
        student=str(tiny / "student"),
        teacher=str(tiny / "teacher"),
        prompts=rows,
        workdir=tmp_path / "run",
        settings=settings,
        on_step=lambda step, values: seen.append(values),
    )
    tokenizer = tokenizers.load(tiny / "student")
    lengths = [len(tokenizer.encode(row["completion"])) + 1 for row in rows]  # and a stop id
    assert seen[0]["mean_length"] == np.mean(lengths)
    assert seen[0]["truncated_share"] == 0


@pytest.mark.parametrize("share", [0.1, 0.25, 0.29, 1 / 3, 0.5, 0.7, 0.999])
def test_a_share_of_the_first_steps_is_on_policy(share):
    spec = TrainSpec(stage="mixed", on_policy_share=share)
    done = np.cumsum([spec.is_on_policy(step) for step in range(300)])
    assert done.tolist() == [math.floor(n * Fraction(str(share))) for n in range(1, 301)]
    for stage, is_on in (("on_policy", True), ("off_policy", False)):
        assert dataclasses.replace(spec, stage=stage).is_on_policy(7) is is_on


@pytest.mark.usefixtures("one_device")
def test_a_second_stage_starts_from_the_first(tiny, answers, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    off = OFF | {"data__prompts": answers, "train__steps": 2}
    assert tiny_run.train(tiny, first, **off) == 0
    assert tiny_run.train(tiny, second, init_from=first, train__steps=1) == 0
    alone, _, _ = tiny_run.saved(tiny, first, **off)
    state, _, _ = tiny_run.saved(tiny, second, init_from=first, train__steps=1)
    (line,) = tiny_run.read_lines(second / "metrics.jsonl")
    moved = max(
        np.abs(state[name] - leaf).max() for name, leaf in alone.items() if "params" in name
    )
    assert 0 < moved < 0.1  # one step of the second stage away from the first
    assert "on_policy" not in line


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"kl__ce": 0.5}, ("kl.ce is 0.5", "train.stage is on_policy", "noise alone")),
        ({"kl__ce": 0.5, "train__stage": "mixed"}, ("kl.ce is 0.5", "train.stage is mixed")),
        ({"kl__ce": 1.5, "train__stage": "off_policy"}, ("kl.ce is 1.5", "a share from 0 to 1")),
        ({"train__stage": "offpolicy"}, ("train.stage is 'offpolicy'", "one of", "off_policy")),
        ({"train__on_policy_share": 1.0}, ("train.on_policy_share is 1.0", "between 0 and 1")),
        ({"train__stage": "off_policy"}, ("prompts.jsonl:1: no `completion`", "data.columns")),
        ({"train__stage": "mixed"}, ("prompts.jsonl:1: no `completion`",)),
        (
            {"train__stage": "off_policy", "data__columns__completion": "reply"},
            ("no row has 'reply', which data.columns names as completion",),
        ),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_what_cannot_be_is_refused(tiny, tmp_path, capsys, keys, parts):
    assert tiny_run.train(tiny, tmp_path / "run", **keys) == 1
    message = capsys.readouterr().err
    for part in parts:
        assert part in message
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.usefixtures("one_device")
def test_fewer_completions_than_a_step_reads_are_refused(tiny, answers, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(answers.read_text().splitlines(keepends=True)[:5]))
    assert tiny_run.train(tiny, tmp_path / "run", **OFF, data__prompts=few) == 1
    assert "5 prompts for a batch of 8" in capsys.readouterr().err
