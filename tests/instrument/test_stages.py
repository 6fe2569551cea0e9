"""The command ``opd-jax rocks``: what it writes, says, refuses and goes on with."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny_run

from opd_jax import cli
from opd_jax.instrument import collect, controls, corpus, scores, stages
from opd_jax.instrument.corpus import Occurrences, TypeStats
from opd_jax.instrument.flags import Flags, parse
from opd_jax.instrument.ranking import Rule

tiny, one_device, workdir = tiny_run.tiny, tiny_run.one_device, tiny_run.workdir
PLAN = tiny_run.PLAN
FILES = ("rocks.json", "types.csv", "selection.json", "summary.json", "reader.json")


def argv(tiny, out, *more):
    return [
        "rocks",
        f"--student={tiny}/student",
        f"--teacher={tiny}/teacher",
        f"--prompts={tiny}/prompts.jsonl",
        f"--out={out}",
        "--max-new=6",
        "--samples=2",
        "--k=5",
        *more,
    ]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A finished folder, and what was printed."""
    out = tmp_path_factory.mktemp("made") / "out"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        stages.run(parse(argv(tiny, out)[1:]), say=lines.append)
    return out, lines


def load(path):
    return json.loads(path.read_text())


def test_the_files_are_there_and_agree(made):
    out, _ = made
    for name in FILES:
        assert (out / name).is_file()
    found = Occurrences.load(out / "scores" / "student.npz")
    answers = corpus.read(out / "corpus")
    stats = TypeStats.of_occurrences(found)
    told = load(out / "summary.json")
    assert told["tokens"] == len(found) == answers.num_positions
    assert (told["problems"], told["answers"]) == (12, 24)
    assert told["types_seen"] == len(np.unique(found.token_id))
    assert told["kl_nats"] == pytest.approx(found.kl.astype(float).mean())
    members = load(out / "lists" / "rock.json")
    assert members == Rule().rocks(stats, 5).tolist()
    by_hand = sum(found.kl[found.token_id == i].astype(float).sum() for i in members)
    assert told["coverage_in_sample"] == pytest.approx(by_hand / found.kl.astype(float).sum())
    (row,) = (r for r in load(out / "selection.json")["coverage"] if r["k"] == 5)
    for name in ("low", "high", "null", "null_within"):
        assert told[f"coverage_{name}"] == row[name]
    assert told["coverage"] == row["value"] < told["coverage_in_sample"]
    inside = np.isin(found.token_id, members)
    assert told["density_corpus"] == pytest.approx(inside.mean())
    per_answer = [inside[found.answer == i].mean() for i in range(24)]
    assert told["density_median"] == pytest.approx(np.median(per_answer))
    assert [row["token_id"] for row in told["rocks"]] == members
    record = load(out / "rocks.json")
    assert record["writer"] == record["student"]
    assert record["flags"]["max_new"] == 6
    assert record["versions"]["jax"]


def test_the_table_of_types_is_complete_and_exact(made):
    out, _ = made
    found = Occurrences.load(out / "scores" / "student.npz")
    with (out / "types.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {int(row["token_id"]) for row in rows} == set(found.token_id.tolist())
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    assert [row["member"] for row in rows] == ["1"] * 5 + ["0"] * (len(rows) - 5)
    sums = [float(row["kl_sum"]) for row in rows]
    assert sums == sorted(sums, reverse=True)
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-4)
    assert sum(float(row["token_share"]) for row in rows) == pytest.approx(1, abs=1e-4)
    for row in rows:
        here = found.where(found.token_id == int(row["token_id"]))
        assert int(row["count"]) == len(here)
        assert float(row["kl_mean"]) == pytest.approx(here.kl.mean(), rel=1e-4)
        assert float(row["log_ratio_mean"]) == pytest.approx(here.log_ratio.mean(), rel=1e-3)
        assert float(row["entropy_mean"]) == pytest.approx(here.entropy.mean(), rel=1e-4)
        assert (row["kl_std"] == "") == (len(here) == 1)
        if len(here) > 1:
            spread = here.kl.astype(float).std(ddof=1)
            assert float(row["kl_std"]) == pytest.approx(spread, rel=1e-3, abs=1e-4)
        assert float(row["rock"]) == float(row["kl_sum"])
    assert set(scores.METRICS) < set(rows[0])


