"""The training step: no split, device or skipped position changes it; what it measures is right."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh, objective, optim, rock, steps
from opd_jax.kl import KLSpec
from opd_jax.models import params, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Rollout
from opd_jax.rock import RockConfig

B, T, V, REAL = 16, 9, 32, 30
STUDENT = ModelConfig("qwen3", V, 8, 16, 2, 2, 2, 4, tied=True, qk_norm=True)
TEACHER = ModelConfig("llama", V, 12, 16, 1, 2, 2, 4)
GATE = RockConfig("ema", top_k=6, every=2, probe=0.5, exit_factor=1.0)
CFG = ObjectiveConfig(STUDENT, TEACHER, KLSpec("forward", chunk=8, vocab_size=REAL), GATE)
# Plain gradient descent: what parameters move by is the gradient, with no rescaling of its noise.
TX = optim.make(optim.OptimSpec("sgd", lr=0.3, min_lr=0.3, warmup=0.0, steps=9, b1=0.0, clip=0.0))
KEY = 3
GRID = {"data": 2, "fsdp": 2, "model": 2}


def draw(cfg, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: (spec.mean + rng.normal(0, 0.4, spec.shape)).astype(np.float32),
        transformer.specs(cfg),
    )


def ragged(seed=0):
    """Rows of different starts and lengths; one is not scored at all."""
    rng = np.random.default_rng(seed)
    ids = (REAL * rng.uniform(size=(B, T)) ** 2).astype(np.int32)  # small ids are frequent
    lengths = rng.integers(1, T - 3, B)
    lengths[5] = 0
    place = np.arange(T)
    mask = (place >= 4) & (place < 4 + lengths[:, None])
    zeros = np.zeros((B, T), np.float32)
    start = rng.integers(0, 4, B).astype(np.int32)
    return Rollout(ids, start, mask, zeros, lengths == T - 4, np.int32(0))


STUDENT_0, TEACHER_0, BATCH = draw(STUDENT, 0), draw(TEACHER, 1), ragged()


def fresh(cfg=CFG):
    """A state at step 0 with buffers of its own, since a step consumes them."""
    return steps.init(jax.tree.map(jnp.array, STUDENT_0), jax.random.key(KEY), cfg=cfg, tx=TX)


RUN_KEY = fresh().key  # of the draws inside steps


def saved(state):
    return mesh.to_host(state.replace(key=None))


def run(state, teacher, batch, cfg, num_steps=3, **kwargs):
    """Return host copies of the state before, between and after the steps, and the metrics."""
    states, metrics = [saved(state)], []
    for _ in range(num_steps):
        state, measured = steps.distill_step(state, teacher, batch, cfg=cfg, tx=TX, **kwargs)
        states.append(saved(state))
        metrics.append({name: mean.value() for name, mean in measured.items()})
    return states, metrics


@pytest.fixture(scope="module")
def teacher():
    return jax.tree.map(jnp.asarray, TEACHER_0)


@pytest.fixture(scope="module")
def plain(teacher):
    """Three steps on one device in one piece: the third is gated."""
    before = steps.programs()["distill_step"]
    states, metrics = run(fresh(), teacher, BATCH, CFG)
    assert steps.programs()["distill_step"] == before + 1  # compiled once
    return states, metrics


def agree(a, b, tol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b)


def log_softmax(z):
    z = np.asarray(z[..., :REAL], np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


logits = jax.jit(transformer.logits, static_argnames="cfg")


@pytest.fixture(scope="module")
def dense(plain):
    """For each step, from whole logits in float64: forward KL, reverse KL, two entropies, CE."""
    valid = np.arange(T) >= BATCH.start_B[:, None]
    logq = log_softmax(logits(TEACHER_0, BATCH.ids_BT, cfg=TEACHER, valid_BT=valid))[:, :-1]

    def at(tree):
        logp = log_softmax(logits(tree, BATCH.ids_BT, cfg=STUDENT, valid_BT=valid))[:, :-1]
        p, q = np.exp(logp), np.exp(logq)
        return {
            "forward": (q * (logq - logp)).sum(-1),
            "reverse": (p * (logp - logq)).sum(-1),
            "student_entropy_nats": -(p * logp).sum(-1),
            "teacher_entropy_nats": -(q * logq).sum(-1),
            "ce": -np.take_along_axis(logp, BATCH.ids_BT[:, 1:, None], -1)[..., 0],
        }

    return [at(state.params) for state in plain[0]]


def test_the_gate_closes_on_its_cadence_and_never_on_its_own_batch(plain):
    states, metrics = plain
    assert [int(s.rock.member_V.sum()) for s in states] == [0, 0, 6, 6]
    assert [m["rock_members"] for m in metrics] == [0, 6, 6]
    # The step that finds the members is still ungated: its weights are from the state before.
    assert [m["gated_share"] > 0 for m in metrics] == [False, False, True]
    assert [int(s.step) for s in states] == [int(s.rock.step) for s in states] == [0, 1, 2, 3]
    assert metrics[1]["loss"] < metrics[0]["loss"]
    assert all(m["nonfinite"] == -1 for m in metrics)


def test_rock_state_and_metrics_are_those_of_dense_logits(plain, dense):
    states, metrics = plain
    ids, mask = BATCH.ids_BT[:, 1:], BATCH.mask_BT[:, 1:]
    for i in range(3):
        old = states[i]
        key = jax.random.fold_in(RUN_KEY, i)
        goal = objective.targets(BATCH, jax.tree.map(jnp.asarray, old.rock), key, cfg=CFG)
        seen = np.asarray(goal.importance_BT)
        expected = rock.update(old.rock, ids, dense[i]["forward"] * 1.0, seen, cfg=GATE)
        if i == 1:
            expected = rock.refresh(expected, cfg=GATE)
        agree(states[i + 1].rock, expected, 1e-4)

        member = old.rock.member_V[ids]
        assert np.all(seen[mask & ~member] == 1)
        assert np.all(seen[~mask] == 0)

        def mean(x, where, seen=seen):
            weight = seen * where
            return (weight * x).sum() / weight.sum() if weight.any() else 0.0

        columns = np.arange(BATCH.ids_BT.shape[1])
        ends = (BATCH.mask_BT * (columns + 1)).max(axis=1, keepdims=True)
        padding = 1 - ((columns >= BATCH.start_B[:, None]) & (columns < ends)).mean()
        by_hand = {
            "loss": (dense[i]["forward"] * mask * ~member).sum() / mask.sum(),
            "divergence": mean(dense[i]["forward"], mask),
            "kl_nats": mean(dense[i]["reverse"], mask),
            "kl_gated": mean(dense[i]["reverse"], member),
            "kl_ungated": mean(dense[i]["reverse"], ~member),
            "student_entropy_nats": mean(dense[i]["student_entropy_nats"], mask),
            "teacher_entropy_nats": mean(dense[i]["teacher_entropy_nats"], mask),
            "gated_share": (mask & member).sum() / mask.sum(),
            "gated_kl_share": mean(member, dense[i]["reverse"] * mask),
            "gate_weight": (mask & ~member).sum() / mask.sum(),
            "projected_share": (seen > 0).sum() / mask.sum(),
            "length_tokens": mask.sum() / B,
            "truncated_share": BATCH.truncated_B.mean(),
            "padding_share": padding,
        }
        for name, value in by_hand.items():
            np.testing.assert_allclose(metrics[i][name], value, rtol=1e-4, err_msg=f"{name} {i}")
    # The gated step measured some of the gated positions and skipped others.
    assert metrics[2]["kl_gated"] > 0
    assert 1 - metrics[2]["gated_share"] < metrics[2]["projected_share"] < 1


def test_metrics_say_how_the_members_moved(plain):
    states, metrics = plain
    assert [m["rock_entries"] for m in metrics] == [0, 6, 0]
    assert [m["rock_exits"] for m in metrics] == [0, 0, 0]
    old, new = (np.isin(np.arange(V), ids) for ids in ([1, 2, 3, 4], [3, 4, 5]))
    rocks = [states[0].rock.replace(member_V=jnp.asarray(x)) for x in (old, new, old & new & ~old)]
    moved = steps.membership(rocks[0], rocks[1])
    found = {name: mean.value() for name, mean in moved.items()}
    assert found == pytest.approx(
        {"rock_members": 3, "rock_entries": 1, "rock_exits": 2, "rock_jaccard": 2 / 5}
    )
    assert float(steps.membership(rocks[2], rocks[2])["rock_jaccard"].weight) == 0


def test_eight_devices_micro_batches_and_given_teacher_states_do_not_matter(plain):
    cfg = dataclasses.replace(CFG, microbatches=2)
    devices = mesh.make(**GRID)
    with jax.set_mesh(devices):
        student, teacher = (
            jax.device_put(tree, params.shardings(transformer.specs(c), devices))
            for tree, c in ((STUDENT_0, STUDENT), (TEACHER_0, TEACHER))
        )
        state = jax.jit(functools.partial(steps.init, cfg=cfg, tx=TX))(student, jax.random.key(KEY))
        batch = mesh.to_global(BATCH, devices)
        states = steps.teacher_states(teacher, batch, cfg=cfg)
        assert states.shape == (B, T - 1, TEACHER.width)
        before = steps.programs()
        got, metrics = run(state, teacher, batch, cfg, states_BTE=states)
    assert steps.programs() == before | {"distill_step": before["distill_step"] + 1}
    agree(got, plain[0])
    agree(metrics, plain[1])


def rounds(jaxpr):
    """Rounds of each counted loop, however deep in a traced program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["length"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from rounds(inner)


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_layers_are_one_loop_and_a_whole_batch_is_none(pieces):
    """Of a loop of one round around the layers, XLA for TPU makes two of the layers."""
    deep = dataclasses.replace(TEACHER, num_layers=5)
    student = dataclasses.replace(STUDENT, num_layers=3)
    cfg = dataclasses.replace(CFG, student=student, teacher=deep, microbatches=pieces)
    tree, own = (params.abstract(transformer.specs(c), jnp.float32) for c in (deep, student))
    state = jax.eval_shape(functools.partial(steps.init, cfg=cfg, tx=TX), own, jax.random.key(0))
    traced = {
        "teacher": steps.teacher_states.trace(tree, BATCH, cfg=cfg),
        "evaluation": steps.eval_step.trace(own, tree, BATCH, state.rock, cfg=cfg),
        "update": steps.distill_step.trace(state, tree, BATCH, cfg=cfg, tx=TX),
    }
    found = {name: sorted(rounds(made.jaxpr.jaxpr)) for name, made in traced.items()}
    batch = [pieces] * (pieces > 1)
    assert found == {
        "teacher": [*batch, 5],
        "evaluation": [*batch, 3, 5],
        "update": [*batch, 3, 3, 5],  # and back through the student's
    }


def test_a_step_draws_with_no_key_of_a_rollout():
    """The loop folds the run's key by step, and a rollout that by row."""
    root = jax.random.key(KEY)

    def bits(keys):
        return {tuple(x) for x in np.asarray(jax.random.key_data(keys)).tolist()}

    def fold(key, number):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(number))

    for step in range(3):
        sampling = jax.random.fold_in(root, step)
        inside = jax.random.fold_in(RUN_KEY, step)
        own = bits(inside[None]) | bits(jax.random.split(inside))
        assert len(own) == 3
        assert not own & (bits(sampling[None]) | bits(fold(sampling, B)) | bits(fold(root, 100)))


