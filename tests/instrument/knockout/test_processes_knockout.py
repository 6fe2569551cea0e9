"""A knockout over two processes in slots, and over one in step: the same conclusions."""

import collections
import json

import layouts
import tiny_run
from layouts import LAYOUTS

from opd_jax.instrument.knockout import ledger

tiny = tiny_run.tiny
NUM = 24


def test_two_processes_write_what_one_does(tiny, tmp_path):
    tiny_run.write_lines(
        tmp_path / "sums.jsonl",
        [{"question": f"{i} + {i + 2} = ?", "answer": "1"} for i in range(NUM)],
    )
    (tmp_path / "own.py").write_text(
        "def even(text, gold):\n    return sum(map(ord, text)) % 2 == 0\n"
    )
    argv = ["knockout", f"--model={tiny / 'student'}", f"--tasks={tmp_path / 'sums.jsonl'}"]
    argv += [f"--grader={tmp_path / 'own.py'}:even", "--max-new=8", "--batch=16", "--format=raw"]
    argv += ["--temperature=0.6", "--samples=2", "--effect=1", "--power=0.2", "--top=2"]
    argv += ["--arms=single,local", "--local=1"]
    tokens = tmp_path / "plan"
    # None of these occurs, and the answers without a ban are kept.
    layouts.run(LAYOUTS["one"], [*argv, "--types=5,6,7", f"--out={tokens}", "--plan"], status=1)
    lines = tiny_run.read_lines(tokens / ledger.LINES)
    held = collections.Counter(i for line in lines for i in {*line["ids"]})
    types = ",".join(str(i) for i, _ in held.most_common(2))  # others are held by too few problems
    found = {}
    for name in ("one", "two-processes"):
        out = tmp_path / name
        flags = [
            f"--types={types}",
            f"--out={out}",
            *(["--mesh-fsdp=2", "--slots=8"] * (name != "one")),
        ]
        text = layouts.run(LAYOUTS[name], [*argv, *flags])
        assert str(out) in text
        summary = json.loads((out / ledger.SUMMARY).read_text())
        summary.pop("time")
        lines = tiny_run.read_lines(out / ledger.LINES)
        found[name] = (summary, [{k: v for k, v in line.items() if k != "logp"} for line in lines])
    (one, one_lines), (two, two_lines) = found["one"], found["two-processes"]
    assert len(one_lines) > 2 * NUM + 10  # arms beside the baseline
    assert [line["ids"] for line in one_lines] == [line["ids"] for line in two_lines]
    assert one_lines == two_lines
    assert {*one} == {*two}
    assert one == two
