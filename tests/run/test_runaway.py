"""A teacher that stops by another id: learnt as the plain one is, and a guard where it is not."""

import json

import numpy as np
import pytest
import runaway
import tiny_run
from safetensors.numpy import load_file, save_file

from opd_jax.run import assemble
from opd_jax.store import workdir as workdirs

tiny, one_device = tiny_run.tiny, tiny_run.one_device
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def swapped(tiny, tmp_path):
    """The tiny pair, its teacher with the rows of its stop id and of another exchanged."""
    folder = tiny_run.copy_folder(tiny, tmp_path / "swapped")
    teacher = folder / "teacher"
    weights = load_file(teacher / "model.safetensors")
    head = weights["model.embed_tokens.weight"].copy()
    head[[runaway.ENDS, runaway.OTHER]] = head[[runaway.OTHER, runaway.ENDS]]
    save_file(weights | {"lm_head.weight": head}, teacher / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((teacher / name).read_text()) | {"eos_token_id": runaway.OTHER}
        fields |= {"tie_word_embeddings": False} if name == "config.json" else {}
        (teacher / name).write_text(json.dumps(fields))
    path = teacher / "tokenizer_config.json"
    tokens = json.loads((teacher / "tokenizer.json").read_text())["model"]["vocab"]
    text = next(token for token, i in tokens.items() if i == runaway.OTHER)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": text}))
    return folder


def stop_by_both(folder):
    """Let both models of a folder stop by both ids."""
    for name in ("student", "teacher"):
        path = folder / name / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 2]}))
    return folder


def test_by_default_stop_ids_are_merged_where_the_models_differ(tiny, swapped, capsys):
    assert assemble.assemble(tiny_run.resolved(tiny)).cfg.kl.stop_ids == ()
    parts = assemble.assemble(tiny_run.resolved(swapped))
    assert parts.cfg.kl.stop_ids == parts.stop_ids == (0, 2)
    assert parts.cfg.rock.never == (0, 2)
    assert "the KL counts the stop ids (0, 2) as one event" in capsys.readouterr().out
    off = assemble.assemble(tiny_run.resolved(swapped, kl__merge_stops="off", rock__stops=True))
    assert off.cfg.kl.stop_ids == off.cfg.rock.never == ()


def test_the_other_stop_id_makes_no_difference(tiny, swapped, tmp_path):
    """Merged, the teacher that ends by another id teaches what the plain one does."""
    plain = stop_by_both(tiny_run.copy_folder(tiny, tmp_path / "plain"))
    for folder in (plain, swapped):
        assert tiny_run.train(folder, tmp_path / f"run-{folder.name}", kl__merge_stops="on") == 0
    ours, theirs = (tiny_run.curve(tmp_path / f"run-{name}") for name in ("plain", "swapped"))
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "kl_nats", "grad_norm", "mean_length", "stop_kl_share"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    assert tiny_run.train(swapped, tmp_path / "off", kl__merge_stops="off", train__steps=1) == 0
    assert tiny_run.curve(tmp_path / "off")[0]["loss"] != pytest.approx(ours[0]["loss"], rel=1e-4)
    assert workdirs.require_run(tmp_path / "run-swapped")["stop_ids"] == [0, 2]


def test_the_guard_stops_a_run_whose_answers_never_end(tiny, tmp_path, capsys):
    """The tiny models seldom end within six tokens."""
    workdir = tmp_path / "run"
    keys = {"train__max_truncated": 0.5, "train__truncated_steps": 2}
    assert tiny_run.train(tiny, workdir, **keys) == 1
    message = capsys.readouterr().err
    assert "step 2: " in message
    assert "expected at most train.max_truncated (50%)" in message
    assert "--config.rollout.max_new" in message
    assert tiny_run.saved(tiny, workdir)[2] == 2
    assert tiny_run.train(tiny, workdir, train__max_truncated=1) == 0  # goes on
    assert [line["step"] for line in tiny_run.curve(workdir)] == [1, 2, 3, 4]


@pytest.mark.ci
@pytest.mark.optimized  # its steps take longer than its programs take to compile
def test_the_demo_learns_from_a_teacher_that_ends_otherwise(tmp_path):
    """As with the plain teacher; without the merge every answer is cut within ten steps."""
    teacher = runaway.make_teacher(tmp_path / "teacher")
    demo = ["train", f"--config.teacher.path={teacher}", "--config.eval.every=60"]
    after = {}
    for merge, steps in {"auto": 60, "off": 12}.items():
        workdir = tmp_path / merge
        assert tiny_run.cli.main([*demo, f"--config=configs/demo.py:steps={steps}",
                                  f"--config.kl.merge_stops={merge}",
                                  f"--workdir={workdir}"]) == 0  # fmt: skip
        after[merge] = json.loads((workdir / "summary.json").read_text())["after"]
    assert after["auto"]["accuracy"] > 0.4
    assert after["auto"]["truncated_share"] < 0.05
    assert after["off"]["accuracy"] < 0.05
    assert np.isclose(after["off"]["truncated_share"], 1.0, atol=0.1)
