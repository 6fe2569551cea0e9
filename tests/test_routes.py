"""Several teachers: a batch of mixed rows gives the sum of what each teacher's rows give."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import mesh, objective, rock, routes, steps
from opd_jax.kl import KLSpec
from opd_jax.models import params, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Rollout

ROWS, COLUMNS, FIRST, V = 8, 12, 5, 48
SMALL = ModelConfig(
    model_type="qwen3", vocab_size=V, width=16, ffn=32, num_layers=1, num_heads=4, num_kv_heads=2,
    head_dim=8, qk_norm=True, tied=True, max_positions=32,
)  # fmt: skip
WIDE = dataclasses.replace(SMALL, width=24, num_layers=2)
TEACHERS = (SMALL, WIDE, SMALL)  # of two widths
WHOSE = (0, 1, 1, 2, 0, 1, 2, 1)  # each row's teacher
TX = optax.sgd(1.0)
KEY = functools.partial(jax.random.key, 3)
LOOSE = dict(rtol=2e-5, atol=2e-6)


def config(**keys) -> ObjectiveConfig:
    cfg = ObjectiveConfig(
        student=SMALL,
        teacher=TEACHERS[0],
        others=TEACHERS[1:],
        names=("a", "b", "c"),
        kl=KLSpec(chunk=16),
    )
    return dataclasses.replace(cfg, **keys)


def alone(cfg: ObjectiveConfig, place: int) -> ObjectiveConfig:
    return dataclasses.replace(cfg, teacher=TEACHERS[place], others=(), names=())


@functools.cache
def models():
    """Weights of the student and of three teachers."""
    trees = []
    for seed, cfg in enumerate((SMALL, *TEACHERS)):
        tree = params.init(transformer.specs(cfg), jax.random.key(seed))
        trees.append(tree | {"embed": tree["embed"] * 20})
    # On the host: what is on a device already may be donated with a state that shares it.
    return jax.device_get((trees[0], tuple(trees[1:])))


def batch(whose=WHOSE) -> Rollout:
    """Rows of several lengths, prompts before ``FIRST``."""
    rng = np.random.default_rng(0)
    ends = rng.integers(FIRST + 1, COLUMNS + 1, ROWS)
    column = np.arange(COLUMNS)[None, :]
    mask = (column >= FIRST) & (column < ends[:, None])
    return Rollout(
        ids_BT=jnp.asarray(rng.integers(0, V, (ROWS, COLUMNS)), jnp.int32),
        start_B=jnp.asarray(rng.integers(0, FIRST, ROWS), jnp.int32),
        mask_BT=jnp.asarray(mask),
        logp_BT=jnp.zeros((ROWS, COLUMNS)),
        truncated_B=jnp.zeros(ROWS, bool),
        policy_step=jnp.int32(0),
        teacher_B=jnp.asarray(whose, jnp.int32),
    )


def rows_of(rollout: Rollout, place: int) -> Rollout:
    """The same batch, of which the rows of one teacher alone are scored; it has that teacher."""
    is_own = (rollout.teacher_B == place)[:, None]
    return rollout.replace(mask_BT=rollout.mask_BT & is_own, teacher_B=None)


def step(cfg, teacher, rollout, axes=None):
    """New parameters and measurements of a step, on the host."""
    student, _ = models()
    if axes is None:
        state = steps.init(jax.tree.map(jnp.array, student), KEY(), cfg=cfg, tx=TX)
        states = steps.teacher_states(teacher, rollout, cfg=cfg)
        state, means = steps.distill_step(
            state, teacher, rollout, cfg=cfg, tx=TX, states_BTE=states
        )
        return jax.device_get((state, means))
    devices = mesh.make(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    with jax.set_mesh(devices):
        place = lambda tree, of: jax.device_put(  # noqa: E731
            tree, params.shardings(transformer.specs(of), devices)
        )
        state = steps.init(place(student, SMALL), KEY(), cfg=cfg, tx=TX)
        teacher = tuple(place(*pair) for pair in zip(teacher, TEACHERS, strict=True))
        rollout = mesh.to_global(jax.device_get(rollout), devices)
        states = steps.teacher_states(teacher, rollout, cfg=cfg)
        state, means = steps.distill_step(
            state, teacher, rollout, cfg=cfg, tx=TX, states_BTE=states
        )
        return jax.device_get((state, means))


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnames="cfg")
def measured(student, teacher, rollout, cfg):
    """The loss and each position's divergence, gradients to the student."""
    state = rock.init(V, cfg=cfg.rock)

    def total(student):
        found, tokens = objective.loss(student, teacher, rollout, state, cfg=cfg, key=KEY())
        return found.total, (found.weight, tokens)

    return jax.value_and_grad(total, has_aux=True)(student)


@functools.partial(jax.jit, static_argnames="cfg")
def logits(tree, ids, cfg):
    return transformer.logits(tree, ids, cfg=cfg)


