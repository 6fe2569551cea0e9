"""The command line: bad input is one message that says what to change, never a traceback."""

import json
import shutil

import pytest
import tiny_run
from tokenizers import Tokenizer

from opd_jax import cli
from opd_jax.run import launch

tiny, one_device = tiny_run.tiny, tiny_run.one_device


@pytest.fixture
def refused(capsys, tmp_path):
    """Run ``train`` on a folder and return its message; nothing may have been trained."""

    def run(folder, workdir=None, **keys):
        workdir = workdir or tmp_path / "run"
        assert tiny_run.train(folder, workdir, **keys) == 1
        message = capsys.readouterr().err
        assert message.startswith("opd-jax train: ")
        assert "Traceback" not in message
        assert not workdir.is_dir() or not list(workdir.glob("checkpoints/*[0-9]"))
        return message

    return run


@pytest.fixture
def copy(tiny, tmp_path):
    return tiny_run.copy_folder(tiny, tmp_path / "copy")


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("train", "export", "generate", "rocks", "table", "sweep", "report", "figure"):
        assert f"\n  {name} " in out
    assert cli.main([]) == 2


def test_train_help_lists_every_key(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--workdir" in out
    assert "data.max_prompt (int, 512)\n      most ids of a prompt" in out


def test_an_unknown_command_is_refused(capsys):
    assert cli.main(["trian"]) == 2
    assert (
        "'trian' (nearest known: train); expected one of train, export" in capsys.readouterr().err
    )


def test_a_defect_keeps_its_trace(monkeypatch):
    def broken(argv):
        raise KeyError("a bug")

    monkeypatch.setattr(launch, "main", broken)
    with pytest.raises(KeyError):
        cli.main(["train"])


def test_no_workdir(tiny, capsys):
    assert cli.main(["train", f"--config={tiny / 'config.py'}"]) == 1
    assert "no --workdir given: expected --workdir=DIR" in capsys.readouterr().err


def test_missing_config_file(tmp_path, capsys):
    assert cli.main(["train", f"--config={tmp_path}/no.py", f"--workdir={tmp_path}/run"]) == 1
    message = capsys.readouterr().err
    assert "does not exist" in message
    assert "change --config" in message


def test_unknown_key_and_value(tiny, refused):
    assert "nearest known: 'train.steps'" in refused(tiny, train__step=3)
    assert "--config.train.steps" in refused(tiny, train__steps=-3)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_missing_model_folder(tiny, tmp_path, refused, one_device, who):
    message = refused(tiny, **{f"{who}__path": tmp_path / "absent"})
    assert str(tmp_path / "absent") in message
    assert "expected" in message


def test_corrupt_model_config(copy, refused, one_device):
    (copy / "student" / "config.json").write_text('{"model_type": ')
    message = refused(copy)
    assert "student" in message
    assert "config.json" in message


def test_unsupported_model(copy, refused, one_device):
    path = copy / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    message = refused(copy)
    assert "mamba" in message
    assert "qwen3" in message


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_truncated_weights(copy, refused, one_device, who):
    path = copy / who / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(copy)
    assert str(path) in message
    assert "expected" in message


def test_missing_weights(copy, refused, one_device):
    (copy / "student" / "model.safetensors").unlink()
    assert "safetensors" in refused(copy)


def test_corrupt_tokenizer(copy, refused, one_device):
    (copy / "teacher" / "tokenizer.json").write_text("{")
    message = refused(copy)
    assert "teacher" in message
    assert "tokenizer" in message


def test_mismatched_tokenizers(copy, refused, one_device):
    path = copy / "teacher" / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    (a, i), (b, j) = list(vocab.items())[-2:]
    vocab[a], vocab[b] = j, i
    path.write_text(json.dumps(raw))
    Tokenizer.from_file(str(path))  # still a tokenizer, only another one
    message = refused(copy)
    assert "tokenizer" in message
    assert str(i) in message


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"prompt": "1 + 1"}\n{"prompt": \n', "prompts.jsonl:2"),
        ('{"prompt": "1 + 1"}\n\n{"prompt": 2}\n', "prompts.jsonl:3"),
        ('{"question": "1 + 1"}\n', "prompts.jsonl:1"),
        ('{"messages": [{"role": "user"}]}\n', "prompts.jsonl:1"),
        ('["1 + 1"]\n', "prompts.jsonl:1"),
        ("", "prompts.jsonl"),
    ],
)
def test_malformed_prompts(copy, refused, one_device, text, where):
    (copy / "prompts.jsonl").write_text(text)
    message = refused(copy)
    assert where in message
    assert "expected" in message


def test_missing_prompts(copy, refused, one_device):
    (copy / "prompts.jsonl").unlink()
    assert "prompts.jsonl" in refused(copy)


def test_too_few_prompts_for_a_batch(copy, refused, one_device):
    rows = tiny_run.read_lines(copy / "prompts.jsonl")
    tiny_run.write_lines(copy / "prompts.jsonl", rows[:3])
    message = refused(copy)
    assert "3" in message
    assert "4" in message


def test_all_prompts_too_long(tiny, refused, one_device):
    message = refused(tiny, data__max_prompt=2)
    assert "12 dropped as too long" in message
    assert "max_prompt" in message


def test_answers_past_the_positions_of_the_model(tiny, refused, one_device):
    message = refused(tiny, rollout__max_new=60)
    assert "64 positions" in message
    assert "rollout.max_new is 60" in message
    assert "--config.rollout.max_new" in message


