"""Hand-made results of the instrument, in small: OUT of `opd-jax rocks`, runs and a sweep."""

import csv
import json
from pathlib import Path

import numpy as np
import tiny_run

from opd_jax import stats
from opd_jax.instrument import corpus

TOKENS = ["␣the", "⏎", ",", "␣$", "=", "1", "2", "␣so", "Wait", "␣a", "</script>", "␣x_1$", "中"]
ARMS = ("full", "rock", "share_matched")
STUDIES = ("references", "gradients", "context", "persistence", "optimizer")
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror='a'>&amp;"
BEFORE, AFTER, TAUGHT = (  # of 60 problems: 20, 38 and 57 right
    [i < 20 for i in range(60)],
    [4 <= i < 42 for i in range(60)],
    [i >= 3 for i in range(60)],
)
TEXT = {10: "</script><b>&amp;", 11: "␣$x_1$"}  # what a page must show as it is


def token(i: int) -> str:
    return TOKENS[i] if i < len(TOKENS) else f"␣w{i}"


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_out(folder: Path, *, types: int = 300, k: int = 20, seed: int = 0) -> Path:
    """Write OUT with every file a figure or a page reads; counts fall by Zipf's law."""
    rng = np.random.default_rng(seed)
    count = np.ceil(2000 / np.arange(1, types + 1)).astype(int)
    mean = rng.lognormal(-1.2, 1.0, types)
    kl = count * mean
    order = np.argsort(-kl, kind="stable")
    rocks = order[:k].tolist()
    write(
        folder / "rocks.json",
        {
            "student": "run@120",
            "teacher": "embedded:teacher",
            "writer": "student",
            "prompts": "folder/" * 20,
            "studies": {name: f"What of {name}?" for name in STUDIES},
        },
    )
    rows = []
    for rank, i in enumerate(order, 1):
        rows.append(
            {
                "token_id": int(i),
                "token": token(i),
                "count": int(count[i]),
                "token_share": count[i] / count.sum(),
                "kl_sum": kl[i],
                "kl_mean": mean[i],
                "kl_std": mean[i],
                "share": kl[i] / kl.sum(),
                "rank": rank,
                "member": rank <= k,
                "group": ["content", "digit", "whitespace_markup"][i % 3],
                "log_ratio_mean": mean[i] * 0.9,
                "entropy_mean": 1.1,
                "teacher_entropy_mean": 0.8,
            }
        )
    with (folder / "types.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _write_selection(folder, rows, count, mean, k)
    _write_gradients(folder, rows, k)
    _write_persistence(folder)
    _write_references(folder)
    _write_context(folder, k)
    _write_corpus(folder, rng, count, rocks)
    _write_reader(folder, rng, rows)
    write(folder / "lists" / "rock.json", [int(i) for i in rocks])
    return folder


def _write_selection(folder, rows, count, mean, k) -> None:
    grid = [g for g in (5, 10, 20, 50, 100, 200) if g <= len(rows)]
    share = np.cumsum([row["share"] for row in rows])
    bins = []
    for low in np.arange(0, 3.4, 0.2):
        inside = mean[(np.log10(count) >= low) & (np.log10(count) < low + 0.2)]
        if len(inside) > 1:
            p10, p90 = np.quantile(inside, [0.1, 0.9])
            bins.append(
                {
                    "log10_count": low + 0.1,
                    "mean": inside.mean(),
                    "p10": p10,
                    "p90": p90,
                    "types": len(inside),
                }
            )
    rock = [{n: row[n] for n in ("token_id", "token", "count", "kl_mean")} for row in rows[:k]]

    def line(values, null, is_coverage=False):
        return [
            {
                "k": g,
                "value": v,
                "low": v - 0.04,
                "high": v + 0.04,
                "null": n,
                "null_low": n - 0.03,
                "null_high": n + 0.03,
                "null_within": n + 0.02,
                "null_within_low": n - 0.01,
                "null_within_high": n + 0.05,
                **({"in_sample": v + 0.03} if is_coverage else {}),
            }
            for g, v, n in zip(grid, values, null, strict=True)
        ]

    coverage = [float(share[g - 1]) for g in grid]
    write(
        folder / "selection.json",
        {
            "k": k,
            "k_grid": grid,
            "corpus": {"problems": 64, "answers": 64, "tokens": 12000, "types": len(rows)},
            "coverage_note": "coverage: types are chosen on 4 of 5 parts of the 64 problems",
            "coverage": line(coverage, [0.8 * v for v in coverage], True),
            "split_half": line(np.linspace(0.6, 0.8, len(grid)), np.linspace(0.4, 0.7, len(grid))),
            "nested": [{"k": k, "n": 50, "value": 0.7}],
            "nested_mean": [{"k": g, "value": 0.85} for g in grid],
            "metrics": [],
            "density": [
                {
                    "skip_top": skip,
                    "k": k,
                    "median": 0.5 - 0.03 * skip,
                    "p25": 0.42 - 0.03 * skip,
                    "p75": 0.6 - 0.03 * skip,
                    "corpus": 0.52 - 0.03 * skip,
                    "kl_share_median": 0.55,
                }
                for skip in (0, 5)
            ],
            "funnel": {"bins": bins, "kl_mean": 0.42, "rocks": rock},
            "controls": [
                {
                    "name": name,
                    "types": k,
                    "token_share": tokens,
                    "kl_share": kl,
                    "in_sample_kl_share": kl + 0.02,
                    "residual": None,
                    "overlap_with_rocks": overlap,
                }
                for name, tokens, kl, overlap in (
                    ("rock", 0.5, 0.62, k),
                    ("next_ranks", 0.08, 0.09, 0),
                    ("hungarian", 0.12, 0.1, 0),
                    ("share_matched", 0.5, 0.45, 12),
                    ("top_freq", 0.55, 0.56, 14),
                )
            ],
            "groups": [
                {
                    "group": group,
                    "types": 100,
                    "rocks": rocks,
                    "token_share": tokens,
                    "kl_share": kl,
                    "rock_token_share": tokens / 2,
                }
                for group, rocks, tokens, kl in (
                    ("content", 6, 0.4, 0.3),
                    ("digit", 9, 0.3, 0.45),
                    ("punctuation", 5, 0.3, 0.25),
                )
            ],
            "estimators": {},
            "null_note": "KL shuffled among positions: what token frequencies alone give.",
        },
    )
    write(
        folder / "summary.json",
        {
            "problems": 64,
            "answers": 64,
            "tokens": int(count.sum()),
            "types_seen": len(rows),
            "kl_nats": 0.42,
            "kl_sum": 1.0,
            "k": k,
            "skip_top": 0,
            "min_count": 1,
            "coverage": 0.62,
            "coverage_low": 0.58,
            "coverage_high": 0.66,
            "coverage_in_sample": 0.65,
            "coverage_null": 0.5,
            "coverage_null_within": 0.52,
            "density_median": 0.5,
            "density_corpus": 0.52,
            "split_half": 0.7,
            "split_half_null": 0.5,
            "spearman_exact_vs_sampled": 0.9,
            "jaccard_exact_vs_sampled": 0.8,
            "rocks": [],
        },
    )


def _write_gradients(folder, rows, k) -> None:
    names = ("mean_norm", "norm_of_mean", "cos_balanced", "cos_global")
    names += ("cos_balanced_loo", "cos_global_loo")
    base = {"rock": (0.3, 0.05, 0.2), "high_kl": (0.5, 0.4, 0.1), "control": (0.25, 0.1, 0.12)}
    groups = []
    for group, (norm, of_mean, cos) in base.items():
        values = dict(zip(names, (norm, of_mean, cos, cos * 1.5, cos * 0.6, cos), strict=True))
        row = {"group": group, "types": k, "positions": 900}
        for name, value in values.items():
            row |= {name: value, f"{name}_low": value * 0.8, f"{name}_high": value * 1.2}
        row["norm_at"] = {"2": norm * 0.8, "8": norm * 0.5}
        row["norm_at_low"] = {"2": norm * 0.7, "8": norm * 0.4}
        row["norm_at_high"] = {"2": norm * 0.9, "8": norm * 0.6}
        groups.append(row)
    write(folder / "gradients.json", {"k": k, "types": [], "groups": groups, "identities": {}})


def _write_persistence(folder) -> None:
    models = ["step-0", "step-40", "step-120"]
    groups = [
        {"group": g, "types": 20, "matrix": [[s / (i + 1) + 0.1 * j for j in range(3)]
                                             for i in range(3)]}
        for g, s in (("rock", 1.2), ("high_kl", 4.0), ("control", 0.8))
    ]  # fmt: skip
    tests = [
        {
            "group": group,
            "effect": effect,
            "from": "step-0",
            "to": "step-120",
            "delta": delta,
            "relative": -0.5,
            "low": delta - 0.1,
            "high": delta + 0.1,
            "p_types": 0.01,
            "p_bootstrap": 0.01,
            "p_bootstrap_adjusted": 0.02,
            "types": 20,
        }
        for group, delta in (("rock", -0.8), ("high_kl", -2.6), ("control", -0.5))
        for effect in ("alignment", "context_drift", "both")
    ]
    write(
        folder / "persistence.json",
        {
            "models": models,
            "corpora": models,
            "groups": groups,
            "tests": tests,
            "contrasts": [{"p_bootstrap_adjusted": 0.3, "p_equivalent_adjusted": 0.04}],
            "margin": 0.0953,
            "note": "n",
        },
    )


def _write_references(folder) -> None:
    corpora = [
        {
            "name": name,
            "tokens": 1000,
            "kl_nats": kl,
            "coverage": coverage,
            "coverage_low": coverage - 0.02,
            "coverage_high": coverage + 0.02,
            "coverage_null": coverage - 0.1,
            "coverage_null_within": coverage - 0.08,
            "density_median": 0.5,
            "types_seen": 200,
        }
        for name, kl, coverage in (("student", 0.42, 0.62), ("teacher", 0.9, 0.7))
    ]
    jaccard = [[1.0, 0.25], [0.25, 1.0]]
    by_chance = [[1.0, 0.1], [0.1, 1.0]]
    data = {"corpora": corpora, "jaccard": jaccard, "jaccard_null": by_chance, "note": "n"}
    write(folder / "references.json", data)
    groups = [
        {
            "group": group,
            "types": 20,
            "token_share": 0.3,
            "second_moment": [value, 2 * value],
            "effective_step": [0.2, None],
        }
        for group, value in (("rock", 1e-6), ("control", 1e-8))
    ]
    tests = [{"p_adjusted": 0.01}, {"p_adjusted": 0.6}]
    write(
        folder / "optimizer.json",
        {"steps": [40, 120], "groups": groups, "tests": tests, "note": "n"},
    )


def _write_context(folder, k):
    points = [
        {"window": 4, "gamma": gamma, "eta": 0.5, "rocks_kept": kept, "control": {"rocks_kept": c}}
        for gamma, kept, c in ((0.8, 9, 7), (0.9, 4, 3), (0.95, 1, 2))
    ]
    data = {"k": k, "grid": points, "default": points[1], "types": [], "note": "n"}
    write(folder / "context.json", data)


def _write_corpus(folder, rng, count, rocks) -> None:
    ids = [rng.choice(len(count), size=40, p=count / count.sum()) for _ in range(30)]
    rows = [
        {"prompt": [1, 2], "answer": a, "problem": i, "truncated": False} for i, a in enumerate(ids)
    ]
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    corpus.write_answers(folder / "corpus", 0, rows)
    corpus.write_manifest(folder / "corpus", {"pieces": 1})
    path = folder / "selection.json"
    shares = [float(np.isin(answer, rocks).mean()) for answer in ids]
    write(path, json.loads(path.read_text()) | {"answer_shares": shares})


def _write_reader(folder, rng, rows, answers: int = 3, length: int = 90) -> None:
    by_id = {row["token_id"]: row for row in rows}
    out = []
    for n in range(answers):
        # The first answer starts with every special token once.
        ids = [10, 11, 1, 1, 12] if n == 0 else []
        ids += rng.choice(60, size=length - len(ids)).tolist()
        tokens = {
            "id": ids,
            "text": [TEXT.get(i, token(i)) for i in ids],
            "kl": [round(float(v), 5) for v in rng.lognormal(-1.5, 1.6, length)],
            "entropy": [1.0] * length,
            "teacher_entropy": [0.5] * length,
            "logp": [-0.5] * length,
            "teacher_logp": [-1.25] * length,
            "score": [by_id[i]["kl_sum"] for i in ids],
            "rank": [by_id[i]["rank"] for i in ids],
            "rock": [by_id[i]["member"] for i in ids],
            "weight": [0.0 if by_id[i]["member"] else 1.0 for i in ids],
        }
        out.append(
            {
                "problem": n,
                "prompt": f"What is {n} + 1?",
                "text": "an answer",
                "truncated": n == 2,
                "writer": "student",
                "tokens": tokens,
            }
        )
    write(folder / "reader.json", {"answers": out})


def make_run(folder: Path, *, seed: int = 0, steps: int = 40, floor: float = 0.3, **config) -> Path:
    """Write the files of a run; keyword arguments change the config (``teacher__path=...``)."""
    rng = np.random.default_rng(seed)
    settings = {
        "student.path": "embedded:student",
        "teacher.path": "embedded:teacher",
        "data.heldout": "embedded:prompts/heldout.jsonl",
        "kl.vocab_size": None,
        "rock.mode": "off",
        "seed": seed,
    } | {name.replace("__", "."): value for name, value in config.items()}
    write(folder / "run.json", {"config": settings, "stop_ids": [0]})
    lines = []
    for step in range(steps + 1):
        kl = floor + 8 * float(np.exp(-step / 6)) + 0.02 * float(rng.random())
        if step:
            lines.append({"step": step, "kl_nats": kl})
        if step % 10 == 0:
            accuracy = 0.3 + 0.4 * step / steps + 0.05 * float(rng.random())
            lines.append({"step": step, "eval/kl_nats": kl, "eval/accuracy": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    graded = [  # of 50 prompts
        {"step": s, "index": [*range(50)], "correct": [[i < n] for i in range(50)]}
        for s, n in ((0, 15), (steps, 35))
    ]
    (folder / "graded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in graded))
    side = {"accuracy": 0.3, "kl_nats": 8.3, "mean_length": 40.0}
    rock = {"token_id": 1, "token": "⏎", "share": 0.1, "kl_mean": 1.0, "token_share": 0.05}
    write(
        folder / "summary.json",
        tiny_run.SUMMARY
        | {
            "before": side,
            "after": side | {"accuracy": 0.7, "kl_nats": floor},
            "steps": steps,
            "seconds": 12.0,
            "rocks": [rock | {"member": False}],
        },
    )
    ids = [int(i) for i in rng.integers(1, 200, 12)]
    sample = {"prompt": "1 + 1?", "answer": "2", "ids": ids, "truncated": False}
    sample["kl_nats"] = [float(v) for v in rng.lognormal(-1, 1, 12)]
    (folder / "samples.jsonl").write_text(json.dumps({"step": 0, "samples": [sample]}) + "\n")
    return folder


def make_answers(folder, *, before=BEFORE, after=AFTER, teacher=TAUGHT, text=HOSTILE):
    """Write the files of a run that has questions, answers as text and a teacher."""
    make_run(folder)
    index = [*range(len(before))]

    def line(right, who):
        return {
            "index": index,
            "correct": [[r] for r in right],
            "reason": [["same text" if r else f"another number {HOSTILE}"] for r in right],
            "text": [[f"{who} answers {i} {text}"] for i in index],
        }

    lines = [{"step": s, **line(r, w)} for s, r, w in ((0, before, "old"), (40, after, "new"))]
    (folder / "graded.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    gold = [{"index": i, "prompt": f"What is {i}? {text}", "gold": [f"{i}<b>"]} for i in index]
    write(folder / "questions.json", gold)
    result = evaluation(teacher)
    write(folder / "teacher.json", {"how": {}, "result": result} | line(teacher, "top"))
    sides = {"before": evaluation(before, 8.3), "after": evaluation(after, 0.2), "teacher": result}
    change(folder / "summary.json", **sides, padding_share=0.318, seconds=193.0)
    return folder


def evaluation(right, kl=None):
    low, high = stats.share_interval([float(r) for r in right])
    share = float(np.mean(right))
    return {"accuracy": share, "accuracy_low": low, "accuracy_high": high, "kl_nats": kl}


def change(path, **values):
    write(path, json.loads(path.read_text()) | values)


def make_sweep(folder: Path, *, seeds: int = 3) -> Path:
    """Write a sweep of ARMS with its runs."""
    arms, comparisons = [], []
    for number, arm in enumerate(ARMS):
        runs = [f"{arm}/seed-{s}" for s in range(seeds)]
        for s, run in enumerate(runs):
            make_run(folder / run, seed=10 * number + s, floor=0.3 + 0.2 * number)
        values = {"accuracy": 0.7 - 0.05 * number, "kl_nats": 0.3 + 0.2 * number, "step_s": 1.2}
        arms.append(
            {
                "arm": arm,
                "masked_share": 0.25 * bool(number),
                "normaliser": "tokens",
                "runs": runs,
                "seeds": list(range(seeds)),
                "metrics": {
                    name: {"mean": v, "low": 0.9 * v, "high": 1.1 * v, "values": [v] * seeds}
                    for name, v in values.items()
                },
            }
        )
        if number:
            comparisons += [
                {
                    "arm": arm,
                    "metric": name,
                    "delta": delta * number,
                    "low": delta * number - 0.04,
                    "high": delta * number + 0.04,
                    "p": 0.03,
                    "p_adjusted": 0.06,
                    "p_equivalent": 0.5,
                    "p_equivalent_adjusted": 0.6,
                    "margin": 0.02,
                    "test": "paired bootstrap over seeds and problems",
                    "verdict": "undecided",
                }
                for name, delta in (("accuracy", -0.05), ("kl_nats", 0.2))
            ]
    write(
        folder / "sweep.json",
        {
            "baseline": "full",
            "arms": arms,
            "start": {"accuracy": 0.3, "kl_nats": 8.3},
            "start_interval": {"low": 0.19, "high": 0.44},
            "margins": {"accuracy": 0.02, "kl": 0.05},
            "comparisons": comparisons,
            "budget": [
                {"against": "dealt", "masked_share": 0.25, "masked_share_against": 0.26}
                | row
                | {"p_adjusted": None if seeds == 1 and row["metric"] != "accuracy" else 0.03}
                | {"verdict": "different"}
                for row in comparisons
            ],
            "predictions": {"rock": "falls <b>"},
            "note": "three seeds",
        },
    )
    return folder
