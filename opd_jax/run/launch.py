"""The command ``opd-jax train``."""

from __future__ import annotations

from collections.abc import Sequence

from opd_jax import command, config, glossary, processes
from opd_jax.run import train

_HELP = """usage: opd-jax train --config=FILE[:args] --workdir=DIR [--config.group.key=value]

Distil on-policy. The same command resumes a run that was stopped or killed.

  --config   a Python file with get_config(arg), for example configs/demo.py:steps=20
  --workdir  folder of the run: run.json, metrics.jsonl, samples.jsonl, checkpoints/, summary.json
  --help     this text

example: opd-jax train --config=configs/demo.py --workdir=runs/demo --config.train.steps=20

Keys, as --config.KEY=VALUE, with (type, default) and [choices]; opd-jax help KEY shows fewer:
"""


def main(argv: Sequence[str]) -> int:
    """Train and return the exit status: 0 only where the run is finished."""
    if {"-h", "--help"} & set(argv):
        print(_HELP + glossary.text())
        return 0
    given, flags = config.load(argv, workdir=None)
    if not flags["workdir"]:
        raise config.ConfigError("no --workdir given: expected --workdir=DIR, a new or resumed run")
    stop = processes.Stop()
    result = train.train(
        config.resolve(given),
        flags["workdir"],
        command=["opd-jax", "train", *argv],
        started=command.begun,
        stop=stop,
    )
    return 0 if result["is_finished"] else stop.status
