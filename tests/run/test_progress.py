"""Pooling, files that survive a kill, writers behind extras, timer, progress line."""

import json
import math
import os
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import mesh, pytrees
from opd_jax.pytrees import Mean
from opd_jax.run import progress, writers


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_reduce_divides_once():
    means = {"loss": Mean.of(2.0, 3.0) + Mean.of(4.0, 1.0), "kl_gated": Mean.of(1.0, 0.0)}
    values = pytrees.reduce(means)
    assert values["loss"] == 2.5
    assert math.isnan(values["kl_gated"])  # not measured is not zero
    assert pytrees.reduce(means, empty=0.0)["kl_gated"] == 0.0
    assert {type(v) for v in values.values()} == {float}


def test_reduce_of_sharded_means():
    with jax.set_mesh(m := mesh.make(data=2, fsdp=2, model=2)):
        total = jax.device_put(jnp.float32(6), NamedSharding(m, P()))
        assert pytrees.reduce({"loss": Mean(total, jnp.float32(4))}) == {"loss": 1.5}


def test_pool_weighs_steps_by_their_tokens():
    """Pooling is by weight (a mean of means gives 2.0), survives 2^24, and unites the names."""
    steps = [{"loss": Mean.of(1.0, 3.0)}, {"loss": Mean.of(3.0, 1.0), "other": Mean.of(7.0)}]
    assert pytrees.reduce(pytrees.pool(steps)) == {"loss": 1.5, "other": 7.0}
    many = [{"n": Mean.of(1.0, 2.0**24)}, *[{"n": Mean.of(0.0, 1.0)}] * 3]
    assert pytrees.pool(many)["n"].weight == 2**24 + 3
    assert pytrees.pool([]) == {}


def test_jsonl_is_plain_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = writers.JsonlWriter(path)
    values = {
        "loss": float("nan"),
        "kl_nats": np.float32(0.5),
        "top": [jnp.int32(3), np.inf],
        "deep": {"text": "é", "mask": np.array([True, False])},
        "none": None,
    }
    writer.write(1, values)
    assert path.read_text().endswith("\n")  # on disk before close
    assert lines(path) == [
        {
            "step": 1,
            "loss": None,
            "kl_nats": 0.5,
            "top": [3, None],
            "deep": {"text": "é", "mask": [True, False]},
            "none": None,
        }
    ]
    assert "NaN" not in path.read_text()
    with pytest.raises(ValueError, match="step 3 and are written as step 2"):
        writer.write(2, {"step": 3})
    writer.close()


