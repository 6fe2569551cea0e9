"""What every study of the catalogue does: it resumes, refuses, writes its file, draws its plate."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny_run

from opd_jax.instrument import catalogue, corpus, scores, stages
from opd_jax.instrument.catalogue import STUDIES, Study
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.flags import Flags, RocksError, parse
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.studies import gradients, references
from opd_jax.instrument.workbench import Workbench
from opd_jax.report import rock_figures, study_figures, style

tiny, one_device, workdir = tiny_run.tiny, tiny_run.one_device, tiny_run.workdir
every = pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)


def quiet(line):
    pass


def alone(tiny, out, *more):
    """The command line of a student without a run."""
    return [
        f"--student={tiny}/student",
        f"--teacher={tiny}/teacher",
        f"--prompts={tiny}/prompts.jsonl",
        f"--out={out}",
        "--max-new=6",
        "--samples=2",
        "--k=5",
        *more,
    ]


@dataclasses.dataclass(frozen=True)
class Made:
    """A finished folder, what was asked, and what was printed."""

    out: Path
    flags: Flags
    lines: list[str]


def make(flags):
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        stages.run(flags, say=lines.append)
    return Made(Path(flags.out), flags, lines)


@pytest.fixture(scope="module")
def of_run(workdir, tmp_path_factory):
    """Everything that a run can be asked."""
    out = tmp_path_factory.mktemp("studies") / "out"
    return make(Flags(out=str(out), run=str(workdir), k=4, extras=catalogue.NAMES))


@pytest.fixture(scope="module")
def of_folders(tiny, tmp_path_factory):
    """Nothing but the selection, of a student without a run."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return make(parse(alone(tiny, out, "--limit=4")))


def load(path):
    return json.loads(path.read_text())


def test_names_are_different_and_questions_are_questions():
    assert len({*catalogue.NAMES}) == len(STUDIES)
    for study in STUDIES:
        assert study.question.endswith("?")
        assert study.name.isidentifier()


@every
def test_it_writes_its_file_with_question_and_plate(of_run, study):
    out = of_run.out
    told = load(out / study.file)
    assert (told["question"], told["plate"]) == (study.question, study.plate)
    assert len(told) > 3
    assert load(out / "rocks.json")["studies"][study.name] == study.question


@every
def test_its_plate_draws_its_file_from_the_file_alone(of_run, study, tmp_path):
    out = of_run.out
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
    out, flags = of_run.out, of_run.flags
    before = (out / study.file).read_bytes()

    def again(self, bench):
        raise AssertionError(f"{self.name} is answered again")

    monkeypatch.setattr(Study, "fill", again)
    monkeypatch.setattr(stages, "_draw", quiet)
    said = []
    stages.run(dataclasses.replace(flags, extras=(study.name,)), say=said.append)
    assert f"{study.name}: {study.file} is there" in said
    assert (out / study.file).read_bytes() == before