def test_lists_can_be_gated_and_say_what_they_stand_for(made):
    out, _ = made
    found = Occurrences.load(out / "scores" / "student.npz")
    told = load(out / "lists" / "lists.json")
    assert set(told) == {"rock", *controls.CONTROLS}
    for name, entry in told.items():
        ids = load(out / "lists" / f"{name}.json")
        assert entry["types"] == len(ids) == len(set(ids))
        inside = np.isin(found.token_id, ids)
        assert entry["token_share"] == pytest.approx(inside.mean())
        share = found.kl[inside].astype(float).sum() / found.kl.astype(float).sum()
        assert entry["kl_share"] == pytest.approx(share)
    assert told["rock"]["residual"] is None
    assert told["hungarian"]["residual"]["overlap"] == 0
    rocks = load(out / "lists" / "rock.json")
    shares = [np.isin(ids, rocks).mean() for ids in corpus.read(out / "corpus").answers]
    assert load(out / "selection.json")["answer_shares"] == pytest.approx(shares)


def test_the_reader_shows_answers_as_they_are(made):
    out, _ = made
    answers = corpus.read(out / "corpus")
    found = Occurrences.load(out / "scores" / "student.npz")
    members = set(load(out / "lists" / "rock.json"))
    shown = load(out / "reader.json")["answers"]
    assert len(shown) == 8
    assert len({(a["problem"], a["text"]) for a in shown}) >= 6
    for answer in shown:
        tokens = answer["tokens"]
        ids = tokens["id"]
        at = [i for i, a in enumerate(answers.answers) if a.tolist() == ids]
        at = [i for i in at if answers.problem_A[i] == answer["problem"]]
        assert at
        here = found.where(found.answer == at[0])
        np.testing.assert_allclose(tokens["kl"], here.kl, atol=1e-5)
        np.testing.assert_allclose(tokens["logp"], here.logp, atol=1e-5)
        teacher = here.logp - here.log_ratio
        np.testing.assert_allclose(tokens["teacher_logp"], teacher, atol=2e-5)
        assert tokens["rock"] == [i in members for i in ids]
        assert tokens["weight"] == [0.0 if i in members else 1.0 for i in ids]
        assert all((rank <= 5) == (i in members) for i, rank in zip(ids, tokens["rank"]))  # noqa: B905
        assert {len(column) for column in tokens.values()} == {len(ids)}


def test_it_says_what_was_found_and_where_it_is(made):
    out, lines = made
    text = "\n".join(lines)
    told = load(out / "summary.json")
    for part in (
        f"{told['coverage']:.1%}",
        f"(measured where chosen: {told['coverage_in_sample']:.1%})",
        f"shuffled among tokens the top 5 would carry {told['coverage_null']:.1%}",
        f"within problems {told['coverage_null_within']:.1%}",
        "chosen on some of 12 problems",
        f"Jaccard {told['split_half']:.2f}",
        f"{told['density_median']:.1%}",
        str(out / "types.csv"),
        str(out / "reader.json"),
        repr(told["rocks"][4]["token"]),
    ):
        assert part in text
    assert "12 prompts kept" in text


def test_a_second_call_does_nothing_again(tiny, made, one_device, monkeypatch):
    out, _ = made
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file() and "figures" not in str(f)}
    lines = []
    monkeypatch.setattr(collect, "write", None)
    monkeypatch.setattr(collect, "score_types", None)
    stages.run(parse(argv(tiny, out, "--batch=3")[1:]), say=lines.append)
    assert "summary.json is there" in "\n".join(lines)
    assert "loading" not in "\n".join(lines)
    for path, content in before.items():
        if path.name != "rocks.json":
            assert path.read_bytes() == content


