"""Models by their name on the Hugging Face Hub, fetched into its own cache and pinned to a commit.

A *Hub name* is ``owner/name``, ``owner/name@REVISION`` (a branch, a tag, a commit), or either with
``hub:`` before it. A path that is there always comes first, and ``models/x`` and ``runs/x`` are
never names of the Hub; ``hub:`` is. A *pinned* name is ``hub:owner/name@COMMIT``: what it means
never changes. A run keeps pinned names in ``run.json``, so that what goes on with it, exports it or
analyses it has the very model that it was started on, whatever has happened upstream.

Several processes: the first one finds the commit and tells the others; then each of them fetches
that commit, and those of one host wait for one another by the locks of the cache.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import errors

from opd_jax import processes
from opd_jax.files import EMBEDDED, path_of
from opd_jax.models import hf_folder
from opd_jax.models.hf_config import read_json
from opd_jax.models.hf_weights import INDEX, Index
from opd_jax.spec import RunConfig
from opd_jax.store import workdir as workdirs

PREFIX = "hub:"
Part = Literal["config", "tokenizer", "model"]  # each with those before it

_NAME = re.compile(r"(?:hub:)?([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([^@\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDERS = ("models/", "runs/")  # where README and configs keep files
# No weights in other formats: a name may have the same ones as .bin, .gguf and .onnx too.
_FILES: dict[Part, tuple[str, ...]] = {"config": ("config.json", "generation_config.json")}
_FILES["tokenizer"] = (*_FILES["config"], *hf_folder.TOKENIZER)
_FILES["model"] = (*_FILES["tokenizer"], INDEX, "model*.safetensors")


class HubError(ValueError):
    """A model of the Hub is not to be had; the message says why and how else to get it."""


@dataclasses.dataclass(frozen=True)
class HubName:
    """A name in its parts.

    Attributes:
      repo: ``owner/name``.
      revision: branch, tag or commit; None: the default branch.
    """

    repo: str
    revision: str | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit."""
        return bool(self.revision and _COMMIT.fullmatch(self.revision))


def parse(name: str) -> HubName | None:
    """A Hub name in its parts; None for what names something else.

    Raises:
      HubError: ``hub:`` before what cannot be a name.
    """
    found = _NAME.fullmatch(name)
    if name.startswith(PREFIX):
        if not found:
            raise HubError(
                f"{name!r} is no name of the Hugging Face Hub: expected hub:owner/name or "
                "hub:owner/name@REVISION; correct it"
            )
        return HubName(found[1], found[2])
    if not found or name.startswith((EMBEDDED, *_FOLDERS)):
        return None
    if any(Path(path_of(path)).exists() for path in (name, found[1])):
        return None
    return HubName(found[1], found[2])


def folder(name: str, part: Part = "model") -> str:
    """The folder of a model as ``run.json`` names it: a path as it is, ``hub:`` fetched.

    A path that is gone is none that could be fetched: :func:`pin` tells them apart.

    Args:
      name: a folder, ``embedded:NAME`` or a Hub name with its prefix.
      part: what of it is needed.

    Raises:
      HubError: it cannot be fetched.
    """
    found = parse(name) if name.startswith(PREFIX) else None
    return path_of(name) if found is None else str(_fetched(found, part))


def pin(name: str) -> str:
    """A name with its revision as a commit; one that is no Hub name stays as it is.

    Every process must call it.

    Raises:
      HubError: it cannot be looked up.
      ProcessesError: the same, on the other processes.
    """
    return pins([name]).get(name, name)


