"""What ``opd-jax rocks`` is asked for: its flags, and the rules between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from opd_jax import command
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.scores import METRICS

MAX_NEW = 256  # most ids of an answer where no run says otherwise
# What shapes the answers: not to be given together with answers that are there already.
_WRITING = ("prompts", "limit", "max_new", "max_prompt", "samples", "temperature", "writer")


class RocksError(ValueError):
    """The analysis cannot be done as asked; the message names the flag to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of the command; ``None`` leaves a choice to the run, or to the default in the help.

    Raises:
      RocksError, SelectError: flags that contradict each other, or are out of range.
    """

    out: str
    run: str | None = None
    step: int | None = None
    student: str | None = None
    teacher: str | None = None
    prompts: str | None = None
    limit: int | None = None
    max_new: int | None = None
    max_prompt: int | None = None
    samples: int | None = None
    temperature: float | None = None
    seed: int = 0
    batch: int = 16
    slots: int = 0
    writer: str | None = None
    corpus: str | None = None
    k: int = 100
    skip_top: int = 0
    min_count: int = 1
    score: str = "rock"
    extras: tuple[str, ...] = ()
    checkpoints: tuple[int, ...] = ()
    mesh_fsdp: int = 1
    mesh_model: int = 1

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("run", "student", "teacher")}
        if bool(self.run) == bool(self.student or self.teacher) or (
            not self.run and not (self.student and self.teacher)
        ):
            found = ", ".join(f"{flag(name)}={value}" for name, value in given.items() if value)
            raise RocksError(
                f"got {found or 'no models'}: expected --run alone, or both --student and "
                "--teacher; give one or the other"
            )
        if self.step is not None and not self.run:
            raise RocksError(
                f"--step is {self.step} without --run: expected the step of a run; give --run, or "
                "write the student as RUN@STEP"
            )
        if self.checkpoints and "persistence" not in self.extras:
            raise RocksError(
                f"--checkpoints names {', '.join(map(str, self.checkpoints))} without "
                "--with=persistence, which compares them; add it, or drop --checkpoints"
            )
        least = {"limit": 1, "max_new": 1, "max_prompt": 1, "samples": 1, "batch": 1, "k": 1}
        for name, smallest in (least | {"temperature": 0, "seed": 0, "slots": 0}).items():
            value = getattr(self, name)
            if value is not None and not smallest <= value < 2**31:
                raise RocksError(
                    f"{flag(name)} is {value}: expected {smallest} to 2^31 - 1; change {flag(name)}"
                )
        _ = self.rule  # raises
        self._check_source()

    @property
    def rule(self) -> Rule:
        """How types are ranked."""
        return Rule(self.score, self.skip_top, self.min_count)

    def _check_source(self) -> None:
        """Either answers are there, or there are prompts to answer."""
        written = [flag(name) for name in _WRITING if getattr(self, name) is not None]
        if self.corpus and written:
            raise RocksError(
                f"--corpus={self.corpus} stands beside {', '.join(written)}: expected answers that "
                "are there, or flags that say how to write them; drop one or the other"
            )
        if not (self.corpus or self.run or self.prompts):
            raise RocksError(
                "no --prompts given: expected a JSONL file, as this student and teacher come from "
                "no run; give one (embedded:prompts/heldout.jsonl is the package's own)"
            )


def flag(name: str) -> str:
    """How a field is written on the command line."""
    return "--with" if name == "extras" else f"--{name.replace('_', '-')}"


def parse(argv: Sequence[str], studies: Sequence[str] = ()) -> Flags:
    """Read the command line of ``opd-jax rocks``, whose help names the further studies.

    Raises:
      RocksError, SelectError: see :class:`Flags`.
    """
    parser = command.Parser(
        "rocks",
        "Find the tokens that carry most of the KL between a student and its teacher.",
        "--run=runs/demo --out=rocks",
    )
    add = parser.add_argument
    add("--out", required=True, help="folder of the results; the same command goes on in it")
    add("--run", help="workdir of a training run: its student, teacher and held-out prompts")
    add("--step", type=int, help="checkpoint of the run; default: the newest; 0: before training")
    add("--student", help=command.MODEL)
    add("--teacher", help="the same of the model that it learns from")
    add("--prompts", help="JSONL; default: the run's held-out prompts, or those it trains on")
    add("--limit", type=int, help="only the first prompts; default: all")
    add(
        "--max-new",
        type=int,
        help=f"most tokens of an answer; default: the run's, or {MAX_NEW}, "
        "or half of the models' positions",
    )
    add("--max-prompt", type=int, help="longest prompt that is kept; default: the run's, or all")
    add("--samples", type=int, help="answers per prompt; default: 1")
    add("--temperature", type=float, help="0 is greedy; default: 1")
    add("--seed", type=int, default=0, help="of answers and statistics; default: 0")
    add("--batch", type=int, default=16, help="answers at a time; changes memory, not results")
    command.add_slots(parser)
    add("--writer", help="who answers: student (default), teacher, or another reference")
    add("--corpus", help="an earlier --out, or its corpus/: use those answers, write none")
    add("--k", type=int, default=100, help="number of rocks; default: 100")
    add("--skip-top", type=int, default=0, help="most frequent types that may not be rocks")
    add("--min-count", type=int, default=1, help="occurrences that a rock needs; default: 1")
    add("--score", default="rock", help=f"what ranks types: {', '.join(METRICS)}")
    add("--with", dest="extras", default="", help=f"further questions: {','.join(studies)}")
    add("--checkpoints", default="", help="steps that persistence compares with 0; default: all")
    command.add_mesh(parser)
    values = vars(parser.parse_args(argv))
    extras = dict.fromkeys(filter(None, values.pop("extras").split(",")))
    steps = _steps(values.pop("checkpoints"))
    return Flags(**values, extras=tuple(extras), checkpoints=steps)


def _steps(text: str) -> tuple[int, ...]:
    """Steps after 0, in order, from a comma list."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise RocksError(
            f"--checkpoints is {text!r}: expected a comma list of steps, e.g. 20,40; change it"
        )
    return tuple(sorted({int(part) for part in parts} - {0}))
