"""lm-evaluation-harness runs our models, with the numbers of its own ``hf`` model.

What needs the harness is marked ci: it, torch and accelerate are installed there only.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import tiny_run

from opd_jax import cli

tiny = tiny_run.tiny
SMOLLM2 = os.environ.get("OPD_JAX_SMOLLM2", "")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
}
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "opd_choice": """
output_type: multiple_choice
doc_to_choice: ["{{a}}", "{{b}}", "neither of the two"]
doc_to_target: "{{choice}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "opd_text": """
output_type: loglikelihood_rolling
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
""",
    "opd_generate": """
output_type: generate_until
doc_to_target: "{{answer}}"
num_fewshot: 0
generation_kwargs:
  until: ["\\n", "?"]
  max_gen_toks: 20
  do_sample: false
metric_list:
  - metric: exact_match
""",
}
FEWSHOT = (
    *("--apply_chat_template", "--system_instruction=Be brief.", "--num_fewshot=2"),
    *("--fewshot_as_multiturn=true", "--gen_kwargs=max_gen_toks=12,temperature=0.0", "--limit=5"),
)
ONE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}  # slots divide over devices
RESULTS = ("acc,none", "acc_norm,none", "word_perplexity,none", "byte_perplexity,none",
           "exact_match,none")  # fmt: skip


def test_without_the_harness_it_says_what_to_install(monkeypatch, capsys):
    if importlib.util.find_spec("lm_eval") is not None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["lm-eval", "--tasks=x"]) == 1
    assert "pip install 'opd-jax[lm-eval]'" in capsys.readouterr().err


def test_the_entry_point_names_the_class():
    text = (tiny_run.Path(cli.__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points."lm_eval.models"]' in text
    assert 'opd_jax = "opd_jax.evaluate.lm_eval:OpdJax"' in text


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    rows = [
        {
            "question": f"Tara has {i} plums and buys {12 - i} more. How many plums has she?",
            "a": str(12 + i % 3),
            "b": f"about {i} plums",
            "choice": i % 2,
            "answer": "12",
            "text": f"Tara has {i} plums. " * (1 + 9 * (i % 3)) + "She buys more, so she has many.",
        }
        for i in range(6)
    ]
    tiny_run.write_lines(folder / "rows.jsonl", rows)
    for name, rest in TASKS.items():
        head = HEAD.format(name=name, data=folder / "rows.jsonl")
        (folder / f"{name}.yaml").write_text(head + rest)
    return folder


def run(tasks, out, model, args, *flags, env=None):
    """The results and samples of one run of the harness's command line."""
    env = (
        os.environ | OFFLINE | {"HF_HOME": str(tasks / "cache"), "OPD_JAX_TRACE": "1"} | (env or {})
    )
    command = [sys.executable, "-m", "lm_eval", "run"]
    if model == "opd_jax":
        command = [sys.executable, "-c", "import sys; from opd_jax import cli; "
                   "sys.exit(cli.main(sys.argv[1:]))", "lm-eval"]  # fmt: skip
    else:
        flags = (*flags, f"--model={model}", "--device=cpu")
    done = subprocess.run(
        [*command, f"--model_args={args}", "--tasks=" + ",".join(TASKS), f"--include_path={tasks}",
         "--batch_size=4", f"--output_path={out}", "--log_samples", *flags],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    samples = {
        name: tiny_run.read_lines(next(out.rglob(f"samples_{name}_*.jsonl"))) for name in TASKS
    }
    return json.loads(results.read_text())["results"], samples


def numbers(sample):
    """All numbers and texts that a model answered with, flat."""
    flat, todo = [], [sample["resps"]]
    while todo:
        item = todo.pop(0)
        if isinstance(item, list):
            todo[:0] = item
        else:
            flat.append(item)
    return flat


def check_same(ours, theirs, rel):
    for name in TASKS:
        for key in RESULTS:
            if key in theirs[0][name]:
                assert ours[0][name][key] == pytest.approx(theirs[0][name][key], rel=rel), name
        for left, right in zip(ours[1][name], theirs[1][name], strict=True):
            for a, b in zip(numbers(left), numbers(right), strict=True):
                try:
                    a, b = float(a), float(b)
                except ValueError:
                    assert a == b, name
                else:
                    assert math.isclose(a, b, rel_tol=rel, abs_tol=rel), (name, a, b)


@pytest.mark.ci
@pytest.mark.optimized
@pytest.mark.parametrize("flags", [(), FEWSHOT])
def test_a_small_model_gives_the_numbers_of_hf(tiny, tasks, tmp_path, flags):
    args = f"pretrained={tiny / 'student'},dtype=float32"
    ours = run(tasks, tmp_path / "ours", "opd_jax", args, *flags)
    theirs = run(tasks, tmp_path / "theirs", "hf", args, *flags)
    check_same(ours, theirs, 1e-4)
    spread = run(tasks, tmp_path / "spread", "opd_jax", f"{args},mesh_fsdp=2,mesh_model=2", *flags)
    check_same(spread, theirs, 1e-4)
    slots = run(tasks, tmp_path / "slots", "opd_jax", f"{args},slots=2", *flags, env=ONE)
    check_same(slots, theirs, 1e-4)


@pytest.mark.ci
@pytest.mark.optimized
def test_single_requests_are_answered_as_hf_answers_them(tiny):
    """What is cut from the left, empty contexts, stop strings of several tokens, number by number.

    A text to generate from that is empty, and what this model does not do, hf fails at or does.
    """
    models = importlib.import_module("lm_eval.models.huggingface")
    instances = importlib.import_module("lm_eval.api.instance")
    own = importlib.import_module("opd_jax.evaluate.lm_eval")
    given = {"pretrained": str(tiny / "student"), "dtype": "float32", "batch_size": 4}
    both = own.OpdJax(**given), models.HFLM(**given, device="cpu")

    def ask(model, kind, *rows):
        wanted = [instances.Instance(request_type=kind, doc={}, arguments=row, idx=n)
                  for n, row in enumerate(rows)]  # fmt: skip
        return getattr(model, kind)(wanted, disable_tqdm=True)

    long = "Tara has 3 plums and buys 4 more. " * 12  # of the model's 64 positions it fills 133
    scored = [("", "12 plums"), ("Tara has ", "12"), (long, " 12 plums"), ("a", "b " * 20),
              ("Tom ", " ")]  # fmt: skip
    ours, theirs = (ask(model, "loglikelihood", *scored) for model in both)
    assert [x[0] for x in ours] == pytest.approx([x[0] for x in theirs], abs=1e-4)
    assert [x[1] for x in ours] == [x[1] for x in theirs]
    ours, theirs = (ask(model, "loglikelihood_rolling", (long,), ("a",), ("",)) for model in both)
    assert ours == pytest.approx(theirs, rel=1e-6)
    for more in (
        {"until": ["\n", "?"], "do_sample": False},
        {"until": "wicewice", "temperature": 0.0},
        {"until": [], "do_sample": False, "temperature": 0.7, "num_beams": 1},
    ):
        kwargs = {"max_gen_toks": 20, **more}
        ours, theirs = (
            ask(model, "generate_until", (long, kwargs), ("Tara has", kwargs)) for model in both
        )
        assert ours == theirs
    (alone,) = ask(both[0], "generate_until", ("", {"until": ["\n"], "max_gen_toks": 8}))
    assert isinstance(alone, str)
    for refused in ({"num_beams": 2}, {"repetition_penalty": 1.5}, {"max_length": 30}):
        kwargs = ({"max_gen_toks": 8}, {"max_gen_toks": 8, **refused})
        with pytest.raises(ValueError, match=f"asks for {next(iter(refused))}="):
            ask(both[0], "generate_until", *(("Tara", each) for each in kwargs))
    for row, part in ((("abc", ""), "a continuation is empty"), (("abc", long), "133 ids and 64")):
        with pytest.raises(ValueError, match=part):
            ask(both[0], "loglikelihood", row)


@pytest.mark.ci
@pytest.mark.optimized
def test_smollm2_gives_the_numbers_of_hf(tasks, tmp_path):
    args = f"pretrained={SMOLLM2},dtype=float32"
    flags = ("--apply_chat_template",)
    ours = run(tasks, tmp_path / "ours", "opd_jax", args, *flags)
    theirs = run(tasks, tmp_path / "theirs", "hf", args, *flags)
    check_same(ours, theirs, 1e-3)


@pytest.mark.ci
@pytest.mark.optimized
def test_what_the_harness_cannot_run_is_named(tiny, tasks, tmp_path):
    for args, part in (
        ("pretrained=absent", "'absent' is no model"),
        (f"pretrained={tiny / 'student'},colour=red", "model argument 'colour' is not known"),
    ):
        with pytest.raises(AssertionError, match=part):
            run(tasks, tmp_path / "out", "opd_jax", args)
