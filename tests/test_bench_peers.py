"""The pure parts of the peer benchmark: FLOPs, rows, agreement, the table."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "scripts" / "benchmarks"
sys.path.insert(0, str(FOLDER))  # they import one another, as scripts of one folder
bench_peers, peer_batch, peer_job, peer_rows = (
    importlib.import_module(name) for name in ("bench_peers", "peer_batch", "peer_job", "peer_rows")
)
sys.path.remove(str(FOLDER))

STUDENT = peer_job.Shape(1, width=4, ffn=8, heads=2, kv_heads=1, head_dim=2, vocab=10)
TEACHER = peer_job.Shape(2, width=4, ffn=8, heads=2, kv_heads=1, head_dim=2, vocab=10)


def raw(seconds, **rest):
    return {
        "seconds": seconds,
        "phases": {"rollout": [0.5, 0.25, 1.0]},
        "objective": "reverse KL",
        "loss_fixed": 2.0,
        "peak_rss_gb": 1.5,
        "versions": {"opd-jax": "0.1.0", "trl": "1.16.0"},
        **rest,
    }


def test_parameters_by_hand():
    # q 4x4, k 4x2, v 4x2, o 4x4; gate, up, down 4x8 each.
    assert STUDENT.body_params == 16 + 8 + 8 + 16 + 3 * 32
    assert TEACHER.body_params == 2 * STUDENT.body_params
    assert STUDENT.head_params == 40


def test_flops_by_hand():
    # 3 rows of 2 + 3 ids: 4 predicting positions each, 9 scored, 10 causal pairs a row.
    body = 12 * (2 * 288 + 6 * 144)
    head = 9 * 2 * 40 * 4
    pair = 4 * 2 * 2  # two matmuls of head_dim 2 for 2 heads, 2 FLOPs each
    attention = 30 * pair * (2 + 3 * 1)
    found = peer_rows.needed_flops(STUDENT, TEACHER, batch=3, prompt=2, new=3)
    assert found == body + head + attention


def test_measure_drops_the_warm_up():
    calls = []

    def once():
        calls.append(None)
        return {"part": float(len(calls))}

    about = {"is_unequal": False, "prompt": 1, "new": 1, "lr": 1.0}
    job = peer_job.Job("step", "s", "t", "f", **about, warmup=2, steps=3)
    result = peer_job.measure(once, job)
    assert len(calls) == 5
    assert len(result["seconds"]) == 3
    assert result["phases"] == {"part": [3.0, 4.0, 5.0]}


def test_a_row_holds_medians():
    row = peer_rows.summarise("trl", 8, raw([3.0, 1.0, 2.0]))
    assert row["seconds_per_step"] == 2.0
    assert row["rollout_seconds"] == 0.5
    assert row["spread"] == 1.0
    assert row["version"] == "1.16.0"
    assert "seconds" not in row


def test_table_has_ratio_to_ours_and_the_reason_of_a_failure():
    rows = [
        peer_rows.summarise("opd_jax", 8, raw([2.0, 2.0, 2.0])),
        peer_rows.summarise("trl", 8, raw([5.0, 5.0, 5.0])),
        peer_rows.summarise("tunix", 8, {"failed": "ValueError: no such thing"}),
    ]
    lines = peer_rows.table(rows).splitlines()
    assert lines[0].split()[:2] == ["library", "version"]
    assert lines[1].split()[-1] == "1.00"
    assert lines[2].split()[-1] == "2.50"
    assert lines[3].split() == ["tunix", "8", "FAILED"]
    assert lines[4] == "tunix, batch 8: FAILED: ValueError: no such thing"
    assert lines[0].index("s/step") == lines[1].index("2.000")


def test_ratio_is_to_our_row_of_the_same_batch():
    rows = [
        peer_rows.summarise("opd_jax", 8, raw([2.0, 2.0, 2.0])),
        peer_rows.summarise("opd_jax", 32, raw([4.0, 4.0, 4.0])),
        peer_rows.summarise("trl", 32, raw([8.0, 8.0, 8.0])),
        peer_rows.summarise("trl", 16, raw([8.0, 8.0, 8.0])),
    ]
    assert [line.split()[-1] for line in peer_rows.table(rows).splitlines()[1:]] == [
        "1.00",
        "1.00",
        "2.00",
        "-",
    ]


@pytest.mark.parametrize(
    ("loss", "objective", "verdict"),
    [
        (2.0, "reverse KL", "agrees"),
        (2.0 * (1 + 2e-4), "reverse KL", "DIFFERS"),
        (3.0, "forward KL", "agrees"),
        (2.0, "forward KL", "DIFFERS"),
        (float("nan"), "reverse KL", "DIFFERS"),
    ],
)
def test_losses_are_compared_with_ours_of_the_same_direction(loss, objective, verdict):
    ours = raw([1.0], losses_fixed={"reverse": 2.0, "forward": 3.0})
    theirs = raw([1.0], loss_fixed=loss, objective=objective, note="one token late")
    rows = [peer_rows.summarise("opd_jax", 8, ours), peer_rows.summarise("trl", 8, theirs)]
    (line,) = peer_rows.agreement(rows)
    assert line.startswith(f"trl: {verdict}:")
    assert ("one token late" in line) == (verdict == "DIFFERS")


def test_a_failed_row_takes_no_part_in_the_agreement():
    rows = [
        peer_rows.summarise("opd_jax", 8, raw([1.0], losses_fixed={"reverse": 2.0})),
        peer_rows.summarise("tunix", 8, {"failed": "why"}),
    ]
    assert peer_rows.agreement(rows) == []


def test_update_is_related_to_the_gemm_peak():
    work = {"prompt": 2, "new": 3}
    work |= {"student": vars(STUDENT), "teacher": vars(TEACHER)}
    row = peer_rows.summarise("opd_jax", 3, raw([2.0], gemm_gflops=1e-3))
    (line,) = peer_rows.remarks([row], work, "update")
    flops = peer_rows.needed_flops(STUDENT, TEACHER, batch=3, prompt=2, new=3)
    assert row["gemm_share"] == pytest.approx(flops / 2.0 / 1e6)
    assert f"{row['gemm_share']:.0%} of the GEMM peak" in line


def test_rollout_is_related_to_weight_traffic():
    work = {"prompt": 2, "new": 4, "student": vars(STUDENT), "teacher": vars(TEACHER)}
    result = raw([3.0], memory_gb_s=1.0) | {"phases": {"prefill": [1.0]}}
    row = peer_rows.summarise("opd_jax", 3, result)
    peer_rows.remarks([row], work, "rollout")
    assert row["seconds_per_token"] == pytest.approx(2 / 3)
    assert row["bound_seconds_per_token"] == pytest.approx(4 * 184 / 1e9)


def test_schedule_is_the_same_on_every_call_and_ends_each_row_with_one_stop_id(tmp_path):
    first, second = (peer_batch.draw(64, 128, 512, 1000, is_unequal=True) for _ in range(2))
    first.save(tmp_path / "rows.npz")
    for batch in (second, peer_batch.load(tmp_path / "rows.npz")):
        for name in ("prompt_BP", "completion_BN", "prompts_B", "answers_B"):
            assert (getattr(batch, name) == getattr(first, name)).all(), name
    assert 16 <= first.prompts_B.min() < 40
    assert 100 < first.prompts_B.max() <= 128
    assert 90 < sorted(first.answers_B)[32] < 160
    assert 400 < first.answers_B.max() <= 512
    assert np.log(first.answers_B).std() == pytest.approx(0.7, abs=0.05)
    assert [len(row) for row in first.rows] == first.prompts_B.tolist()
    for row in first.answers:
        assert row[-1] == peer_job.EOS
        assert min(row[:-1], default=3) > peer_job.UNKNOWN
    assert first.answer_mask_BN.sum() == first.answers_B.sum()
    with pytest.raises(RuntimeError, match="the schedule"):
        first.check([*first.answers_B[:-1], first.answers_B[-1] + 1])


def test_fixed_rows_are_full_and_those_that_were_always_measured():
    batch = peer_batch.draw(2, 3, 3, 49_152, is_unequal=False)
    assert batch.prompt_mask_BP.all()
    assert batch.answer_mask_BN.all()
    rng = np.random.default_rng(0)
    assert (batch.prompt_BP == rng.integers(3, 49_152, (2, 3), np.int32)).all()
    assert (batch.completion_BN == rng.integers(3, 49_152, (2, 3), np.int32)).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.mark.parametrize("way", ["--slots=2 --pack=yes", "--slots=5 --segments=2 --pack=no"])
def test_every_row_ends_at_its_place_of_the_schedule(way, folder, monkeypatch):
    monkeypatch.setattr(bench_peers, "ROOT", folder)
    sizes = "--layers=1,1 --batch=5 --prompt=12 --new=24 --vocab=300 --steps=1 --warmup=1"
    out = folder / "out.json"
    bench_peers.main(
        [
            "step",
            "--workload=unequal",
            "--libraries=opd_jax",
            *sizes.split(),
            *way.split(),
            f"--out={out}",
        ]
    )
    (row,) = json.loads(out.read_text())["results"]
    assert "failed" not in row, row
    wanted = peer_batch.draw(5, 12, 24, 300, is_unequal=True).answers_B.tolist()
    raw = json.loads((folder / ".bench/work/step-unequal-5/opd_jax.json").read_text())
    assert raw["sampled"] == [wanted] * 2
    assert row["sampled_tokens"] == sum(wanted)
    assert row["settings"]["pack"] is ("yes" in way)


@pytest.mark.parametrize(
    "flag",
    ["--libraries=verl", "--layers=2", "--batch=0", "--steps=0", "--layers=a,b"],
)
def test_bad_values_are_refused_with_the_flag_to_change(flag, capsys):
    with pytest.raises(SystemExit):
        bench_peers.parse(["step", flag])
    assert "change" in capsys.readouterr().err


def test_unequal_rows_are_those_of_whole_steps(capsys):
    with pytest.raises(SystemExit):
        bench_peers.parse(["update", "--workload=unequal"])
    assert "expected step" in capsys.readouterr().err
    flags = bench_peers.parse(["step", "--workload=unequal"])
    assert (flags.batch, flags.prompt, flags.new) == ([16], 128, 512)
    assert flags.settings["slots"] == 6
    assert bench_peers.parse(["step"]).settings == {}


def test_rollout_has_two_libraries_and_two_batches():
    flags = bench_peers.parse(["rollout"])
    assert flags.libraries == ["opd_jax", "trl"]
    assert flags.batch == [8, 32]


def test_no_word_of_the_tokenizer_begins_with_a_special_one():
    special = [peer_job.word(i) for i in (peer_job.PAD, peer_job.EOS, peer_job.UNKNOWN)]
    assert not any(peer_job.word(i).startswith(s) for i in range(3, 3000) for s in special)
