"""Weights by position, against loops in numpy; their budgets, their controls, and a run."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import PartitionSpec as P

from opd_jax import mesh, position
from opd_jax.position import MODES, PositionSpec
from opd_jax.pytrees import TokenKL

tiny, one_device = tiny_run.tiny, tiny_run.one_device
ROWS, WIDTH = 8, 12


def batch(seed=0):
    """Answers of different lengths behind prompts of different lengths, and their measurements."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((ROWS, WIDTH), bool)
    for row in mask:
        start = rng.integers(1, 4)
        row[start : start + rng.integers(1, WIDTH - 4)] = True
    numbers = rng.exponential(size=(6, ROWS, WIDTH)).astype(np.float32)
    numbers[4:] *= -1
    gated = mask & (rng.uniform(size=mask.shape) < 0.1)
    further = {
        "rank_BT": rng.integers(0, 12, mask.shape).astype(np.float32) * mask,
        "overlap_BT": rng.uniform(size=mask.shape).astype(np.float32) * mask,
    }
    return mask, gated, TokenKL(*(x * mask for x in numbers), **further)


def weights(spec, mask, gated, tokens, sizes=None, seed=3):
    key = jax.random.key(seed)
    if sizes is None:
        tokens = jax.tree.map(jnp.asarray, tokens)
        return np.asarray(position.weights(spec, jnp.asarray(mask), gated, key, tokens))
    with jax.set_mesh(mesh.make(**sizes)):
        put = lambda x: jax.device_put(x, P(mesh.BATCH, None))  # noqa: E731
        run = jax.jit(lambda *a: position.weights(spec, *a))
        return np.asarray(run(put(mask), put(gated), key, jax.tree.map(put, tokens)))


def by_hand(spec, mask, gated, tokens):
    """The modes that draw nothing, position by position."""
    out = np.ones(mask.shape)
    where = np.argwhere(mask)
    scores = {}
    scored = np.asarray(mask)
    for name, x in (("h", tokens.entropy_BT), ("d", tokens.reverse_BT)):
        x = np.asarray(x)
        scores[name] = (x - x[scored].min()) / (x[scored].max() - x[scored].min())

    def clipped(x):
        low, high = np.quantile(np.asarray(x)[scored], [0.05, 0.95])
        return np.clip((x - low) / (high - low), 0, 1)

    score = {
        "ta": clipped(tokens.reverse_BT) * clipped(tokens.overlap_BT),
        "entropy": tokens.entropy_BT,
        "lowest_logp": -tokens.logp_BT,
        "tip": scores["h"] + scores["d"] - scores["h"] * scores["d"],
    }.get(spec.mode)
    if spec.mode == "fire":
        means = [tokens.teacher_logp_BT[b][mask[b]].mean() for b in range(ROWS)]
        dropped = np.argsort(means)[: ROWS // 5]
        teacher, student = tokens.teacher_entropy_BT, tokens.entropy_BT
        raw = (1 - teacher / teacher[mask].max()) * student / student[mask].max()
        raw[dropped] = 0
        return np.where(mask, raw / raw[mask].mean(), 1.0)
    kept = set()
    if score is not None:
        order = sorted(map(tuple, where), key=lambda i: -score[i])
        kept = set(order[: round(spec.keep * len(order))])
    for b, t in where:
        places = list(np.flatnonzero(mask[b]))
        if spec.mode == "first":
            is_kept = places.index(t) < spec.window
        elif spec.mode == "last":
            is_kept = len(places) - places.index(t) <= spec.window
        elif spec.mode == "rock_window":
            is_kept = not any(gated[b, u] and abs(u - t) <= spec.window for u in range(WIDTH))
        elif spec.mode == "iw":
            a = np.abs(tokens.teacher_logp_BT[b] - tokens.logp_BT[b])
            out[b, t] = 1 + spec.boost * (1 - a[places[0] : t].sum() / a[places].sum())
            continue
        elif spec.mode == "selectkd":
            is_kept = tokens.rank_BT[b, t] < spec.top
        else:
            is_kept = (b, t) in kept
        out[b, t] = 1.0 if is_kept else spec.floor
    return out


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("mode", sorted({*MODES} - {"off", "random", "random_window"}))
def test_weights_are_those_of_the_formula(mode, floor):
    spec = PositionSpec(mode, keep=0.3, window=2, floor=floor)
    for seed in range(4):
        given = batch(seed)
        np.testing.assert_allclose(weights(spec, *given), by_hand(spec, *given), rtol=1e-5)


def test_random_positions_are_a_share_and_random_windows_are_whole():
    mask, gated, tokens = batch()
    kept, starts = [], []
    for i in range(300):
        kept.append(weights(PositionSpec("random", keep=0.3), mask, gated, tokens, seed=i)[mask])
        window = weights(PositionSpec("random_window", window=3), mask, gated, tokens, seed=i)
        for row in range(ROWS):
            inside = np.flatnonzero((window[row] == 1) & mask[row])
            assert len(inside) == min(3, mask[row].sum())
            assert np.all(np.diff(inside) == 1)
        row = int(np.argmax(mask.sum(1)))
        starts.append(np.flatnonzero((window[row] == 1) & mask[row])[0])
    assert np.mean(kept) == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / np.size(kept)))
    room = mask[row].sum() - 3 + 1
    counts = np.bincount(np.array(starts) - np.flatnonzero(mask[row])[0], minlength=room)
    assert len(counts) == room
    assert np.ptp(counts) < 6 * np.sqrt(300 / room)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "off"])
