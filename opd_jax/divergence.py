r"""Divergences between next-token distributions, swept over tiles of the vocabulary.

For a position with student distribution :math:`p` and teacher distribution :math:`q` over the full
vocabulary, both at temperature :math:`\tau`,

==============  ==========================================================  =====================
``direction``   divergence                                                  settings
==============  ==========================================================  =====================
reverse         :math:`KL(p\|q)`                                            the objective of OPD
forward         :math:`KL(q\|p)`
jsd             :math:`b\,KL(p\|m)+(1-b)\,KL(q\|m),\ m=bp+(1-b)q`           ``beta`` = b
skew_reverse    :math:`KL(p\|ap+(1-a)q)`                                    ``skew`` = a
skew_forward    :math:`KL(q\|aq+(1-a)p)`                                    ``skew`` = a
==============  ==========================================================  =====================

:class:`VocabSweep` measures a chunk of positions whose logits are there, and gives the gradient in
closed form (arXiv 2605.09253, section 2). Which positions, and on which shard, is decided by
:mod:`opd_jax.kl`.

**To add a divergence**

1. Give its terms t_v(p, q) with D = sum_v t_v, and p_v dt_v/dp_v, in :func:`_terms`: five lines.
   Both from log-probabilities, so that nothing overflows; t must be homogeneous, t(cp, cq) = c t.
2. Name it in ``DIRECTIONS`` and in the table above, and a setting of it in :class:`KLSpec` with its
   range. Everything else (chunks, shards, temperature, stop events, the gradient) is there.
3. Say its formula in ``run.narrate.objective_text``.
4. Tests: ``test_divergence`` and ``test_stop_events`` run over ``DIRECTIONS``; add the formula in
   float64 numpy to their references. ``test_kl`` compares meshes and gradients.

**Stop events.** Two models may end a response by different ids. To a divergence over ids these are
different events, and mass on ending is trained away: where the student's probability of the
teacher's stop id is 1e-11, reverse KL cannot raise it. With ``stop_ids`` S the distributions are
compared with S as one event, with P and Q its probabilities: for reverse KL

.. math:: KL' = KL - \sum_{v \in S} p_v \log(p_v/q_v) + P \log(P/Q),

still a divergence, of coarser events, and never larger. All directions are homogeneous, t(cp, cq) =
c t(p, q), so KL' is KL from p to a teacher that spreads its Q over S as the student spreads P. One
replaces the teacher's logits there, and both the value and the gradient follow.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from opd_jax import mesh, rules

MERGES = ("auto", "on", "off")
DIRECTIONS = ("reverse", "forward", "jsd", "skew_reverse", "skew_forward")

# Finite, so that padded columns have probability 0 and their log-probabilities can be subtracted.
_MASKED = -1e30
# Vocabulary columns swept at a time: temporaries stay small and matmuls large. LOG.md has timings.
_TILE = 16384


@dataclasses.dataclass(frozen=True)
class KLSpec:
    """Which divergence, over which ids, in which pieces.

    Attributes:
      direction: one of ``DIRECTIONS``.
      temperature: divides both logits; no squared factor is put back on the loss.
      chunk: rows projected at a time; 0 chooses by the size of the vocabulary shard.
      vocab_size: number of real ids; columns from there on are padding and masked on both sides.
      beta: weight of the student in ``jsd``.
      skew: share of its own distribution mixed into the reference by ``skew_*``.
      ce: share c of the loss (1 - c) x divergence + c x cross-entropy of the label, which is taken
        at temperature 1: for completions from elsewhere; 1 needs no teacher.
      merge_stops: whether the stop ids of both models count as one event: ``auto``, where they
        differ; ``on``; or ``off``. A run derives ``stop_ids`` from it.
      stop_ids: the ids that count as one event; empty: none.
      beside: what else is measured, of ``agreement.MEASURES``; a run derives it.
    """

    direction: str = "reverse"
    temperature: float = 1.0
    chunk: int = 0
    vocab_size: int | None = None
    beta: float = 0.5
    skew: float = 0.1
    ce: float = 0.0
    merge_stops: str = "auto"
    stop_ids: tuple[int, ...] = ()
    beside: tuple[str, ...] = ()

    def __post_init__(self):
        rules.check(
            self,
            "kl",
            ("direction", self.direction in DIRECTIONS, f"one of {DIRECTIONS}"),
            ("temperature", 0 < self.temperature < float("inf"), "a finite number above 0"),
            ("beta", 0 < self.beta < 1, "a weight between 0 and 1, ends excluded"),
            ("skew", 0 < self.skew < 1, "a share between 0 and 1, ends excluded"),
            ("ce", 0 <= self.ce <= 1, "a share from 0 to 1"),
            ("chunk", self.chunk >= 0, "rows per chunk, or 0"),
            ("merge_stops", self.merge_stops in MERGES, f"one of {MERGES}"),
        )

    @property
    def is_default_divergence(self) -> bool:
        """Whether the trained divergence is already the reverse KL at temperature 1."""
        return self.direction == "reverse" and self.temperature == 1.0 and self.ce == 0.0


def merged_stops(merge: str, stop_ids: tuple[int, ...], *, are_equal: bool) -> tuple[int, ...]:
    """The stop ids that count as one event.

    Args:
      merge: one of ``MERGES``.
      stop_ids: of both models.
      are_equal: whether both have the same.
    """
    is_merged = merge == "on" or (merge == "auto" and not are_equal)
    return stop_ids if is_merged and len(stop_ids) > 1 else ()


def project(h_CD, w_VD):
    """Logits [C, V], summed in f32 whatever the dtype of the inputs."""
    return lax.dot_general(h_CD, w_VD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


@struct.dataclass
class _Moments:
    """Sums over the vocabulary from which normalisers, entropies and reverse KL follow.

    M counts models, the student first. All is relative to the largest logit so far, so that neither
    large logits nor an offset between the models costs digits.
    """

    tops_MC: jax.Array  # largest logit
    sums_MC: jax.Array  # sum_v e_v with e = exp(z - top)
    firsts_MC: jax.Array  # sum_v e_v (z_v - top)
    gap_C: jax.Array  # sum_v e_v ((z_v - top) - the same of the teacher), e of the student

    def relative_to(self, tops_MC) -> _Moments:
        """The same sums, relative to larger logits."""
        moved_MC = self.tops_MC - tops_MC
        factor_MC = jnp.exp(moved_MC)
        gap_C = self.gap_C + (moved_MC[0] - moved_MC[-1]) * self.sums_MC[0]
        return _Moments(
            tops_MC,
            factor_MC * self.sums_MC,
            factor_MC * (self.firsts_MC + moved_MC * self.sums_MC),
            factor_MC[0] * gap_C,
        )

    @property
    def log_sums_MC(self):
        """Log sum_v exp(z_v - top).

        Kept apart from the top: their sum would round away what small differences of large logits
        need.
        """
        return jnp.log(self.sums_MC)

    @property
    def norms(self):
        """Per model the largest logit and what remains of the log normaliser."""
        return tuple(zip(self.tops_MC, self.log_sums_MC, strict=True))

    @property
    def entropies_MC(self):
        """Entropy of each model."""
        return self.log_sums_MC - self.firsts_MC / self.sums_MC

    @property
    def reverse_kl_C(self):
        """KL from student to teacher."""
        log_sums_MC = self.log_sums_MC
        return self.gap_C / self.sums_MC[0] - (log_sums_MC[0] - log_sums_MC[1])


class VocabSweep:
    """Logits of C positions and what follows from them, swept over tiles of W vocabulary columns.

    Three sweeps: normalisers and measurements when it is made, and :meth:`gradient`. Nothing but
    the logits is ever [C, V]; the gradient takes the place of the student's logits.

    Args:
      spec: the divergence.
      zs_CV, zt_CV: f32 logits of student and teacher, this shard's columns; no teacher where None.
      label_C: the predicted ids, or None.
      first_id: id of the shard's first column.
      over_vocab: mesh axes that the vocabulary is split over, empty on one shard.

    Attributes:
      stats_C6: f32, in the order of :class:`~opd_jax.pytrees.TokenKL`, the same on every shard.
    """

    def __init__(self, spec: KLSpec, zs_CV, zt_CV, label_C=None, first_id=0, over_vocab=()):
        self.spec, self.label_C, self.first_id = spec, label_C, first_id
        self.over_vocab = over_vocab
        self.logits = (zs_CV,) if zt_CV is None else (zs_CV, zt_CV)
        self.num_ids = zs_CV.shape[1]
        self.tile = min(_TILE, self.num_ids) if mesh.platform() == "cpu" else self.num_ids
        self.labels = [self._at(z_CV, self.label_C) for z_CV in self.logits]
        self.stops = self._stop_logits()
        moments = self._moments(1.0)
        self.norms = self.hot_norms = moments.norms
        if spec.temperature != 1.0:
            self.hot_norms = self._moments(spec.temperature).norms
        self.stats_C6, self.slope_C = self._stats(moments)

    def _sweep(self, body, carry):
        """Fold ``carry = body(carry, start, size)`` over the tiles; the last may be narrower."""
        whole, rest = divmod(self.num_ids, self.tile)
        if whole == 1:
            carry = body(carry, 0, self.tile)
        else:
            carry = lax.fori_loop(0, whole, lambda i, c: body(c, i * self.tile, self.tile), carry)
        return body(carry, whole * self.tile, rest) if rest else carry

    def _ids(self, start, size):
        return self.first_id + start + jnp.arange(size)

    def _tile(self, start, size, temperature, logits=None):
        """Each model's logits of one tile over the temperature, padded ids masked, [C, W]."""
        logits = logits or self.logits
        tiles = [lax.dynamic_slice_in_dim(z_CV, start, size, axis=1) for z_CV in logits]
        if self.spec.vocab_size is not None:
            is_real_1W = (self._ids(start, size) < self.spec.vocab_size)[None, :]
            tiles = [jnp.where(is_real_1W, z_CW, _MASKED) for z_CW in tiles]
        if temperature != 1.0:
            tiles = [z_CW / temperature for z_CW in tiles]
        if self.stops is not None:
            is_stop_1W = jnp.isin(self._ids(start, size), jnp.array(self.spec.stop_ids))[None, :]
            log_masses = [jax.nn.logsumexp(z_CS / temperature, axis=1) for z_CS in self.stops]
            spread_CW = tiles[0] + (log_masses[1] - log_masses[0])[:, None]
            tiles[1] = jnp.where(is_stop_1W, spread_CW, tiles[1])
        return tiles

    def _moments(self, temperature):
        """One sweep for all that follows from sums of exp(z): see :class:`_Moments`."""

        def body(old, start, size):
            tiles = self._tile(start, size, temperature)
            tops_MC = jnp.maximum(old.tops_MC, jnp.stack([jnp.max(z_CW, 1) for z_CW in tiles]))
            old = old.relative_to(tops_MC)
            tiles = [z_CW - top_C[:, None] for z_CW, top_C in zip(tiles, tops_MC, strict=True)]
            exps = [jnp.exp(z_CW) for z_CW in tiles]
            firsts = [jnp.sum(e_CW * z_CW, 1) for e_CW, z_CW in zip(exps, tiles, strict=True)]
            return _Moments(
                tops_MC,
                old.sums_MC + jnp.stack([jnp.sum(e_CW, 1) for e_CW in exps]),
                old.firsts_MC + jnp.stack(firsts),
                old.gap_C + jnp.sum(exps[0] * (tiles[0] - tiles[-1]), 1),
            )

        # The largest so far starts at the label, so that its logit is read before all sweeps: read
        # after the last, XLA would copy the logits, which the gradient overwrites.
        tops_MC = jnp.maximum(jnp.stack(self.labels) / temperature, _MASKED)
        zeros_MC = jnp.zeros_like(tops_MC)
        moments = self._sweep(body, _Moments(tops_MC, zeros_MC, zeros_MC, zeros_MC[0]))
        if not self.over_vocab:
            return moments
        moments = moments.relative_to(lax.pmax(moments.tops_MC, self.over_vocab))
        sums = moments.sums_MC, moments.firsts_MC, moments.gap_C
        return _Moments(moments.tops_MC, *lax.psum(sums, self.over_vocab))

    def _log_probs(self, start, size, *, is_hot: bool, logits=None):
        """Log-probabilities of one tile, [C, W], of the student and, where given, the teacher."""
        tiles = self._tile(start, size, self.spec.temperature if is_hot else 1.0, logits)
        norms = self.hot_norms if is_hot else self.norms
        return [
            (z_CW - top_C[:, None]) - log_sum_C[:, None]
            for z_CW, (top_C, log_sum_C) in zip(tiles, norms, strict=True)
        ]

    def _at(self, z_CV, id_C):
        """Logit of an id per row, [C]; -inf where another shard has it or there is none."""
        if id_C is None:
            return jnp.full(z_CV.shape[0], -jnp.inf)
        column_C = id_C - self.first_id
        z_C = jnp.take_along_axis(z_CV, column_C[:, None], axis=1, mode="clip")[:, 0]
        if self.spec.vocab_size is not None:
            z_C = jnp.where(id_C < self.spec.vocab_size, z_C, _MASKED)
        return jnp.where((column_C >= 0) & (column_C < self.num_ids), z_C, -jnp.inf)

    def _stop_logits(self):
        """Logits of the stop ids that are one event, [C, S] of each model; None: there are none."""
        if len(self.spec.stop_ids) < 2 or len(self.logits) < 2:
            return None
        num_rows = self.logits[0].shape[0]

        def of(z_CV):
            columns = [self._at(z_CV, jnp.full(num_rows, i)) for i in self.spec.stop_ids]
            return jnp.stack(columns, axis=1)

        stops = [of(z_CV) for z_CV in self.logits]
        return lax.pmax(stops, self.over_vocab) if self.over_vocab else stops

    def _teacher_entropy(self, entropy_C):
        """Its own entropy, given that of the teacher whose mass on S is spread as the student's."""
        if self.stops is None:
            return entropy_C

        def plogp(z_CS, shift_C):
            logq_CS = (z_CS - (self.norms[1][0] - shift_C)[:, None]) - self.norms[1][1][:, None]
            return jnp.sum(jnp.exp(logq_CS) * logq_CS, axis=1)

        ours_C, theirs_C = (jax.nn.logsumexp(z_CS, axis=1) for z_CS in self.stops)
        spread_C = plogp(self.stops[0], theirs_C - ours_C)
        return entropy_C + spread_C - plogp(self.stops[1], 0.0)

    def _label_log_probs(self):
        """Log-probability of the label under each model at temperature 1, [C]; 0 without one."""
        if self.label_C is None:
            return [jnp.zeros_like(z_C) for z_C in self.labels]
        labels = lax.pmax(self.labels, self.over_vocab) if self.over_vocab else self.labels
        return [
            (z_C - top_C) - log_sum_C
            for z_C, (top_C, log_sum_C) in zip(labels, self.norms, strict=True)
        ]

    def _sums(self, terms):
        """Sum ``terms(start, size)``, a dict of [C, W], over the vocabulary of all shards."""
        shapes = jax.eval_shape(functools.partial(terms, 0, self.tile))
        zeros = {name: jnp.zeros(x.shape[0], x.dtype) for name, x in shapes.items()}

        def body(sums, start, size):
            new = terms(start, size)
            return {name: sums[name] + jnp.sum(x_CW, axis=1) for name, x_CW in new.items()}

        sums = self._sweep(body, zeros)
        return lax.psum(sums, self.over_vocab) if self.over_vocab else sums

    def _stats(self, moments):
        """The six measurements [C, 6], and sum_v of the slopes of :func:`_terms`, [C]."""
        spec = self.spec
        has_teacher = len(self.logits) == 2
        entropies_MC = moments.entropies_MC
        zero_C = jnp.zeros_like(entropies_MC[0])
        reverse_C = moments.reverse_kl_C if has_teacher else zero_C
        divergence_C = slope_C = reverse_C
        if has_teacher and not spec.is_default_divergence:

            def terms(start, size):
                hot = self._log_probs(start, size, is_hot=True)
                return dict(zip(("divergence", "slope"), _terms(hot[0], hot[1], spec), strict=True))

            sums = self._sums(terms)
            divergence_C, slope_C = sums["divergence"], sums["slope"]
        logp_C, *teacher = self._label_log_probs()
        teacher_entropy_C = self._teacher_entropy(entropies_MC[1]) if has_teacher else zero_C
        stats = (divergence_C, reverse_C, entropies_MC[0], teacher_entropy_C)
        return jnp.stack((*stats, logp_C, *(teacher or [zero_C])), axis=-1), slope_C

    def gradient(self, weight_C, hs_CD=None, dws_VD=None):
        """Weighted gradient to the student's logits [C, V], and ``dws_VD`` with its share added.

        d/dz of sum_v f_v(p_v) through the softmax is s - p sum(s) with s = p f'(p). Without hidden
        states and ``dws_VD`` the head's gradient is not formed.
        """
        spec = self.spec

        def body(carry, start, size):
            dz_CV, dws_VD = carry  # from this tile on, dz_CV still holds the student's logits
            logits = (dz_CV, *self.logits[1:])
            dz_CW = jnp.zeros((), jnp.float32)
            if len(logits) == 2:
                hot = self._log_probs(start, size, is_hot=True, logits=logits)
                slope_CW = _terms(hot[0], hot[1], spec)[1]
                dz_CW = slope_CW - jnp.exp(hot[0]) * self.slope_C[:, None]
                dz_CW *= (1 - spec.ce) / spec.temperature
            if spec.ce > 0:
                logp_CW = self._log_probs(start, size, is_hot=False, logits=logits)[0]
                assert self.label_C is not None  # weighted_kl asks for them
                is_label_CW = self._ids(start, size)[None, :] == self.label_C[:, None]
                dz_CW += spec.ce * (jnp.exp(logp_CW) - is_label_CW)
            dz_CW = dz_CW * weight_C[:, None]
            dz_CV = lax.dynamic_update_slice_in_dim(dz_CV, dz_CW, start, axis=1)
            if hs_CD is None:
                return dz_CV, dws_VD
            new_WD = lax.dot_general(
                dz_CW.astype(hs_CD.dtype),
                hs_CD,
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            old_WD = lax.dynamic_slice_in_dim(dws_VD, start, size, axis=0)
            return dz_CV, lax.dynamic_update_slice_in_dim(dws_VD, old_WD + new_WD, start, axis=0)

        return self._sweep(body, (self.logits[0], dws_VD))


def _terms(logp_CV, logq_CV, spec: KLSpec):
    """Terms t_v with D = sum_v t_v, and p_v dt_v/dp_v up to a multiple of p_v (it cancels)."""
    p_CV = jnp.exp(logp_CV)
    if spec.direction == "reverse":
        slope_CV = p_CV * (logp_CV - logq_CV)
        return slope_CV, slope_CV
    q_CV = jnp.exp(logq_CV)
    if spec.direction == "forward":
        return q_CV * (logq_CV - logp_CV), -q_CV
    if spec.direction == "jsd":
        b = spec.beta
        logm_CV = jnp.logaddexp(logp_CV + jnp.log(b), logq_CV + jnp.log1p(-b))
        slope_CV = b * p_CV * (logp_CV - logm_CV)
        return slope_CV + (1 - b) * q_CV * (logq_CV - logm_CV), slope_CV
    a = spec.skew
    if spec.direction == "skew_reverse":
        logm_CV = jnp.logaddexp(logp_CV + jnp.log(a), logq_CV + jnp.log1p(-a))
        terms_CV = p_CV * (logp_CV - logm_CV)
        return terms_CV, terms_CV - a * p_CV * jnp.exp(logp_CV - logm_CV)
    logm_CV = jnp.logaddexp(logq_CV + jnp.log(a), logp_CV + jnp.log1p(-a))
    terms_CV = q_CV * (logq_CV - logm_CV)
    return terms_CV, -(1 - a) * q_CV * jnp.exp(logp_CV - logm_CV)
