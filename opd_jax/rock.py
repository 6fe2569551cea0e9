r"""The Rock Token state: which vocabulary items carry the KL, whether it still falls, and the gate.

For each vocabulary item v the state holds exponentially decayed sums over scored positions whose
*predicted* id is v. With :math:`n_v` positions of divergence :math:`\ell_i` in a batch,

.. math:: c_v \leftarrow \gamma c_v + n_v, \qquad s_v \leftarrow \gamma s_v + \sum_i \ell_i

so that the Rock Score (frequency x mean KL, arXiv 2605.09253) is :math:`s_v` itself, the mean is
:math:`s_v / c_v` (a ratio of two sums that decay alike, hence without start-up bias), and
*persistence* is the fast mean over the slow mean: near 1 the type stagnates, well below it still
learns. ``decay=1`` turns the same state into the plain corpus sums of the analyses.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from opd_jax import mesh, rules
from opd_jax.pytrees import RockState

MODES = ("off", "static", "ema", "adaptive", "random")
SCORES = ("kl_sum", "kl_mean", "count")
KEYS = ("label", "input")

# A fast count below this is a type that the fast horizon has forgotten: its sums near the end of
# f32's range, where their ratio no longer means anything.
_FORGOTTEN = 1e-20
_PIECE = 8192  # positions that a TPU sums at a time


@dataclasses.dataclass(frozen=True)
class RockConfig:
    """How the state is kept and what the gate does with it.

    Attributes:
      mode: ``off`` measures only; ``static`` gates ``ids``; ``ema`` gates the ``top_k`` types by
        ``score``; ``adaptive`` gates them too, but a member that still learns keeps its gradient;
        ``random`` gates each scored position with probability ``share``, drawn anew every step: the
        control that masks as many positions and knows nothing of types.
      score: one of ``SCORES``.
      top_k: number of types that may enter.
      skip_top: the most frequent types that may never enter.
      min_count: decayed count below which a type may not enter.
      decay, fast_decay: of the slow and the fast sums, per step.
      persist: smallest persistence (fast mean / slow mean) of a member.
      inside: weight of a gated position (lambda): 0 freezes, 1 is plain distillation.
      start: training steps before anything is gated.
      every: steps between refreshes of the membership.
      exit_factor: a member leaves only past rank ``top_k * exit_factor``.
      probe: share of the weight-0 positions that is still measured.
      ids: the gated ids of ``static``.
      key: which token a position's gate is looked up by: ``label``, the one it predicts, or
        ``input``, the one before. The second reproduces the mask of the code published with
        arXiv 2605.09253 and serves comparison only; the state is keyed on the label either way.
      share: of the scored positions that ``random`` gates.
      ramp: steps from ``start`` over which a gated weight goes linearly from 1 to its value; 0: at
        once.
      until: step from which nothing is gated any more; 0: never. Members are refreshed all along.
      stops: whether ids that end an answer may be rocks of ``ema`` and ``adaptive``.
      never: ids that may not; a run derives them from ``stops``.
    """

    mode: str = "off"
    score: str = "kl_sum"
    top_k: int = 100
    skip_top: int = 0
    min_count: float = 1.0
    decay: float = 0.99
    fast_decay: float = 0.9
    persist: float = 0.0
    inside: float = 0.0
    start: int = 0
    every: int = 1
    exit_factor: float = 1.5
    probe: float = 0.1
    ids: tuple[int, ...] = ()
    key: str = "label"
    share: float = 0.0
    ramp: int = 0
    until: int = 0
    stops: bool = False
    never: tuple[int, ...] = ()

    def __post_init__(self):
        is_later = self.until == 0 or self.until > self.start
        rules.check(
            self,
            "rock",
            ("mode", self.mode in MODES, f"one of {MODES}"),
            ("score", self.score in SCORES, f"one of {SCORES}"),
            ("top_k", self.top_k >= 1, "at least 1"),
            ("skip_top", self.skip_top >= 0, "at least 0"),
            ("min_count", self.min_count >= 0, "at least 0"),
            ("persist", self.persist >= 0, "at least 0"),
            ("decay", 0 < self.decay <= 1, "above 0, up to 1"),
            (
                "fast_decay",
                0 < self.fast_decay <= self.decay,
                f"above 0, up to rock.decay ({self.decay})",
            ),
            ("inside", 0 <= self.inside <= 1, "a weight from 0 to 1"),
            ("every", self.every >= 1, "at least 1"),
            ("exit_factor", self.exit_factor >= 1, "at least 1"),
            ("probe", 0 < self.probe <= 1, "a share above 0, up to 1"),
            (
                "ids",
                self.mode != "static" or bool(self.ids),
                "the gated ids where rock.mode is 'static'",
            ),
            ("key", self.key in KEYS, f"one of {KEYS}"),
            ("share", 0 <= self.share <= 1, "a share from 0 to 1"),
            (
                "share",
                self.mode != "random" or self.share > 0,
                "above 0 where rock.mode is 'random'",
            ),
            ("start", self.start >= 0, "at least 0"),
            ("ramp", self.ramp >= 0, "at least 0"),
            ("until", is_later, f"0 (never) or a step after rock.start ({self.start})"),
        )

    @property
    def has_members(self) -> bool:
        """Whether the gate acts on types."""
        return self.mode in ("static", "ema", "adaptive")

    @property
    def is_refreshed(self) -> bool:
        """Whether the members are recomputed as training goes on."""
        return self.mode in ("ema", "adaptive")

    @property
    def is_scored(self) -> bool:
        """Whether the members follow from divergences, not from counts alone."""
        return self.is_refreshed and (
            self.mode == "adaptive" or self.score != "count" or self.persist > 0
        )

    @property
    def fast_span(self) -> int | None:
        """Steps that the fast sums are about; None: all."""
        return None if self.fast_decay == 1 else round(1 / (1 - self.fast_decay))


def init(vocab_size: int, *, cfg: RockConfig = RockConfig()) -> RockState:
    """Return an empty state over ``vocab_size`` ids; ``static`` members are set at once.

    Raises:
      ValueError: ``cfg.ids`` holds an id outside the vocabulary.

    Sharding: replicated; it is five numbers and a flag per vocabulary item.
    """
    outside = [i for i in cfg.ids if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(
            f"rock.ids holds {outside[:5]}: expected ids from 0 to {vocab_size - 1}; "
            "set --config.rock.ids to ids of this tokenizer"
        )
    zero_V = lambda: jnp.zeros((vocab_size,), jnp.float32)  # noqa: E731  (donated: no shared buffer)
    member_V = jnp.zeros((vocab_size,), bool)
    if cfg.mode == "static":
        member_V = member_V.at[jnp.asarray(cfg.ids)].set(True)
    return RockState(
        zero_V(), zero_V(), zero_V(), zero_V(), zero_V(), member_V, jnp.zeros((), jnp.int32)
    )


def update(
    rock: RockState,
    ids_BT: Int[Array, "B T"],
    kl_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"] | Float[Array, "B T"],
    *,
    cfg: RockConfig,
) -> RockState:
    """Decay the sums and add one optimizer step's positions, keyed on the predicted id.

    The batch is summed into a zero buffer first and added once: a large f32 would swallow single
    ones. ``mask_BT`` may carry importance weights (probed positions stand for the skipped ones).
    With ``decay=1`` the result does not depend on how positions are split over calls.
    """
    importance_BT = mask_BT.astype(jnp.float32)
    rows = (importance_BT, importance_BT * kl_BT, importance_BT * kl_BT**2)
    count_V, sum_V, sq_V = _sum_by_id(ids_BT, rows, rock.count_V.shape[0])
    return rock.replace(
        count_V=cfg.decay * rock.count_V + count_V,
        kl_sum_V=cfg.decay * rock.kl_sum_V + sum_V,
        kl_sq_V=cfg.decay * rock.kl_sq_V + sq_V,
        fast_count_V=cfg.fast_decay * rock.fast_count_V + count_V,
        fast_kl_sum_V=cfg.fast_decay * rock.fast_kl_sum_V + sum_V,
        step=rock.step + 1,
    )


def _sum_by_id(ids_BT, rows, vocab_size):
    """Sum each [B, T] array by id into [V], over all batch shards."""

    def local(ids_BT, rows):
        zeros = tuple(jnp.zeros((vocab_size,), jnp.float32) for _ in rows)
        added = _added(zeros, ids_BT.ravel(), tuple(x.ravel() for x in rows))
        return lax.psum(added, mesh.BATCH) if mesh.is_active() else added

    if not mesh.is_active():
        return local(ids_BT, rows)
    spec = P(mesh.BATCH, None)
    return jax.shard_map(
        local,
        in_specs=(spec, (spec,) * len(rows)),
        out_specs=(P(None),) * len(rows),
        check_vma=False,
    )(ids_BT, rows)


def _added(sums, ids_N, rows):
    """Each [V] of the sums with its [N] of the rows added by id, in the order of the rows.

    On a TPU a piece at a time, sorted once for all sums: its compiler sorts the ids of each sum by
    itself, and takes ten times as long to compile a sort of 144,000 as one of a piece (LOG.md).
    """
    if mesh.platform() != "tpu" or ids_N.size <= _PIECE:
        return tuple(s_V.at[ids_N].add(x_N) for s_V, x_N in zip(sums, rows, strict=True))
    num = -(-ids_N.size // _PIECE)

    def split(x_N, fill):
        rest = num * _PIECE - x_N.size
        return jnp.pad(x_N, (0, rest), constant_values=fill).reshape(num, _PIECE)

    def add(sums, piece):
        ids_n, rows = piece
        order_n = jnp.argsort(ids_n, stable=True)
        added = []
        for s_V, x_n in zip(sums, rows, strict=True):
            place = s_V.at[ids_n[order_n]]
            added.append(place.add(x_n[order_n], mode="drop", indices_are_sorted=True))
        return tuple(added), None

    nowhere = jnp.iinfo(ids_N.dtype).max
    pieces = split(ids_N, nowhere), tuple(split(x_N, 0) for x_N in rows)
    return lax.scan(add, sums, pieces)[0]


def scores(rock: RockState, name: str) -> Float[Array, " V"]:
    """Rank types by ``kl_sum`` (the Rock Score of the paper), ``kl_mean`` or ``count``."""
    if name == "kl_sum":
        return rock.kl_sum_V
    if name == "kl_mean":
        return _ratio(rock.kl_sum_V, rock.count_V)
    if name == "count":
        return rock.count_V
    raise ValueError(f"score {name!r}: expected one of {SCORES}; set --config.rock.score")


def persistence(rock: RockState) -> Float[Array, " V"]:
    """Fast mean over slow mean; 1 where the type has no KL or has not been seen (lately)."""
    fast_V = _ratio(rock.fast_kl_sum_V, rock.fast_count_V)
    slow_V = _ratio(rock.kl_sum_V, rock.count_V)
    is_known_V = (slow_V > 0) & (rock.fast_count_V > _FORGOTTEN)
    return jnp.where(is_known_V, _ratio(fast_V, slow_V), 1.0)


def _ratio(a_V, b_V):
    return jnp.where(b_V > 0, a_V / jnp.where(b_V > 0, b_V, 1.0), 0.0)


def refresh(rock: RockState, *, cfg: RockConfig) -> RockState:
    """Recompute the members; ties go to the smaller id, so every process finds the same set."""
    if not cfg.is_refreshed:
        return rock
    is_eligible_V = (
        _may_be(rock, cfg.never)
        & (rock.count_V >= cfg.min_count)
        & (rock.count_V > 0)
        & (persistence(rock) >= cfg.persist)
        & (_rank(rock.count_V) >= cfg.skip_top)
    )
    rank_V = _rank(jnp.where(is_eligible_V, scores(rock, cfg.score), -jnp.inf))
    stays_V = rock.member_V & (rank_V < cfg.top_k * cfg.exit_factor)
    return rock.replace(member_V=is_eligible_V & ((rank_V < cfg.top_k) | stays_V))


def _rank(score_V):
    """Rank of each entry, 0 for the highest."""
    order_V = jnp.argsort(-score_V, stable=True)
    ranks_V = jnp.arange(score_V.size, dtype=jnp.int32)
    return jnp.zeros_like(ranks_V).at[order_V].set(ranks_V)


def _may_be(rock: RockState, never: tuple[int, ...]) -> Bool[Array, " V"]:
    """Whether a type may be a rock."""
    return ~jnp.isin(jnp.arange(rock.count_V.size), jnp.array(never, jnp.int32))


def leaders(
    rock: RockState, limit: int, never: tuple[int, ...] = (), *, is_fast: bool = False
) -> dict[str, jax.Array]:
    """The ``limit`` types with the highest Rock Score, best first; ties go to the smaller id.

    Args:
      rock: the state.
      limit: most types.
      never: ids that are left out.
      is_fast: by the fast sums, which say how things are now; else by those that the gate goes by.

    Returns:
      ``ids_K`` with ``count_K``, ``kl_sum_K`` and ``member_K``, and the sums over all types,
      ``count`` and ``kl_sum``: little to fetch, whatever the vocabulary.
    """
    slow = rock.kl_sum_V, rock.count_V
    sum_V, count_V = (rock.fast_kl_sum_V, rock.fast_count_V) if is_fast else slow
    score_V = jnp.where(_may_be(rock, never), sum_V, -1.0)
    kl_sum_K, ids_K = lax.top_k(score_V, min(limit, sum_V.size))
    return {
        "ids_K": ids_K,
        "kl_sum_K": kl_sum_K,
        "count_K": count_V[ids_K],
        "member_K": rock.member_V[ids_K],
        "kl_sum": jnp.sum(sum_V),
        "count": jnp.sum(count_V),
    }


def gated(
    rock: RockState, ids_BT: Int[Array, "B T"], *, cfg: RockConfig, key: jax.Array | None = None
) -> Bool[Array, "B T"]:
    """Whether the gate means each position, whatever its weight and its steps.

    Args:
      rock: state before the batch.
      ids_BT: what the gate is looked up by: see ``RockConfig.key``.
      cfg: static.
      key: draws the positions of mode ``random``, which needs one.

    Raises:
      ValueError: mode ``random`` without a key.
    """
    if cfg.mode == "off":
        return jnp.zeros_like(ids_BT, dtype=bool)
    placed = mesh.out(mesh.BATCH, None)
    if cfg.mode == "random":
        if key is None:
            raise ValueError("rock.mode 'random' and no key: expected a key; pass the step's")
        return jax.random.uniform(key, ids_BT.shape, out_sharding=placed) < cfg.share
    return rock.member_V.at[ids_BT].get(out_sharding=placed)


def weights(
    rock: RockState,
    ids_BT: Int[Array, "B T"],
    *,
    cfg: RockConfig,
    gated_BT: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    r"""Weight of each position by its id, from the state before this batch.

    A constant of the gradient that never sees this batch's KL, so that a position cannot lower its
    own weight. A gated position weighs :math:`1 - r (1 - \lambda)` with r from 0 to 1 over
    ``cfg.ramp`` steps and :math:`\lambda` from ``cfg.inside``; with ``inside=0`` it is exactly 0,
    and not computed, only where r has reached 1.

    Args:
      rock: state before the batch.
      ids_BT: what the gate is looked up by.
      cfg: static.
      gated_BT: what :func:`gated` gave; looked up here where None.
    """
    if gated_BT is None:
        gated_BT = gated(rock, ids_BT, cfg=cfg)
    inside_BT = jnp.asarray(cfg.inside, jnp.float32)
    if cfg.mode == "adaptive":
        learning_V = jnp.clip(1.0 - persistence(rock), 0.0, 1.0)
        inside_V = cfg.inside + (1.0 - cfg.inside) * learning_V
        inside_BT = inside_V.at[ids_BT].get(out_sharding=mesh.out(mesh.BATCH, None))
    if cfg.ramp:
        done = (rock.step - cfg.start) / cfg.ramp
        ramped_BT = 1.0 - done * (1.0 - inside_BT)
        inside_BT = jnp.where(rock.step < cfg.start + cfg.ramp, ramped_BT, inside_BT)
    is_on = rock.step >= cfg.start
    if cfg.until:
        is_on &= rock.step < cfg.until
    return jnp.where(gated_BT & is_on, inside_BT, 1.0)


def importance(
    weight_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    key: jax.Array,
    *,
    cfg: RockConfig,
) -> Float[Array, "B T"]:
    """Choose what is measured: 1 where a position has weight, 1/probe where it was probed, else 0.

    A weight-0 position is not projected, yet its type must be able to leave the set. A random share
    ``cfg.probe`` of them is measured and stands for all: sums weighted with the result are
    unbiased.
    """
    weighted_BT = (mask_BT & (weight_BT != 0)).astype(jnp.float32)
    if cfg.mode == "off" or cfg.inside > 0:  # no weight is 0
        return weighted_BT
    uniform_BT = jax.random.uniform(key, mask_BT.shape, out_sharding=mesh.out(mesh.BATCH, None))
    probed_BT = mask_BT & (weight_BT == 0) & (uniform_BT < cfg.probe)
    return weighted_BT + probed_BT / cfg.probe
