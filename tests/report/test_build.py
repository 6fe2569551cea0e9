"""The page of a report: what is in it, what is left out, what is refused."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import rocks_out

from opd_jax.report import build, page_data, rock_section, sweep_section
from opd_jax.store import workdir as workdirs

VOID = {"meta", "br", "input", "path", "use", "rect", "link"}


class Outline(HTMLParser):
    """Checks that tags close in order; keeps texts by element and the data of the page."""

    def __init__(self):
        super().__init__()
        self.stack, self.tags, self.text, self.scripts = [], [], {}, []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, tag
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack:
            self.text.setdefault(self.stack[-1], []).append(data)


def parse(path: Path) -> Outline:
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    assert outline.stack == []
    return outline


def data_of(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two runs, OUT, a sweep, and the report of all of them."""
    folder = tmp_path_factory.mktemp("made")
    runs = [rocks_out.make_run(folder / name, seed=i) for i, name in enumerate(("one", "two"))]
    rocks_out.make_out(folder / "out")
    rocks_out.make_sweep(folder / "sweep")
    build.report(runs, folder / "all.html", rocks=folder / "out", sweep=folder / "sweep")
    build.report(runs[:1], folder / "one.html")
    return folder


@pytest.mark.parametrize("name", ["all.html", "one.html"])
def test_the_page_is_whole_and_needs_no_network(made, name):
    outline = parse(made / name)
    text = (made / name).read_text()
    assert text.startswith(f"<!doctype html>\n{build.MARKER}\n")
    assert "{{" not in text
    for tag, attrs in outline.tags:
        assert tag not in ("link", "img", "iframe", "object", "image")
        for key in ("src", "href", "xlink:href", "action"):
            assert attrs.get(key, "#").startswith("#"), (tag, attrs)
    assert re.findall(r"url\((?!#)", text) == []
    assert "@import" not in text
    assert "default-src 'none'" in text
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_every_figure_has_a_note_and_a_name(made):
    outline = parse(made / "all.html")
    svgs = [attrs for tag, attrs in outline.tags if tag == "svg"]
    assert len(svgs) == 2 * (3 + 11)  # of runs and arms, of rocks; each wide and narrow
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in svgs)
    assert sum(attrs["class"] == "narrow" for attrs in svgs) == len(svgs) / 2
    assert sum(tag == "figcaption" for tag, _ in outline.tags) == len(svgs) / 2
    seen = [attrs for tag, attrs in outline.tags if tag == "p" and attrs.get("class") == "see"]
    assert len(seen) == len(svgs) / 2


def test_the_sweep_table_holds_intervals_and_differences(made):
    text = (made / "all.html").read_text()
    row = re.search(r'<tr><th scope="row">rock</th>.*?</tr>', text)[0]
    assert "25.0%" in row
    assert "65.0% [58.5%, 71.5%]" in row
    assert "Δ -5.0 points [-9.0, -1.0], p 0.060: undecided" in row
    assert "Δ 0.200 [0.160, 0.240], p 0.060" in row
    start = re.search(r'<tr><th scope="row">step 0</th>.*?</tr>', text)[0]
    assert "30.0% [19.0%, 44.0%]" in start
    assert "8.30" in start
    full = re.search(r'<tr><th scope="row">full</th>.*?</tr>', text)[0]
    assert "Δ" not in full


def test_arms_stand_beside_their_controls_and_predictions(made):
    text = (made / "all.html").read_text()
    (row,) = (
        x for x in re.findall(r'<tr><th scope="row">rock</th>.*?</tr>', text) if ">dealt<" in x
    )
    assert "25.0% / 26.0%" in row
    assert "-5.0 points [-9.0, -1.0]<br><small>p 0.030: different" in row
    assert "0.200 [0.160, 0.240]<br><small>p 0.030: different" in row
    assert "falls &lt;b&gt;" in text