class Killed(BaseException):
    """Stands for a kill."""


def test_a_killed_command_goes_on(tiny, made, one_device, tmp_path, monkeypatch):
    out, _ = made
    write = corpus.write_answers

    def dying(folder, number, rows):
        if number == 2:
            raise Killed
        write(folder, number, rows)

    given = argv(tiny, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_answers", dying)
        with pytest.raises(Killed):
            cli.main([*given, "--batch=4", "--slots=3"])
    with monkeypatch.context() as patch:
        patch.setattr(stages, "_write_selection", lambda bench: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            cli.main(given)
    assert (tmp_path / "out" / "scores" / "student.npz").exists()
    assert cli.main(given) == 0
    for name in ("types.csv", "lists/rock.json", "summary.json", "reader.json"):
        assert (tmp_path / "out" / name).read_text() == (out / name).read_text()


@pytest.fixture
def refused(capsys):
    def run(given):
        assert cli.main(given) == 1
        message = capsys.readouterr().err
        assert message.startswith("opd-jax rocks: ")
        assert "expected" in message
        return message

    return run


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--seed=1", "--seed 0, now it is 1"),
        ("--k=4", "--k 5, now it is 4"),
        ("--limit=3", "--limit None, now it is 3"),
        ("--writer=teacher", "about the writer"),
    ],
)
def test_other_flags_are_refused(tiny, made, one_device, refused, flag, named):
    out, _ = made
    before = (out / "rocks.json").read_text()
    message = refused(argv(tiny, out, flag))
    assert named in message
    assert f"--corpus={out}" in message
    assert (out / "rocks.json").read_text() == before


def test_too_many_rocks_are_refused_and_fewer_go_on(tiny, one_device, tmp_path, refused):
    given = argv(tiny, tmp_path / "out", "--limit=3")
    message = refused([*given, "--k=600"])
    assert "k 600" in message
    assert "lower --k" in message
    assert not (tmp_path / "out" / "summary.json").exists()
    assert cli.main([*given, "--k=3"]) == 0
    assert len(load(tmp_path / "out" / "lists" / "rock.json")) == 3


def test_a_folder_of_something_else_is_refused(tiny, one_device, tmp_path, refused):
    (tmp_path / "notes.txt").write_text("mine")
    assert "notes.txt and no rocks.json" in refused(argv(tiny, tmp_path))
    assert "another --out" in refused(argv(tiny, tmp_path / "notes.txt"))
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_a_refused_command_can_be_corrected(tiny, one_device, tmp_path, refused):
    """What made nothing does not hold its folder: not by a mistyped file, nor by a flag."""
    given = [*argv(tiny, tmp_path / "out"), "--k=3"]
    assert "does not exist" in refused([*given, f"--prompts={tmp_path}/no.jsonl"])
    assert "--max-new is 900" in refused([*given, "--max-new=900"])
    message = refused([*given, "--limit=1"])
    assert "1 prompt of" in message
    assert "raise --limit" in message
    assert cli.main([*given, "--limit=2"]) == 0
    assert load(tmp_path / "out" / "rocks.json")["flags"]["limit"] == 2


def test_scores_that_are_not_finite_are_told_by_their_place(
    tiny, made, one_device, tmp_path, refused, monkeypatch
):
    """Whose sums differ as well (nan is no nan) and would be laid on the devices."""
    source, _ = made
    score = collect.score_types

    def broken(*args, **more):
        found, _ = score(*args, **more)
        kl = found.kl.copy()
        kl[np.flatnonzero((found.answer == 3) & (found.position == 1))] = np.nan
        found = dataclasses.replace(found, kl=kl)
        return found, TypeStats.of_occurrences(found)

    monkeypatch.setattr(collect, "score_types", broken)
    out = tmp_path / "out"
    given = ["rocks", f"--student={tiny}/student", f"--teacher={tiny}/teacher", "--k=5"]
    message = refused([*given, f"--corpus={source}", f"--out={out}"])
    assert "KL at position 1 of answer 3 is nan" in message
    assert not (out / "scores").exists()


