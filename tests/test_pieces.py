"""What micro-batches share on several devices is exchanged once per step, not once for each."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh, optim, steps
from opd_jax.data import packing
from opd_jax.kl import KLSpec
from opd_jax.models import params, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.plan import hlo
from opd_jax.plan.chips import afresh
from opd_jax.pytrees import Rollout

B, T, V = 32, 12, 96  # no other size is like the vocabulary's
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
STUDENT = ModelConfig("qwen3", V, 8, 20, 2, 2, 2, 4, tied=True, qk_norm=True)
TEACHER = ModelConfig("llama", V, 16, 20, 2, 2, 2, 4)
TX = optim.make(optim.OptimSpec("sgd", lr=0.3, min_lr=0.3, warmup=0.0, steps=9, b1=0.0, clip=0.0))


def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (B, T)).astype(np.int32)
    mask = np.arange(T)[None] >= rng.integers(3, T - 1, (B, 1))
    zeros = np.zeros((B, T), np.float32)
    return Rollout(ids, np.zeros(B, np.int32), mask, zeros, mask[:, 0], np.int32(0))


def models(cfg, grid):
    rng = np.random.default_rng(1)
    return [
        jax.device_put(
            jax.tree.map(
                lambda spec: (spec.mean + rng.normal(0, 0.4, spec.shape)).astype(np.float32),
                transformer.specs(c),
            ),
            params.shardings(transformer.specs(c), grid),
        )
        for c in (cfg.student, cfg.teacher)
    ]


def lowered(cfg, grid, *, is_packed=False):
    """The compiled update, whose states of the teacher are given."""
    student, teacher = models(cfg, grid)
    state = jax.jit(functools.partial(steps.init, cfg=cfg, tx=TX))(student, jax.random.key(0))
    whole, layout = batch(), None
    if is_packed:
        shards = mesh.batch_shards(grid)
        end = np.full(B, T)
        layout = packing.plan(np.zeros(B, int), end, columns=T, shards=shards, pieces=4)
        layout = mesh.to_global(layout, grid)
    rollout = mesh.to_global(whole, grid)
    states = steps.teacher_states(teacher, rollout, cfg=cfg, packing=layout)
    return steps.distill_step.lower(
        state, teacher, rollout, cfg=cfg, tx=TX, states_BTE=states, packing=layout
    )


def exchanged(program, least):
    """Runs of collectives of the vocabulary's rows by some width, by kind.

    Not that of the embedding's rows, which are exchanged with every micro-batch.
    """
    found = {}
    for _, op, times, _ in program.runs():
        kind = op.kind.removesuffix("-start")
        sizes = {tuple(a.dims) for a in op.arrays if len(a.dims) >= 2}
        is_rows = "scatter-add" in op.op_name
        if (
            kind in COLLECTIVES
            and not is_rows
            and any(math.prod(dims) >= least and dims[-2] in (V, V // 2) for dims in sizes)
        ):
            found[kind] = found.get(kind, 0) + times
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_gathered_and_their_gradient_is_summed_once(tied):
    devices = mesh.make(2, 2, 2)
    cfg = ObjectiveConfig(
        dataclasses.replace(STUDENT, tied=tied), TEACHER, KLSpec(chunk=4), microbatches=4
    )
    # The smallest part of a head that is exchanged: the student's, on one device.
    least = V * STUDENT.width // 8
    with jax.set_mesh(devices):
        for is_packed in (False, True):
            with afresh():  # a kept program has the names of the code that first compiled it
                text = lowered(cfg, devices, is_packed=is_packed).compile().as_text()
            found = exchanged(hlo.read(text), least)
            # Two heads over fsdp; one gradient over fsdp and what is left of it over data.
            assert found == {"all-gather": 2, "reduce-scatter": 1, "all-reduce": 1}


@pytest.mark.parametrize("tied", [True, False])
def test_the_step_is_that_of_one_device(tied):
    cfg = ObjectiveConfig(dataclasses.replace(STUDENT, tied=tied), TEACHER, KLSpec(chunk=4))
    found = []
    for grid, pieces in (({}, 1), ({"data": 2, "fsdp": 2, "model": 2}, 4)):
        shape = {"data": 1, "fsdp": 1, "model": 1} | grid
        count = math.prod(shape.values())
        devices = mesh.make(**shape, devices=jax.devices()[:count])
        own = dataclasses.replace(cfg, microbatches=pieces)
        with jax.set_mesh(devices):
            student, teacher = models(own, devices)
            begin = jax.jit(functools.partial(steps.init, cfg=own, tx=TX))
            state = begin(student, jax.random.key(0))
            rollout = mesh.to_global(batch(), devices)
            state, metrics = steps.distill_step(state, teacher, rollout, cfg=own, tx=TX)
            loss = metrics["loss"].value()
            found.append((mesh.to_host(state.params), loss, metrics["grad_norm"].value()))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found[1], found[0]
    )


def test_sums_of_a_head_need_its_part_of_each_device():
    """[S, V, D] f32 over all batch shards is [1, V / model, D] on each."""
    from opd_jax import kl

    devices = mesh.make(2, 2, 2)
    with jax.set_mesh(devices):
        sums = jax.jit(kl.head_sums)(jnp.zeros((V, 8)))
    assert {shard.data.shape for shard in sums.addressable_shards} == {(1, V // 2, 8)}
