"""Figures of hand-made results: what is drawn is what the files say."""

import itertools
import json
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import rocks_out
from matplotlib.backends.backend_agg import FigureCanvasAgg

from opd_jax.report import curve_figures, rock_figures, study_figures, style, sweep_section
from opd_jax.report.accuracy import Measured
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs

NAMES = ["funnel", "stability", "density", "controls", "groups"]
NAMES += ["references", "gradients", "context", "persistence", "changes", "optimizer"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return rocks_out.make_out(tmp_path_factory.mktemp("results") / "out")


@pytest.fixture
def selection(out):
    return json.loads((out / "selection.json").read_text())


@pytest.fixture(autouse=True)
def styled():
    """STYLE's context, with every warning (a missing glyph is one) an error."""
    with warnings.catch_warnings(), matplotlib.rc_context(style.STYLE):
        warnings.simplefilter("error")
        yield


def xy(line):
    return list(line.get_xdata()), list(line.get_ydata())


def labelled(axes, label):
    return next(line for line in axes.get_lines() if line.get_label() == label)


def test_everything_there_is_drawn(out):
    drawn = rock_figures.draw_all(out)
    assert [path.name for path in drawn] == [f"{name}.png" for name in NAMES]
    assert all(path.parent == out / "figures" for path in drawn)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plt.get_fignums() == []


def test_only_what_is_there_is_drawn(tmp_path, out):
    assert rock_figures.draw_all(tmp_path) == []
    (tmp_path / "gradients.json").write_text((out / "gradients.json").read_text())
    drawn = rock_figures.draw_all(tmp_path, format="svg")
    assert [path.name for path in drawn] == ["gradients.svg"]


def test_a_key_that_was_not_computed_has_no_figure(tmp_path, selection):
    del selection["density"]
    selection["groups"] = []
    (tmp_path / "selection.json").write_text(json.dumps(selection))
    names = [plate.name for plate in rock_figures.plates(tmp_path)]
    assert names == ["funnel", "stability", "controls"]


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of \.png, \.svg, \.pdf"):
        rock_figures.draw_all(tmp_path, format="jpg")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "selection.json").write_text("{")
    with pytest.raises(workdirs.WorkdirError, match=r"selection\.json is damaged"):
        rock_figures.draw_all(tmp_path)


def test_the_funnel_shows_every_rock_and_the_mean(selection):
    data = selection["funnel"]
    (axes,) = rock_figures.funnel(data).figure.axes
    points = axes.collections[-1].get_offsets()
    assert points.tolist() == [[r["count"], r["kl_mean"]] for r in data["rocks"]]
    counts, means = xy(labelled(axes, "mean of types"))
    np.testing.assert_allclose(np.log10(counts), [b["log10_count"] for b in data["bins"]])
    assert means == [b["mean"] for b in data["bins"]]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    shown = {text.get_text() for text in axes.texts}
    assert style.token_label(max(data["rocks"], key=lambda r: r["count"])["token"]) in shown


def test_a_funnel_with_zeros_and_giants_still_shows_zero(selection):
    data = selection["funnel"]
    data["bins"][0] |= {"p10": 0.0, "mean": 0.0}
    data["rocks"][0]["kl_mean"] = 1e4
    (axes,) = rock_figures.funnel(data).figure.axes
    assert axes.get_yscale() == "symlog"


def test_names_of_the_funnel_meet_neither_names_nor_rocks(selection):
    rock = selection["funnel"]["rocks"][0]
    crowd = [dict(rock, kl_mean=rock["kl_mean"] * (1 + i / 100)) for i in range(30)]
    selection["funnel"]["rocks"] += crowd
    (axes,) = rock_figures.funnel(selection["funnel"]).figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert 2 < len(boxes) < 14
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    for point in axes.transData.transform(axes.collections[-1].get_offsets()):
        assert not any(box.contains(*point) for box in boxes[1:])  # the first names the line


def test_the_funnel_note_counts(selection):
    data = selection["funnel"]
    above = sum(r["kl_mean"] > data["kl_mean"] for r in data["rocks"])
    note = rock_figures.funnel(data).note
    assert f"{above} of {len(data['rocks'])} rocks lie above" in note
    assert f"{sum(b['types'] for b in data['bins'])} types" in note


@pytest.mark.parametrize(("panel", "key"), [(0, "coverage"), (1, "split_half")])
def test_every_stability_curve_stands_beside_its_null(selection, panel, key):
    axes = rock_figures.stability(selection).figure.axes[panel]
    for name, label in (("null", "null"), ("value", ("measured", "two halves")[panel])):
        assert xy(labelled(axes, label)) == (
            [row["k"] for row in selection[key]],
            [row[name] for row in selection[key]],
        )
    for band, name in zip(axes.collections, ("null_", ""), strict=True):
        edge = band.get_paths()[0].vertices[:, 1]
        assert edge.min() == pytest.approx(min(row[f"{name}low"] for row in selection[key]))
        assert edge.max() == pytest.approx(max(row[f"{name}high"] for row in selection[key]))


