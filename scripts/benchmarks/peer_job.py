"""What the workers of the peer benchmark are asked to do, and the answer that each gives.

Like :mod:`toolkit` this imports nothing outside the standard library: each worker runs in an
environment that has other packages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import toolkit

DISTRIBUTIONS = {"opd_jax": "opd-jax", "trl": "trl", "easydel": "easydel", "tunix": "google-tunix"}
RELEVANT = (
    *DISTRIBUTIONS.values(),
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "torch",
    "transformers",
    "numpy",
)
PAD, EOS, UNKNOWN = 0, 1, 2  # special ids of the made-up tokenizer


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a llama-family model.

    Attributes:
      layers, width, ffn, heads, kv_heads, head_dim, vocab: as in ``config.json``; tied embeddings.
    """

    layers: int
    width: int = 576
    ffn: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    vocab: int = 49_152

    @property
    def body_params(self) -> int:
        """Weights of all matrix multiplications but the head's."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.ffn)

    @property
    def head_params(self) -> int:
        """Weights of the head, which is the embedding."""
        return self.vocab * self.width


@dataclasses.dataclass(frozen=True)
class Job:
    """What one worker process has to do; crosses to it as JSON.

    Attributes:
      kind: ``step``, ``update`` or ``rollout``.
      student, teacher: Hugging Face folders.
      fixed: the rows, a file of ``peer_batch``.
      is_unequal: each answer has the length that the rows name and ends there with ``EOS``, which
        the worker forces and which may come nowhere else; else ``EOS`` may not come at all.
      prompt, new: ids of a prompt and of an answer, or the most that they may have.
      lr: peak learning rate of AdamW.
      warmup, steps: calls that are not timed, and that are.
      settings: of this library, by the names of its configuration.
    """

    kind: str
    student: str
    teacher: str
    fixed: str
    is_unequal: bool
    prompt: int
    new: int
    lr: float
    warmup: int
    steps: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def word(token_id: int) -> str:
    """How the made-up tokenizer spells an id."""
    # Special words are found inside of others, too, so none may begin like them.
    return {PAD: "<pad>", EOS: "<eos>", UNKNOWN: "<unk>"}.get(token_id, f"t{token_id}")


def measure(once: Callable[[], dict[str, float]], job: Job) -> dict[str, Any]:
    """``toolkit.measure`` with the job's numbers of calls."""
    return toolkit.measure(once, warmup=job.warmup, steps=job.steps)


def serve(run: Callable[[Job], dict[str, Any]]) -> None:
    """The main function of a worker: ``python worker_NAME.py JOB.json RESULT.json``.

    ``run`` returns ``seconds``, ``phases``, ``objective``, ``loss_fixed``, ``peak_rss_gb``, of
    ``step`` and ``rollout`` ``sampled`` (ids of each answer, of each call, warm-up included) and
    whatever else is worth keeping.
    """
    toolkit.serve(lambda job: run(Job(**job)), RELEVANT)
