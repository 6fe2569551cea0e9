"""Imports go one way: down one ordered list of rooms, and inside a room down its own list."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "opd_jax"

# A module may import what stands before it. A room is a folder with its own list.
ORDER: list[str | tuple[str, list]] = [
    # the ground
    "files",
    "records",
    "rules",
    "bounded",
    "processes",
    "mesh",
    "rounds",
    "command",
    "pytrees",
    "stats",
    "changes",
    # the algorithm, its models and its data
    "divergence",
    "agreement",
    "kl",
    "rock",
    "position",
    "optim",
    (
        "models",
        [
            "params",
            "linear",
            "rope",
            "attention",
            "families",
            "architecture",
            "paged",
            "kv_cache",
            "kernels",
            "lora",
            "arranged",
            "grouped",
            "moe",
            "embedding",
            "transformer",
            "resting",
            "memory",
            "hf_rope",
            "hf_layers",
            "hf_composite",
            "hf_config",
            "hf_weights",
            "hf_folder",
            "streaming",
            "hf",
            "peft",
        ],
    ),
    (
        "data",
        [
            "templates",
            "tokenizer",
            "rows",
            "fields",
            "privileged",
            "completions",
            "widths",
            "packing",
            "prompts",
            "batches",
        ],
    ),
    "routes",
    "objective",
    ("rollout", ["inversion", "sampling", "drawn", "refill", "decode", "regrouped", "answers"]),
    "pieces",
    "steps",
    # what a run is, and what it leaves on disk
    "spec",
    "between",
    "config",
    "glossary",
    (
        "store",
        [
            "fingerprint",
            "workdir",
            "hub",
            "checkpoint_record",
            "state_arrays",
            "checkpoint",
            "pair",
            "run_files",
            "model_card",
            "export",
            "table",
        ],
    ),
    # what is done with it
    (
        "evaluate",
        [
            "arithmetic",
            "cleaning",
            "finding",
            "quantities",
            "judge",
            "structure",
            "equality",
            "instructions",
            "grading",
            "heldout",
            "growth",
            "problems",
            "tasks",
            "metrics",
            "results",
            "asked",
            "benchmark",
            "generate",
            "command",
            "scoring",
            "lm_eval",
            "harness",
        ],
    ),
    (
        "report",
        [
            "accuracy",
            "outcome",
            "style",
            "curve_figures",
            "study_figures",
            "rock_figures",
            "run_figure",
            "markup",
            "page_data",
            "story",
            "run_section",
            "sweep_section",
            "rock_section",
            "knockout_section",
            "build",
            "command",
        ],
    ),
    (
        "run",
        [
            "reading",
            "precision",
            "portions",
            "assemble",
            "initial",
            "entry",
            "answering",
            "ceiling",
            "digest",
            "narrate",
            "writers",
            "progress",
            "journal",
            "guards",
            "iteration",
            "train",
            "launch",
            "repeats",
            "arms",
            "budget",
            "comparable",
            "standings",
            "crew",
            "sweep",
        ],
    ),
    (
        "plan",
        [
            "chips",
            "known_models",
            "hlo",
            "products",
            "traffic",
            "programs",
            "estimate",
            "printout",
            "search",
            "command",
        ],
    ),
    (
        "instrument",
        [
            "corpus",
            "collect",
            "scores",
            "ranking",
            "shares",
            "controls",
            "tally",
            "correlation",
            "null",
            "groups",
            "selection",
            "outputs",
            "flags",
            "subject",
            "folder",
            "lab",
            "workbench",
            (
                "studies",
                [
                    "references",
                    "context",
                    "logit_sums",
                    "passes",
                    "gradients",
                    "matrix",
                    "pooled",
                    "persistence",
                    "second_moments",
                ],
            ),
            (
                "knockout",
                [
                    "request",
                    "predictors",
                    "targets",
                    "answered",
                    "flips",
                    "arms",
                    "ledger",
                    "checks",
                    "costs",
                    "outlook",
                    "effects",
                    "substitution",
                    "verdicts",
                    "console",
                    "trials",
                    "census",
                    "command",
                ],
            ),
            "catalogue",
            "stages",
        ],
    ),
    "api",
    "cli",
]
# Neighbours that do not know each other, whatever their order.
STRANGERS = [("run", "instrument"), ("evaluate", "report")]


def flat(order, room: str = "") -> list[str]:
    """Dotted names of all modules, in order."""
    names = []
    for entry in order:
        if isinstance(entry, str):
            names.append(room + entry)
        else:
            names += flat(entry[1], f"{room}{entry[0]}.")
    return names


MODULES = flat(ORDER)
RANK = {name: rank for rank, name in enumerate(MODULES)}


def imported(source: str, package: str) -> set[str]:
    """Name the modules of opd_jax that a module imports, wherever in its text it does.

    Args:
      source: the module's text.
      package: the dotted package it lives in, for relative imports.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            prefix = ".".join(parts) if node.level else ""
            module = ".".join(part for part in (prefix, node.module) if part)
            # `from opd_jax.models import hf` names a module, `from ...hf import load` does not.
            names = [f"{module}.{alias.name}" for alias in node.names]
            names = [n if _is_module(n) else module for n in names]
        found |= {name.partition(".")[2] for name in names if name.startswith("opd_jax.")}
    return found


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def violations(name: str, imports: set[str]) -> list[str]:
    """List what a module of this name may not import."""
    bad = [
        f"{name} imports {other}, which stands {'after' if other in RANK else 'not in'} it"
        for other in sorted(imports)
        if RANK.get(other, len(RANK)) >= RANK[name]
    ]
    room = name.partition(".")[0]
    for pair in STRANGERS:
        if room in pair:
            stranger = pair[1 - pair.index(room)]
            bad += [
                f"{name} imports {other}: {room} and {stranger} do not know each other"
                for other in sorted(imports)
                if other.partition(".")[0] == stranger
            ]
    return bad


