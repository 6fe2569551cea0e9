"""Every reader of files takes damaged ones: an error for the user, or what can be used.

What counts as an error for the user is what the command takes for one; anything else would be a
traceback.
"""

import json
import shutil
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import rocks_out
import tiny_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import documents

from opd_jax import bounded, cli, config, files
from opd_jax.data import prompts as prompt_files
from opd_jax.data import tokenizer as tokenizers
from opd_jax.instrument import corpus as corpora
from opd_jax.instrument.corpus import Occurrences
from opd_jax.models import hf, hf_config
from opd_jax.models.families import FAMILIES
from opd_jax.report import build, outcome, page_data, rock_figures, rock_section, story, style
from opd_jax.run import arms, writers
from opd_jax.store import checkpoint_record, run_files
from opd_jax.store import pair as pairs
from opd_jax.store import workdir as workdirs

tiny, workdir, one_device = tiny_run.tiny, tiny_run.workdir, tiny_run.one_device
pytestmark = pytest.mark.usefixtures("one_device")
# Deterministic, as CI should be; nothing is kept between runs.
FUZZ = dict(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def tolerated() -> tuple[type[BaseException], ...]:
    return (*cli._user_errors(), checkpoint_record.DamagedRecord)


def survives(read) -> None:
    """Call a reader: errors for the user are fine, all others are not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of figures
            read()
    except tolerated() as error:
        text = str(error)
        assert text.strip()
        assert "Traceback" not in text


@pytest.fixture(scope="module")
def made(tmp_path_factory, workdir) -> Path:
    """A copy of a run with all its files, of which one at a time is damaged."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    shutil.copytree(workdir, folder)
    sample = {"prompt": "1", "answer": "2", "ids": [3, 4], "kl_nats": [0.1, 0.2]}
    line = {"step": 0, "samples": [sample | {"truncated": False}]}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    graded = {"step": 4, "index": [0, 1], "correct": [[True], [False]]}
    (folder / "graded.jsonl").write_text(json.dumps(graded) + "\n")
    return folder


READERS = {
    "run.json": lambda run: (
        workdirs.read_run(run),
        pairs.resolve(f"{run}@4"),
        pairs.resolve(f"{run}@0"),
        build.check_comparable({"a": run, "b": run}),
        run_files.read(run),
    ),
    "summary.json": lambda run: (
        run_files.read(run),
        [row["share"] for row in run_files.summary(run)["rocks"]],
    ),
    "metrics.jsonl": lambda run: (
        run_files.read(run),
        workdirs.begun(run),
        writers.JsonlWriter(run / "metrics.jsonl", restored=3, say=lambda line: None).close(),
    ),
    "samples.jsonl": lambda run: page_data.from_samples(run, "run", []),
    "graded.jsonl": lambda run: arms.graded_problems(arms.Job("an arm", None, run)),  # type: ignore[arg-type]
    "checkpoints/4/record.json": lambda run: (
        checkpoint_record.damage(run / "checkpoints" / "4"),
        checkpoint_record.read(run / "checkpoints" / "4"),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_the_files_of_a_run(made, name):
    path = made / name
    whole = path.read_bytes()
    good = json.loads(whole.splitlines()[-1] if name.endswith("l") else whole)

    @settings(max_examples=120, **FUZZ)
    @given(documents(good))
    def fuzz(data):
        path.write_bytes(data.replace(b"\n", b" ") + b"\n" if name.endswith("l") else data)
        survives(lambda: READERS[name](made))

    try:
        fuzz()
    finally:
        path.write_bytes(whole)


def test_the_text_inside_a_checkpoint_record(made):
    path = made / "checkpoints" / "4" / checkpoint_record.RECORD
    whole = path.read_bytes()
    good = json.loads(json.loads(whole)["record"])

    @settings(max_examples=120, **FUZZ)
    @given(documents(good))
    def fuzz(data):
        text = data.decode("utf-8", "replace")
        import zlib

        sealed = {"record": text, "crc32": zlib.crc32(text.encode())}
        path.write_text(json.dumps(sealed))
        survives(lambda: checkpoint_record.read(path.parent))

    try:
        fuzz()
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """What ``opd-jax rocks`` leaves, and the workdir of a run beside it."""
    top = tmp_path_factory.mktemp("results")
    rocks_out.make_out(top / "out")
    rocks_out.make_run(top / "run")
    return top


JSON_OUT = ("selection", "summary", "gradients", "persistence", "references", "context", "reader")


@pytest.mark.parametrize("name", [*JSON_OUT, "rocks"])
def test_the_files_of_the_instrument(results, name, tmp_path):
    """Plates are made but not drawn into a file, which would take a second each.

    What is drawn from another file is not drawn again: it depends on ``rocks.json`` alone.
    """
    path = results / "out" / f"{name}.json"
    if not path.exists():
        pytest.fail(f"{path} is not among the results")
    whole = path.read_bytes()
    drawn = results / "out"
    if name != "rocks":
        drawn = tmp_path
        for kept in ("rocks.json", path.name):
            shutil.copy(results / "out" / kept, drawn)
    with plt.rc_context(style.STYLE):
        assert bool(rock_figures.plates(drawn)) == (name not in ("summary", "reader"))

    @settings(max_examples=25, **FUZZ)
    @given(documents(json.loads(whole)))
    def fuzz(data):
        path.write_bytes(data)
        (drawn / path.name).write_bytes(data)
        with plt.rc_context(style.STYLE):
            survives(lambda: rock_figures.plates(drawn))
        survives(lambda: rock_figures.studies(results / "out"))
        survives(lambda: rock_section.tiles(results / "out"))
        survives(lambda: rock_section.reader(results / "out", {}, {}))
        survives(lambda: rock_section.check(results / "out", results / "run", ["teacher"]))
        plt.close("all")

    try:
        fuzz()
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """A run with questions, answers as text and a teacher, few enough to be read in no time."""
    few = {"before": [True, False, False], "after": [True, True, False], "teacher": [True] * 3}
    return rocks_out.make_answers(tmp_path_factory.mktemp("told") / "run", **few)


def the_story(run: Path) -> None:
    runs, found = {"run": run}, {"run": outcome.read(run)}
    for section in (story.better(found, runs), story.changed(found), story.cost(runs)):
        assert str(section)
    assert str(story.made(runs))
    assert story.tiles(found, runs)


FILES_OF_THE_STORY = ("teacher.json", "questions.json", "graded.jsonl", "summary.json", "run.json")


@pytest.mark.parametrize("name", FILES_OF_THE_STORY)
def test_the_files_that_a_story_is_told_from(told, name):
    path = told / name
    whole = path.read_bytes()
    first = whole.splitlines()[0] + b"\n" if name.endswith("l") else b""

    @settings(max_examples=40, **FUZZ)
    @given(documents(json.loads(whole.splitlines()[-1] if first else whole)))
    def fuzz(data):
        path.write_bytes(first + data.replace(b"\n", b" ") + b"\n" if first else data)
        survives(lambda: the_story(told))

    the_story(told)
    try:
        fuzz()
    finally:
        path.write_bytes(whole)


@settings(max_examples=60, **FUZZ)
@given(data=st.binary(max_size=400) | st.text(max_size=200).map(lambda t: t.encode("utf-8")))
def test_a_table_of_types(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("types")
    head = ",".join(column[0] for column in page_data.COLUMNS).encode()
    (folder / "types.csv").write_bytes(head + b"\n" + data)
    survives(lambda: rock_section.types(folder))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rows = [
        {"prompt": [1, 2], "answer": [3, 4, 5], "problem": i, "truncated": False} for i in (0, 1)
    ]
    corpora.write_answers(folder, 0, rows)
    corpora.write_manifest(folder, {"pieces": 1, "writer": "w", "tokenizer_size": 9, "max_new": 4})
    return folder


@settings(max_examples=80, **FUZZ)
@given(data=documents({"pieces": 1, "writer": "w", "tokenizer_size": 9, "max_new": 4, "seed": 0}))
def test_the_manifest_of_a_corpus(corpus, data):
    (corpus / corpora.MANIFEST).write_bytes(data)
    survives(lambda: corpora.read(corpus))


@settings(max_examples=120, **FUZZ)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans())
def test_arrays_on_disk(corpus, place, value, cut):
    corpora.write_manifest(corpus, {"pieces": 1})
    whole = corpora.piece(corpus, 0).read_bytes()
    place %= len(whole)
    damaged = whole[:place] + (b"" if cut else bytes([value]) + whole[place + 1 :])
    other = corpus / "damaged.npz"
    other.write_bytes(damaged)
    corpora.piece(corpus, 0).write_bytes(damaged)
    try:
        survives(lambda: corpora.read(corpus))
        survives(lambda: Occurrences.load(other))
    finally:
        corpora.piece(corpus, 0).write_bytes(whole)


# Files of others


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny / "student", folder)
    return folder


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_config_of_a_model(model, family):
    path = model / "config.json"
    whole = path.read_bytes()
    good = json.loads(whole)
    good |= {
        "model_type": family,
        "architectures": [FAMILIES[family].architecture],
        "layer_types": ["full_attention", "sliding_attention"] * good["num_hidden_layers"],
        "sliding_window": 5,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "query_pre_attn_scalar": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        },
    }
    good["layer_types"] = good["layer_types"][: good["num_hidden_layers"]]
    good.pop("rope_parameters", None)

    @settings(max_examples=150, **FUZZ)
    @given(documents(good))
    def fuzz(data):
        path.write_bytes(data)
        survives(lambda: hf.load(model))
        survives(lambda: hf_config.generation_eos(model))

    try:
        fuzz()
    finally:
        path.write_bytes(whole)


def test_the_index_of_weights(model):
    index = model / hf.INDEX
    weights = model / hf.SINGLE
    names = {name: "model-00001.safetensors" for name in ("a", "b")}
    kept = weights.rename(model / "kept")
    (model / "model-00001.safetensors").write_bytes(kept.read_bytes()[:-1])

    @settings(max_examples=100, **FUZZ)
    @given(documents({"metadata": {"total_size": 4}, "weight_map": names}))
    def fuzz(data):
        index.write_bytes(data)
        survives(lambda: hf.load(model))

    try:
        fuzz()
    finally:
        index.unlink()
        (model / "model-00001.safetensors").unlink()
        kept.rename(weights)


@settings(max_examples=80, **FUZZ)
@given(place=st.integers(0, 4000), value=st.integers(0, 255), cut=st.booleans())
def test_the_head_of_a_weights_file(model, place, value, cut):
    path = model / hf.SINGLE
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + (b"" if cut else bytes([value]) + whole[place + 1 :]))
    try:
        survives(lambda: hf.load(model))
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "tokenizer.json", "generation_config.json"]
)
def test_the_files_of_a_tokenizer(model, name, monkeypatch):
    path = model / name
    whole = path.read_bytes()
    monkeypatch.setattr(bounded, "SECONDS", 5.0)
    good = json.loads(whole)
    if name == "tokenizer.json":  # 600 entries of one kind
        good["model"]["vocab"] = dict(list(good["model"]["vocab"].items())[:20])
        good["model"]["merges"] = []

    def use():
        tokenizer = tokenizers.load(model)
        tokenizers.num_ids(tokenizer, 640, "student")
        tokenizers.stop_ids(tokenizer, hf_config.generation_eos(model))
        tokenizers.pad_id(tokenizer)
        prompt_files.examples(model / "prompts.jsonl", prompt_files.DataSpec(), tokenizer)

    (model / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "1 + 1"}]}\n')

    @settings(max_examples=40, **FUZZ)
    @given(documents(good))
    def fuzz(data):
        path.write_bytes(data)
        survives(use)

    try:
        fuzz()
    finally:
        path.write_bytes(whole)


