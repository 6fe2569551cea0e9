"""The page's section of a knockout, from a summary of two families and through the command."""

import json
import re

import pytest
import rocks_out

from opd_jax import cli
from opd_jax.instrument.knockout import effects
from opd_jax.instrument.knockout.answered import Arm
from opd_jax.report import build
from opd_jax.store.workdir import WorkdirError

TOKENS = ("<script>", "␣\u0394", "1")  # what a page must not take for its own


def told(arm: Arm, effect: effects.Effect) -> dict:
    """A row as the command writes it."""
    (row,) = effects.judged([effect], 0.01)
    said = [{"token_id": 9, "token": "<b>", "share": 0.5}]
    row |= {"arm": arm.name, "ids": list(arm.ids), "tokens": [TOKENS[arm.ids[0]]], "changed": 40}
    row |= {"occurrences": 50, "second_half": False, "unparsed": 0.25, "down_unparsed": 3}
    row |= {"said": {"answers": 40, "banned": [], "substitutes": said, "different": 1}}
    if arm.window:
        row |= {"same_answer": 0.5, "said_later": 0.25, "rejoined": None}
    return row


@pytest.fixture
def folder(tmp_path):
    """A run and a knockout."""
    rocks_out.make_run(tmp_path / "run", seed=0)
    falls = effects.Effect(100, 40, 0.6, 0.5, -0.2, -0.3, -0.12, -0.5, -0.7, -0.3, 21, 1, 1e-5,
                           "McNemar, exact", 1e-4)  # fmt: skip
    same = effects.Effect(100, 40, 0.6, 0.5, 0.0, -0.04, 0.04, 0.0, -0.1, 0.1, 2, 2, 1.0,
                          "McNemar, exact", 1.0)  # fmt: skip
    single = [told(Arm(f"single {i}", "single", (i,)), e) for i, e in enumerate((falls, same))]
    local = [told(Arm("local 0", "local", (0,), 1), falls)]
    local += [told(Arm("local control 2", "local", (2,), 1), same)]
    several = [told(Arm("group mine, hungarian", "group", (0,)), falls)]
    several[0] |= {"tokens": ["<i>"] * 9, "second_half": True}
    both = [told(Arm("pair 0 1", "pair", (0,)), same)]
    score = {"answers": 40, "logp_banned": -0.5, "logp_substitute": -9.25}
    kl = {
        "kl_before": 0.25,
        "kl_after": 0.75,
        "change": 0.5,
        "low": 0.375,
        "high": 0.625,
        "p": 0.01,
    }
    ends = {"rho": -0.4, "low": -0.6, "high": -0.1, "p": 0.01, "p_adjusted": 0.02, "types": 30}
    summary = {
        "model": "run@4",
        "problems": 100,
        "settings": {"margin": 0.01},
        "baseline": {"accuracy": 0.6, "low": 0.5, "high": 0.69, "tokens": 900, "types": 40},
        "checks": {n: {"answers": 100, "off": 0} for n in ("null", "absent", "prefix")},
        "families": {
            name: effects.family(rows) | {"rows": rows}
            for name, rows in (
                *(("single", single), ("local", local)),
                *(("pair", both), ("group", several)),
            )
        },
        "teacher": "t<u>",
        "substitutions": {"single 0": score | kl, "local 0": score},
        "interactions": [
            {"ids": [0, 1], "delta": 0.125, "low": 0.0625, "high": 0.25, "p": 0.01}
            | {"p_adjusted": 0.015}
        ],
        "correlations": {"delta": [], "delta_held": [{"predictor": "frequency", **ends}]},
    }
    (tmp_path / "knockout").mkdir()
    (tmp_path / "knockout" / "knockout.json").write_text("{}")
    (tmp_path / "knockout" / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_the_page_says_what_was_found(folder):
    argv = [str(folder / "run"), f"--knockout={folder}/knockout", f"--out={folder}/page.html"]
    assert cli.main(["report", *argv]) == 0
    page = (folder / "page.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="knockout"') :]
    section = section[: section.index("</section>")]
    assert "Of 2 types that it may no longer say, one at a time, 1 cost it right" in section
    assert "-50.0 [-70.0, -30.0]" in section
    assert "1 at p 0.05 (0.1 by chance)" in section
    assert "-0.40 [-0.60, -0.10]" in section
    assert "50% of 80 answers still come to the baseline" in section
    assert '<a href="#knockout">Knockout</a>' in page
    several = re.search(r'<tr><th scope="row">group mine, hungarian</th>.*?</tr>', section)[0]
    assert "&lt;i&gt; and 1 more" in several
    assert "40 of the second half" in several
    assert "-20.0 [-30.0, -12.0]" in several
    assert '<tr><th scope="row">pair 0 1</th>' in section
    pair = re.search(r'<tr><th scope="row">&lt;script&gt; and ␣Δ</th>.*?</tr>', section)[0]
    assert "+12.5 [6.2, 25.0]" in pair
    assert "p 0.015" in pair
    rows = re.findall(r'<tr><th scope="row">&lt;script&gt;</th>.*?</tr>', section)
    scored = [re.sub("<[^>]*>", " ", row).split() for row in rows if "-9.25" in row]
    kept = ["40", "-0.50", "-9.25"]
    assert scored == [
        ["&lt;script&gt;", "single", *kept, "0.250", "0.750", "+0.500", "[0.375,", "0.625]"],
        ["&lt;script&gt;", "local", *kept, "–", "–", "–"],
    ]
    assert "What the teacher, t&lt;u&gt;, says of what is said instead" in section
    # Text of a model stays text.
    assert "&lt;script&gt;" in section
    assert "<b>" not in section.replace("<b></b>", "")
    assert "whether the tokens matter" not in page


def test_a_knockout_without_a_teacher_and_pairs_has_no_tables_of_them(folder):
    path = folder / "knockout" / "summary.json"
    summary = json.loads(path.read_text())
    for name in ("teacher", "substitutions", "interactions"):
        del summary[name]
    for name in ("pair", "group"):
        del summary["families"][name]
    path.write_text(json.dumps(summary))
    build.report([folder / "run"], folder / "page.html", knockout=folder / "knockout")
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "says of what is said instead" not in page
    assert "Several types together" not in page
    assert "more than the sum" not in page
    assert "what a teacher says of the substitutes: can be added with" in page


def test_without_one_the_page_says_how_to_add_it(folder):
    build.report([folder / "run"], folder / "page.html")
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert '<section id="knockout"' not in page
    assert "whether the tokens matter: can be added with <code>opd-jax knockout" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "that has ended"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"model": "x"}', "'problems' is missing"),
    ],
)
def test_what_is_no_knockout_is_refused(folder, content, message):
    path = folder / "knockout" / "summary.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(WorkdirError, match=message):
        build.report([folder / "run"], folder / "new.html", knockout=folder / "knockout")
    assert not (folder / "new.html").exists()
