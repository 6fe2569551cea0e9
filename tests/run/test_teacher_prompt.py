"""The teacher reads another prompt than the student: the KL is that of the definition, row by row.

The reference runs each model on one unpadded row at a time, each behind its own prompt.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from opd_jax import cli
from opd_jax import mesh as meshlib
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf, transformer
from opd_jax.rollout import answers as drawing
from opd_jax.run import assemble, initial

tiny, one_device = tiny_run.tiny, tiny_run.one_device
HINT = {"data__teacher_prompt": "{prompt} {hint}: {answer}", "data__shuffle": False}
ALL = {"train__steps": 1, "log__samples_every": 1, "log__samples": 8}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Prompts of several lengths, hints of others, and completions."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    tiny_run.write_lines(
        path,
        [
            {
                "prompt": f"{10 ** (i % 4)} + {i} = ?",
                "hint": "so" * (1 + 2 * (i * 5 % 7)),
                "answer": str(10 ** (i % 4) + i),
                "completion": str(10 ** (i % 3) + i),
            }
            for i in range(12)
        ],
    )
    return path


@functools.cache
def models(folder):
    return [hf.load(folder / name) for name in ("student", "teacher")]


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnames="cfg")
def logits(tree, ids, cfg):
    return transformer.logits(tree, ids, cfg=cfg)


def logp(model, prompt, answer):
    """[answer, V] float64, of one row that begins in the first column; nothing reads behind it."""
    cfg, tree = model
    row = [*prompt, *answer]
    ids = jnp.array([row + [0] * (48 - len(row))])
    z = np.asarray(logits(tree, ids, cfg), np.float64)[0, len(prompt) - 1 : len(row) - 1]
    return log_softmax(z[:, : num_ids()])


@functools.cache
def num_ids():
    return tokenizers.num_ids(tokenizer(), 640, "student")


@functools.cache
def tokenizer():
    return tokenizers.load("opd_jax/demo_pair/student")


def reverse(pair, row, own, answer):
    """KL(student || teacher) of every id of an answer, each model behind its own prompt."""
    p, q = logp(pair[0], row, answer), logp(pair[1], own, answer)
    return (np.exp(p) * (p - q)).sum(-1)


def prompts_of(line):
    """The student's prompt and the teacher's, as ids."""
    student = f"{line['prompt']}"
    teacher = f"{line['prompt']} {line['hint']}: {line['answer']}"
    return tokenizer().encode(student), tokenizer().encode(teacher)


@pytest.mark.parametrize("axes", [None, {"mesh__fsdp": 2, "mesh__model": 2}], ids=["one", "mesh"])
def test_on_policy_kl_is_that_of_both_prompts(tiny, rows, tmp_path, monkeypatch, axes):
    if axes is None:
        tiny_run.use_one_device(monkeypatch)
    keys = HINT | ALL | {"data__prompts": rows, "train__microbatches": 1 if axes else 2}
    assert tiny_run.train(tiny, tmp_path / "run", **keys, **(axes or {})) == 0
    (line,) = tiny_run.read_lines(tmp_path / "run" / "samples.jsonl")
    pair, given, measured = models(tiny), tiny_run.read_lines(rows)[:4], []
    for number, sample in enumerate(line["samples"]):
        own = prompts_of(given[number // 2])
        assert sample["prompt"] == tokenizer().decode(own[0])
        assert sample["teacher_prompt"] == tokenizer().decode(own[1])
        expected = reverse(pair, *own, sample["ids"])
        np.testing.assert_allclose(sample["kl_nats"], expected, rtol=2e-4, atol=2e-5)
        plain = reverse(pair, own[0], own[0], sample["ids"])
        assert np.abs(expected - plain).max() > 1e-3  # the hint matters to this teacher
        measured += list(expected)
    (step,) = tiny_run.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert step["kl_nats"] == pytest.approx(np.mean(measured), rel=1e-4)
    assert step["loss"] == pytest.approx(np.mean(measured), rel=1e-4)


@pytest.mark.usefixtures("one_device")
def test_off_policy_loss_is_that_of_both_prompts(tiny, rows, tmp_path):
    keys = HINT | ALL | {"data__prompts": rows, "train__stage": "off_policy"}
    keys |= {"kl__direction": "forward", "kl__ce": 0.3, "train__microbatches": 4}
    assert tiny_run.train(tiny, tmp_path / "run", **keys) == 0
    (step,) = tiny_run.read_lines(tmp_path / "run" / "metrics.jsonl")
    (line,) = tiny_run.read_lines(tmp_path / "run" / "samples.jsonl")
    pair, found = models(tiny), []
    for row, sample in zip(tiny_run.read_lines(rows)[:8], line["samples"], strict=True):
        own, answer = prompts_of(row), sample["ids"]
        p, q = logp(pair[0], own[0], answer), logp(pair[1], own[1], answer)
        forward = (np.exp(q) * (q - p)).sum(-1)
        found += list(0.7 * forward - 0.3 * p[np.arange(len(answer)), answer])
    assert step["loss"] == pytest.approx(np.mean(found), rel=1e-4)


def states(folder, workdir, **keys):
    leaves, rest, _ = tiny_run.saved(folder, workdir, **keys)
    return leaves, rest["latest"]


@pytest.mark.optimized
@pytest.mark.usefixtures("one_device")
def test_the_same_prompt_gives_the_plain_run_bit_for_bit(tiny, rows, tmp_path):
    plain = {"data__prompts": rows, "data__heldout": rows, "train__stage": "mixed"}
    plain |= {"kl__direction": "jsd", "eval__every": 2, "eval__kl_prompts": 5, "eval__batch": 4}
    plain |= {"log__samples_every": 1}
    same = plain | {"data__teacher_prompt": "{prompt}"}
    found = []
    for name, keys in (("plain", plain), ("same", same)):
        assert tiny_run.train(tiny, tmp_path / name, **keys) == 0
        curve = tiny_run.curve(tmp_path / name)
        samples = tiny_run.read_lines(tmp_path / name / "samples.jsonl")
        for line in samples:
            for sample in line["samples"]:
                assert sample.pop("teacher_prompt", sample["prompt"]) == sample["prompt"]
        teacher = json.loads((tmp_path / name / "teacher.json").read_text())
        found.append((curve, samples, teacher["text"], *states(tiny, tmp_path / name, **keys)))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.usefixtures("one_device")
def test_held_out_kl_and_the_teachers_answers_are_behind_its_prompts(tiny, rows, tmp_path, capsys):
    keys = HINT | {"data__prompts": rows, "data__heldout": rows, "eval__every": 1}
    keys |= {"eval__kl_prompts": 5, "eval__batch": 4, "train__steps": 0}
    assert tiny_run.train(tiny, tmp_path / "run", **keys) == 0
    assert "the teacher reads prompts of its own" in capsys.readouterr().out
    parts = assemble.assemble(tiny_run.resolved(tiny, **keys), say=lambda line: None)
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 2**32 - 1))[1]
    pair, found = models(tiny), []
    with jax.set_mesh(parts.mesh):
        student = initial.state(parts).params
        drawn = drawing.sample(
            student, parts.heldout[:5], key, parts.mesh, cfg=parts.cfg.student,
            sampler=parts.policy, **parts.plan.drawing,
        )  # fmt: skip
        sampled = [(meshlib.to_host(rollout), real) for rollout, real in drawn]
    lines = iter(tiny_run.read_lines(rows))
    for rollout, real in sampled:
        for ids, mask in zip(rollout.ids_BT[:real], rollout.mask_BT[:real], strict=True):
            found += list(reverse(pair, *prompts_of(next(lines)), ids[mask].tolist()))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["kl_nats"] == pytest.approx(np.mean(found), rel=1e-4)

    # The teacher answers as it does to a file of those prompts.
    written = tmp_path / "written.jsonl"
    tiny_run.write_lines(
        written,
        [
            {"prompt": tokenizer().decode(prompts_of(row)[1]), "answer": row["answer"]}
            for row in tiny_run.read_lines(rows)
        ],
    )
    plain = keys | {"data__heldout": written, "data__prompts": written, "data__teacher_prompt": ""}
    assert tiny_run.train(tiny, tmp_path / "plain", **plain) == 0
    files = [json.loads((tmp_path / n / "teacher.json").read_text()) for n in ("run", "plain")]
    assert files[0]["text"] == files[1]["text"]
    assert files[0]["how"]["teacher_prompt"] == HINT["data__teacher_prompt"]


@pytest.mark.usefixtures("one_device")
def test_a_resumed_run_goes_on_bit_for_bit_and_other_prompts_are_refused(
    tiny, rows, tmp_path, capsys
):
    keys = HINT | {"data__prompts": rows, "data__shuffle": True, "checkpoint__every": 1}
    assert tiny_run.train(tiny, tmp_path / "whole", **keys) == 0
    folder = tmp_path / "stopped"
    tiny_run.stop_after(tiny, folder, 2, **keys)
    other = keys | {"data__teacher_prompt": "{prompt} {answer}"}
    assert tiny_run.train(tiny, folder, **other) == 1
    assert "data.teacher_prompt" in capsys.readouterr().err
    assert tiny_run.train(tiny, folder, **keys) == 0
    assert tiny_run.curve(folder) == tiny_run.curve(tmp_path / "whole")
    leaves = [states(tiny, tmp_path / name, **keys)[0] for name in ("whole", "stopped")]
    jax.tree.map(np.testing.assert_array_equal, *leaves)
    assert cli.main(["rocks", f"--run={folder}", f"--out={tmp_path / 'rocks'}"]) == 1
    message = capsys.readouterr().err
    assert "read prompts of its own" in message
    assert f"--student={folder} --teacher=" in message


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"data__teacher_prompt": "{prompt} {solution}"},
         ("rows.jsonl:1: `solution`, which data.teacher_prompt names, is not there",)),
        ({"data__teacher_system": "{nothing}"}, ("`nothing`, which data.teacher_system names",)),
        ({"data__teacher_prompt": "{prompt} \\boxed{}"},
         ("data.teacher_prompt is", "{NAME} is a column", "{{ a brace")),
        ({"data__teacher_prompt": "{prompt"}, ("data.teacher_prompt is '{prompt'",)),
        ({"data__teacher_prompt": "{prompt!r}"}, ("data.teacher_prompt is",)),
        ({"data__max_teacher_prompt": -1}, ("data.max_teacher_prompt is -1",)),
        ({"data__teacher_prompt": "{prompt}" * 9, "data__max_prompt": 40},
         ("expected at least one to be left", "max_prompt")),
        ({"data__teacher_prompt": "{prompt}" * 9, "data__too_long": "error",
          "data__max_teacher_prompt": 60},
         ("rows.jsonl:1: the teacher's prompt has", "max_teacher_prompt is 60")),
        ({"data__teacher_prompt": "{prompt}" * 6, "data__max_teacher_prompt": 600},
         ("its longest prompt has", "the teacher has 64 positions",
          "--config.data.max_teacher_prompt")),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("one_device")
def test_what_cannot_be_is_refused(tiny, rows, tmp_path, capsys, keys, parts):
    assert tiny_run.train(tiny, tmp_path / "run", data__prompts=rows, **keys) == 1
    message = capsys.readouterr().err
    for part in parts:
        assert part in message
    assert not (tmp_path / "run" / "run.json").exists()
