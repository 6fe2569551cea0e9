"""Worker of the benchmark for TRL: its ``DistillationTrainer``, trained as its users train it."""

from __future__ import annotations

import time
from typing import Any

import datasets
import numpy as np
import peer_job
import toolkit
import torch
import transformers
import trl
from peer_job import Job


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
    with np.load(job.fixed) as ids:
        prompt_BP, completion_BN = ids["prompt"], ids["completion"]
    batch = len(prompt_BP)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.student)
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (job.student, job.teacher)
    )
    total = job.warmup + job.steps
    prompts = [" ".join(peer_job.word(i) for i in row) for row in prompt_BP]
    if tokenizer(prompts)["input_ids"] != prompt_BP.tolist():
        raise RuntimeError("the tokenizer does not give the fixed prompts back: expected each id")
    clock = Clock()
    trainer = trl.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=trl.DistillationConfig(
            output_dir="trl-output",
            per_device_train_batch_size=batch,
            max_steps=total,
            max_completion_length=job.new,
            generation_kwargs={"min_new_tokens": job.new},  # forbids the end-of-text id
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
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts * total}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    generate = trainer._generate_single_turn
    rollout_seconds: list[float] = []

    def timed_generate(*args, **kwargs):
        begun = time.perf_counter()
        completions = generate(*args, **kwargs)
        rollout_seconds.append(time.perf_counter() - begun)
        lengths = {len(row) for row in completions}
        if lengths != {job.new}:
            raise RuntimeError(f"sampled {lengths} ids a row: expected {job.new} in each")
        return completions

    if job.kind == "rollout":
        rows = [row.tolist() for row in prompt_BP]

        def answer() -> dict[str, float]:
            timed_generate(rows, None, {})
            return {}

        result = peer_job.measure(answer, job)
        result["peak_rss_gb"] = toolkit.peak_rss_gb()
        return result | {"objective": "-", "loss_fixed": None}

    prompt, completion = (torch.tensor(x, dtype=torch.long) for x in (prompt_BP, completion_BN))
    fixed = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "num_items_in_batch": torch.tensor(float(completion.numel())),
    }
    trainer.model.train()
    with torch.no_grad():  # less than a training step does, so the peak is not raised
        loss_fixed = float(trainer.compute_loss(trainer.model, fixed))
    if job.kind == "update":
        trainer._generate_single_turn = lambda *args, **kwargs: completion.tolist()
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
    }


if __name__ == "__main__":
    peer_job.serve(run)
