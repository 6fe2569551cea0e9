"""The optimizer and its learning-rate schedule, from one frozen spec (arXiv 2605.09253, app. B)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import optax

NAMES = ("adamw", "sgd", "signsgd")


@dataclasses.dataclass(frozen=True)
class OptimSpec:
    """AdamW, SGD or sign-SGD with linear warm-up, cosine decay and clipping by the global norm.

    Attributes:
      name: one of ``NAMES``; ``signsgd`` moves every weight by the sign of its momentum: Adam's
        even steps without a second moment.
      lr: peak learning rate.
      min_lr: where the cosine ends.
      warmup: share of the steps that warm up.
      steps: length of the schedule.
      b1, b2, eps: of Adam; ``b1`` is the momentum of SGD and sign-SGD.
      weight_decay: decoupled.
      clip: largest global gradient norm; 0 turns clipping off.
    """

    name: str = "adamw"
    lr: float = 2e-6
    min_lr: float = 1e-8
    warmup: float = 0.05
    steps: int = 1000
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self):
        for name, ok, expected in (
            ("name", self.name in NAMES, f"one of {NAMES}"),
            ("lr", self.lr > 0, "above 0"),
            ("min_lr", 0 <= self.min_lr <= self.lr, f"from 0 to optim.lr ({self.lr})"),
            ("warmup", 0 <= self.warmup < 1, "a share from 0 to below 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("b1", 0 <= self.b1 < 1, "from 0 to below 1"),
            ("b2", 0 <= self.b2 < 1, "from 0 to below 1"),
            ("eps", self.eps > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("clip", self.clip >= 0, "at least 0 (0: off)"),
        ):
            if not ok:
                raise ValueError(
                    f"optim.{name} {getattr(self, name)!r}: expected {expected}; "
                    f"set --config.optim.{name}"
                )


def schedule(spec: OptimSpec) -> optax.Schedule:
    """Learning rate by step: up from ``lr / warm-up steps`` to ``lr``, cosine to ``min_lr``."""
    warmup = round(spec.warmup * spec.steps)
    decay = optax.cosine_decay_schedule(
        spec.lr, max(spec.steps - warmup, 1), alpha=spec.min_lr / spec.lr
    )
    if warmup == 0:
        return decay
    # The first update already moves: its rate is one warm-up step's worth, not 0.
    rise = optax.linear_schedule(spec.lr / warmup, spec.lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def restarted(state: optax.OptState) -> optax.OptState:
    """The same state with its learning-rate schedule at the start; Adam's moments stay."""

    def is_schedule(node) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def restart(node):
        return node._replace(count=node.count * 0) if is_schedule(node) else node

    return jax.tree.map(restart, state, is_leaf=is_schedule)


@functools.cache
def make(spec: OptimSpec) -> optax.GradientTransformation:
    """Build the optax transform; clipping comes first and sees the whole gradient.

    The same spec gives the same object: a step that is static in it is not traced again.
    """
    clip = optax.clip_by_global_norm(spec.clip) if spec.clip else optax.identity()
    if spec.name in ("sgd", "signsgd"):
        direction = optax.trace(spec.b1) if spec.b1 else optax.identity()
        if spec.name == "signsgd":
            direction = optax.chain(direction, optax.scale_by_sign())
        # Decay after the momentum, as in AdamW: it must not pile up in the trace.
        rule = optax.chain(
            direction,
            optax.add_decayed_weights(spec.weight_decay),
            optax.scale_by_learning_rate(schedule(spec)),
        )
    else:
        rule = optax.adamw(
            schedule(spec), spec.b1, spec.b2, spec.eps, weight_decay=spec.weight_decay
        )
    return optax.chain(clip, rule)
