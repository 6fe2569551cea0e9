"""Worker of the benchmark for EasyDeL: its ``OnPolicyDistillationTrainer`` on one CPU device.

It has the forward KL alone, in chunks. Its generation is the compiled one: the other, eSurge, is a
serving engine that decodes the prompts to text and back.
"""

from __future__ import annotations

import os
import time
from typing import Any

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


class Trainer(easydel.OnPolicyDistillationTrainer):
    """The trainer, with a clock in the hooks that it offers."""

    fixed_ids: Any = None  # [B, N] completions to use instead of sampling
    num_new = 0
    ends: list[float]
    rollout_seconds: list[float]

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
        if results.completion_ids.shape[1] != self.num_new:
            raise RuntimeError(
                f"sampled {results.completion_ids.shape[1]} ids a row: expected {self.num_new}"
            )
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
        eos_token_id=[model.config.vocab_size],  # no id: nothing stops early
    )
    return model


def run(job: peer_job.Job) -> dict[str, Any]:
    """Time training steps; see ``peer_job.serve`` for what comes back."""
    with np.load(job.fixed) as ids:
        prompt_BP, completion_BN = ids["prompt"], ids["completion"]
    batch, total = len(prompt_BP), job.warmup + job.steps
    student, teacher = load(job.student, job), load(job.teacher, job)
    arguments = easydel.OnPolicyDistillationConfig(
        max_prompt_length=job.prompt,
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
        total_batch_size=batch,
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
        "attention_mask": np.ones_like(prompt_BP).tolist() * total,
    }
    trainer = Trainer(
        arguments=arguments,
        processing_class=transformers.AutoTokenizer.from_pretrained(job.student),
        student_model=student,
        teacher_model=teacher,
        train_dataset=datasets.Dataset.from_dict(rows),
    )
    trainer.ends, trainer.rollout_seconds, trainer.num_new = [], [], job.new
    mask = np.concatenate([np.zeros_like(prompt_BP), np.ones_like(completion_BN)], axis=1)
    fixed = {
        "input_ids": jnp.asarray(np.concatenate([prompt_BP, completion_BN], axis=1)),
        "attention_mask": jnp.ones(mask.shape, jnp.int32),
        "completion_mask": jnp.asarray(mask),
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
    }


if __name__ == "__main__":
    peer_job.serve(run)