def test_jsonl_goes_on_without_duplicates(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = writers.JsonlWriter(path)
    for step in range(6):
        first.write(step, {"loss": step})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    second = writers.JsonlWriter(path, restored=3)
    for step in range(4, 8):
        second.write(step, {"loss": -step})
    second.close()
    assert [line["step"] for line in lines(path)] == list(range(8))
    assert [line["loss"] for line in lines(path)] == [0, 1, 2, 3, -4, -5, -6, -7]
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_half_line_of_a_kept_step_is_dropped(tmp_path, caplog):
    """A complete object without its newline counts as half: appending would join two lines."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[broken\n{"step": 2}')
    writers.JsonlWriter(path, restored=5).close()
    assert lines(path) == [{"step": 1}]
    assert "line 2 is damaged" in caplog.text
    assert "line 3 is damaged" in caplog.text


def test_jsonl_new_run_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    writers.JsonlWriter(path).close()
    assert path.read_text() == ""


def test_jsonl_full_disk_names_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = writers.JsonlWriter(path)
    writer._file.close()
    writer._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match=r"cannot write step 1 \(No space left.*metrics.jsonl"):
        writer.write(1, {})
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = writers.JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {})
    writer.close()
    progress.Progress(1).update(1, {}, {})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


class Recorder:
    """Stands in for tensorboardX.SummaryWriter and for a wandb run."""

    def __init__(self, *args, **options):
        self.options, self.calls = options, []

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, *args, *options.items()))


VALUES = {"loss": jnp.float32(0.5), "kl_gated": float("nan"), "text": "no", "is_done": 3}


def test_tensorboard_gets_finite_scalars(tmp_path, monkeypatch):
    made = []
    fake = types.SimpleNamespace(
        SummaryWriter=lambda folder, **o: made.append(Recorder(**o)) or made[0]
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    writer = writers.TensorBoardWriter(tmp_path, restored=4)
    writer.write(5, VALUES)
    writer.close()
    assert made[0].options == {"purge_step": 5}
    assert made[0].calls == [
        ("add_scalar", "loss", 0.5, 5),
        ("add_scalar", "is_done", 3, 5),
        ("flush",),
        ("close",),
    ]


def test_wandb_gets_finite_scalars(tmp_path, monkeypatch):
    made = []
    fake = types.SimpleNamespace(init=lambda **o: made.append(Recorder(**o)) or made[0])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = writers.WandbWriter("opd", name="run-7", folder=tmp_path, config={"a.b": 1})
    writer.write(5, VALUES)
    writer.close()
    assert made[0].options["id"] == "run-7"
    assert made[0].options["resume"] == "allow"
    assert made[0].calls == [("log", {"loss": 0.5, "is_done": 3}, ("step", 5)), ("finish",)]


def test_missing_extras_say_how_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'opd-jax\[tensorboard\]'"):
        writers.TensorBoardWriter(tmp_path)
    with pytest.raises(ImportError, match=r"pip install 'opd-jax\[wandb\]'"):
        writers.WandbWriter("p", name="n", folder=tmp_path, config={})


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_timer_adds_up_and_starts_again():
    clock = Clock()
    timer = progress.Timer(clock)
    for _ in range(2):
        with timer.phase("rollout") as done:
            assert done(3) == 3
            clock.now += 1.5

    def fail():
        with timer.phase("update"):
            clock.now += 2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert timer.take() == {"rollout": 3.0, "update": 2.0}
    assert timer.take() == {}


def test_timer_waits_for_the_arrays(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    with progress.Timer().phase("update") as done:
        done("loss")
        assert waited == []
    assert len(waited) == 1


FULL = {
    "loss": 0.42131,
    "kl_nats": 0.41,
    "gated_share": 0.081,
    "mean_length": 143.2,
    "truncated_share": 0.025,
    "tokens_per_s": 2134.0,
}
SECONDS = {"rollout": 1.923, "teacher": 0.4123, "update": 1.1, "save": 9.0}


def test_progress_line():
    line = progress.format_line(120, 2000, FULL, SECONDS, 6130)
    assert line == (
        " 120/2000  loss 0.4213  KL 0.4100  gated  8%  len 143  cut  2%  "
        "roll 1.92s teach 0.41s upd 1.10s  2.13k tok/s ETA 1h42m"
    )
    assert "gated   -  len   -  cut   -" in progress.format_line(
        0, 9, {"gated_share": math.nan}, {}, math.nan
    )
    assert "loss    inf" in progress.format_line(0, 9, {"loss": math.inf}, {}, 0)


def test_progress_line_fits_120_columns():
    large = dict.fromkeys(FULL, 1.0) | {
        "loss": 12.34567,
        "kl_nats": 12.34567,
        "mean_length": 32768,
        "tokens_per_s": 123456.0,
    }
    slow = dict.fromkeys(SECONDS, 123.456)
    assert len(progress.format_line(9999, 9999, large, slow, 86400 * 12)) <= 120


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (6130, "1h42m"),
        (183_600, "2d03h"),
    ],
)
def test_durations(seconds, text):
    assert progress.format_line(0, 1, {}, {}, seconds).endswith(f"ETA {text}")


def test_progress_prints_every_n_and_the_last_and_shrugs_off_a_slow_step():
    clock, out = Clock(), []
    shown = progress.Progress(10, start=4, every=4, write=out.append, clock=clock)
    assert math.isnan(shown.eta())
    for step, took in [(5, 100.0), (6, 2.0), (7, 2.0), (8, 2.0), (9, 2.0)]:  # step 5 compiled
        clock.now += took
        shown.update(step, FULL, SECONDS)
    assert shown.eta() == 2.0
    clock.now += 2.0
    shown.update(10, FULL, SECONDS)
    assert [line.split()[0] for line in out] == ["8/10", "10/10"]
    assert out[0].endswith("ETA ~4s")  # of four steps
    assert out[1].endswith("ETA 0s")


def test_the_line_keeps_its_columns_and_leaves_out_what_says_nothing():
    small, large = (
        progress.format_line(1, 9, FULL | {"loss": x, "kl_nats": x}, SECONDS, 9, shown=())
        for x in (-1e-9, 13.5)
    )
    assert "loss" not in small + large
    assert "gated" not in small + large
    assert "KL 0.0000" in small
    assert small.index("len") == large.index("len")


def test_the_time_left_counts_evaluations_to_come():
    """20 steps of 1 s, evaluated every 5 in 10 s, the first time in 60: after 6, 14 + 3 x 10 s."""
    clock, out = Clock(), []
    shown = progress.Progress(20, write=out.append, clock=clock)
    clock.now += 60
    shown.paused("eval", 5, 60.0)
    for step in range(1, 7):
        clock.now += 1.0
        shown.update(step, FULL, SECONDS)
        if step == 5:
            clock.now += 10
            shown.paused("eval", 5, 10.0)
    assert shown.eta() == 14 + 30
    assert [("~" in line) for line in out] == [True] * 4 + [False] * 2


def test_what_takes_long_is_announced_and_what_is_quick_is_not():
    said = []
    with progress.announced("compiling", said.append, after=0.01):
        time.sleep(0.3)
    assert said == ["compiling"]
    with progress.announced("compiling", said.append, after=30.0):
        pass
    assert said == ["compiling"]


def test_progress_needs_no_terminal(capfd):
    progress.Progress(1).update(1, FULL, SECONDS)
    out = capfd.readouterr().out
    assert out.startswith("1/1  loss 0.4213")
    assert out.count("\n") == 1
    assert "\x1b" not in out
    assert "\r" not in out
    assert os.linesep == out[-1]