def test_off_policy_in_four_pieces_is_on_policy_in_one(plain, teacher):
    cfg = dataclasses.replace(CFG, microbatches=4)
    after, measured = steps.off_policy_step(fresh(), teacher, BATCH, cfg=cfg, tx=TX)
    agree(saved(after), plain[0][1])
    agree({name: mean.value() for name, mean in measured.items()}, plain[1][0])


def test_the_state_is_consumed_and_the_teacher_is_not(teacher):
    state = fresh()
    after, _ = steps.distill_step(state, teacher, BATCH, cfg=CFG, tx=TX)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, saved(after).params, STUDENT_0)
    assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, mesh.to_host(teacher), TEACHER_0)


def stepped(rock_state, teacher, cfg, step=2):
    """One step with given members: (state after, metrics)."""
    state = fresh(cfg).replace(
        step=jnp.int32(step), rock=jax.tree.map(jnp.array, rock_state).replace(step=jnp.int32(step))
    )
    after, measured = steps.distill_step(state, teacher, BATCH, cfg=cfg, tx=TX)
    return saved(after), {name: mean.value() for name, mean in measured.items()}


@pytest.mark.parametrize(
    "gate",
    [
        RockConfig("static", ids=(0,), probe=0.5),
        RockConfig("ema", top_k=6, every=2, probe=0.5, exit_factor=1.0),
        RockConfig("ema", top_k=6, every=2, probe=0.5, key="input"),
        RockConfig("adaptive", top_k=6, probe=0.5, start=1),
        RockConfig("random", share=0.4, probe=0.5),
        RockConfig("ema", top_k=6, probe=0.5, ramp=2),
    ],
    ids=lambda gate: f"{gate.mode}-{gate.key}-{gate.ramp}",
)
def test_skipped_positions_are_those_multiplied_by_nothing(plain, teacher, gate):
    # With a weight that is not 0 every position is projected and multiplied by it. Fast sums equal
    # to the slow ones: nothing learns, so that adaptive members weigh 0 too.
    old = plain[0][2].rock
    old = old.replace(fast_count_V=old.count_V, fast_kl_sum_V=old.kl_sum_V)
    skipped = dataclasses.replace(CFG, rock=gate)
    multiplied = dataclasses.replace(CFG, rock=dataclasses.replace(gate, inside=1e-30))
    state, metrics = stepped(old, teacher, skipped)
    expected, measured = stepped(old, teacher, multiplied)
    assert measured["projected_share"] == 1
    assert metrics["projected_share"] < 1
    agree(state.params, expected.params, 1e-5)
    for name in ("loss", "gated_share", "gate_weight"):
        np.testing.assert_allclose(metrics[name], measured[name], rtol=1e-5, err_msg=name)
    assert metrics["gated_share"] == pytest.approx(1 - metrics["gate_weight"]) != 0


