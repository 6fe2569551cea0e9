"""The parts of a run against each other, before any weight is read."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file

from opd_jax.data import rows
from opd_jax.models import hf
from opd_jax.run import assemble, initial
from opd_jax.spec import ConfigError

tiny, one_device = tiny_run.tiny, tiny_run.one_device


def make(folder, said=None, **keys):
    say = (lambda line: None) if said is None else said.append
    return assemble.assemble(tiny_run.resolved(folder, **keys), say=say)


@pytest.mark.usefixtures("one_device")
def test_the_parts_agree_without_reading_weights(tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights are read last")

    monkeypatch.setattr(hf, "load", refuse)
    said = []
    parts = make(tiny, said)
    assert parts.cfg.student == dataclasses.replace(tiny_run.MODEL, dtype="float32")
    assert parts.cfg.kl.vocab_size == parts.policy.vocab_size == len(parts.tokenizer) == 631
    assert parts.stop_ids == parts.policy.stop_ids == (2,)
    assert len(parts.rows) == 12
    assert parts.heldout == ()
    assert parts.answer_widths == (6,)
    assert parts.prompt_widths == parts.prompt_widths[-1:]
    assert 0 <= parts.prompt_widths[0] - max(len(row.ids) for row in parts.rows) < 8
    assert parts.bias_V is None
    assert any("12 prompts kept" in line for line in said)


@pytest.mark.usefixtures("one_device")
def test_the_state_is_the_student_and_the_template_its_shape(tiny):
    parts = make(tiny)
    state, template = initial.state(parts), initial.state_template(parts)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), template)
    raw = load_file(tiny / "student" / "model.safetensors")
    np.testing.assert_array_equal(state.params["embed"], raw["model.embed_tokens.weight"])
    assert int(state.step) == 0
    other = load_file(tiny / "teacher" / "model.safetensors")
    teacher = initial.teacher_params(parts)
    np.testing.assert_array_equal(teacher["embed"], other["model.embed_tokens.weight"])


@pytest.mark.usefixtures("one_device")
def test_dtypes_are_those_of_the_config(tiny):
    parts = make(tiny, student__param_dtype="bfloat16", teacher__param_dtype="bfloat16")
    assert initial.state(parts).params["embed"].dtype == "bfloat16"
    assert initial.teacher_params(parts)["embed"].dtype == "bfloat16"
    assert make(tiny, student__dtype="bfloat16").cfg.student.dtype == "bfloat16"


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"optim__lr": 1e-6}, ["optim.lr 1e-06", "of the weights", "param_dtype=float32"]),
        ({"optim__name": "signsgd", "optim__lr": 1e-6}, ["of the weights"]),
        ({"optim__name": "sgd", "optim__lr": 0.1}, ["sgd", "param_dtype=float32"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_steps_that_would_be_rounded_away_are_refused(tiny, keys, parts, dtype):
    made = make(tiny, student__param_dtype=dtype, optim__min_lr=0.0, **keys)
    with pytest.raises(ConfigError) as error:
        initial.state(made)
    assert all(part in str(error.value) for part in [*parts, dtype])


@pytest.mark.usefixtures("one_device")
def test_a_model_with_a_nan_is_named(tiny, tmp_path, capsys):
    folder = tiny_run.copy_folder(tiny, tmp_path / "copy")
    path = folder / "teacher" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    save_file(tensors, path)
    assert tiny_run.train(folder, tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert "the teacher cannot be used" in message
    assert "tensor model.layers.1.mlp.down_proj.weight holds 1 of" in message
    assert "optim.lr" not in message


@pytest.mark.usefixtures("one_device")
def test_a_filtered_policy_is_warned_of(tiny):
    said = []
    make(tiny, said, rollout__top_p=0.5)
    assert any(line.startswith("warning: ") and "top_p" in line for line in said)


@pytest.mark.usefixtures("one_device")
def test_a_bias_reaches_its_id(tiny):
    bias_V = make(tiny, rollout__bias="((5, -2.0),)").bias_V
    assert bias_V is not None
    assert bias_V.shape == (640,)
    assert {int(i): float(bias_V[i]) for i in np.flatnonzero(bias_V)} == {5: -2.0}


@pytest.mark.usefixtures("one_device")
def test_the_evaluation_width_is_a_bucket(tiny):
    parts = make(tiny, eval__every=1, data__buckets="(16, 32, 48)")
    longest = max(len(row.ids) for row in parts.heldout)
    assert parts.plan.width == min(width for width in (16, 32, 48) if width >= longest)
    assert parts.plan.size == 8


def test_the_state_lies_on_the_mesh(tiny):
    parts = make(tiny, mesh__data=2, mesh__fsdp=2, mesh__model=2)
    state = initial.state(parts)
    assert len(state.params["embed"].sharding.device_set) == 8
    with jax.set_mesh(parts.mesh):
        template = initial.state_template(parts)
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        if leaf.ndim:
            assert leaf.sharding.spec == like.sharding.spec


@pytest.mark.parametrize(
    "keys",
    [
        {"mesh__data": 8},  # four prompts
        {"mesh__data": 4, "mesh__model": 2, "train__microbatches": 4},  # rows of a micro-batch
    ],
)
def test_a_batch_that_does_not_divide_is_refused(tiny, keys):
    with pytest.raises(ConfigError, match=r"do not divide over \d batch shards"):
        make(tiny, **keys)


@pytest.mark.usefixtures("one_device")
def test_each_file_of_prompts_is_read_once(tiny, monkeypatch):
    counted, read = [], rows.read
    monkeypatch.setattr(rows, "read", lambda path: counted.append(path) or read(path))
    make(tiny)
    assert [path.name for path in counted] == ["prompts.jsonl"]


def cells(folder, **keys):
    """Bytes of keys and values that a run is said to need."""
    found = assemble.needs(make(folder, **keys))
    return next(need.num_bytes for need in found if need.what == assemble.CELLS)


@pytest.mark.usefixtures("one_device")
def test_keys_and_values_are_those_that_are_sampled(tiny, tmp_path):
    completed = tmp_path / "completed.jsonl"
    lines = tiny_run.read_lines(tiny / "prompts.jsonl")
    tiny_run.write_lines(completed, [row | {"completion": row["answer"]} for row in lines])
    off = {"data__prompts": completed, "train__stage": "off_policy"}
    plain, width = cells(tiny), make(tiny).prompt_widths[-1]
    assert plain > 0
    assert cells(tiny, **off) == 0
    assert cells(tiny, **off | {"train__stage": "mixed"}) == plain
    assert cells(tiny, eval__every=1) == plain
    assert cells(tiny, **off, eval__every=1) == plain
    longer = cells(tiny, eval__every=1, eval__max_new=26)
    assert longer == pytest.approx(plain * (width + 26) / (width + 6))
    assert cells(tiny, eval__every=1, eval__samples=3) == 3 * plain