def test_one_seed_has_kl_that_is_not_tested(made, tmp_path):
    """As ``opd-jax sweep`` writes it: a change without interval and p."""
    folder = rocks_out.make_sweep(tmp_path / "sweep", seeds=1)
    path = folder / "sweep.json"
    sweep = json.loads(path.read_text())
    for row in (*sweep["comparisons"], *sweep["budget"]):
        if row["metric"] == "kl_nats":
            row |= {"low": None, "high": None, "p": None, "p_adjusted": None}
            row |= {"verdict": "not tested", "p_equivalent": None, "p_equivalent_adjusted": None}
    path.write_text(json.dumps(sweep))
    build.report([], tmp_path / "page.html", sweep=folder)
    text = (tmp_path / "page.html").read_text()
    assert text.count("Δ 0.200, not tested") == 1
    assert text.count("0.200<br><small>not tested") == 1


def test_arms_stand_beside_their_teacher(made):
    sweep = sweep_section.read(made / "sweep")
    assert "the teacher's accuracy" in str(sweep_section.section(sweep).absent)
    path = sweep["runs"]["rock"][1] / "summary.json"
    teacher = {"accuracy": 0.98, "accuracy_low": 0.95, "accuracy_high": 0.99}
    rocks_out.change(path, teacher=teacher)
    section = sweep_section.section(sweep)
    assert section.absent == ()
    row = re.search(r'<tr><th scope="row">the teacher</th>.*?</tr>', section.body)[0]
    assert "98.0% [95.0%, 99.0%]" in row
    assert section.body.count("teacher 98.0% [95.0%, 99.0%]") == 2  # wide and narrow


def test_the_first_numbers_are_of_the_last_run_and_the_rocks(made):
    text = (made / "all.html").read_text()
    tiles = "".join(re.findall(r'<dl class="tiles">.*?</dl>', text))
    for wanted in (
        "70.0%",
        "[56.2%, 80.9%]; before 30.0% [19.1%, 43.8%]; two",
        "62.0%",
        "[58.0%, 66.0%], null 50.0%; 64 problems,",
        "0.70",
        "null 0.50",
    ):
        assert wanted in tiles


def test_contexts_are_told_beside_their_control(made):
    text = (made / "all.html").read_text()
    assert "4 of 20 rocks are among the top 20 when" in text
    assert "drawn without regard to loss: 3. Over all 3 settings tried, 1 to 9 stay" in text
    assert "of the control 2 to 7" in text


def test_the_reader_speaks_of_a_gate_only_where_weights_are_shown(made):
    """Answers of training have no weights; those of rocks have the weights of a gate to come."""
    said = '<span class="t gated">token</span>'
    assert f"{said} a gate of the rocks would freeze it" in (made / "all.html").read_text()
    assert said not in (made / "one.html").read_text()


def test_missing_pieces_name_the_command_that_makes_them(made, tmp_path):
    text = (made / "one.html").read_text()
    listed = re.search(r'<section id="more".*', text, re.DOTALL)[0]
    for command in ("opd-jax sweep --config=FILE", "opd-jax rocks --run=RUN --out=DIR"):
        assert f"can be added with <code>{command}" in listed
    assert not re.search(r'<section id="(sweep|rocks|types)"', text)
    assert "types" not in data_of(made / "one.html")
    out = rocks_out.make_out(tmp_path / "out")
    requested = rocks_out.STUDIES
    for name in ("selection.json", "types.csv", *(f"{name}.json" for name in requested)):
        (out / name).unlink()
    build.report([made / "one"], tmp_path / "r.html", rocks=out)
    text = (tmp_path / "r.html").read_text()
    assert all(f"--with={name}" in text for name in requested)
    assert "<li>the selection of the rocks: can be added with" in text
    assert "<li>the table of all types: can be added with" in text
    assert '<section id="types"' not in text


