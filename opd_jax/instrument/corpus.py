"""What the analyses work on: a corpus of answers, its scored positions, and sums per type.

On the host everything is ragged and flat: a position is one sampled token, in the order of answers
and, within one, of time. A *type* is a vocabulary item; every per-type number is keyed on the token
that a position *predicts*.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
import pydantic
from typing_extensions import TypedDict

from opd_jax import files, objective, records
from opd_jax.data import widths
from opd_jax.pytrees import RockState, Rollout

MANIFEST = "corpus.json"


class CorpusError(ValueError):
    """A corpus cannot be used; the message says why and what to do."""


@pydantic.with_config(records.OPEN)
class Manifest(TypedDict):
    """What ``corpus.json`` holds; ``collect.write`` adds how the answers were sampled."""

    pieces: Annotated[int, pydantic.Field(ge=0, le=10_000_000)]
    writer: NotRequired[str]
    tokenizer_size: NotRequired[int]
    max_new: NotRequired[int]
    temperature: NotRequired[float]
    samples: NotRequired[int]
    seed: NotRequired[int]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Answers to prompts, as ids.

    Attributes:
      info: who wrote it and how (``corpus.json``).
      prompts: prompt ids, answer by answer.
      answers: sampled ids, answer by answer; a sampled stop id is the last one.
      problem_A: i32, the prompt's line in its file, answer by answer.
      truncated_A: bool, the answer ended by length and not by a stop id.
    """

    info: Mapping[str, Any]
    prompts: Sequence[np.ndarray]
    answers: Sequence[np.ndarray]
    problem_A: np.ndarray
    truncated_A: np.ndarray

    @property
    def num_positions(self) -> int:
        """Scored positions of all answers."""
        return int(self.offset_A[-1])

    @functools.cached_property
    def offset_A(self) -> np.ndarray:
        """First position of each answer in the flat order, and their number at the end, [A + 1]."""
        return np.cumsum([0, *(len(ids) for ids in self.answers)])

    @functools.cached_property
    def token_id(self) -> np.ndarray:
        """The predicted id of every position, i32."""
        return np.concatenate([np.asarray(ids, np.int32) for ids in self.answers])

    @functools.cached_property
    def answer(self) -> np.ndarray:
        """The answer of every position, i32."""
        return np.repeat(np.arange(len(self.answers), dtype=np.int32), np.diff(self.offset_A))

    @functools.cached_property
    def position(self) -> np.ndarray:
        """The place of every position in its answer, i32, from 0."""
        start = np.repeat(self.offset_A[:-1], np.diff(self.offset_A))
        return (np.arange(self.num_positions) - start).astype(np.int32)

    def batches(self, size: int, *, pad_id: int = 0) -> Iterator[tuple[Rollout, np.ndarray]]:
        """Cut the corpus into batches of exactly ``size`` rows, answers of like length together.

        Yields a host rollout and the answer number of each row, -1 where a row only fills up (its
        mask is empty). Widths are multiples of 64.
        """
        length_A = np.array([len(p) + len(a) for p, a in zip(self.prompts, self.answers)])  # noqa: B905
        order = np.argsort(-length_A, kind="stable")
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            index_B = np.concatenate([chosen, np.full(size - len(chosen), -1)]).astype(np.int32)
            yield self._rollout(index_B, pad_id), index_B

    def _rollout(self, index_B: np.ndarray, pad_id: int) -> Rollout:
        # Answers start in one column, so a row may be wider than its own prompt and answer.
        prompt_width = max(len(self.prompts[i]) for i in index_B if i >= 0)
        longest = prompt_width + max(len(self.answers[i]) for i in index_B if i >= 0)
        width = widths.padded(longest)
        ids_BT = np.full((len(index_B), width), pad_id, np.int32)
        mask_BT = np.zeros(ids_BT.shape, bool)
        start_B = np.zeros(len(index_B), np.int32)
        for row, index in enumerate(index_B):
            prompt, answer = self.prompts[max(index, 0)], self.answers[max(index, 0)]
            start_B[row] = prompt_width - len(prompt) if index >= 0 else 0
            if index < 0:
                continue
            end = prompt_width + len(answer)
            ids_BT[row, start_B[row] : end] = np.concatenate([prompt, answer])
            mask_BT[row, prompt_width:end] = True
        arrays = {
            "ids_BT": ids_BT,
            "start_B": start_B,
            "mask_BT": mask_BT,
            "logp_BT": np.zeros(ids_BT.shape, np.float32),
            "truncated_B": self.truncated_A[np.maximum(index_B, 0)] & (index_B >= 0),
            "policy_step": np.int32(0),
        }
        return Rollout(**arrays)  # pyright: ignore[reportArgumentType]

    def place(
        self, out: np.ndarray, values_BT: np.ndarray, rollout: Rollout, index_B: np.ndarray
    ) -> None:
        """Write a batch's values into the flat order.

        Args:
          out: [positions, ...], changed in place.
          values_BT: [B, T - 1, ...], at the positions that predict, as the steps return them.
          rollout, index_B: what :meth:`batches` gave.
        """
        mask_BT = objective.predicted(rollout).mask_BT
        for row, index in enumerate(index_B):
            if index >= 0:
                first, last = self.offset_A[index], self.offset_A[index + 1]
                out[first:last] = values_BT[row][mask_BT[row]]


