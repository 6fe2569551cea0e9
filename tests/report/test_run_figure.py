"""The figure of a run, drawn from small hand-written run files."""

import json
import warnings

import matplotlib
import matplotlib.pyplot as plt
import pytest
import tiny_run

from opd_jax import cli, stats
from opd_jax.report import accuracy, run_figure, style
from opd_jax.store import run_files
from opd_jax.store import workdir as workdirs

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def rock(token, share, token_share, member=False):
    return {
        "token_id": 7,
        "token": token,
        "share": share,
        "kl_mean": 1.0,
        "token_share": token_share,
        "member": member,
    }


METRICS = (
    {"step": 0, "eval/accuracy": 0.25, "eval/kl_nats": 8.0, "eval/kl_gated": None},
    {"step": 1, "loss": 8.5, "kl_nats": 8.5},
    {"step": 2, "loss": 1.0, "kl_nats": 1.0},
    {"step": 3, "loss": None, "kl_nats": None},  # no position was scored
    {"step": 4, "loss": 0.5, "kl_nats": 0.5},
    {"step": 4, "eval/accuracy": 0.75, "eval/kl_nats": 0.4, "eval/kl_gated": 0.2},
)
ROCKS = (rock("␣$x_1$", 0.2, 0.05, member=True), rock("⏎", 0.3, 0.1), rock("中", 0.1, 0.01))


def write_run(folder, metrics=METRICS, rocks=ROCKS):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(line) + "\n" for line in metrics]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "summary.json").write_text(json.dumps(tiny_run.SUMMARY | {"rocks": list(rocks)}))
    config = {"student.path": "models/Small-1B/", "teacher.path": "embedded:teacher"}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    return folder


def draw(folder):
    """Draw and lay out, with every warning (a missing glyph is one) an error."""
    with warnings.catch_warnings(), matplotlib.rc_context(style.STYLE):
        warnings.simplefilter("error")
        figure = run_figure.draw(run_files.read(folder))
        figure.savefig(folder / "drawn.png")
    return figure


def xy(line):
    return list(line.get_xdata()), list(line.get_ydata())


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_the_extension_says_the_type(tmp_path, suffix):
    out = tmp_path / "made" / f"figure{suffix}"
    run_figure.training(write_run(tmp_path / "run"), out)
    assert out.read_bytes().startswith(MAGIC[suffix.lower()])


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_run_gives_the_same_bytes(tmp_path, suffix):
    run = write_run(tmp_path / "run")
    for name in "ab":
        run_figure.training(run, tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["figure.jpg", "figure"])
def test_another_extension_is_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected one of \.png, \.svg, \.pdf; give another"):
        run_figure.training(tmp_path / "no-such-run", tmp_path / name)


def test_curves_hold_what_was_measured(tmp_path):
    accuracy, kl, _ = draw(write_run(tmp_path / "run")).axes
    train, heldout = kl.get_lines()
    assert xy(train) == ([1, 2, 4], [8.5, 1.0, 0.5])
    assert xy(heldout) == ([0, 4], [8.0, 0.4])
    assert xy(accuracy.get_lines()[0]) == ([0, 4], [0.25, 0.75])
    assert [text.get_text() for text in accuracy.texts] == ["25.0%", "75.0%"]


def test_names_of_the_models_are_the_title(tmp_path):
    figure = draw(write_run(tmp_path / "run"))
    assert figure.get_suptitle() == "Distilling teacher into Small-1B"


def test_bars_are_shares_from_the_highest_down(tmp_path):
    axes = draw(write_run(tmp_path / "run")).axes[2]
    of_kl, of_tokens = axes.containers
    assert [bar.get_width() for bar in of_kl] == [0.3, 0.2, 0.1]
    assert [bar.get_width() for bar in of_tokens] == [0.1, 0.05, 0.01]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # row 0 on top


def test_tokens_are_shown_as_they_are(tmp_path):
    axes = draw(write_run(tmp_path / "run")).axes[2]
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["⏎", "␣$x_1$", "U+4E2D"]
    assert not any(label.get_parse_math() for label in labels)
    assert [label.get_fontweight() for label in labels] == ["normal", "bold", "normal"]
    assert axes.get_xlabel().endswith("bold tokens are gated")


def test_a_long_token_is_cut():
    assert style.token_label("␣" * 100) == "␣" * (style.MAX_LABEL - 1) + "…"


@pytest.mark.parametrize(
    ("values", "scale"),
    [((8.0, 0.7), "log"), ((8.0, 0.9), "linear"), ((8.0, 0.0), "linear"), ((3.0,), "linear")],
)
def test_the_kl_axis_is_logarithmic_over_more_than_a_decade(tmp_path, values, scale):
    metrics = [{"step": i, "kl_nats": value} for i, value in enumerate(values)]
    axes = draw(write_run(tmp_path / "run", metrics)).axes[0]
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert low <= min(values)
    assert high > max(values)


