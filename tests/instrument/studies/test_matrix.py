"""A real run's matrix: complete, cached cell by cell, and of the right models and texts."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny_run

from opd_jax.data import prompts as prompt_files
from opd_jax.instrument import collect, corpus
from opd_jax.instrument.corpus import Occurrences
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.studies import matrix, persistence
from opd_jax.instrument.studies.matrix import MatrixError
from opd_jax.store import pair as pairs

tiny, one_device, workdir = tiny_run.tiny, tiny_run.one_device, tiny_run.workdir


@pytest.fixture
def job(tiny, workdir, one_device):
    pair = pairs.open_pair(f"{workdir}@last", str(tiny / "teacher"), say=lambda line: None)
    spec = prompt_files.DataSpec(max_prompt=48)
    rows = prompt_files.examples(tiny / "prompts.jsonl", spec, pair.tokenizer)[0][:6]
    return dict(
        run_dir=workdir,
        pair=pair,
        rows=rows,
        max_new=6,
        say=lambda line: None,
    )


def test_a_run_gives_its_matrix_and_goes_on_where_it_was_killed(job, tmp_path, monkeypatch):
    scored, score = [], collect.score

    def count(text, *args, **kwargs):
        scored.append(text)
        if len(scored) == 8:
            raise KeyboardInterrupt
        return score(text, *args, **kwargs)

    monkeypatch.setattr(collect, "score", count)
    with pytest.raises(KeyboardInterrupt):
        matrix.of_run(tmp_path, **job, with_teacher=True)
    found = matrix.of_run(tmp_path, **job, with_teacher=True)
    assert len(scored) == 8 + (3 * 4 - 7)
    told = dict(k=3, rule=Rule(), resamples=200, token_text=job["pair"].text)
    result = persistence.analyse(found, **told)
    assert result["models"] == ["step-0", "step-2", "step-4"]
    assert result["corpora"] == ["step-0", "step-2", "step-4", "teacher"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    again = matrix.of_run(tmp_path, **job, with_teacher=True)
    assert persistence.analyse(again, **told) == result
    assert len(scored) == 13


def test_rows_are_models_and_columns_corpora(tiny, job, tmp_path):
    matrix.of_run(tmp_path, **job, steps=[4])

    def scored(model, text):
        return Occurrences.load(tmp_path / "scores" / f"{model}-on-{text}.npz")

    texts = {name: corpus.read(tmp_path / "corpora" / name) for name in ("step-0", "step-4")}
    assert not np.array_equal(texts["step-0"].token_id, texts["step-4"].token_id)
    students = {"step-0": pairs.load(str(tiny / "student"), job["pair"]), "step-4": None}
    for model, student in students.items():
        for name, text in texts.items():
            expected = collect.score(text, job["pair"], student=student, batch=3)
            found = scored(model, name)
            np.testing.assert_array_equal(found.token_id, text.token_id)
            np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-4, atol=1e-6)
    difference = scored("step-0", "step-4").kl - scored("step-4", "step-4").kl
    assert np.abs(difference).max() > 0.01


def test_the_teacher_writes_its_own_text(tiny, job, tmp_path):
    matrix.of_run(tmp_path, **job, steps=[4], with_teacher=True)
    teacher = pairs.open_pair(str(tiny / "teacher"), str(tiny / "teacher"), say=lambda line: None)
    text = collect.write(tmp_path / "again", teacher, job["rows"], max_new=job["max_new"])
    found = Occurrences.load(tmp_path / "scores" / "step-0-on-teacher.npz")
    np.testing.assert_array_equal(found.token_id, text.token_id)


def test_scores_of_another_corpus_are_measured_again(job, tmp_path):
    matrix.of_run(tmp_path, **job, steps=[4])
    path = tmp_path / "scores" / "step-0-on-step-0.npz"
    good = Occurrences.load(path)
    good.where(np.arange(3)).save(path)
    matrix.of_run(tmp_path, **job, steps=[4])
    np.testing.assert_array_equal(Occurrences.load(path).kl, good.kl)


def test_the_matrix_of_another_run_or_teacher_is_not_taken_over(job, tmp_path):
    matrix.of_run(tmp_path, **job, steps=[4])
    other = dataclasses.replace(job["pair"], teacher_name="other")
    with pytest.raises(MatrixError, match=r"'teacher': 'other'.*give another folder"):
        matrix.of_run(tmp_path, **job | {"pair": other}, steps=[4])
    moved = shutil.copytree(job["run_dir"], tmp_path / "again")
    with pytest.raises(MatrixError, match=r"again.*same run"):
        matrix.of_run(tmp_path, **job | {"run_dir": moved}, steps=[4])


@pytest.mark.parametrize("steps", [[3], [0], []])
def test_a_step_that_was_not_kept_is_named(job, tmp_path, steps):
    with pytest.raises(MatrixError, match=r"steps \[2, 4\], not of.*checkpoint.every"):
        matrix.of_run(tmp_path, **job, steps=steps)
    assert not list(tmp_path.iterdir())