@dataclasses.dataclass(frozen=True)
class Occurrences:
    """The scored positions of a corpus under one student and one teacher; arrays of one length.

    Attributes:
      answer, problem, position, token_id: i32; see :class:`Corpus`.
      kl: f32, exact KL(student || teacher) over the full vocabulary, nats.
      log_ratio: f32, log p_student - log p_teacher of the token itself: the one-sample estimator.
      logp: f32, log p_student of the token.
      entropy, teacher_entropy: f32, nats.
      vocab_size: ids of the models (padded).
    """

    answer: np.ndarray
    problem: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    kl: np.ndarray
    log_ratio: np.ndarray
    logp: np.ndarray
    entropy: np.ndarray
    teacher_entropy: np.ndarray
    vocab_size: int

    def __len__(self) -> int:
        return len(self.token_id)

    def where(self, chosen: np.ndarray) -> Occurrences:
        """The positions that a boolean mask, or an index array, chooses."""
        return dataclasses.replace(self, **{n: getattr(self, n)[chosen] for n in _ARRAYS})

    def save(self, path: str | os.PathLike) -> None:
        """Write a ``.npz`` file, whole or not at all."""
        write_npz(path, {n: getattr(self, n) for n in _ARRAYS} | {"vocab_size": self.vocab_size})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Occurrences:
        """Read what :meth:`save` wrote.

        Raises:
          CorpusError: it is damaged.
        """
        try:
            with load_npz(path) as file:
                found = cls(**{n: file[n] for n in _ARRAYS}, vocab_size=int(file["vocab_size"]))
            if len({getattr(found, n).shape for n in _ARRAYS}) > 1 or found.token_id.ndim != 1:
                raise ValueError("arrays of different length")
        except DAMAGED as error:
            raise CorpusError(
                f"{path} cannot be read ({error}): expected the scores of a corpus; remove the "
                "file to have it made again"
            ) from error
        return found


_ARRAYS = tuple(f.name for f in dataclasses.fields(Occurrences) if f.name != "vocab_size")


