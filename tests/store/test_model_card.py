"""The model card says what the files of a run say, and nothing of the machine."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from opd_jax import config, stats
from opd_jax.store import model_card
from opd_jax.store import workdir as workdirs

GRADED = [
    {"step": 0, "index": [0, 1, 2, 3], "correct": [[True], [False], [False], [False]]},
    {"step": 20, "index": [0, 1, 2, 3], "correct": [[True], [True], [True], [False]]},
]
METRICS = [
    {"step": 0, "eval/accuracy": 0.25, "eval/kl_nats": 13.5},
    {"step": 10, "loss": 1.0, "kl_nats": 1.0},
    {"step": 20, "loss": 0.5, "kl_nats": 0.5},
    {"step": 20, "eval/accuracy": 0.75, "eval/kl_nats": 0.1961},
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", METRICS)
    write_lines(tmp_path / "graded.jsonl", GRADED)
    return tmp_path


def recorded(**keys):
    """A ``run.json``; ``kl__skew=0.2`` sets ``kl.skew``."""
    c = config.defaults()
    c.student.path, c.teacher.path = "/home/me/models/small", "embedded:teacher"
    c.data.prompts, c.data.heldout = "~/data/train.jsonl", "data/heldout.jsonl"
    c.train.steps, c.optim.lr = 20, 3e-4
    with c.unlocked():
        for name, value in keys.items():
            c.update_from_flattened_dict({name.replace("__", "."): value})
    return {
        "config": config.flatten(c),
        "command": ["opd-jax", "train", "--config=/home/me/c.py:rocks=/home/me/r", "--workdir=~/x"],
        "inputs": {"prompts": {"path": "?", "files": {"train.jsonl": "0123456789abcdef"}}},
        "versions": {"opd-jax": "0.1.0", "jax": "0.10.2"},
    }


def card(folder, record=None, step=20):
    return model_card.text(folder, record or recorded(), step, "my-export")


def test_the_front_matter_is_the_hubs(folder):
    text = card(folder)
    data = ModelCard(text).data
    assert (data.base_model, data.library_name) == (None, "transformers")
    assert data.pipeline_tag == "text-generation"
    assert {"opd_jax", "on-policy-distillation"} <= set(data.tags)
    assert yaml.safe_load(text.split("---")[1]) == data.to_dict()


@pytest.mark.parametrize(
    "part",
    [
        "# my-export",
        "`small`, distilled on-policy from the teacher `embedded:teacher`",
        "Exported at step 20.",
        'from_pretrained("my-export")',
        "| accuracy on held-out prompts | 25.0% (4.6% to 69.9%) | 75.0% (30.1% to 95.4%) |",
        "| KL(student ‖ teacher), nats per token | 13.5000 | 0.1961 |",
        "95% intervals are Wilson's over 4 problems. Answers are greedy.",
        "| prompts | `train.jsonl`, digest of its ids `0123456789abcdef` |",
        "| held-out prompts | `heldout.jsonl` |",
        "| divergence | `reverse`, KL(student ‖ teacher), temperature 1 |",
        "| gate | none |",
        "peak learning rate 0.0003",
        "| steps | 20 of 20 |",
        "| batch | 16 prompts x 4 answers |",
        "| answers | up to 512 tokens, temperature 1, top-k 0, top-p 1, min-p 0 |",
        "opd-jax train --config=c.py:rocks=r --workdir=x\n",
        "Made with jax 0.10.2, opd-jax 0.1.0",
    ],
)
def test_the_card_says(folder, part):
    assert part in card(folder)


@pytest.mark.parametrize(
    ("stage", "part", "is_tagged"),
    [
        ("off_policy", "distilled off-policy from the teacher `embedded:teacher`", False),
        ("mixed", "distilled on- and off-policy from the teacher", True),
        ("mixed", "| on-policy | 0.25 of the steps |", True),
    ],
)
def test_the_card_says_whose_answers_were_trained_on(folder, stage, part, is_tagged):
    record = recorded(train__stage=stage, train__on_policy_share=0.25, kl__ce=0.5)
    text = card(folder, record)
    assert part in text
    assert ("on-policy-distillation" in ModelCard(text).data.tags) == is_tagged


def test_the_card_names_divergence_gate_and_origin(folder):
    record = recorded(
        kl__direction="jsd",
        kl__beta=0.3,
        rock__mode="ema",
        rock__top_k=20,
        rock__inside=0.0,
        rock__start=5,
        init_from="/runs/one@40",
    )
    text = card(folder, record)
    assert "| divergence | `jsd`, Jensen-Shannon divergence of student and teacher," in text
    assert "temperature 1, beta 0.3 |" in text
    assert "| gate | `ema`, inside 0.0, top_k 20, score kl_sum, start 5 |" in text
    assert "| starts from | `one@40` |" in text
    assert "/runs" not in text


def test_no_path_of_the_machine_is_told(folder):
    assert "/home" not in card(folder)
    assert "~" not in card(folder)
    assert str(folder) not in card(folder)


def test_what_a_stopped_run_has_not_measured_is_left_out(folder):
    (folder / "graded.jsonl").unlink()
    assert "| 25.0% | 75.0% |" in card(folder)
    assert "Wilson" not in card(folder)
    assert "| 25.0% |\n" in card(folder, step=10)  # this step was not evaluated
    assert "75.0%" not in card(folder, step=10)
    write_lines(folder / "metrics.jsonl", [line | {"eval/accuracy": None} for line in METRICS[:1]])
    assert "accuracy" not in card(folder)
    assert "| 13.5000 |" in card(folder)
    (folder / "metrics.jsonl").unlink()
    assert "Before and after" not in card(folder)
    assert "| steps | 20 of 20 |" in card(folder)


def test_several_answers_to_a_problem_count_as_one_unit(folder):
    correct = [[True, True], [False, True], [False, False], [False, False]]
    write_lines(folder / "graded.jsonl", [{"step": 0, "index": [0, 1, 2, 3], "correct": correct}])
    write_lines(folder / "metrics.jsonl", [{"step": 0, "eval/accuracy": 0.375, "eval/kl_nats": 1}])
    low, high = stats.wilson(0.375, 4)
    assert f"| 37.5% ({low:.1%} to {high:.1%}) |" in card(folder)


def test_a_resumed_run_is_told_as_it_is_now(folder):
    record = recorded(train__steps=10)
    record["resumed"] = [
        {"changed": {"train.steps": 15}, "versions": {"jax": "0.10.3"}},
        {"changed": {"train.steps": 20}, "versions": {"jax": "0.10.4"}},
    ]
    assert "| steps | 20 of 20 |" in card(folder, record)
    assert "Made with jax 0.10.4" in card(folder, record)


def test_a_run_of_an_older_version_has_a_card(folder):
    record = {"config": {"student.path": "a/b", "teacher.path": "c"}, "data": "abcd"}
    text = card(folder, record)
    assert "`b`, distilled on-policy from the teacher `c`" in text
    assert "```bash" not in text


def test_a_damaged_file_is_named(folder):
    (folder / "metrics.jsonl").write_text("{\n")
    with pytest.raises(workdirs.WorkdirError, match=r"metrics\.jsonl"):
        card(folder)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("embedded:student", "embedded:student"),
        ("/data/models/Small-1B/", "Small-1B"),
        ("models/Small-1B", "Small-1B"),
        ("~/Small-1B", "Small-1B"),
        ("/c/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b", "Qwen/Qwen2.5-0.5B"),
        ("/runs/one@40", "one@40"),
    ],
)
def test_names_for_others(path, name):
    assert model_card.public_name(path) == name


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--config=configs/demo.py:steps=20", "--config=configs/demo.py:steps=20"),
        ("--config=/a/b c/demo.py:rocks=/a/b/rocks,k=3", "--config=demo.py:rocks=rocks,k=3"),
        ("--workdir=/a/lr=1e-3/run/", "--workdir=run"),
        ("~me/x/run", "run"),
        ("/abs", "abs"),
        ("--config.data.prompts=embedded:prompts/train.jsonl", None),
        ("--config.data.prompts=../up/train.jsonl", None),
        ("--config.log.wandb=https://a/b", None),
        ("--config.rollout.bias=((5,-1.5),)", "'--config.rollout.bias=((5,-1.5),)'"),
    ],
)
def test_absolute_paths_of_a_command_lose_their_folders(word, expected):
    assert model_card.public_command(["opd-jax", word]) == f"opd-jax {expected or word}"
