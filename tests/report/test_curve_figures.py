"""Curves of runs and of a sweep's arms hold what the runs measured."""

import itertools
import json
import warnings

import matplotlib
import pytest
import rocks_out

from opd_jax.report import curve_figures, style
from opd_jax.report.accuracy import Measured
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


def test_the_teacher_is_a_labelled_line_in_its_band():
    curve = a_run(Series([0, 10], [8.0, 1.0]), Series([0, 10], [0.2, 0.6]))
    ceiling = Measured(0.98, (0.95, 0.99))
    ends = {"one": {0: (0.1, 0.3), 10: (0.5, 0.7)}}
    plates = [
        curve_figures.runs({"one": curve}, ceiling, ends),
        curve_figures.arms({"full": [curve, curve]}, "full", ceiling),
    ]
    for plate in plates:
        kl, accuracy = plate.figure.axes
        assert [text.get_text() for text in accuracy.texts] == ["teacher 98.0% [95.0%, 99.0%]"]
        assert any(list(one.get_ydata()) == [0.98, 0.98] for one in accuracy.get_lines())
        (band,) = accuracy.patches
        assert band.get_extents().transformed(accuracy.transData.inverted()).y0 == pytest.approx(
            0.95
        )
        assert list(kl.texts) == []
        assert accuracy.get_ylim()[1] > 0.99
    bars = plates[0].figure.axes[1].collections[0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars] == [(0.1, 0.3), (0.5, 0.7)]


def test_ticks_stand_on_evaluated_steps():
    steps = [0, 40, 80, 120]
    curve = a_run(Series(steps, [8.0, 2.0, 1.5, 1.0]), Series([0, 120], [0.2, 0.6]))
    kl, accuracy = curve_figures.runs({"one": curve}).figure.axes
    assert list(kl.get_xticks()) == steps
    assert list(accuracy.get_xticks()) == [0, 120]
    many = [*range(0, 1001, 20), 1007]
    kl = curve_figures.runs({"one": a_run(Series(many, [1.0] * 52))}).figure.axes[0]
    ticks = list(kl.get_xticks())
    assert {0, 1007} <= set(ticks) <= set(many)
    assert len(ticks) <= 10


def test_curves_that_lie_on_one_another_are_all_seen():
    same = {f"arm-{i}": [a_run(Series([0, 1], [1.0, 0.5]))] for i in range(4)}
    (axes,) = curve_figures.arms(same, "arm-0").figure.axes
    lines = [one for one in axes.get_lines() if one.get_label() in same]
    for key in ("linewidth", "markersize"):
        sizes = [getattr(one, f"get_{key}")() for one in lines]
        assert all(a > b for a, b in itertools.pairwise(sizes))  # the one below stands out
    assert len({str(one.get_color()) for one in lines}) == 4
    assert len({str(one._dash_pattern) for one in lines}) == 4  # and is seen through its gaps


@pytest.mark.parametrize(
    ("ticks", "told"),
    [
        ([0, 0.2, 1.0, 1.2], ["0%", "20%", "100%", ""]),
        ([0.025, 0.05], ["2.5%", "5.0%"]),
        ([0.1234], ["12.34%"]),
    ],
)
def test_ticks_of_a_share_have_as_many_digits_as_one_another(ticks, told):
    assert style.Percent().format_ticks(ticks) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.2, "0.200"),
        (13.562, "13.6"),
        (100.0, "100"),
        (999.7, "1,000"),
        (1234.5, "1,234"),
        (-0.0, "0.00"),
        (2.5e-6, "2.50e-06"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_numbers_keep_their_zeros(value, told):
    assert style.measured(value) == told
