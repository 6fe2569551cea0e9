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
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

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
      ce: share of label cross-entropy mixed in, for off-policy data; 1 needs no teacher.
    """

    direction: str = "reverse"
    temperature: float = 1.0
    chunk: int = 0
    vocab_size: int | None = None
    beta: float = 0.5
    skew: float = 0.1
    ce: float = 0.0

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"kl.direction {self.direction!r}: expected one of {DIRECTIONS}; "
                "set --config.kl.direction"
            )
        for name, low, high, open_ends in (
            ("temperature", 0.0, float("inf"), True),
            ("beta", 0.0, 1.0, True),
            ("skew", 0.0, 1.0, True),
            ("ce", 0.0, 1.0, False),
        ):
            value = getattr(self, name)
            inside = low < value < high if open_ends else low <= value <= high
            if not inside:
                raise ValueError(
                    f"kl.{name} {value}: expected a number between {low} and {high}"
                    f"{' (ends excluded)' if open_ends else ''}; set --config.kl.{name}"
                )
        if self.chunk < 0:
            raise ValueError(
                f"kl.chunk {self.chunk}: expected rows per chunk, or 0; set --config.kl.chunk"
            )

    @property
    def is_default_divergence(self) -> bool:
        """Whether the trained divergence is already the reverse KL at temperature 1."""
        return self.direction == "reverse" and self.temperature == 1.0 and self.ce == 0.0


def project(h_CD, w_VD):
    """Logits [C, V], summed in f32 whatever the dtype of the inputs."""
    return lax.dot_general(h_CD, w_VD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


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
        self.tile = min(_TILE, self.num_ids)
        self.labels = [self._at_label(z_CV) for z_CV in self.logits]
        self.norms = self._normalisers(1.0)
        self.hot_norms = self.norms
        if spec.temperature != 1.0:
            self.hot_norms = self._normalisers(spec.temperature)
        self.stats_C6, self.slope_C = self._stats()

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
        return tiles if temperature == 1.0 else [z_CW / temperature for z_CW in tiles]

    def _normalisers(self, temperature):
        """Per model the largest logit and log sum exp(z - largest), [C] each, over all shards.

        Kept apart: their sum would round away what small differences of large logits need.
        """

        def body(carry, start, size):
            new = []
            for (top_C, sum_C), z_CW in zip(
                carry, self._tile(start, size, temperature), strict=True
            ):
                up_C = jnp.maximum(top_C, jnp.max(z_CW, axis=1))
                tile_C = jnp.sum(jnp.exp(z_CW - up_C[:, None]), axis=1)
                new.append((up_C, sum_C * jnp.exp(top_C - up_C) + tile_C))
            return tuple(new)

        # The largest so far starts at the label, so that its logit is read before all sweeps: read
        # after the last, XLA would copy the logits, which the gradient overwrites.
        start = tuple((z_C / temperature, jnp.zeros_like(z_C)) for z_C in self.labels)
        norms = []
        for top_C, sum_C in self._sweep(body, start):
            if self.over_vocab:
                local_C, top_C = top_C, lax.pmax(top_C, self.over_vocab)
                sum_C = lax.psum(sum_C * jnp.exp(local_C - top_C), self.over_vocab)
            norms.append((top_C, jnp.log(sum_C)))
        return tuple(norms)

    def _log_probs(self, start, size, *, is_hot: bool, logits=None):
        """Log-probabilities of one tile, [C, W], of the student and, where given, the teacher."""
        tiles = self._tile(start, size, self.spec.temperature if is_hot else 1.0, logits)
        norms = self.hot_norms if is_hot else self.norms
        return [
            (z_CW - top_C[:, None]) - log_sum_C[:, None]
            for z_CW, (top_C, log_sum_C) in zip(tiles, norms, strict=True)
        ]

    def _at_label(self, z_CV):
        """Logit of the label, [C]; -inf where another shard has it or there is none."""
        if self.label_C is None:
            return jnp.full(z_CV.shape[0], -jnp.inf)
        column_C = self.label_C - self.first_id
        z_C = jnp.take_along_axis(z_CV, column_C[:, None], axis=1, mode="clip")[:, 0]
        if self.spec.vocab_size is not None:
            z_C = jnp.where(self.label_C < self.spec.vocab_size, z_C, _MASKED)
        return jnp.where((column_C >= 0) & (column_C < self.num_ids), z_C, -jnp.inf)

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

    def _stats(self):
        """The six measurements [C, 6], and sum_v of the slopes of :func:`_terms`, [C]."""
        spec = self.spec
        has_teacher = len(self.logits) == 2

        def terms(start, size):
            logp_CW, *teacher = self._log_probs(start, size, is_hot=False)
            p_CW = jnp.exp(logp_CW)
            new = {"neg_entropy": p_CW * logp_CW}
            if has_teacher:
                logq_CW = teacher[0]
                new["reverse"] = p_CW * (logp_CW - logq_CW)
                new["neg_teacher_entropy"] = jnp.exp(logq_CW) * logq_CW
            if has_teacher and not spec.is_default_divergence:
                hot = self._log_probs(start, size, is_hot=True)
                new["divergence"], new["slope"] = _terms(hot[0], hot[1], spec)
            return new

        sums = self._sums(terms)
        zero_C = jnp.zeros_like(sums["neg_entropy"])
        reverse_C = sums.get("reverse", zero_C)
        divergence_C = sums.get("divergence", reverse_C)
        slope_C = sums.get("slope", reverse_C)
        teacher_entropy_C = -sums.get("neg_teacher_entropy", zero_C)
        logp_C, *teacher = self._label_log_probs()
        if spec.ce > 0:
            divergence_C = (1 - spec.ce) * divergence_C - spec.ce * logp_C
        stats = (divergence_C, reverse_C, -sums["neg_entropy"], teacher_entropy_C)
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
