"""Every interval and test of the package on simulated data: the rows of the calibration."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import simulated
from scipy import stats as distributions

from opd_jax import changes, stats
from opd_jax.instrument import correlation, null
from opd_jax.instrument.knockout import flips
from opd_jax.instrument.ranking import Rule
from opd_jax.instrument.studies import persistence
from opd_jax.instrument.tally import Tally
from opd_jax.run import arms

Rng = np.random.Generator
ALPHA = 1 - stats.LEVEL


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of the table.

    Attributes:
      name: what is tried, and on what.
      kind: "interval" (how often it holds the truth) or "test" (how often it rejects the truth).
      nominal: what it says of itself.
      slack: by how much a law that holds for many units only may fail at this number.
      judged: whether it can be off.
    """

    name: str
    kind: str
    nominal: float
    slack: float = 0.0
    judged: bool = True


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Rows that one draw tells about.

    Attributes:
      draw: the outcome of each row, 0 or 1 (or a share) from one simulated data set.
      rows: in the order of the outcomes.
      runs: data sets of the full table.
    """

    draw: Callable[[Rng], Sequence[float]]
    rows: tuple[Row, ...]
    runs: int


def interval(name: str, **more) -> Row:
    """A row about an interval at the package's level."""
    return Row(name, "interval", stats.LEVEL, **more)


def test(name: str, **more) -> Row:
    """A row about a test at 5 %."""
    return Row(name, "test", ALPHA, **more)


def holds(found, truth: float) -> bool:
    """Whether an interval (an object, or a row of JSON) holds the truth."""
    low, high = (
        found[k] if isinstance(found, dict) else getattr(found, k) for k in ("low", "high")
    )
    return low is None or high is None or low - 1e-12 <= truth <= high + 1e-12


def rejects(p: float) -> bool:
    """Whether a p-value rejects at 5 %."""
    return p <= ALPHA


def _seed(rng: Rng) -> int:
    return int(rng.integers(2**31))


def mean_of(law: Callable[[Rng], np.ndarray]):
    """The paired bootstrap over problems, of differences of this law with mean 0."""

    def draw(rng: Rng):
        found = stats.bootstrap(law(rng), resamples=600, seed=_seed(rng))
        return holds(found, 0.0), rejects(found.p)

    return draw


def median_of(num: int):
    """The exact interval of a median, of a skewed law."""

    def draw(rng: Rng):
        found = stats.median(rng.exponential(size=num) - math.log(2))
        return holds(found, 0.0), rejects(found.p)

    return draw


def accuracy_of(problems: int, samples: int, seeds: int):
    """The interval of an arm's accuracy, as sweeps and reports print it."""
    truth = simulated.accuracy(seeds)

    def draw(rng: Rng):
        right = simulated.answers(rng, problems, samples, seeds)
        return (holds(arms.accuracy_interval(list(right), resamples=600), truth),)

    return draw


def arms_of(problems: int, samples: int, seeds: int):
    """Two equal arms of a sweep."""

    def draw(rng: Rng):
        base, arm = simulated.two_arms(rng, problems, samples, seeds)
        found = arms.compare_accuracy(list(base), list(arm), 0.02, resamples=600)
        return holds(found, 0.0), rejects(found["p"])

    return draw


def flipped(problems: int, samples: int, down: float, up: float):
    """A ban under which answers flip: its interval, its test, and the bootstrap's interval.

    The test is of no change where there is none; else it is "neutral" said of a change that is the
    margin itself.
    """
    truth = up - down

    def draw(rng: Rng):
        shape = (problems, samples)
        # One sample: flips of problems are independent. Several: some problems flip more often.
        spread = 1.0 if samples == 1 else rng.gamma(0.5, 2.0, size=(problems, 1))
        drawn = rng.random(shape)
        falls = drawn < np.minimum(down * spread, 0.5)
        rises = ~falls & (drawn > 1 - np.minimum(up * spread, 0.5))
        change_N = (rises.astype(float) - falls).mean(axis=1)
        low, high = changes.interval(changes.flips(change_N))
        truth_here = truth if samples == 1 else _truth(down, up)
        margin = abs(truth_here)
        is_neutral = -margin < low and high < margin
        return (
            holds({"low": low, "high": high}, truth_here),
            is_neutral if truth else rejects(flips.test(change_N)),
            holds(stats.bootstrap(change_N, resamples=400, seed=_seed(rng)), truth_here),
        )

    return draw


