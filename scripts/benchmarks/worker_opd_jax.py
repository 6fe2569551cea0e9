"""Worker of the benchmark for this library: the calls that a training step makes, one by one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peer_job
import toolkit
import workloads
from peer_job import Job

from opd_jax import mesh as meshlib
from opd_jax import objective, optim, rock, steps
from opd_jax.kl import KLSpec
from opd_jax.models import hf
from opd_jax.objective import ObjectiveConfig
from opd_jax.optim import OptimSpec
from opd_jax.pytrees import Prompt, Rollout
from opd_jax.rollout import decode
from opd_jax.rollout.sampling import Sampler


def gemm_gflops(size: int = 3072) -> float:
    """Largest fp32 matmul rate that this process reaches, in GFLOP/s."""
    x = jnp.ones((size, size), jnp.float32)
    return 2 * size**3 / toolkit.best_seconds(jax.jit(jnp.matmul), x, x) / 1e9


def memory_gb_s(gigabytes: float = 1.0) -> float:
    """Largest rate at which this process reads memory, in GB/s: the better of two readers."""
    width = 4096
    x = jnp.ones((int(gigabytes * 1e9) // 4 // width, width), jnp.float32)
    seconds = min(
        toolkit.best_seconds(jax.jit(jnp.sum), x),
        toolkit.best_seconds(jax.jit(jnp.matmul), x, jnp.ones(width, jnp.float32)),
    )
    return x.size * 4 / seconds / 1e9


def run(job: Job) -> dict[str, Any]:
    """Time the phases of a step; see ``peer_job.serve`` for what comes back."""
    mesh = meshlib.make(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        result = _run(job, mesh)
    # After the peak of the work itself has been read: these allocate, too.
    if job.kind == "update":
        result["gemm_gflops"] = gemm_gflops()
    if job.kind == "rollout":
        result["memory_gb_s"] = memory_gb_s()
    return result


def _run(job: Job, mesh) -> dict[str, Any]:
    student, tree = hf.load(job.student, dtype=jnp.float32, mesh=mesh)
    with np.load(job.fixed) as ids:
        prompt_BP, completion_BN = ids["prompt"], ids["completion"]
    batch = len(prompt_BP)
    ids_BT = np.concatenate([prompt_BP, completion_BN], axis=1)
    is_new_BT = np.arange(ids_BT.shape[1])[None, :] >= np.full((batch, 1), job.prompt)
    start_B = jnp.zeros(batch, jnp.int32)
    prompt = meshlib.to_global(Prompt(ids_BP=jnp.asarray(prompt_BP), start_B=start_B), mesh)
    fixed = meshlib.to_global(
        Rollout(
            ids_BT=jnp.asarray(ids_BT),
            start_B=start_B,
            mask_BT=jnp.asarray(is_new_BT),
            logp_BT=jnp.zeros(ids_BT.shape, jnp.float32),
            truncated_B=jnp.ones(batch, bool),
            policy_step=jnp.zeros((), jnp.int32),
        ),
        mesh,
    )
    sample = functools.partial(
        decode.sample,
        prompt=prompt,
        cfg=student,
        sampler=Sampler(vocab_size=student.vocab_size, pad_id=peer_job.PAD),
    )
    keys = iter(jax.random.split(jax.random.key(0), 2 * (job.warmup + job.steps)))

    if job.kind == "rollout":

        def answer() -> dict[str, float]:
            jax.block_until_ready(sample(tree, key=next(keys), max_new=job.new))
            return {}

        result = peer_job.measure(answer, job)
        result["peak_rss_gb"] = toolkit.peak_rss_gb()
        # One id costs a prefill and a draw; the rest of a rollout is decode.
        short = functools.partial(sample, tree, key=jax.random.key(1), max_new=1)
        result["phases"]["prefill"] = [toolkit.best_seconds(short, repeats=job.steps)]
        return result | {"objective": "-", "loss_fixed": None}

    teacher, teacher_tree = hf.load(job.teacher, dtype=jnp.float32, mesh=mesh)
    cfg = ObjectiveConfig(
        student=student, teacher=teacher, kl=KLSpec(vocab_size=student.vocab_size)
    )
    tx = optim.make(OptimSpec(lr=job.lr))
    init = functools.partial(steps.init, cfg=cfg, tx=tx)
    state = jax.jit(init, donate_argnums=0)(tree, jax.random.key(0))
    del tree

    def once() -> dict[str, float]:
        nonlocal state
        phases, answers = workloads.Phases(), fixed
        if job.kind == "step":
            answers = phases.done(sample(state.params, key=next(keys), max_new=job.new))
        states_BTE = phases.done(steps.teacher_states(teacher_tree, answers, cfg=cfg))
        state, _ = phases.done(
            steps.distill_step(state, teacher_tree, answers, cfg=cfg, tx=tx, states_BTE=states_BTE)
        )
        return phases.seconds("rollout", "teacher", "update")

    result = peer_job.measure(once, job)
    result["peak_rss_gb"] = toolkit.peak_rss_gb()
    del state
    _, tree = hf.load(job.student, dtype=jnp.float32, mesh=mesh)
    losses = {}
    for direction in ("reverse", "forward"):
        goal = dataclasses.replace(cfg, kl=dataclasses.replace(cfg.kl, direction=direction))
        loss = jax.jit(functools.partial(objective.loss, cfg=goal))
        empty = rock.init(student.vocab_size, cfg=cfg.rock)
        losses[direction] = loss(tree, teacher_tree, fixed, empty)[0].value()
    return result | {
        "objective": "reverse KL",
        "loss_fixed": losses["reverse"],
        "losses_fixed": losses,
    }


if __name__ == "__main__":
    peer_job.serve(run)
