r"""Weights by position: from where a token stands in its answer, or from what was measured there.

The gate of :mod:`opd_jax.rock` looks a weight up by the predicted id. Here the weights of a batch
follow from the batch itself, as constants of the gradient. p is the student's distribution at a
position, q the teacher's, y the sampled id; kept positions weigh 1, the others ``floor``.

===============  ==============================================================  ================
``mode``         kept, or weight                                                 source
===============  ==============================================================  ================
random           each scored position with probability ``keep``                  the control
random_window    one window of ``window`` positions per answer                   the control
first            the first ``window`` positions of an answer                     arXiv 2605.27028
last             the last ones
entropy          the share ``keep`` of largest H(p)                              arXiv 2506.01939
tip              of largest h + d - h d; h, d: min-max of H(p) and KL(p‖q)       arXiv 2604.14084
lowest_logp      of lowest log p(y)                                              arXiv 2608.31046
iw               1 + ``boost`` (1 - sum_{s<t} a_s / sum_s a_s),                  arXiv 2606.22600
                 a = \|log q(y) - log p(y)\|
fire             (1 - H(q)/max) (H(p)/max), of mean 1; 0 in the fifth of         arXiv 2606.02684
                 the answers whose mean log q(y) is lowest
selectkd         argmax p is among the ``top`` likeliest of q                    arXiv 2510.24021
ta               of largest d c; d, c: KL(p‖q) and q of the 16 likeliest of p,    arXiv 2605.26844
                 each from its 5 % to its 95 % quantile, clipped to 0 and 1
rock_window      all but within ``window`` positions of a gated type             arXiv 2605.09253
===============  ==============================================================  ================

Every one of them has a control of equal budget: ``shuffled`` deals the same weights to the scored
positions of the batch at random.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opd_jax import mesh, rules
from opd_jax.pytrees import TokenKL

# Need a sweep over the batch before.
MEASURED = ("entropy", "tip", "lowest_logp", "iw", "fire", "selectkd", "ta")
_BESIDE = {"selectkd": ("rank",), "ta": ("overlap",)}  # what that sweep measures for them alone
MODES = ("off", "random", "random_window", "first", "last", *MEASURED, "rock_window")


@dataclasses.dataclass(frozen=True)
class PositionSpec:
    """How positions are weighted: group ``position``."""

    mode: str = "off"  # off, or by what positions are chosen
    keep: float = 0.5  # share of the scored positions that is kept
    window: int = 100  # positions: of first, last and random_window; to each side in rock_window
    floor: float = 0.0  # weight of what is not kept; 0: not trained on, and not projected
    boost: float = 0.5  # of iw
    top: int = 5  # of selectkd: ids
    shuffled: bool = False  # the control: the same weights, dealt out at random

    def __post_init__(self):
        rules.check(
            self,
            "position",
            ("mode", self.mode in MODES, f"one of {MODES}"),
            ("keep", 0 < self.keep <= 1, "a share above 0, up to 1"),
            ("window", self.window >= 1, "at least 1"),
            ("floor", 0 <= self.floor <= 1, "a weight from 0 to 1"),
            ("boost", self.boost >= 0, "at least 0"),
            ("top", self.top >= 1, "at least 1"),
            (
                "shuffled",
                not self.shuffled or self.mode != "off",
                "False where mode is off",
            ),
        )

    @property
    def is_measured(self) -> bool:
        """Whether the weights follow from measurements of the batch."""
        return self.mode in MEASURED

    @property
    def beside(self) -> tuple[str, ...]:
        """What has to be measured beside the divergence, of ``agreement.MEASURES``."""
        return _BESIDE.get(self.mode, ())


def weights(
    spec: PositionSpec,
    mask_BT: Bool[Array, "B T"],
    gated_BT: Bool[Array, "B T"],
    key: jax.Array,
    tokens: TokenKL | None = None,
) -> Float[Array, "B T"]:
    """Weight of each scored position, 1 elsewhere.

    Args:
      spec: the mode.
      mask_BT: the scored positions.
      gated_BT: positions that the gate of types means, for ``rock_window``.
      key: of the step, whatever the split over devices.
      tokens: measurements of all scored positions, where ``spec.is_measured``.

    **Sharding**: as the mask; what compares positions of the whole batch gathers one number each.
    """
    if spec.mode == "off":
        return jnp.ones(mask_BT.shape, jnp.float32, out_sharding=mesh.out(mesh.BATCH, None))
    draw_key, deal_key = jax.random.split(key)
    mask_BT, gated_BT = mesh.replicated((mask_BT, gated_BT))
    tokens = mesh.replicated(tokens)
    if spec.mode in _GRADED:
        assert tokens is not None
        weight_BT = _GRADED[spec.mode](spec, mask_BT, tokens)
    else:
        kept_BT = _kept(spec, mask_BT, gated_BT, draw_key, tokens)
        weight_BT = jnp.where(kept_BT, 1.0, spec.floor)
    if spec.shuffled:
        weight_BT = _dealt(weight_BT, mask_BT, deal_key)
    weight_BT = jnp.where(mask_BT, weight_BT, 1.0)
    return mesh.constrain(jax.lax.stop_gradient(weight_BT), mesh.BATCH, None)


def _kept(spec: PositionSpec, mask_BT, gated_BT, key, tokens: TokenKL | None):
    place_BT = jnp.cumsum(mask_BT, axis=1) - 1  # in the answer, from 0
    length_B1 = jnp.sum(mask_BT, axis=1, keepdims=True)
    if spec.mode == "first":
        return place_BT < spec.window
    if spec.mode == "last":
        return place_BT >= length_B1 - spec.window
    if spec.mode == "random_window":
        room_B1 = jnp.maximum(length_B1 - spec.window, 0) + 1
        start_B1 = jnp.floor(jax.random.uniform(key, room_B1.shape) * room_B1)
        return (place_BT >= start_B1) & (place_BT < start_B1 + spec.window)
    if spec.mode == "rock_window":
        return ~_near(gated_BT & mask_BT, spec.window)
    if spec.mode == "random":
        return jax.random.uniform(key, mask_BT.shape) < spec.keep
    assert tokens is not None
    if spec.mode == "selectkd":
        assert tokens.rank_BT is not None
        return tokens.rank_BT < spec.top
    if spec.mode == "ta":
        assert tokens.overlap_BT is not None
        score_BT = _clipped(tokens.reverse_BT, mask_BT) * _clipped(tokens.overlap_BT, mask_BT)
    elif spec.mode == "entropy":
        score_BT = tokens.entropy_BT
    elif spec.mode == "lowest_logp":
        score_BT = -tokens.logp_BT
    else:
        h_BT, d_BT = (_min_max(x_BT, mask_BT) for x_BT in (tokens.entropy_BT, tokens.reverse_BT))
        score_BT = h_BT + d_BT - h_BT * d_BT
    num_kept = jnp.round(spec.keep * jnp.sum(mask_BT)).astype(jnp.int32)
    return _ranks(jnp.where(mask_BT, -score_BT, jnp.inf)) < num_kept


def _importance(spec: PositionSpec, mask_BT, tokens: TokenKL):
    gap_BT = jnp.abs(tokens.teacher_logp_BT - tokens.logp_BT) * mask_BT
    before_BT = jnp.cumsum(gap_BT, axis=1) - gap_BT
    whole_B1 = jnp.sum(gap_BT, axis=1, keepdims=True)
    return 1.0 + spec.boost * (1.0 - before_BT / jnp.where(whole_B1 > 0, whole_B1, 1.0))


def _fire(spec: PositionSpec, mask_BT, tokens: TokenKL):
    def largest(x_BT):
        return jnp.max(jnp.where(mask_BT, x_BT, 0.0))

    left_BT = largest(tokens.teacher_entropy_BT) - tokens.teacher_entropy_BT
    weight_BT = left_BT * tokens.entropy_BT  # but for a factor, which the mean takes out
    length_B = jnp.sum(mask_BT, axis=1)
    mean_B = jnp.sum(tokens.teacher_logp_BT * mask_BT, axis=1) / jnp.maximum(length_B, 1)
    fifth = jnp.floor(jnp.sum(length_B > 0) / 5).astype(jnp.int32)
    is_kept_B = _ranks(jnp.where(length_B > 0, mean_B, jnp.inf)) >= fifth
    weight_BT *= is_kept_B[:, None] & mask_BT
    mean = jnp.sum(weight_BT) / jnp.maximum(jnp.sum(mask_BT), 1)
    return weight_BT / jnp.where(mean > 0, mean, 1.0)


_GRADED = {"iw": _importance, "fire": _fire}  # weights of every size, and not kept or floor


def _clipped(x_BT, mask_BT):
    """From 0 at the 5 % quantile of the scored positions to 1 at the 95 % one."""
    low, high = jnp.nanquantile(jnp.where(mask_BT, x_BT, jnp.nan), jnp.array([0.05, 0.95]))
    return jnp.clip((x_BT - low) / jnp.where(high > low, high - low, 1.0), 0.0, 1.0)


def _near(x_BT, window: int):
    """Whether a marked position stands at most ``window`` positions before or after."""
    upto_BT = jnp.pad(jnp.cumsum(x_BT, axis=1), ((0, 0), (1, 0)))
    place_T = jnp.arange(x_BT.shape[1])
    first_T = jnp.maximum(place_T - window, 0)
    end_T = jnp.minimum(place_T + window + 1, x_BT.shape[1])
    return upto_BT[:, end_T] > upto_BT[:, first_T]


def _min_max(x_BT, mask_BT):
    low, high = (
        jnp.min(jnp.where(mask_BT, x_BT, jnp.inf)),
        jnp.max(jnp.where(mask_BT, x_BT, -jnp.inf)),
    )
    return (x_BT - low) / jnp.where(high > low, high - low, 1.0)


def _ranks(x_BT):
    """Rank of every entry of the batch, 0 for the smallest; ties in order."""
    order_N = jnp.argsort(x_BT.ravel(), stable=True)
    ranks_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(order_N.size))
    return ranks_N.reshape(x_BT.shape)


def _dealt(weight_BT, mask_BT, key):
    """The weights of the scored positions, in a random order among them."""
    draws_BT = jax.random.uniform(key, mask_BT.shape)
    scored_first_N = jnp.argsort(jnp.where(mask_BT, 0, 1).ravel(), stable=True)
    random_first_N = jnp.argsort(jnp.where(mask_BT, draws_BT, jnp.inf).ravel(), stable=True)
    dealt_N = weight_BT.ravel().at[random_first_N].set(weight_BT.ravel()[scored_first_N])
    return dealt_N.reshape(weight_BT.shape)
