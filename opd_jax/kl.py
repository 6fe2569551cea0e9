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
    ids_V = first_id + jnp.arange(num_ids)
    real_V = None if spec.vocab_size is None else ids_V < spec.vocab_size
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
        label_CV = (pick(labels_R)[:, None] == ids_V[None, :]) if spec.ce > 0 else None
        real_CV = None if real_V is None else jnp.broadcast_to(real_V[None, :], zs_CV.shape)
        stats_C4, dz_CV = _divergence(zs_CV, zt_CV, real_CV, label_CV, spec, over_vocab)
        stats_R4 = stats_R4.at[index_C].set(stats_C4, mode="drop")
        if has_grad:
            dz_CV = dz_CV * jnp.where(index_C < num_rows, pick(weight_R), 0.0)[:, None]
            dz_CV = dz_CV.astype(hs_CD.dtype)
            dh_CD = jnp.matmul(dz_CV, ws_VD, preferred_element_type=jnp.float32)
            dh_CD = lax.psum(dh_CD, over_vocab) if over_vocab else dh_CD
            dhs_RD = dhs_RD.at[index_C].set(dh_CD.astype(dhs_RD.dtype), mode="drop")
            dws_VD = dws_VD + jnp.matmul(dz_CV.T, hs_CD, preferred_element_type=jnp.float32)
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


def _divergence(zs_CV, zt_CV, real_CV, label_CV, spec: KLSpec, over_vocab):
    """Return the four measurements [C, 4] and the gradient of the first to the student's logits."""

    def total(x_CV):
        x_C = jnp.sum(x_CV, axis=-1)
        return lax.psum(x_C, over_vocab) if over_vocab else x_C

    def log_softmax(z_CV):
        if real_CV is not None:
            z_CV = jnp.where(real_CV, z_CV, _MASKED)
        top_C = jnp.max(z_CV, axis=-1)
        top_C = lax.pmax(top_C, over_vocab) if over_vocab else top_C
        z_CV = z_CV - top_C[:, None]
        return z_CV - jnp.log(total(jnp.exp(z_CV)))[:, None]

    def entropy(logp_CV):
        return -total(jnp.exp(logp_CV) * logp_CV)

    logp_CV = log_softmax(zs_CV)
    entropy_C = entropy(logp_CV)
    if zt_CV is None:
        reverse_C = teacher_entropy_C = jnp.zeros_like(entropy_C)
        divergence_C, dz_CV = reverse_C, jnp.zeros_like(zs_CV)
    else:
        logq_CV = log_softmax(zt_CV)
        teacher_entropy_C = entropy(logq_CV)
        reverse_C = total(jnp.exp(logp_CV) * (logp_CV - logq_CV))
        tau = spec.temperature
        hot = (
            (logp_CV, logq_CV)
            if tau == 1.0
            else (log_softmax(zs_CV / tau), log_softmax(zt_CV / tau))
        )
        terms_CV, slope_CV = _terms(*hot, spec)
        divergence_C = reverse_C if spec.is_default_divergence else total(terms_CV)
        # d/dz of sum_v f_v(p_v) through the softmax is s - p sum(s) with s = p f'(p).
        dz_CV = (slope_CV - jnp.exp(hot[0]) * total(slope_CV)[:, None]) / tau
    if spec.ce > 0:
        ce_C = -total(jnp.where(label_CV, logp_CV, 0.0))
        divergence_C = (1 - spec.ce) * divergence_C + spec.ce * ce_C
        dz_CV = (1 - spec.ce) * dz_CV + spec.ce * (jnp.exp(logp_CV) - label_CV)
    stats_C4 = jnp.stack([divergence_C, reverse_C, entropy_C, teacher_entropy_C], axis=-1)
    return stats_C4, dz_CV


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
