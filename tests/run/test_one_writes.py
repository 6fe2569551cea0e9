"""Every command in two processes: the first one writes, and all end alike.

``layouts`` has another process fail that changes a file. Commands share their processes here, since
to start takes longest.
"""

import json

import layouts
import pytest
import tiny_run
from layouts import LAYOUTS

from opd_jax import cli

tiny = tiny_run.tiny
TOGETHER = """
from opd_jax import cli, processes
processes.join(processes.take_flags(sys.argv[1:])[1])
"""
# Where these are tested over two processes; what a harness writes is its own.
ELSEWHERE = {"export", "knockout", "lm-eval"}


def test_of_all_commands_one_process_writes(tiny, tmp_path):
    run, rocks = tmp_path / "run", tmp_path / "rocks"
    config = [f"--config={tiny / 'config.py'}", "--config.train.steps=2"]
    graded = [f"--config.eval.{key}" for key in ("every=1", "prompts=4", "kl_prompts=4")]
    tasks = tmp_path / "tasks.jsonl"
    tiny_run.write_lines(tasks, [{"question": f"{i} + 1 = ?", "answer": "7"} for i in range(4)])
    given = [f"--model={tiny / 'student'}", f"--prompts={tiny / 'prompts.jsonl'}"]
    answers = ["--max-new=4", "--limit=4"]
    commands = [
        ["train", *config, *graded, f"--workdir={run}"],
        ["table", f"--workdir={run}", f"--out={tmp_path / 'table' / 'types.csv'}"],
        ["generate", *given, f"--out={tmp_path / 'generated.jsonl'}", *answers],
        [
            *("eval", str(tiny / "student"), f"--tasks={tasks}", "--max-new=4", "--format=raw"),
            f"--out={tmp_path / 'graded'}",
        ],
        ["rocks", f"--run={run}", "--k=4", "--max-new=4", f"--out={rocks}"],
        ["sweep", *config, *graded, "--arms=full", "--seeds=1", f"--workdir={tmp_path / 'sweep'}"],
        ["figure", f"--workdir={run}", f"--out={tmp_path / 'drawn' / 'run.svg'}"],
        ["report", str(run), f"--rocks={rocks}", f"--out={tmp_path / 'page' / 'page.html'}"],
        ["plan", *config, "--topology=cpu:2", "--only=teacher", f"--out={tmp_path / 'plan.json'}"],
    ]
    assert {argv[0] for argv in commands} | ELSEWHERE == {*cli.COMMANDS}
    code = "".join(f"assert cli.main({argv!r}) == 0\n" for argv in commands[:-1])
    text = layouts.run(LAYOUTS["two-processes"], commands[-1], code=TOGETHER + code)
    assert text.count("wrote ") >= 2
    for name in ("table/types.csv", "drawn/run.svg", "page/page.html", "rocks/figures"):
        assert (tmp_path / name).exists(), text
    assert len(tiny_run.read_lines(tmp_path / "generated.jsonl")) == 4
    assert json.loads((tmp_path / "plan.json").read_text())
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert json.loads((run / "summary.json").read_text())["is_finished"]
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith((".part", ".partial"))]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("argv", "status", "told"),
    [
        (["report", "nowhere", "--out=page.html"], 1, "nowhere"),
        (["figure", "--workdir=nowhere", "--out=run.bmp"], 1, ".bmp"),
        (["report", "--out=x.html", "--colour=red"], 2, "--colour"),
    ],
)
def test_all_processes_end_as_the_first_one_does(argv, status, told):
    results = layouts.finish(layouts.start(LAYOUTS["two-processes"], argv))
    assert told in results[0][1], results
    assert results[0][0] == status, results
    assert results[1][0], results
    assert all("Traceback" not in text for _, text in results)