def modules() -> dict[Path, str]:
    """Map every file of the package to its dotted name inside it."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths}


def test_imports_go_down_the_list():
    bad = []
    for path, name in modules().items():
        package = ".".join(("opd_jax", *path.relative_to(PACKAGE).parent.parts))
        imports = imported(path.read_text(encoding="utf-8"), package)
        if path.name == "__init__.py":
            known = {"api"} if name == "__init__" else set()  # handed out when asked for
            bad += [f"{name} imports {other}" for other in sorted(imports - known)]
        elif name not in RANK:
            bad.append(f"{name} has no place: add it to ORDER")
        else:
            bad += violations(name, imports)
    assert bad == []


def test_the_list_names_what_is_there():
    there = {name for path, name in modules().items() if path.name != "__init__.py"}
    assert sorted(there) == sorted(MODULES)


@pytest.mark.parametrize(
    ("source", "package", "wanted"),
    [
        ("from opd_jax import kl, rock", "opd_jax", {"kl", "rock"}),
        ("from opd_jax.kl import token_kl", "opd_jax", {"kl"}),
        ("from opd_jax.models import hf", "opd_jax", {"models.hf"}),
        ("from opd_jax.models.hf import load", "opd_jax", {"models.hf"}),
        ("import opd_jax.models.hf as hf", "opd_jax", {"models.hf"}),
        ("def f():\n    from opd_jax.cli import main", "opd_jax", {"cli"}),
        ("from . import kl", "opd_jax", {"kl"}),
        ("from .kl import token_kl", "opd_jax", {"kl"}),
        ("from ..run import train", "opd_jax.report", {"run.train"}),
        ("from .style import plain", "opd_jax.report", {"report.style"}),
        ("import jax\nfrom optax import adamw", "opd_jax", set()),
    ],
)
def test_every_spelling_of_an_import_is_read(source, package, wanted):
    assert imported(source, package) == wanted


@pytest.mark.parametrize(
    ("name", "imports", "count"),
    [
        ("models.transformer", {"models.attention", "models.kv_cache", "mesh"}, 0),
        ("kl", {"models.transformer"}, 1),  # up
        ("models.attention", {"models.transformer"}, 1),  # up inside a room
        ("models.hf", {"models.hf"}, 1),  # itself
        ("instrument.stages", {"run.train"}, 1),  # a stranger before it
        ("run.train", {"instrument.corpus"}, 2),  # up, and a stranger
        ("cli", {"helpers"}, 1),  # not in the list
    ],
)
def test_only_what_stands_before_is_allowed(name, imports, count):
    assert len(violations(name, imports)) == count


def test_no_two_modules_have_names_that_differ_by_an_ending():
    names = sorted({name.rpartition(".")[2] for name in MODULES})
    pairs = [(a, b) for a in names for b in names if b.startswith(a) and 0 < len(b) - len(a) <= 4]
    assert pairs == []


def test_modules_are_small():
    """A room that is full is two rooms."""
    sizes = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for path, name in modules().items()
    }
    assert {name: size for name, size in sizes.items() if size > 450} == {}
    assert sorted(sizes.values())[len(sizes) // 2] < 200


def test_no_two_files_of_tests_share_a_name():
    """pytest imports them by their names alone: of two in one process the second is an error."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted({*names})
