"""Checkpoints of a run, on orbax.

One call saves the train state, how far the data has been read and a few metrics. A checkpoint is
written beside its final place, described by ``record.json`` (leaf shapes, metrics, a CRC-32 of
every file), and renamed into place last; so a folder named by its step is either complete or was
damaged later, and :meth:`Checkpoints.restore` can tell. orbax is used in this module only.

The workdir is a folder on a file system that all processes share. Process 0 writes every JSON file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from opd_jax import files, processes
from opd_jax.store import checkpoint_record
from opd_jax.store import state_arrays as kept

STATE = "state"
FORMAT = 2  # of record.json; in 1 the data state was a list of texts, one per process
_PLAIN_PATH = re.compile(r"[\w ./@=+,:-]*")
LEFTOVER = re.compile(r"\d+\.(saving|deleting)(\.|$)")  # what a killed save or deletion leaves

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says where, why and what to do."""


def open(
    workdir: str | os.PathLike,
    *,
    keep: int = 3,
    best: tuple[str, str] | None = None,
    say: Callable[[str], None] = log.warning,
) -> Checkpoints:
    """Describe the checkpoints under ``workdir/checkpoints``; writes nothing before the first save.

    Args:
      workdir: folder of the run.
      keep: number of newest checkpoints to keep.
      best: a metric and "min" or "max"; the checkpoint that is best by it is kept as well.
      say: receives one line per event that a user should know of.

    Raises:
      ValueError: ``keep`` below 1, a direction other than min and max, or a bucket URL.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: expected at least 1; set --config.checkpoint.keep")
    if best is not None and best[1] not in ("min", "max"):
        raise ValueError(
            f"best={best}: expected (metric, 'min') or (.., 'max'); set --config.checkpoint.best"
        )
    if "://" in str(workdir):
        raise ValueError(
            f"workdir {workdir} is a URL: expected a folder on a file system that every process "
            "sees; mount the bucket (gcsfuse, NFS) and give --workdir the mounted folder"
        )
    return Checkpoints(Path(workdir).absolute() / "checkpoints", keep, best, say)


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of one run; make it with :func:`open`, close it when done."""

    folder: Path
    keep: int
    best: tuple[str, str] | None
    say: Callable[[str], None]
    _pool: ThreadPoolExecutor | None = None
    _pending: tuple[int, Future] | None = None
    _lock: int | None = None
    _link: Path | None = None  # where orbax finds the folder, if its name means something to globs
    _own: set[int] = dataclasses.field(default_factory=set)  # saved or restored by this object
    _restored: bool = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; damage is found by :meth:`restore` only."""
        if not self.folder.is_dir():
            return []
        return sorted(int(f.name) for f in self.folder.iterdir() if f.name.isdecimal())

    def best_step(self) -> int | None:
        """Step of the best checkpoint by ``best``, the latest among equals; None if none has it."""
        if self.best is None:
            return None
        name, direction = self.best
        sign = 1.0 if direction == "max" else -1.0
        found = []
        for step in self.steps():
            try:
                value = checkpoint_record.read(self.folder / str(step))["metrics"].get(name)
            except checkpoint_record.DamagedRecord:
                continue
            if value is not None:
                found.append((sign * value, step))
        return max(found)[1] if found else None

    def lost(self) -> str | None:
        """Why checkpoints that were saved here must have been lost; None if nothing says so.

        Ask before :meth:`claim`, which makes the folder. The lock file names the newest step saved.
        """
        if self.steps():
            return None
        lock = self.folder / files.LOCK
        if not lock.exists():
            return f"{self.folder} is {'empty' if self.folder.is_dir() else 'gone'}"
        step = lock.read_text(encoding="utf-8", errors="replace").strip()
        return f"step {step} was saved in {self.folder} and is gone" if step else None

    def claim(self) -> None:
        """Take the folder for writing, so that a second run cannot write into it as well.

        The lock ends with :meth:`close`, or with the process, however that ends.

        Raises:
          CheckpointError: another process holds it, or the folder cannot be written.
        """
        if self._lock is not None or jax.process_index() != 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock, unlocked = files.hold(self.folder / files.LOCK)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{self.folder} is being written by another process; expected one run per workdir; "
                "stop the other run or give another --workdir"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self.folder}: {error}; expected a writable folder; make it "
                "writable or give another --workdir"
            ) from error
        if unlocked:  # some network file systems have no locks
            self.say(
                f"{self.folder} cannot be locked ({unlocked}): make sure that only one run uses it"
            )
        self._lock = lock
        for leftover in self.folder.iterdir():
            if LEFTOVER.match(leftover.name):
                self.say(f"removing {leftover}, left behind by a run that was killed")
                shutil.rmtree(leftover, ignore_errors=True)

    def save(
        self,
        step: int,
        state: Any,
        data_state: Any,
        metrics: Mapping[str, float] | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Start saving; returns once ``state`` may be donated, the files are written behind.

        Args:
          step: number of finished updates.
          state: pytree of arrays, typed PRNG keys included.
          data_state: JSON-able, what else it takes to go on, such as how far the data has been
            read. It is of the whole run: that of process 0 is kept, and any number of processes
            reads it.
          metrics: numbers to keep beside it, where ``best`` looks; non-finite counts as absent.
          force: write again even if this run has already saved (or was restored from) this step.

        Returns:
          False if the step is already there and nothing was done.

        Raises:
          CheckpointError: this save could not start, or the one before it failed (its files are
            removed, earlier checkpoints are untouched), or there are later steps of another run.
          TypeError: ``data_state`` is not JSON-able.
        """
        self.wait()
        step = int(step)
        if step in self._own and not force:
            return False
        later = [s for s in self.steps() if s > step]
        if later and not self._restored:
            raise CheckpointError(
                f"saving step {step}, but {self.folder} already holds step {later[-1]}; expected a "
                "restore before; give another --workdir, or remove that folder to start over"
            )
        data = checkpoint_record.plain(data_state)
        leaves = kept.named_leaves(state)
        record = {
            "format": FORMAT,
            "step": step,
            "time": time.time(),
            "metrics": {k: _finite(v) for k, v in (metrics or {}).items()},
            "leaves": {name: kept.describe(leaf) for name, leaf in leaves.items()},
            "keys": {n: str(jax.random.key_impl(x)) for n, x in leaves.items() if kept.is_key(x)},
            "data": data,
        }
        arrays = {name: kept.raw(leaf) for name, leaf in leaves.items() if np.size(leaf)}
        self.claim()
        path = self.folder / f"{step}.saving"
        try:
            with _save_context():
                response = ocp.save_checkpointables_async(
                    self._spelled(path.name), {STATE: arrays}, overwrite=True
                )
        except Exception as error:
            raise self._failed(step, error) from error
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = (step, self._pool.submit(self._finish, path, response, record))
        return True

    def wait(self) -> None:
        """Block until the running save has ended.

        Raises:
          CheckpointError: it failed; said once, the next save starts afresh.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, error) from error
        self._own.add(step)

    def close(self) -> None:
        """Wait for the running save and give up the folder.

        Raises:
          CheckpointError: the running save failed.
        """
        try:
            self.wait()
        finally:
            if self._link is not None:
                self._link.unlink(missing_ok=True)
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def restore(
        self, template: Any, step: int | None = None, *, partial: bool = False
    ) -> tuple[Any, Any, int]:
        """Read a checkpoint, the newest by default, onto the placement that ``template`` asks for.

        Every file is checked against its recorded size and CRC-32. Without ``step`` a damaged
        checkpoint is reported and the one before it is tried.

        Args:
          template: pytree like the saved one, of arrays or ``ShapeDtypeStruct``; a leaf's sharding
            is where the array goes (the first device if it has none), whatever mesh saved it.
          step: restore this step and no other.
          partial: the template may be a part of what was saved, for example ``{"params": ...}``.

        Returns:
          (state, data_state, step).

        Raises:
          CheckpointError: there is none, or none without damage.
          ValueError: the template differs from what was saved.
        """
        self.wait()
        step = self._choose(step)
        path = self.folder / str(step)
        record = checkpoint_record.read(path)
        wanted = kept.named_leaves(template)
        kept.check(path, record["leaves"], wanted, partial)
        abstract = {n: kept.abstract(leaf) for n, leaf in wanted.items() if np.prod(leaf.shape)}
        context = ocp.Context()
        context.pytree_options.loading.partial_load = True
        with context:
            where = self._spelled(path.name)
            arrays = ocp.load(where, abstract, checkpointable_name=STATE) if abstract else {}
        leaves = [
            kept.unraw(arrays.get(n), leaf, record["keys"].get(n)) for n, leaf in wanted.items()
        ]
        self._own.add(step)
        self._restored = True
        state = jax.tree.unflatten(jax.tree.structure(template), leaves)
        data = record["data"]
        return state, json.loads(data[0]) if record["format"] == 1 else data, step

    def _choose(self, step: int | None) -> int:
        """Newest step without damage (or the given one), the same on every process."""
        chosen, reason = -1, ""
        candidates = [int(step)] if step is not None else self.steps()[::-1]
        if jax.process_index() == 0:
            for candidate in candidates:
                reason = checkpoint_record.damage(self.folder / str(candidate))
                if reason is None:
                    chosen = candidate
                    break
                if step is None:
                    self.say(
                        f"checkpoint {self.folder / str(candidate)} is damaged: {reason}; trying "
                        "the one before it"
                    )
        chosen = processes.agreed(chosen)
        if chosen >= 0:
            return chosen
        if step is not None:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} cannot be restored: {reason}; found steps "
                f"{self.steps()}; name another step, or none for the newest good one"
            )
        if not candidates:
            raise CheckpointError(
                f"no checkpoint in {self.folder}; expected at least one; give the --workdir of a "
                "run that has saved"
            )
        raise CheckpointError(
            f"every checkpoint in {self.folder} is damaged (steps {candidates[::-1]}; the last "
            f"reason: {reason}); expected one good one; put back a copy, or remove the folder to "
            "start over"
        )

    def _finish(self, path: Path, response: Any, record: dict) -> None:
        """Background part of a save: files, then the record, then the rename, then old ones go."""
        response.result()
        if jax.process_index() != 0:
            return
        self._prove(path, record["leaves"])
        checkpoint_record.seal(path, record)
        final = self.folder / str(record["step"])
        replaced = checkpoint_record.set_aside(final) if final.exists() else None
        path.rename(final)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        if self._lock is not None:
            with contextlib.suppress(OSError):  # a note for later: see lost()
                text = f"{record['step']}\n".encode()
                os.ftruncate(self._lock, os.pwrite(self._lock, text, 0))
        self._prune(record["step"])

    def _prove(self, path: Path, leaves: Mapping[str, Any]) -> None:
        """Raise unless every array can be found in what was written, and enough bytes are there.

        :func:`checkpoint_record.seal` then reads every file once for its checksum.
        """
        found = ocp.metadata(self._spelled(path.name), checkpointable_name=STATE).metadata or {}
        wanted = {name: tuple(leaf["shape"]) for name, leaf in leaves.items()}
        wanted = {name: shape for name, shape in wanted.items() if math.prod(shape)}
        absent = sorted(wanted.keys() - found.keys())
        num_bytes = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in found.values())
        written = sum(f.stat().st_size for f in (path / STATE).rglob("*") if f.is_file())
        if absent or written < num_bytes:
            raise OSError(
                f"{len(wanted) - len(absent)} of {len(wanted)} arrays can be read back, in "
                f"{written} bytes where {num_bytes} were to be written"
            )

    def _spelled(self, name: str) -> str:
        """The path of a checkpoint as orbax can take it.

        orbax looks for its files with patterns, in which a folder named ``lr[1e-3]`` means another
        one: such a folder is reached through a link with a plain name.
        """
        if _PLAIN_PATH.fullmatch(str(self.folder)):
            return str(self.folder / name)
        code = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:16]
        # All processes must give orbax the same path. On one host they share the link, so that a
        # process of several leaves it behind.
        alone = f"-{os.getpid()}" if jax.process_count() == 1 else ""
        link = Path(tempfile.gettempdir()) / f"opd_jax-{os.getuid()}-{code}{alone}"
        with contextlib.suppress(FileExistsError):
            link.symlink_to(self.folder)
        if os.readlink(link) != str(self.folder):
            raise OSError(f"{link} leads to {os.readlink(link)}; remove it")
        self._link = link if alone else None
        return str(link / name)

    def _prune(self, step: int) -> None:
        """Remove what ``keep`` and ``best`` do not hold, and later steps that were rolled back."""
        steps = self.steps()
        for later in (s for s in steps if s > step):
            self.say(f"removing {self.folder / str(later)}: the run went on from an earlier step")
            checkpoint_record.remove(self.folder / str(later))
        steps = [s for s in steps if s <= step]
        held = {*steps[-self.keep :], self.best_step()}
        for old in (s for s in steps if s not in held):
            checkpoint_record.remove(self.folder / str(old))

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        """Clean up after a failed save, which frees its space, and word the error."""
        if jax.process_index() == 0:
            for leftover in self.folder.glob(f"{step}.saving*"):
                shutil.rmtree(leftover, ignore_errors=True)
        steps = self.steps()
        left = f"step {steps[-1]} is the newest complete one" if steps else "there is none yet"
        reason = " ".join(str(error).split())[:400]
        return CheckpointError(
            f"saving step {step} into {self.folder} failed: {type(error).__name__}: {reason}; "
            f"expected a writable folder with free space ({left}); free or unlock it and run the "
            "same command again to go on from there"
        )


def _save_context() -> ocp.Context:
    """Options of a save: without compression, which saves 8 % of the bytes for 4 x the CPU time."""
    context = ocp.Context()
    context.array_options.saving.use_compression = False
    # orbax logs three long traces for an error that it also raises, and that we word ourselves.
    logging.getLogger("absl").addFilter(_is_not_repeated)
    return context


def _is_not_repeated(record: logging.LogRecord) -> bool:
    return "_SignalingThread.run() raised an exception" not in str(record.msg)


def _finite(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
