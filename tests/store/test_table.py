"""The rock state of a checkpoint as CSV: every number, and what is refused."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from opd_jax import config, mesh, rock
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf
from opd_jax.store import checkpoint, table
from opd_jax.store import workdir as workdirs

tiny = tiny_run.tiny
V = tiny_run.MODEL.vocab_size
CFG = rock.RockConfig("static", ids=(3, 9), decay=0.9, fast_decay=0.5)


def made_state():
    """Two updates over 20 of the ids, 3 and 9 being members (9 unseen)."""
    rng = np.random.default_rng(0)
    state = rock.init(V, cfg=CFG)
    for _ in range(2):
        ids = rng.choice([i for i in range(20) if i != 9], (4, 16)).astype(np.int32)
        kl = rng.gamma(1.0, 1.0, ids.shape).astype(np.float32)
        state = rock.update(state, ids, kl, np.ones(ids.shape, bool), cfg=CFG)
    return state


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    """A run's folder with checkpoints at steps 1 (nothing seen) and 2, as the loop leaves them."""
    folder = tmp_path_factory.mktemp("table") / "run"
    described = config.describe(tiny_run.resolved(tiny))
    workdirs.write_run(folder, workdirs.describe(described, seed=0))
    with checkpoint.open(folder) as saves:
        for step, state in ((1, rock.init(V, cfg=CFG)), (2, made_state())):
            saves.save(step, {"params": {"w": jnp.ones(3)}, "rock": state}, {})
    return folder


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_number_follows_from_the_state(workdir, tmp_path):
    out = tmp_path / "new" / "types.csv"
    assert table.table(str(workdir), str(out)) == 2
    rows = rows_of(out)
    assert tuple(rows[0]) == table.COLUMNS
    assert len(rows) == V
    assert [int(row["rank"]) for row in rows] == list(range(1, V + 1))
    host = mesh.to_host(made_state())
    tokenizer = tokenizers.load(config.path_of("embedded:student"))
    total_count, total_kl = host.count_V.sum(dtype=float), host.kl_sum_V.sum(dtype=float)
    previous = (np.inf, -1)
    for row in rows:
        i = int(row["token_id"])
        assert row["token"] == tokenizers.token_text(tokenizer, i)
        assert row["member"] == ("1" if i in (3, 9) else "0")
        place = (float(host.kl_sum_V[i]), i)
        assert place[0] < previous[0] or place[1] > previous[1]  # falling; ties by id
        previous = place
        count, kl_sum, kl_sq = (float(x[i]) for x in (host.count_V, host.kl_sum_V, host.kl_sq_V))
        assert float(row["share"]) == pytest.approx(kl_sum / total_kl, rel=1e-6)
        assert float(row["token_share"]) == pytest.approx(count / total_count, rel=1e-6)
        assert (float(row["count"]), float(row["kl_sum"])) == pytest.approx((count, kl_sum))
        if not count:
            assert row["kl_mean"] == row["kl_std"] == row["persistence"] == ""
            continue
        mean = kl_sum / count
        fast = float(host.fast_kl_sum_V[i]) / float(host.fast_count_V[i])
        assert float(row["kl_mean"]) == pytest.approx(mean, rel=1e-6)
        assert float(row["kl_std"]) == pytest.approx(
            max(kl_sq / count - mean**2, 0) ** 0.5, rel=1e-4, abs=1e-6
        )
        assert float(row["persistence"]) == pytest.approx(fast / mean, rel=1e-5)
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, rel=1e-5)


def test_a_step_can_be_named_and_may_have_seen_nothing(workdir, tmp_path):
    out = tmp_path / "types.csv"
    assert table.table(str(workdir), str(out), step=1) == 1
    rows = rows_of(out)
    assert [int(row["token_id"]) for row in rows] == list(range(V))
    assert {row["share"] for row in rows} == {""}


def test_nothing_but_the_rock_state_is_read(workdir, tmp_path, monkeypatch):
    asked = []

    def restore(self, template, step=None, *, partial=False, real=checkpoint.Checkpoints.restore):
        asked.append((sorted(template), partial))
        return real(self, template, step, partial=partial)

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", restore)
    monkeypatch.setattr(hf, "load", None)
    table.table(str(workdir), str(tmp_path / "types.csv"))
    assert asked == [(["rock"], True)]


def test_a_file_that_is_there_is_left_alone(workdir, tmp_path):
    out = tmp_path / "types.csv"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"types\.csv exists: .*another --out"):
        table.table(str(workdir), str(out))
    assert out.read_text() == "mine"


def test_a_folder_that_is_no_run_and_a_step_that_is_none_are_refused(workdir, tmp_path):
    out = tmp_path / "types.csv"
    with pytest.raises(workdirs.WorkdirError, match=r"has no run\.json: expected the --workdir"):
        table.table(str(tmp_path), str(out))
    with pytest.raises(checkpoint.CheckpointError, match=r"found steps \[1, 2\]; name another"):
        table.table(str(workdir), str(out), step=7)
    assert not out.exists()


def test_a_kill_while_writing_leaves_no_table(workdir, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(workdirs.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        table.table(str(workdir), str(tmp_path / "types.csv"))
    assert not (tmp_path / "types.csv").exists()


def test_the_table_of_a_real_run(tiny, tmp_path, monkeypatch):
    tiny_run.use_one_device(monkeypatch)
    assert tiny_run.train(tiny, tmp_path / "run", rock__mode="ema", rock__top_k=5) == 0
    table.table(str(tmp_path / "run"), str(tmp_path / "types.csv"))
    rows = rows_of(tmp_path / "types.csv")
    line = tiny_run.read_lines(tmp_path / "run" / "rocks.jsonl")[-1]
    for row, top in zip(rows, line["top"], strict=False):
        assert int(row["token_id"]) == top["token_id"]
        assert float(row["share"]) == pytest.approx(top["share"], rel=1e-5)
        assert bool(int(row["member"])) == top["member"]
    assert len(line["top"]) > 5
    assert sum(int(row["member"]) for row in rows) == line["members"]
