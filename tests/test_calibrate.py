"""scripts/calibrate in small: no interval holds the truth too rarely, no test cries too often."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(FOLDER))  # they import one another, as scripts of one folder
calibration, procedures, simulated = (
    importlib.import_module(name) for name in ("calibration", "procedures", "simulated")
)
sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def results():
    return calibration.measure(procedures.SIMULATIONS, quick=True)


def test_no_level_and_no_coverage_is_off(results):
    off = [found for found in results if found.is_off]
    assert not off, "\n".join(calibration.table(off))
    names = [found.row.name for found in results]
    assert len(names) == sum(len(s.rows) for s in procedures.SIMULATIONS) > 50


@pytest.mark.parametrize(
    "name",
    [
        "top 100, types fixed and measured where chosen (published)",
        "KL is of the problem, not the type; shuffled among all positions",
        "KL did not change, Wilcoxon over types (published)",
        "200 types, 0.6, noise not accounted for",
    ],
)
def test_what_is_wrong_would_be_seen(results, name):
    (found,) = (x for x in results if name in x.row.name)
    assert not found.is_off  # it is shown, not judged
    judged = dataclasses.replace(found, row=dataclasses.replace(found.row, judged=True))
    assert judged.is_off


def test_off_is_beyond_three_errors_and_the_slack_on_the_bad_side_only():
    def is_off(kind, measured, slack=0.0):
        row = procedures.Row("x", kind, 0.95 if kind == "interval" else 0.05, slack)
        return calibration.Result(row, measured, 0.01, 475).is_off

    assert is_off("interval", 0.919)
    assert not is_off("interval", 0.921)
    assert not is_off("interval", 1.0)
    assert not is_off("interval", 0.911, slack=0.01)
    assert is_off("test", 0.081)
    assert not is_off("test", 0.0)


def test_the_table_and_the_file_have_every_row(tmp_path, capsys, monkeypatch):
    one = procedures.Simulation(
        lambda rng: (rng.random() < 0.9, rng.random() < 0.5),
        (procedures.interval("held"), procedures.test("rejected")),
        2000,
    )
    monkeypatch.setattr(calibration, "SIMULATIONS", (one,))
    assert calibration.main([f"--out={tmp_path}/made/out.json"]) == 1
    held, rejected = json.loads((tmp_path / "made" / "out.json").read_text())["results"]
    assert (held["name"], held["kind"], held["nominal"]) == ("held", "interval", 0.95)
    assert held["measured"] == pytest.approx(0.9, abs=0.03)
    assert held["error"] == pytest.approx(np.sqrt(0.9 * 0.1 / 2000), rel=0.1)
    assert (held["runs"], held["off"], rejected["off"]) == (2000, True, True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("|") and line.count("|") == 8 for line in lines)
    assert lines[3].startswith("| rejected | test | 0.050 | 0.")
    assert lines[3].endswith("| **off** |")
    monkeypatch.setattr(calibration, "SIMULATIONS", (dataclasses.replace(one, runs=1),))
    assert calibration.main(["--quick"]) in (0, 1)


def test_simulated_truths_are_what_endless_data_show():
    rng = np.random.default_rng(0)
    right = simulated.answers(rng, 40_000, samples=4)
    assert right.mean() == pytest.approx(simulated.accuracy(1), abs=0.01)
    over_seeds = simulated.answers(rng, 2000, seeds=400)
    assert over_seeds.mean() == pytest.approx(simulated.accuracy(400), abs=0.02)
    found, truth = simulated.corpus(rng, 3000, 50)
    share = np.bincount(found.token_id, found.kl.astype(float), 50) / found.kl.sum(dtype=float)
    np.testing.assert_allclose(share, truth, rtol=0.15)
    scores = simulated.unlearned(rng, problems=4000, types=20)
    before, after = (scores.cell(model, "first").kl.mean() for model in ("first", "last"))
    assert after == pytest.approx(before, rel=0.05)
    x, y, (a, b) = simulated.confounded(rng, 20_000, 0.6)
    assert np.corrcoef(a, b)[0, 1] == pytest.approx(0.6, abs=0.02)
    assert np.corrcoef(x, y)[0, 1] == pytest.approx(0.64, abs=0.02)
