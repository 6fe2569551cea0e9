"""Which models an analysis compares: references, checks, and the weights of a step of a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from opd_jax import mesh
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf, params, transformer
from opd_jax.store import pair as pairs
from opd_jax.store.pair import ModelError

tiny, workdir = tiny_run.tiny, tiny_run.workdir
PLAN = tiny_run.PLAN


def one():
    return mesh.make(devices=jax.devices()[:1])


def leaves(tree):
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {f".params{jax.tree_util.keystr(path)}": np.asarray(x) for path, x in named}


@pytest.mark.parametrize(("step", "name"), [(2, "2"), (4, "last")])
def test_a_step_of_a_run_has_the_parameters_that_were_saved(tiny, workdir, monkeypatch, step, name):
    pair = pairs.open_pair(f"{workdir}@{name}", f"{tiny}/teacher", mesh=one())
    tiny_run.use_one_device(monkeypatch)
    saved, _, _ = tiny_run.saved(tiny, workdir, step, **PLAN)
    found = leaves(pair.student)
    assert found.keys() == {name for name in saved if name.startswith(".params")}
    for name, x in found.items():
        np.testing.assert_array_equal(x, saved[name], err_msg=name)
    assert pair.student_name == f"{workdir}@{step}"
    assert pair.teacher_name == f"{tiny}/teacher"


def test_step_0_is_the_student_before_training(tiny, workdir):
    pair = pairs.open_pair(f"{workdir}@2", f"{tiny}/teacher", mesh=one())
    before = leaves(pairs.load(f"{workdir}@0", pair))
    _, fresh = hf.load(tiny / "student")
    for name, x in leaves(fresh).items():
        np.testing.assert_array_equal(before[name], x, err_msg=name)
    assert not np.array_equal(leaves(pair.student)[".params['embed']"], before[".params['embed']"])


def test_a_pair_is_ready_to_be_run(tiny):
    pair = pairs.open_pair(f"{tiny}/student", f"{tiny}/teacher", mesh=one())
    assert pair.vocab_size == pair.sampler.vocab_size == pair.cfg.kl.vocab_size == 631
    assert (pair.sampler.temperature, pair.sampler.stop_ids) == (1.0, (2,))
    assert (pair.cfg.rock.mode, pair.cfg.kl.direction, pair.cfg.kl.temperature) == (
        "off",
        "reverse",
        1.0,
    )
    assert pair.cfg.student.dtype == "float32"  # CPU
    assert pair.max_positions == 64
    assert pair.text(4) == tokenizers.token_text(pair.tokenizer, 4)


def test_the_compute_dtype_can_be_chosen(tiny):
    pair = pairs.open_pair(f"{tiny}/student", f"{tiny}/teacher", mesh=one(), dtype="bfloat16")
    assert pair.cfg.student.dtype == pair.cfg.teacher.dtype == "bfloat16"
    assert pair.teacher["embed"].dtype == jnp.bfloat16


def test_a_mesh_shards_the_parameters(tiny):
    pair = pairs.open_pair(f"{tiny}/student", f"{tiny}/teacher", mesh=mesh.make(fsdp=2, model=2))
    assert mesh.batch_shards(pair.mesh) == 4
    assert pair.student["embed"].addressable_shards[0].data.shape == (320, 8)


@pytest.fixture
def wide(tiny, tmp_path):
    """A teacher of the same tokenizer: more vocabulary rows, fewer positions, other stop ids."""
    cfg = dataclasses.replace(tiny_run.MODEL, vocab_size=704, max_positions=48)
    tree = params.init(transformer.specs(cfg), jax.random.key(5))
    tokenizer = tokenizers.load(tiny / "student")
    hf.save(tmp_path / "wide", cfg, tree, tokenizer=tokenizer, eos_ids=[5])
    return tmp_path / "wide"


def test_rows_positions_and_stop_ids_are_made_to_agree(tiny, wide):
    lines = []
    pair = pairs.open_pair(f"{tiny}/student", str(wide), mesh=one(), say=lines.append)
    assert pair.teacher["embed"].shape[0] == 640
    assert pair.cfg.teacher.vocab_size == 640
    assert pair.max_positions == 48
    assert pair.sampler.stop_ids == (2, 5)
    assert len(lines) == 1
    assert "stop on different ids" in lines[0]


def test_another_tokenizer_is_refused(tiny, tmp_path):
    copy = tiny_run.copy_folder(tiny, tmp_path / "copy")
    path = copy / "teacher" / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    (a, i), (b, j) = list(vocab.items())[-2:]
    vocab[a], vocab[b] = j, i
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="tokenizers differ"):
        pairs.open_pair(f"{copy}/student", f"{copy}/teacher", mesh=one())


def test_another_architecture_is_no_student_of_the_pair(tiny, wide):
    pair = pairs.open_pair(f"{tiny}/student", f"{tiny}/teacher", mesh=one())
    with pytest.raises(ModelError, match=r"vocab_size 704 instead of 640.*another reference"):
        pairs.load(str(wide), pair)


def test_what_is_no_model_is_named(tiny, workdir, tmp_path):
    for ref, parts in (
        (str(tmp_path), r"no model.*RUN\[@STEP\]"),
        (f"{tmp_path}@3", r"no run\.json.*workdir"),
        (f"{workdir}@3", r"no checkpoint of step '3'.*\[0, 2, 4\]"),
        (f"{workdir}@best", r"step 'best'.*or last"),
    ):
        with pytest.raises(ModelError, match=parts):
            pairs.resolve(ref)


def test_a_run_alone_is_its_newest_step(workdir):
    assert pairs.resolve(str(workdir)) == pairs.resolve(f"{workdir}@last")
    assert pairs.resolve(str(workdir)).step == 4


def test_a_run_without_a_checkpoint_has_its_step_0(tiny, tmp_path, workdir):
    (tmp_path / "run.json").write_text((workdir / "run.json").read_text())
    assert pairs.resolve(f"{tmp_path}@0").run is None
    with pytest.raises(ModelError, match=r"expected one of \[0\]"):
        pairs.resolve(f"{tmp_path}@last")