@functools.cache
def _truth(down: float, up: float) -> float:
    """The change where probabilities that would pass 0.5 are cut there."""
    spread = np.random.default_rng(0).gamma(0.5, 2.0, size=1_000_000)
    return float((np.minimum(up * spread, 0.5) - np.minimum(down * spread, 0.5)).mean())


def hardly_changed(problems: int, down: float, up: float):
    """Two evaluations that differ by the margin, in few problems; and by the bootstrap alone."""
    truth = up - down

    def draw(rng: Rng):
        change_N = rng.choice([1.0, -1.0, 0.0], p=[up, down, 1 - up - down], size=problems)
        alone = stats.bootstrap(change_N, margin=abs(truth), resamples=600, seed=_seed(rng))
        outcomes = []
        for found in (changes.widened(alone, change_N, abs(truth)), alone):
            assert found.p_equivalent is not None
            outcomes += [holds(found, truth), rejects(found.p_equivalent)]
        return tuple(outcomes)

    return draw


def equivalence_of(problems: int, seeds: int):
    """Two one-sided tests where the difference is the margin itself: they must not say "less"."""

    def draw(rng: Rng):
        base, arm = simulated.two_arms(rng, problems, 4, seeds)
        margin = 0.1
        found = stats.hierarchical_bootstrap(
            list(base), list(arm + margin), margin=margin, resamples=600, seed=_seed(rng)
        )
        assert found.p_equivalent is not None
        return (rejects(found.p_equivalent),)

    return draw


def over_seeds(rng: Rng):
    """Student's t over three training seeds, for KL."""
    found = stats.student(rng.normal(0, 0.1, 3), margin=0.2)
    at_margin = stats.student(rng.normal(0.2, 0.1, 3), margin=0.2)
    assert at_margin.p_equivalent is not None
    return holds(found, 0.0), rejects(found.p), rejects(at_margin.p_equivalent)


def many_tests(rng: Rng):
    """Twenty tests: all true; and half of them true, with Benjamini-Hochberg's false share."""
    z = rng.normal(size=20)
    shifted = z + np.repeat([0.0, 3.0], 10)
    p, q = (2 * distributions.norm.sf(np.abs(x)) for x in (z, shifted))
    found = stats.benjamini_hochberg(q, ALPHA)
    false = found[:10].sum() / max(found.sum(), 1)
    return (
        bool(stats.bonferroni(p, ALPHA).any()),
        bool(stats.benjamini_hochberg(p, ALPHA).any()),
        float(false),
        rejects(stats.sign_test(int(np.sum(z > 0)), 20)),
    )


def coverage(rng: Rng):
    """Share of KL in the top K: the list's own share in endless further text."""
    found, truth = simulated.corpus(rng, 64, 1000)
    tally, sizes = Tally.of(found), (10, 100)
    rows = null.coverage(tally, sizes, rule=Rule(), resamples=150, permutations=1, rng=rng)
    outcomes = [holds(row, truth[_top(tally, row["k"])].sum()) for row in rows]
    # As published: types fixed, and measured where they were chosen.
    weight_RP = rng.multinomial(64, np.full(64, 1 / 64), 300)
    kl_RU = weight_RP @ tally.kl_sum
    for k in sizes:
        ids = _top(tally, k)
        here = np.searchsorted(tally.token_U, ids)
        low, high = stats.quantiles(kl_RU[:, here].sum(axis=1) / kl_RU.sum(axis=1))
        outcomes.append(low <= truth[ids].sum() <= high)
    return outcomes


def _top(tally: Tally, k: int) -> np.ndarray:
    return tally.token_U[Rule().rank(tally.stats())[:k]]


def no_type_effect(rng: Rng):
    """Shuffled KL, where the type has nothing to do with it."""
    found, _ = simulated.corpus(rng, 32, 200, effect=0.0)
    flat, tied = (
        null.coverage(Tally.of(x), [k], rule=Rule(), resamples=2, permutations=39, rng=rng)[0]
        for x, k in ((found, 20), (simulated.topics(rng), 4))
    )
    return [rejects(row[f"{name}_p"]) for row in (flat, tied) for name in ("null", "null_within")]