def test_the_control_deals_the_same_weights_out_at_random(mode):
    mask, gated, tokens = batch()
    spec = PositionSpec(mode, keep=0.4, window=2)
    plain = weights(spec, mask, gated, tokens)
    control_spec = PositionSpec(mode, keep=0.4, window=2, shuffled=True)
    dealt = [weights(control_spec, mask, gated, tokens, seed=i) for i in range(40)]
    if mode not in ("random", "random_window"):  # those draw anew with another key
        for control in dealt:
            np.testing.assert_allclose(np.sort(control[mask]), np.sort(plain[mask]), rtol=1e-6)
    assert len({control.tobytes() for control in dealt}) > 30
    assert all(np.all(control[~mask] == 1) for control in dealt)
    means = np.mean(dealt, axis=0)[mask]  # no position is favoured
    assert np.ptp(means) < 6.5 * np.std(plain[mask]) / np.sqrt(40) + 1e-6


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("mode", [m for m in MODES if m != "off"])
def test_the_mesh_changes_no_weight(mode, shuffled):
    spec = PositionSpec(mode, keep=0.4, window=2, shuffled=shuffled)
    given = batch()
    sizes = {"data": 2, "fsdp": 2, "model": 2}
    np.testing.assert_allclose(weights(spec, *given, sizes), weights(spec, *given), rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        *({"mode": "frist"}, {"keep": 0.0}, {"keep": 1.1}, {"window": 0}, {"floor": 2.0}),
        *({"boost": -1.0}, {"shuffled": True}),
    ],
    ids=str,
)
def test_bad_settings_are_named(fields):
    with pytest.raises(ValueError, match=f"--config.position.{next(iter(fields))}"):
        PositionSpec(**fields)


@pytest.mark.usefixtures("one_device")
class TestARun:
    def run(self, tiny, workdir, **keys):
        keys = {f"position__{name}": value for name, value in keys.items()}
        assert tiny_run.train(tiny, workdir, **keys) == 0
        return tiny_run.curve(workdir)

    def test_all_kept_is_plain_distillation(self, tiny, tmp_path):
        """The second sweep over everything trains as the only one did."""
        plain = self.run(tiny, tmp_path / "plain")
        kept = self.run(tiny, tmp_path / "kept", mode="entropy", keep=1.0)
        for a, b in zip(plain, kept, strict=True):
            for name in ("loss", "kl_nats", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-5)
        assert [line["kept_share"] for line in kept] == [1.0] * 4
        assert [line["head_products"] for line in kept] == [1.5] * 4

    @pytest.mark.parametrize("mode", ["tip", "first", "random"])
    def test_a_budget_is_kept_and_told(self, tiny, tmp_path, mode):
        for pieces in (1, 2):
            keys = {"position__mode": mode, "position__keep": 0.25, "position__window": 2}
            workdir = tmp_path / str(pieces)
            assert tiny_run.train(tiny, workdir, **keys, train__microbatches=pieces) == 0
        one, two = (tiny_run.curve(tmp_path / name) for name in "12")
        for a, b in zip(one, two, strict=True):
            assert a["kept_share"] == b["kept_share"] < 0.6
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["kl_nats"] == pytest.approx(b["kl_nats"], rel=1e-4)
        line = one[0]
        if mode == "tip":
            assert line["kept_share"] == pytest.approx(0.25, abs=0.02)
            assert line["head_products"] == pytest.approx(0.5 + line["kept_share"])
            assert line["projected_share"] == 1.0  # all are measured, so the KL is exact
        else:
            assert line["head_products"] == pytest.approx(line["projected_share"])
            assert line["kept_share"] <= line["projected_share"] < 1

    def test_resumed_it_goes_on_bit_for_bit(self, tiny, tmp_path):
        keys = {"position__mode": "tip", "position__shuffled": True, "checkpoint__every": 2}
        whole, halves = tmp_path / "whole", tmp_path / "halves"
        assert tiny_run.train(tiny, whole, **keys) == 0
        assert tiny_run.train(tiny, halves, **keys) == 0
        shutil.rmtree(halves / "checkpoints" / "4")
        (halves / "checkpoints" / "lock").write_text("")
        (halves / "summary.json").unlink()
        assert tiny_run.train(tiny, halves, **keys) == 0
        assert tiny_run.curve(halves) == tiny_run.curve(whole)
