"""Bad inputs, tried on every command: ``python tests/bad_inputs.py [--part TEXT] [--every N]``.

A case is a command line on a copy of a good folder in which one thing was damaged. Each runs in a
process of its own (forked, so that nothing is imported twice) within bounds of time and memory, and
ends in one of: ``clear``, a message and a status other than 0; ``accepted``; ``traceback``;
``hang``, nothing for a minute; ``killed``, mostly by memory. It tries whatever ``opd_jax`` is
imported, so that two versions can be compared. The exit status is 1 after any of the last three.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HANG_S, NUM_BYTES = 60, 12 << 30
Damage = Callable[[Path], None]
CONFIG = """
from opd_jax import config


def get_config(arg=""):
    c = config.defaults()
    c.student.path, c.teacher.path = "student", "teacher"
    c.data.prompts = c.data.heldout = "prompts.jsonl"
    c.data.max_prompt, c.rollout.samples, c.rollout.max_new = 48, 2, 6
    c.train.prompts, c.train.steps, c.checkpoint.every = 4, 2, 0
    return c
"""
TRAIN = ["train", "--config=config.py", "--workdir=new"]
RESUME = ["train", "--config=config.py", "--workdir=run", "--config.train.steps=3"]
ROCKS = [
    *("rocks", "--student=run", "--teacher=teacher", "--prompts=prompts.jsonl", "--out=out"),
    *("--max-new=6", "--samples=2", "--batch=4"),
]
COMMANDS = {
    "resume": RESUME,
    "export": ["export", "--workdir=run", "--out=exported"],
    "table": ["table", "--workdir=run", "--out=table.csv"],
    "report": ["report", "run", "--out=report.html"],
    "figure": ["figure", "--workdir=run", "--out=figure.png"],
    "rocks": ROCKS,
}
GENERATE = [
    "generate",
    "--model=student",
    "--prompts=prompts.jsonl",
    "--out=answers.jsonl",
    "--max-new=6",
]
KNOCKOUT = [
    *("knockout", "--model=student", "--tasks=prompts.jsonl", "--types=types.json", "--out=out"),
    *("--max-new=6", "--batch=4", "--arms=single", "--effect=1"),
]
DEEP = "[" * 100_000 + "]" * 100_000


def text(name: str, value: str | bytes) -> Damage:
    """Replace a file."""
    data = value.encode() if isinstance(value, str) else value
    return lambda folder: _put(folder / name, data)


def field(name: str, *keys: str, value: Any) -> Damage:
    """Set a field of a JSON file (of the last line of a JSONL file)."""

    def damage(folder: Path) -> None:
        path = folder / name
        lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
        document = owner = json.loads(lines[-1])
        for key in keys[:-1]:
            owner = owner[key]
        if value is KeyError:
            owner.pop(keys[-1], None)
        else:
            owner[keys[-1]] = value
        _put(path, "\n".join([*lines[:-1], json.dumps(document), ""]).encode())

    return damage


def special(name: str, target: str) -> Damage:
    """Put a device, a folder or a pipe where a file was."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        if target == "pipe":
            os.mkfifo(path)
        elif target == "folder":
            path.mkdir()
        else:
            path.symlink_to(target)

    return damage