def nothing_unlearned(rng: Rng):
    """Two models of which one is better or worse at whole problems, by luck."""
    result = persistence.analyse(
        simulated.unlearned(rng), k=10, rule=Rule(min_count=2), seed=_seed(rng), resamples=400
    )
    whole, rock = (
        next(
            row for row in result["tests"] if (row["group"], row["effect"]) == (group, "alignment")
        )
        for group in ("all", "rock")
    )
    contrast = result["contrasts"][0]
    any_found = min(row["p_bootstrap_adjusted"] for row in result["tests"])
    return (
        holds(whole, 0.0),
        rejects(whole["p_bootstrap"]),
        rejects(rock["p_bootstrap"]),
        rejects(any_found),
        rejects(contrast["p_bootstrap"]),
        rejects(whole["p_types"]),
    )


def rocks_at_the_margin(rng: Rng):
    """The rocks keep a tenth more of their KL than others: not "as much"."""
    scores = simulated.unlearned(rng, problems=80, keeps=math.exp(persistence.MARGIN))
    result = persistence.analyse(
        scores, k=10, rule=Rule(min_count=2), seed=_seed(rng), resamples=400
    )
    return (rejects(result["contrasts"][0]["p_equivalent"]),)


def confounded(num: int, reliability: float):
    """Two quantities that correlate through a third alone, which is measured with noise."""

    def draw(rng: Rng):
        x, y, given = simulated.confounded(rng, num, reliability)
        found = correlation.partial(x, y, [given], resamples=300, seed=_seed(rng))
        ranks = [distributions.rankdata(v) for v in (x, y, sum(given))]
        design = np.column_stack([np.ones(num), ranks[2]])
        left = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks[:2]]
        naive = float(np.asarray(distributions.pearsonr(*left))[1])
        return rejects(found.p), rejects(naive)

    return draw


def uncorrelated(rng: Rng):
    """Spearman's rank correlation by permutations."""
    found = correlation.plain(*rng.normal(size=(2, 40)), permutations=199, seed=_seed(rng))
    return (rejects(found.p),)


