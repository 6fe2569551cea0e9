"""Collect a corpus of answers, and measure every position of one: forward passes only.

Writing goes piece by piece, so that a killed collection goes on after its last whole piece. An
answer depends on its prompt's line, the seed and the writer, not on the batch it was sampled in.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opd_jax import files, objective, processes, records, rock, steps
from opd_jax import mesh as meshlib
from opd_jax.data import prompts as prompt_files
from opd_jax.data import widths
from opd_jax.data.prompts import Example
from opd_jax.evaluate import growth
from opd_jax.instrument import corpus as corpora
from opd_jax.instrument.corpus import Corpus, CorpusError, Occurrences, TypeStats
from opd_jax.models import memory
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Params, RockState, Rollout, TokenKL
from opd_jax.rock import RockConfig
from opd_jax.rollout import answers as drawing
from opd_jax.rollout import refill
from opd_jax.rollout.sampling import Sampler
from opd_jax.store.pair import Pair

STARTED = "collecting.json"  # flags of a collection, written before its first piece
_PLAIN = RockConfig(decay=1.0, fast_decay=1.0)  # corpus sums: nothing decays


def write(
    folder: str | Path,
    pair: Pair,
    rows: Sequence[Example],
    *,
    writer: Params | None = None,
    name: str | None = None,
    cfg: ModelConfig | None = None,
    max_new: int,
    temperature: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch: int = 16,
    slots: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Sample answers to all rows into ``folder`` and read them back; goes on where it was stopped.

    Args:
      folder: a new folder, or that of the same collection, finished or not.
      pair: gives tokenizer, stop ids, mesh and positions.
      rows: prompts; answer j of the prompt on line i is the same whatever else is in the file.
      writer: parameters that sample; default: the pair's student.
      name: of the writer, kept with the corpus; needed with ``writer``.
      cfg: of the writer; default: the student's.
      max_new: most ids of an answer; past it the answer counts as truncated.
      temperature: 0 is greedy.
      samples: answers per prompt.
      seed: of the draws.
      batch: prompts at a time, rounded up to the mesh; may change when a collection goes on.
      slots: answers decoded at a time, see ``rollout.refill``; 0: all of a batch; may change, too.
      say: receives progress.

    Raises:
      CorpusError: the folder holds another collection or something else; a writer whose
        logits are not finite.
      ValueError: flags out of range, no rows, or prompts and answers longer than the models allow.
    """
    if (writer is None) != (name is None):
        raise ValueError(
            f"writer is {'absent' if writer is None else 'given'} and its name {name!r}: expected "
            "both or neither, as the corpus says who wrote it; pass name="
        )
    _check(pair, rows, max_new, samples, batch, temperature)
    drawing.check_slots(slots, batch, samples, pair.mesh)
    folder, name = Path(folder), name or pair.student_name
    info = {
        "writer": name,
        "tokenizer_size": pair.vocab_size,
        "prompts": prompt_files.digest(rows),
        "num_prompts": len(rows),
        "max_new": max_new,
        "temperature": temperature,
        "samples": samples,
        "seed": seed,
    }
    if _is_whole(folder, info):
        return _checked(corpora.read(folder), pair, folder)
    pieces, done = _resume(folder, rows, samples)
    if done:
        say(f"going on after {done} of {len(rows)} prompts in {folder}")
    processes.meet("corpus looked at")  # before anybody changes it
    if jax.process_index() == 0:
        files.write_atomic(folder / STARTED, json.dumps(info, indent=2) + "\n")
        for stale in sorted(folder.glob("answers-*.npz"))[pieces:]:
            stale.unlink()  # what follows a damaged piece would be out of order
    size = meshlib.batch_rows(min(batch, len(rows)), pair.mesh)
    cfg = cfg or pair.cfg.student
    widest = widths.padded(max(len(row.ids) for row in rows))
    cells = refill.cells(cfg, size, samples, widest, max_new, pair.mesh, wanted=slots)
    lower = f"lower {refill.FLAGS}"
    memory.check([memory.Need("keys and values", cells, lower)], pair.mesh)
    draw = functools.partial(
        drawing.sample,
        pair.student if writer is None else writer,
        key=jax.random.key(seed),
        mesh=pair.mesh,
        cfg=cfg,
        sampler=Sampler(
            vocab_size=pair.vocab_size,
            temperature=temperature,
            stop_ids=pair.sampler.stop_ids,
            pad_id=pair.sampler.pad_id,
        ),
        max_new=max_new,
        size=size,
        samples=samples,
        slots=slots,
    )
    progress = growth.Progress("prompts", len(rows), done, say)
    for first in range(done, len(rows), size):
        part = rows[first : first + size]
        width = widths.padded(max(len(row.ids) for row in part))
        # Drawn by line, so that --limit or a dropped prompt does not change anybody else's answer.
        drawn = draw(rows=part, width=width, numbers=[row.index for row in part])
        with jax.set_mesh(pair.mesh):
            (answers,) = [meshlib.to_host(answers) for answers, _ in drawn]
        found = _rows(answers, part, samples, name)
        if jax.process_index() == 0:
            corpora.write_answers(folder, pieces, found)
        pieces += 1
        progress.add(len(part), [{"tokens": len(row["answer"])} for row in found])
    if progress.fresh:
        progress.tell()

    def finish() -> None:
        corpora.write_manifest(folder, info | {"pieces": pieces})
        (folder / STARTED).unlink(missing_ok=True)

    processes.on_first(finish)
    return _checked(corpora.read(folder), pair, folder)


