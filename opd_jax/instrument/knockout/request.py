"""What ``opd-jax knockout`` is asked for, and the rules between its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from opd_jax.evaluate.benchmark import Settings
from opd_jax.evaluate.tasks import Form

FAMILIES = ("single", "control", "local", "group", "pair", "cumulative")
PAPER = "paper"  # as --groups: the published groups


class KnockoutError(ValueError):
    """The knockout cannot be done, or cannot be trusted; the message says what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
      model: reference of the model whose tokens are banned.
      tasks: files of problems, with commas between.
      types: a table of types, a file of lists, or ids; see ``targets.read``.
      out: folder of the results.
      teacher: reference of the model that substitutions are compared with; None: they are not.
      families: of arms, some of ``FAMILIES``.
      groups: a file of named lists, or ``paper``; empty: the lists of ``types``, if it has any.
      top: types that are knocked out one by one, the first of ``types`` that occur.
      local: of these, types that are also banned at one position only.
      window: positions of a local ban.
      pairs: of these, types that are banned two by two.
      orders: random orders of the cumulative arms.
      settings: how answers are sampled; neither top-k, top-p nor min-p.
      form, grader, limit: how tasks are read and asked, as in ``opd-jax eval``.
      batch: rows (problem, sample, arm) of one call.
      slots: rows of a call that are decoded at a time, see ``rollout.refill``; 0: all.
      margin: the smallest change of accuracy that counts, as a share; 0.01 is the published one.
      effect: the change of accuracy, among the problems that hold a type, that shall be seen.
      power: the probability that it shall be seen with.
      dtype: that is computed in.
    """

    model: str
    tasks: str
    types: str
    out: str
    teacher: str | None = None
    families: tuple[str, ...] = FAMILIES[:3]
    groups: str = ""
    top: int = 50
    local: int = 10
    window: int = 1
    pairs: int = 5
    orders: int = 3
    settings: Settings = dataclasses.field(default_factory=Settings)
    form: Form = dataclasses.field(default_factory=Form)
    grader: str = "math"
    limit: int = 0
    batch: int = 64
    slots: int = 0
    margin: float = 0.01
    effect: float = 0.1
    power: float = 0.8
    dtype: str | None = None

    def __post_init__(self):
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families:
            raise KnockoutError(
                f"--arms names {unknown[0] if unknown else 'nothing'!r}: expected some of "
                f"{', '.join(FAMILIES)}; correct --arms"
            )
        checks = (
            ("top", 1 <= self.top < 2**20, "1 or more"),
            ("local", 1 <= self.local < 2**20, "1 or more"),
            ("window", 1 <= self.window < 2**20, "1 or more positions"),
            ("pairs", 2 <= self.pairs < 2**10, "2 to 1023 types"),
            ("orders", 0 <= self.orders < 2**10, "0 to 1023"),
            ("limit", 0 <= self.limit < 2**31, "0 (all) or a number of problems"),
            ("batch", 1 <= self.batch < 2**20, "1 or more rows"),
            ("margin", 0 < self.margin < 1, "a share above 0, such as 0.01"),
            ("effect", 0 < self.effect <= 1, "a share above 0, up to 1"),
            ("power", 0 < self.power < 1, "a probability, such as 0.8"),
        )
        for name, is_right, expected in checks:
            if not is_right:
                raise KnockoutError(
                    f"{name} is {getattr(self, name)}: expected {expected}; set --{name}"
                )
        needing = "cumulative" if self.has("cumulative") else f"group, --groups={PAPER},"
        if (self.has("cumulative") or self.groups == PAPER) and not self.has("single"):
            raise KnockoutError(
                f"the family {needing} without single, whose effects order its types: expected "
                "both; add single to --arms"
            )
        if self.groups and "group" not in self.families:
            raise KnockoutError(
                f"--groups={self.groups} without the family group, which it is for: expected both; "
                "add group to --arms, or drop --groups"
            )

    def has(self, family: str) -> bool:
        """Whether arms of a family are asked for."""
        return family in self.families


def families(text: str) -> tuple[str, ...]:
    """The families that a text names, with commas between; ``all`` is all of them."""
    names: Sequence[str] = [part.strip() for part in text.split(",") if part.strip()]
    names = FAMILIES if list(names) == ["all"] else names
    return tuple(dict.fromkeys(names))
