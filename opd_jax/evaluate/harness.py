"""The command ``opd-jax lm-eval``: lm-evaluation-harness with this library's models."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from opd_jax import command


def main(argv: Sequence[str]) -> int:
    """Register the model ``opd_jax`` and hand over to the harness; returns the exit status.

    The flags are the harness's own; ``--model opd_jax`` need not be given.

    Raises:
      ImportError: the harness is not installed.
    """
    if not argv or argv[0] in ("-h", "--help"):
        _parser().parse_args(["--help"])
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "lm-evaluation-harness is not installed: expected the package lm_eval; "
            "pip install 'opd-jax[lm-eval]'"
        )
    importlib.import_module("opd_jax.evaluate.lm_eval")  # registers
    harness = importlib.import_module("lm_eval.__main__")
    given = list(argv)
    is_evaluation = bool(given) and (given[0] == "run" or given[0].startswith("-"))
    names = {item.partition("=")[0] for item in given}
    if is_evaluation and not names & {"--model", "-M", "-h", "--help", "--config", "-C"}:
        given += ["--model", "opd_jax"]
    sys.argv = ["lm-eval", *given]
    harness.cli_evaluate()
    return 0


def _parser() -> command.Parser:
    """Says what is ours; the flags are read by the harness."""
    parser = command.Parser(
        "lm-eval",
        "Run lm-evaluation-harness with a model of this library; all flags are the harness's own "
        "(opd-jax lm-eval run --help).",
        "--model_args=pretrained=runs/demo@60 --tasks=gsm8k --apply_chat_template",
    )
    add = parser.add_argument
    add(
        "--model_args",
        metavar="NAME=VALUE,...",
        help=f"pretrained: {command.MODEL}; dtype, slots, max_length, max_gen_toks, mesh_fsdp, "
        "mesh_model, add_bos_token, seed, think_end_token, template",
    )
    add("--tasks", metavar="NAME,...", help="tasks of the harness; opd-jax lm-eval ls tasks")
    add("--batch_size", metavar="N", help="rows at a time")
    return parser