@dataclasses.dataclass(frozen=True)
class TypeStats:
    """Sums over the positions of each type; float64 arrays [V].

    ``kl_sum`` is the Rock Score (frequency x mean KL, arXiv 2605.09253); it adds up to the KL of
    the whole corpus.
    """

    count: np.ndarray
    kl_sum: np.ndarray
    kl_sq: np.ndarray

    @classmethod
    def of(cls, token_id: np.ndarray, kl: np.ndarray, vocab_size: int) -> TypeStats:
        """Sum positions by their predicted id."""
        kl = np.asarray(kl, np.float64)
        sums = [
            np.bincount(token_id, w, minlength=vocab_size) for w in (np.ones_like(kl), kl, kl**2)
        ]
        return cls(*sums)

    @classmethod
    def of_occurrences(cls, found: Occurrences) -> TypeStats:
        """Sum the exact KL of a corpus by predicted id."""
        return cls.of(found.token_id, found.kl, found.vocab_size)

    @classmethod
    def of_state(cls, rock: RockState) -> TypeStats:
        """The (decayed) sums of a training run, on the host."""
        arrays = (rock.count_V, rock.kl_sum_V, rock.kl_sq_V)
        return cls(*(np.asarray(x, np.float64) for x in arrays))

    @classmethod
    def total(cls, parts: Sequence[TypeStats]) -> TypeStats:
        """The sums of several corpora, or parts of one, together."""
        return cls(
            *(np.sum([getattr(p, f.name) for p in parts], axis=0) for f in dataclasses.fields(cls))
        )

    @property
    def mean(self) -> np.ndarray:
        """Mean KL by type, 0 where a type was not seen."""
        return np.divide(self.kl_sum, self.count, out=np.zeros_like(self.kl_sum), where=self.seen)

    @property
    def squares(self) -> np.ndarray:
        """Sum of squared deviations of KL from the type's mean."""
        return np.maximum(self.kl_sq - self.kl_sum * self.mean, 0)

    @property
    def std(self) -> np.ndarray:
        """Sample standard deviation of KL by type, NaN where a type was seen less than twice."""
        several = self.count >= 2
        out = np.full_like(self.kl_sum, np.nan)
        return np.sqrt(np.divide(self.squares, self.count - 1, out=out, where=several))

    @property
    def share(self) -> np.ndarray:
        """Share of all KL by type; 0 where there is no KL at all."""
        total = self.kl_sum.sum()
        return self.kl_sum / total if total else np.zeros_like(self.kl_sum)

    @property
    def seen(self) -> np.ndarray:
        """Types with at least one position, bool."""
        return self.count > 0


def write_npz(path: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    """Write arrays so that a reader sees the old file or the new one, never a part."""
    with files.replacing(Path(path), "wb") as stream:
        np.savez(stream, **arrays)


DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def load_npz(path: str | os.PathLike) -> Iterator[Mapping[str, np.ndarray]]:
    """Open a ``.npz`` file of ours; what is damaged raises one of ``DAMAGED``."""
    records.regular(Path(path))
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        yield file


def write_answers(folder: Path, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one piece of a corpus: dicts of prompt, answer (ids), problem and truncated."""
    if not rows:
        raise ValueError("no rows: expected at least one answer per piece")
    write_npz(
        piece(folder, number),
        {
            name: np.concatenate([np.asarray(row[name], np.int32) for row in rows])
            for name in ("prompt", "answer")
        }
        | {f"{name}_length": [len(row[name]) for row in rows] for name in ("prompt", "answer")}
        | {"problem": np.asarray([row["problem"] for row in rows], np.int32)}
        | {"truncated": np.asarray([row["truncated"] for row in rows], bool)},
    )


def piece(folder: Path, number: int) -> Path:
    """The file of one piece of a corpus."""
    return folder / f"answers-{number:05d}.npz"


def write_manifest(folder: Path, info: Mapping[str, Any]) -> None:
    """Write ``corpus.json``, the last file of a corpus that is whole."""
    files.write_atomic(folder / MANIFEST, json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def read(folder: str | os.PathLike) -> Corpus:
    """Read a corpus that is whole.

    Raises:
      CorpusError: it is not there, not whole, damaged, or empty.
    """
    folder = Path(folder)
    change = "collect it again with opd-jax rocks, or give another folder"
    try:
        info = records.read(folder / MANIFEST, Manifest, change=change)
    except FileNotFoundError as error:
        raise CorpusError(
            f"{folder} has no {MANIFEST}: expected a corpus that was collected to the end; {change}"
        ) from error
    except records.RecordError as error:
        raise CorpusError(str(error)) from error
    prompts: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    problems, truncated = [], []
    for number in range(info["pieces"]):
        try:
            with load_npz(piece(folder, number)) as file:
                for name, ids in (("prompt", prompts), ("answer", answers)):
                    ids += np.split(file[name], np.cumsum(file[f"{name}_length"])[:-1])
                problems.append(file["problem"])
                truncated.append(file["truncated"])
        except DAMAGED as error:
            raise CorpusError(
                f"{piece(folder, number)} cannot be read ({error}): expected piece {number} of "
                f"{info['pieces']}; {change}"
            ) from error
    if not sum(len(ids) for ids in answers):
        raise CorpusError(
            f"{folder} holds no scored token: expected answers of at least one id; {change}"
        )
    return Corpus(info, prompts, answers, np.concatenate(problems), np.concatenate(truncated))
