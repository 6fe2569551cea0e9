"""A run whose rows are packed is, through the command, the run without, and resumes bit for bit."""

import json
import shutil

import numpy as np
import pytest
import tiny_run

tiny, one_device = tiny_run.tiny, tiny_run.one_device
pytestmark = pytest.mark.usefixtures("one_device")
PLAN = {"rock__mode": "ema", "rock__top_k": 8, "checkpoint__every": 2, "train__microbatches": 2}


def metrics(workdir):
    lines = tiny_run.read_lines(workdir / "metrics.jsonl")
    return [line for line in lines if "loss" in line]  # and not those of evaluations


def test_a_packed_run_is_the_run_and_resumes_bit_for_bit(tiny, tmp_path):
    plain, packed, halved = (tmp_path / name for name in ("plain", "packed", "halved"))
    assert tiny_run.train(tiny, plain, **PLAN) == 0
    assert tiny_run.train(tiny, packed, train__pack=True, **PLAN) == 0
    for line, other in zip(metrics(packed), metrics(plain), strict=True):
        for name in ("loss", "kl_nats", "kl_gated", "grad_norm", "gated_share", "mean_length"):
            if other[name] is None:  # nothing was gated yet
                assert line[name] is None
            else:
                assert line[name] == pytest.approx(other[name], rel=1e-4), name
    (found, _, _), (wanted, _, _) = (
        tiny_run.saved(tiny, folder, **PLAN) for folder in (packed, plain)
    )
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-3, atol=1e-4, err_msg=name)
    # As if it had been stopped after two of its four steps.
    shutil.copytree(packed, halved)
    shutil.rmtree(halved / "checkpoints" / "4")
    (halved / "checkpoints" / "lock").write_text("")
    (halved / "summary.json").unlink()
    assert tiny_run.train(tiny, halved, train__pack=True, **PLAN) == 0
    again, _, step = tiny_run.saved(tiny, halved, **PLAN)
    assert step == 4
    for name, leaf in found.items():
        np.testing.assert_array_equal(again[name], leaf, err_msg=name)


def test_given_completions_are_packed_for_adapters(tiny, tmp_path):
    rows = [
        {"prompt": f"{i} + 1 = ?", "completion": "7 " * (1 + 3 * i % 11), "answer": "7"}
        for i in range(12)
    ]
    tiny_run.write_lines(tmp_path / "given.jsonl", rows)
    keys = {
        "data__prompts": tmp_path / "given.jsonl",
        "train__stage": "off_policy",
        "rollout__max_new": 24,
        "rollout__samples": 1,
        "lora__rank": 2,
    }
    found = []
    for pack in (False, True):
        workdir = tmp_path / str(pack)
        assert tiny_run.train(tiny, workdir, train__pack=pack, train__steps=2, **keys) == 0
        found.append(metrics(workdir))
        summary = json.loads((workdir / "summary.json").read_text())
        assert summary["is_finished"]
    for line, other in zip(found[1], found[0], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    shares = [sum(line["padding_share"] for line in lines) for lines in found]
    assert shares[1] < shares[0]  # four long rows may lie as they did


PROMPT = {"data__teacher_prompt": "{prompt} {answer}"}
SEVERAL = {f"teacher__paths__{name}": "embedded:teacher" for name in ("one", "two")}


@pytest.mark.parametrize(
    ("keys", "named"),
    [(PROMPT, "data.teacher_prompt"), (SEVERAL | {"teacher__path": ""}, "teacher.paths")],
)
def test_what_is_not_packed_is_refused(tiny, tmp_path, capsys, keys, named):
    assert tiny_run.train(tiny, tmp_path / "run", train__pack=True, **keys) == 1
    message = capsys.readouterr().err
    assert f"train.pack is True: expected False with {named}" in message
    assert "--config.train.pack" in message
    assert not (tmp_path / "run").exists()
