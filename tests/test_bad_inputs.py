"""Some of the bad inputs of ``bad_inputs``; ``.ci/run`` tries all of them."""

import collections
import subprocess
import sys
from pathlib import Path

import bad_inputs
import pytest

TESTED = [sys.executable, bad_inputs.__file__]


def tried(*flags: str) -> tuple[int, list[str]]:
    done = subprocess.run([*TESTED, *flags], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("flags", [["--every", "37"], ["--part", "generate, template"]], ids=str)
def test_bad_inputs_end_in_a_clear_error(flags):
    status, lines = tried(*flags)
    *cases, total = lines
    kinds = collections.Counter(line.split()[1] for line in cases)
    assert kinds["clear"] >= 9, total
    assert status == 0, [line for line in cases if line.split()[1] not in ("clear", "accepted")]
    for line in cases:
        number, kind, _, rest = line.split(maxsplit=3)
        assert kind == "accepted" or "opd-jax" in rest or "usage" in rest, (number, rest)


def test_the_names_of_the_cases_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = collections.Counter(name for name, _, _ in bad_inputs.cases())
    assert names.total() > 500
    assert [name for name, count in names.items() if count > 1] == []
    assert Path(bad_inputs.__file__).is_file()