def test_a_ramp_skips_nothing_before_its_end(plain, teacher):
    cfg = dataclasses.replace(CFG, rock=RockConfig("ema", top_k=6, probe=0.5, ramp=4))
    _, half = stepped(plain[0][2].rock, teacher, cfg, step=2)
    _, whole = stepped(plain[0][2].rock, teacher, cfg, step=4)
    assert half["projected_share"] == 1
    assert whole["projected_share"] < 1
    assert 1 - half["gate_weight"] == pytest.approx(0.5 * (1 - whole["gate_weight"]))


def test_random_positions_are_drawn_anew_every_step(teacher):
    cfg = dataclasses.replace(CFG, rock=RockConfig("random", share=0.4, inside=0.5))
    _, metrics = run(fresh(cfg), teacher, BATCH, cfg, num_steps=2)
    num = BATCH.mask_BT.sum()
    for measured in metrics:
        assert 0 < measured["gated_share"] < 1
        assert abs(measured["gated_share"] - 0.4) < 4 * np.sqrt(0.4 * 0.6 / num)
    assert metrics[0]["kl_gated"] != metrics[1]["kl_gated"]
    assert metrics[0]["rock_members"] == 0


@pytest.mark.parametrize(
    ("gate", "normaliser"),
    [
        (RockConfig("random", share=0.4, probe=0.5), "per_sequence"),
        (RockConfig("static", ids=(0, 1, 2), inside=0.3, key="input"), "per_sequence"),
    ],
    ids=["random", "input"],
)
def test_no_gate_or_normaliser_depends_on_pieces_or_devices(teacher, gate, normaliser):
    cfg = dataclasses.replace(CFG, rock=gate, normaliser=normaliser)
    expected, metrics = run(fresh(cfg), teacher, BATCH, cfg, num_steps=2)
    assert 0 < metrics[0]["gated_share"] < 1
    cut = dataclasses.replace(cfg, microbatches=4)
    got, measured = run(fresh(cut), teacher, BATCH, cut, num_steps=2)
    agree(got, expected)
    agree(measured, metrics)
    devices = mesh.make(**GRID)
    with jax.set_mesh(devices):
        student, other = (
            jax.device_put(tree, params.shardings(transformer.specs(c), devices))
            for tree, c in ((STUDENT_0, STUDENT), (TEACHER_0, TEACHER))
        )
        state = jax.jit(functools.partial(steps.init, cfg=cfg, tx=TX))(student, jax.random.key(KEY))
        got, measured = run(state, other, mesh.to_global(BATCH, devices), cfg, num_steps=2)
    agree(got, expected)
    agree(measured, metrics)