def test_the_stability_note_speaks_of_the_chosen_k(selection):
    row = next(r for r in selection["coverage"] if r["k"] == selection["k"])
    note = rock_figures.stability(selection).note
    nulls = f"null {row['null']:.1%}, within problems {row['null_within']:.1%}"
    assert f"{row['value']:.1%} of the KL ({nulls}) of 64 problems (12,000 tokens," in note
    assert selection["coverage_note"] in note.replace("Coverage:", "coverage:")
    assert selection["null_note"] in note


def test_density_of_answers_is_counted_from_the_corpus(out, selection):
    shares = rock_figures.answer_shares(out)
    rocks = set(json.loads((out / "lists" / "rock.json").read_text()))
    with np.load(out / "corpus" / "answers-00000.npz") as file:
        rows = file["answer"].reshape(30, 40).tolist()
    wanted = [sum(token in rocks for token in row) / 40 for row in rows]
    np.testing.assert_allclose(shares, wanted)
    left, _ = rock_figures.density(selection["density"], shares).figure.axes
    assert sum(bar.get_height() for bar in left.patches) == 30


def test_the_line_of_the_densities_is_the_median_of_the_answers_drawn(selection):
    """Rocks without the most frequent types; the first row of the table is of all types."""
    shares = np.array([0.1, 0.2, 0.4])
    left, _ = rock_figures.density(selection["density"], shares).figure.axes
    assert xy(left.get_lines()[0])[0] == [0.2, 0.2]
    assert "median 20.0%" in left.get_xlabel()


def test_density_without_a_corpus_shows_the_quantiles_alone(selection):
    (axes,) = rock_figures.density(selection["density"], None).figure.axes
    assert [xy(line)[0] for line in axes.get_lines()[:3]] == [[0.42, 0.6], [0.5], [0.52]]


@pytest.mark.parametrize("name", ["controls", "groups"])
def test_rows_of_shares_stand_in_order_of_kl(selection, name):
    plate = getattr(rock_figures, name)(selection[name])
    (axes,) = plate.figure.axes
    tokens, kl = (collection.get_offsets()[:, 0].tolist() for collection in axes.collections[1:])
    rows = sorted(selection[name], key=lambda row: -row["kl_share"])
    assert tokens == [row["token_share"] for row in rows]
    assert kl == [row["kl_share"] for row in rows]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_the_controls_note_names_the_strongest_control(selection):
    note = rock_figures.controls(selection["controls"]).note
    assert "most frequent, holds 56.0% of it with 55.0%" in note


def test_gradients_show_raw_and_matched_norms_of_every_group(out):
    data = json.loads((out / "gradients.json").read_text())
    left, right = study_figures.geometry(data).figure.axes
    for line, group in zip(left.get_lines(), data["groups"], strict=True):
        wanted = [group["mean_norm"], *group["norm_at"].values(), group["norm_of_mean"]]
        assert xy(line)[0] == wanted
    first = right.get_lines()[0]
    keys = ("cos_balanced", "cos_balanced_loo", "cos_global", "cos_global_loo")
    assert xy(first)[0] == [data["groups"][0][key] for key in keys]


def test_a_number_that_was_not_measured_is_no_error():
    group = {"group": "rock", "norm_at": None, "norm_at_2": 0.5, "mean_norm": None}
    assert study_figures.value(group, "norm_at.2") == 0.5
    assert np.isnan(study_figures.value(group, "norm_at.8"))
    assert np.isnan(study_figures.value(group, "mean_norm"))
    assert "against – of one occurrence" in study_figures.geometry({"groups": [group]}).note


def test_matrices_are_written_out(out):
    data = json.loads((out / "persistence.json").read_text())
    matrix, _ = study_figures.persistence(data)
    for axes, group in zip(matrix.figure.axes, data["groups"], strict=True):
        wanted = [f"{cell:#.2g}" for row in group["matrix"] for cell in row]  # 0.60, not 0.6
        assert [text.get_text() for text in axes.texts] == wanted
        assert axes.get_ylim() == (3, 0)  # the first model on top


def test_changes_are_counted_after_correction(out):
    data = json.loads((out / "persistence.json").read_text())
    data["tests"][0]["p_bootstrap_adjusted"] = 0.5
    data["tests"][1]["p_bootstrap_adjusted"] = None
    _, changes = study_figures.persistence(data)
    assert changes.note.startswith("7 of 9 changes differ from 0 at 5% by resampling problems")
    assert "Of 1 contrasts" in changes.note
    assert "0 differ from 0 and 1 are told to differ by less than 10%" in changes.note
    for name in ("contrasts", "margin"):  # as an earlier version wrote it
        del data[name]
    assert "contrasts" not in study_figures.persistence(data)[1].note
    assert len(changes.figure.axes[0].get_yticklabels()) == 9