@every
def test_a_killed_one_leaves_no_file_and_is_answered_alike(of_run, one_device, study, monkeypatch):
    """What it needs is there, so that only its own numbers are made again."""
    out, flags = of_run.out, of_run.flags
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
def test_a_student_without_a_run_is_refused_or_enough(
    of_folders, one_device, study, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(stages, "_draw", quiet)
    shutil.copytree(of_folders.out, out)
    said = []
    flags = dataclasses.replace(of_folders.flags, out=str(out), extras=(study.name,))
    stages.run(flags, say=said.append)
    is_told = any(line.startswith(f"{study.name}: left out") and "--run" in line for line in said)
    assert is_told == study.needs_run
    assert (out / study.file).exists() != study.needs_run


@every
def test_a_damaged_file_is_named(of_run, study, tmp_path):
    out = of_run.out
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
    out, flags = of_run.out, of_run.flags
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


def test_a_run_brings_models_prompts_and_length(tiny, workdir, of_run):
    out = of_run.out
    record = load(out / "rocks.json")
    assert record["student"] == f"{workdir}@4"
    assert record["teacher"] == f"{tiny}/teacher"
    assert record["prompts"] == f"{tiny}/prompts.jsonl"
    assert max(len(answer) for answer in corpus.read(out / "corpus").answers) <= 6


def test_references_are_the_student_before_training_and_the_teacher(tiny, workdir, of_run):
    out = of_run.out
    told = load(out / "references.json")
    assert [row["name"] for row in told["joint_metrics"]] == list(scores.JOINT)
    names = [row["name"] for row in told["corpora"]]
    assert names == ["student", "undistilled", "undistilled_own", "teacher"]
    before = corpus.read(out / "references" / "undistilled" / "corpus")
    assert before.info["writer"] == f"{workdir}@0"
    own = Occurrences.load(out / "references" / "undistilled" / "own_scores.npz")
    assert told["corpora"][2]["kl_nats"] == pytest.approx(own.kl.astype(float).mean())
    across = np.array(told["jaccard"])
    assert across.shape == (4, 4)
    np.testing.assert_array_equal(across, across.T)
    np.testing.assert_array_equal(np.diag(across), 1)
    by_chance = np.array(told["jaccard_null"])
    assert (np.diag(by_chance) == 1).all()
    assert (by_chance[~np.eye(4, dtype=bool)] < 1).all()
    assert by_chance[1, 2] > 0  # one text, and so the same frequent types
    assert f"undistilled: written by {workdir}@0" in told["note"]


def test_writers_agree_by_chance_on_what_is_frequent():
    """A type that is all the text is in every top; of types that are alike, chance picks."""
    ids = {"frequent": [0] * 500, "alike": []}
    overlap = {}
    for name, more in ids.items():
        token_id = np.array(more + list(range(1, 41)) * 5, np.int32)
        kl = np.random.default_rng(1).uniform(0, 1, len(token_id))
        blank = np.zeros(len(token_id))
        found = Occurrences(*[blank.astype(np.int32)] * 3, token_id, kl, *[blank] * 4, 64)
        # The same corpus twice: measured, they agree wholly.
        k = 1 if more else 10
        overlap[name] = references.jaccard_by_chance([found] * 2, k, rule=Rule(), seed=0)
    for form in ("jaccard_null", "jaccard_null_within"):  # all of one problem: the same
        assert overlap["frequent"][form] == [[1, 1], [1, 1]]
        # Ten of forty on either side share 2.5 on average.
        assert overlap["alike"][form][0][0] == 1
        assert overlap["alike"][form][0][1] == pytest.approx(2.5 / 17.5, abs=0.04)


def test_the_answers_of_the_student_before_training_are_its_own(tiny, workdir, of_run, tmp_path):
    """The undistilled corpus is what the student folder itself answers to the same prompts."""
    out = of_run.out
    flags = Flags(
        out=str(tmp_path / "out"),
        student=f"{tiny}/student",
        teacher=f"{tiny}/teacher",
        prompts=f"{tiny}/prompts.jsonl",
        max_new=6,
        k=4,
    )
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        stages.run(flags, say=quiet)
    own_answers = corpus.read(tmp_path / "out" / "corpus")
    inside = corpus.read(out / "references" / "undistilled" / "corpus")
    assert [a.tolist() for a in own_answers.answers] == [a.tolist() for a in inside.answers]
    own = Occurrences.load(out / "references" / "undistilled" / "own_scores.npz")
    np.testing.assert_allclose(
        own.kl, Occurrences.load(tmp_path / "out" / "scores" / "student.npz").kl, rtol=1e-5
    )


def test_the_other_questions_leave_their_files(of_run):
    out, lines = of_run.out, of_run.lines
    for name in ("context", "persistence", "optimizer"):
        assert load(out / f"{name}.json")["note"]
        assert any(line.startswith(f"{name}: ") for line in lines)
    assert (out / "scores" / "undistilled.npz").exists()


def test_persistence_compares_the_steps_that_are_named(of_run, workdir, one_device, tmp_path):
    out = of_run.out
    every = [f"step-{step}" for step in (0, 2, 4)]
    assert load(out / "persistence.json")["models"] == every
    given = [f"--run={workdir}", "--k=4", f"--corpus={out}", "--with=persistence"]
    flags = parse([*given, f"--out={tmp_path / 'out'}", "--checkpoints=4,0"])
    stages.run(flags, say=quiet)
    assert load(tmp_path / "out" / "persistence.json")["models"] == [every[0], every[2]]
    with pytest.raises(ValueError, match=r"was made with --checkpoints \[4\], now it is \[2\]"):
        stages.run(dataclasses.replace(flags, checkpoints=(2,)), say=quiet)
    # Another question in between does not forget which steps the file compares.
    without = dataclasses.replace(flags, checkpoints=(), extras=())
    stages.run(without, say=quiet)
    assert load(tmp_path / "out" / "rocks.json")["flags"]["checkpoints"] == [4]
    with pytest.raises(ValueError, match=r"was made with --checkpoints \[4\], now it is \[\]"):
        stages.run(dataclasses.replace(flags, checkpoints=()), say=quiet)
    stages.run(flags, say=quiet)
    with pytest.raises(ValueError, match=r"--checkpoints is '2-4': expected a comma list"):
        parse([*given, "--out=o", "--checkpoints=2-4"])


def test_contexts_say_that_they_weigh_the_rock_score(of_run, workdir, one_device, tmp_path):
    out = of_run.out
    assert "Rock Score" not in load(out / "context.json")["note"]
    said = []
    given = {"run": str(workdir), "corpus": str(out), "k": 4, "extras": ("context",)}
    flags = Flags(out=str(tmp_path / "out"), score="mean", **given)
    stages.run(flags, say=said.append)
    assert any("the top 4 by Rock Score" in line and "--score=mean" in line for line in said)
    assert "not those by mean" in load(tmp_path / "out" / "context.json")["note"]


def test_gradients_add_their_lists(of_run):
    out = of_run.out
    told, lists = load(out / "gradients.json"), load(out / "lists" / "lists.json")
    identities = told["identities"]
    assert identities["contributions_global"] == pytest.approx(identities["norm_global"], rel=1e-3)
    found = Occurrences.load(out / "scores" / "student.npz")
    count_V = TypeStats.of_occurrences(found).count
    for name in ("top_gradient_norm", "top_gradient_alignment"):
        ids = load(out / "lists" / f"{name}.json")
        assert lists[name]["types"] == len(ids) == 4
        assert (count_V[ids] >= 2).all()
    norm = {row["token_id"]: row["norm_of_mean"] for row in told["types"] if row["count"] >= 2}
    top = load(out / "lists" / "top_gradient_norm.json")
    listed = [norm[i] for i in top if i in norm]
    others = [value for i, value in norm.items() if i not in top]
    assert listed == sorted(listed, reverse=True)
    assert not listed or max(others) <= min(listed) * (1 + 1e-5)


def test_what_needs_a_run_is_left_out_with_a_line(tiny, one_device, tmp_path):
    lines = []
    given = alone(tiny, tmp_path / "out", "--limit=4", "--with=references,context")
    stages.run(parse(given), say=lines.append)
    assert any(line.startswith("context: left out") and "--run" in line for line in lines)
    assert not (tmp_path / "out" / "context.json").exists()
    names = [row["name"] for row in load(tmp_path / "out" / "references.json")["corpora"]]
    assert names == ["student", "teacher"]


def test_the_student_is_a_reference_of_its_teacher(tiny, one_device, tmp_path):
    given = alone(tiny, tmp_path / "out", "--limit=4", "--with=references", "--writer=teacher")
    stages.run(parse(given), say=quiet)
    told = load(tmp_path / "out" / "references.json")
    assert [row["name"] for row in told["corpora"]] == ["corpus", "student"]
    assert f"corpus: written by {tiny}/teacher; student: written by {tiny}/student" in told["note"]


def test_groups_of_the_gradients_do_not_share_types(of_folders):
    out = of_folders.out

    class Bench:
        found = Occurrences.load(out / "scores" / "student.npz")
        sums = TypeStats.of_occurrences(found)
        rule = Rule()
        rocks = Rule().rocks(sums, 5)
        flags = Flags(out="o", run="r")

    groups = gradients.disjoint_groups(Bench())
    together = np.concatenate(list(groups.values()))
    assert len(together) == len(np.unique(together))
    assert groups["rock"].tolist() == Bench.rocks.tolist()
    assert (Bench.sums.count[groups["random"]] >= 2).all()