@pytest.mark.parametrize("accuracy", [(0.0,), (1.0,), (0.0, 1.0), (0.5, 0.5), (1.0, 0.97)])
@pytest.mark.parametrize("kl", [1.0, 100.0])
def test_values_at_the_ends_of_the_scale_stay_in_their_panel(tmp_path, accuracy, kl):
    metrics = [
        {"step": i, "eval/accuracy": value, "eval/kl_nats": kl**i}
        for i, value in enumerate(accuracy)
    ]
    for axes in draw(write_run(tmp_path / "run", metrics)).axes[:2]:
        panel = axes.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent()
            assert panel.y0 <= box.y0 < box.y1 <= panel.y1


def test_no_accuracy_is_offered_outside_of_0_to_100_percent(tmp_path):
    metrics = [{"step": i, "eval/accuracy": float(i)} for i in range(2)]
    axes = draw(write_run(tmp_path / "run", metrics)).axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert [text for text in shown if text] == ["0%", "20%", "40%", "60%", "80%", "100%"]


def test_only_what_there_is_gets_a_panel(tmp_path):
    metrics = [{"step": 0, "eval/accuracy": None, "eval/kl_nats": 2.0}]
    (axes,) = draw(write_run(tmp_path / "run", metrics, rocks=())).axes
    assert axes.get_xlabel() == "step"
    assert xy(axes.get_lines()[1]) == ([0], [2.0])


def test_a_last_line_still_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "kl_n')
    assert run_files.read(run).train_kl.steps == [1, 2, 4]


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "run.json"])
def test_a_missing_file_is_named(tmp_path, name):
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(workdirs.WorkdirError, match=rf"cannot read .*{name}.*; expected .*; give"):
        run_figure.training(run, tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "run.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    run = write_run(tmp_path / "run")
    (run / name).write_text('{"step": 1,\n{"step": 2}\n')
    with pytest.raises(workdirs.WorkdirError, match=rf"{name} is damaged .*; expected .*; put"):
        run_files.read(run)


def test_a_run_without_a_measurement_is_refused(tmp_path):
    run = write_run(tmp_path / "run", metrics=[{"step": 0, "eval/kl_nats": None}])
    with pytest.raises(workdirs.WorkdirError, match="1 lines and no measured KL or accuracy"):
        run_files.read(run)


def test_no_global_state_is_left(tmp_path):
    before = dict(matplotlib.rcParams)
    run_figure.training(write_run(tmp_path / "run"), tmp_path / "figure.png")
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_the_command_draws(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "figure.svg"
    assert cli.main(["figure", f"--workdir={run}", f"--out={out}"]) == 0
    assert out.exists()
    assert cli.main(["figure", f"--workdir={tmp_path / 'none'}", f"--out={out}"]) == 1
    assert "expected the folder of a run" in capsys.readouterr().err


def test_accuracy_stands_in_its_interval_where_it_was_graded(tmp_path):
    folder = write_run(tmp_path / "run")
    graded = [
        {"step": step, "index": [*range(8)], "correct": [[i < right] for i in range(8)]}
        for step, right in ((0, 2), (4, 6))
    ]
    (folder / "graded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in graded))
    ends = accuracy.intervals(folder)
    assert {step: pytest.approx(stats.wilson(n / 8, 8)) for step, n in ((0, 2), (4, 6))} == ends
    with matplotlib.rc_context(style.STYLE):
        figure = run_figure.draw(run_files.read(folder), ends)
    axes = next(a for a in figure.axes if "Accuracy" in a.get_title("left"))
    bars = axes.collections[0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars] == [pytest.approx(ends[0]), pytest.approx(ends[4])]
    (folder / "graded.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(workdirs.WorkdirError, match=r"graded\.jsonl is damaged"):
        run_figure.training(folder, tmp_path / "out.png")


def test_answers_that_agree_within_a_problem_count_once(tmp_path):
    folder = write_run(tmp_path / "run")
    assert accuracy.intervals(folder) == {}
    line = {"step": 4, "index": [0, 1, 2, 3], "correct": [[True] * 4, [False] * 4] * 2}
    (folder / "graded.jsonl").write_text(json.dumps(line) + "\n")
    assert accuracy.intervals(folder)[4] == pytest.approx(stats.wilson(0.5, 4))
    assert accuracy.told(0.5, (0.25, 0.75)) == "50.0% [25.0%, 75.0%]"
    assert accuracy.told(0.5, None) == "50.0%"
