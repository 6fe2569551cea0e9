"""What a workdir is taken for: a resume proves that it goes on with what the run was started on."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_run

from opd_jax import optim
from opd_jax.models import hf
from opd_jax.run import entry, iteration, train
from opd_jax.store import fingerprint
from opd_jax.store import workdir as workdirs

tiny = tiny_run.tiny
one_device = tiny_run.one_device
pytestmark = pytest.mark.usefixtures("one_device")
HALF = {"train__steps": 4, "checkpoint__every": 2, "eval__every": 2, "eval__batch": 8}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A folder of models and prompts, and a finished run on it; tests work on copies."""
    top = tmp_path_factory.mktemp("entry")
    tiny_run.copy_folder(tiny, top / "inputs")
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert tiny_run.train(top / "inputs", top / "run", **HALF) == 0
    return top


@pytest.fixture
def copies(trained, tmp_path, monkeypatch):
    """(inputs, workdir) under the paths that the run knows, put back afterwards."""
    kept = tmp_path / "kept"
    shutil.copytree(trained, kept)
    yield trained / "inputs", trained / "run"
    shutil.rmtree(trained)
    shutil.move(kept, trained)


def refused(capsys, inputs, workdir, **keys):
    """The message of a resume that has to be refused, and changes nothing."""
    before = sorted((f, f.read_bytes()) for f in workdir.rglob("*") if f.is_file())
    assert tiny_run.train(inputs, workdir, **(HALF | {"train__steps": 5} | keys)) == 1
    assert sorted((f, f.read_bytes()) for f in workdir.rglob("*") if f.is_file()) == before
    return capsys.readouterr().err


def change_weights(folder):
    cfg, tree = hf.load(folder)
    tree["final_norm"] = tree["final_norm"].at[0].add(1e-3)
    other = folder.parent / "other"
    hf.save(other, cfg, tree)
    shutil.move(other / "model.safetensors", folder / "model.safetensors")


def add_newline(path):
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: change_weights(f / "teacher"), ["another teacher", "model.safetensors is"]),
        (lambda f: change_weights(f / "student"), ["another student", "model.safetensors is"]),
        (
            lambda f: add_newline(f / "teacher/tokenizer.json"),
            ["another teacher", "tokenizer.json"],
        ),
        (
            lambda f: add_newline(f / "student/chat_template.jinja"),
            ["another student", "chat_template.jinja"],
        ),
        (
            lambda f: (f / "student" / "generation_config.json").unlink(),
            ["another student", "generation_config.json is gone"],
        ),
        (
            lambda f: (f / "teacher" / "special_tokens_map.json").write_text("{}"),
            ["another teacher", "special_tokens_map.json is new"],
        ),
    ],
)
def test_a_changed_model_is_refused(copies, capsys, change, parts):
    inputs, workdir = copies
    change(inputs)
    message = refused(capsys, inputs, workdir)
    assert all(part in message for part in [*parts, "put them back", "--config.init_from"]), message


def test_changed_heldout_prompts_are_refused(copies, capsys, tmp_path):
    """They are another file here, whose change the prompts to train on do not show."""
    inputs, _ = copies
    keys = {"data__heldout": inputs / "heldout.jsonl"}
    shutil.copy(inputs / "prompts.jsonl", inputs / "heldout.jsonl")
    workdir = tmp_path / "run"
    assert tiny_run.train(inputs, workdir, **(HALF | keys)) == 0
    rows = tiny_run.read_lines(inputs / "heldout.jsonl")
    rows[3]["answer"] = "7"
    tiny_run.write_lines(inputs / "heldout.jsonl", rows)
    message = refused(capsys, inputs, workdir, **keys)
    assert "other held-out prompts" in message
    assert "heldout.jsonl is another" in message


