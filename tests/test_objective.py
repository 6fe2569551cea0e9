"""The alignment "hidden at t predicts the id at t+1", which positions count, and the normaliser."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh, objective, rock
from opd_jax.kl import KLSpec
from opd_jax.models import transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Rollout
from opd_jax.rock import RockConfig

V, PAD, EOS = 24, 0, 1
STUDENT = ModelConfig("qwen3", V, 8, 16, 2, 2, 1, 4, tied=True, qk_norm=True)
TEACHER = ModelConfig("llama", V, 12, 16, 1, 2, 2, 4)
CFG = ObjectiveConfig(
    STUDENT, TEACHER, KLSpec(chunk=4), RockConfig("static", ids=(3,), inside=0.25)
)

# Prompts end at 3; row 0 stops at EOS in the middle, row 1 is cut off, row 2 is EOS at once, row 3
# has nothing scored.
IDS = np.array(
    [
        [PAD, 5, 6, 7, 3, 9, EOS, PAD],
        [8, 9, 3, 5, 3, 3, 12, 13],
        [PAD, PAD, 6, 7, EOS, PAD, PAD, PAD],
        [7, 8, 9, 10, 11, 12, 13, 14],
    ],
    np.int32,
)
MASK = np.array(
    [
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)
START = np.array([1, 0, 2, 0], np.int32)
STATE = rock.init(V, cfg=CFG.rock)


def rollout(ids=IDS, mask=MASK, start=START):
    zeros = np.zeros(ids.shape, np.float32)
    return Rollout(ids, start, mask, zeros, np.zeros(len(ids), bool), np.int32(0))


def draw(cfg, seed):
    """Random parameters wide enough for the two models to disagree by about a nat."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: jnp.asarray(spec.mean + rng.normal(0, 0.4, spec.shape), jnp.float32),
        transformer.specs(cfg),
    )


@pytest.fixture(scope="module")
def models():
    return draw(STUDENT, 2), draw(TEACHER, 1)


@functools.partial(jax.jit, static_argnames="cfg")
def loss(student, teacher, batch, state, *, cfg=CFG):
    mean, tokens = objective.loss(student, teacher, batch, state, cfg=cfg)
    return mean.total, mean.weight, tokens


def gradient(student, teacher, batch):
    """Gradient of the loss to the student's hidden states, [B, T-1, D]."""
    goal = objective.targets(batch, STATE, jax.random.key(0), cfg=CFG)
    states = jax.jit(functools.partial(objective.teacher_states, cfg=CFG))(teacher, batch)
    hidden = transformer.hidden_head_and_load

    def at(shift):
        def moved(tree, *args, cfg):
            h_BTD, *others = hidden(tree, *args, cfg=cfg)
            return h_BTD + shift, *others

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "hidden_head_and_load", moved)
            return objective.weighted_loss(student, teacher, states, batch, goal, cfg=CFG)[0]

    rows, length = batch.ids_BT.shape
    return np.asarray(jax.jit(jax.grad(at))(jnp.zeros((rows, length - 1, STUDENT.width))))


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_the_loss_is_the_aligned_sum_over_sampled_ids(models):
    valid = np.arange(IDS.shape[1]) >= START[:, None]
    logits = jax.jit(transformer.logits, static_argnames="cfg")
    logp, logq = (
        log_softmax(logits(tree, IDS, cfg=cfg, valid_BT=valid))
        for tree, cfg in zip(models, (STUDENT, TEACHER), strict=True)
    )
    kl = (np.exp(logp) * (logp - logq)).sum(-1)

    def by_hand(shift):
        places = [(b, t) for b, t in np.argwhere(MASK) if t + shift < IDS.shape[1]]
        return sum((0.25 if IDS[b, t] == 3 else 1.0) * kl[b, t + shift] for b, t in places)

    total, weight, tokens = loss(*models, rollout(), STATE)
    np.testing.assert_allclose(total, by_hand(-1), rtol=1e-5)
    assert float(weight) == MASK.sum()
    assert abs(by_hand(0) - by_hand(-1)) > 0.1  # a shift by one would be seen
    assert abs(by_hand(-2) - by_hand(-1)) > 0.1
    np.testing.assert_allclose(tokens.kl_BT, np.where(MASK[:, 1:], kl[:, :-1], 0), rtol=1e-4)


