"""The interval of a run's held-out accuracy, from what it graded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opd_jax import stats
from opd_jax.store import run_files

Ends = tuple[float, float]


def intervals(run: str | os.PathLike) -> dict[int, Ends]:
    """Ends of the interval by step, problems being the units; empty for an ungraded run.

    Raises:
      WorkdirError: ``graded.jsonl`` is damaged.
    """
    path = Path(run) / "graded.jsonl"
    lines = run_files.load_lines(path, run_files.GradedLine) if path.exists() else []
    return {
        line["step"]: stats.share_interval([float(np.mean(right)) for right in line["correct"]])
        for line in lines
        if line["correct"] and all(line["correct"])
    }


def told(value: float, ends: Sequence[float] | None) -> str:
    """``59.4% [53.3%, 65.2%]``, or the value alone."""
    return f"{value:.1%}" + (f" [{ends[0]:.1%}, {ends[1]:.1%}]" if ends else "")