def test_what_was_not_read_before_is_noted_when_it_is(tiny, tmp_path):
    workdir = tmp_path / "run"
    assert tiny_run.train(tiny, workdir, train__steps=2) == 0
    assert "heldout" not in workdirs.read_run(workdir)["inputs"]
    assert tiny_run.train(tiny, workdir, train__steps=3, eval__every=1, eval__batch=8) == 0
    assert set(workdirs.read_run(workdir)["inputs"]) == {"student", "teacher", "prompts", "heldout"}


def test_the_analyses_of_a_run_refuse_changed_models_too(copies, capsys):
    inputs, workdir = copies
    change_weights(inputs / "teacher")
    from opd_jax import cli

    argv = ["rocks", f"--run={workdir}", "--k=4", f"--out={inputs / 'rocks'}"]
    assert cli.main(argv) == 1
    assert "another teacher" in capsys.readouterr().err


def test_large_files_are_told_apart_by_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1 << 16)
    monkeypatch.setattr(fingerprint, "HEAD_BYTES", 1 << 10)
    monkeypatch.setattr(fingerprint, "SAMPLES", 64)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 64)
    values = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)
    path = tmp_path / "model.safetensors"
    found = set()
    trained = values + np.float32(1e-6)
    longer, moved = np.append(values, 0), np.concatenate([values[-1:], values[:-1]])
    for data in (values, values, trained, longer, moved, values * (np.arange(1 << 18) < 250_000)):
        data.astype(np.float32).tofile(path)
        found.add(fingerprint.of_file(path))
    assert len(found) == 5


DATED = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_run_renders_with_the_date_on_which_it_started(tiny, tmp_path, monkeypatch):
    folder = tiny_run.copy_folder(tiny, tmp_path / "copy")
    for name in ("student", "teacher"):
        (folder / name / "chat_template.jinja").write_text(DATED)
    rows = [
        {"messages": [{"role": "user", "content": f"{i} + 1"}], "answer": "2"} for i in range(8)
    ]
    tiny_run.write_lines(folder / "prompts.jsonl", rows)
    keys = {"log__samples_every": 1, "data__shuffle": False}
    with monkeypatch.context() as patch:
        patch.setattr(workdirs, "timestamp", lambda: "2019-02-01T23:59:59Z")
        assert tiny_run.train(folder, tmp_path / "run", **keys, train__steps=2) == 0
    assert tiny_run.train(folder, tmp_path / "run", **keys, train__steps=3) == 0
    samples = tiny_run.read_lines(tmp_path / "run" / "samples.jsonl")
    assert [line["step"] for line in samples] == [0, 1, 2]
    assert all("01 February 2019" in s["prompt"] for line in samples for s in line["samples"])
    # A new run writes today's.
    assert tiny_run.train(folder, tmp_path / "new", **keys, train__steps=1) == 0
    samples = tiny_run.read_lines(tmp_path / "new" / "samples.jsonl")
    assert all("2019" not in s["prompt"] for line in samples for s in line["samples"])


