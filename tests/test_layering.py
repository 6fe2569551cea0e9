"""Imports go one way: a module of opd_jax imports modules of lower rank only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "opd_jax"

# A module may import modules of a lower rank, not of its own.
RANKS = {
    0: ("pytrees", "mesh", "files", "processes"),
    0.5: ("divergence",),  # the numerics of kl on a chunk of rows
    1: (
        "params",
        "attention",
        "kv_cache",
        "linear",
        "kl",
        "rock",
        "sampling",
        "optim",
        "grading",
        "metrics",
        "records",
    ),
    2: ("model", "tokenizer"),
    2.5: ("hf_config",),  # the config.json half of hf
    3: ("hf", "data", "rollout", "objective"),
    4: ("steps", "checkpoint"),
    4.5: ("spec",),  # the groups of a configuration
    5: ("config", "evaluate"),
    5.25: ("assemble",),  # what a run needs, built from its config
    5.5: ("narrate",),  # what a run says
    5.75: ("journal",),  # what a run writes
    6: ("table", "train", "export", "generate", "plan", "analysis"),
    6.5: ("sweep",),  # many runs, and how they compare
    7: ("cli",),
}
RANK = {name: rank for rank, names in RANKS.items() for name in names}
FREE_INSIDE = {"analysis"}  # a package whose own modules may import each other


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
            # `from opd_jax import kl` names a module, `from opd_jax.kl import token_kl` does not.
            names = [f"{module}.{a.name}" if module == "opd_jax" else module for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("opd_jax.")}
    return found


def violations(name: str, imports: set[str]) -> list[str]:
    """List what a module (or package) of this name may not import."""
    return [
        f"{name} (rank {RANK[name]}) imports {other} (rank {RANK.get(other, 'not in the table')})"
        for other in sorted(imports)
        if not (name == other and name in FREE_INSIDE)
        and not (other in RANK and RANK[other] < RANK[name])
    ]


def modules() -> dict[Path, str]:
    """Map every file of the package to the name its rank stands under (``__init__`` has none)."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path: path.relative_to(PACKAGE).with_suffix("").parts[0] for path in paths}


def test_imports_go_down_the_ranks():
    bad = []
    for path, name in modules().items():
        package = ".".join(("opd_jax", *path.relative_to(PACKAGE).parent.parts))
        imports = imported(path.read_text(encoding="utf-8"), package)
        if name not in RANK and name != "__init__":
            bad.append(f"{path.name} has no rank: add it to RANKS")
        elif name == "__init__":
            bad += [f"opd_jax/__init__.py imports {other}" for other in sorted(imports)]
        else:
            bad += [f"{path.name}: {text}" for text in violations(name, imports)]
    assert bad == []


@pytest.mark.parametrize(
    ("source", "package", "wanted"),
    [
        ("from opd_jax import kl, rock", "opd_jax", {"kl", "rock"}),
        ("from opd_jax.kl import token_kl", "opd_jax", {"kl"}),
        ("import opd_jax.hf as hf", "opd_jax", {"hf"}),
        ("def f():\n    from opd_jax.cli import main", "opd_jax", {"cli"}),
        ("from . import kl", "opd_jax", {"kl"}),
        ("from .kl import token_kl", "opd_jax", {"kl"}),
        ("from .. import train", "opd_jax.analysis", {"train"}),
        ("from .stats import mean", "opd_jax.analysis", {"analysis"}),
        ("import jax\nfrom optax import adamw", "opd_jax", set()),
    ],
)
def test_every_spelling_of_an_import_is_read(source, package, wanted):
    assert imported(source, package) == wanted


@pytest.mark.parametrize(
    ("name", "imports", "count"),
    [
        ("model", {"attention", "kv_cache", "params"}, 0),
        ("kl", {"model"}, 1),  # up
        ("hf", {"data"}, 1),  # sideways
        ("analysis", {"analysis", "hf"}, 0),
        ("train", {"analysis"}, 1),
        ("cli", {"helpers"}, 1),  # not in the table
    ],
)
def test_only_lower_ranks_are_allowed(name, imports, count):
    assert len(violations(name, imports)) == count
