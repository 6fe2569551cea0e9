"""Worker of the benchmark for EasyDeL: its ``OnPolicyDistillationTrainer`` on one CPU device.

It has the forward KL alone, in chunks. Its generation is the compiled one: the other, eSurge, is a
serving engine that decodes the prompts to text and back. Answers of unequal length it trains on as
wide as they might be: the generated array has that width, and the trainer does not cut it.
"""

from __future__ import annotations

import os
import time
from typing import Any

import peer_batch
import peer_job
import toolkit

_FLAGS = os.environ.get("XLA_FLAGS")
import easydel  # noqa: E402

# Its import adds flags that this backend refuses; jax reads them on first use, which comes later.
if _FLAGS is None:
    os.environ.pop("XLA_FLAGS", None)
else:
    os.environ["XLA_FLAGS"] = _FLAGS

import datasets  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

NOTE = (
    "its mask marks completion ids but is applied to the logits at the same index, not at the one "
    "before, so it averages over positions that are one too late"
)


class Schedule:
    """Leaves the stop id alone where a row has to end, and forbids it everywhere else."""

    def __init__(self, batch: peer_batch.Batch):
        self.width = batch.prompt_BP.shape[1]
        self.last_B = tuple(batch.answers_B.tolist())

    def __call__(self, ids_BT, logits_BV, num_ids):
        is_last_B = num_ids - self.width + 1 == jnp.asarray(self.last_B)
        stop_B = jnp.where(is_last_B, 0.0, -jnp.inf).astype(logits_BV.dtype)
        logits_BV = jnp.where(is_last_B[:, None], -jnp.inf, logits_BV)
        return logits_BV.at[:, peer_job.EOS].set(stop_B)


class Trainer(easydel.OnPolicyDistillationTrainer):
    """The trainer, with a clock in the hooks that it offers."""

    fixed_ids: Any = None  # [B, N] completions to use instead of sampling
    batch: peer_batch.Batch
    ends: list[float]
    rollout_seconds: list[float]
    sampled: list[list[int]]
    is_unequal = False

    def on_step_end(self, state, metrics, step):
        jax.block_until_ready(state.graphstate)
        self.ends.append(time.perf_counter())
        return super().on_step_end(state=state, metrics=metrics, step=step)

    def generate_unified(self, **kwargs):
        begun = time.perf_counter()
        if self.fixed_ids is not None:
            return easydel.trainers.base_trainer.GenerationResults(
                generation_results=[],
                prompt_ids=kwargs["input_ids"],
                prompt_mask=kwargs["attention_mask"],
                sequences=jnp.concatenate([kwargs["input_ids"], self.fixed_ids], axis=1),
                completion_ids=self.fixed_ids,
                completion_mask=jnp.ones_like(self.fixed_ids),
                decoded_prompts=[],
                completion_prompts=[],
            )
        results = super().generate_unified(**kwargs)
        jax.block_until_ready(results.completion_ids)
        self.rollout_seconds.append(time.perf_counter() - begun)
        mask_BN = jnp.ones_like(results.completion_ids)
        if self.is_unequal:
            mask_BN = self._make_attn_mask(results.completion_ids)
        self.sampled.append(np.asarray(mask_BN).sum(axis=1).tolist())
        self.batch.check(self.sampled[-1])
        return results


def load(path: str, job: peer_job.Job):
    """A model in float32, with the generation settings of the job."""
    model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        path,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        torch_dtype=torch.float32,  # else the weights are rounded to half precision on the way
        sharding_axis_dims=(1, 1, 1, 1, 1),
        auto_shard_model=True,
    )
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=job.new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=peer_job.PAD,
        # Else no id: nothing stops early.
        eos_token_id=[peer_job.EOS if job.is_unequal else model.config.vocab_size],
    )
    return model


def schedule(model, batch: peer_batch.Batch) -> None:
    """Add :class:`Schedule` to what the model does to its logits where it generates."""
    plain = type(model)._get_logits_processor

    def processors(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        found.append(Schedule(batch))
        return found

    type(model)._get_logits_processor = processors


def run(job: peer_job.Job) -> dict[str, Any]:
    """Time training steps; see ``peer_job.serve`` for what comes back."""
    batch, total = peer_batch.load(job.fixed), job.warmup + job.steps
    prompt_BP, completion_BN = batch.prompt_BP, batch.completion_BN
    student, teacher = load(job.student, job), load(job.teacher, job)
    if job.is_unequal:
        schedule(student, batch)
    arguments = easydel.OnPolicyDistillationConfig(
        max_prompt_length=prompt_BP.shape[1],
        max_completion_length=job.new,
        temperature=1.0,
        alpha=1.0,  # all divergence, no labels
        temperature_sampling=1.0,
        top_k=0,
        top_p=1.0,
        generation_temperature=1.0,
        generation_top_k=0,
        generation_top_p=1.0,
        generation_do_sample=True,
        generation_max_new_tokens=job.new,
        generation_num_return_sequences=1,
        logits_chunk_size=64,
        learning_rate=job.lr,
        weight_decay=0.0,
        optimizer="adamw",
        scheduler="none",
        total_batch_size=len(batch.rows),
        max_training_steps=total,
        num_train_epochs=1,
        use_esurge_generation=False,
        use_wandb=False,
        do_last_save=False,
        save_steps=None,
        log_training_generations_to_wandb=False,
        shuffle_train_dataset=False,
        progress_bar_type="json",
        save_directory="easydel-output",
    )
    rows = {
        "input_ids": prompt_BP.tolist() * total,
        "attention_mask": batch.prompt_mask_BP.astype(int).tolist() * total,
    }
    trainer = Trainer(
        arguments=arguments,
        processing_class=transformers.AutoTokenizer.from_pretrained(job.student),
        student_model=student,
        teacher_model=teacher,
        train_dataset=datasets.Dataset.from_dict(rows),
    )
    trainer.ends, trainer.rollout_seconds, trainer.sampled = [], [], []
    trainer.batch, trainer.is_unequal = batch, job.is_unequal
    of_prompt, of_answer = (
        x.astype(np.int32) for x in (batch.prompt_mask_BP, batch.answer_mask_BN)
    )
    fixed = {
        "input_ids": jnp.asarray(np.concatenate([prompt_BP, completion_BN], axis=1)),
        "attention_mask": jnp.asarray(np.concatenate([of_prompt, of_answer], axis=1)),
        "completion_mask": jnp.asarray(np.concatenate([0 * of_prompt, of_answer], axis=1)),
    }
    with trainer.mesh:
        metrics = trainer.sharded_evaluation_step_function(
            trainer.model_state,
            fixed,
            *trainer._eval_shared_fn_extra_args,
            *trainer._eval_shared_fn_static_args,
        )
    loss_fixed = float(metrics.loss)
    if job.kind == "update":
        trainer.fixed_ids = jnp.asarray(completion_BN)
    trainer.ends.append(time.perf_counter())
    trainer.train()
    seconds = np.diff(trainer.ends).tolist()
    if len(seconds) != total:
        raise RuntimeError(f"{len(seconds)} steps ran: expected {total}")
    sampled = trainer.rollout_seconds
    return {
        "seconds": seconds[job.warmup :],
        "phases": {"rollout": sampled[job.warmup :]} if sampled else {},
        "peak_rss_gb": toolkit.peak_rss_gb(),
        "objective": "forward KL",
        "loss_fixed": loss_fixed,
        "note": NOTE,
        "sampled": trainer.sampled,
    }


if __name__ == "__main__":
    peer_job.serve(run)
