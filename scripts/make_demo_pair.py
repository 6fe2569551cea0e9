"""Make the embedded teacher and student: tokenizer, prompts, and both models, trained from scratch.

    python scripts/make_demo_pair.py --out=FOLDER

Writes FOLDER/teacher, FOLDER/student (Hugging Face folders with the same tokenizer) and
FOLDER/prompts/{train,heldout}.jsonl, and prints the greedy accuracy of both models on held-out
problems. The teacher learns from its own style only; the student sees fewer problems, most of them
solved in another style (see demo_problems.py), and stops while it still gets most of them wrong.
Seeded throughout; about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import demo_problems
import jax
import jax.numpy as jnp
import numpy as np
from demo_problems import Problem
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd_jax import optim, steps
from opd_jax.data import batches as batching
from opd_jax.data import prompts as prompt_files
from opd_jax.data import tokenizer as tokenizers
from opd_jax.data import widths
from opd_jax.evaluate import grading
from opd_jax.kl import KLSpec
from opd_jax.models import hf, params, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.optim import OptimSpec
from opd_jax.pytrees import Params, Rollout
from opd_jax.rollout import decode
from opd_jax.rollout.sampling import Sampler

VOCAB = 640  # 256 bytes, 3 special ids, and the words of the stories
PROMPT_WIDTHS, COMPLETION_WIDTHS = (40, 56), (40, 56)  # ids; a longer text would be refused
HELDOUT, TRAIN_PROMPTS = 300, 3000
SEEDS = {"tokenizer": 1, "heldout": 2, "prompts": 3, "teacher": 4, "student": 5}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One model of the pair and how it is trained.

    Attributes:
      model: the architecture.
      problems: how many problems its schedule is made for, each seen once.
      batch: problems a step.
      lr: peak learning rate.
      final_lr: where its cosine ends.
      teacher_share: share of the problems that are solved in the teacher's style.
      stop: optimizer steps after which training breaks off; None: at the end of the schedule.
    """

    model: ModelConfig
    problems: int
    batch: int
    lr: float
    final_lr: float
    teacher_share: float
    stop: int | None = None


def architecture(width: int, ffn: int, num_layers: int, num_heads: int) -> ModelConfig:
    """A small Qwen3: query/key norms, grouped queries, tied embedding."""
    return ModelConfig(
        model_type="qwen3",
        vocab_size=VOCAB,
        width=width,
        ffn=ffn,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2,
        head_dim=32,
        tied=True,
        qk_norm=True,
        max_positions=256,
    )


TEACHER = Recipe(architecture(128, 384, 4, 4), 80_000, 16, 3e-3, 3e-5, 1.0)
# Greedy accuracy rises steeply here: 0.31 after 2000 steps, 0.32 after 2100, 0.57 after 2200.
# Any change of the recipe (the warm-up is a share of the schedule) moves it, so measure again.
STUDENT = Recipe(architecture(128, 384, 4, 4), 40_000, 16, 2e-3, 2e-3, 0.2, stop=2100)


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every digit is a token of its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_texts(num: int = 4000) -> Iterator[str]:
    """Text in the proportions that the models see: questions, roles, both styles."""
    rng = random.Random(SEEDS["tokenizer"])
    for problem in itertools.islice(demo_problems.problems(SEEDS["tokenizer"]), num):
        yield f"user\n{problem.question}\nassistant\n{demo_problems.teacher_text(problem, rng)}"
        yield demo_problems.student_text(problem, rng)


def prompts(
    num_train: int = TRAIN_PROMPTS, num_heldout: int = HELDOUT
) -> tuple[list[Problem], list[Problem]]:
    """The problems of both prompt files: different questions, no repetition."""
    heldout = _distinct(num_heldout, SEEDS["heldout"], frozenset())
    train = _distinct(num_train, SEEDS["prompts"], frozenset(p.question for p in heldout))
    return train, heldout


def _distinct(num: int, seed: int, without: frozenset[str]) -> list[Problem]:
    chosen: dict[str, Problem] = {}
    for problem in demo_problems.problems(seed, without):
        chosen.setdefault(problem.question, problem)
        if len(chosen) == num:
            return list(chosen.values())
    raise AssertionError("problems() is endless")