GOOD_LINE = {
    "messages": [{"role": "user", "content": "1 + 1"}],
    "answer": "2",
    "completion": "It is 2.",
}


@settings(max_examples=150, **FUZZ)
@given(data=documents(GOOD_LINE))
def test_a_line_of_prompts(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_bytes(data)
    survives(lambda: prompt_files.read(path))


@settings(max_examples=60, **FUZZ)
@given(data=documents([1, 2, 3]))
def test_a_list_of_ids(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ids") / "ids.json"
    path.write_bytes(data)
    given = config.defaults()
    given.student.path = given.teacher.path = given.data.prompts = "x"
    given.rock.mode, given.rock.ids_file = "static", str(path)
    survives(lambda: config.resolve(given))


@settings(max_examples=80, **FUZZ)
@given(
    line=st.sampled_from(
        [
            "1/0",
            "c.train.steps = {value}",
            "c.rollout.bias = {value}",
            "c.rollout.buckets = {value}",
            "c.data.template = {value}",
            "c.optim = {value}",
            "c.unknown = {value}",
            "raise SystemExit(3)",
            "import nothing_like_this",
            "c.kl.direction = {value}",
            "return {value}",
            "(((",
        ]
    ),
    value=st.sampled_from(
        ["None", "'x'", "-1", "10**30", "1e400", "()", "(1, 'a')", "((1,),)", "{}", "[[]]", "print"]
    ),
)
def test_a_config_file(tmp_path_factory, line, value):
    path = tmp_path_factory.mktemp("config") / "config.py"
    body = f"    c = config.defaults()\n    {line.replace('{value}', value)}\n    return c\n"
    path.write_text("from opd_jax import config\ndef get_config(arg=''):\n" + body)

    def use():
        found, _ = config.load([f"--config={path}"], workdir=None)
        found.student.path = found.teacher.path = found.data.prompts = "x"
        config.resolve(found)

    survives(use)


def test_what_is_read_is_regular(tmp_path, tiny):
    """A pipe would be waited for, and a device read, for ever."""
    import os

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    model = tmp_path / "model"
    shutil.copytree(tiny / "student", model)
    for special in (pipe, Path("/dev/zero"), tmp_path):
        for use in (
            lambda p=special: prompt_files.read(p),
            lambda p=special: config.load([f"--config={p}"], workdir=None),
            lambda p=special: run_files.load(p, dict),
            lambda p=special: run_files.load_lines(p, dict),
            lambda p=special: Occurrences.load(p),
        ):
            with pytest.raises(tolerated()):
                use()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            kept = (model / name).rename(model / "kept")
            (model / name).symlink_to(special)
            try:
                with pytest.raises(tolerated()):
                    (tokenizers.load(model), hf.load(model))
            finally:
                (model / name).unlink()
                kept.rename(model / name)
    assert np.isfinite(files.path_of("x") == "x")