def test_gradient_reaches_what_predicts_a_sampled_id_and_nothing_else(models):
    has_gradient = np.abs(gradient(*models, rollout())).max(-1) > 1e-6
    # Row 0: position 3, the end of the prompt, predicts the first response id; position 5
    # predicts EOS; position 6, EOS itself, predicts nothing.
    assert np.flatnonzero(has_gradient[0]).tolist() == [3, 4, 5]
    assert np.flatnonzero(has_gradient[1]).tolist() == [3, 4, 5, 6]
    assert np.flatnonzero(has_gradient[2]).tolist() == [3]
    assert not has_gradient[3].any()


def test_padding_and_what_follows_the_response_do_not_matter(models):
    total, _, tokens = loss(*models, rollout(), STATE)
    after = (np.cumsum(MASK, 1) == MASK.sum(1, keepdims=True)) & ~MASK & (MASK.sum(1) > 0)[:, None]
    padding = (np.arange(IDS.shape[1]) < START[:, None]) | after
    assert padding.sum() == 3 + 4
    for fill in (EOS, 3, V - 1):  # the stop id, a gated id, any id
        odd, _, odd_tokens = loss(*models, rollout(np.where(padding, fill, IDS)), STATE)
        np.testing.assert_allclose(odd, total, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), odd_tokens, tokens
        )


def test_a_row_that_is_not_scored_does_not_matter(models):
    total, weight, _ = loss(*models, rollout(), STATE)
    ids = IDS.copy()
    ids[3] = ids[3][::-1]
    odd, odd_weight, _ = loss(*models, rollout(ids), STATE)
    np.testing.assert_allclose(odd, total, rtol=1e-6)
    assert float(odd_weight) == float(weight)


def test_the_gate_is_keyed_on_the_predicted_id():
    ids = np.array([[5, 6, 3, 7, 8]], np.int32)  # 3 is frozen
    frozen = ObjectiveConfig(STUDENT, TEACHER, rock=RockConfig("static", ids=(3,), probe=1.0))
    batch = rollout(ids, np.ones_like(ids, bool), np.zeros(1, np.int32))
    state = rock.init(V, cfg=frozen.rock)
    goal = objective.targets(batch, state, jax.random.key(0), cfg=frozen)
    # Position 1 holds 6 and predicts 3: weight 0. Position 2 holds 3 and predicts 7: weight 1.
    np.testing.assert_array_equal(goal.weight_BT, [[1, 0, 1, 1]])
    np.testing.assert_array_equal(goal.ids_BT, [[6, 3, 7, 8]])
    got = rock.update(state, goal.ids_BT, goal.ids_BT * 1.0, goal.importance_BT, cfg=frozen.rock)
    np.testing.assert_array_equal(np.flatnonzero(got.count_V), [3, 6, 7, 8])
    np.testing.assert_array_equal(got.kl_sum_V, np.arange(V) * np.asarray(got.count_V))


@pytest.mark.parametrize(
    ("key", "frozen"),
    [
        ("label", [2]),  # the place of 3 among the labels
        ("input", [3]),  # the place after it
    ],
)
def test_one_frozen_id_in_a_hand_made_sequence(models, key, frozen):
    """Prompt 5 6, answer 3 7 8, 3 is frozen: what of the real loss and state is left."""
    ids = np.array([[5, 6, 3, 7, 8]], np.int32)
    batch = rollout(ids, np.array([[0, 0, 1, 1, 1]], bool), np.zeros(1, np.int32))
    gate = RockConfig("static", ids=(3,), probe=1.0, key=key)
    cfg = ObjectiveConfig(STUDENT, TEACHER, rock=gate)
    state = rock.init(V, cfg=gate)
    total, weight, tokens = loss(*models, batch, state, cfg=cfg)
    plain, _, _ = loss(*models, batch, state, cfg=ObjectiveConfig(STUDENT, TEACHER))
    kl = dict(zip([2, 3, 4], np.asarray(tokens.kl_BT)[0, 1:], strict=True))  # by place of the label
    assert min(kl.values()) > 0.01
    np.testing.assert_allclose(plain, sum(kl.values()), rtol=1e-5)
    np.testing.assert_allclose(total, sum(x for i, x in kl.items() if i not in frozen), rtol=1e-5)
    assert float(weight) == 3
    goal = objective.targets(batch, state, jax.random.key(0), cfg=cfg)
    got = rock.update(state, goal.ids_BT, tokens.kl_BT, goal.importance_BT, cfg=gate)
    np.testing.assert_array_equal(np.flatnonzero(got.count_V), [3, 7, 8])  # keyed on the label
    np.testing.assert_allclose(got.kl_sum_V[ids[0, 2:]], list(kl.values()), rtol=1e-6)


