r"""Per-token divergences from hidden states: chunked, vocabulary-sharded, gradient in one pass.

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

No [R, V] array is ever whole. Rows to be measured are gathered first and a loop of
``ceil(kept / chunk)`` trips projects one chunk at a time onto both heads; rows with weight 0 that
nobody measures cost nothing. The trip count may be dynamic because the loop is never
differentiated: the pass that computes the divergence also accumulates the gradients (closed form,
arXiv 2605.09253, section 2), so a training step does 4 head-sized matmuls, and not the 6 of
recomputation.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from opd_jax import mesh
from opd_jax.pytrees import TokenKL

DIRECTIONS = ("reverse", "forward", "jsd", "skew_reverse", "skew_forward")

# Finite, so that padded columns have probability 0 and their log-probabilities can be subtracted.
_MASKED = -1e30
# One [C, V] f32 buffer of a chunk stays below this unless the spec names the chunk.
_CHUNK_BYTES = 128 * 2**20
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


def token_kl(
    hs_BTD: Float[Array, "B T D"],
    ws_VD: Float[Array, "V D"],
    ht_BTE: Float[Array, "B T E"],
    wt_VE: Float[Array, "V E"],
    *,
    spec: KLSpec,
    mask_BT: Bool[Array, "B T"] | None = None,
) -> TokenKL:
    """Measure every position (or those of ``mask_BT``; the others read 0) without gradients.

    Sharding: hidden states ``P((data, fsdp), None, None)``, heads ``P(model, None)``, result
    ``P((data, fsdp), None)``.
    """
    if mask_BT is None:
        mask_BT = mesh.constrain(jnp.ones(hs_BTD.shape[:2], bool), mesh.BATCH, None)
    weight_BT = mask_BT.astype(jnp.float32)
    labels_BT = jnp.zeros_like(mask_BT, dtype=jnp.int32)
    spec = dataclasses.replace(spec, ce=0.0)
    _check(hs_BTD, ws_VD, ht_BTE, wt_VE, spec)
    return _run(spec, False, hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, mask_BT, labels_BT)[1]


def weighted_kl(
    hs_BTD: Float[Array, "B T D"],
    ws_VD: Float[Array, "V D"],
    ht_BTE: Float[Array, "B T E"] | None,
    wt_VE: Float[Array, "V E"] | None,
    weight_BT: Float[Array, "B T"],
    *,
    spec: KLSpec,
    measure_BT: Bool[Array, "B T"] | None = None,
    labels_BT: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], TokenKL]:
    r"""Compute :math:`\sum_{bt} w_{bt} D_{bt}` with gradients to ``hs_BTD`` and ``ws_VD`` only.

    Positions with weight 0 are not projected unless ``measure_BT`` asks for their value; what was
    not projected reads 0 in the returned ``TokenKL``, which carries no gradient.

    Args:
      hs_BTD, ws_VD: student hidden states (after the final norm) and head.
      ht_BTE, wt_VE: the teacher's; None where ``spec.ce`` is 1.
      weight_BT: f32, a constant of the gradient.
      spec: the divergence.
      measure_BT: positions to measure at weight 0 as well.
      labels_BT: the predicted ids, needed where ``spec.ce`` > 0.

    Raises:
      ValueError: shapes that do not belong together, or an input that ``spec`` needs is missing.

    Sharding: as in :func:`token_kl`; the gradient of the head is reduced once, after the loop.
    """
    _check(hs_BTD, ws_VD, ht_BTE, wt_VE, spec)
    if spec.ce > 0 and labels_BT is None:
        raise ValueError(f"kl.ce is {spec.ce} and labels_BT is None: pass the predicted ids")
    keep_BT = weight_BT != 0
    if measure_BT is not None:
        keep_BT = keep_BT | measure_BT
    if labels_BT is None:
        labels_BT = jnp.zeros_like(keep_BT, dtype=jnp.int32)
    return _weighted(spec, hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT)


def _check(hs_BTD, ws_VD, ht_BTE, wt_VE, spec: KLSpec) -> None:
    if ws_VD.shape[1] != hs_BTD.shape[2]:
        raise ValueError(f"student head {ws_VD.shape} does not fit hidden states {hs_BTD.shape}")
    if spec.vocab_size is not None and not 0 < spec.vocab_size <= ws_VD.shape[0]:
        raise ValueError(
            f"kl.vocab_size {spec.vocab_size}: expected 1 to {ws_VD.shape[0]}, the rows of the head"
        )
    if ht_BTE is None or wt_VE is None:
        if spec.ce < 1:
            raise ValueError(
                f"no teacher given and kl.ce is {spec.ce}: expected a teacher, or ce=1"
            )
        return
    if wt_VE.shape[1] != ht_BTE.shape[2]:
        raise ValueError(f"teacher head {wt_VE.shape} does not fit hidden states {ht_BTE.shape}")
    if hs_BTD.shape[:2] != ht_BTE.shape[:2]:
        raise ValueError(
            f"hidden states of student {hs_BTD.shape} and teacher {ht_BTE.shape} differ in [B, T]"
        )
    if ws_VD.shape[0] != wt_VE.shape[0]:
        raise ValueError(
            f"heads have {ws_VD.shape[0]} (student) and {wt_VE.shape[0]} (teacher) rows: expected "
            "equal; pad or crop the teacher's with model.with_vocab_rows"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(spec, hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT):
    return _run(spec, False, hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT)[:2]


def _weighted_fwd(spec, hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT):
    result = _run(spec, True, hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT)
    return result[:2], result[2:]


def _weighted_bwd(spec, residuals, cotangents):
    dhs_BTD, dws_VD = residuals
    scale = cotangents[0]  # those of the TokenKL are dropped: it is a measurement
    return (
        (dhs_BTD * scale.astype(dhs_BTD.dtype)),
        (dws_VD * scale.astype(dws_VD.dtype)),
        None,
        None,
        None,
        None,
        None,
    )


_weighted.defvjp(_weighted_fwd, _weighted_bwd)


def _run(spec, has_grad, hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT):
    """Dispatch to the local loop, once per shard where there is a mesh."""
    local = functools.partial(_local, spec, has_grad, mesh.is_active())
    if not mesh.is_active():
        return local(hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT)
    rows, tokens, heads = P(mesh.BATCH, None, None), P(mesh.BATCH, None), P("model", None)
    outs: tuple = (P(), tokens, rows, heads)  # one spec stands for every leaf of the TokenKL
    return jax.shard_map(
        local,
        in_specs=(rows, heads, rows, heads, tokens, tokens, tokens),
        out_specs=outs if has_grad else outs[:2],
        check_vma=False,
    )(hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT)


def _local(spec, has_grad, is_sharded, hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT):
    """Loop over the kept rows of one shard."""
    shape = weight_BT.shape
    num_rows, num_ids = weight_BT.size, ws_VD.shape[0]
    hs_RD = hs_BTD.reshape(num_rows, -1)
    ht_RE = None if ht_BTE is None else ht_BTE.reshape(num_rows, -1)
    weight_R, keep_R, labels_R = weight_BT.ravel(), keep_BT.ravel(), labels_BT.ravel()
    chunk = min(spec.chunk or _auto_chunk(num_ids), num_rows)
    first_id = lax.axis_index("model") * num_ids if is_sharded else 0
    over_vocab = ("model",) if is_sharded else ()

    # Kept rows first, in their own order; the tail of the last chunk points past the end, where
    # gathers clip and scatters drop.
    order_R = jnp.argsort(~keep_R, stable=True)
    num_kept = jnp.sum(keep_R, dtype=jnp.int32)
    order_R = jnp.where(jnp.arange(num_rows) < num_kept, order_R, num_rows)
    order_R = jnp.pad(order_R, (0, chunk), constant_values=num_rows)

    def body(i, carry):
        stats_R4, dhs_RD, dws_VD = carry
        index_C = lax.dynamic_slice(order_R, (i * chunk,), (chunk,))
        pick = functools.partial(jnp.take, indices=index_C, axis=0, mode="clip")
        hs_CD = pick(hs_RD)
        zs_CV = _project(hs_CD, ws_VD)
        zt_CV = None if ht_RE is None else _project(pick(ht_RE), wt_VE)
        rows = _Rows(spec, zs_CV, zt_CV, pick(labels_R), first_id, over_vocab)
        stats_R4 = stats_R4.at[index_C].set(rows.stats_C4, mode="drop")
        if has_grad:
            weight_C = jnp.where(index_C < num_rows, pick(weight_R), 0.0)
            dz_CV, dws_VD = rows.gradient(weight_C, hs_CD, dws_VD)
            dh_CD = jnp.matmul(dz_CV.astype(hs_CD.dtype), ws_VD, preferred_element_type=jnp.float32)
            dh_CD = lax.psum(dh_CD, over_vocab) if over_vocab else dh_CD
            dhs_RD = dhs_RD.at[index_C].set(dh_CD.astype(dhs_RD.dtype), mode="drop")
        return stats_R4, dhs_RD, dws_VD

    carry = (
        jnp.zeros((num_rows, 4), jnp.float32),
        jnp.zeros_like(hs_RD) if has_grad else None,
        jnp.zeros(ws_VD.shape, jnp.float32) if has_grad else None,
    )
    stats_R4, dhs_RD, dws_VD = lax.fori_loop(0, -(-num_kept // chunk), body, carry)

    loss = jnp.sum(weight_R * stats_R4[:, 0])
    if is_sharded:
        loss = lax.psum(loss, mesh.BATCH)
    tokens = TokenKL(*(stats_R4[:, i].reshape(shape) for i in range(4)))
    if not has_grad:
        return loss, tokens
    if is_sharded:
        dws_VD = lax.psum(dws_VD, mesh.BATCH)
    return loss, tokens, dhs_RD.reshape(hs_BTD.shape), dws_VD.astype(ws_VD.dtype)


def _auto_chunk(num_ids: int) -> int:
    """Largest power of two of rows, 64 to 1024, whose [C, V] f32 buffer fits the budget."""
    rows = max(_CHUNK_BYTES // (4 * num_ids), 1)
    return min(max(1 << (rows.bit_length() - 1), 64), 1024)


def _project(h_CD, w_VD):
    """Logits [C, V], summed in f32 whatever the dtype of the inputs."""
    return lax.dot_general(h_CD, w_VD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


class _Rows:
    """Logits of C rows and what follows from them, swept over tiles of W vocabulary columns.

    Three sweeps: normalisers, measurements, gradient. Nothing but the logits is ever [C, V]; the
    gradient takes the place of the student's logits.
    """

    def __init__(self, spec: KLSpec, zs_CV, zt_CV, label_C, first_id, over_vocab):
        self.spec, self.label_C, self.first_id = spec, label_C, first_id
        self.over_vocab = over_vocab
        self.logits = (zs_CV,) if zt_CV is None else (zs_CV, zt_CV)
        self.num_ids = zs_CV.shape[1]
        self.tile = min(_TILE, self.num_ids)
        self.norms = self._normalisers(1.0)
        self.hot_norms = self.norms
        if spec.temperature != 1.0:
            self.hot_norms = self._normalisers(spec.temperature)
        self.stats_C4, self.slope_C = self._stats()

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

        rows = self.logits[0].shape[0]
        empty = (jnp.full(rows, -jnp.inf), jnp.zeros(rows, jnp.float32))
        norms = []
        for top_C, sum_C in self._sweep(body, (empty,) * len(self.logits)):
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

    def _stats(self):
        """The four measurements [C, 4], and sum_v of the slopes of :func:`_terms`, [C]."""
        spec = self.spec
        has_teacher = len(self.logits) == 2
        has_terms = has_teacher and not spec.is_default_divergence

        def body(sums, start, size):
            logp_CW, *teacher = self._log_probs(start, size, is_hot=False)
            p_CW = jnp.exp(logp_CW)
            new = {"neg_entropy": p_CW * logp_CW}
            if has_teacher:
                logq_CW = teacher[0]
                new["reverse"] = p_CW * (logp_CW - logq_CW)
                new["neg_teacher_entropy"] = jnp.exp(logq_CW) * logq_CW
            if has_terms:
                hot = self._log_probs(start, size, is_hot=True)
                new["divergence"], new["slope"] = _terms(hot[0], hot[1], spec)
            if spec.ce > 0:
                is_label_CW = self._ids(start, size)[None, :] == self.label_C[:, None]
                new["log_likelihood"] = jnp.where(is_label_CW, logp_CW, 0.0)
            return {name: sums[name] + jnp.sum(x_CW, axis=1) for name, x_CW in new.items()}

        names = ["neg_entropy"]
        names += ["reverse", "neg_teacher_entropy"] if has_teacher else []
        names += ["divergence", "slope"] if has_terms else []
        names += ["log_likelihood"] if spec.ce > 0 else []
        zero_C = jnp.zeros(self.logits[0].shape[0], jnp.float32)
        sums = self._sweep(body, dict.fromkeys(names, zero_C))
        if self.over_vocab:
            sums = lax.psum(sums, self.over_vocab)
        reverse_C = sums.get("reverse", zero_C)
        divergence_C = sums.get("divergence", reverse_C)
        slope_C = sums.get("slope", reverse_C)
        if spec.ce > 0:
            divergence_C = (1 - spec.ce) * divergence_C - spec.ce * sums["log_likelihood"]
        teacher_entropy_C = -sums.get("neg_teacher_entropy", zero_C)
        stats = (divergence_C, reverse_C, -sums["neg_entropy"], teacher_entropy_C)
        return jnp.stack(stats, axis=-1), slope_C

    def gradient(self, weight_C, hs_CD, dws_VD):
        """Weighted gradient to the student's logits [C, V], and ``dws_VD`` with its share added.

        d/dz of sum_v f_v(p_v) through the softmax is s - p sum(s) with s = p f'(p).
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
                is_label_CW = self._ids(start, size)[None, :] == self.label_C[:, None]
                dz_CW += spec.ce * (jnp.exp(logp_CW) - is_label_CW)
            dz_CW = dz_CW * weight_C[:, None]
            new_WD = lax.dot_general(
                dz_CW.astype(hs_CD.dtype),
                hs_CD,
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            old_WD = lax.dynamic_slice_in_dim(dws_VD, start, size, axis=0)
            return (
                lax.dynamic_update_slice_in_dim(dz_CV, dz_CW, start, axis=1),
                lax.dynamic_update_slice_in_dim(dws_VD, old_WD + new_WD, start, axis=0),
            )

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
