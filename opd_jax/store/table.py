"""The rock state of a checkpoint as a table: one line per vocabulary item."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from opd_jax import command, files, mesh, processes, rock
from opd_jax.data import tokenizer as tokenizers
from opd_jax.files import path_of
from opd_jax.models import hf_config
from opd_jax.pytrees import RockState
from opd_jax.store import checkpoint, hub
from opd_jax.store import workdir as workdirs

COLUMNS = (
    "token_id",
    "token",
    "count",
    "kl_sum",
    "kl_mean",
    "kl_std",
    "share",
    "token_share",
    "persistence",
    "member",
    "rank",
)


def main(argv: Sequence[str]) -> int:
    """The command ``opd-jax table``; returns the exit status."""
    parser = command.Parser(
        "table", "Rock state of a checkpoint, type by type.", "--workdir=runs/demo --out=rocks.csv"
    )
    add = parser.add_argument
    add("--workdir", required=True, help="folder of the run")
    add("--step", type=int, default=None, help="default: the newest good one")
    add("--out", required=True, help="a new .csv file")
    flags = parser.parse_args(argv)
    step = table(flags.workdir, flags.out, step=flags.step)
    processes.say(f"wrote the rock state of step {step} to {flags.out}")
    return 0


def table(workdir: str, out: str, *, step: int | None = None) -> int:
    """Write the per-type sums of a run at ``step`` (the newest good one by default) as CSV.

    One line per id of the vocabulary, by falling Rock Score (``rank`` from 1, ties to the smaller
    id), with ``COLUMNS``: decayed ``count`` and ``kl_sum`` (the Rock Score, nats), mean and
    standard deviation of KL over them, ``share`` of all KL, ``token_share`` of all positions,
    persistence (fast mean over slow mean), and whether the gate holds the type (0 or 1). Ratios
    without a count are empty. Only the rock state is read from the checkpoint.

    In a run of several processes every one must call this; the first one writes.

    Args:
      workdir: folder of the run.
      out: a new file.
      step: of the checkpoint.

    Returns:
      The step that was written.

    Raises:
      WorkdirError, CheckpointError: there is no run, or no good checkpoint.
      FileExistsError: ``out`` is there already.
    """
    folder, path = Path(path_of(workdir)), Path(path_of(out))
    processes.on_first(lambda: _check_free(path))
    record = workdirs.require_run(folder)
    source = hub.folder(workdirs.setting(record, "student.path"), "tokenizer")
    tokenizer = tokenizers.load(source)
    template = jax.eval_shape(lambda: rock.init(hf_config.read_config(source).vocab_size))
    with checkpoint.open(folder) as saves:
        tree, _, found = saves.restore({"rock": template}, step, partial=True)
    names = [tokenizers.token_text(tokenizer, i) for i in range(template.count_V.shape[0])]
    text = _text(tree["rock"], names)
    processes.on_first(lambda: files.write_atomic(path, text))
    return found


def _check_free(path: Path) -> None:
    if path.exists():
        raise FileExistsError(
            f"{path} exists: expected a file name that is free; move it away or give another --out"
        )


def _text(state: RockState, names: list[str]) -> str:
    """The table of a state; ``names`` are the decoded ids."""
    persistence_V = np.asarray(rock.persistence(state), np.float64)
    host = mesh.to_host(state)
    count, kl_sum, kl_sq = (
        np.asarray(x, np.float64) for x in (host.count_V, host.kl_sum_V, host.kl_sq_V)
    )
    mean = _ratio(kl_sum, count)
    columns = {
        "token_id": np.arange(count.size),
        "token": np.array(names, object),
        "count": count,
        "kl_sum": kl_sum,
        "kl_mean": mean,
        "kl_std": np.sqrt(np.maximum(_ratio(kl_sq, count) - mean**2, 0.0)),
        "share": _ratio(kl_sum, kl_sum.sum()),
        "token_share": _ratio(count, count.sum()),
        "persistence": np.where(count > 0, persistence_V, np.nan),
        "member": np.asarray(host.member_V, int),
    }
    order = np.argsort(-kl_sum, kind="stable")
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for rank, i in enumerate(order, 1):
        writer.writerow([*(_cell(columns[name][i]) for name in COLUMNS[:-1]), rank])
    return stream.getvalue()


def _ratio(a, b):
    """a / b, NaN where b is 0."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def _cell(value):
    if isinstance(value, np.floating):
        return "" if np.isnan(value) else f"{value:.7g}"  # f32 sums have seven digits
    return value
