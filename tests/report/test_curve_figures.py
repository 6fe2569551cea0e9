"""Curves of runs and of a sweep's arms hold what the runs measured."""

import json
import warnings

import matplotlib
import pytest
import rocks_out

from opd_jax.report import curve_figures, style
from opd_jax.store import run_files
from opd_jax.store.run_files import RunFiles, Series

EMPTY = Series([], [])


def a_run(heldout=EMPTY, accuracy=EMPTY, train=EMPTY) -> RunFiles:
    return RunFiles(train, heldout, accuracy, [], "student", "teacher")


@pytest.fixture(autouse=True)
def styled():
    with warnings.catch_warnings(), matplotlib.rc_context(style.STYLE):
        warnings.simplefilter("error")
        yield


def line(axes, label):
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def test_every_run_is_one_line_in_both_panels():
    one = a_run(Series([0, 10], [8.0, 1.0]), Series([0, 10], [0.2, 0.6]), Series([1, 2], [9, 8.5]))
    two = a_run(Series([0, 10], [8.2, 0.4]), Series([0, 10], [0.2, 0.7]))
    plate = curve_figures.runs({"one": one, "two": two})
    kl, accuracy = plate.figure.axes
    assert line(kl, "one") == ([0, 10], [8.0, 1.0])
    assert line(accuracy, "two") == ([0, 10], [0.2, 0.7])
    assert list(kl.get_lines()[0].get_ydata()) == [9, 8.5]
    assert kl.get_yscale() == "log"
    assert "8.00 to 8.20 nats, after it is 0.400 to 1.00." in plate.note
    colours = {ax: [li.get_color() for li in ax.get_lines() if li.get_label() in ("one", "two")]
               for ax in (kl, accuracy)}  # fmt: skip
    assert colours[kl] == colours[accuracy]
    assert len(set(colours[kl])) == 2


def test_a_run_without_evaluations_shows_its_training():
    plate = curve_figures.runs({"one": a_run(train=Series([1, 2], [3.0, 2.0]))})
    (axes,) = plate.figure.axes
    assert list(axes.get_lines()[0].get_ydata()) == [3.0, 2.0]
    assert "were not measured" in plate.note


def test_an_arm_is_the_mean_of_its_seeds_within_their_range():
    seeds = [
        a_run(Series([0, 10, 20], [4.0, 2.0, 1.0])),
        a_run(Series([0, 10], [6.0, 3.0])),  # stopped early: only steps that all have are shown
    ]
    (axes,) = curve_figures.arms({"full": seeds}, "full").figure.axes
    assert line(axes, "full") == ([0, 10], [5.0, 2.5])
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band.tolist()} == {(0, 4), (0, 6), (10, 2), (10, 3)}


def test_more_arms_than_hues_are_told_apart_by_dashes():
    many = {f"arm-{i}": [a_run(Series([0, 1], [1.0, 0.5]))] for i in range(14)}
    (axes,) = curve_figures.arms(many, "arm-0").figure.axes
    looks = {(str(li.get_color()), str(li._dash_pattern)) for li in axes.get_lines()}
    assert len(looks) == 14


def test_differences_stand_with_their_intervals(tmp_path):
    sweep = json.loads((rocks_out.make_sweep(tmp_path) / "sweep.json").read_text())
    sweep["comparisons"][0]["p_adjusted"] = 0.01
    sweep["comparisons"][1] |= {"low": None, "high": None, "p": None, "p_adjusted": None}
    plate = curve_figures.comparisons(sweep)
    accuracy, kl = plate.figure.axes
    names = [label.get_text() for label in accuracy.get_yticklabels()]
    assert names == ["rock", "share_matched"]
    points = [li.get_xdata()[0] for li in accuracy.get_lines()[:2]]
    assert points == [-0.05, -0.1]
    (first, _), (second, _) = accuracy.collections[0].get_segments()[0]
    assert (first, second) == pytest.approx((-0.09, -0.01))
    assert len(kl.collections) == 1  # one has no interval
    assert plate.note.startswith("1 of 4 differences")


def test_runs_on_disk_are_read(tmp_path):
    read = run_files.read(rocks_out.make_run(tmp_path / "run"))
    assert read.heldout_kl.steps == [0, 10, 20, 30, 40]
    assert len(curve_figures.runs({"run": read}).figure.axes) == 2