def test_a_change_or_cell_that_was_not_measured_is_no_error(out):
    data = json.loads((out / "persistence.json").read_text())
    data["tests"][0] |= {"low": None, "high": None}
    data["groups"][0]["matrix"][0][1] = None
    matrix, changes = study_figures.persistence(data)
    assert [text.get_text() for text in matrix.figure.axes[0].texts][:3] == ["1.2", "–", "1.4"]
    bars = len(changes.figure.axes[0].collections)
    assert bars == len(data["tests"]) - 1


def test_many_tests_are_cut_to_the_whole_way(out):
    data = json.loads((out / "persistence.json").read_text())
    extra = [t | {"to": "step-40"} for t in data["tests"]]
    data["tests"] = data["tests"] + extra * 4
    _, changes = study_figures.persistence(data)
    labels = [label.get_text() for label in changes.figure.axes[0].get_yticklabels()]
    assert len(labels) == 9
    assert all("step-120" in label for label in labels)


def test_other_writers_stand_beside_the_first(out):
    data = json.loads((out / "references.json").read_text())
    plate = study_figures.references(data)
    left, right = plate.figure.axes
    assert xy(labelled(left, "measured"))[0] == [0.62, 0.7]
    assert xy(labelled(left, "null"))[0] == [row["coverage_null"] for row in data["corpora"]]
    assert [text.get_text() for text in right.texts] == ["1.00", "0.25", "0.25", "1.00"]
    assert "teacher 70.0% (null 60.0%; 1,000 tokens), Jaccard 0.25 (null 0.10)" in plate.note
    assert xy(labelled(left, "null within problems"))[0] == pytest.approx([0.54, 0.62])
    del data["jaccard_null"]  # of a folder that an earlier version wrote
    assert "Jaccard 0.25 (null –)" in study_figures.references(data).note


def test_moments_are_drawn_where_they_were_measured(out):
    data = json.loads((out / "optimizer.json").read_text())
    plate = study_figures.optimizer(data)
    left, right = plate.figure.axes
    assert xy(labelled(left, "rocks")) == ([40, 120], [1e-6, 2e-6])
    assert xy(labelled(right, "matched by count")) == ([40], [0.2])
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    assert "1 of 2 rank correlations" in plate.note


def test_a_page_figure_takes_its_colours_from_the_page(selection):
    plate = rock_figures.controls(selection["controls"])
    text = style.page_svg(plate.figure, "one", 'Shares of <all> & "more"')
    assert text.startswith('<svg class="" viewBox="0 0 540 216"')
    assert 'aria-label="Shares of &lt;all&gt; &amp; &quot;more&quot;"' in text
    assert "var(--ink)" in text
    assert "var(--orange)" in text
    lowered = text.lower()
    assert [colour for colour in style.VARIABLES if colour.lower() in lowered] == []
    assert "<metadata" not in text
    assert "<style" not in text
    assert 'id="one-figure_1"' in text
    assert ">matched by count, type by type<" in text  # text stays text


def test_a_token_that_looks_like_an_attribute_is_left_alone(selection):
    selection["groups"][0]["group"] = '#FFFFFF id="x" url(#y)'
    plate = rock_figures.groups(selection["groups"])
    text = style.page_svg(plate.figure, "g", "kinds")
    assert '>#FFFFFF id="x" url(#y)<' in text


def plates_of_all(out, tmp_path, layout):
    """Every figure of the page, those of a sweep and of runs too."""
    sweep = sweep_section.read(rocks_out.make_sweep(tmp_path / "sweep"))
    arms = {a: [run_files.read(p) for p in ps] for a, ps in sweep["runs"].items()}
    ceiling = Measured(0.98, (0.95, 0.99))
    return [
        *rock_figures.plates(out, layout),
        *sweep_section._plates(sweep, arms, ceiling, layout),
        curve_figures.runs({"one": arms["full"][0]}, ceiling, layout=layout),
    ]


def test_no_figure_is_cropped_at_either_width(out, tmp_path):
    """Every title, label, tick and legend stands inside its figure."""
    wide, narrow = (
        plates_of_all(out, tmp_path / kind, layout)
        for kind, layout in (("wide", style.WIDE), ("narrow", style.NARROW))
    )
    for plate in style.with_narrow(wide, narrow):
        assert plate.see
        assert plate.narrow.get_figwidth() == style.NARROW.width
        for figure in (plate.figure, plate.narrow):
            FigureCanvasAgg(figure).draw()
            drawn = [axes.get_tightbbox() for axes in figure.axes]  # ticks and legends too
            for axes in figure.axes:
                if legend := axes.get_legend():
                    label = axes.xaxis.label.get_window_extent()
                    assert not legend.get_window_extent().overlaps(label), plate.name
            for box in (*drawn, *(legend.get_window_extent() for legend in figure.legends)):
                assert box.x0 >= figure.bbox.x0 - 1, plate.name
                assert box.x1 <= figure.bbox.x1 + 1, plate.name
