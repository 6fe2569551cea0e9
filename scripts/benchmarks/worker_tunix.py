"""Worker of the benchmark for Tunix, which has the parts but no on-policy distillation.

Its vanilla sampler feeds its ``DistillationTrainer`` here, in the place of a data set. The
divergence is the forward KL over all positions it is given: the forward functions cut the
completions out, since its loss has no mask, and of answers of unequal length their own ids alone.
Such answers it is given as wide as the longest, not as wide as they might be. It has no way to
bias logits: the model that samples raises the stop id where a row has to end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_batch
import peer_job
import toolkit
import transformers
from flax import nnx
from tunix.distillation import distillation_trainer
from tunix.distillation.strategies.logit import LogitStrategy
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors

NOTE = (
    "its llama attention calls the rotary embedding without the config's rope_theta, so the models "
    "run at the default of 1,000,000 and not at 100,000"
)
NO_ID = -1  # as the only stop id: nothing stops early


class Scheduled(Llama3):
    """The model, which where it samples says the stop id where a row has to end, and only there."""

    ends_B: tuple[int, ...] = ()  # ids of prompt and answer of each row; (): nothing is changed

    def __call__(self, input_tokens, positions, cache, attention_mask):
        logits, cache_after = super().__call__(input_tokens, positions, cache, attention_mask)
        if cache is not None and self.ends_B:
            # What stands at a position predicts the one behind it.
            is_last = positions + 2 == jnp.asarray(self.ends_B)[:, None]
            stop = jnp.where(is_last, 1e9, -1e9).astype(logits.dtype)
            logits = logits.at[..., peer_job.EOS].set(stop)
        return logits, cache_after


def load(path: str, mesh: jax.sharding.Mesh) -> Llama3:
    """A model in float32 from a Hugging Face folder."""
    given = transformers.AutoConfig.from_pretrained(path)
    cfg = ModelConfig(
        num_layers=given.num_hidden_layers,
        vocab_size=given.vocab_size,
        embed_dim=given.hidden_size,
        hidden_dim=given.intermediate_size,
        num_heads=given.num_attention_heads,
        head_dim=given.head_dim,
        num_kv_heads=given.num_key_value_heads,
        rope_theta=int(given.rope_parameters["rope_theta"]),
        norm_eps=given.rms_norm_eps,
        weight_tying=True,
    )
    model = create_model_from_safe_tensors(path, cfg, mesh, dtype=jnp.float32)
    model.__class__ = Scheduled
    return model


def run(job: peer_job.Job) -> dict[str, Any]:
    """Time training steps; see ``peer_job.serve`` for what comes back."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=kinds, devices=jax.devices()[:1])
    with mesh:
        return _run(job, mesh)