def test_cross_entropy_alone_needs_no_teacher(dense):
    cfg = dataclasses.replace(
        CFG, teacher=None, kl=KLSpec(ce=1.0, vocab_size=REAL), rock=RockConfig(), microbatches=2
    )
    state, losses = fresh(cfg), []
    for _ in range(4):
        state, measured = steps.off_policy_step(state, None, BATCH, cfg=cfg, tx=TX)
        losses.append(measured["loss"].value())
    mask = BATCH.mask_BT[:, 1:]
    np.testing.assert_allclose(losses[0], (dense[0]["ce"] * mask).sum() / mask.sum(), rtol=1e-5)
    assert losses == sorted(losses, reverse=True)


def test_a_missing_teacher_is_an_error():
    with pytest.raises(ValueError, match=r"no teacher given and kl\.ce is 0\.0"):
        steps.off_policy_step(fresh(), None, BATCH, cfg=CFG, tx=TX)


def test_evaluation_measures_gated_positions_too(plain, dense):
    state = plain[0][2]
    cfg = dataclasses.replace(CFG, microbatches=2)
    measured, tokens = steps.eval_step(state.params, TEACHER_0, BATCH, state.rock, cfg=cfg)
    mask, reverse = BATCH.mask_BT[:, 1:], dense[2]["reverse"]
    member = state.rock.member_V[BATCH.ids_BT[:, 1:]]
    np.testing.assert_allclose(tokens.reverse_BT, reverse * mask, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tokens.logp_BT, -dense[2]["ce"] * mask, rtol=1e-4, atol=1e-5)
    for name, where in (
        ("kl_nats", mask),
        ("kl_gated", mask & member),
        ("kl_ungated", mask & ~member),
    ):
        assert measured[name].weight == where.sum() > 0
        np.testing.assert_allclose(measured[name].value(), reverse[where].mean(), rtol=1e-4)
    assert measured["projected_share"].value() == 1