def _put(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # it may be linked to the good one
    path.write_bytes(data)


def cases() -> Iterator[tuple[str, list[str], Damage]]:
    """(name, command line, what to damage first) of every case."""
    nothing: Damage = lambda folder: None  # noqa: E731
    yield from _of_flags(nothing)
    yield from _of_run_files()
    yield from _of_models()
    yield from _of_knockout(nothing)
    for name, body in {
        "prompts: not JSON": "x\n",
        "prompts: a number": "3\n",
        "prompts: empty": "",
        "prompts: deep": DEEP + "\n",
        "prompts: no prompt": '{"answer": "1"}\n',
        "prompts: messages of numbers": '{"messages": [1, 2]}\n',
        "prompts: role of list": '{"messages": [{"role": [], "content": "x"}]}\n',
        "prompts: content null": '{"messages": [{"role": "user", "content": null}]}\n',
        "prompts: surrogate": '{"prompt": "\\ud800"}\n',
        "prompts: huge": json.dumps({"prompt": "1 " * 3_000_000}) + "\n",
        "prompts: large": json.dumps({"prompt": "1 " * 500_000}) + "\n",
        "prompts: not utf-8": b"\xff\xfe\x00x\n",
        "prompts: answer of dict": '{"prompt": "1", "answer": {}}\n',
    }.items():
        for command in (TRAIN, GENERATE):
            yield f"{command[0]} {name}", command, text("prompts.jsonl", body)
    yield from _of_completions()
    for target in ("/dev/zero", "pipe", "folder"):
        yield f"prompts: {target}", TRAIN, special("prompts.jsonl", target)
        yield f"config: {target}", TRAIN, special("config.py", target)
    for name, line in {
        "raises": "1 / 0",
        "exits": "raise SystemExit(3)",
        "import": "import nothing_like_this",
        "unknown key": "c.train.stepz = 3",
        "dict": "c = {}",
        "none": "c = None",
        "buckets of text": "c.rollout.buckets = ('a', 2)",
        "buckets of lists": "c.rollout.buckets = ((1,),)",
        "bias of text": "c.rollout.bias = 'x'",
        "bias of numbers": "c.rollout.bias = (1, 2)",
        "template of text": "c.data.template = 'x'",
        "template of numbers": "c.data.template = (1, 2)",
        "group of number": "c.optim = 3",
        "recursion": "get_config()",
        "nan": "c.optim.lr = float('nan')",
    }.items():
        body = CONFIG.replace("    return c", f"    {line}\n    return c")
        yield f"config file: {name}", TRAIN, text("config.py", body)
    yield "config file: syntax", TRAIN, text("config.py", "(((")
    yield "config file: empty", TRAIN, text("config.py", "")
    yield "config file: binary", TRAIN, text("config.py", b"\x00\xff" * 100)


def _of_completions() -> Iterator[tuple[str, list[str], Damage]]:
    whole = {"prompt": "1 + 1 = ?", "completion": "2"}
    for stage in ("off_policy", "mixed"):
        command = [*TRAIN, f"--config.train.stage={stage}", "--config.kl.direction=forward"]
        for what, row in {
            "none": {"prompt": "1"},
            "empty": whole | {"completion": ""},
            "a number": whole | {"completion": 2},
            "without a prompt": {"completion": "2"},
            "surrogate": whole | {"completion": "\ud800"},
            "huge": whole | {"completion": "1 " * 3_000_000},
            "ids empty": whole | {"completion_ids": []},
            "ids of text": {"prompt": "1", "completion_ids": "12"},
            "ids outside": {"prompt": "1", "completion_ids": [10**6]},
            "ids below 0": {"prompt": "1", "completion_ids": [-1]},
            "ids too large": {"prompt": "1", "completion_ids": [10**30]},
            "ids of floats": {"prompt": "1", "completion_ids": [1.5]},
            "ids nested": {"prompt": "1", "completion_ids": [[1]]},
            "ids of another text": whole | {"completion_ids": [5, 6, 7]},
            "prompt ids outside": {"prompt_ids": [10**6], "completion": "2"},
            "prompt ids of another text": whole | {"prompt_ids": [5, 6]},
            "stop inside": {"prompt": "1", "completion_ids": [2, 2, 2]},
        }.items():
            lines = (json.dumps(row) + "\n") * 12
            yield f"{stage} completion {what}", command, text("prompts.jsonl", lines)
    for name in ("command.json", "answers.jsonl"):
        for what, body in {"empty": "", "text": "x\n", "number": "3\n", "object": "{}\n"}.items():

            def half(folder: Path, name=name, body=body) -> None:
                (folder / "answers.jsonl.partial").mkdir()
                _put(folder / "answers.jsonl.partial" / name, body.encode())

            yield f"generate, {name} {what}", GENERATE, half
    for flag in ("columns", "template"):
        for bad in ("x", "[]", "3", '{"prompt": 3}', '{"prompt": {}}', '{"a": [1]}', DEEP[:5000]):
            yield f"generate --{flag}={bad[:20]}", [*GENERATE, f"--{flag}={bad}"], lambda f: None


def _of_flags(nothing: Damage) -> Iterator[tuple[str, list[str], Damage]]:
    from opd_jax import config

    for key, value in config.flatten(config.defaults()).items():
        wrong: list[Any] = []
        if isinstance(value, bool):
            wrong = ["maybe"]
        elif isinstance(value, int):
            wrong = ["x", "1.5", 10**12, -7]
        elif isinstance(value, float):
            wrong = ["x", "nan", "inf", -3e9]
        elif isinstance(value, tuple):
            wrong = ["x", "('a',)", "3"]
        elif key not in ("log.wandb",):
            wrong = ["/dev/null/x"]
        for bad in wrong:
            yield f"train {key}={bad}", [*TRAIN, f"--config.{key}={bad}"], nothing
    for key in ("rollout.samples", "rollout.max_new", "train.prompts", "data.max_prompt"):
        yield f"train {key}=10^9", [*TRAIN, f"--config.{key}={10**9}"], nothing
    for flag in ("max-new", "samples", "batch", "limit", "seed", "temperature"):
        for bad in ("x", "-1", str(10**9), str(10**12)):
            if (flag, bad) not in (("seed", str(10**9)), ("limit", str(10**9))):
                yield f"generate --{flag}={bad}", [*GENERATE, f"--{flag}={bad}"], nothing
    for flag in ("max-new", "samples", "batch", "top", "bootstrap", "problems", "data"):
        for bad in ("x", "-1", str(10**9), str(10**12)):
            yield f"rocks --{flag}={bad}", [*ROCKS, f"--{flag}={bad}"], nothing
    sweep = ["sweep", "--config=config.py", "--arms=a", "--workdir=swept"]
    for extra in (["--seeds=0"], ["--seeds=1000000000"], ["--baseline=z"], ["--arms=a,a"], ["--x"]):
        yield f"sweep {extra}", [*sweep, *extra], nothing
    for extra in ("--step=7", "--step=-1", "--step=x", "--out=run", "--workdir=nowhere"):
        for name in ("export", "table"):
            yield f"{name} {extra}", [*COMMANDS[name], extra], nothing
    for line in (
        ["report", "nowhere", "--out=r.html"],
        ["report", "--rocks=student", "--out=r.html"],
        ["report", "--sweep=run", "--out=r.html"],
        ["report", "run", "--out=no/where/r.html"],
        ["figure", "--workdir=student", "--out=f.png"],
        ["figure", "--workdir=run", "--out=f.txt"],
        ["generate", "--model=teachre", "--prompts=prompts.jsonl", "--out=x"],
        ["generate", "--model=student", "--prompts=no", "--out=x"],
        ["nothing"],
        ["train", "--config", "--workdir=new"],
    ):
        yield " ".join(line), line, nothing


def _of_run_files() -> Iterator[tuple[str, list[str], Damage]]:
    record = next(iter(sorted(Path("run/checkpoints").glob("[0-9]*/record.json"))), None)
    names = ["run.json", "summary.json", "metrics.jsonl", "samples.jsonl"]
    names += [str(record.relative_to("run"))] if record else []
    for name in names:
        bodies = {
            "empty": "",
            "cut": '{"a": [1, 2',
            "list": "[]\n",
            "number": "3\n",
            "null": "null\n",
            "deep": DEEP + "\n",
            "empty object": "{}\n",
            "not utf-8": b"\xff\xfe{}\n",
            "numbers": '{"step": "x", "steps": [], "config": 3, "samples": 7, "before": 2}\n',
        }
        readers = ["resume", "export", "report"]
        readers += {"run.json": ["table", "rocks"], "metrics.jsonl": ["figure"]}.get(name, [])
        for reader in readers:
            for what, body in bodies.items():
                yield f"{reader}, {name} {what}", COMMANDS[reader], text(f"run/{name}", body)
    for keys in (["rocks"], ["after"], ["before"], ["median_s"], ["is_finished"], ["steps"]):
        for value in (None, "x", 3, [3], {"a": []}, KeyError):
            damage = field("run/summary.json", *keys, value=value)
            yield f"report, summary {keys} {value}", COMMANDS["report"], damage
    for value in (None, "x", [], {}, KeyError):
        for reader in ("resume", "report"):
            damage = field("run/metrics.jsonl", "step", value=value)
            yield f"{reader}, metrics step {value}", COMMANDS[reader], damage


def _of_knockout(nothing: Damage) -> Iterator[tuple[str, list[str], Damage]]:
    for flag in (
        *("top", "local", "window", "pairs", "orders", "samples", "max-new", "batch", "limit"),
        *("seed", "temperature", "margin", "effect", "power"),
    ):
        for bad in ("-1", str(10**12)):
            yield f"knockout --{flag}={bad}", [*KNOCKOUT, f"--{flag}={bad}"], nothing
    for extra in (
        *("--types=19,640", "--types=-1", "--types=no.csv", "--types=", "--types=1,,2"),
        *("--groups=no.json", "--arms=no", "--arms=", "--teacher=no", "--model=no", "--tasks="),
        *(
            "--out=run",
            "--margin=nan",
            "--top=x",
            "--grader=no",
            "--template=x",
            "--arms=group",
            "--mesh-model=7",
        ),
    ):
        yield f"knockout {extra}", [*KNOCKOUT, extra], nothing
    for what, body in {
        "empty": "",
        "not utf-8": b"\xff\xfe\x00",
        "deep": DEEP,
        "a number": "3",
        "nothing": "{}",
        "empty list": '{"a": []}',
        "lists of lists": '{"a": [[1]]}',
        "another place": '{"../run": {"types": 3}}',
        "huge id": f"[{10**30}]",
        "text": '{"a": "19"}',
        "surrogate": '["\\ud800"]',
    }.items():
        yield f"knockout types {what}", KNOCKOUT, text("types.json", body)
    table = [*KNOCKOUT, "--types=types.csv"]
    for what, body in {
        "empty": "",
        "not utf-8": b"token_id\n\xff\xfe\n",
        "no column": "id,token\n3,x\n",
        "no number": "token_id\nx\n",
        "huge": f"token_id\n{10**30}\n",
        "other token": "token_id,token\n19,zebra\n",
        "cut row": "token,token_id\nx\n",
        "NUL": "token_id\n\0\n",
        "huge field": f"token_id\n{'1' * 200_000}\n",
    }.items():
        yield f"knockout table {what}", table, text("types.csv", body)
    for target in ("/dev/zero", "pipe", "folder"):
        yield f"knockout types {target}", KNOCKOUT, special("types.json", target)
    for what, body in {"not JSON": "x\n", "no answer": '{"prompt": "1"}\n', "deep": DEEP}.items():
        yield f"knockout tasks {what}", KNOCKOUT, text("prompts.jsonl", body)


def _of_models() -> Iterator[tuple[str, list[str], Damage]]:
    config = "student/config.json"
    for key in (
        *("model_type", "architectures", "hidden_size", "num_hidden_layers", "vocab_size"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters"),
        *("rms_norm_eps", "tie_word_embeddings", "intermediate_size", "eos_token_id"),
    ):
        for value in (None, "x", 0, -1, 10**9, [], {"a": 1}):
            yield f"{config} {key}={value}", TRAIN, field(config, key, value=value)
    for file in ("config", "tokenizer", "tokenizer_config", "generation_config"):
        for what, body in {"list": "[]", "empty": "", "deep": DEEP, "text": "hello"}.items():
            yield f"{file} {what}", TRAIN, text(f"student/{file}.json", body)
        for target in ("/dev/zero", "pipe"):
            yield f"{file} {target}", TRAIN, special(f"student/{file}.json", target)
    weights = "student/model.safetensors"
    for target in ("/dev/zero", "pipe", "folder"):
        yield f"weights {target}", TRAIN, special(weights, target)
    yield "weights cut", TRAIN, lambda f: _put(f / weights, (f / weights).read_bytes()[:-9])
    yield "weights head", TRAIN, text(weights, b"\xff" * 64)
    for names in ("../teacher/model.safetensors", "/etc/passwd", 3, None, {}, "no.safetensors"):
        index = {"weight_map": {"model.embed_tokens.weight": names}}

        def indexed(folder: Path, index=index) -> None:
            (folder / weights).unlink()
            (folder / f"{weights}.index.json").write_text(json.dumps(index))

        yield f"index of {names}", TRAIN, indexed
    for body in ("[]", "3", '{"weight_map": []}', "{}"):
        yield f"index {body}", TRAIN, text(f"{weights}.index.json", body)
    for what, template in {
        "loop": "{% for i in range(10**9) %}x{% endfor %}",
        "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "grows": "{{ 'x' * 10**10 }}",
        "doubles": "{% set n = namespace(x='xx') %}{% for i in range(60) %}"
        "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "power": "{{ 9 ** (9 ** 9) }}",
        "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "syntax": "{% if %}",
        "raises": "{{ raise_exception('no') }}",
        "format": "{{ '%99999999999d' % 3 }}",
        "number": 3,
    }.items():
        damage = field("student/tokenizer_config.json", "chat_template", value=template)

        def rendered(folder: Path, damage=damage, template=template) -> None:
            (folder / "student" / "chat_template.jinja").unlink(missing_ok=True)
            damage(folder)
            line = {"messages": [{"role": "user", "content": "1 + 1"}], "answer": "2"}
            _put(folder / "prompts.jsonl", (json.dumps(line) + "\n").encode() * 12)

        yield f"template {what}", TRAIN, rendered
        yield f"generate, template {what}", GENERATE, rendered
    slow = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated"}
    slow["invert"] = False

    def searching(folder: Path) -> None:
        field("student/tokenizer.json", "pre_tokenizer", value=slow)(folder)
        _put(folder / "prompts.jsonl", (json.dumps({"prompt": "x" * 40}) + "\n").encode() * 12)

    yield "tokenizer pattern", GENERATE, searching


def run_case(argv: list[str], main: Callable[[list[str]], int]) -> tuple[str, str]:
    """Try one command line in a child of this process, in the current folder."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        os.close(read)
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (NUM_BYTES, NUM_BYTES))
        said, kind = io.StringIO(), "clear"
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main(argv)
                kind = "clear" if status else "accepted"
            except SystemExit as error:
                kind = "clear" if error.code else "accepted"
            except BaseException:
                kind = "traceback"
                said.write(traceback.format_exc())
        if "Traceback (most recent" in said.getvalue():
            kind = "traceback"
        os.write(write, json.dumps([kind, said.getvalue()[-3000:]]).encode())
        os._exit(0)
    os.close(write)
    end, data = time.monotonic() + HANG_S, b""
    os.set_blocking(read, False)
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            if not (part := os.read(read, 1 << 16)):
                break
            data += part
        time.sleep(0.02)
    else:
        data = json.dumps(["hang", ""]).encode()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read)
    kind, said = json.loads(data) if data else ("killed", "")
    return kind, said


def main() -> int:
    """Try the cases and print what each came to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="", help="only cases with this in their name")
    parser.add_argument("--every", type=int, default=1, help="only every N-th case")
    flags = parser.parse_args()
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count=1"

    from opd_jax import cli

    for command in cli.COMMANDS.values():  # before anything is forked: not again in every case
        importlib.import_module(f"opd_jax.{command.function.partition(':')[0]}")
    top = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    good = top / "good"
    make_good(good, cli.main)
    os.chdir(good)
    counts, known = collections.Counter(), list(cases())
    for number, (name, argv, damage) in enumerate(known):
        if flags.part not in name or number % flags.every:
            continue
        os.chdir(top)
        here = top / "case"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(good, here, symlinks=True)
        os.chdir(here)
        damage(here)
        began = time.monotonic()
        kind, said = run_case(argv, cli.main)
        counts[kind] += 1
        shown = [line for line in said.strip().splitlines() if "OPD_JAX_TRACE" not in line]
        last = " ".join(shown[-1:])[:300]
        print(f"{number} {kind} {time.monotonic() - began:.1f}s | {name} | {last}", flush=True)
    print(f"{sum(counts.values())} tried: {dict(counts)}")
    os.chdir("/")
    shutil.rmtree(top)
    return int(not {*counts} <= {"clear", "accepted"})


def make_good(folder: Path, command: Callable[[list[str]], int]) -> None:
    """A pair, prompts, a config file and a run, all made through the command that is tried."""
    from opd_jax import config

    folder.mkdir()
    for name in ("student", "teacher"):
        shutil.copytree(config.path_of(f"embedded:{name}"), folder / name)
    rows = [{"prompt": f"{i} + {i + 2} = ?", "answer": str(2 * i + 2)} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.py").write_text(CONFIG)
    (folder / "types.json").write_text(json.dumps([*range(600)]))
    os.chdir(folder)
    argv = [*TRAIN[:2], "--workdir=run", "--config.log.samples_every=1"]
    kind, said = run_case(argv, command)
    assert kind == "accepted", said


if __name__ == "__main__":
    sys.exit(main())
