"""What a run compiles: every program once per length, however batches vary."""

import json
import os
import subprocess
import sys

import pytest
import tiny_run

from opd_jax import command
from opd_jax.run import answering, assemble

tiny, one_device = tiny_run.tiny, tiny_run.one_device
# Widths that no other test pads to: programs that are already compiled would not be counted.
PROMPTS, ANSWERS = (13, 21), (4, 7)
STOP = 2


@pytest.fixture
def varied(tiny, tmp_path):
    """The tiny pair with prompts of two lengths, and a bias that ends some answers early."""
    folder = tiny_run.copy_folder(tiny, tmp_path / "varied")
    long = "Add these up: "
    rows = [{"prompt": f"{long if i % 4 == 0 else ''}{i} + {i + 2} = ?"} for i in range(12)]
    tiny_run.write_lines(folder / "prompts.jsonl", rows)
    lines = [
        f"    c.data.max_prompt, c.data.buckets = {PROMPTS[-1]}, {PROMPTS}",
        f"    c.rollout.max_new, c.rollout.buckets = {ANSWERS[-1]}, {ANSWERS}",
        f"    c.rollout.bias = (({STOP}, 9.0),)",
        "    c.optim.lr = 1e-5  # the student goes on to end early",
        "    c.train.steps = 50",
        "    return c",
    ]
    text = (folder / "config.py").read_text().replace("    return c", "\n".join(lines))
    (folder / "config.py").write_text(text)
    return folder


@pytest.mark.usefixtures("one_device")
def test_fifty_steps_compile_each_program_once_per_length(varied, tmp_path, monkeypatch):
    seen = []

    def spy(answers, *widths, crop=answering.crop):
        cropped = crop(answers, *widths)
        seen.append((answers.ids_BT.shape[1], cropped.ids_BT.shape[1]))
        return cropped

    monkeypatch.setattr(answering, "crop", spy)
    before = assemble.programs()
    assert tiny_run.train(varied, tmp_path / "run") == 0
    made = {name: n - before[name] for name, n in assemble.programs().items()}
    assert len(seen) == 50
    sampled, trained = {full for full, _ in seen}, {cropped for _, cropped in seen}
    assert sampled == {width + ANSWERS[-1] for width in PROMPTS}
    assert trained == {width + answer for width in PROMPTS for answer in ANSWERS}
    assert made == {
        "sample": len(sampled),
        "teacher_states": len(trained),
        "distill_step": len(trained),
        "off_policy_step": 0,
        "eval_step": 0,
    }
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 50


LEVEL = "--xla_backend_optimization_level"


@pytest.mark.parametrize(
    ("flags", "platforms", "installed", "expected"),
    [
        ("", "", (), f"{LEVEL}=1"),
        ("--xla_dump_to=x", "", (), f"--xla_dump_to=x {LEVEL}=1"),
        (f"{LEVEL}=3", "cpu", (), f"{LEVEL}=3"),  # a user's own stays
        ("", "", ("libtpu",), ""),
        ("", "", ("jax_plugins",), ""),
        ("", "tpu,cpu", ("libtpu",), ""),
        ("", "cpu", ("libtpu", "jax_plugins"), f"{LEVEL}=1"),
    ],
)
def test_only_programs_of_a_cpu_are_compiled_quickly(
    flags, platforms, installed, expected, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(
        command.importlib.util, "find_spec", lambda name: object() if name in installed else None
    )
    command.compile_quickly()
    assert os.environ["XLA_FLAGS"] == expected
    command.compile_quickly()
    assert os.environ["XLA_FLAGS"] == expected


def test_a_command_lets_the_compiler_know(tmp_path):
    """The flag comes before jax has made its devices: the compiler's own dump says so."""
    ask = """
import sys, jax
from opd_jax.cli import main
assert main(["table", "--workdir", sys.argv[1], "--out", sys.argv[1] + "/out.csv"]) == 1
jax.jit(lambda x: x * 2)(1.0)
"""
    environ = os.environ | {"XLA_FLAGS": f"--xla_dump_to={tmp_path}/dump"}
    environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "cache")
    subprocess.run([sys.executable, "-c", ask, str(tmp_path)], env=environ, check=True)
    dumped = list((tmp_path / "dump").glob("*debug_options"))
    assert dumped
    assert all("xla_backend_optimization_level: 1" in path.read_text() for path in dumped)
