"""Logits to a token and its log-probability: bias, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax import mesh
from opd_jax.rollout import inversion

_AGAIN = 1  # folded into a row's key for the draw that replaces a banned one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next id is drawn; hashable, so it is a static argument of jitted functions.

    Filters apply in the order bias, temperature, top-k, top-p, min-p. Ids that tie with the last
    one kept are kept too, so the result never depends on the order of equal logits.

    Raises:
      ValueError: a field is out of its range.
    """

    vocab_size: int  # real ids; the logits of padded ids, at and above it, are masked
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off; else a share of the largest probability
    stop_ids: tuple[int, ...] = ()  # any of these ends a row and is kept as its last id
    pad_id: int = 0  # written after the end; may equal a stop id

    def __post_init__(self):
        if self.vocab_size < 1:
            raise ValueError(
                f"vocab_size is {self.vocab_size}: expected the number of real ids, >= 1"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature is {self.temperature}: expected a finite number >= 0 (0 is greedy); "
                "set --config.rollout.temperature"
            )
        if self.top_k < 0:
            raise ValueError(
                f"top_k is {self.top_k}: expected 0 (off) or a number of ids; "
                "set --config.rollout.top_k"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p is {self.top_p}: expected a probability mass in (0, 1], 1 is off; "
                "set --config.rollout.top_p"
            )
        if not 0 <= self.min_p <= 1:
            raise ValueError(
                f"min_p is {self.min_p}: expected a share of the largest probability in [0, 1], "
                "0 is off; set --config.rollout.min_p"
            )
        bad = [i for i in (*self.stop_ids, self.pad_id) if not 0 <= i < self.vocab_size]
        if bad:
            raise ValueError(
                f"stop ids {tuple(self.stop_ids)} and pad id {self.pad_id}: {bad} are not ids of a "
                f"vocabulary of {self.vocab_size}; expected 0 <= id < vocab_size, so check that "
                "the tokenizer belongs to the model"
            )
        # One spelling of the set, so that its order cannot cause a second compilation.
        object.__setattr__(self, "stop_ids", tuple(sorted({int(i) for i in self.stop_ids})))

    @property
    def is_greedy(self) -> bool:
        """Whether every draw is the argmax."""
        return self.temperature == 0

    @property
    def is_truncated(self) -> bool:
        """Whether top-k, top-p or min-p can remove an id."""
        return 0 < self.top_k < self.vocab_size or self.top_p < 1 or self.min_p > 0

    @property
    def on_policy(self) -> bool:
        """Whether samples come from the model's own distribution: temperature 1, no filter."""
        return self.temperature == 1 and not self.is_truncated


def off_policy_warning(sampler: Sampler) -> str | None:
    """Say what makes samples leave the policy, or None when nothing does."""
    if sampler.on_policy:
        return None
    neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
    changed = [name for name, value in neutral.items() if getattr(sampler, name) != value]
    found = ", ".join(f"{name}={getattr(sampler, name)}" for name in changed)
    expected = ", ".join(f"{name}={neutral[name]}" for name in changed)
    flags = " ".join(f"--config.rollout.{name}={neutral[name]}" for name in changed)
    return (
        f"sampling with {found}: the rollouts are not drawn from the student's own distribution, "
        f"whose KL the objective takes ({expected} would be); set {flags} to train on-policy"
    )


def check_bias(bias_V, sampler: Sampler, *, num_ids: int) -> None:
    """Refuse a logit bias that cannot be sampled with.

    The values are read only where this process holds them all; the shape is always checked.

    Raises:
      ValueError: the shape is not ``[num_ids]``, a value is NaN or +inf, or every real id is
        forbidden.
    """
    if np.shape(bias_V) != (num_ids,):
        raise ValueError(
            f"logit bias has shape {np.shape(bias_V)}, the logits have {num_ids} ids (padding "
            f"included): expected ({num_ids},); pad the bias with zeros"
        )
    if isinstance(bias_V, Tracer):
        return
    if isinstance(bias_V, jax.Array) and not bias_V.is_fully_addressable:
        return
    values = np.asarray(bias_V, np.float32)[: sampler.vocab_size]
    wrong = np.flatnonzero(np.isnan(values) | np.isposinf(values))
    if wrong.size:
        raise ValueError(
            f"logit bias is {values[wrong[0]]} at id {wrong[0]} ({wrong.size} such ids): expected "
            "finite values, or -inf to forbid an id"
        )
    if np.isneginf(values).all():
        raise ValueError(
            f"logit bias is -inf at all {sampler.vocab_size} ids: expected at least one id that "
            "may be sampled; leave one without the bias"
        )