def test_every_row_is_measured_against_its_own_teacher():
    # In float64, row by row: a row begins in the first column, and nothing reads behind it.
    cfg, rollout, (student, teachers) = config(), batch(), models()
    (total, (_, tokens)), _ = measured(student, teachers, rollout, cfg)
    expected = np.zeros((ROWS, COLUMNS - 1))
    for row in range(ROWS):
        place, start = WHOSE[row], int(rollout.start_B[row])
        ids = jnp.roll(rollout.ids_BT[row : row + 1], -start, axis=1)
        p = log_softmax(logits(student, ids, SMALL)[0])
        q = log_softmax(logits(teachers[place], ids, TEACHERS[place])[0])
        expected[row, start:] = (np.exp(p) * (p - q)).sum(-1)[: COLUMNS - 1 - start]
    expected *= np.asarray(rollout.mask_BT)[:, 1:]
    np.testing.assert_allclose(tokens.kl_BT, expected, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-4)
    other = rollout.replace(teacher_B=(jnp.array(WHOSE, jnp.int32) + 1) % 3)
    wrong = measured(student, teachers, other, cfg)[0][1][1]
    assert np.abs(wrong.kl_BT - expected).max() > 0.1  # the teachers differ


@pytest.mark.parametrize(
    "keys",
    [
        {"microbatches": 2, "kl": KLSpec("forward", ce=0.3, chunk=16)},
        {"kl": KLSpec("jsd", temperature=2.0, chunk=16), "normaliser": "per_sequence"},
    ],
    ids=["forward and ce in pieces", "jsd per sequence"],
)
def test_loss_and_gradient_are_the_sums_of_those_of_each_teacher(keys):
    cfg, rollout, (student, teachers) = config(**keys), batch(), models()
    new, means = step(cfg, teachers, rollout)
    whole = dataclasses.replace(cfg, microbatches=1)
    losses, weights, grads = [], [], []
    for place, name in enumerate(cfg.names):
        own = rows_of(rollout, place)
        (value, (weight, tokens)), grad = measured(
            student, teachers[place], own, alone(whole, place)
        )
        losses.append(value)
        weights.append(weight)
        grads.append(grad)
        assert means[f"kl_nats/{name}"].weight == np.asarray(own.mask_BT)[:, 1:].sum()
        np.testing.assert_allclose(
            means[f"kl_nats/{name}"].total, np.sum(tokens.reverse_BT), rtol=1e-4
        )
    norm = sum(weights)
    np.testing.assert_allclose(means["loss"].total, sum(losses), rtol=1e-4)
    assert means["loss"].weight == norm
    expected = jax.tree.map(lambda p, *g: p - sum(g) / norm, student, *grads)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **LOOSE), new.params, expected)


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"data": 2, "model": 2}], ids=["fsdp", "model"])
def test_four_devices_give_what_one_gives(axes):
    cfg, rollout, (_, teachers) = config(microbatches=2), batch(), models()
    one, on_one = step(cfg, teachers, rollout)
    four, on_four = step(cfg, teachers, rollout, axes=dict(data=1, fsdp=1, model=1) | axes)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **LOOSE), four.params, one.params)
    for name in ("loss", "kl_nats", "kl_nats/a", "kl_nats/b", "kl_nats/c"):
        np.testing.assert_allclose(on_four[name].total, on_one[name].total, rtol=1e-4)
        assert on_four[name].weight == on_one[name].weight


@pytest.mark.optimized
def test_one_of_several_teachers_gives_what_it_gives_alone_bit_for_bit():
    cfg, rollout, (_, teachers) = config(), batch(whose=(0,) * ROWS), models()
    several = step(cfg, teachers, rollout)
    single = step(alone(cfg, 0), teachers[0], rollout.replace(teacher_B=None))
    jax.tree.map(np.testing.assert_array_equal, several[0].params, single[0].params)
    for name, mean in single[1].items():
        np.testing.assert_array_equal(mean.total, several[1][name].total, name)
    assert several[1]["kl_nats/b"].weight == 0


def test_pieces_have_rows_of_few_teachers_and_all_come_back():
    whose = jnp.array([0, 1, 0, 1, 2, 1, 2, 0], jnp.int32)
    for pieces in (1, 2, 4):
        order = routes.order(whose, pieces)
        dealt = objective.split(routes.taken(whose, order), pieces)
        assert sum(len({*map(int, piece)}) for piece in dealt) <= pieces + 2
        back = routes.taken(routes.taken(whose, order), order, back=True)
        np.testing.assert_array_equal(back, whose)


def test_a_teacher_without_a_row_is_not_run():
    # Its weights are no numbers: had they been read, nothing would be one.
    cfg, (_, teachers) = config(), models()
    broken = jax.tree.map(lambda x: x * jnp.nan, teachers[1])
    rollout = batch(whose=(0, 2) * (ROWS // 2))
    states = steps.teacher_states((teachers[0], broken, teachers[2]), rollout, cfg=cfg)
    assert np.isfinite(states).all()
    mixed = steps.teacher_states((teachers[0], broken, teachers[2]), batch(), cfg=cfg)
    own = np.asarray(batch().teacher_B) == 1
    assert np.isnan(mixed[own]).any()
    assert np.isfinite(np.asarray(mixed)[~own]).all()