def pins(
    names: Iterable[str],
    folders: Iterable[Path] = (),
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """The pinned name of each Hub name: what one of the runs was started on, else the newest.

    Every process must call it.

    Args:
      names: of models; those of no Hub name are left out.
      folders: of runs, as far as they are there.
      say: receives a line per name.

    Raises:
      HubError: a name cannot be looked up.
      WorkdirError: a damaged ``run.json``.
      ProcessesError: the same, on the other processes.
    """
    asked = {name: found for name in names if (found := parse(name))}
    known = {name: _pinned(found) for name, found in asked.items() if found.is_pinned}

    def look() -> dict[str, str]:
        old = [workdirs.read_run(place) or {} for place in folders]
        for name in asked.keys() - known.keys():
            earlier = [record["pinned"][name] for record in old if name in record.get("pinned", {})]
            known[name] = earlier[0] if earlier else _newest(asked[name])
        return known

    if asked.keys() - known.keys():
        known = processes.of_first(look)
    for name, pinned in known.items():
        say(f"{name}: commit {pinned.rpartition('@')[2]} of the Hugging Face Hub")
    return known


def pinned_run(run: RunConfig, known: Mapping[str, str]) -> RunConfig:
    """A run whose models are named as :func:`pins` says."""

    def named(path: str) -> str:
        return known.get(path, path)

    student = dataclasses.replace(run.student, path=named(run.student.path))
    paths = tuple((name, named(path)) for name, path in run.teacher.paths)
    teacher = dataclasses.replace(run.teacher, path=named(run.teacher.path), paths=paths)
    return dataclasses.replace(run, student=student, teacher=teacher)


def public_name(name: str) -> str | None:
    """``owner/name`` of a pinned name, or of one with ``hub:``; None for any other."""
    found = _NAME.fullmatch(name) if name.startswith(PREFIX) else None
    return found[1] if found else None


def _pinned(name: HubName) -> str:
    return f"{PREFIX}{name.repo}@{name.revision}"


def _newest(name: HubName) -> str:
    """Pin a name to what its revision is now, or was when it could last be looked up."""
    # Its configs come with it: the cache tells a commit only of what has been fetched.
    found = _download(name, _FILES["config"])
    return _pinned(HubName(name.repo, found.name))


def _fetched(name: HubName, part: Part) -> Path:
    """The snapshot of a name in the cache, fetched where it is not there or not whole."""
    if name.is_pinned:
        try:
            found = _snapshot(name, _FILES[part], is_local=True)
        except errors.LocalEntryNotFoundError:
            found = None
        if found is not None and _is_whole(found, part):
            return found
    return _download(name, _FILES[part])


def _is_whole(snapshot: Path, part: Part) -> bool:
    """Whether a snapshot has a part of a model, which may have been fetched without the others."""
    present = {path.name for path in snapshot.iterdir() if path.exists()}
    wanted = {"config.json"} if part == "config" else {"config.json", "tokenizer.json"}
    if part == "model" and INDEX in present:
        wanted |= {*read_json(snapshot / INDEX, Index)["weight_map"].values()}
    elif part == "model" and not fnmatch.filter(present, "model*.safetensors"):
        return False
    return wanted <= present


def _snapshot(name: HubName, patterns: tuple[str, ...], *, is_local: bool) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            name.repo,
            revision=name.revision,
            allow_patterns=[*patterns],
            local_files_only=is_local,
        )
    )


def _download(name: HubName, patterns: tuple[str, ...]) -> Path:
    """Fetch files of a name.

    Raises:
      HubError: they are not to be had.
    """
    try:
        return _snapshot(name, patterns, is_local=False)
    except Exception as error:  # of its own, of the network and of the disk, without a common base
        why = _why(name, error)
        if why is None:
            raise
        model = name.repo.rpartition("/")[2]
        revision = f" --revision {name.revision}" if name.revision else ""
        raise HubError(
            f"{name.repo!r} is no folder here, and as a model of the Hugging Face Hub {why}: "
            "expected a model's folder, or a name that can be fetched; correct it, or get the "
            "folder where that works,\n"
            f"  hf download {name.repo}{revision} --local-dir models/{model}\n"
            f"and give it, models/{model}, in the place of the name"
        ) from error


def _why(name: HubName, error: Exception) -> str | None:
    """What went wrong, in words; None for a defect."""
    at = huggingface_hub.constants.ENDPOINT
    login = "hf auth login, or HF_TOKEN, says who asks"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated (accept its terms at {at}/{name.repo}; {login})"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"it is not there, or not for everybody ({login})"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {name.revision!r}"
    cause = error.__cause__ or error  # behind "not in the cache either"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return f"it is not for everybody ({at} answered {status}; {login})"
    if status is not None:
        return f"it could not be fetched ({at} answered {status})"
    if isinstance(error, errors.HFValidationError):
        return f"its name cannot be ({error})"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "it is not in the cache, and HF_HUB_OFFLINE is set"
    module = type(cause).__module__.partition(".")[0]
    if isinstance(cause, OSError) or module in ("httpx", "httpx2", "httpcore", "requests"):
        said = " ".join(str(cause).split())[:200] or type(cause).__name__
        return f"it could not be fetched from {at} ({said})"
    return None
