"""The command ``opd-jax knockout``: what it measures, that it resumes, and what it refuses."""

import collections
import csv
import html
import json
import shutil
import signal
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import tiny_run

from opd_jax import cli
from opd_jax.data import tokenizer as tokenizers
from opd_jax.evaluate import results
from opd_jax.instrument.knockout import ledger, trials
from opd_jax.report import knockout_section, style
from opd_jax.store.workdir import WorkdirError

tiny, one_device = tiny_run.tiny, tiny_run.one_device
NUM, NEW, TEMPERATURE = 24, 8, 0.6
# Right is what holds the marked text: a type that decides, beside others that cannot matter.
GRADER = """
def holds(response, gold):
    return {mark!r} in response
"""
# What a child to be killed runs: hanging in the fourth batch of the arms.
CHILD = tiny_run.hanging_child(5, '{"arm": "single 3", "ta')


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{i} + {i + 2} = ?", "answer": "1"} for i in range(NUM)]
    tiny_run.write_lines(folder / "sums.jsonl", rows)
    return folder


def argv(tiny, task, out, *rest, **flags):
    given = {"model": tiny / "student", "tasks": task / "sums.jsonl", "out": out}
    given |= {"max-new": NEW, "batch": 16, "format": "raw", "effect": 1.0, "power": 0.2}
    given |= {name.replace("_", "-"): value for name, value in flags.items()}
    return ["knockout", *(f"--{k}={v}" for k, v in given.items()), *rest]


def knockout(tiny, task, out, **flags):
    return cli.main(argv(tiny, task, out, **flags))


def lines_of(out):
    return tiny_run.read_lines(out / ledger.LINES)


def summary_of(out):
    found = json.loads((out / ledger.SUMMARY).read_text())
    found.pop("time")
    return found


@pytest.fixture(scope="module")
def marked(tiny, task, tmp_path_factory):
    """Frequent types of the model's answers, and a grader that asks for the first of them."""
    out = tmp_path_factory.mktemp("plan") / "plan"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        # The greedy answers of a random model are all alike.
        flags = {"types": "5", "temperature": TEMPERATURE, "samples": 2}
        assert cli.main(argv(tiny, task, out, "--plan", **flags)) in (0, 1)
    lines = lines_of(out)
    tokenizer = tokenizers.load(str(tiny / "student"))
    held = collections.Counter(i for line in lines for i in {*line["ids"]})
    found = [i for i, count in held.most_common() if count >= 2]
    marks = [i for i in found if tokenizer.decode([i]).strip().isalpha()]
    (task / "own.py").write_text(GRADER.format(mark=tokenizer.decode(marks[:1])))
    return [marks[0], *(i for i in found if i != marks[0])][:6]


@pytest.fixture(scope="module")
def flags(task, marked):
    types = ",".join(map(str, marked))
    return {
        "types": types,
        "temperature": TEMPERATURE,
        "samples": 2,
        "grader": f"{task}/own.py:holds",
        "arms": "all",
        "top": 4,
        "local": 2,
        "pairs": 2,
        "orders": 1,
    }


