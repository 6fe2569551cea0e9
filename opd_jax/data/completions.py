"""Completions to imitate: as ids, exactly as they were sampled, or as text, tokenised once.

A text becomes what the model would have written after the prompt: the ids behind the prompt's own
in the encoding of both together, then the id that ends a turn of the assistant's in the chat
template (EOS where the prompt is no chat). Ids are taken as they are: they end in a stop id where
the answer was whole, and in another one where its length limit cut it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opd_jax.data import tokenizer as tokenizers
from opd_jax.data.fields import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Pairs = tuple[tuple[str, Any], ...]  # arguments of the chat template, (name, value)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a completion may be.

    Attributes:
      max_new: most ids, the stop id included; what is longer is cut.
      stop_ids: that end an answer.
    """

    max_new: int
    stop_ids: tuple[int, ...]

    def __post_init__(self):
        if self.max_new < 1 or not self.stop_ids:
            raise ValueError(
                f"completions of at most {self.max_new} ids that end at {self.stop_ids}: expected "
                "at least 1, and a stop id; change max_new, or name an EOS in the tokenizer"
            )


def end_id(
    record: Record,
    tokenizer: PreTrainedTokenizerFast,
    stop_ids: tuple[int, ...],
    now: str | None,
    template: Pairs,
) -> int:
    """The stop id that ends a text: what the chat template writes behind an answer, else EOS.

    Raises:
      ValueError: neither is there.
    """
    if isinstance(record.prompt, list) and tokenizer.chat_template:
        for token_id in _behind_an_answer(tokenizer, now, template):
            if token_id in stop_ids:
                return token_id
    if isinstance(tokenizer.eos_token_id, int):
        return tokenizer.eos_token_id
    if len(stop_ids) == 1:
        return stop_ids[0]
    raise ValueError(
        f"the EOS id is {tokenizer.eos_token_id!r} and the stop ids {stop_ids}: expected one id to "
        "end completions with; set eos_token in tokenizer_config.json"
    )


@functools.lru_cache(maxsize=8)
def _behind_an_answer(
    tokenizer: PreTrainedTokenizerFast, now: str | None, template: Pairs
) -> tuple[int, ...]:
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    text, _ = tokenizers.written(tokenizer, turns, now=now, is_asked=False, **dict(template))
    behind = text[text.rindex("2") + 1 :]
    return tuple(int(i) for i in tokenizer.encode(behind, add_special_tokens=False))


def ids_of(
    record: Record,
    prompt_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerFast,
    limits: Limits,
    end_id: int,
    *,
    now: str | None = None,
    template: Pairs = (),
) -> tuple[tuple[int, ...], bool]:
    """The completion of a row as ids, and whether it is whole.

    Args:
      record: the row.
      prompt_ids: of its prompt, before any cut.
      tokenizer: of the student.
      limits: what it may be.
      end_id: ends a text.
      now, template: as the prompt was rendered.

    Raises:
      ValueError: there is none, or a stop id stands inside it.
    """
    if record.completion_ids is not None:
        ids = list(record.completion_ids)
    elif record.completion is not None:
        ids = _encoded(record, prompt_ids, tokenizer, now, template)
        if not ids or ids[-1] not in limits.stop_ids:
            ids.append(end_id)
    else:
        raise ValueError(
            "no `completion` and no `completion_ids`: expected one on every line where train.stage "
            "is not on_policy; add it, or map yours by --config.data.columns.completion=NAME"
        )
    inside = [place for place, token_id in enumerate(ids[:-1]) if token_id in limits.stop_ids]
    if inside:
        stop = tokenizers.token_text(tokenizer, ids[inside[0]])
        raise ValueError(
            f"the completion has the stop id {ids[inside[0]]} {stop!r} as its {inside[0] + 1}. of "
            f"{len(ids)} ids: expected it last, where an answer ends; cut what stands behind it"
        )
    return tuple(ids[: limits.max_new]), len(ids) <= limits.max_new and ids[-1] in limits.stop_ids


def check_spelling(record: Record, tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that ids and text of one row say the same, where it has both.

    Raises:
      ValueError: they do not: the ids are another tokenizer's.
    """
    for name, ids, text, is_bare in (
        ("prompt", record.prompt if isinstance(record.prompt, tuple) else None, record.text, False),
        ("completion", record.completion_ids, record.completion, True),
    ):
        if ids is None or text is None:
            continue
        spelt = str(
            tokenizer.decode(
                list(ids), skip_special_tokens=is_bare, clean_up_tokenization_spaces=False
            )
        )
        if spelt.strip() != text.strip():
            raise ValueError(
                f"{name}_ids spell {spelt[:60]!r} and {name} is {text[:60]!r}: expected ids of "
                "this tokenizer; write them by opd-jax generate with a model of this vocabulary, "
                "or remove one of the columns"
            )


def _encoded(record, prompt_ids, tokenizer, now, template) -> list[int]:
    text = record.completion
    if len(text) > tokenizers.MAX_CHARS:
        raise ValueError(
            f"the completion has {len(text)} characters: expected at most {tokenizers.MAX_CHARS}; "
            "split it, or drop the line"
        )
    if not isinstance(record.prompt, tuple):
        asked, is_begun = tokenizers.written(tokenizer, record.prompt, now=now, **dict(template))
        both = tokenizer.encode(asked + text, add_special_tokens=not is_begun)
        if both[: len(prompt_ids)] == list(prompt_ids):
            return [int(i) for i in both[len(prompt_ids) :]]
    # The prompt is ids, or its last token and the first of the completion would become one.
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
