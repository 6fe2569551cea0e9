"""Worker of the benchmark for TRL: its ``DistillationTrainer``, trained as its users train it."""

from __future__ import annotations

import functools
import time
from typing import Any

import datasets
import numpy as np
import peer_batch
import peer_job
import toolkit
import torch
import transformers
import trl
from peer_job import Job


class Schedule(transformers.LogitsProcessor):
    """Leaves the end-of-text id alone where a row has to end, and forbids it everywhere else."""

    def __init__(self, batch: peer_batch.Batch):
        self.width = batch.prompt_BP.shape[1]
        self.last = torch.tensor(batch.answers_B)

    def __call__(self, input_ids, scores):
        is_last = input_ids.shape[1] - self.width + 1 == self.last
        scores[:, peer_job.EOS] = -torch.inf
        scores[is_last] = -torch.inf
        scores[is_last, peer_job.EOS] = 0.0
        return scores


class Clock(transformers.TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next: nothing is left out."""

    def __init__(self):
        self.ends: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def run(job: Job) -> dict[str, Any]:
    """Time training steps, or generation alone; see ``peer_job.serve`` for what comes back."""
    batch = peer_batch.load(job.fixed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.student)
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (job.student, job.teacher)
    )
    total = job.warmup + job.steps
    if tokenizer(batch.texts)["input_ids"] != batch.rows:
        raise RuntimeError("the tokenizer does not give the fixed prompts back: expected each id")
    if job.is_unequal:
        schedule = transformers.LogitsProcessorList([Schedule(batch)])
        student.generate = functools.partial(student.generate, logits_processor=schedule)
    clock = Clock()
    trainer = trl.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=trl.DistillationConfig(
            output_dir="trl-output",
            per_device_train_batch_size=len(batch.rows),
            max_steps=total,
            max_completion_length=job.new,
            # Forbids the end-of-text id.
            generation_kwargs=None if job.is_unequal else {"min_new_tokens": job.new},
            beta=1.0,  # KL(student || teacher)
            temperature=1.0,
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,  # saves memory for time, which is not asked for here
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            shuffle_dataset=False,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": batch.texts * total}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    generate = trainer._generate_single_turn
    rollout_seconds: list[float] = []
    sampled: list[list[int]] = []

    def timed_generate(*args, **kwargs):
        begun = time.perf_counter()
        completions = generate(*args, **kwargs)
        rollout_seconds.append(time.perf_counter() - begun)
        sampled.append([len(row) for row in completions])
        batch.check(sampled[-1])
        return completions

    if job.kind == "rollout":

        def answer() -> dict[str, float]:
            timed_generate(batch.rows, None, {})
            return {}

        result = peer_job.measure(answer, job)
        result["peak_rss_gb"] = toolkit.peak_rss_gb()
        return result | {"objective": "-", "loss_fixed": None}

    prompt, completion, prompt_mask, answer_mask = (
        torch.tensor(x, dtype=torch.long)
        for x in (
            batch.prompt_BP, batch.completion_BN, batch.prompt_mask_BP, batch.answer_mask_BN
        )
    )  # fmt: skip
    fixed = {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": answer_mask,
        "num_items_in_batch": answer_mask.sum().float(),
    }
    trainer.model.train()
    with torch.no_grad():  # less than a training step does, so the peak is not raised
        loss_fixed = float(trainer.compute_loss(trainer.model, fixed))
    if job.kind == "update":
        trainer._generate_single_turn = lambda *args, **kwargs: batch.answers
    else:
        trainer._generate_single_turn = timed_generate
    trainer.train()
    seconds = np.diff(clock.ends).tolist()
    if len(seconds) != total:
        raise RuntimeError(f"{len(seconds)} steps ran: expected {total}")
    phases = {"rollout": rollout_seconds[job.warmup :]} if rollout_seconds else {}
    return {
        "seconds": seconds[job.warmup :],
        "phases": phases,
        "peak_rss_gb": toolkit.peak_rss_gb(),
        "objective": "reverse KL",
        "loss_fixed": loss_fixed,
        "sampled": sampled,
    }


if __name__ == "__main__":
    peer_job.serve(run)