def test_an_empty_prompt_file_is_refused(tiny, one_device, tmp_path, refused):
    (tmp_path / "empty.jsonl").write_text("")
    message = refused(argv(tiny, tmp_path / "out", f"--prompts={tmp_path}/empty.jsonl"))
    assert "empty.jsonl is empty" in message


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "no models"),
        ({"run": "r", "student": "s"}, "--run=r, --student=s"),
        ({"student": "s", "prompts": "p"}, "both --student and --teacher"),
        ({"student": "s", "teacher": "t", "step": 3, "prompts": "p"}, "--step is 3 without --run"),
        ({"student": "s", "teacher": "t"}, "no --prompts"),
        ({"run": "r", "corpus": "c", "limit": 3, "writer": "t"}, "--limit, --writer"),
        ({"run": "r", "samples": 0}, "--samples is 0"),
        ({"run": "r", "slots": -1}, "--slots is -1"),
        ({"run": "r", "k": 0}, "--k is 0"),
        ({"run": "r", "score": "best"}, "--score"),
        ({"run": "r", "checkpoints": (2,)}, "--checkpoints names 2 without"),
    ],
)
def test_flags_that_do_not_fit_are_named(given, named):
    with pytest.raises(ValueError, match=named):
        Flags(out="o", **given)


def test_a_step_without_checkpoint_and_a_folder_without_run(workdir, tmp_path, refused):
    assert "step '3'" in refused(["rocks", f"--run={workdir}", "--step=3", f"--out={tmp_path}/o"])
    assert "no run.json" in refused(["rocks", f"--run={tmp_path}", f"--out={tmp_path}/o"])
    assert not (tmp_path / "o").exists()


def test_a_mesh_that_does_not_fit(tiny, tmp_path, refused, capsys):
    message = refused(argv(tiny, tmp_path / "out", "--mesh-fsdp=3"))
    assert "--mesh-fsdp is 3 and --mesh-model 1 on 8 devices" in message
    message = refused(argv(tiny, tmp_path / "out", "--slots=12"))
    assert "slots is 12 for batches of 32 rows over 8 batch shards" in message
    assert not (tmp_path / "out").exists()
    assert cli.main(argv(tiny, tmp_path / "out", "--mesh-model=8")) == 1
    message = capsys.readouterr().err
    assert "the student has 2 key/value heads" in message
    assert "does not divide over 8 shards" in message
    assert "choose --mesh-model" in message


def test_answers_can_be_used_again(tiny, made, workdir, one_device, tmp_path, monkeypatch):
    source, _ = made
    monkeypatch.setattr(collect, "write", None)
    given = ["rocks", f"--run={workdir}", f"--corpus={source}", "--k=3", f"--out={tmp_path}/out"]
    assert cli.main(given) == 0
    again, first = corpus.read(tmp_path / "out" / "corpus"), corpus.read(source / "corpus")
    assert [a.tolist() for a in again.answers] == [a.tolist() for a in first.answers]
    assert load(tmp_path / "out" / "rocks.json")["writer"] == f"{tiny}/student"
    found = Occurrences.load(tmp_path / "out" / "scores" / "student.npz")
    other = Occurrences.load(source / "scores" / "student.npz")
    assert found.token_id.tolist() == other.token_id.tolist()
    assert not np.allclose(found.kl, other.kl, rtol=1e-3)


def test_training_prompts_in_place_of_held_out_ones_are_told(tiny, workdir, one_device, tmp_path):
    lines = []
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    record = load(run / "run.json")
    record["config"]["data.heldout"] = ""
    (run / "run.json").write_text(json.dumps(record))
    flags = Flags(out=str(tmp_path / "out"), run=str(run), k=4, limit=4)
    stages.run(flags, say=lines.append)
    assert any("the ones it trained on" in line for line in lines)