@pytest.mark.parametrize(("last", "expected"), [(3, [0, 1]), (6, [1, 1])])
def test_the_input_key_of_the_first_answer_token_is_the_end_of_the_prompt(last, expected):
    ids = np.array([[5, last, 3, 7]], np.int32)
    gate = RockConfig("static", ids=(last if last == 3 else 9,), key="input")
    cfg = ObjectiveConfig(STUDENT, TEACHER, rock=gate)
    batch = rollout(ids, np.array([[0, 0, 1, 0]], bool), np.zeros(1, np.int32))
    goal = objective.targets(batch, rock.init(V, cfg=gate), jax.random.key(0), cfg=cfg)
    assert goal.weight_BT[0, 1] == expected[0]
    assert goal.gated_BT[0, 1] == (expected[0] == 0)


def test_weights_vanish_off_the_mask():
    goal = objective.targets(rollout(), STATE, jax.random.key(0), cfg=CFG)
    expected = np.where(IDS[:, 1:] == 3, 0.25, 1.0) * MASK[:, 1:]
    np.testing.assert_array_equal(goal.weight_BT, expected)
    np.testing.assert_array_equal(goal.importance_BT, MASK[:, 1:])


@pytest.mark.parametrize(
    ("how", "expected"),
    [("tokens", 8.0), ("weight", 8.0 - 3 * 0.75), ("per_sequence", 3.0)],  # one row is not scored
)
def test_normaliser(how, expected):
    cfg = ObjectiveConfig(STUDENT, TEACHER, rock=CFG.rock, normaliser=how)
    goal = objective.targets(rollout(), STATE, jax.random.key(0), cfg=cfg)
    assert float(objective.normaliser(goal, cfg=cfg)) == expected


def test_per_sequence_averages_what_each_sequence_is_by_itself(models):
    cfg = ObjectiveConfig(STUDENT, TEACHER, rock=CFG.rock, normaliser="per_sequence")
    mask = MASK.copy()
    mask[2, 4] = False  # then row 2 is one gated token only: its weights add up to less than 1
    ids = IDS.copy()
    mask[2, 5], ids[2, 5] = True, 3
    total, weight, tokens = loss(*models, rollout(ids, mask), STATE, cfg=cfg)
    rows = []
    for row in range(4):
        places = [t for t in range(1, 8) if mask[row, t]]
        if not places:
            continue
        w = [0.25 if ids[row, t] == 3 else 1.0 for t in places]
        kl = [float(tokens.kl_BT[row, t - 1]) for t in places]
        rows.append(np.dot(w, kl) / max(sum(w), 1.0))
    assert float(weight) == len(rows) == 3
    np.testing.assert_allclose(total / weight, np.mean(rows), rtol=1e-5)


def test_joining_undoes_splitting():
    tree = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8)}
    for pieces in (1, 2, 4):
        parts = objective.split(tree, pieces)
        assert parts["a"].shape == (pieces, 8 // pieces, 3)
        np.testing.assert_array_equal(parts["a"][:, :, 0] // 3, parts["b"])  # rows stay together
        jax.tree.map(np.testing.assert_array_equal, objective.join(parts), tree)


def test_splitting_keeps_every_piece_on_all_shards():
    devices = mesh.make(2, 2, 2)
    rows = np.arange(16).reshape(8, 2)
    with jax.set_mesh(devices):
        parts = objective.split(mesh.to_global(rows, devices), 2)
        assert jax.typeof(parts).sharding.spec[:2] == (None, mesh.BATCH)
        np.testing.assert_array_equal(objective.join(parts), rows)
        with pytest.raises(ValueError, match=r"8 rows .* 4 micro-batches over 4 batch shards"):
            objective.split(mesh.to_global(rows, devices), 4)


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"8 rows .* 3 micro-batches.*--config\.train\.micro"):
        objective.split(np.zeros((8, 3)), 3)


@pytest.mark.parametrize("bad", [dict(normaliser="mean"), dict(microbatches=0)], ids=str)
def test_a_bad_setting_names_its_flag(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"--config.train.{name}$") as error:
        ObjectiveConfig(STUDENT, TEACHER, **bad)
    assert repr(value) in str(error.value)
