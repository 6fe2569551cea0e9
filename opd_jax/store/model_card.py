"""The model card of an export: ``README.md``, from what the files of the run say.

It is for others, so nothing in it tells of the machine: paths are reduced to their last part.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from opd_jax import stats
from opd_jax.files import EMBEDDED
from opd_jax.store import hub, run_files

# What was done, and what the student did, by ``train.stage``.
_WAYS = {
    "on_policy": ("on-policy", "samples answers"),
    "off_policy": ("off-policy", "reads given completions"),
    "mixed": ("on- and off-policy", "samples answers, by turns with given completions,"),
}
TAGS = ["opd_jax", "jax", "distillation", "knowledge-distillation"]
_ON_POLICY = "on-policy-distillation"  # a tag where the student answered
# An absolute path up to its last part; a slash inside a relative path or a URL begins none.
_FOLDERS = re.compile(r"(?<![\w.\-/~])(?:~[\w.-]*)?/(?!/)(?:[^/:,'\"\[\]()]*/)*")
_CACHED = re.compile(r"models--([^/]+)/snapshots/[^/]+/?$")  # in the hub's download cache
_KL = {
    "reverse": "KL(student ‖ teacher)",
    "forward": "KL(teacher ‖ student)",
    "jsd": "Jensen-Shannon divergence of student and teacher",
    "skew_reverse": "KL(student ‖ mixture of both)",
    "skew_forward": "KL(teacher ‖ mixture of both)",
}

Record = Mapping[str, Any]  # run.json, or the config in it


def text(workdir: Path, record: Record, step: int, name: str, *, is_adapter: bool = False) -> str:
    """The model card of a checkpoint, front matter included.

    What the run has not measured, or not written yet, is left out.

    Args:
      workdir: of the run.
      record: its ``run.json``.
      step: of the checkpoint.
      name: of the exported model.
      is_adapter: whether it is adapters alone, for PEFT.

    Raises:
      WorkdirError: a file of the run is damaged.
    """
    again = record.get("resumed") or [{}]
    config = {**record["config"], **again[-1].get("changed", {})}
    student = public_name(config["student.path"])
    way, does = _WAYS[config.get("train.stage", "on_policy")]
    parts = [
        f"# {name}",
        f"`{student}`, distilled {way} from {_teachers(config)} with opd_jax: the student "
        f"{does} and is trained on its divergence from the teacher's next-token "
        f"distribution over the whole vocabulary. Exported at step {step}.",
        _block("python", *_loading(name, student if is_adapter else None)),
        *_results(workdir, config, step),
        "## Recipe",
        _table(("", ""), [*_data(record, config), *_recipe(config, step)]),
    ]
    if command := record.get("command"):
        parts += ["The command:", _block("bash", public_command(command))]
    if versions := again[-1].get("versions") or record.get("versions"):
        parts.append("Made with " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())))
    data = ModelCardData(
        base_model=hub_name(config["student.path"]),  # a name of another place would be no link
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *[_ON_POLICY] * (way != "off-policy")],
    )
    # It is not validated: the hub does that, over the network.
    return str(ModelCard("\n\n".join([f"---\n{data.to_yaml()}\n---", *parts]) + "\n"))


def _teachers(config: Record) -> str:
    """The teacher, or several with the names that prompts give them."""
    named = config.get("teacher.paths") or ()
    if not named:
        return f"the teacher `{public_name(config['teacher.path'])}`"
    told = ", ".join(f"`{public_name(path)}` ({name})" for name, path in named)
    return f"several teachers, of which each prompt has one: {told},"


def _loading(name: str, base: str | None) -> list[str]:
    """Python that loads the model; ``base`` is what adapters belong to."""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base or name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    if base is None:
        return lines
    lines.insert(0, "from peft import PeftModel")
    return [*lines, f'model = PeftModel.from_pretrained(model, "{name}")']


def public_name(path: str) -> str:
    """A model or a file by the last part of its path; a model of the Hub by its name there."""
    if path.startswith(EMBEDDED):
        return path
    return hub_name(path) or path.rstrip("/").rpartition("/")[2] or path


def hub_name(path: str) -> str | None:
    """``owner/name`` of a model that was fetched from the Hub; None of any other."""
    cached = _CACHED.search(path)
    return cached[1].replace("--", "/") if cached else hub.public_name(path)


def public_command(command: Sequence[str]) -> str:
    """A command line, absolute paths in it reduced to their last part."""
    return shlex.join(_FOLDERS.sub("", word.rstrip("/")) for word in command)


def _results(workdir: Path, config: Record, step: int) -> list[str]:
    """What the evaluations before training and at the exported step measured."""
    # Not summary.json: it does not say which step its last evaluation is of.
    found = {x["step"]: x for x in _lines(workdir / "metrics.jsonl") if "eval/accuracy" in x}
    graded = {x["step"]: x["correct"] for x in _lines(workdir / "graded.jsonl")}
    steps = [at for at in sorted({0, step}) if at in found]
    rows, notes = [], []
    if any(found[at].get("eval/accuracy") is not None for at in steps):
        shown = [_accuracy(found[at].get("eval/accuracy"), graded.get(at)) for at in steps]
        rows.append(("accuracy on held-out prompts", *shown))
        problems = sorted({len(graded[at]) for at in steps if graded.get(at)})
        if problems:
            over = " and ".join(map(str, problems))
            notes.append(f"{stats.LEVEL:.0%} intervals are Wilson's over {over} problems.")
        if any(found[at].get("eval/unparsed_share") is not None for at in steps):
            shares = [found[at].get("eval/unparsed_share") for at in steps]
            shown = ["" if share is None else f"{share:.1%}" for share in shares]
            rows.append(("responses without a recognisable answer", *shown))
        temperature = config.get("eval.temperature")
        notes.append(
            "Answers are greedy." if not temperature else f"Answers at temperature {temperature:g}."
        )
    if any(found[at].get("eval/kl_nats") is not None for at in steps):
        values = [found[at].get("eval/kl_nats") for at in steps]
        shown = ["" if value is None else f"{value:.4f}" for value in values]
        rows.append(("KL(student ‖ teacher), nats per token", *shown))
        notes.append("KL is measured at temperature 1 on fresh answers of each model.")
    if not rows:
        return []
    head = ["before training" if at == 0 else f"step {at}" for at in steps]
    return ["## Before and after", _table(("", *head), rows), " ".join(notes)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return run_files.read_lines(path) if path.is_file() else []


def _accuracy(value: float | None, correct: Sequence[Sequence[bool]] | None) -> str:
    if value is None or not correct:
        return "" if value is None else f"{value:.1%}"
    # Answers to one problem are not independent, so the units are problems.
    low, high = stats.wilson(float(np.mean([np.mean(row) for row in correct])), len(correct))
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def _data(record: Record, config: Record) -> Iterator[tuple[str, str]]:
    inputs = record.get("inputs") or {}
    for name, title in (("prompts", "prompts"), ("heldout", "held-out prompts")):
        path = config.get(f"data.{name}")
        if not path:
            continue
        digests = [*(inputs.get(name) or {}).get("files", {}).values()]
        if not digests and name == "prompts" and record.get("data"):
            digests = [record["data"]]
        told = f", digest of its ids `{digests[0]}`" if digests else ""
        yield title, f"`{public_name(path)}`{told}"


def _recipe(config: Record, step: int) -> Iterator[tuple[str, str]]:
    """Rows of the recipe, without what an older run does not say."""

    def told(title: str, words: str, *keys: str) -> Iterator[tuple[str, str]]:
        if all(config.get(key) is not None for key in keys):
            yield title, words.format(*(config[key] for key in keys))

    named = [(f"teacher {name}", path) for name, path in config.get("teacher.paths") or ()]
    for who, path in (*((x, config[f"{x}.path"]) for x in ("student", "teacher")), *named):
        if hub.public_name(path):
            yield f"revision of the {who}", f"`{path.rpartition('@')[2]}`"
    if config.get("init_from"):
        yield "starts from", f"`{public_name(config['init_from'])}`"
    direction = config.get("kl.direction")
    if direction is not None:
        keys = {"jsd": ["kl.beta"], "skew_reverse": ["kl.skew"], "skew_forward": ["kl.skew"]}
        given = ["kl.temperature", *keys.get(direction, []), *["kl.ce"] * bool(config.get("kl.ce"))]
        numbers = [f"{key.partition('.')[2]} {config[key]:g}" for key in given if key in config]
        yield "divergence", ", ".join([f"`{direction}`", _KL.get(direction, ""), *numbers])
    mode = config.get("rock.mode", "off")
    keys = ("inside", "top_k", "share", "score", "start", "ramp", "until")
    values = {key: config.get(f"rock.{key}") for key in keys}
    numbers = [f"{key} {value}" for key, value in values.items() if value or key == "inside"]
    yield "gate", "none" if mode == "off" else ", ".join([f"`{mode}`", *numbers])
    yield from told(
        "optimizer",
        "{} with peak learning rate {:g}, warm-up {:.0%}, clipped at {:g}, weight decay {:g}",
        *(f"optim.{key}" for key in ("name", "lr", "warmup", "clip", "weight_decay")),
    )
    if config.get("train.stage") == "mixed":
        yield from told("on-policy", "{:g} of the steps", "train.on_policy_share")
    if config.get("lora.rank"):
        yield from told(
            "LoRA", "rank {}, alpha {:g}, on {}", "lora.rank", "lora.alpha", "lora.targets"
        )
    yield from told("steps", f"{step} of {{}}", "train.steps")
    yield from told("batch", "{} prompts x {} answers", "train.prompts", "rollout.samples")
    names = ("max_new", "temperature", "top_k", "top_p", "min_p")
    yield from told(
        "answers",
        "up to {} tokens, temperature {:g}, top-k {}, top-p {:g}, min-p {:g}",
        *(f"rollout.{name}" for name in names),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(language: str, *lines: str) -> str:
    return "\n".join((f"```{language}", *lines, "```"))
