"""What every study of the catalogue does: it resumes, refuses, writes its file, draws its plate."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny_run

from opd_jax.instrument import catalogue, stages
from opd_jax.instrument.catalogue import STUDIES, Study
from opd_jax.instrument.flags import Flags, RocksError, parse
from opd_jax.instrument.workbench import Workbench
from opd_jax.report import rock_figures, study_figures, style

tiny, one_device, workdir = tiny_run.tiny, tiny_run.one_device, tiny_run.workdir
every = pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)


def quiet(line):
    pass


@pytest.fixture(scope="module")
def of_run(workdir, tmp_path_factory):
    """A folder with all questions answered, and its flags."""
    out = tmp_path_factory.mktemp("studies") / "out"
    flags = Flags(out=str(out), run=str(workdir), k=4, extras=catalogue.NAMES)
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        stages.run(flags, say=quiet)
    return out, flags


def load(path):
    return json.loads(path.read_text())


def test_names_are_different_and_questions_are_questions():
    assert len({*catalogue.NAMES}) == len(STUDIES)
    for study in STUDIES:
        assert study.question.endswith("?")
        assert study.name.isidentifier()


@every
def test_it_writes_its_file_with_question_and_plate(of_run, study):
    out, _ = of_run
    told = load(out / study.file)
    assert (told["question"], told["plate"]) == (study.question, study.plate)
    assert len(told) > 3
    assert load(out / "rocks.json")["studies"][study.name] == study.question


@every
def test_its_plate_draws_its_file_from_the_file_alone(of_run, study, tmp_path):
    out, _ = of_run
    (tmp_path / study.file).write_text((out / study.file).read_text())
    with matplotlib.rc_context(style.STYLE):
        plates = rock_figures.plates(tmp_path)
    assert plates
    for plate in plates:
        assert plate.title.endswith("?")
        assert any(char.isdigit() for char in plate.note)
        assert plate.figure.axes


@every
def test_it_is_not_answered_again(of_run, one_device, study, monkeypatch):
    out, flags = of_run
    before = (out / study.file).read_bytes()

    def again(self, bench):
        raise AssertionError(f"{self.name} is answered again")

    monkeypatch.setattr(Study, "fill", again)
    said = []
    stages.run(dataclasses.replace(flags, extras=(study.name,)), say=said.append)
    assert f"{study.name}: {study.file} is there" in said
    assert (out / study.file).read_bytes() == before


@every
def test_a_killed_one_leaves_no_file_and_is_answered_alike(of_run, one_device, study, monkeypatch):
    """What it needs is there, so that only its own numbers are made again."""
    out, flags = of_run
    path = out / study.file
    before = path.read_bytes()
    path.unlink()
    flags = dataclasses.replace(flags, extras=(study.name,))
    with monkeypatch.context() as patch:
        patch.setattr("opd_jax.files.os.fsync", lambda number: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):  # noqa: PT011 (whatever a dying disk says)
            study.fill(Workbench(flags, quiet))
    assert not path.exists()
    study.fill(Workbench(flags, quiet))
    assert path.read_bytes() == before


@every
def test_a_student_without_a_run_is_refused_or_enough(tiny, one_device, study, tmp_path):
    given = [f"--student={tiny}/student", f"--teacher={tiny}/teacher", "--max-new=4", "--k=3"]
    given += [f"--prompts={tiny}/prompts.jsonl", "--limit=4", f"--out={tmp_path / 'out'}"]
    said = []
    stages.run(parse([*given, f"--with={study.name}"]), say=said.append)
    is_told = any(line.startswith(f"{study.name}: left out") and "--run" in line for line in said)
    assert is_told == study.needs_run
    assert (tmp_path / "out" / study.file).exists() != study.needs_run


@every
def test_a_damaged_file_is_named(of_run, study, tmp_path):
    out, _ = of_run
    (tmp_path / study.file).write_text((out / study.file).read_text()[:-20])
    with pytest.raises(RuntimeError, match=rf"{study.name}\.json is damaged"):
        rock_figures.plates(tmp_path)
    told = load(out / study.file) | {"plate": "hologram"}
    (tmp_path / study.file).write_text(json.dumps(told))
    with pytest.raises(RuntimeError, match=r"asks for the plate 'hologram': expected one of"):
        rock_figures.plates(tmp_path)


def test_every_plate_belongs_to_a_study():
    assert {*study_figures.PLATES} == {study.plate for study in STUDIES}


def test_an_unknown_name_is_refused_before_anything_is_made(tmp_path):
    flags = Flags(out=str(tmp_path / "out"), run="r", extras=("context", "no"))
    with pytest.raises(RocksError, match=r"--with names no: .*references,"):
        stages.run(flags, say=quiet)
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_study():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", "from opd_jax import cli; cli.main(['rocks', '--help'])"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}, check=True,
    )  # fmt: skip
    assert ",".join(catalogue.NAMES) in "".join(done.stdout.split())


def test_a_new_study_is_one_record(of_run, one_device, tmp_path, monkeypatch):
    """A question of another module: its record is all that the command and the page need."""
    out, flags = of_run
    new = Study(
        "length",
        "How long are answers?",
        lambda bench: load(out / "references.json") | {"tokens": len(bench.found)},
        plate="references",
    )
    monkeypatch.setattr(catalogue, "STUDIES", (*STUDIES, new))
    monkeypatch.setattr(catalogue, "NAMES", (*catalogue.NAMES, "length"))
    flags = dataclasses.replace(
        flags, out=str(tmp_path / "out"), corpus=str(out), extras=("length",)
    )
    stages.run(flags, say=quiet)
    told = load(tmp_path / "out" / "length.json")
    assert told["tokens"] == len(np.load(out / "scores" / "student.npz")["kl"])
    assert told["question"] == new.question  # not that of the file it copied
    names = [plate.name for plate in _plates(tmp_path / "out")]
    assert names.count("references") == 1


def _plates(folder):
    with matplotlib.rc_context(style.STYLE):
        return rock_figures.plates(folder)