def _run(job: peer_job.Job, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    batch = peer_batch.load(job.fixed)
    prompt_BP, completion_BN = batch.prompt_BP, batch.completion_BN
    width, num_scored = prompt_BP.shape[1], int(batch.answers_B.sum())
    total = job.warmup + job.steps
    student, teacher = load(job.student, mesh), load(job.teacher, mesh)
    if job.is_unequal:
        student.ends_B = tuple((batch.prompts_B + batch.answers_B).tolist())

    def scored(of_answers, input_mask):
        if not job.is_unequal:
            return of_answers
        return of_answers[jnp.nonzero(input_mask[:, width:], size=num_scored)]

    def completion_logits(model: Llama3, input_tokens, input_mask):
        num_rows, length = input_tokens.shape
        causal = jnp.tril(jnp.ones((length, length), bool))
        positions = jnp.broadcast_to(jnp.arange(length), (num_rows, length))
        mask = jnp.broadcast_to(causal, (num_rows, length, length))
        if job.is_unequal:
            positions = jnp.maximum(jnp.cumsum(input_mask, axis=1) - 1, 0)
            mask &= input_mask[:, None, :].astype(bool)
        logits, _ = model(input_tokens, positions, None, mask)
        return scored(logits[:, width - 1 : -1], input_mask)

    def labels(input_tokens, input_mask):
        labels = scored(input_tokens[:, width:], input_mask)
        return jax.nn.one_hot(labels, student.config.vocab_size)

    trainer = distillation_trainer.DistillationTrainer(
        student_model=student,
        teacher_model=teacher,
        strategy=LogitStrategy(
            student_forward_fn=completion_logits,
            teacher_forward_fn=completion_logits,
            labels_fn=labels,
            temperature=1.0,
            alpha=1.0,  # all divergence, no labels
        ),
        optimizer=optax.adamw(job.lr, weight_decay=0.0),
        training_config=distillation_trainer.TrainingConfig(
            eval_every_n_steps=10**9, max_steps=total
        ),
    )

    def example(ids_BN) -> distillation_trainer.TrainingInput:
        tokens = jnp.asarray(np.concatenate([prompt_BP, ids_BN], axis=1))
        mask = np.concatenate([batch.prompt_mask_BP, batch.answer_mask_BN], axis=1)
        return distillation_trainer.TrainingInput(
            input_tokens=tokens, input_mask=jnp.asarray(mask, tokens.dtype)
        )

    fixed = example(completion_BN)
    loss_fixed = jax.device_get(_loss(trainer, fixed))

    sampler = Sampler(
        student,
        transformers.AutoTokenizer.from_pretrained(job.student),
        CacheConfig(
            cache_size=width + job.new,
            num_layers=student.config.num_layers,
            num_kv_heads=student.config.num_kv_heads,
            head_dim=student.config.head_dim,
        ),
    )
    if [list(sampler.tokenize(text)) for text in batch.texts] != batch.rows:
        raise RuntimeError("the tokenizer does not give the fixed prompts back: expected each id")
    begins: list[float] = []
    rollout_seconds: list[float] = []
    sampled: list[list[int]] = []

    def begin_step() -> None:
        jax.block_until_ready(nnx.state(trainer.model))
        begins.append(time.perf_counter())

    def sample(step: int) -> np.ndarray:
        sampler.transformer_state = nnx.variables(trainer.model, nnx.Param)
        answers = sampler(
            batch.texts,
            max_generation_steps=job.new,
            max_prompt_length=width,
            eos_tokens=[peer_job.EOS if job.is_unequal else NO_ID],
            temperature=1.0,
            top_p=1.0,
            seed=step,
        ).tokens
        rollout_seconds.append(time.perf_counter() - begins[-1])
        if job.is_unequal:  # it takes the stop id off
            answers = [[*row, peer_job.EOS] for row in answers]
        sampled.append([len(row) for row in answers])
        batch.check(sampled[-1])
        ids_BN = np.full_like(completion_BN, peer_job.PAD)
        ids_BN[batch.answer_mask_BN] = np.concatenate(answers)
        return ids_BN

    def examples() -> Iterator[distillation_trainer.TrainingInput]:
        for step in range(total):
            begin_step()
            yield fixed if job.kind == "update" else example(sample(step))
        begin_step()  # the end of the last one

    trainer.train(examples())
    seconds = np.diff(begins).tolist()
    if len(seconds) != total:
        raise RuntimeError(f"{len(seconds)} steps ran: expected {total}")
    return {
        "seconds": seconds[job.warmup :],
        "phases": {"rollout": rollout_seconds[job.warmup :]} if rollout_seconds else {},
        "peak_rss_gb": toolkit.peak_rss_gb(),
        "objective": "forward KL",
        "loss_fixed": float(loss_fixed),
        "note": NOTE,
        "sampled": sampled,
    }


def _loss(trainer, fixed) -> jax.Array:
    """The trainer's own loss of a batch, without a gradient."""
    prepared = trainer._prepare_inputs(fixed)
    arguments = trainer.gen_model_input_fn(prepared)
    loss, _ = nnx.jit(trainer.loss_fn)(trainer.model, **arguments)
    return loss


if __name__ == "__main__":
    peer_job.serve(run)