def test_a_run_that_ended_before_its_first_step_does_not_own_the_workdir(
    tiny, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"

    def out_of_memory(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as patch:
        patch.setattr(iteration, "one_step", out_of_memory)
        assert tiny_run.train(tiny, workdir, eval__every=4, eval__batch=8) == 1
    assert workdirs.read_run(workdir)["config"]["optim.lr"] == 1e-2
    assert tiny_run.train(tiny, workdir, optim__lr=2e-2, train__prompts=2) == 0
    assert "ended before its first step" in capsys.readouterr().out
    record = workdirs.read_run(workdir)
    assert (record["config"]["optim.lr"], record.get("resumed")) == (2e-2, None)
    assert [line["step"] for line in tiny_run.curve(workdir)] == [1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_over_and_says_so(tiny, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert tiny_run.train(tiny, workdir) == 0
    whole = tiny_run.curve(workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "checkpoints" / "lock").write_text("")  # as it is before the first save
    capsys.readouterr()
    assert tiny_run.train(tiny, workdir) == 0
    assert "before its first checkpoint: it starts over" in capsys.readouterr().out
    assert tiny_run.curve(workdir) == whole


@pytest.mark.parametrize("left", [None, [], ["lock"]], ids=["no folder", "empty", "only the lock"])
def test_lost_checkpoints_are_refused(copies, capsys, left):
    inputs, workdir = copies
    folder = workdir / "checkpoints"
    lock = (folder / "lock").read_text()
    shutil.rmtree(folder)
    if left is not None:
        folder.mkdir()
        for name in left:
            (folder / name).write_text(lock)
    message = refused(capsys, inputs, workdir)
    assert "tells of 4 steps" in message
    assert "put them back, or give another --workdir" in message


def test_lost_lines_of_metrics_are_said(copies, capsys):
    inputs, workdir = copies
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"step": 3,' not in line))
    assert tiny_run.train(inputs, workdir, **(HALF | {"train__steps": 5})) == 0
    assert "lost the lines of 1 of the 4 steps until here (3)" in capsys.readouterr().out


def test_a_longer_schedule_says_what_it_does_to_the_learning_rate(copies, capsys):
    inputs, workdir = copies
    assert tiny_run.train(inputs, workdir, **(HALF | {"train__steps": 40})) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "learning rate now" in x]
    lr = tiny_run.curve(workdir)[-2]
    spec = tiny_run.resolved(inputs, **HALF).optim
    rates = [optim.schedule(spec)(4)]
    spec = tiny_run.resolved(inputs, **(HALF | {"train__steps": 40})).optim
    rates.append(optim.schedule(spec)(4))
    assert "schedule of 40 steps and not of 4" in line
    assert f"goes on at {float(rates[1]):.3g}, where the old one had {float(rates[0]):.3g}" in line
    assert lr["step"] == 40


def test_epochs_end_the_schedule_where_they_end_the_run(tiny, tmp_path, capsys):
    workdir = tmp_path / "run"
    keys = {"data__epochs": 1, "train__steps": 50, "optim__warmup": 0.0}  # 12 prompts: 3 steps
    assert tiny_run.train(tiny, workdir, **keys) == 0
    assert "used up after 3 steps" in capsys.readouterr().out
    rates = [line["lr"] for line in tiny_run.curve(workdir)]
    short = tmp_path / "short"
    assert tiny_run.train(tiny, short, train__steps=3, optim__warmup=0.0) == 0
    assert rates == [line["lr"] for line in tiny_run.curve(short)]
    assert workdirs.read_run(workdir)["config"]["optim.steps"] == 3


@pytest.mark.parametrize("name", ["lr[1e-3,1e-4]", "a*b?", "back\\slash", "{x} 'y' $z", "üñ%20"])
def test_a_workdir_of_any_name_saves_what_can_be_read(tiny, tmp_path, name, capsys):
    workdir = tmp_path / name / "run"
    assert tiny_run.train(tiny, workdir, train__steps=2) == 0
    assert tiny_run.train(tiny, workdir, train__steps=3) == 0
    assert "at step 2" in capsys.readouterr().out


def test_the_home_folder_may_be_written_short(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "models")
    keys = {"student__path": "~/models/student", "data__prompts": "~/models/prompts.jsonl"}
    assert tiny_run.train(tiny, "~/run", train__steps=1, **keys) == 0
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


# Starting from another run


def start_from(tiny, workdir, ref, **keys):
    return tiny_run.train(tiny, workdir, init_from=ref, train__steps=2, **keys)


def test_a_run_starts_from_the_weights_of_another(trained, tmp_path):
    inputs, source = trained / "inputs", trained / "run"
    plan = {"optim__lr": 1e-9, "optim__min_lr": 0.0}
    assert start_from(inputs, tmp_path / "new", f"{source}@2", **plan) == 0
    then, _, _ = tiny_run.saved(inputs, source, 2, **HALF)
    now, rest, _ = tiny_run.saved(inputs, tmp_path / "new", 2, train__steps=2, **plan)
    for name in then:
        if name.startswith(".params"):
            np.testing.assert_allclose(now[name], then[name], atol=1e-7, err_msg=name)
    assert rest["data"] == {"next_index": 2}  # it reads from the start
    record = workdirs.read_run(tmp_path / "new")
    assert record["init_from"]["name"] == f"{source}@2"
    assert "checkpoint 2" in record["init_from"]["files"]


def test_the_state_of_optimizer_and_rocks_may_be_taken_over(trained, tmp_path):
    inputs, source = trained / "inputs", trained / "run"
    keys = {"optim__lr": 1e-9, "optim__min_lr": 0.0, "init_keep": "optimizer,rock"}
    parts = []
    for ref, plan in ((source, keys), (source, keys | {"init_keep": ""})):
        workdir = tmp_path / f"{len(parts)}"
        assert start_from(inputs, workdir, ref, **plan) == 0
        saved_by = plan | {"init_from": ref, "train__steps": 2}
        parts.append(tiny_run.saved(inputs, workdir, 2, **saved_by)[0])
    kept, fresh = parts
    counts = {name: (int(kept[name]), int(fresh[name])) for name in kept if name.endswith(".count")}
    assert sorted(counts.values()) == [(2, 2), (6, 2)]  # the schedule starts anew, Adam goes on
    assert kept[".rock.count_V"].sum() > 2 * fresh[".rock.count_V"].sum()
    assert int(kept[".rock.step"]) == int(fresh[".rock.step"]) == 2


def test_the_source_of_a_started_run_may_go(trained, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(trained / "run", source)
    assert start_from(trained / "inputs", tmp_path / "new", source) == 0
    shutil.rmtree(source)
    argv = {"init_from": source, "train__steps": 3}
    assert tiny_run.train(trained / "inputs", tmp_path / "new", **argv) == 0


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"init_from": "{top}/nothing"}, ["no model", "--config.init_from"]),
        ({"init_from": "{top}/run@3"}, ["no checkpoint of step '3'", "[0, 2, 4]"]),
        ({"init_from": "{top}/inputs/student"}, ["weights only", "--config.student.path"]),
        ({"init_from": "{top}/run@0", "init_keep": "rock"}, ["that was trained"]),
        ({"init_from": "{top}/run", "init_keep": "adam"}, ["init_keep is 'adam'", "optimizer"]),
        ({"init_keep": "rock"}, ["init_from ''"]),
        (
            {"init_from": "{top}/run", "init_keep": "optimizer", "optim__name": "sgd"},
            ["does not fit", "same model and optimizer"],
        ),
    ],
)
def test_what_cannot_be_started_from_is_refused(trained, tmp_path, capsys, keys, parts):
    keys = {name: str(value).format(top=trained) for name, value in keys.items()}
    assert tiny_run.train(trained / "inputs", tmp_path / "new", **keys) == 1
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert not (tmp_path / "new" / "run.json").exists() or "does not fit" in message


def test_processes_must_be_started_alike(monkeypatch):
    from opd_jax import processes

    monkeypatch.setattr(processes, "agreed_text", lambda text: '{"a": 1, "b": [2]}')
    processes.check_same({"a": 1, "b": (2,)}, "do so")
    with pytest.raises(processes.ProcessesError, match=r"b is 3, \[2\] there.*do so"):
        processes.check_same({"a": 1, "b": 3}, "do so")


def test_inputs_are_those_of_both_models_and_both_files(tiny, tmp_path):
    parts = train.assemble.assemble(tiny_run.resolved(tiny, **HALF), say=lambda line: None)
    found = entry.inputs(parts)
    assert set(found) == {"student", "teacher", "prompts", "heldout"}
    assert json.loads(json.dumps(found)) == found
    assert "model.safetensors" in found["teacher"]["files"]
    assert jax.process_count() == 1
