"""Every pytree that crosses a module boundary.

Shape letters, used as name suffixes in the numerics modules (``logits_BTV``):

====  ======================================  ====  ==================================
B     batch rows                              L     layers
T     time (token positions)                  N     query heads
P     prompt positions                        K     key/value heads
V     vocabulary (padded)                     H     head dimension
D, E  student / teacher width                 F     feed-forward width
C     rows of one chunk                       R     rows (flattened B x T)
X     experts                                 I, O  inputs, outputs of a product
====  ======================================  ====  ==================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opd_jax import mesh

Params = dict[str, Any]
Teacher = Params | tuple[Params, ...]  # one teacher's, or those of several


class Mean(struct.PyTreeNode):
    """A weighted mean kept as its two sums, so that splits of the data cannot change it.

    ``a + b`` pools both; only the host divides, once, with :meth:`value`.
    """

    total: jax.Array  # [] f32
    weight: jax.Array  # [] f32

    @classmethod
    def of(cls, value, weight=1.0) -> Mean:
        """Build from a value and the weight it stands for."""
        weight = jnp.asarray(weight, jnp.float32)
        return cls(jnp.asarray(value, jnp.float32) * weight, weight)

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float:
        """Divide on the host; 0.0 when the weight is 0."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else 0.0


def pool(dicts: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Add up the means of several steps, in float64 on the host; a name may be absent from some.

    On a mesh of several processes every process must call it.
    """
    totals: dict[str, np.ndarray] = {}
    for means in mesh.to_host([dict(d) for d in dicts]):
        for name, mean in means.items():
            pair = np.array([mean.total, mean.weight], np.float64)
            totals[name] = totals.get(name, np.zeros(2)) + pair
    return {name: Mean(*pair) for name, pair in totals.items()}


def reduce(means: Mapping[str, Mean], *, empty: float = math.nan) -> dict[str, float]:
    """Divide on the host; ``empty`` where the weight is 0, because 0.0 would be a measurement."""
    return {name: mean.value() if mean.weight else empty for name, mean in pool([means]).items()}


class Prompt(struct.PyTreeNode):
    """Left-padded prompts: one decode cursor serves all rows."""

    ids_BP: jax.Array  # [B, P] i32
    start_B: jax.Array  # [B] i32, index of the first real token


class Rollout(struct.PyTreeNode):
    """Prompts with what was sampled after them; ids are kept exactly as sampled.

    ``mask_BT`` marks ids that the policy sampled and that are scored (a sampled EOS included); it
    is data, never inferred from ids.
    """

    ids_BT: jax.Array  # [B, T] i32
    start_B: jax.Array  # [B] i32, index of the first real token
    mask_BT: jax.Array  # [B, T] bool
    logp_BT: (
        jax.Array
    )  # [B, T] f32, log-probability under the sampling distribution, 0 off the mask
    truncated_B: jax.Array  # [B] bool, the row ended by length and not by a stop id
    policy_step: jax.Array  # [] i32, train step of the parameters that sampled
    teacher_B: jax.Array | None = None  # [B] i32, which of several teachers scores the row


class Packing(struct.PyTreeNode):
    """Where the tokens of a batch are computed: rows end to end, several in one.

    R packed rows of L columns are a piece, of which there are P: the first ``num_pieces`` hold
    something. Made by :mod:`opd_jax.data.packing`.
    """

    source_RPL: jax.Array  # [R, P, L] i32, index in the flattened [B, T-1] positions; -1: padding
    first_RPL: jax.Array  # [R, P, L] i32, column of the first token of the same row; padding: own
    place_BT: jax.Array  # [B, T-1] i32, index in the flattened [P, R, L] columns; -1: left out
    num_pieces: jax.Array  # [] i32


class TokenKL(struct.PyTreeNode):
    """Per-position measurements in nats, f32, at the position that *predicts* the token."""

    kl_BT: jax.Array  # [B, T] the divergence that is trained on (KLSpec.direction, temperature)
    reverse_BT: jax.Array  # [B, T] KL(student || teacher) at temperature 1, whatever is trained on
    entropy_BT: jax.Array  # [B, T] of the student at temperature 1
    teacher_entropy_BT: jax.Array  # [B, T] at temperature 1
    logp_BT: jax.Array  # [B, T] log-probability of the predicted id, student, temperature 1
    teacher_logp_BT: jax.Array  # [B, T] of the same id under the teacher
    rank_BT: jax.Array | None = None  # [B, T] where KLSpec.beside asks, see opd_jax.agreement
    overlap_BT: jax.Array | None = None  # [B, T] the same


class RockState(struct.PyTreeNode):
    """Decayed per-vocabulary-item sums over scored positions whose predicted id is v."""

    count_V: jax.Array  # [V] f32
    kl_sum_V: jax.Array  # [V] f32, the Rock Score: frequency x mean KL
    kl_sq_V: jax.Array  # [V] f32
    fast_count_V: jax.Array  # [V] f32, the same at the fast horizon
    fast_kl_sum_V: jax.Array  # [V] f32
    member_V: jax.Array  # [V] bool, types that the gate acts on
    step: jax.Array  # [] i32, number of updates


class TrainState(struct.PyTreeNode):
    """All that a training step changes; donated to the step and checkpointed whole."""

    step: jax.Array  # [] i32
    params: Params
    opt: Any  # optax state
    rock: RockState
    key: jax.Array  # typed PRNG key
