"""The optimizer and its learning-rate schedule, from one frozen spec (arXiv 2605.09253, app. B)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from opd_jax import rules

NAMES = ("adamw", "sgd", "signsgd")
DECAYS = ("matrices", "all")


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
      decay: what ``weight_decay`` acts on: ``matrices``, which leaves norms and biases alone, as
        is the convention of the field, or ``all``.
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
    decay: str = "matrices"
    clip: float = 1.0

    def __post_init__(self):
        rules.check(
            self,
            "optim",
            ("name", self.name in NAMES, f"one of {NAMES}"),
            ("lr", self.lr > 0, "above 0"),
            ("min_lr", 0 <= self.min_lr <= self.lr, f"from 0 to optim.lr ({self.lr})"),
            ("warmup", 0 <= self.warmup < 1, "a share from 0 to below 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("b1", 0 <= self.b1 < 1, "from 0 to below 1"),
            ("b2", 0 <= self.b2 < 1, "from 0 to below 1"),
            ("eps", self.eps > 0, "above 0"),
            ("decay", self.decay in DECAYS, f"one of {DECAYS}"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("clip", self.clip >= 0, "at least 0 (0: off)"),
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

    It computes and keeps its state in f32, whatever the dtype of the parameters: in bfloat16 a
    second moment would stand still. The same spec gives the same object: a step that is static in
    it is not traced again.
    """
    mask = _is_matrix if spec.decay == "matrices" else None
    clip = optax.clip_by_global_norm(spec.clip) if spec.clip else optax.identity()
    if spec.name in ("sgd", "signsgd"):
        direction = optax.trace(spec.b1) if spec.b1 else optax.identity()
        if spec.name == "signsgd":
            direction = optax.chain(direction, optax.scale_by_sign())
        # Decay after the momentum, as in AdamW: it must not pile up in the trace.
        rule = optax.chain(
            direction,
            optax.add_decayed_weights(spec.weight_decay, mask),
            optax.scale_by_learning_rate(schedule(spec)),
        )
    else:
        rule = optax.adamw(
            schedule(spec), spec.b1, spec.b2, spec.eps, weight_decay=spec.weight_decay, mask=mask
        )
    return _in_float32(optax.chain(clip, rule))


def _is_matrix(params: optax.Params) -> optax.Params:
    """True for what is not a norm or a bias, told by the name of a leaf."""

    def is_matrix(path, leaf) -> bool:
        name = getattr(path[-1], "key", "") if path else ""
        return not str(name).endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params):
        return inner.init(wide(params))

    def update(updates, state, params=None):
        return inner.update(wide(updates), state, None if params is None else wide(params))

    return optax.GradientTransformation(init, update)


def unmoved_share(params: optax.Params, step: float) -> float:
    """Share of the entries that a change by ``step`` in either direction rounds back to itself.

    In bfloat16 a number has 8 significant bits: 0.02 has no neighbours within 6e-5.
    """

    @jax.jit
    def count(params):
        def lost(x):
            moved = (x.astype(jnp.float32) + sign * step for sign in (-1, 1))
            return sum(jnp.sum(m.astype(x.dtype) == x, dtype=jnp.float32) for m in moved) / 2

        return sum(lost(x) for x in jax.tree.leaves(params))

    return float(count(params)) / sum(x.size for x in jax.tree.leaves(params))