def test_a_mesh_that_does_not_divide_the_batch(tiny, refused):
    message = refused(tiny)  # four prompts over eight devices
    assert "4 prompts x 2 samples" in message
    assert "8 batch shards" in message
    assert "--config.train.prompts" in message


def test_a_mesh_that_does_not_divide_the_heads(tiny, refused):
    message = refused(tiny, mesh__data=1, mesh__model=8)
    assert "8" in message
    assert "model" in message
    assert "mesh" in message


def test_a_mesh_of_other_than_all_devices(tiny, refused):
    message = refused(tiny, mesh__data=3)
    assert "found 8" in message
    assert "--config.mesh.data" in message


def test_an_evaluation_batch_that_does_not_divide(tiny, refused):
    keys = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2, "eval__every": 1}
    assert "--config.eval.batch" in refused(tiny, **keys, eval__batch=6)


def test_a_workdir_that_cannot_be_written(tiny, tmp_path, refused, one_device):
    (tmp_path / "file").write_text("in the way")
    message = refused(tiny, workdir=tmp_path / "file" / "run")
    assert str(tmp_path / "file") in message
    assert "another --workdir" in message


def test_a_workdir_that_is_a_file(tiny, tmp_path, one_device, capsys):
    (tmp_path / "file").write_text("in the way")
    assert tiny_run.train(tiny, tmp_path / "file") == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "file") in message
    assert "another --workdir" in message
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_bias_past_the_vocabulary(tiny, refused, one_device):
    message = refused(tiny, rollout__bias="((9999, 1.0),)")
    assert "9999" in message
    assert "--config.rollout.bias" in message


def test_gated_ids_past_the_vocabulary(tiny, tmp_path, refused, one_device):
    ids = tmp_path / "ids.json"
    ids.write_text("[1, 9999]")
    message = refused(tiny, rock__mode="static", rock__ids_file=ids)
    assert "9999" in message
    assert "rock.ids" in message


def test_figure_of_no_run(tmp_path, capsys):
    assert cli.main(["figure", f"--workdir={tmp_path}", f"--out={tmp_path / 'x.png'}"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_copies_are_independent(tiny, copy):
    """The damage done above stays in the copies."""
    shutil.rmtree(copy)
    assert (tiny / "student" / "model.safetensors").is_file()


@pytest.mark.usefixtures("one_device")
def test_a_run_becomes_a_table_and_a_page(tiny, tmp_path, capsys):
    run, table, page = tmp_path / "run", tmp_path / "rocks.csv", tmp_path / "page.html"
    assert tiny_run.train(tiny, run) == 0
    assert cli.main(["table", f"--workdir={run}", f"--out={table}"]) == 0
    assert "rock state of step 4" in capsys.readouterr().out
    head, *rows = table.read_text(encoding="utf-8").splitlines()
    assert head.startswith("token_id,token,count,kl_sum")
    assert len(rows) == tiny_run.MODEL.vocab_size
    assert cli.main(["report", str(run), f"--out={page}"]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert cli.main(["table", f"--workdir={run}", f"--out={table}"]) == 1
    assert "exists" in capsys.readouterr().err
    assert cli.main(["report", f"--out={tmp_path / 'other.html'}"]) == 1
    assert "opd-jax report: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rocks", "--out=rocks"], "--run alone, or both --student and"),
        (["sweep", "--config=none.py", "--arms=a,a", "--workdir=w"], "different names"),
        (["table", "--workdir=none", "--out=t.csv"], "none has no run.json"),
    ],
)
def test_every_command_refuses_in_one_message(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"opd-jax {argv[0]}: ")
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--columns", "--template", "--prompts", "--model", "--limit"])
@pytest.mark.parametrize("text", ["[" * 20_000, "a b " * 9_000])
def test_a_value_is_quoted_only_as_far_as_one_reads(flag, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"--model": "embedded:student", "--prompts": "embedded:prompts/heldout.jsonl"}
    given |= {"--out": "o", "--max-new": "8", flag: text}
    try:
        status = cli.main(["generate", *(f"{name}={value}" for name, value in given.items())])
    except SystemExit as end:
        status = end.code
    err = capsys.readouterr().err
    assert status
    assert "opd-jax generate: " in err
    assert text[:40] in err
    assert len(err) < 6_000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    if name == "train":
        assert cli.main([name, "--help"]) == 0
    else:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main([name, "--help"])
    out = capsys.readouterr().out
    assert f"usage: opd-jax {name} " in out
    assert f"example: opd-jax {name} --" in " ".join(out.split()) or f"opd-jax {name} runs/" in out


# lm-eval hands its flags over; those of train, sweep and plan are tested above and with them.
OWN_FLAGS = [name for name in cli.COMMANDS if name not in ("train", "sweep", "plan", "lm-eval")]


@pytest.mark.parametrize("name", OWN_FLAGS)
def test_an_unknown_flag_is_answered_with_the_nearest(name, capsys):
    needed = {
        "export": ["--workdir=w", "--out=o"],
        "generate": ["--model=m", "--prompts=p", "--out=o"],
        "table": ["--workdir=w", "--out=o"],
        "figure": ["--workdir=w", "--out=o"],
        "knockout": ["--model=m", "--tasks=t", "--types=3", "--out=o"],
    }.get(name, ["--out=o"])
    with pytest.raises(SystemExit) as end:
        cli.main([name, *needed, "--ouut=x"])
    assert end.value.code == 2
    assert "unknown argument --ouut=x (nearest known: --out)" in capsys.readouterr().err


def test_home_is_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["table", "--workdir=~/run", "--out=t.csv"]) == 1
    assert str(tmp_path / "run") in capsys.readouterr().err
