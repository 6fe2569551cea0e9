"""``opd-jax rocks``: which tokens carry the KL of a student to its teacher, and how sure is it.

Stage by stage into one folder; a stage whose file is there is not done again, so that the same
command goes on where it was stopped.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax import processes
from opd_jax.instrument import catalogue, collect, controls, groups, outputs, selection
from opd_jax.instrument import corpus as corpora
from opd_jax.instrument.catalogue import Study
from opd_jax.instrument.corpus import TypeStats
from opd_jax.instrument.flags import Flags, RocksError, parse
from opd_jax.instrument.folder import SELECTED
from opd_jax.instrument.workbench import Workbench
from opd_jax.processes import say

_SUM_RTOL = 1e-3  # f32 sums over a corpus against f64 ones: above rounding, below any real error
_TOP = 10  # types that are printed


def main(argv: Sequence[str]) -> int:
    """The command: parse, run, say where the results are."""
    run(parse(argv, catalogue.NAMES))
    return 0


def run(flags: Flags, *, say: Callable[[str], None] = say) -> dict[str, Any]:
    """Do what is asked for, or what is left of it, and return what ``summary.json`` holds.

    Raises:
      RocksError, CorpusError, ModelError, SelectError: what does not fit, with the flag to change.
    """
    studies = catalogue.chosen(flags.extras)
    bench = Workbench(flags, say)
    _ = bench.lab.mesh  # raises before anything is written
    bench.folder.enter(flags, bench.subject, {s.name: s.question for s in catalogue.STUDIES})
    for name, file, question, stage in _stages(bench, studies):
        is_done = (bench.folder.path / file).exists()
        processes.meet(f"{name} is looked at")  # nobody may take what another has just written
        if is_done:
            say(f"{name}: {file} is there")
            continue
        say(f"{name}: {question}")
        begun = time.monotonic()
        stage()
        say(f"{name}: {file} ({time.monotonic() - begun:.0f}s)")
    _draw(bench)
    result, chosen = bench.folder.read(SELECTED), bench.folder.read("selection.json")
    for line in conclusion(result, chosen, bench.folder.path):
        say(line)
    return result


def _stages(
    bench: Workbench, studies: Sequence[Study]
) -> Iterator[tuple[str, str, str, Callable[[], None]]]:
    """Name, last file, what it does in words, and function of each stage, in order."""
    subject = bench.subject
    answers = "taking over" if bench.flags.corpus else f"{subject.writer} answers the prompts"
    source = f" {bench.flags.corpus}" if bench.flags.corpus else ""
    yield (
        "corpus",
        f"corpus/{corpora.MANIFEST}",
        answers + source,
        lambda: _write_corpus(bench),
    )
    yield (
        "scores",
        str(bench.scores_file.relative_to(bench.folder.path)),
        f"KL of every token, {subject.student.name} against {subject.teacher.name}",
        lambda: _write_scores(bench),
    )
    yield (
        "selection",
        SELECTED,
        f"the {bench.flags.k} rocks, with intervals, controls and the null of shuffled KL",
        lambda: _write_selection(bench),
    )
    for study in studies:
        if study.needs_run and subject.student.run is None:
            bench.say(
                f"{study.name}: left out, it looks back at the student before training and "
                f"{subject.student.name} is no trained step of a run; give --run"
            )
            continue
        yield study.name, study.file, study.question, functools.partial(study.fill, bench)


def _write_corpus(bench: Workbench) -> None:
    folder, given = bench.folder.path / "corpus", bench.subject.corpus
    if given is None:
        writer = bench.flags.writer or "student"
        bench.lab.write(folder, writer, processes.indented(bench.say, "  "))
        return

    def copy() -> None:
        part = folder.with_name(".corpus.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(given, part)
        part.rename(folder)

    processes.on_first(copy)


def _write_scores(bench: Workbench) -> None:
    found, on_device = collect.score_types(
        bench.corpus,
        bench.pair,
        batch=bench.flags.batch,
        say=processes.indented(bench.say, "  "),
    )
    if not np.isfinite(found.kl).all():  # before the sums, which would differ by it too
        at = int(np.flatnonzero(~np.isfinite(found.kl))[0])
        raise RocksError(
            f"the KL at position {found.position[at]} of answer {found.answer[at]} is "
            f"{found.kl[at]}: expected finite values; check the weights of both models, or give "
            "another --step"
        )
    on_host = TypeStats.of_occurrences(found)
    if not np.allclose(on_device.kl_sum, on_host.kl_sum, rtol=_SUM_RTOL, atol=_SUM_RTOL):
        worst = int(np.argmax(np.abs(on_device.kl_sum - on_host.kl_sum)))
        raise RocksError(
            f"the KL of id {worst} adds up to {on_device.kl_sum[worst]} on the devices and to "
            f"{on_host.kl_sum[worst]} on the host: expected the same sum; the devices compute "
            "wrongly, run it on others"
        )
    processes.on_first(lambda: found.save(bench.scores_file))


def _write_selection(bench: Workbench) -> None:
    """Everything about which types are selected; ``summary.json`` comes last."""
    flags, rule, text = bench.flags, bench.rule, bench.pair.text
    rocks_k, sums = bench.rocks, bench.sums  # refuses a K above the types seen
    chosen = selection.selection(
        bench.found,
        flags.k,
        token_text=text,
        rule=rule,
        seed=flags.seed,
    )
    bench.folder.write("selection.json", chosen)
    kind = groups.of_types(bench.found, text)
    table = outputs.types_csv(bench.found, rocks_k, kind, score=rule.score, token_text=text)
    bench.folder.write("types.csv", table)
    entries = {"rock": bench.write_list("rock", rocks_k)}
    for how in controls.CONTROLS:
        ids = controls.choose(sums, rocks_k, how, rule=rule, seed=flags.seed)
        residual = controls.residual(sums, rocks_k, ids)
        entries[how] = bench.write_list(how, ids, residual)
    bench.folder.write("lists/lists.json", entries)
    answers = outputs.reader(
        bench.corpus,
        bench.found,
        rocks_k,
        score=rule.score,
        tokenizer=bench.pair.tokenizer,
        token_text=text,
    )
    bench.folder.write("reader.json", answers)
    told = outputs.summary(
        bench.corpus,
        bench.found,
        chosen,
        rocks_k,
        kind,
        token_text=text,
        rule=rule,
    )
    bench.folder.write(SELECTED, told)


def _draw(bench: Workbench) -> None:
    """Figures follow from the other files: they are drawn each time."""

    def draw() -> None:
        from opd_jax.report import rock_figures  # matplotlib takes its time to import

        drawn = rock_figures.draw_all(bench.folder.path)
        bench.say(f"figures: {len(drawn)} in {bench.folder.path / 'figures'}")

    processes.on_first(draw)


def conclusion(result: Mapping[str, Any], chosen: Mapping[str, Any], out: Path) -> list[str]:
    """The results in words, each beside its null, and where the rest is."""
    k = result["k"]
    coverage, halves = outputs.at_k(chosen["coverage"], k), outputs.at_k(chosen["split_half"], k)
    lines = [
        f"{result['tokens']:,} tokens in {result['answers']:,} answers to {result['problems']:,} "
        f"problems: mean KL {result['kl_nats']:.4f} nats",
        f"{k} of {result['types_seen']:,} types seen carry {coverage['value']:.1%} "
        f"({coverage['low']:.1%} to {coverage['high']:.1%}) of the KL, chosen on some of "
        f"{result['problems']:,} problems and measured on the others (measured where chosen: "
        f"{coverage['in_sample']:.1%})",
        f"with KL shuffled among tokens the top {k} would carry {coverage['null']:.1%}, shuffled "
        f"within problems {coverage['null_within']:.1%}",
        f"selected on one half of the problems and on the other, they overlap by Jaccard "
        f"{halves['value']:.2f} (random halvings {halves['low']:.2f} to {halves['high']:.2f}); "
        f"shuffled {halves['null']:.2f}, within problems {halves['null_within']:.2f}",
        f"{result['density_median']:.1%} of the tokens of the median answer are rocks, "
        f"{result['density_corpus']:.1%} of all tokens",
        f"{'id':>9}  {'token':<16} {'of KL':>7} {'count':>7} {'mean KL':>8}  group",
    ]
    for row in result["rocks"][:_TOP]:
        token = repr(row["token"])
        lines.append(
            f"{row['token_id']:>9}  {token:<16} {row['share']:>7.1%} {row['count']:>7,} "
            f"{row['kl_mean']:>8.3f}  {row['group']}"
        )
    named = {
        "every type": "types.csv",
        "ids to gate, and controls": "lists/",
        "statistics": "selection.json",
        "answers, token by token": "reader.json",
        "figures": "figures/",
    }
    named |= {s.name: s.file for s in catalogue.STUDIES if (out / s.file).exists()}
    return [*lines, *(f"{name:<26} {out / file}" for name, file in named.items())]
