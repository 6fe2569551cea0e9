"""What a run compiles: every program once per length, however batches vary."""

import json

import pytest
import tiny_run

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
