"""What the commands share: how a command line is read, and the flags that several have."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jax.sharding import Mesh

begun = time.monotonic()  # when the command that is running was
MODEL = (
    "Hugging Face folder, owner/name[@REVISION] on the Hub, embedded:NAME, or RUN[@STEP] (the "
    "workdir of a run)"
)
# What `processes` reads of every command line; here it is told without importing jax.
PROCESSES = """  --coordinator=HOST:PORT --num-processes=N --process-index=I
             one of N processes of the same command, where no cluster is detected: the address of
             process 0, and which this is, from 0; or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
             JAX_PROCESS_ID. --coordinator=auto alone: as jax's own cluster detection says"""


class Parser(argparse.ArgumentParser):
    """The parser of one command: help with an example, and the nearest flag for an unknown one."""

    def __init__(self, name: str, does: str, example: str):
        super().__init__(
            f"opd-jax {name}",
            description=does,
            epilog=f"example: opd-jax {name} {example}",
            allow_abbrev=False,
        )

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse does, with ``~`` expanded, which shells leave as it is in ``--out=~/x``."""
        values, rest = super().parse_known_args(args, namespace)
        for name, value in vars(values).items():
            if isinstance(value, str):
                setattr(values, name, os.path.expanduser(value))
            elif isinstance(value, list):
                setattr(values, name, [os.path.expanduser(v) for v in value])
        return values, rest

    def error(self, message: str) -> NoReturn:
        """End with status 2, naming the flag that was probably meant."""
        what, _, given = message.partition("unrecognized arguments: ")
        for item in given.split() if not what else ():
            name = item.partition("=")[0]
            known = nearest(name, self._option_string_actions) if item.startswith("-") else ""
            message = f"unknown argument {item}{known}: expected one of the flags above; correct it"
            break
        super().error(shortened(message))


def shortened(message: str, most: int = 1000) -> str:
    """A message whose lines have at most ``most`` characters of what they quote.

    A value that is quoted may be as long as a command line; what is wrong with it stands before or
    behind it, so the middle of a longer line is left out.
    """
    return "\n".join(
        line
        if len(line) <= most
        else f"{line[: most // 2]} ... ({len(line) - most:,} more) ... {line[-(most // 2) :]}"
        for line in message.split("\n")
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at what was probably meant, to stand behind an unknown name; empty if nothing is."""
    found = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f" (nearest known: {found[0]})" if found else ""


def pairs(name: str, text: str) -> tuple[tuple[str, Any], ...]:
    """The (name, value) pairs of a flag that is a JSON object, in the order of their names.

    Raises:
      ValueError: it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        example = '{"enable_thinking": false}' if name == "template" else '{"prompt": "question"}'
        raise ValueError(
            f"{name} is {text!r}: expected a JSON object such as '{example}'; set --{name}"
        )
    return tuple(sorted(found.items()))


def keep_programs() -> None:
    """Keep compiled programs between processes, unless jax was told where already."""
    import jax

    config: Any = jax.config  # its options are not declared for type checkers
    if config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opd_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def add_filters(parser: argparse.ArgumentParser) -> None:
    """The flags that say which ids a sampler leaves out."""
    add = parser.add_argument
    add("--top-k", type=int, default=0, help="0: off")
    add("--top-p", type=float, default=1.0, help="1: off")
    add("--min-p", type=float, default=0.0, help="0: off")


def add_slots(parser: argparse.ArgumentParser) -> None:
    """The flag that says how many rows of a batch are decoded at a time."""
    told = "rows of a batch decoded at a time: where one ends the next begins; 0: all, in step"
    parser.add_argument("--slots", type=int, default=0, help=told)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """The flags that spread a model over devices; read them with :func:`mesh`."""
    add = parser.add_argument
    add("--mesh-fsdp", type=int, default=1, help="devices that share the parameters; default: 1")
    add("--mesh-model", type=int, default=1, help="devices that share heads and vocabulary")


def mesh(fsdp: int, model: int) -> Mesh:
    """The mesh that the flags ask for, ``data`` over the devices that are left.

    Raises:
      ValueError: the devices do not divide so.
    """
    from opd_jax import mesh as meshlib

    return meshlib.make(fsdp=fsdp, model=model)
