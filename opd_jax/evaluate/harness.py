"""The command ``opd-jax lm-eval``: lm-evaluation-harness with this library's models."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Register the model ``opd_jax`` and hand over to the harness; returns the exit status.

    The flags are the harness's own; ``--model opd_jax`` need not be given.

    Raises:
      ImportError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "lm-evaluation-harness is not installed: expected the package lm_eval; "
            "pip install 'opd-jax[lm-eval]'"
        )
    importlib.import_module("opd_jax.evaluate.lm_eval")  # registers
    command = importlib.import_module("lm_eval.__main__")
    given = list(argv)
    is_evaluation = bool(given) and (given[0] == "run" or given[0].startswith("-"))
    names = {item.partition("=")[0] for item in given}
    if is_evaluation and not names & {"--model", "-M", "-h", "--help", "--config", "-C"}:
        given += ["--model", "opd_jax"]
    sys.argv = ["lm-eval", *given]
    command.cli_evaluate()
    return 0