def score(
    corpus: Corpus,
    pair: Pair,
    *,
    student: Params | None = None,
    batch: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> Occurrences:
    """Measure every position of a corpus: exact KL, log-ratio and entropies, teacher-forced.

    Args:
      corpus: answers, by whatever writer.
      pair: student and teacher.
      student: other parameters in the student's place.
      batch: answers at a time, rounded up to the mesh; does not change the result.
      say: receives progress.

    Raises:
      CorpusError: a corpus of another tokenizer, or one longer than the models allow.
    """
    return score_types(corpus, pair, student=student, batch=batch, say=say)[0]


def score_types(
    corpus: Corpus,
    pair: Pair,
    *,
    student: Params | None = None,
    batch: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Occurrences, TypeStats]:
    """:func:`score`, with the sums per type that the devices added up in the same pass.

    The sums are those of the training gate with nothing decayed, so they equal
    ``TypeStats.of_occurrences`` up to f32 rounding.

    **Sharding**: answers over the batch axes, vocabulary over ``model``; sums replicated.
    """
    _checked(corpus, pair, "the corpus")
    longest = max(len(p) + len(a) for p, a in zip(corpus.prompts, corpus.answers, strict=True))
    if longest > pair.max_positions:
        raise CorpusError(
            f"the corpus has an answer that ends at position {longest}: expected at most "
            f"{pair.max_positions}, which both models have; lower --max-new or --max-prompt"
        )
    size = meshlib.batch_rows(min(batch, len(corpus.answers)), pair.mesh)
    names = ("reverse_BT", "logp_BT", "teacher_logp_BT", "entropy_BT", "teacher_entropy_BT")
    flat = {name: np.zeros(corpus.num_positions, np.float32) for name in names}
    progress = growth.Progress("answers", len(corpus.answers), 0, say)
    with jax.set_mesh(pair.mesh):
        state = meshlib.replicated(rock.init(pair.cfg.student.vocab_size, cfg=_PLAIN))
        for host, index_B in corpus.batches(size, pad_id=pair.sampler.pad_id):
            batch_of = meshlib.to_global(meshlib.own_rows(host), pair.mesh)
            tokens, state = _measure(
                pair.student if student is None else student,
                pair.teacher,
                batch_of,
                state,
                cfg=pair.cfg,
            )
            for name, values_BT in meshlib.to_host({n: getattr(tokens, n) for n in names}).items():
                corpus.place(flat[name], values_BT, host, index_B)
            progress.add(int(np.sum(index_B >= 0)), [{"tokens": int(host.mask_BT.sum())}])
    progress.tell()
    found = Occurrences(
        answer=corpus.answer,
        problem=corpus.problem_A[corpus.answer].astype(np.int32),
        position=corpus.position,
        token_id=corpus.token_id,
        kl=flat["reverse_BT"],
        log_ratio=flat["logp_BT"] - flat["teacher_logp_BT"],
        logp=flat["logp_BT"],
        entropy=flat["entropy_BT"],
        teacher_entropy=flat["teacher_entropy_BT"],
        vocab_size=pair.cfg.student.vocab_size,
    )
    return found, TypeStats.of_state(meshlib.to_host(state))


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def _measure(
    params: Params, teacher: Params, answers: Rollout, state: RockState, *, cfg: ObjectiveConfig
) -> tuple[TokenKL, RockState]:
    _, tokens = steps.eval_step(params, teacher, answers, state, cfg=cfg)
    next_ = objective.predicted(answers)
    return tokens, rock.update(state, next_.ids_BT, tokens.reverse_BT, next_.mask_BT, cfg=_PLAIN)


def _rows(
    answers: Rollout, part: Sequence[Example], samples: int, writer: str
) -> list[dict[str, Any]]:
    found = []
    for index in range(len(part) * samples):
        row, mask = part[index // samples], answers.mask_BT[index]
        bad = np.flatnonzero(np.isnan(answers.logp_BT[index][mask]))
        if len(bad):
            raise CorpusError(
                f"{writer} gave logits that are not finite at position {bad[0]} of answer "
                f"{index % samples} to the prompt on line {row.index + 1}: expected finite ones; "
                "check the model's weights, or give another step"
            )
        found.append(
            {
                "prompt": row.ids,
                "answer": answers.ids_BT[index][mask],
                "problem": row.index,
                "truncated": bool(answers.truncated_B[index]),
            }
        )
    return found


def _check(
    pair: Pair,
    rows: Sequence[Example],
    max_new: int,
    samples: int,
    batch: int,
    temperature: float,
) -> None:
    for flag, value in (("--max-new", max_new), ("--samples", samples), ("--batch", batch)):
        if value < 1:
            raise ValueError(f"{flag} is {value}: expected at least 1; change {flag}")
    if samples > 1 and temperature == 0:
        raise ValueError(
            f"--samples is {samples} at --temperature 0, where all answers to a prompt are equal: "
            "expected one sample or a temperature above 0; change either"
        )
    if not rows:
        raise ValueError("no prompts to answer: expected at least one; change --prompts")
    longest = max(len(row.ids) for row in rows)
    if longest + max_new > pair.max_positions:
        raise ValueError(
            f"the longest prompt has {longest} ids and --max-new is {max_new}: expected at most "
            f"{pair.max_positions} together, the positions that both models have; lower --max-new "
            "or --max-prompt"
        )


def _is_whole(folder: Path, info: Mapping[str, Any]) -> bool:
    """Whether the folder holds this very collection to its end; refuses what is not of it."""
    held = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    held = [name for name in held if not name.startswith(".")]
    is_whole = corpora.MANIFEST in held
    if not is_whole and STARTED not in held:
        if held:
            raise CorpusError(
                f"{folder} holds {', '.join(held[:3])}{', ...' * (len(held) > 3)} and no corpus: "
                "expected a new folder or a collection to go on with; give another --out"
            )
        return False
    path = folder / (corpora.MANIFEST if is_whole else STARTED)
    try:
        old = records.read(path, dict[str, Any], change=f"remove {folder}, or give another --out")
    except records.RecordError as error:
        raise CorpusError(f"{error} (the flags of a collection)") from error
    for key, value in info.items():
        if old.get(key) != value:
            raise CorpusError(
                f"{folder} was collected with {_FLAGS[key]} {old.get(key)!r}, now it is {value!r}: "
                "expected the same to go on; set it back, or give another --out"
            )
    return is_whole


_FLAGS = {
    "writer": "the writer",
    "tokenizer_size": "a tokenizer of size",
    "prompts": "other prompts (--prompts, --limit, --max-prompt), digest",
    "num_prompts": "other prompts (--prompts, --limit, --max-prompt), their number",
    "max_new": "--max-new",
    "temperature": "--temperature",
    "samples": "--samples",
    "seed": "--seed",
}


def _resume(folder: Path, rows: Sequence[Example], samples: int) -> tuple[int, int]:
    """Pieces that are whole and answer the rows in their order, and the rows that they answer."""
    expected = [row.index for row in rows for _ in range(samples)]
    pieces = done = 0
    while corpora.piece(folder, pieces).exists():
        try:
            with corpora.load_npz(corpora.piece(folder, pieces)) as file:
                here = file["problem"].tolist()
        except corpora.DAMAGED:
            break  # damaged: written again
        if len(here) % samples or here != expected[done : done + len(here)]:
            break
        pieces, done = pieces + 1, done + len(here)
    return pieces, done // samples


def _checked(corpus: Corpus, pair: Pair, where: str | Path) -> Corpus:
    """Refuse a corpus of another tokenizer."""
    size = corpus.info.get("tokenizer_size", pair.vocab_size)
    largest = int(max(corpus.token_id.max(), max(np.max(ids) for ids in corpus.prompts)))
    if size != pair.vocab_size or largest >= pair.vocab_size:
        raise CorpusError(
            f"{where} was written with a tokenizer of {size} ids and holds id {largest}: expected "
            f"the {pair.vocab_size} ids of {pair.student_name}; collect a corpus with this pair"
        )
    return corpus
