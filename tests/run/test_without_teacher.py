"""Cross-entropy alone: what asks for a teacher all the same, and what is nothing without one."""

import json

import pytest
import tiny_run

from opd_jax import position
from opd_jax.data import tokenizer as tokenizers

tiny, one_device = tiny_run.tiny, tiny_run.one_device
NONE = {"train__stage": "off_policy", "kl__ce": 1.0, "teacher__path": ""}
EVALUATED = {"eval__every": 2, "eval__kl_prompts": 0, "eval__teacher": False}
LORA = {"lora__rank": 2, "train__load_balance": 0.1}


@pytest.fixture(scope="module")
def answers(tiny, tmp_path_factory):
    """Completions of unequal lengths."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    tokenizer = tokenizers.load(tiny / "student")
    rows = [
        {"prompt": f"{i} + 2 = ?", "completion_ids": tokenizer.encode(f"{i} is it"[: 1 + i % 5])}
        for i in range(16)
    ]
    tiny_run.write_lines(path, rows)
    return path


# Each: what is set beside cross-entropy alone; what is told of it.
NEEDS_ONE = [
    *(
        ({"position__mode": mode}, ["teacher.path is ''", f"position.mode ({mode}) compares",
                                    "--config.position.mode=off does without"])
        for mode in position.MEASURED
    ),
    (EVALUATED | {"eval__kl_prompts": 4}, ["teacher.path is ''", "--config.eval.kl_prompts=0"]),
    (EVALUATED | {"eval__teacher": True}, ["teacher.path is ''", "--config.eval.teacher=False"]),
    (
        EVALUATED | {"eval__teacher": True, "eval__kl_prompts": 4, "position__mode": "tip"},
        ["teacher.path", "position.mode (tip) and eval.kl_prompts (4) and eval.teacher (True)",
         "--config.position.mode=off --config.eval.kl_prompts=0 --config.eval.teacher=False do "],
    ),
    ({"kl__ce": 0.9}, ["teacher.path is ''"]),
]  # fmt: skip
OF_ONE = [
    ({"teacher__offload": True}, ["teacher.offload is True: expected False"]),
    ({"data__teacher_prompt": "{prompt}"}, ["data.teacher_prompt is", "expected nothing"]),
    ({"data__teacher_system": "Think."}, ["data.teacher_system is", "expected nothing"]),
    ({"data__max_teacher_prompt": 20}, ["data.max_teacher_prompt is 20: expected 0"]),
]
GATES = [
    ({"rock__mode": "ema"}, ["rock.mode is 'ema'", "rock.score=count"]),
    ({"rock__mode": "adaptive", "rock__score": "count"}, ["rock.mode is 'adaptive'"]),
    ({"rock__mode": "ema", "rock__score": "count", "rock__persist": 0.9}, ["rock.persist=0"]),
]


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        *NEEDS_ONE,
        *((keys, [*parts, "kl.ce is 1", "compares with a teacher"]) for keys, parts in OF_ONE),
        *((keys, [*parts, "kl.ce is 1", "would be 0"]) for keys, parts in GATES),
        # A teacher that an evaluation alone asks scores nothing that is trained on.
        (
            EVALUATED | {"teacher__path": "embedded:teacher", "eval__kl_prompts": 4}
            | {"rock__mode": "ema"},
            ["rock.mode is 'ema'", "kl.ce is 1"],
        ),
        (
            EVALUATED | {"checkpoint__best": "kl_nats"},
            ["checkpoint.best is 'kl_nats'", "eval.kl_prompts is 0", "--config.checkpoint.best"],
        ),
        (LORA, ["train.load_balance is 0.1: expected 0 where lora.rank is above 0 (2)"]),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(tiny, answers, tmp_path, capsys, keys, parts):
    """Both keys are named, and nothing is written."""
    given = NONE | {"data__prompts": answers} | keys
    assert tiny_run.train(tiny, tmp_path / "run", **given) == 1
    told = capsys.readouterr().err
    for part in parts:
        assert part in told
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_device")
def test_types_may_be_gated_by_what_is_counted(tiny, answers, tmp_path):
    keys = NONE | {"data__prompts": answers, "rock__mode": "ema", "rock__score": "count"}
    assert tiny_run.train(tiny, tmp_path / "run", **keys, rock__top_k=1) == 0
    lines = tiny_run.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["gated_share"] > lines[0]["gated_share"] == 0


def test_weights_by_position_ask_a_teacher_that_rests(tiny, answers, tmp_path, monkeypatch):
    """Cross-entropy alone, of the half of the positions at which the models differ most."""
    keys = {"train__stage": "off_policy", "kl__ce": 1.0, "data__prompts": answers}
    keys |= {"data__shuffle": False, "train__steps": 2, "position__mode": "tip"}
    keys |= {"rock__mode": "ema", "rock__top_k": 1, "train__microbatches": 2}
    meshed = keys | {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2}
    found = {}
    assert tiny_run.train(tiny, tmp_path / "mesh", teacher__offload=True, **meshed) == 0
    tiny_run.use_one_device(monkeypatch)
    for offload in (False, True):
        assert tiny_run.train(tiny, tmp_path / str(offload), teacher__offload=offload, **keys) == 0
        found[offload] = tiny_run.curve(tmp_path / str(offload))
    assert found[True] == found[False]
    for line, other in zip(found[True], tiny_run.curve(tmp_path / "mesh"), strict=True):
        names = ("loss", "cross_entropy_nats", "divergence", "kept_share", "grad_norm")
        assert {n: line[n] for n in names} == pytest.approx({n: other[n] for n in names}, rel=1e-3)
        assert line["kept_share"] == pytest.approx(0.5, abs=0.1)
        assert line["divergence"] > 0.1  # which types are gated by, too
        assert line["loss"] != pytest.approx(line["cross_entropy_nats"], rel=0.05)
    record = json.loads((tmp_path / "True" / "run.json").read_text())
    assert sorted(record["inputs"]) == ["prompts", "student", "teacher"]
