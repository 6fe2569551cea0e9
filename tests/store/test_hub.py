"""Models of the Hub: fetched by name, pinned to a commit, and told plainly where not to be had."""

import json
import shutil
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
import tiny_run
from huggingface_hub import ModelCard

from opd_jax import cli
from opd_jax.plan import known_models
from opd_jax.spec import ConfigError
from opd_jax.store import hub
from opd_jax.store import pair as pairs

tiny, one_device = tiny_run.tiny, tiny_run.one_device
STUDENT, TEACHER = "acme/small", "acme/large"
BY_NAME = {"student__path": STUDENT, "teacher__path": f"hub:{TEACHER}@main"}


@pytest.fixture(autouse=True)
def _no_bars():
    huggingface_hub.utils.disable_progress_bars()


@pytest.fixture
def server(tiny, tmp_path, monkeypatch):
    """A Hub with the tiny pair, and a cache that is empty."""
    with hub_server.serving() as found:
        other = {"pytorch_model__bin": b"0", "model__gguf": b"0", "model__onnx": b"0"}
        found.push(STUDENT, tiny / "student", **other)
        found.push(TEACHER, tiny / "teacher")
        hub_server.use(monkeypatch, found.url, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield found


def moved(server, tiny, tmp_path):
    """Another version of the student, the newest from now on."""
    changed = shutil.copytree(tiny / "student", tmp_path / "changed")
    teacher = (tiny / "teacher" / "model.safetensors").read_bytes()
    (changed / "model.safetensors").write_bytes(teacher)
    return server.push(STUDENT, changed)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", None)),
        ("Qwen/Qwen3-0.6B@v1.0", ("Qwen/Qwen3-0.6B", "v1.0")),
        ("hub:runs/demo@refs/pr/1", ("runs/demo", "refs/pr/1")),
        ("there/folder", None),
        ("there/folder@last", None),  # the step of a run
        ("hub:there/folder", ("there/folder", None)),
        ("models/Qwen3-0.6B", None),
        ("runs/demo@5", None),
        ("embedded:student", None),
        ("embedded:a/b", None),
        ("./Qwen/Qwen3", None),
        ("/models/x", None),
        ("~/x", None),
        ("a/b/c", None),
        ("student", None),
        ("", None),
    ],
)
def test_what_is_a_name_of_the_hub(tmp_path, monkeypatch, name, wanted):
    (tmp_path / "there" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = hub.parse(name)
    assert (found and (found.repo, found.revision)) == wanted


@pytest.mark.parametrize("name", ["hub:", "hub:Qwen3", "hub:a/b/c", "hub:a/b@", "hub:../b"])
def test_a_prefix_before_no_name_is_refused(name):
    with pytest.raises(hub.HubError, match="expected hub:owner/name"):
        hub.parse(name)


@pytest.mark.usefixtures("one_device")
def test_a_run_by_name_keeps_its_revisions(server, tiny, tmp_path, capsys):
    """Whatever happens upstream: trained, resumed, exported and analysed on what it started on."""
    run, first = tmp_path / "run", server.heads[STUDENT, "main"]
    steps = {"train__steps": 4, "checkpoint__every": 2}
    assert tiny_run.train(tiny, run, **BY_NAME, **steps | {"train__steps": 2}) == 0
    assert f"{STUDENT}: commit {first} of the Hugging Face Hub" in capsys.readouterr().out
    assert {"model.safetensors", "tokenizer.json"} <= server.fetched
    assert not {name for name in server.fetched if name.endswith((".bin", ".gguf", ".onnx"))}
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["student.path"] == f"hub:{STUDENT}@{first}"
    assert record["pinned"][STUDENT] == f"hub:{STUDENT}@{first}"

    newest = moved(server, tiny, tmp_path)
    assert newest != first
    server.asked.clear()
    assert tiny_run.train(tiny, run, **BY_NAME, **steps) == 0
    assert newest not in " ".join(server.asked)
    assert tiny_run.train(tiny, run, **BY_NAME | {"student__path": f"{STUDENT}@{newest}"}) == 1
    assert f"started with 'hub:{STUDENT}@{first}'" in capsys.readouterr().err

    # Another run of the same study starts on what the first one did, too.
    assert hub.pins([STUDENT], [tmp_path / "none", run])[STUDENT].endswith(first)
    assert hub.pins([STUDENT], [tmp_path / "none"])[STUDENT].endswith(newest)

    # All from the cache: the Hub is not asked again.
    server.asked.clear()
    server.refuses = {STUDENT: (500, ""), TEACHER: (500, "")}
    assert cli.main(["export", f"--workdir={run}", f"--out={tmp_path / 'out'}"]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == STUDENT
    assert f"`{first}`" in card.text
    assert cli.main(["table", f"--workdir={run}", f"--out={tmp_path / 'types.csv'}"]) == 0
    assert pairs.resolve(f"{run}@0").folder.endswith(first)
    assert server.asked == []


def test_a_reference_of_any_command_may_be_a_name(server, tiny, tmp_path):
    first = server.heads[STUDENT, "main"]
    opened = pairs.open_model(STUDENT)
    assert opened.reference.name == f"hub:{STUDENT}@{first}"
    moved(server, tiny, tmp_path)
    assert pairs.open_model(opened.reference.name).reference == opened.reference
    assert pairs.identity(pairs.resolve(STUDENT)) != pairs.identity(opened.reference)


def test_a_folder_that_is_there_wins(server, tiny, tmp_path):
    shutil.copytree(tiny / "teacher", tmp_path / STUDENT)
    assert pairs.resolve(STUDENT).folder == STUDENT
    assert server.asked == []


def test_a_plan_fetches_the_config_alone(server):
    found = known_models.shapes(STUDENT, "float32", "--x")
    assert found.cfg.width == tiny_run.MODEL.width
    assert server.fetched <= {"config.json", "generation_config.json"}
    # What is not whole is completed where more is needed.
    name = pairs.resolve(STUDENT).name
    assert {"model.safetensors", "tokenizer.json"} <= server.fetched
    server.asked.clear()
    hub.folder(name)
    assert server.asked == []


def test_a_snapshot_without_a_shard_is_completed(server, tiny, tmp_path):
    folder, shard = shutil.copytree(tiny / "student", tmp_path / "cut"), "model-1-of-1.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    server.push("acme/cut", folder)
    name = pairs.resolve("acme/cut").name
    assert shard in server.fetched
    path = Path(hub.folder(name)) / shard
    path.unlink()
    server.asked.clear()
    hub.folder(name, "tokenizer")
    assert server.asked == []
    assert (Path(hub.folder(name)) / shard).is_file()


def test_a_plan_knows_published_models_without_the_hub(server):
    assert known_models.shapes("Qwen/Qwen3-8B", "float32", "--x").cfg.width == 4096
    assert server.asked == []
    with pytest.raises(hub.HubError, match="is not there"):
        known_models.shapes("hub:Qwen/Qwen3-8B", "float32", "--x")
    with pytest.raises(ConfigError, match="not known by name"):
        known_models.shapes("Qwen3-5B", "float32", "--x")


def test_what_was_looked_up_once_is_had_without_a_network(server, tmp_path, monkeypatch):
    found = pairs.resolve(STUDENT)
    hub_server.use(monkeypatch, server.url, tmp_path / "cache", is_offline=True)
    server.asked.clear()
    assert pairs.resolve(STUDENT) == found
    assert server.asked == []


@pytest.mark.parametrize(
    ("name", "refused", "part"),
    [
        ("acme/nothing", None, "is not there, or not for everybody (hf auth login"),
        (f"{STUDENT}@v7", None, "has no revision 'v7'"),
        (STUDENT, (401, ""), "not for everybody"),
        (STUDENT, (403, "GatedRepo"), "is gated (accept its terms at http://127.0.0.1"),
        (STUDENT, (403, ""), "answered 403"),
        (STUDENT, (500, ""), "answered 500"),
        (f"acme/{'x' * 97}", None, "its name cannot be"),
    ],
)
def test_a_refusal_says_why_and_how_else(server, tiny, tmp_path, capsys, name, refused, part):
    if refused:
        server.refuses[STUDENT] = refused
    assert tiny_run.train(tiny, tmp_path / "run", student__path=name) == 1
    message = capsys.readouterr().err
    assert part in message
    repo, _, revision = name.partition("@")
    more = f" --revision {revision}" if revision else ""
    local = f"models/{repo.partition('/')[2]}"
    assert f"\n  hf download {repo}{more} --local-dir {local}\n" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("is_offline", "part"), [(True, "HF_HUB_OFFLINE is set"), (False, "could not be fetched from")]
)
def test_without_a_network_the_command_to_run_elsewhere_is_told(
    tiny, tmp_path, monkeypatch, capsys, is_offline, part
):
    hub_server.use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache", is_offline=is_offline)
    given = ["generate", f"--model={STUDENT}", f"--prompts={tiny / 'prompts.jsonl'}"]
    assert cli.main([*given, f"--out={tmp_path / 'out.jsonl'}"]) == 1
    message = capsys.readouterr().err
    assert part in message
    assert f"\n  hf download {STUDENT} --local-dir models/small\n" in message


def test_a_path_of_a_run_that_is_gone_is_no_name_of_the_hub(server):
    assert hub.folder(STUDENT) == STUDENT
    assert server.asked == []


@pytest.mark.usefixtures("one_device")
def test_a_run_does_not_start_from_a_model(server, tiny, tmp_path, capsys):
    assert tiny_run.train(tiny, tmp_path / "run", init_from=STUDENT) == 1
    assert "init_from: 'acme/small' is no run here" in capsys.readouterr().err