@pytest.fixture(scope="module")
def poisoned(teacher):
    """A step in which a tensor whose first entry is 0 gets NaN as its gradient, and only that."""
    cfg = dataclasses.replace(CFG, kl=dataclasses.replace(CFG.kl, chunk=7))
    weighted_loss = objective.weighted_loss_and_load

    def poison(tree, *args, **kwargs):
        total, *measured = weighted_loss(tree, *args, **kwargs)
        roots = sum(jnp.sqrt(jnp.abs(leaf.ravel()[0])) for leaf in jax.tree.leaves(tree))
        noise = jnp.sum(args[2].logp_BT)  # NaN there reaches the loss and no gradient
        return total + roots - jax.lax.stop_gradient(roots) + noise, *measured

    def index(tree, batch=BATCH):
        state = steps.init(jax.tree.map(jnp.array, tree), jax.random.key(KEY), cfg=cfg, tx=TX)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objective, "weighted_loss_and_load", poison)
            return steps.distill_step(state, teacher, batch, cfg=cfg, tx=TX)[1]["nonfinite"].value()

    return index


def test_the_first_tensor_that_broke_is_named(poisoned):
    names = steps.leaf_names(STUDENT_0)
    assert names[0] == "embed"
    assert len(names) == len(set(names)) == len(jax.tree.leaves(STUDENT_0))
    assert poisoned(STUDENT_0) == -1
    for broken in (["layers/down"], ["layers/q_norm", "layers/up"], ["final_norm"]):
        tree = jax.tree.map(np.copy, STUDENT_0)
        for name in broken:
            leaf = functools.reduce(lambda node, part: node[part], name.split("/"), tree)
            leaf.flat[0] = 0.0
        assert names[int(poisoned(tree))] == broken[0]


def test_a_broken_loss_is_told_from_broken_gradients(poisoned):
    assert poisoned(STUDENT_0, BATCH.replace(logp_BT=np.full((B, T), np.nan, np.float32))) == -2
    tree = jax.tree.map(np.copy, STUDENT_0)
    tree["layers"]["gate"][0, 0, 0] = np.nan  # all gradients break with it
    assert poisoned(tree) == 0


def test_updates_lost_to_rounding_are_counted():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), STUDENT_0)
    shares = {}
    for lr in (1e-7, 0.5):
        tx = optim.make(optim.OptimSpec("signsgd", lr=lr, min_lr=lr, warmup=0.0, clip=0.0))
        state = steps.init(jax.tree.map(jnp.copy, half), jax.random.key(KEY), cfg=CFG, tx=tx)
        assert "rounded_share" not in run(fresh(), TEACHER_0, BATCH, CFG, num_steps=1)[1][0]
        state, measured = steps.distill_step(state, TEACHER_0, BATCH, cfg=CFG, tx=tx)
        shares[lr] = measured["rounded_share"].value()
    assert shares[1e-7] > 0.99
    assert shares[0.5] < 0.01
