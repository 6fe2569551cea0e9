"""The Rock Token state against a plain loop; who enters, who stays, and what a gate weighs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh, rock
from opd_jax.pytrees import RockState
from opd_jax.rock import RockConfig

B, T, V = 8, 6, 12

SUM_NAMES = ("count", "kl_sum", "kl_sq", "fast_count", "fast_kl_sum")

update = jax.jit(rock.update, static_argnames="cfg")
refresh = jax.jit(rock.refresh, static_argnames="cfg")


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, V, (B, T)).astype(np.int32),
        rng.gamma(1.0, 1.0, (B, T)).astype(np.float32),
        (rng.uniform(size=(B, T)) < 0.7) * rng.choice([1.0, 4.0], (B, T)).astype(np.float32),
    )


def state(count, kl_sum=None, *, fast=1.0, member=(), step=0):
    """Build a state whose types have the given counts, KL sums and persistence ``fast``."""
    count = jnp.asarray(count, jnp.float32)
    kl_sum = count if kl_sum is None else jnp.asarray(kl_sum, jnp.float32)
    fast_sum = kl_sum * jnp.asarray(fast, jnp.float32)
    member_V = jnp.zeros(count.shape, bool)
    if member:
        member_V = member_V.at[jnp.asarray(member)].set(True)
    return RockState(count, kl_sum, kl_sum, count, fast_sum, member_V, jnp.int32(step))


def members(rock_state):
    return np.flatnonzero(np.asarray(rock_state.member_V)).tolist()


def test_update_is_the_plain_loop_over_predicted_ids():
    cfg = RockConfig(decay=0.9, fast_decay=0.5)
    expected = {name: np.zeros(V) for name in SUM_NAMES}
    got = rock.init(V)
    for seed in range(3):
        ids, kl, importance = batch(seed)
        for name in expected:
            expected[name] *= 0.5 if name.startswith("fast") else 0.9
        for i, x, w in zip(ids.ravel(), kl.ravel(), importance.ravel(), strict=True):
            expected["count"][i] += w
            expected["fast_count"][i] += w
            expected["kl_sum"][i] += w * x
            expected["fast_kl_sum"][i] += w * x
            expected["kl_sq"][i] += w * x * x
        got = update(got, ids, kl, importance, cfg=cfg)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(got, f"{name}_V"), value, rtol=1e-5, err_msg=name)
    assert int(got.step) == 3
    mean = expected["kl_sum"] / expected["count"]
    fast = expected["fast_kl_sum"] / expected["fast_count"]
    np.testing.assert_allclose(rock.persistence(got), fast / mean, rtol=1e-5)
    np.testing.assert_allclose(rock.scores(got, "kl_mean"), mean, rtol=1e-5)
    np.testing.assert_array_equal(rock.scores(got, "kl_sum"), got.kl_sum_V)
    np.testing.assert_array_equal(rock.scores(got, "count"), got.count_V)


def test_masked_positions_add_nothing_whatever_their_id():
    ids, kl, importance = batch()
    off = importance == 0
    cfg = RockConfig()
    plain = update(rock.init(V), ids, kl, importance, cfg=cfg)
    for id_ in (0, V, V + 7):
        odd = update(rock.init(V), np.where(off, id_, ids), kl, importance, cfg=cfg)
        jax.tree.map(np.testing.assert_array_equal, plain, odd)


def test_without_decay_splits_of_the_batch_do_not_matter():
    cfg = RockConfig(decay=1.0, fast_decay=1.0)
    ids, kl, importance = batch()
    whole = update(rock.init(V), ids, kl, importance, cfg=cfg)
    parts = rock.init(V)
    for rows in (slice(0, 2), slice(2, 8)):
        parts = update(parts, ids[rows], kl[rows], importance[rows], cfg=cfg)
    for name in SUM_NAMES:
        got, expected = (getattr(x, f"{name}_V") for x in (parts, whole))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_counting_goes_on_where_single_ones_are_lost():
    full = state(np.full(V, 2.0**24))
    assert np.float32(2**24) + np.float32(1) == 2**24  # why the batch is summed first
    ids = np.full((B, T), 3, np.int32)
    ones = np.ones((B, T), np.float32)
    got = update(full, ids, ones, ones, cfg=RockConfig(decay=1.0, fast_decay=1.0))
    assert float(got.count_V[3]) == 2**24 + B * T
    assert float(got.count_V[2]) == 2**24


@pytest.mark.parametrize("columns", [1, 2, 3, 8, 12])
def test_a_tpus_pieces_add_what_one_sum_adds_bit_for_bit(columns, monkeypatch):
    """Pieces of 16 positions, with ids that come often in each and one that there is no sum for."""
    rng = np.random.default_rng(columns)
    ids_BT = np.minimum(rng.geometric(0.3, (8, columns)) - 1, V).astype(np.int32)
    kl_BT = rng.gamma(0.3, size=ids_BT.shape).astype(np.float32) * 10.0 ** rng.integers(-3, 4)
    mask_BT = rng.random(ids_BT.shape) < 0.8
    cfg = RockConfig()

    def updated():
        def update(*given):
            return rock.update(rock.init(V, cfg=cfg), *given, cfg=cfg)

        return jax.tree.leaves(jax.jit(update)(ids_BT, kl_BT, mask_BT))

    whole = updated()
    monkeypatch.setattr(mesh, "platform", lambda: "tpu")
    monkeypatch.setattr(rock, "_PIECE", 16)
    for found, wanted in zip(updated(), whole, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_measuring_alone_never_changes_the_members():
    ids, kl, importance = batch()
    before = state(np.ones(V), member=(1, 2))
    cfg = RockConfig("ema", top_k=3)
    after = update(before, ids, 1e3 * kl, importance, cfg=cfg)
    assert members(after) == [1, 2]
    np.testing.assert_array_equal(
        rock.weights(after, ids, cfg=cfg), rock.weights(before, ids, cfg=cfg)
    )


SUMS = [5.0, 9.0, 1.0, 7.0, 0.0, 9.0]
COUNTS = [9.0, 1.0, 8.0, 2.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (dict(top_k=2), [1, 5]),
        (dict(top_k=1), [1]),  # 1 and 5 tie: the smaller id
        (dict(top_k=3), [1, 3, 5]),
        (dict(top_k=99), [0, 1, 2, 3, 5]),  # an unseen type is never a member
        (dict(top_k=2, skip_top=3), [1, 3]),  # 0, 2 and 5 are the most frequent
        (dict(top_k=3, min_count=2.0), [0, 3, 5]),
        (dict(top_k=99, min_count=2.5), [0, 2, 5]),
        (dict(top_k=2, score="count"), [0, 2]),
        (dict(top_k=2, score="kl_mean"), [1, 3]),
        (dict(top_k=2, min_count=0.0, score="count"), [0, 2]),
    ],
    ids=str,
)
def test_refresh_picks_the_highest_eligible(kwargs, expected):
    assert members(rock.refresh(state(COUNTS, SUMS), cfg=RockConfig("ema", **kwargs))) == expected


def test_ties_go_to_the_smaller_id():
    cfg = RockConfig("ema", top_k=3, skip_top=2)
    # All counts tie too: the first two ids are the ones skipped.
    assert members(refresh(state(np.ones(V)), cfg=cfg)) == [2, 3, 4]


def test_only_types_that_stagnate_are_members():
    cfg = RockConfig("ema", top_k=2, persist=0.8)
    fast = [1.0, 0.5, 1.0, 0.9, 1.0, 0.7]  # 1 and 5 lead, and still learn
    assert members(rock.refresh(state(COUNTS, SUMS, fast=fast), cfg=cfg)) == [0, 3]
    learning = state(COUNTS, SUMS, fast=fast, member=(1, 3))
    assert members(rock.refresh(learning, cfg=cfg)) == [0, 3]  # a member that learns leaves


def test_a_member_leaves_only_past_the_exit_rank():
    cfg = RockConfig("ema", top_k=2, exit_factor=2.0)
    sums = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    ranked = functools.partial(state, np.ones(6), sums)
    assert members(rock.refresh(ranked(), cfg=cfg)) == [0, 1]
    assert members(rock.refresh(ranked(member=(3,)), cfg=cfg)) == [0, 1, 3]  # rank 3 < 2 x 2
    assert members(rock.refresh(ranked(member=(4, 5)), cfg=cfg)) == [0, 1]  # ranks 4 and 5
    strict = RockConfig("ema", top_k=2, exit_factor=1.0)
    assert members(rock.refresh(ranked(member=(2, 3)), cfg=strict)) == [0, 1]


@pytest.mark.parametrize("mode", ["off", "static"])
def test_refresh_leaves_fixed_members_alone(mode):
    cfg = RockConfig(mode, ids=(4,))
    assert members(rock.refresh(state(COUNTS, SUMS, member=(4,)), cfg=cfg)) == [4]


def test_static_ids_gate_from_the_beginning():
    cfg = RockConfig("static", ids=(2, 5), inside=0.25)
    start = rock.init(6, cfg=cfg)
    assert members(start) == [2, 5]
    ids = np.array([[0, 2, 5, 2]], np.int32)
    np.testing.assert_array_equal(rock.weights(start, ids, cfg=cfg), [[1, 0.25, 0.25, 0.25]])
    np.testing.assert_array_equal(rock.gated(start, ids, cfg=cfg), [[False, True, True, True]])


def test_off_measures_and_never_gates():
    cfg = RockConfig("off")
    full = state(np.ones(V), member=tuple(range(V)))
    ids, _, importance = batch()
    assert np.all(np.asarray(rock.weights(full, ids, cfg=cfg)) == 1)
    assert not np.any(np.asarray(rock.gated(full, ids, cfg=cfg)))
    mask = importance > 0
    measured = rock.importance(jnp.ones((B, T)) * mask, mask, jax.random.key(0), cfg=cfg)
    np.testing.assert_array_equal(measured, mask)


def test_nothing_gates_before_start():
    cfg = RockConfig("ema", start=3)
    ids = np.arange(V, dtype=np.int32)[None]
    for step, expected in ((0, 1.0), (2, 1.0), (3, 0.0), (9, 0.0)):
        full = state(np.ones(V), member=tuple(range(V)), step=step)
        assert np.all(np.asarray(rock.weights(full, ids, cfg=cfg)) == expected), step
        assert np.all(np.asarray(rock.gated(full, ids, cfg=cfg)))  # members are reported all along


def weight_at(step, cfg, **kwargs):
    full = state(np.ones(V), member=(1,), step=step, **kwargs)
    return np.asarray(rock.weights(full, np.array([[0, 1]], np.int32), cfg=cfg))[0].tolist()


def test_the_gate_closes_over_the_ramp_and_opens_at_the_end():
    cfg = RockConfig("static", ids=(1,), inside=0.2, start=2, ramp=4, until=8)
    expected = [1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 1.0, 1.0]
    found = [weight_at(step, cfg) for step in range(10)]
    np.testing.assert_allclose(found, [[1.0, x] for x in expected], rtol=1e-6)
    assert found[6][1] == np.float32(0.2)


def test_nothing_is_skipped_before_the_end_of_the_ramp():
    cfg = RockConfig("ema", ramp=1000)
    assert all(weight_at(step, cfg)[1] > 0 for step in (0, 1, 500, 999))
    assert weight_at(1000, cfg)[1] == 0.0


def test_the_step_of_the_ramp_is_data_and_not_compiled():
    cfg = RockConfig("ema", inside=0.5, start=1, ramp=2, until=4)
    traces = []

    @jax.jit
    def at(full):
        traces.append(1)
        return rock.weights(full, np.array([[1]], np.int32), cfg=cfg)

    found = [float(at(state(np.ones(V), member=(1,), step=step))[0, 0]) for step in range(5)]
    assert found == [1.0, 1.0, 0.75, 0.5, 1.0]
    assert len(traces) == 1


def test_adaptive_ramps_to_what_it_weighs():
    cfg = RockConfig("adaptive", inside=0.2, ramp=2)
    fast = np.full(V, 0.5)  # weight 0.2 + 0.8 x 0.5 in the end
    found = [weight_at(step, cfg, fast=fast)[1] for step in (0, 1, 2)]
    np.testing.assert_allclose(found, [1.0, 0.8, 0.6], rtol=1e-6)


def test_members_are_refreshed_after_the_gate_has_opened():
    cfg = RockConfig("ema", top_k=2, until=5)
    after = rock.refresh(state(COUNTS, SUMS, member=(0,), step=9), cfg=cfg)
    assert members(after) == [1, 5]
    assert np.all(np.asarray(rock.weights(after, np.array([[1, 5]], np.int32), cfg=cfg)) == 1)


def test_random_gates_its_share_of_the_positions_whatever_their_type():
    cfg = RockConfig("random", share=0.3, inside=0.25)
    ids = np.tile(np.arange(V, dtype=np.int32), (V, 1))
    full = state(np.ones(V), member=(1, 2))
    draw = jax.jit(jax.vmap(lambda key: rock.gated(full, ids, cfg=cfg, key=key)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 500)))
    for axes in (None, (0, 1), (0, 2)):  # over everything, by type, by row
        share = drawn.mean(axes)
        num = drawn.size / np.size(share)
        assert np.all(np.abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / num))
    assert not np.array_equal(drawn[0], drawn[1])
    one = drawn[0]
    found = np.asarray(rock.weights(full, ids, cfg=cfg, gated_BT=one))
    np.testing.assert_array_equal(found, np.where(one, 0.25, 1.0))
    assert members(rock.refresh(full, cfg=cfg)) == [1, 2]


def test_random_without_a_key_is_an_error():
    with pytest.raises(ValueError, match=r"'random' and no key: expected a key; pass the step's"):
        rock.weights(rock.init(V), np.zeros((1, 1), np.int32), cfg=RockConfig("random", share=0.5))


def test_a_forgotten_type_does_not_count_as_learning():
    cfg = RockConfig(decay=0.99, fast_decay=0.5)
    ids, ones = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    got = update(rock.init(V), ids, 2 * ones, ones, cfg=cfg)
    for _ in range(200):  # 0.5 ** 200 is 0 in f32
        got = update(got, ids + 1, ones, ones, cfg=cfg)
    assert float(got.fast_count_V[0]) == 0.0 < float(got.count_V[0])
    np.testing.assert_allclose(rock.persistence(got)[:2], 1.0, rtol=1e-5)


def test_leaders_are_the_head_of_the_ranking():
    full = state(COUNTS, SUMS, member=(5, 0))
    found = jax.jit(rock.leaders, static_argnames="limit")(full, limit=4)
    assert found["ids_K"].tolist() == [1, 5, 3, 0]  # 1 and 5 tie: the smaller id
    assert found["kl_sum_K"].tolist() == [9.0, 9.0, 7.0, 5.0]
    assert found["count_K"].tolist() == [1.0, 4.0, 2.0, 9.0]
    assert found["member_K"].tolist() == [False, True, False, True]
    assert (float(found["kl_sum"]), float(found["count"])) == (31.0, 24.0)
    assert rock.leaders(full, 99)["ids_K"].shape == (6,)
    assert rock.leaders(full, 0)["ids_K"].shape == (0,)


def test_adaptive_members_keep_what_they_still_learn():
    cfg = RockConfig("adaptive", inside=0.2)
    fast = [0.25, 0.25, 1.0, 1.5, 0.0, 0.5]
    part = state([1, 1, 1, 1, 0, 1], fast=fast, member=(1, 2, 3, 4, 5))
    ids = np.arange(6, dtype=np.int32)[None]
    # Not a member: 1. Persistence 0.25 -> 0.2 + 0.8 x 0.75; >= 1 or unseen -> 0.2; 0.5 -> 0.6.
    np.testing.assert_allclose(
        rock.weights(part, ids, cfg=cfg), [[1.0, 0.8, 0.2, 0.2, 0.2, 0.6]], rtol=1e-6
    )


def test_probed_sums_are_unbiased():
    cfg = RockConfig("ema", probe=0.25)
    ids, kl, importance = batch()
    mask = jnp.asarray(importance > 0)
    weight = jnp.asarray((ids % 2).astype(np.float32)) * mask  # even ids are gated
    keys = jax.random.split(jax.random.key(5), 4000)
    draws = jax.jit(jax.vmap(lambda key: rock.importance(weight, mask, key, cfg=cfg)))(keys)
    draws = np.asarray(draws)
    on, off = np.asarray(weight) > 0, ~np.asarray(mask)
    assert np.all(draws[:, on] == 1)
    assert np.all(draws[:, off] == 0)
    assert set(np.unique(draws[:, ~on & ~off])) == {0.0, 4.0}
    sums = (draws * kl).sum((1, 2))
    full = (kl * np.asarray(mask)).sum()
    error = sums.std() / np.sqrt(len(sums))
    assert abs(sums.mean() - full) < 4 * error
    assert error < 0.01 * full  # so that the test above can fail


def test_the_state_of_probed_steps_is_unbiased():
    """Every sum of every type over two steps, against steps that measured all positions."""
    cfg = RockConfig("ema", probe=0.25, decay=0.9, fast_decay=0.5)
    batches = [batch(seed) for seed in (0, 1)]

    def run(measured):
        got = rock.init(V)
        for (ids, kl, _), importance in zip(batches, measured, strict=True):
            got = rock.update(got, ids, kl, importance, cfg=cfg)
        return {name: getattr(got, f"{name}_V") for name in SUM_NAMES}

    def drawn(key):
        measured = []
        for number, (ids, _, importance) in enumerate(batches):
            mask = jnp.asarray(importance > 0)
            weight = jnp.asarray((ids % 2).astype(np.float32)) * mask  # even ids are gated
            own = jax.random.fold_in(key, number)
            measured.append(rock.importance(weight, mask, own, cfg=cfg))
        return run(measured)

    num = 4000
    got = jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(11), num))
    full = run([jnp.asarray(importance > 0) for _, _, importance in batches])
    for name in SUM_NAMES:
        found, expected = np.asarray(got[name], np.float64), np.asarray(full[name])
        error = found.std(0) / np.sqrt(num)
        assert np.all(error[::2] > 0), name  # gated types vary,
        np.testing.assert_allclose(found[:, 1::2], np.tile(expected[1::2], (num, 1)), rtol=1e-5)
        assert np.all(np.abs(found.mean(0) - expected)[::2] < 4 * error[::2]), name
        assert np.all(error[::2] < 0.05 * expected[::2]), name  # so that a bias would show


@pytest.mark.parametrize(
    ("mode", "inside"), [("ema", 0.5), ("static", 1.0), ("adaptive", 0.5), ("random", 0.5)]
)
def test_weighted_positions_need_no_probe(mode, inside):
    cfg = RockConfig(mode, inside=inside, ids=(1,), share=0.5)
    mask = jnp.ones((B, T), bool).at[0, 0].set(False)
    got = rock.importance(inside * mask, mask, jax.random.key(0), cfg=cfg)
    np.testing.assert_array_equal(got, mask)


def test_eight_devices_find_what_one_finds():
    cfg = RockConfig("adaptive", top_k=4, decay=0.9, fast_decay=0.5, probe=0.5)
    ids, kl, importance = batch()
    ids2, kl2, importance2 = batch(1)

    @jax.jit
    def run(ids, kl, importance, ids2, kl2, importance2):
        got = rock.update(rock.init(V), ids, kl, importance, cfg=cfg)
        got = rock.refresh(rock.update(got, ids2, kl2, importance2, cfg=cfg), cfg=cfg)
        weight = rock.weights(got, ids, cfg=cfg)
        zeroed = jnp.where(rock.gated(got, ids, cfg=cfg), 0.0, weight) * (importance > 0)
        probed = rock.importance(zeroed, importance > 0, jax.random.key(7), cfg=cfg)
        return got, weight, probed

    args = (ids, kl, importance, ids2, kl2, importance2)
    alone = run(*args)
    devices = mesh.make(2, 2, 2)
    with jax.set_mesh(devices):
        spread = run(*mesh.to_global(args, devices))
    assert len(members(alone[0])) == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, np.asarray(b), rtol=1e-5), alone, spread
    )


@pytest.mark.parametrize(
    "bad",
    [
        dict(mode="frozen"),
        dict(score="kl"),
        dict(top_k=0),
        dict(skip_top=-1),
        dict(decay=1.1),
        dict(decay=0.0),
        dict(fast_decay=0.0),
        dict(fast_decay=0.995),
        dict(inside=1.5),
        dict(inside=-0.1),
        dict(every=0),
        dict(exit_factor=0.5),
        dict(probe=0.0),
        dict(probe=1.5),
        dict(key="previous"),
        dict(share=1.5),
        dict(share=-0.1),
        dict(start=-1),
        dict(ramp=-1),
        dict(until=-1),
    ],
    ids=str,
)
def test_a_bad_setting_names_its_flag(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"--config.rock.{name}$") as error:
        RockConfig(**bad)
    assert repr(value) in str(error.value)


def test_settings_that_need_each_other_are_checked():
    with pytest.raises(ValueError, match=r"share is 0\.0: expected above 0.*--config\.rock\.share"):
        RockConfig("random")
    with pytest.raises(ValueError, match=r"until is 5: .*after rock\.start \(5\)"):
        RockConfig(start=5, until=5)
    assert RockConfig(start=5, until=6).until == 6


def test_static_needs_ids_of_the_vocabulary():
    with pytest.raises(ValueError, match=r"--config\.rock\.ids"):
        RockConfig("static")
    for outside in (V, -1):
        cfg = RockConfig("static", ids=(0, outside))
        with pytest.raises(ValueError, match=rf"\[{outside}\].*from 0 to {V - 1}.*rock\.ids"):
            rock.init(V, cfg=cfg)


def test_an_unknown_score_is_an_error():
    with pytest.raises(ValueError, match=r"'loss'.*expected one of.*--config\.rock\.score"):
        rock.scores(rock.init(V), "loss")
