"""transformers 4 and 5 read what a run exports as they read its source; lm-eval evaluates it.

``OPD_JAX_HF4_PYTHON`` names the Python of an environment with transformers 4 and lm-eval; torch and
transformers 5 are in the environment of the tests. ``.ci/run`` makes both.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import hub_folders
import jax
import numpy as np
import pytest
import tiny_run

from opd_jax import cli, files
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf, transformer

pytestmark = pytest.mark.ci
tiny = tiny_run.tiny
READER = Path(tiny_run.__file__).with_name("read_export.py")
CASES = (*hub_folders.FOLDERS, "demo")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
TASKS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

folder, model = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="hf",
    model_args={"pretrained": model, "dtype": "float32"},
    tasks=["opd_choice", "opd_generate"],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    device="cpu",
    batch_size=4,
    apply_chat_template=True,
    bootstrap_iters=0,
)
print(json.dumps(found["results"], default=str))
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: ["21", "22", "23"]
doc_to_target: "{{choice}}"
metric_list:
  - metric: acc
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
"""


def python4() -> str:
    return os.environ["OPD_JAX_HF4_PYTHON"]


def run(python: str, *argv, **variables):
    """The JSON value that a script of another environment prints last."""
    done = subprocess.run(
        [python, *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | OFFLINE | variables,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def exports(tiny, tmp_path_factory):
    """Makes, once per case, (source, export) by a run of two steps."""
    folder = tmp_path_factory.mktemp("exports")

    def make(case: str) -> tuple[Path, Path]:
        out = folder / case / "export"
        if case == "demo":
            names = "embedded:student", "embedded:teacher"
        else:
            names = folder / case / "student", folder / case / "teacher"
        if not out.exists():
            if case != "demo":
                for seed, path in enumerate(names):
                    hub_folders.FOLDERS[case](path, seed)
            keys = {"student__path": names[0], "teacher__path": names[1], "train__steps": 2}
            with pytest.MonkeyPatch.context() as patch:
                tiny_run.use_one_device(patch)
                assert tiny_run.train(tiny, folder / case / "run", **keys) == 0
                argv = [f"--workdir={folder / case / 'run'}", f"--out={out}"]
                assert cli.main(["export", *argv]) == 0
        return Path(files.path_of(names[0])), out

    return make


@pytest.fixture(scope="module")
def told(exports, tmp_path_factory):
    """Makes, once per version of transformers, what it tells of all exports, by name.

    ``run-CASE`` is a run's, ``memory-CASE`` has a tokenizer that was written from memory.
    """
    folder = tmp_path_factory.mktemp("told")
    jobs = {f"run-{case}": exports(case) for case in CASES}
    for case, write in hub_folders.FOLDERS.items():
        source, out = write(folder / case / "source", 0), folder / case / "out"
        cfg, tree = hf.load(source)
        hf.save(out, cfg, tree, tokenizer=tokenizers.load(source))
        jobs[f"memory-{case}"] = source, out
    ids = {}
    for name, (source, _) in jobs.items():
        size = len(tokenizers.load(source))
        ids[name] = np.random.default_rng(0).integers(0, size, (2, 24)).astype(np.int32)
        np.save(folder / f"{name}.npy", ids[name])

    @functools.cache
    def of(version: str) -> dict[str, dict]:
        argv = []
        for name, (source, out) in jobs.items():
            argv += [out, source, folder / f"{name}.npy", folder / f"{name}-{version}.npy"]
        found = run(python4() if version == "4" else sys.executable, READER, *argv)
        for name, told in zip(jobs, found, strict=True):
            told["ids"], told["logits"] = ids[name], folder / f"{name}-{version}.npy"
        return dict(zip(jobs, found, strict=True))

    return of


@pytest.mark.parametrize("version", ["4", "5"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_an_export_as_its_source(exports, told, case, version):
    source, out = exports(case)
    cfg, tree = hf.load(out)
    fast = tokenizers.load(source)
    found = told(version)[f"run-{case}"]
    assert "error" not in found, found["error"]
    assert found["version"].startswith(f"{version}.")
    assert found["stray"] == []
    expected = jax.jit(transformer.logits, static_argnames="cfg")(tree, found["ids"], cfg=cfg)
    np.testing.assert_allclose(np.load(found["logits"]), expected, atol=1e-4, rtol=0)
    assert found["export"] == found["source"]
    assert found["export"]["ids"] == [fast(text)["input_ids"] for text in texts()]
    stops = json.loads((out.parent / "run" / "run.json").read_text())["stop_ids"]
    assert sorted(np.atleast_1d(found["eos"])) == stops
    raw = json.loads((source / "config.json").read_text())
    assert found["bos"] == raw.get("bos_token_id")
    if case != "demo":
        given = json.loads((source / "generation_config.json").read_text())
        assert found["temperature"] == given["temperature"]


@pytest.mark.parametrize("version", ["4", "5"])
@pytest.mark.parametrize("case", hub_folders.FOLDERS)
def test_transformers_reads_a_tokenizer_that_was_written_from_memory(told, case, version):
    found = told(version)[f"memory-{case}"]
    assert "error" not in found, found["error"]
    for name in found["source"].keys() - {"class"}:
        assert found["export"][name] == found["source"][name], name


def texts() -> list[str]:
    """``TEXTS`` of the reader, which imports torch."""
    scope: dict = {}
    source = READER.read_text()
    start = source.index("TEXTS = (")
    exec(source[start : source.index("\n)\n", start) + 2], scope)
    return list(scope["TEXTS"])


@pytest.mark.parametrize("case", ["qwen2"])
def test_lm_eval_runs_on_an_export(exports, tmp_path, case):
    _, out = exports(case)
    rows = [
        {"question": f"What is {i} + {21 - i}? ", "choice": i % 3, "answer": "21"} for i in range(6)
    ]
    tiny_run.write_lines(tmp_path / "rows.jsonl", rows)
    for name, rest in (("opd_choice", CHOICE), ("opd_generate", GENERATE)):
        head = TASK.format(name=name, data=tmp_path / "rows.jsonl")
        (tmp_path / f"{name}.yaml").write_text(head + rest)
    cache = {"HF_HOME": str(tmp_path / "cache")}
    found = run(python4(), "-c", TASKS, tmp_path, out, **cache)
    assert 0 <= found["opd_choice"]["acc,none"] <= 1
    assert 0 <= found["opd_generate"]["exact_match,none"] <= 1
