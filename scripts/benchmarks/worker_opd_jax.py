"""Worker of the benchmark for this library: the calls that a training step makes, one by one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peer_batch
import peer_job
import toolkit
import workloads
from peer_batch import Batch
from peer_job import Job

from opd_jax import mesh as meshlib
from opd_jax import objective, optim, rock, steps
from opd_jax.data import packing, widths
from opd_jax.kl import KLSpec
from opd_jax.models import hf
from opd_jax.objective import ObjectiveConfig
from opd_jax.optim import OptimSpec
from opd_jax.pytrees import Packing, Prompt, Rollout
from opd_jax.rollout import answers as answering
from opd_jax.rollout import decode, drawn
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
    batch, settings = peer_batch.load(job.fixed), job.settings
    prompt_widths = widths.of_prompts(
        batch.prompts_B.tolist(), batch=len(batch.rows), limit=job.prompt
    )
    ids_BP, given = _laid_out(batch, prompt_widths[-1])
    start_B = given.start_B
    prompt = meshlib.to_global(Prompt(ids_BP=jnp.asarray(ids_BP), start_B=start_B), mesh)
    fixed = meshlib.to_global(given, mesh)
    sample = functools.partial(
        decode.sample,
        prompt=prompt,
        cfg=student,
        sampler=Sampler(vocab_size=student.vocab_size, pad_id=peer_job.PAD),
    )
    keys = iter(jax.random.split(jax.random.key(0), 2 * (job.warmup + job.steps)))
    if job.is_unequal:
        stops = (peer_job.EOS,)
        sampler = dataclasses.replace(sample.keywords["sampler"], stop_ids=stops)
        bias_V = jnp.zeros(student.vocab_size).at[peer_job.EOS].set(-jnp.inf)
        way = {name: settings[name] for name in ("slots", "segments")}
        sample = functools.partial(sample, sampler=sampler, bias_V=bias_V, **way)
        keys = itertools.repeat(key := jax.random.key(0))
        _end_rows(batch.answers_B, key)

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
        student=student,
        teacher=teacher,
        kl=KLSpec(vocab_size=student.vocab_size),
        microbatches=settings.get("microbatches", 1),
    )
    tx = optim.make(OptimSpec(lr=job.lr))
    init = functools.partial(steps.init, cfg=cfg, tx=tx)
    state = jax.jit(init, donate_argnums=0)(tree, jax.random.key(0))
    del tree

    ends = jax.jit(objective.ends)
    sampled: list[list[int]] = []

    def packed(answers: Rollout) -> Packing | None:
        if not settings.get("pack"):
            return None
        layout = packing.plan(
            *meshlib.to_host((answers.start_B, ends(answers))),
            columns=answers.ids_BT.shape[1],
            pieces=cfg.microbatches,
        )
        return meshlib.to_global(meshlib.own_rows(layout), mesh)

    def once() -> dict[str, float]:
        nonlocal state
        phases, answers = workloads.Phases(), fixed
        if job.kind == "step":
            answers = phases.done(sample(state.params, key=next(keys), max_new=job.new))
            if job.is_unequal:
                answers = answering.crop(answers, job.new, widths.ladder(job.new))
        how = {"cfg": cfg, "packing": packed(answers)}
        states_BTE = phases.done(steps.teacher_states(teacher_tree, answers, **how))
        state, _ = phases.done(
            steps.distill_step(state, teacher_tree, answers, tx=tx, states_BTE=states_BTE, **how)
        )
        if job.kind == "step":
            sampled.append(np.asarray(answers.mask_BT).sum(axis=1).tolist())
            batch.check(sampled[-1])
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
        "sampled": sampled,
    }


def _laid_out(batch: Batch, width: int) -> tuple[np.ndarray, Rollout]:
    """Prompts of ``width`` columns, and the given answers behind them."""
    before = width - batch.prompt_BP.shape[1]
    ids_BP = np.pad(batch.prompt_BP, ((0, 0), (before, 0)), constant_values=peer_job.PAD)
    ids_BT = np.concatenate([ids_BP, batch.completion_BN], axis=1)
    rollout = Rollout(
        ids_BT=jnp.asarray(ids_BT),
        start_B=jnp.asarray(width - batch.prompts_B, jnp.int32),
        mask_BT=jnp.asarray(np.pad(batch.answer_mask_BN, ((0, 0), (width, 0)))),
        logp_BT=jnp.zeros(ids_BT.shape, jnp.float32),
        truncated_B=jnp.ones(len(ids_BT), bool),
        policy_step=jnp.zeros((), jnp.int32),
    )
    return ids_BP, rollout


def _end_rows(answers_B: np.ndarray, key: jax.Array) -> None:
    """Have every row of a rollout with ``key`` end with ``EOS`` when it has so many ids.

    Nothing else is changed where ids are drawn. Which row a draw is for, its key says, in slots as
    in step.
    """
    row_keys_B2 = jax.random.key_data(
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(answers_B)))
    )
    plain = drawn.draw

    def draw(w_VD, h_SD, keys_S, step, **how):
        ids_S, logp_S = plain(w_VD, h_SD, keys_S, step, **how)
        is_row_SB = jnp.all(jax.random.key_data(keys_S)[:, None] == row_keys_B2[None], axis=2)
        last_S = jnp.sum(is_row_SB * jnp.asarray(answers_B, jnp.int32)[None], axis=1)
        return jnp.where(step + 1 == last_S, peer_job.EOS, ids_S), logp_S

    drawn.draw = draw


if __name__ == "__main__":
    peer_job.serve(run)