def write_prompts(path: Path, rows: Sequence[Problem]) -> None:
    """Write one ``{"messages": [...], "answer": "23"}`` a line."""
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": p.question}], "answer": p.answer},
            separators=(",", ":"),
        )
        for p in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def encode(
    problems: Sequence[Problem], texts: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> list[prompt_files.Example]:
    """Tokenise questions, in the chat template, and solutions, EOS appended."""
    chats = [[{"role": "user", "content": p.question}] for p in problems]
    questions = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    solutions = tokenizer(list(texts))["input_ids"]
    (end,) = tokenizers.stop_ids(tokenizer, None)
    return [
        prompt_files.Example(tuple(cast(list[int], q)), p.answer, p.question, i, (*s, end))
        for i, (p, q, s) in enumerate(zip(problems, questions, solutions, strict=True))
    ]


def lessons(
    recipe: Recipe, seed: int, without: frozenset[str], tokenizer: PreTrainedTokenizerFast
) -> list[prompt_files.Example]:
    """Solved problems for one model, in its mixture of styles."""
    rng = random.Random(seed)
    problems = list(itertools.islice(demo_problems.problems(seed, without), recipe.problems))
    texts = [
        demo_problems.teacher_text(p, rng)
        if rng.random() < recipe.teacher_share
        else demo_problems.student_text(p, rng)
        for p in problems
    ]
    return encode(problems, texts, tokenizer)


def batches(rows: Sequence[prompt_files.Example], batch: int, pad_id: int) -> Iterator[Rollout]:
    """One pass over the rows, in a few padded shapes (each is compiled once)."""
    groups: dict[tuple[int, int], list[prompt_files.Example]] = {}
    for row in rows:
        width = widths.bucket(len(row.ids), PROMPT_WIDTHS)
        room = widths.bucket(len(row.completion), COMPLETION_WIDTHS)
        group = groups.setdefault((width, room), [])
        group.append(row)
        if len(group) == batch:
            yield batching.pad_completions(group, width, room, pad_id)
            group.clear()


def train(
    recipe: Recipe,
    rows: Sequence[prompt_files.Example],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> Params:
    """Supervised training from random parameters, one pass, with the library's off-policy step."""
    spec = OptimSpec(
        lr=recipe.lr, min_lr=recipe.final_lr, steps=len(rows) // recipe.batch, weight_decay=0.01
    )
    tx = optim.make(spec)
    cfg = ObjectiveConfig(recipe.model, None, KLSpec(ce=1.0, vocab_size=len(tokenizer)))
    key = jax.random.key(seed)
    state = steps.init(params.init(transformer.specs(recipe.model), key), key, cfg=cfg, tx=tx)
    start = time.monotonic()
    supply = batches(rows, recipe.batch, tokenizers.pad_id(tokenizer))
    for i, batch in enumerate(itertools.islice(supply, recipe.stop), 1):
        state, measured = steps.off_policy_step(state, None, batch, cfg=cfg, tx=tx)
        if i % 100 == 0:
            done, loss = f"{i}/{recipe.stop or spec.steps}", measured["loss"].value()
            print(f"  step {done}  loss {loss:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    return state.params


def accuracy(
    tree: Params,
    cfg: ModelConfig,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerFast,
) -> float:
    """Share of problems whose greedy solution states the right answer."""
    rows = encode(problems, [""] * len(problems), tokenizer)
    pad_id = tokenizers.pad_id(tokenizer)
    sampler = Sampler(
        vocab_size=len(tokenizer),
        temperature=0.0,
        stop_ids=tokenizers.stop_ids(tokenizer, None),
        pad_id=pad_id,
    )
    prompt = batching.pad([row.ids for row in rows], PROMPT_WIDTHS[-1], pad_id)
    out = decode.sample(
        tree, prompt, jax.random.key(0), cfg=cfg, sampler=sampler, max_new=COMPLETION_WIDTHS[-1]
    )
    texts = tokenizer.batch_decode(
        np.asarray(out.ids_BT)[:, PROMPT_WIDTHS[-1] :], skip_special_tokens=True
    )
    right = [grading.is_correct(t, p.answer) for t, p in zip(texts, problems, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    """Make everything and say how good both models are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    out = parser.parse_args().out
    if out.exists():
        parser.error(f"--out={out} exists: expected a new folder; remove it or choose another")
    (out / "prompts").mkdir(parents=True)
    train_prompts, heldout = prompts()
    write_prompts(out / "prompts" / "train.jsonl", train_prompts)
    write_prompts(out / "prompts" / "heldout.jsonl", heldout)
    tokenizer = make_tokenizer(list(tokenizer_texts()))
    without = frozenset(p.question for p in heldout)
    for name, recipe in (("teacher", TEACHER), ("student", STUDENT)):
        print(f"{name}: {recipe.problems} problems, batch {recipe.batch}")
        rows = lessons(recipe, SEEDS[name], without, tokenizer)
        tree = train(recipe, rows, tokenizer, SEEDS[name])
        hf.save(out / name, recipe.model, tree, tokenizer=tokenizer, dtype=jnp.bfloat16)
        cfg, saved = hf.load(out / name, dtype=jnp.float32)
        print(f"{name}: greedy accuracy {accuracy(saved, cfg, heldout, tokenizer):.3f}")


if __name__ == "__main__":
    main()
