"""Rules between the groups of a configuration, which no group can check by itself."""

from __future__ import annotations

from typing import Any

from opd_jax.data.fields import TEACHER
from opd_jax.spec import ConfigError, RunConfig

# What a run does without each key that compares with a teacher.
_WITHOUT = {
    "position.mode": "off",
    "eval.kl_prompts": "0",
    "eval.teacher": "False",
}
# What is nothing without a teacher, beside its path, which may be named for later.
_OF_THE_TEACHER = {
    "teacher.offload": False,
    "data.teacher_prompt": "",
    "data.teacher_system": "",
    "data.max_teacher_prompt": 0,
}


def check(run: RunConfig) -> None:
    """Check what groups say together, and what has no default.

    Raises:
      ConfigError: the first thing that does not fit; it names the flag to change.
    """
    rule = _Rule(run)
    rule(bool(run.student.path), "student.path", "a Hugging Face model folder")
    _check_teacher(run, rule)
    rule(0 <= run.seed < 2**32, "seed", "from 0 to 2^32 - 1")
    rule(bool(run.data.prompts), "data.prompts", "a file of prompts, such as JSONL")
    rows = run.train.prompts * run.rollout.samples
    rule(
        rows % run.train.microbatches == 0,
        "train.microbatches",
        f"a divisor of train.prompts x rollout.samples ({rows})",
    )
    rule(
        not (run.train.pack and run.data.frames),
        "train.pack",
        "False with data.teacher_prompt: the teacher's rows, behind prompts of its own, are not "
        "those of the student",
    )
    rule(
        not (run.train.pack and run.teacher.paths),
        "train.pack",
        "False with teacher.paths: rows of several teachers would lie in one",
    )
    rule(
        not run.kl.ce or run.train.stage == "off_policy",
        "kl.ce",
        f"0 where train.stage is {run.train.stage}: on answers that the student drew itself the "
        "gradient of their cross-entropy is zero on average, so that it would add noise alone",
    )
    _check_gate(run, rule)
    if run.eval.every:
        rule(bool(run.data.heldout), "data.heldout", "a JSONL file, since eval.every is above 0")
        rule(
            run.checkpoint.best != "kl_nats" or run.eval.kl_prompts > 0,
            "checkpoint.best",
            "accuracy or nothing, since eval.kl_prompts is 0 and no KL is measured",
        )
    else:
        rule(not run.checkpoint.best, "checkpoint.best", "empty, since eval.every is 0")
    rule(
        not (run.lora.rank and "optimizer" in run.kept),
        "init_keep",
        "no optimizer where lora.rank is above 0: adapters are new at the start of a run, and so "
        "are their moments",
    )
    rule(
        not (run.lora.rank and run.train.load_balance),
        "train.load_balance",
        f"0 where lora.rank is above 0 ({run.lora.rank}): routers and experts are frozen then, and "
        "this loss would bend the attention before them alone; fullest_expert_share is measured "
        "all the same",
    )
    _ = run.profiled, run.kept  # raise


class _Rule:
    """Raises of a key of a run what is expected, where it is not so."""

    def __init__(self, run: RunConfig):
        self.run = run

    def __call__(self, ok: bool, key: str, expected: str) -> None:
        if not ok:
            raise ConfigError(
                f"{key} is {_value(self.run, key)!r}: expected {expected}; set --config.{key}"
            )


def _check_teacher(run: RunConfig, rule: _Rule) -> None:
    """There is a teacher where something compares with one, and no word of it where nothing does.

    A run that trains on cross-entropy alone (``kl.ce`` 1) has none by default.
    """
    asking = [key for key in run.compared_by if key in _WITHOUT]
    more = ""
    if run.kl.ce == 1 and asking:
        asked = " and ".join(f"{key} ({_value(run, key)})" for key in asking)
        flags = " ".join(f"--config.{key}={_WITHOUT[key]}" for key in asking)
        is_one = len(asking) == 1
        more = f", since {asked} {'compares' if is_one else 'compare'} with it ({flags} "
        more += "does without)" if is_one else "do without)"
    if run.has_teacher:
        rule(
            bool(run.teacher.path or run.teacher.paths),
            "teacher.path",
            f"a Hugging Face model folder{more}",
        )
        rule(
            bool(run.teacher.paths) or TEACHER not in dict(run.data.columns),
            "data.columns",
            "no column that names teachers, where teacher.paths name none: give each by "
            "--config.teacher.paths.NAME=MODEL; or leave that column out",
        )
        return
    for key, nothing in _OF_THE_TEACHER.items():
        rule(
            _value(run, key) == nothing,
            key,
            f"{repr(nothing) if nothing != '' else 'nothing'}, since kl.ce is 1 and nothing here "
            "compares with a teacher: no loss, no weights by position (position.mode) and no "
            "evaluation",
        )


def _check_gate(run: RunConfig, rule: _Rule) -> None:
    """The gate of types has something to go by, and steps to act in."""
    rule(
        not run.rock.is_scored or run.kl.ce < 1 or run.position.is_measured,
        "rock.mode",
        "off, static or random, or rock.score=count with rock.persist=0, since kl.ce is 1: "
        "training asks no teacher, so that every divergence that types are chosen by would be 0",
    )
    gates = run.rock.mode != "off" and run.train.steps > 0
    rule(
        not gates or run.rock.start < run.train.steps,
        "rock.start",
        f"below train.steps ({run.train.steps}), or nothing is ever gated",
    )
    # Types are found after step ``every``, and gate from the next on.
    end = min(run.train.steps, run.rock.until or run.train.steps)
    rule(
        not (gates and run.rock.is_refreshed) or run.rock.every < end,
        "rock.every",
        f"below {end} (the end of the gate: train.steps or rock.until), or nothing is ever gated",
    )


def _value(run: RunConfig, key: str) -> Any:
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value
