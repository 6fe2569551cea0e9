"""Rows packed into fewer: the same step as rows as they are, whatever the model and the mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh, objective, optim, steps
from opd_jax.data import packing
from opd_jax.kl import KLSpec
from opd_jax.models import attention, lora, params, transformer
from opd_jax.models.architecture import Experts, LayerKind
from opd_jax.models.attention import Span
from opd_jax.models.lora import LoraSpec
from opd_jax.models.rope import Rope
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.position import PositionSpec
from opd_jax.pytrees import Rollout
from opd_jax.rock import RockConfig

B, T, P, V, REAL = 16, 41, 9, 32, 30
STUDENT = ModelConfig("qwen3", V, 8, 16, 2, 2, 2, 4, tied=True, qk_norm=True)
TEACHER = ModelConfig("llama", V, 12, 16, 1, 2, 2, 4)
# Layers that slide and layers that do not, under ropes of their own, and experts in some.
VARIED = ModelConfig(
    "qwen3_moe", V, 8, 16, 3, 4, 2, 4, qk_norm=True, window=6, local_rope=Rope(theta=100.0),
    pattern=(LayerKind(True), LayerKind(False, True), LayerKind(True, True)),
    experts=Experts(4, 2, 8, True), norms="both", qkv_bias=True,
)  # fmt: skip
GATE = RockConfig("ema", top_k=6, every=2, probe=0.5, exit_factor=1.0)
CFG = ObjectiveConfig(STUDENT, TEACHER, KLSpec("forward", chunk=8, vocab_size=REAL), GATE)
LORA = LoraSpec(rank=2, alpha=3.0)
# Plain gradient descent: what parameters move by is the gradient, with no rescaling of its noise.
TX = optim.make(optim.OptimSpec("sgd", lr=0.3, min_lr=0.3, warmup=0.0, steps=9, b1=0.0, clip=0.0))


def draw(cfg, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: (spec.mean + rng.normal(0, 0.4, spec.shape)).astype(np.float32),
        transformer.specs(cfg),
    )


def lengths(rng, rows, limit):
    """Of answers: log-normal, most far below the limit."""
    return np.clip(rng.lognormal(np.log(limit / 5), 0.8, rows), 1, limit).astype(int)


def ragged():
    """Rows of different starts and lengths; one has no answer, one is full, one has a hole."""
    rng = np.random.default_rng(0)
    ids = (REAL * rng.uniform(size=(B, T)) ** 2).astype(np.int32)  # small ids are frequent
    answers = lengths(rng, B, T - P)
    answers[5], answers[7], answers[9] = 0, T - P, 8
    place = np.arange(T)
    mask = (place >= P) & (place < P + answers[:, None])
    mask[9, P + 3] = False
    start = rng.integers(0, P, B).astype(np.int32)
    start[7] = 0
    zeros = np.zeros((B, T), np.float32)
    return Rollout(ids, start, mask, zeros, answers == T - P, np.int32(0))


BATCH = ragged()
END = objective.ends(BATCH)


def packed(shards=1, pieces=1):
    return packing.plan(BATCH.start_B, END, columns=T, shards=shards, pieces=pieces)


def after(cfg, num_steps=2, grid=None, is_adapted=False, **kwargs):
    """The state after some steps on the batch, on the host, and the metrics of each."""
    models, declared = [draw(cfg.student, 0), draw(cfg.teacher, 1)], lora.specs(cfg.student, LORA)
    rng = np.random.default_rng(4)  # both sides of an adapter are drawn, that of zeros, too
    own = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), declared)
    batch = BATCH
    if grid is not None:
        batch = mesh.to_global(batch, grid)
        models = [
            jax.device_put(tree, params.shardings(transformer.specs(c), grid))
            for tree, c in zip(models, (cfg.student, cfg.teacher), strict=True)
        ]
        own = jax.device_put(own, params.shardings(declared, grid))
    student = lora.attached(models[0], own, LORA) if is_adapted else models[0]
    begin = jax.jit(functools.partial(steps.init, cfg=cfg, tx=TX))
    state, teacher, metrics = begin(student, jax.random.key(3)), models[1], []
    for _ in range(num_steps):
        state, found = steps.distill_step(state, teacher, batch, cfg=cfg, tx=TX, **kwargs)
        metrics.append({name: mean.value() for name, mean in found.items()})
    return mesh.to_host(state.replace(key=None)), metrics


@functools.lru_cache
def unpacked(is_adapted=False):
    """What every layout of ``CFG`` is to give."""
    return after(CFG, is_adapted=is_adapted)


def agree(found, wanted):
    (state, metrics), (state_0, metrics_0) = found, wanted
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), state, state_0
    )
    assert state.rock.count_V.sum() > 0
    for now, then in zip(metrics, metrics_0, strict=True):
        assert now.keys() == then.keys()
        left = {name: value for name, value in then.items() if name != "padding_share"}
        assert {name: now[name] for name in left} == pytest.approx(left, rel=2e-5, abs=2e-6)
        assert now["padding_share"] < then["padding_share"]


def test_every_token_is_laid_out_once_and_reads_its_own_row():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        shards, pieces = (int(n) for n in rng.choice([1, 2, 4], 2))
        rows = shards * pieces * int(rng.integers(1, 5))
        start = rng.integers(0, P, rows)
        end = np.where(rng.uniform(size=rows) < 0.1, 0, P + lengths(rng, rows, T - P))
        layout = packing.plan(start, end, columns=T, shards=shards, pieces=pieces)
        source, first = (x.swapaxes(0, 1) for x in (layout.source_RPL, layout.first_RPL))
        place = np.arange(T - 1)
        wanted = (place >= start[:, None]) & (place < end[:, None])
        np.testing.assert_array_equal(layout.place_BT >= 0, wanted)
        index = np.flatnonzero(wanted)
        np.testing.assert_array_equal(source.ravel()[layout.place_BT[wanted]], index)
        assert (source >= 0).sum() == len(index)
        column = np.broadcast_to(np.arange(source.shape[2]), source.shape)
        since = (column - first).ravel()[layout.place_BT[wanted]]
        np.testing.assert_array_equal(since, (place[None] - start[:, None])[wanted])
        np.testing.assert_array_equal(first[source < 0], column[source < 0])
        assert (source[int(layout.num_pieces) :] < 0).all()
        # No piece is larger than one of rows as they are.
        assert source.shape[0] == pieces
        assert source.shape[1] % shards == 0
        assert source[0].size <= rows // pieces * (T - 1)


@pytest.mark.parametrize(
    ("rows", "shards", "pieces"), [(64, 1, 1), (64, 1, 4), (128, 4, 1), (256, 8, 4), (512, 16, 4)]
)
def test_little_of_what_is_computed_is_padding(rows, shards, pieces):
    """Log-normal answers up to 512 after prompts of 16 to 128, as ``scripts/bench unequal`` has."""
    shares, shapes = [], set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        start = 128 - rng.integers(16, 129, rows)
        end = 128 + np.clip(rng.lognormal(np.log(120), 0.7, rows), 1, 512).astype(int)
        layout = packing.plan(start, end, columns=640, shards=shards, pieces=pieces)
        num, _, width = layout.source_RPL.shape
        shares.append(1 - (layout.place_BT >= 0).sum() / (layout.num_pieces * num * width))
        shapes.add(layout.source_RPL.shape)
    assert np.mean(shares) < 0.10
    assert len(shapes) <= 10  # programs


@pytest.mark.parametrize("window", [None, 6])
def test_attention_of_sequences_in_a_row_is_that_of_each_alone(window):
    sizes, length = (5, 33, 1, 60), 130  # and padding; over the borders of blocks
    rng = np.random.default_rng(1)
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=(1, length, *rest)), jnp.float32)
        for rest in ((2, 2, 4), (2, 4), (2, 4), (2, 2, 4))
    )
    first, valid, at = np.arange(length)[None].copy(), np.zeros((1, length), bool), 0
    for size in sizes:
        first[0, at : at + size], valid[0, at : at + size] = at, True
        at += size
    span = Span(0.5, window)

    def whole(q, k, v):
        out = attention.causal(q, k, v, jnp.asarray(valid), span=span, first_BT=jnp.asarray(first))
        return jnp.where(valid[:, :, None, None, None], out, 0.0)

    def alone(q, k, v):
        outs, at = [], 0
        for size in sizes:
            part = [x[:, at : at + size] for x in (q, k, v)]
            outs.append(attention.causal(*part, jnp.ones((1, size), bool), span=span))
            at += size
        rest = ((0, 0), (0, length - at), (0, 0), (0, 0), (0, 0))
        return jnp.pad(jnp.concatenate(outs, axis=1), rest)

    np.testing.assert_allclose(whole(q, k, v), alone(q, k, v), atol=1e-6)
    grads = [
        jax.grad(lambda *x, f=f: jnp.sum(f(*x) * weight), argnums=(0, 1, 2))(q, k, v)
        for f in (whole, alone)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), *grads)


@pytest.mark.parametrize(
    ("changed", "pieces"),
    [
        ({}, 1),
        ({"normaliser": "per_sequence", "position": PositionSpec("random_window", window=3)}, 4),
        (
            {
                "student": VARIED,
                "normaliser": "weight",
                "load_balance": 0.5,
                "position": PositionSpec("iw", shuffled=True),
                "kl": KLSpec("reverse", vocab_size=REAL),
            },
            2,
        ),
        ({"teacher": VARIED, "kl": KLSpec("forward", vocab_size=REAL, ce=0.3)}, 1),
    ],
)
def test_a_packed_step_is_the_step(changed, pieces):
    cfg = dataclasses.replace(CFG, **changed)
    wanted = unpacked() if cfg == CFG else after(cfg)
    agree(after(dataclasses.replace(cfg, microbatches=pieces), packing=packed(1, pieces)), wanted)


@pytest.mark.parametrize("grid", [None, {"data": 2, "fsdp": 2, "model": 2}])
def test_adapters_of_packed_rows_are_those_of_rows(grid):
    cfg, wanted = dataclasses.replace(CFG, microbatches=2), unpacked(is_adapted=True)
    if grid is None:
        agree(after(cfg, is_adapted=True, packing=packed(1, 2)), wanted)
        return
    devices = mesh.make(**grid)
    with jax.set_mesh(devices):
        layout = mesh.to_global(packed(mesh.batch_shards(devices), 2), devices)
        agree(after(cfg, grid=devices, is_adapted=True, packing=layout), wanted)


@pytest.mark.parametrize("pieces", [1, 2])
def test_packed_states_of_the_teacher_are_handed_on(pieces):
    cfg = dataclasses.replace(CFG, microbatches=pieces, position=PositionSpec("ta"))
    layout = packed(1, pieces)
    states = steps.teacher_states(draw(TEACHER, 1), BATCH, cfg=cfg, packing=layout)
    rows, _, width = layout.source_RPL.shape
    assert states.shape == (pieces, rows, width, TEACHER.width)
    found = after(cfg, packing=layout, states_BTE=states)
    agree(found, after(dataclasses.replace(cfg, microbatches=1)))


@pytest.mark.parametrize("grid", [{"data": 2, "fsdp": 2, "model": 2}, {"data": 8}])
def test_rows_are_packed_over_eight_devices(grid):
    devices = mesh.make(**{"data": 1, **grid})
    shards = mesh.batch_shards(devices)
    cfg, wanted = dataclasses.replace(CFG, microbatches=2), unpacked()
    with jax.set_mesh(devices):
        layout = mesh.to_global(packed(shards, 2), devices)
        agree(after(cfg, grid=devices, packing=layout), wanted)
