"""Worker of the benchmark for Tunix, which has the parts but no on-policy distillation.

Its vanilla sampler feeds its ``DistillationTrainer`` here, in the place of a data set. The
divergence is the forward KL over all positions it is given: the forward functions cut the
completions out, since its loss has no mask.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    return create_model_from_safe_tensors(path, cfg, mesh, dtype=jnp.float32)


def run(job: peer_job.Job) -> dict[str, Any]:
    """Time training steps; see ``peer_job.serve`` for what comes back."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=kinds, devices=jax.devices()[:1])
    with mesh:
        return _run(job, mesh)


def _run(job: peer_job.Job, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    with np.load(job.fixed) as ids:
        prompt_BP, completion_BN = ids["prompt"], ids["completion"]
    total = job.warmup + job.steps
    student, teacher = load(job.student, mesh), load(job.teacher, mesh)

    def completion_logits(model: Llama3, input_tokens, input_mask):
        batch, length = input_tokens.shape
        causal = jnp.tril(jnp.ones((length, length), bool))
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        mask = jnp.broadcast_to(causal, (batch, length, length))
        logits, _ = model(input_tokens, positions, None, mask)
        return logits[:, job.prompt - 1 : -1]

    def labels(input_tokens, input_mask):
        return jax.nn.one_hot(input_tokens[:, job.prompt :], student.config.vocab_size)

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
        return distillation_trainer.TrainingInput(
            input_tokens=tokens, input_mask=jnp.ones_like(tokens)
        )

    fixed = example(completion_BN)
    loss_fixed = jax.device_get(_loss(trainer, fixed))

    sampler = Sampler(
        student,
        transformers.AutoTokenizer.from_pretrained(job.student),
        CacheConfig(
            cache_size=job.prompt + job.new,
            num_layers=student.config.num_layers,
            num_kv_heads=student.config.num_kv_heads,
            head_dim=student.config.head_dim,
        ),
    )
    prompts = [" ".join(peer_job.word(i) for i in row) for row in prompt_BP]
    if [list(sampler.tokenize(text)) for text in prompts] != prompt_BP.tolist():
        raise RuntimeError("the tokenizer does not give the fixed prompts back: expected each id")
    begins: list[float] = []
    rollout_seconds: list[float] = []

    def begin_step() -> None:
        jax.block_until_ready(nnx.state(trainer.model))
        begins.append(time.perf_counter())

    def sample(step: int) -> np.ndarray:
        sampler.transformer_state = nnx.variables(trainer.model, nnx.Param)
        answers = sampler(
            prompts,
            max_generation_steps=job.new,
            max_prompt_length=job.prompt,
            eos_tokens=[NO_ID],
            temperature=1.0,
            top_p=1.0,
            seed=step,
        ).tokens
        rollout_seconds.append(time.perf_counter() - begins[-1])
        rows = np.stack([np.asarray(row) for row in answers])
        if rows.shape != completion_BN.shape:
            raise RuntimeError(f"sampled ids {rows.shape}: expected {completion_BN.shape}")
        return rows

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
    }


def _loss(trainer, fixed) -> jax.Array:
    """The trainer's own loss of a batch, without a gradient."""
    prepared = trainer._prepare_inputs(fixed)
    arguments = trainer.gen_model_input_fn(prepared)
    loss, _ = nnx.jit(trainer.loss_fn)(trainer.model, **arguments)
    return loss


if __name__ == "__main__":
    peer_job.serve(run)