def sample(
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, " B"],
    *,
    sampler: Sampler,
    bias_V: Float[Array, " V"] | None = None,
    banned_BK: Int[Array, "B K"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    r"""Draw one id per row, each row from its own key alone.

    With $z = (\ell + b) / \tau$ and $S$ the ids that the filters keep, id $v \in S$ is drawn with
    $\log p(v) = z_v - \log \sum_{u \in S} e^{z_u}$, which is returned beside it (f32, nats). A
    greedy draw has log-probability 0. Logits that are NaN or wholly forbidden give a NaN
    log-probability, for the host to find.

    ``banned_BK`` are ids that a row may not draw (those outside the vocabulary ban nothing). A row
    draws as it would without them, and only where that is a banned id draws again, from the others:
    at id v with :math:`p(v) + p(S) \, p(v) / (1 - p(S)) = p(v) / (1 - p(S))`, S the banned ids,
    which is the law of a bias of minus infinity. So two rows of one key that differ in their bans
    alone draw the same id wherever neither's is banned. (Inverting the distribution that is left
    would move the draws behind every banned id.) The log-probability is
    that of the last draw.

    Sharding: logits may arrive as P(BATCH, "model") and stay so where ids are drawn without a
    filter and without bans; else they are gathered over the vocabulary first. Ids and
    log-probabilities leave as P(BATCH).
    """
    if banned_BK is not None:
        return _without(logits_BV, keys_B, banned_BK, sampler=sampler, bias_V=bias_V)
    over = "model" if inversion.is_split(logits_BV) and not sampler.is_truncated else None
    logits_BV = mesh.constrain(logits_BV, mesh.BATCH, over).astype(jnp.float32)
    if bias_V is not None:
        bias_V = mesh.constrain(jnp.asarray(bias_V, jnp.float32), over)
        logits_BV = logits_BV + bias_V[None, :]
    is_real_V = mesh.constrain(jnp.arange(logits_BV.shape[1]) < sampler.vocab_size, over)
    logits_BV = jnp.where(is_real_V[None, :], logits_BV, -jnp.inf)
    best_B = inversion.highest(logits_BV)
    # Shifted before the division, so that a small temperature cannot overflow.
    z_BV = logits_BV - best_B[:, None]
    if sampler.is_greedy:
        return inversion.best(z_BV), jnp.where(jnp.isfinite(best_B), jnp.float32(0), jnp.nan)
    if sampler.temperature != 1:
        z_BV = z_BV / sampler.temperature
    if sampler.is_truncated:
        z_BV = jnp.where(keep(z_BV, sampler=sampler), z_BV, -jnp.inf)
    keys_B = mesh.constrain(keys_B, mesh.BATCH)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    return inversion.draw(z_BV, uniform_B2)


def _without(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    banned_BK: jax.Array,
    *,
    sampler: Sampler,
    bias_V: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Draw ids that are not banned, see :func:`sample`."""
    logits_BV = mesh.constrain(logits_BV, mesh.BATCH, None).astype(jnp.float32)
    banned_BK = mesh.constrain(banned_BK, mesh.BATCH, None)
    first_B, logp_B = sample(logits_BV, keys_B, sampler=sampler, bias_V=bias_V)
    left_BV = jax.vmap(lambda x_V, ids_K: x_V.at[ids_K].set(-jnp.inf, mode="drop"))(
        logits_BV, banned_BK
    )
    again_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, _AGAIN)
    second_B, second_logp_B = sample(left_BV, again_B, sampler=sampler, bias_V=bias_V)
    is_banned_B = jnp.any(banned_BK == first_B[:, None], axis=1)
    # A row that has nothing left has a NaN in the second, which has to be found.
    logp_B = jnp.where(is_banned_B, second_logp_B, logp_B)
    return jnp.where(is_banned_B, second_B, first_B), logp_B


def keep(z_BV: Float[Array, "B V"], *, sampler: Sampler) -> Bool[Array, "B V"]:
    """Mark the ids that top-k, top-p and min-p leave, given logits whose row maximum is 0.

    top-p keeps the smallest set of most probable ids with at least that mass, measured after top-k.
    Sharding: row-local; P(BATCH, None) in and out.
    """
    keep_BV = z_BV > -jnp.inf
    if 0 < sampler.top_k < sampler.vocab_size:
        kth_B1 = jax.lax.top_k(z_BV, sampler.top_k)[0][:, -1:]
        keep_BV &= z_BV >= kth_B1
    if sampler.top_p < 1:
        sorted_BV = -jnp.sort(jnp.where(keep_BV, -z_BV, jnp.inf), axis=1)
        p_BV = jax.nn.softmax(sorted_BV, axis=1)
        # Mass of all ids ranked before this one; the first id has 0 and is always kept.
        before_BV = jnp.cumsum(p_BV, axis=1) - p_BV
        is_in_BV = (before_BV < sampler.top_p) & (p_BV > 0)
        last_B1 = jnp.min(jnp.where(is_in_BV, sorted_BV, 0.0), axis=1, keepdims=True)
        keep_BV &= z_BV >= last_B1
    if sampler.min_p > 0:
        keep_BV &= z_BV >= math.log(sampler.min_p)
    return keep_BV
