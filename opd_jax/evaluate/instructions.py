"""Instruction following (IFEval), checked by lm-evaluation-harness's own code.

The gold answer is a JSON object with ``prompt``, ``instruction_id_list`` and ``kwargs``, as IFEval
has them. A response is right when it follows all of its instructions ("prompt-level strict").
"""

from __future__ import annotations

import importlib
from typing import Any

from typing_extensions import TypedDict

from opd_jax import records

FOLLOWED, NOT_FOLLOWED = "all instructions followed", "an instruction not followed"
_MODULE = "lm_eval.tasks.ifeval.utils"


class Instructions(TypedDict):
    """What a response has to follow; further fields are IFEval's own."""

    prompt: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]


def read(gold: str) -> Instructions:
    """Read a gold answer.

    Raises:
      RecordError: it is not what the module's docstring says.
    """
    change = "write prompt, instruction_id_list and kwargs as IFEval does"
    found = records.parse(gold, Instructions, where="the gold answer", change=change)
    if len(found["kwargs"]) != len(found["instruction_id_list"]):
        raise records.RecordError(
            f"{len(found['instruction_id_list'])} instructions and {len(found['kwargs'])} kwargs: "
            f"expected one each; {change}"
        )
    return found


def follows(response: str, gold: str) -> bool:
    """Whether a response follows all instructions.

    Raises:
      ImportError: the harness, or what its checks need (data of nltk), is not installed.
      RecordError: the gold answer cannot be read.
      ValueError: an instruction that the harness does not know, or arguments that it cannot use.
    """
    wanted = read(gold)
    try:
        harness = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ImportError(
            f"the grader ifeval needs lm-evaluation-harness ({error}): expected {_MODULE}; "
            "pip install 'opd-jax[lm-eval]'"
        ) from error
    example = harness.InputExample(
        key=0,
        instruction_id_list=wanted["instruction_id_list"],
        prompt=wanted["prompt"],
        kwargs=wanted["kwargs"],
    )
    try:
        checked = harness.test_instruction_following_strict(example, response)
    except Exception as error:  # its checks raise anything on arguments that are not theirs
        if isinstance(error, KeyError) and {*error.args} & {*wanted["instruction_id_list"]}:
            raise ValueError(
                f"the instruction {error} is not known to lm-evaluation-harness: expected one of "
                "its own; correct instruction_id_list"
            ) from error
        if isinstance(error, LookupError) and "nltk" in str(error):
            raise ImportError(
                f"{', '.join(wanted['instruction_id_list'])} is checked with data of nltk that is "
                "not here: expected punkt_tab; python -m nltk.downloader punkt_tab"
            ) from error
        raise ValueError(
            f"lm-evaluation-harness cannot check {', '.join(wanted['instruction_id_list'])} with "
            f"kwargs {wanted['kwargs']} ({type(error).__name__}: {error}): expected arguments as "
            "IFEval has them; correct kwargs"
        ) from error
    return bool(checked.follow_all_instructions)
