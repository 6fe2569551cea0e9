"""Batches of prompts: in which order, padded to which width; grain iterates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from opd_jax.data.prompts import Example
from opd_jax.pytrees import Prompt, Rollout


@dataclasses.dataclass(frozen=True)
class Batch:
    """This process's rows of one global batch."""

    examples: tuple[Example, ...]
    longest: int  # ids of the longest prompt of the *global* batch, so that all processes pad alike
    longest_completion: int = 0  # the same of the completions
    longest_teacher: int = 0  # the same of the prompts that the teacher reads


def pipeline(
    rows: Sequence[Example],
    *,
    batch: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Iterate over batches for this process, reshuffled each epoch, checkpointable.

    The order is drawn for global batches and each process takes its contiguous share of every one:
    the global batches, and the saved state, are the same under any number of processes. What does
    not fill the last batch of an epoch waits for a later one. ``get_state()`` is plain JSON.

    Args:
      batch: prompts of a global batch, over all processes.

    Raises:
      ValueError: fewer prompts than a batch, or a batch that does not divide over the processes.
    """
    if batch < 1 or batch % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"a batch of {batch} prompts for process {process_index} of {process_count}: expected "
            "a positive multiple of the number of processes; change the number of prompts a batch"
        )
    if len(rows) < batch:
        raise ValueError(
            f"{len(rows)} prompts for a batch of {batch}: expected at least one full batch; add "
            "prompts, lower the batch, or raise max_prompt if prompts were dropped"
        )
    rows = tuple(rows)
    share = batch // process_count
    first = process_index * share

    def take(indices: Sequence[int]) -> Batch:
        chosen = [rows[int(i)] for i in indices]
        longest = max(len(row.ids) for row in chosen)
        longest_completion = max(len(row.completion) for row in chosen)
        longest_teacher = max(len(row.teacher_ids) for row in chosen)
        own = tuple(chosen[first : first + share])
        return Batch(own, longest, longest_completion, longest_teacher)

    order = grain.MapDataset.range(len(rows)).seed(seed)
    if shuffle:
        order = order.shuffle()
    batches = order.batch(batch, drop_remainder=True, batch_fn=list).map(take).repeat(epochs)
    # Rows are in memory already: worker threads would only add nondeterministic wake-ups.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def pad(ids: Sequence[Sequence[int]], width: int, pad_id: int) -> Prompt:
    """Left-pad prompts to one width (numpy arrays, i32).

    Raises:
      ValueError: a prompt is empty or wider than ``width``.
    """
    padded = np.full((len(ids), width), pad_id, np.int32)
    start = np.zeros(len(ids), np.int32)
    for row, prompt in enumerate(ids):
        if not 0 < len(prompt) <= width:
            raise ValueError(
                f"prompt {row} has {len(prompt)} ids and the width is {width}: expected 1 to "
                f"{width}; choose the width with bucket(longest, buckets)"
            )
        start[row] = width - len(prompt)
        padded[row, start[row] :] = prompt
    # The pytrees name device arrays; numpy arrays are their host form.
    return Prompt(ids_BP=padded, start_B=start)  # pyright: ignore[reportArgumentType]


def pad_completions(rows: Sequence[Example], width: int, max_new: int, pad_id: int) -> Rollout:
    """Lay out prompts and completions as a rollout of ``width + max_new`` columns (numpy arrays).

    The completion starts right after the prompt and its ids, a stop id included, make up the mask.
    No policy sampled it: ``logp_BT`` is 0 and ``policy_step`` -1.

    Raises:
      ValueError: a row has no completion, or one of more than ``max_new`` ids.
    """
    prompt = pad([row.ids for row in rows], width, pad_id)
    shape = (len(rows), width + max_new)
    ids, mask = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    ids[:, :width] = prompt.ids_BP
    for index, row in enumerate(rows):
        if not 0 < len(row.completion) <= max_new:
            raise ValueError(
                f"row {index} has a completion of {len(row.completion)} ids: expected 1 to "
                f"{max_new}; read the file with completions.Limits({max_new}, stop_ids)"
            )
        span = slice(width, width + len(row.completion))
        ids[index, span] = row.completion
        mask[index, span] = True
    arrays = {
        "ids_BT": ids,
        "start_B": prompt.start_B,
        "mask_BT": mask,
        "logp_BT": np.zeros(shape, np.float32),
        "truncated_B": np.array([not row.is_whole for row in rows]),
        "policy_step": np.int32(-1),
    }
    return Rollout(**arrays)  # pyright: ignore[reportArgumentType]
