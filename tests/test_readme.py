"""Every command in a ```bash block of README.md can run: it knows its flags and finds its files."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from packaging.requirements import InvalidRequirement, Requirement

from opd_jax import cli, config, processes
from opd_jax.data import batches
from opd_jax.run import assemble, initial, iteration

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\S*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPERATORS = {"&&", "||", ";", "|", "&"}
FOREIGN = {"cd", "git", "source", "tensorboard"}  # not ours, nothing of ours to check
OURS = ("scripts/", "configs/", "tests/", "opd_jax/", ".ci/")  # paths that the repository must hold


def commands(markdown: str) -> list[str]:
    """List the command lines of all bash blocks, continued lines joined, comments left out."""
    found = []
    for language, body in FENCE.findall(markdown):
        if language == "bash":
            lines = body.replace("\\\n", " ").splitlines()
            found += [text for line in lines if (text := line.strip()) and text[0] != "#"]
    return found


def split(line: str) -> list[list[str]]:
    """Split one line into its simple commands, without assignments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word in OPERATORS:
            parts.append([])
        elif word in {">", ">>", "<"}:
            next(words)
        elif parts[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            parts[-1].append(word)
    return [part for part in parts if part]


def flags_of(args: list[str]) -> list[str]:
    return [arg.partition("=")[0] for arg in args if arg.startswith("--")]


def unknown_flags(args: list[str], text: str) -> list[str]:
    """Name the flags among ``args`` that a help text does not mention as whole words."""
    known = set(re.findall(r"--[a-z][\w-]*", text))
    return [f"flag {flag} is not known" for flag in flags_of(args) if flag not in known]


def check_opd_jax(args: list[str], capsys) -> list[str]:
    """Check a command of ``opd-jax`` without running it: its flags, and the config it names."""
    if not args or args[0].startswith("-"):
        return [] if cli.main(args or ["--help"]) == 0 else [f"opd-jax {args} fails"]
    command, *rest = args
    rest, _ = processes.take_flags(rest)
    try:
        status = cli.main([command, "--help"])
    except SystemExit as stop:
        status = stop.code
    text = capsys.readouterr().out
    if status != 0:
        return [f"opd-jax has no command {command}"]
    if "--config" not in flags_of(rest):
        return unknown_flags(rest, text)
    plain = {flag: None for flag in re.findall(r"--([a-z][\w-]*)", text) if flag != "config"}
    try:
        given, _ = config.load(rest, **plain)
        config.resolve(given)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def check_script(path: str, args: list[str]) -> list[str]:
    """Check a script of this repository: it can be executed, and its flags stand in its help."""
    script = ROOT / path
    if not script.is_file():
        return [f"{path} does not exist"]
    if not script.stat().st_mode & 0o100:
        return [f"{path} is not executable"]
    first = script.read_text(encoding="utf-8").partition("\n")[0]
    if "python" in first:
        run = subprocess.run(
            [sys.executable, script, "--help"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        if run.returncode:
            return [f"{path} --help fails: {run.stderr[-300:]}"]
        return unknown_flags(args, run.stdout)
    run = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    if run.returncode:
        return [f"{path}: {run.stderr}"]
    if path == "scripts/test":  # its arguments are pytest's
        return []
    return unknown_flags(args, script.read_text(encoding="utf-8"))


def check_pip(args: list[str]) -> list[str]:
    """Check ``pip install`` arguments: requirements parse, files exist, extras are ours."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    bad = []
    words = iter(args)
    for word in words:
        if word in {"-r", "--requirement", "-c", "--constraint"}:
            name = next(words)
            bad += [] if (ROOT / name).is_file() else [f"{name} does not exist"]
        elif not word.startswith("-") and word != "install":
            try:
                wanted = Requirement(f"opd-jax{word[1:]}" if word[0] == "." else word)
            except InvalidRequirement as error:
                bad.append(f"pip install {word}: {error}")
                continue
            if wanted.name == "opd-jax":
                bad += [f"no extra {extra}" for extra in sorted(wanted.extras - extras.keys())]
    return bad


def problems(line: str, capsys) -> list[str]:
    """List what keeps a command line from running, as far as can be told without running it."""
    bad = []
    for words in split(line):
        name, args = words[0].removeprefix("./").removeprefix(".venv/bin/"), words[1:]
        if name in {"python", "python3"} and args and args[0].endswith(".py"):
            name, args = args[0], args[1:]
        if name == "opd-jax":
            bad += check_opd_jax(args, capsys)
        elif name.startswith(OURS):
            bad += check_script(name, args)
        elif name == "pip":
            bad += check_pip(args)
        elif name not in FOREIGN:
            bad.append(f"{name} is no command of this repository and not in FOREIGN")
        for value in (arg.rpartition("=")[2] if arg.startswith("--") else arg for arg in args):
            path = re.split(r"::|:", value)[0]
            if path.startswith(OURS) and not (ROOT / path).exists():
                bad.append(f"{path} does not exist")
    return bad


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def readme():
    return README.read_text(encoding="utf-8")


def test_every_command_of_the_readme_can_run(readme, capsys):
    lines = commands(readme)
    assert {"scripts/demo", "scripts/test"} <= {split(line)[0][0] for line in lines}
    bad = {line: found for line in lines if (found := problems(line, capsys))}
    assert bad == {}


def test_no_command_hides_in_a_block_of_another_name(readme):
    assert {language for language, _ in FENCE.findall(readme)} <= {"bash", "python", "text", "json"}


@pytest.mark.parametrize(
    "line",
    [
        "opd-jax --help",
        "opd-jax train --config=configs/demo.py:steps=20 --workdir=runs/x --config.optim.lr=1e-3",
        "XLA_FLAGS=--a=b .venv/bin/opd-jax export --workdir=runs/x --out=model > log.txt",
        "git clone https://example.org/x && cd x && scripts/demo runs/x",
        "scripts/test tests/test_readme.py::test_x -k demo",
        "scripts/fetch_smollm2.py --out=models/x --drop-layers=1,2",
        "pip install '.[tpu]' && pip install -r scripts/requirements.lock 'opd-jax[cuda]'",
    ],
)
def test_commands_that_run_are_accepted(line, capsys):
    assert problems(line, capsys) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("opd-jax fly", "no command fly"),
        ("opd-jax export --workdir=x --outt=y", "--outt"),
        ("opd-jax train --config=configs/nothing.py --workdir=x", "nothing.py"),
        ("opd-jax train --config=configs/demo.py:stepz=20 --workdir=x", "stepz"),
        ("opd-jax train --config=configs/demo.py --workdir=x --config.optim.lrr=1", "lrr"),
        ("opd-jax train --config=configs/demo.py --workdirr=x", "workdirr"),
        ("opd-jax train --config=configs/demo.py --workdir=x --config.train.prompts=-1", "prompts"),
        ("scripts/nothing", "does not exist"),
        ("scripts/setup.sh", "not executable"),
        ("scripts/fetch_smollm2.py --to=x", "--to"),
        ("scripts/demo --steps=3", "--steps"),
        ("scripts/test tests/test_nothing.py", "test_nothing.py"),
        ("pip install '.[gpu]'", "no extra gpu"),
        ("pip install -r scripts/nothing.txt", "does not exist"),
        ("cd x && opd_jax train", "no command of this repository"),
    ],
)
def test_commands_that_cannot_run_are_found(line, found, capsys):
    assert found in " ".join(problems(line, capsys))


def test_commands_are_read_from_bash_blocks_only():
    text = "```bash\n# note\na --x=1 \\\n  --y=2\n\nb\n```\n\n```text\nc\n```\n"
    assert [shlex.split(line) for line in commands(text)] == [["a", "--x=1", "--y=2"], ["b"]]


def blocks(markdown: str) -> list[str]:
    return [body for language, body in FENCE.findall(markdown) if language == "python"]


def test_the_step_of_the_readme_is_the_step_of_the_code(readme):
    (quoted,) = (body for body in blocks(readme) if body.startswith("def one_step"))
    shown, code = (
        ast.parse(quoted).body[0],
        ast.parse(inspect.getsource(iteration.one_step)).body[0],
    )
    assert isinstance(shown, ast.FunctionDef)
    assert isinstance(code, ast.FunctionDef)
    assert [arg.arg for arg in shown.args.args] == [arg.arg for arg in code.args.args]
    assert [ast.dump(line) for line in shown.body] == [ast.dump(line) for line in code.body[1:]]


def test_the_python_of_the_readme_runs(readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_run.use_one_device(monkeypatch)
    config_file = next(body for body in blocks(readme) if "def get_config" in body)
    distilled = [body for body in blocks(readme) if "opd_jax.distill" in body]
    scope: dict = {}
    exec(config_file, scope)
    given = scope["get_config"]()
    assert given.rock.mode == "ema"
    for body in distilled:
        exec(body, {})
    for name in ("python", "two-teachers"):
        assert (tmp_path / "runs" / name / "summary.json").is_file()


def test_a_loop_of_ones_own_is_the_runs(readme, tmp_path, monkeypatch):
    tiny_run.use_one_device(monkeypatch)
    folder = tiny_run.make_folder(tmp_path / "tiny")
    (loop,) = (body for body in blocks(readme) if "assemble.assemble" in body)
    assert tiny_run.train(folder, tmp_path / "run", train__steps=2) == 0
    leaves, _, _ = tiny_run.saved(folder, tmp_path / "run", train__steps=2)
    given, _ = config.load(tiny_run.argv(folder, tmp_path, train__steps=2)[1:], workdir=None)
    scope: dict[str, Any] = {
        "assemble": assemble,
        "initial": initial,
        "batches": batches,
        "config": config,
        "jax": jax,
        "iteration": iteration,
    }
    scope["get_config"] = lambda: given
    exec(loop, scope)
    assert int(scope["state"].step) == 2
    np.testing.assert_array_equal(leaves[".params['embed']"], scope["state"].params["embed"])
