"""Before anything is banned: which effects could be seen at all, in so many problems.

The exact test needs a number of flips in one direction, and only what is right can fall. The
estimate is the best that can be had: all flips in one direction, Bonferroni over the family.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from opd_jax.instrument.knockout import flips
from opd_jax.instrument.knockout.answered import Arm, Baseline
from opd_jax.instrument.knockout.request import KnockoutError, Request

_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What one arm could show.

    Attributes:
      arm: the arm.
      held: problems that hold one of its ids.
      fall, rise: smallest change of accuracy among them that is seen with the power asked for; None
        where there are too few right (wrong) ones.
    """

    arm: Arm
    held: int
    fall: float | None
    rise: float | None

    def sees(self, effect: float) -> bool:
        """Whether an effect of this size, in either direction, is seen."""
        return any(x is not None and x <= effect for x in (self.fall, self.rise))


def of(arms: Sequence[Arm], baseline: Baseline, power: float) -> list[Outlook]:
    """What arms of one family could show."""
    alpha = flips.ALPHA / max(len(arms), 1)
    right_N = baseline.correct_NK.mean(axis=1) > 0.5
    found = []
    for arm in arms:
        held_N = baseline.holds(arm.ids).any(axis=1) & baseline.used(arm)
        held = int(held_N.sum())
        ends = []
        for number in (int(np.sum(held_N & right_N)), int(np.sum(held_N & ~right_N))):
            share = flips.smallest(number, alpha, power)
            ends.append(None if share is None else share * number / held)
        found.append(Outlook(arm, held, *ends))
    return found


def _families(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        found.setdefault(arm.family, []).append(arm)
    return found


def lines(arms: Sequence[Arm], baseline: Baseline, request: Request) -> Iterator[str]:
    """The outlook for a reader, family by family."""
    base = float(baseline.correct_NK.mean())
    yield f"baseline: {base:.1%} of {len(baseline.rows):,} problems right"
    for name, some in _families(arms).items():
        found = of(some, baseline, request.power)
        held = sorted(each.held for each in found)
        falls = [each.fall for each in found if each.fall is not None]
        told = (
            f"{name}: {len(some)} arms, held by {held[0]:,} to {held[-1]:,} problems (median "
            f"{statistics.median(held):,.0f}); {flips.least_flips(flips.ALPHA / len(some))} flips "
            "in one direction are the least that is told from chance"
        )
        if falls:
            told += (
                f"; at best a fall by {100 * min(falls):.1f} to {100 * max(falls):.1f} points "
                f"(median {100 * statistics.median(falls):.1f}) among these problems is seen with "
                f"power {request.power:g}"
            )
        yield told
        blind = [each for each in found if not each.sees(request.effect)]
        if blind:
            names = ", ".join(f"{each.arm.name} ({each.held})" for each in blind[:_NAMED])
            yield (
                f"warning: {len(blind)} of {len(some)} arms of {name} are held by too few problems "
                f"for {100 * request.effect:g} points: {names}{', ...' * (len(blind) > _NAMED)}"
            )


def check(arms: Sequence[Arm], baseline: Baseline, request: Request) -> None:
    """Refuse a knockout that could show nothing.

    Raises:
      KnockoutError: no arm has the power that is asked for.
    """
    best: list[Outlook] = []
    for some in _families(arms).values():
        found = of(some, baseline, request.power)
        if any(each.sees(request.effect) for each in found):
            return
        best += found
    most = max(best, key=lambda each: each.held)
    ends = [x for each in best for x in (each.fall, each.rise) if x is not None]
    seen = f"the smallest is {100 * min(ends):.1f} points" if ends else "none would be seen"
    raise KnockoutError(
        f"too few problems: {len(baseline.rows)} of them, and {most.arm.name!r} is held by "
        f"{most.held}; no arm would show a change of {100 * request.effect:g} points with power "
        f"{request.power:g} ({seen}): expected one that would; give more problems (--limit, "
        "--tasks), fewer arms (--top, --arms), or another --effect or --power"
    )