def test_what_no_run_measured_has_no_column(tmp_path):
    run = rocks_out.make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    for side in ("before", "after"):
        summary[side] = {"kl_nats": 1.0, "accuracy": None}
    (run / "summary.json").write_text(json.dumps(summary))
    build.report([run], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "KL, nats, before → after" in text
    assert "accuracy, before → after" not in text


def test_tokens_cannot_leave_the_data(made):
    text = (made / "all.html").read_text()
    data = data_of(made / "all.html")
    tokens = data["answers"][0]["tokens"]["text"]
    assert tokens[:2] == ["</script><b>&amp;", "␣$x_1$"]
    body = text[text.index('id="data">') : text.rindex("<script>")]
    assert body.count("<") == 1  # the end of the element itself


def test_names_and_notes_are_escaped(made, tmp_path):
    run = rocks_out.make_run(tmp_path / "a<b>&c", teacher__path="t<i>")
    build.report([run], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "a<b>" not in text
    assert "a&lt;b&gt;&amp;c" in text
    assert "t<i>" not in text
    parse(tmp_path / "r.html")


def test_types_are_cut_with_a_word(made, monkeypatch):
    monkeypatch.setattr(page_data, "MAX_TYPES", 5)
    section = rock_section.types(made / "out")
    assert [row[0] for row in section.data["types"]["rows"]] == [1, 2, 3, 4, 5]
    assert "The first 5 of 300 types by rank" in section.body


def test_types_hold_what_the_table_holds(made):
    types = data_of(made / "all.html")["types"]
    names = [column["name"] for column in types["columns"]]
    table = [dict(zip(names, row, strict=True)) for row in types["rows"]]
    assert len(table) == 300
    assert sum(row["member"] for row in table) == 20
    assert sum(row["share"] for row in table) == pytest.approx(1, abs=1e-3)
    assert {row["token"] for row in table} >= {"␣the", "</script>"}


def test_samples_of_a_run_are_read_with_its_tokenizer(made):
    answers = data_of(made / "one.html")["answers"]
    sample = json.loads((made / "one" / "samples.jsonl").read_text())["samples"][0]
    (answer,) = answers
    assert answer["tokens"]["id"] == sample["ids"]
    assert answer["tokens"]["kl"] == pytest.approx(sample["kl_nats"], rel=1e-4)
    assert not any(text.startswith("<id:") for text in answer["tokens"]["text"])
    assert answer["tokens"]["logp"] == []  # not written, not shown


def test_samples_without_a_tokenizer_show_their_ids(tmp_path):
    gone = {"student__path": "gone/student", "teacher__path": "gone/teacher"}
    run = rocks_out.make_run(tmp_path / "run", **gone)
    build.report([run], tmp_path / "r.html")
    (answer,) = data_of(tmp_path / "r.html")["answers"]
    assert answer["tokens"]["text"] == [f"<id:{i}>" for i in answer["tokens"]["id"]]


def test_a_run_without_samples_says_how_to_keep_them(tmp_path):
    run = rocks_out.make_run(tmp_path / "run")
    (run / "samples.jsonl").unlink()
    build.report([run], tmp_path / "r.html")
    assert "--config.log.samples_every=N" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("student__path", "other", "student"),
        ("teacher__path", "other", "teacher"),
        ("kl__vocab_size", 7, "vocabulary"),
        ("data__heldout", "other.jsonl", "held-out file"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(made, tmp_path, key, value, named):
    other = rocks_out.make_run(tmp_path / "other", **{key: value})
    with pytest.raises(workdirs.WorkdirError) as caught:
        build.report([made / "one", other], tmp_path / "r.html")
    text = str(caught.value)
    assert f"{named} ({key.replace('__', '.')}): " in text
    assert repr(value) in text
    assert "expected runs of one student" in text
    assert not (tmp_path / "r.html").exists()


def test_runs_of_a_sweep_are_compared_too(made, tmp_path):
    other = rocks_out.make_run(tmp_path / "other", teacher__path="other")
    with pytest.raises(workdirs.WorkdirError, match=r"teacher \(teacher\.path\)"):
        build.report([other], tmp_path / "r.html", sweep=made / "sweep")


def test_what_may_differ_is_no_difference(made, tmp_path):
    other = rocks_out.make_run(tmp_path / "other", rock__mode="ema", seed=7)
    same = {"student__path": "embedded:student/", "rock__mode": "off"}
    third = rocks_out.make_run(tmp_path / "third", **same)
    build.report([made / "one", other, third], tmp_path / "r.html")


def test_rocks_of_another_teacher_are_refused(made, tmp_path):
    run = rocks_out.make_run(tmp_path / "run", teacher__path="models/other")
    with pytest.raises(workdirs.WorkdirError, match="teacher: 'teacher' and 'other'"):
        build.report([run], tmp_path / "r.html", rocks=made / "out")


@pytest.mark.parametrize(
    ("given", "named"), [({"rocks": "none"}, "rocks.json"), ({"sweep": "none"}, "sweep.json")]
)
def test_a_folder_of_something_else_is_named(made, tmp_path, given, named):
    with pytest.raises(workdirs.WorkdirError, match=f"has no {named}: expected .*; give another"):
        build.report([made / "one"], tmp_path / "r.html", **given)


def test_nothing_to_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no run and no sweep; expected .*; give RUN"):
        build.report([], tmp_path / "r.html")


def test_only_a_report_is_replaced(made, tmp_path):
    out = tmp_path / "r.html"
    build.report([made / "one"], out)
    first = out.read_bytes()
    build.report([made / "one"], out)
    assert out.read_bytes() == first  # the same files give the same bytes
    out.write_text("<!doctype html><p>mine")
    with pytest.raises(ValueError, match=r"exists and is no report: expected .*; give another"):
        build.report([made / "one"], out)
    assert out.read_text() == "<!doctype html><p>mine"
    with pytest.raises(ValueError, match=r"expected an \.html file"):
        build.report([made / "one"], tmp_path / "r.pdf")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="is no report"):
        build.report([made / "one"], tmp_path / "folder.html")


def test_a_moved_sweep_with_arguments_in_its_arms(made, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(made / "sweep", folder)
    told = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    old, arm = told["arms"][1]["arm"], told["arms"][1]
    (folder / old).rename(folder / "ema-k=2")
    arm |= {"arm": "ema:k=2", "masked_share": None}
    arm["runs"] = [f"elsewhere/ema-k=2/seed-{seed}" for seed in arm["seeds"]]
    for row in told["comparisons"]:
        row["arm"] = "ema:k=2" if row["arm"] == old else row["arm"]
    (folder / "sweep.json").write_text(json.dumps(told), encoding="utf-8")
    build.report([], tmp_path / "r.html", sweep=folder)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "ema:k=2" in page
    assert '<td data-label="masked"><span>–</span></td>' in page
    assert "seconds a step" in page


def test_a_sweep_alone_is_enough(made, tmp_path):
    build.report([], tmp_path / "new" / "r.html", sweep=made / "sweep")
    outline = parse(tmp_path / "new" / "r.html")
    assert sum(tag == "svg" for tag, _ in outline.tags) == 2 * 2


def test_runs_of_one_name_are_told_apart(made, tmp_path):
    runs = [rocks_out.make_run(tmp_path / parent / "run") for parent in "ab"]
    build.report(runs, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert all(f'<th scope="row">{run}</th>' in text for run in runs)


@pytest.mark.parametrize(
    ("text", "shown"), [(" a\n\n", "␣a⏎⏎"), ("\t", "⇥"), ("", "∅"), ("␣the", "␣the")]
)
def test_whitespace_is_made_visible(text, shown):
    assert page_data.visible(text) == shown


def test_numbers_that_json_lacks_become_nothing():
    assert [page_data.short(v) for v in (float("nan"), float("inf"), 1.234567, 3, None, True)] == [
        None,
        None,
        1.2346,
        3,
        None,
        True,
    ]


def test_a_damaged_table_is_named(made, tmp_path):
    out = rocks_out.make_out(tmp_path / "out")
    (out / "types.csv").write_text("token_id,token\n1,a\n")
    with pytest.raises(workdirs.WorkdirError, match=r"types\.csv cannot be read .*; expected the"):
        build.report([made / "one"], tmp_path / "r.html", rocks=out)
