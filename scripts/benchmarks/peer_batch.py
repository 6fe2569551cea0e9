"""The rows that all libraries of the peer benchmark get: ids, and the lengths they must have.

Beside the standard library it needs numpy alone: each worker runs in an environment of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import lengths
import numpy as np
from peer_job import EOS, PAD, UNKNOWN, word


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts, an answer to each, and how long they are.

    Attributes:
      prompt_BP: i32, left-padded with ``PAD``; as wide as the longest.
      completion_BN: i32, right-padded; as wide as the longest.
      prompts_B: ids of each prompt.
      answers_B: ids of each answer. Sampled answers have to have as many, the last being ``EOS``
        where rows end with it: that is the schedule.
    """

    prompt_BP: np.ndarray
    completion_BN: np.ndarray
    prompts_B: np.ndarray
    answers_B: np.ndarray

    @property
    def rows(self) -> list[list[int]]:
        """The prompts without padding."""
        width = self.prompt_BP.shape[1]
        pairs = zip(self.prompt_BP, self.prompts_B, strict=True)
        return [row[width - size :].tolist() for row, size in pairs]

    @property
    def answers(self) -> list[list[int]]:
        """The answers without padding."""
        pairs = zip(self.completion_BN, self.answers_B, strict=True)
        return [row[:size].tolist() for row, size in pairs]

    @property
    def texts(self) -> list[str]:
        """The prompts as the made-up tokenizer spells them."""
        return [" ".join(word(i) for i in row) for row in self.rows]

    @property
    def prompt_mask_BP(self) -> np.ndarray:
        """Which ids are of a prompt."""
        width = self.prompt_BP.shape[1]
        return np.arange(width)[None] >= width - self.prompts_B[:, None]

    @property
    def answer_mask_BN(self) -> np.ndarray:
        """Which ids are of an answer."""
        return np.arange(self.completion_BN.shape[1])[None] < self.answers_B[:, None]

    def check(self, sampled: Sequence[int]) -> None:
        """Refuse answers of other lengths than those of the schedule.

        Raises:
          RuntimeError: a row is longer or shorter.
        """
        wanted, found = self.answers_B.tolist(), [int(size) for size in sampled]
        if found != wanted:
            raise RuntimeError(f"sampled {found} ids a row: expected {wanted}, the schedule")

    def save(self, path) -> None:
        """Write the arrays where :func:`load` finds them."""
        np.savez(path, allow_pickle=False, **dataclasses.asdict(self))


def load(path: str) -> Batch:
    """Read what :meth:`Batch.save` wrote."""
    with np.load(path) as arrays:
        return Batch(**arrays)


def draw(rows: int, prompt: int, new: int, vocab: int, *, is_unequal: bool) -> Batch:
    """Random ids, the same on every call.

    Args:
      rows: prompts.
      prompt: ids of each, or of the longest that there may be.
      new: the same of the answers.
      vocab: ids of the models.
      is_unequal: lengths are those of :func:`lengths.spread`, and each answer ends with ``EOS``.
    """
    rng = np.random.default_rng(0)
    prompt_BP, completion_BN = (
        rng.integers(UNKNOWN + 1, vocab, (rows, size), np.int32) for size in (prompt, new)
    )
    prompts_B, answers_B = np.full(rows, prompt), np.full(rows, new)
    if is_unequal:
        prompts_B, answers_B = lengths.spread(rng, rows, longest_prompt=prompt, longest_answer=new)
    prompt_BP = prompt_BP[:, prompt - prompts_B.max() :]
    completion_BN = completion_BN[:, : answers_B.max()]
    batch = Batch(prompt_BP, completion_BN, prompts_B, answers_B)
    if is_unequal:
        completion_BN[np.arange(rows), answers_B - 1] = EOS
    completion_BN[~batch.answer_mask_BN] = PAD
    prompt_BP[~batch.prompt_mask_BP] = PAD
    return batch