MEANS = {
    "20 normal differences": (lambda rng: rng.normal(size=20), {"slack": 0.01}),
    "256 normal differences": (lambda rng: rng.normal(size=256), {"slack": 0.01}),
    "20 differences with a long tail": (
        lambda rng: rng.exponential(size=20) - 1,
        {"judged": False},
    ),
    "100 differences with a long tail": (
        lambda rng: rng.exponential(size=100) - 1,
        {"slack": 0.02},
    ),
}
PUBLISHED = {"judged": False}
SIMULATIONS = (
    *(
        Simulation(
            mean_of(law),
            (interval(f"mean, bootstrap; {name}", **more), test(f"mean is 0; {name}", **more)),
            2000,
        )
        for name, (law, more) in MEANS.items()
    ),
    *(
        Simulation(
            median_of(num),
            (
                interval(f"median, exact; {num} skewed values"),
                test(f"median is 0, exact; {num} skewed values"),
            ),
            2000,
        )
        for num in (8, 40)
    ),
    *(
        Simulation(
            accuracy_of(problems, samples, seeds),
            (
                interval(
                    f"accuracy; {problems} problems, answers each {samples}, seeds {seeds}",
                    slack=0.01,
                ),
            ),
            runs,
        )
        for problems, samples, seeds, runs in ((64, 1, 1, 3000), (64, 4, 1, 3000), (64, 4, 3, 1500))
    ),
    *(
        Simulation(
            arms_of(problems, samples, seeds),
            (
                interval(f"change of accuracy; {told}", slack=0.01),
                test(f"arms are alike; {told}", slack=0.01),
            ),
            1500,
        )
        for problems, samples, seeds, told in (
            (64, 1, 1, "64 problems, 1 answer, 1 seed (McNemar)"),
            (64, 4, 1, "64 problems, 4 answers, 1 seed"),
            (64, 4, 3, "64 problems, 4 answers, 3 seeds"),
            (64, 4, 5, "64 problems, 4 answers, 5 seeds"),
        )
    ),
    *(
        Simulation(
            flipped(problems, samples, down, up),
            (
                interval(f"ban, change of accuracy; {told}", slack=0.02),
                test(f"ban changes nothing, exact; {told}")
                if down == up
                else Row(f"ban of the margin's change is neutral; {told}", "test", 0.025, 0.01),
                interval(f"ban, bootstrap over problems; {told}", **PUBLISHED),
            ),
            1500,
        )
        for problems, samples, down, up, told in (
            (100, 1, 0.1, 0.1, "100 problems, a tenth down, a tenth up"),
            (30, 1, 0.03, 0.0, "30 problems, 3% down"),
            (2000, 1, 0.05, 0.02, "2,000 problems, 5% down, 2% up"),
            (100, 4, 0.1, 0.05, "100 problems, 4 answers, a tenth down, 5% up"),
        )
    ),
    *(
        Simulation(
            equivalence_of(problems, seeds),
            (test(f"accuracy differs by the margin; {problems} problems, {told}", slack=0.01),),
            1000,
        )
        for problems, seeds, told in ((64, 1, "1 seed"), (64, 3, "3 seeds"))
    ),
    Simulation(
        over_seeds,
        (
            interval("mean over 3 seeds, Student"),
            test("KL is alike; 3 seeds"),
            test("KL differs by the margin; 3 seeds"),
        ),
        4000,
    ),
    Simulation(
        many_tests,
        (
            test("any of 20, Bonferroni"),
            test("any of 20, Benjamini-Hochberg"),
            test("false share of what is found, Benjamini-Hochberg"),
            test("sign test; 20 signs"),
        ),
        4000,
    ),
    Simulation(
        coverage,
        (
            interval("share of KL in the top 10; 64 problems, 1,000 types"),
            interval("share of KL in the top 100; 64 problems, 1,000 types"),
            interval("top 10, types fixed and measured where chosen (published)", **PUBLISHED),
            interval("top 100, types fixed and measured where chosen (published)", **PUBLISHED),
        ),
        300,
    ),
    Simulation(
        no_type_effect,
        (
            test("types carry no more than by chance; shuffled among all positions"),
            test("types carry no more than by chance; shuffled within problems"),
            test("KL is of the problem, not the type; shuffled among all positions", **PUBLISHED),
            test("KL is of the problem, not the type; shuffled within problems"),
        ),
        800,
    ),
    Simulation(
        nothing_unlearned,
        (
            interval("change of KL of all types; 20 problems", slack=0.02),
            test("KL did not change, all types; 20 problems", slack=0.02),
            test("KL of the rocks did not change; 20 problems", slack=0.02),
            test("any change, Benjamini-Hochberg", slack=0.02),
            test("rocks keep as much as matched types", slack=0.02),
            test("KL did not change, Wilcoxon over types (published)", **PUBLISHED),
        ),
        500,
    ),
    Simulation(
        rocks_at_the_margin,
        (test("rocks keep the margin more than matched types; 40 problems", slack=0.02),),
        500,
    ),
    Simulation(uncorrelated, (test("rank correlation; 40 types"),), 1500),
    *(
        Simulation(
            confounded(num, reliability),
            (
                test(f"partial correlation; {num} types, reliability {reliability}", slack=0.015),
                test(
                    f"partial correlation; {num} types, {reliability}, noise not accounted for",
                    **PUBLISHED,
                ),
            ),
            600,
        )
        for num, reliability in ((100, 0.9), (100, 0.6), (200, 0.6))
    ),
    *(
        Simulation(
            hardly_changed(problems, down, up),
            (
                interval(f"few changes of accuracy; {told}", slack=0.02),
                test(f"few changes, differs by the margin; {told}", slack=0.01),
                interval(f"few changes, bootstrap; {told}", **PUBLISHED),
                test(f"few changes, margin, bootstrap; {told}", **PUBLISHED),
            ),
            1000,
        )
        for problems, down, up, told in (
            (30, 0.02, 0.0, "30 problems, 2% down"),
            (100, 0.03, 0.01, "100 problems, 3% down, 1% up"),
            (500, 0.02, 0.0, "500 problems, 2% down"),
        )
    ),
)  # fmt: skip