@pytest.fixture(scope="module")
def census(tiny, task, flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("census") / "census"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        before = trials.compiles()
        assert knockout(tiny, task, out, **flags) == 0
        assert trials.compiles() - before == 1  # of all arms and the baseline
    return out


def whole(lines):
    """Ids of every answer, with what an arm shares with the baseline put before its own."""
    base = {(x["task"], x["index"], x["sample"]): x["ids"] for x in lines if x["arm"] == "baseline"}
    return base, [
        (line, [*base[line["task"], line["index"], line["sample"]][: line["start"]], *line["ids"]])
        for line in lines
    ]


def test_bans_hold_and_answers_are_the_baselines_before_them(census):
    lines = lines_of(census)
    base, answers = whole(lines)
    arms = {
        row["arm"]: row
        for family in summary_of(census)["families"].values()
        for row in family["rows"]
    }
    assert len(base) == 2 * NUM
    seen = collections.Counter()
    for line, ids in answers:
        assert len(ids) == line["tokens"] <= NEW
        row = arms.get(line["arm"])
        old = base[line["task"], line["index"], line["sample"]]
        if row is None:
            if line["arm"] != "baseline":
                assert ids == old
            continue
        seen[line["arm"]] += 1
        assert ids[: line["start"]] == old[: line["start"]]
        assert old[line["start"]] in row["ids"]
        assert ids[line["start"]] not in row["ids"]
        if not line["arm"].startswith("local"):
            assert not {*ids} & {*row["ids"]}
            assert not {*old[: line["start"]]} & {*row["ids"]}
    assert seen == {name: row["changed"] for name, row in arms.items()}


def test_only_answers_that_hold_a_type_are_decoded_and_all_of_them(census):
    base, _ = whole(lines_of(census))
    found = summary_of(census)
    for row in found["families"]["single"]["rows"]:
        (token,) = row["ids"]
        assert row["changed"] == sum(token in ids for ids in base.values())
        assert row["occurrences"] == sum(ids.count(token) for ids in base.values())
        assert row["held"] == len({key[:2] for key, ids in base.items() if token in ids})


def test_a_planted_effect_is_found_and_a_planted_null_is_not(census, marked):
    """The grader asks for one type: its ban fells what held it, no other ban can fell as much."""
    rows = summary_of(census)["families"]["single"]["rows"]
    planted, *others = rows
    assert planted["ids"] == marked[:1]
    assert planted["category"] == "strong cornerstone"
    assert planted["delta_held"] == pytest.approx(-planted["base_held"])
    assert planted["up"] == 0
    assert planted["low"] < planted["delta"] < planted["high"] < 0
    for row in others:
        assert "cornerstone" not in row["category"]
        assert row["category"] == "undecided"  # 24 problems cannot say neutral


def test_the_summary_says_what_was_checked_and_what_was_said_instead(census, marked):
    found = summary_of(census)
    assert found["checks"]["null"] == {"answers": 2 * NUM, "off": 0}
    assert found["checks"]["absent"]["answers"] == 16
    assert found["checks"]["prefix"]["answers"] > 100
    assert found["families"].keys() == {"single", "control", "local", "pair", "cumulative"}
    row = found["families"]["single"]["rows"][0]
    assert row["said"]["banned"] == [
        {"token_id": marked[0], "token": row["tokens"][0], "share": 1.0}
    ]
    assert marked[0] not in [x["token_id"] for x in row["said"]["substitutes"]]
    local = found["families"]["local"]["rows"][0]
    assert 0 <= local["same_answer"] <= 1
    assert 0 <= local["rejoined"] < 1
    with (census / ledger.CENSUS).open() as stream:
        table = list(csv.DictReader(stream))
    assert [int(x["token_id"]) for x in table if x["family"] == "single"] == marked[:4]
    assert float(table[0]["delta"]) == pytest.approx(row["delta"], rel=1e-5)
    assert table[0]["category"] == "strong cornerstone"


def test_greedy_orders_are_chosen_on_other_problems_than_they_are_measured_on(census):
    rows = summary_of(census)["families"]["cumulative"]["rows"]
    greedy = [row for row in rows if row["second_half"]]
    assert {row["problems"] for row in greedy} == {NUM // 2}
    assert {row["problems"] for row in rows if not row["second_half"]} == {NUM}
    assert greedy[0]["arm"] == "cornerstones first, first 1"


def test_the_page_has_a_section_of_it(census, tmp_path):
    with matplotlib.rc_context(style.STYLE):
        told = str(knockout_section.section(census))
        assert "whether the tokens matter" in str(knockout_section.section(None).absent)
    found = summary_of(census)
    single = found["families"]["single"]
    assert f"Of {single['arms']} types that it may no longer say" in told
    assert html.escape(single["rows"][0]["tokens"][0]) in told
    for words in (
        "Which types change the answers?",
        "Does one place decide?",
        "strong cornerstone",
    ):
        assert words in told
    checked = found["checks"]["prefix"]["answers"]
    assert f"{checks_of(found)} under a ban of types that they do not hold" in told
    assert f"{checked:,} leave it at the first banned token" in told
    damaged = tmp_path / "damaged"
    shutil.copytree(census, damaged)
    with matplotlib.rc_context(style.STYLE):
        for family in ({}, {"single": {"rows": []}}, {"single": 3}):
            content = json.dumps(found | {"families": family, "time": ""})
            (damaged / ledger.SUMMARY).write_text(content)
            if family:
                with pytest.raises(WorkdirError, match=r"summary\.json"):
                    knockout_section.section(damaged)
        (damaged / ledger.SUMMARY).unlink()
        with pytest.raises(WorkdirError, match="an opd-jax knockout that has ended"):
            knockout_section.section(damaged)


def checks_of(found):
    return f"{found['checks']['absent']['answers']:,}"


@pytest.mark.usefixtures("one_device")
def test_the_baseline_is_what_eval_says(tiny, task, census, flags, tmp_path):
    given = {"tasks": task / "sums.jsonl", "out": tmp_path / "e", "max-new": NEW, "format": "raw"}
    given |= {k: flags[k] for k in ("temperature", "samples", "grader")}
    argv = ["eval", str(tiny / "student"), *(f"--{k}={v}" for k, v in given.items())]
    assert cli.main(argv) == 0
    ours = {(x["index"], x["sample"]): x for x in lines_of(census) if x["arm"] == "baseline"}
    theirs = tiny_run.read_lines(tmp_path / "e" / results.LINES)
    assert len(theirs) == len(ours)
    for line in theirs:
        own = ours[line["index"], line["sample"]]
        assert own["response"] == line["response"]
        assert own["correct"] == line["correct"]


def test_a_killed_knockout_goes_on_to_the_same_bytes(
    tiny, task, census, flags, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *argv(tiny, task, out, **flags)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if "HANGS" in line:
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = (out / ledger.LINES).read_bytes()
    assert not done.endswith(b"\n")
    assert not (out / ledger.SUMMARY).exists()
    tiny_run.use_one_device(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials.Trials, "read", None)  # another knockout: nothing is decoded
        assert knockout(tiny, task, out, **(flags | {"temperature": 0.7})) == 1
    assert "temperature was 0.6 and is 0.7" in capsys.readouterr().err
    assert (out / ledger.LINES).read_bytes() == done
    assert knockout(tiny, task, out, **flags, slots=5) == 0
    assert f"{out} has 80 answers: going on" in capsys.readouterr().out
    assert (out / ledger.LINES).read_bytes() == (census / ledger.LINES).read_bytes()
    assert summary_of(out) == summary_of(census)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials.Trials, "read", None)  # a finished one decodes nothing
        assert knockout(tiny, task, out, **flags) == 0
    assert "to decode: nothing" in capsys.readouterr().out


def test_on_eight_devices_in_slots_the_answers_are_the_same(tiny, task, census, flags, tmp_path):
    given = flags | {"mesh_model": 2, "mesh_fsdp": 2, "slots": 4}
    assert knockout(tiny, task, tmp_path / "eight", **given) == 0
    assert lines_of(tmp_path / "eight") == lines_of(census)
    ours, theirs = summary_of(tmp_path / "eight"), summary_of(census)
    assert ours["families"] == theirs["families"]


@pytest.mark.usefixtures("one_device")
def test_batch_and_other_arms_change_no_answer(tiny, task, census, flags, tmp_path):
    assert knockout(tiny, task, tmp_path / "five", **(flags | {"arms": "single", "batch": 5})) == 0
    few, many = (
        {ledger.key_of(x): x["ids"] for x in lines_of(out)} for out in (tmp_path / "five", census)
    )
    shared = few.keys() & many.keys()  # which answers are tried without their type may differ
    assert len(shared) > 4 * NUM
    assert all(few[key] == many[key] for key in shared)


@pytest.mark.usefixtures("one_device")
def test_a_teacher_reads_what_is_there(tiny, task, census, flags, tmp_path, monkeypatch, capsys):
    shutil.copytree(census, tmp_path / "read")
    monkeypatch.setattr(trials.Trials, "read", None)  # nothing is decoded again
    given = flags | {"teacher": tiny / "teacher"}
    assert knockout(tiny, task, tmp_path / "read", **given) == 0
    said, found = capsys.readouterr().out, summary_of(tmp_path / "read")
    assert len(found["substitutions"]) == len(
        [row for name in ("single", "local") for row in found["families"][name]["rows"]]
    )
    for name, row in found["substitutions"].items():
        assert name in said
        assert row["logp_banned"] < 0
        assert row["logp_substitute"] < 0
        if "change" in row:
            assert row["change"] == pytest.approx(row["kl_after"] - row["kl_before"], abs=0.5)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("null", "a ban of ids that cannot occur changed 1 of 24 answers"),
        ("absent", "a ban of types that the baseline's answer does not hold changed 1 of"),
        ("single", "before, or not at, the first banned id a ban changed 1 of"),
    ],
)
def test_an_answer_that_is_off_is_refused(
    tiny, task, marked, tmp_path, monkeypatch, capsys, arm, message
):
    """As if one row of the program were computed otherwise than the baseline's."""
    answer, hit = trials.Trials.answer, []

    def broken(self, prefix, rows, jobs):
        found = answer(self, prefix, rows, jobs)
        for place, job in enumerate(jobs):
            if job.arm.family == arm and job.differs > 1 and not hit:
                hit.append(job)
                ids = np.array(found.ids_BT)
                ids[place, 0] = 7
                return found.replace(ids_BT=ids)
        return found

    monkeypatch.setattr(trials.Trials, "answer", broken)
    given = {"arms": "single", "types": ",".join(map(str, marked)), "temperature": 0.6}
    assert knockout(tiny, task, tmp_path / arm, **given, power=0.01) == 1
    assert message in capsys.readouterr().err
    assert len(hit) == 1
    assert not (tmp_path / arm / ledger.SUMMARY).exists()


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"types": "700"}, "--types has id 700: expected 0 to"),
        ({"types": "no.csv"}, "--types=no.csv is no file"),
        ({"tasks": "no.jsonl"}, "task 'no.jsonl' does not exist"),
        ({"arms": "single,pairs"}, "--arms names 'pairs': expected some of single"),
        ({"arms": ""}, "--arms names 'nothing'"),
        ({"groups": "paper"}, "without the family group"),
        ({"arms": "group"}, "the family group has no lists in 0,1,2"),
        ({"margin": 0}, "margin is 0.0: expected a share above 0"),
        ({"window": 0}, "window is 0: expected 1 or more"),
        ({"slots": 17}, "slots is 17 for batches of 16 rows"),
        ({"samples": 2, "temperature": 0}, "samples is 2 and temperature 0"),
        ({"teacher": "nowhere"}, "'nowhere' is no model"),
        ({"max_new": 64}, "max-new is 64: expected below the 64 positions"),
        ({"effect": 0.001}, "too few problems: 24 of them"),
    ],
)
def test_bad_input_is_one_message(tiny, task, marked, tmp_path, capsys, changed, message):
    given = {"types": ",".join(map(str, range(600))), "arms": "single"}
    given |= {"temperature": TEMPERATURE} | changed
    assert knockout(tiny, task, tmp_path / "out", **given) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / ledger.SUMMARY).exists()


@pytest.mark.usefixtures("one_device")
def test_types_that_never_occur_are_refused(tiny, task, tmp_path, capsys):
    assert knockout(tiny, task, tmp_path / "out", types="5", temperature=TEMPERATURE, limit=2) == 1
    assert "none of 1 types occurs" in capsys.readouterr().err


def test_another_folder_is_left_alone(tiny, task, tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    assert knockout(tiny, task, tmp_path, types="5") == 1
    assert "holds 'mine' and no knockout.json" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
    for place in (tmp_path / "mine", tmp_path / "mine" / "below"):
        assert knockout(tiny, task, place, types="5") == 1
        assert f"{place} is, or lies below, a file" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "kept"
