"""Per-token divergences from hidden states: chunked, vocabulary-sharded, gradient in one pass.

No [R, V] array is ever whole. Rows to be measured are gathered first and a loop of
``ceil(kept / chunk)`` trips projects one chunk at a time onto both heads; rows with weight 0 that
nobody measures cost nothing. The trip count may be dynamic because the loop is never
differentiated: the pass that computes the divergence (:mod:`opd_jax.divergence`) also accumulates
the gradients, so a training step does 4 head-sized matmuls, and not the 6 of recomputation.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from opd_jax import agreement, mesh, rounds
from opd_jax.divergence import KLSpec, VocabSweep, project
from opd_jax.pytrees import TokenKL

_BOTH = ("hs", "ws")  # what a loss may have gradients to
# One [C, V] f32 buffer of a chunk stays below this where 256 rows do; see auto_chunk.
_CHUNK_BYTES, _CHUNK_BYTES_ON_ACCELERATORS = 64 * 2**20, 320 * 2**20


def token_kl(
    hs_BTD: Float[Array, "B T D"],
    ws_VD: Float[Array, "V D"],
    ht_BTE: Float[Array, "B T E"],
    wt_VE: Float[Array, "V E"],
    *,
    spec: KLSpec,
    mask_BT: Bool[Array, "B T"] | None = None,
    labels_BT: Int[Array, "B T"] | None = None,
) -> TokenKL:
    """Measure every position (or those of ``mask_BT``; the others read 0) without gradients.

    Log-probabilities are those of ``labels_BT``, the predicted ids; without it they read 0.

    Sharding: hidden states ``P((data, fsdp), None, None)``, heads ``P(model, None)``, result
    ``P((data, fsdp), None)``.
    """
    if mask_BT is None:
        mask_BT = mesh.constrain(jnp.ones(hs_BTD.shape[:2], bool), mesh.BATCH, None)
    weight_BT = mask_BT.astype(jnp.float32)
    spec = dataclasses.replace(spec, ce=0.0)
    _check(hs_BTD, ws_VD, ht_BTE, wt_VE, spec)
    return _run(spec, (), hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, mask_BT, labels_BT)[1]


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

    With ``spec.ce`` = c it is :math:`\sum_{bt} w_{bt} ((1-c) D_{bt} - c \log p(y_{bt}))`, y being
    the labels; the ``TokenKL`` keeps D and the log-probability apart.

    Positions with weight 0 are not projected unless ``measure_BT`` asks for their value; what was
    not projected reads 0 in the returned ``TokenKL``, which carries no gradient.

    Args:
      hs_BTD, ws_VD: student hidden states (after the final norm) and head.
      ht_BTE, wt_VE: the teacher's; None where ``spec.ce`` is 1.
      weight_BT: f32, a constant of the gradient.
      spec: the divergence.
      measure_BT: positions to measure at weight 0 as well.
      labels_BT: the predicted ids, needed where ``spec.ce`` > 0; without it the log-probabilities
        of the ``TokenKL`` read 0.

    Raises:
      ValueError: shapes that do not belong together, or an input that ``spec`` needs is missing.

    The gradient of a head that is not differentiated is not formed, at a quarter of the work.

    Sharding: as in :func:`token_kl`; the gradient of the head is reduced once, after the loop.
    """
    _check(hs_BTD, ws_VD, ht_BTE, wt_VE, spec)
    if spec.ce > 0 and labels_BT is None:
        raise ValueError(f"kl.ce is {spec.ce} and labels_BT is None: pass the predicted ids")
    keep_BT = weight_BT != 0
    if measure_BT is not None:
        keep_BT = keep_BT | measure_BT
    return _weighted(spec, hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT)


def head_sums(ws_VD: Float[Array, "V D"]) -> Float[Array, "S V D"]:
    """Zeros for :func:`accumulated_kl` to add a head's gradient to, f32, one part per batch shard.

    **Sharding**: ``P((data, fsdp), model, None)``; on a device as large as its part of the head.
    """
    shape = (mesh.size(mesh.BATCH), *ws_VD.shape)
    return jnp.zeros(shape, jnp.float32, out_sharding=mesh.out(mesh.BATCH, "model", None))


def accumulated_kl(
    hs_BTD: Float[Array, "B T D"],
    ws_VD: Float[Array, "V D"],
    ht_BTE: Float[Array, "B T E"] | None,
    wt_VE: Float[Array, "V E"] | None,
    weight_BT: Float[Array, "B T"],
    sums_SVD: Float[Array, "S V D"] | None,
    *,
    spec: KLSpec,
    measure_BT: Bool[Array, "B T"],
    labels_BT: Int[Array, "B T"],
) -> tuple[Float[Array, ""], TokenKL, Float[Array, "B T D"], Float[Array, "S V D"] | None]:
    """:func:`weighted_kl` with its gradients: that to ``hs_BTD``, and that to the head added up.

    No shard waits for another: a step of several micro-batches passes the sums on from one to the
    next and adds up the shards' once, with :func:`head_gradient`.

    Args:
      hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, spec, measure_BT, labels_BT: as there.
      sums_SVD: from :func:`head_sums`, or of the micro-batches before; None where the head is not
        trained: then its gradient is not formed.

    Sharding: as in :func:`token_kl`.
    """
    _check(hs_BTD, ws_VD, ht_BTE, wt_VE, spec)
    keep_BT = (weight_BT != 0) | measure_BT
    inputs = (hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT, sums_SVD)
    wanted = _BOTH[:1] if sums_SVD is None else _BOTH
    found: Any = _run(spec, wanted, *inputs)
    return found if sums_SVD is not None else (*found, None)


def head_gradient(sums_SVD: Float[Array, "S V D"]) -> Float[Array, "V D"]:
    """The sum of all batch shards, f32.

    **Sharding**: ``P(model, fsdp)``, as the parameters: scattered over ``fsdp`` as it is summed.
    """
    if not mesh.is_active():
        return sums_SVD[0]

    def local(sums_1VD):
        part_VD = lax.psum_scatter(sums_1VD[0], "fsdp", scatter_dimension=1, tiled=True)
        return lax.psum(part_VD, "data")

    shards = P(mesh.BATCH, "model", None)
    return jax.shard_map(local, in_specs=shards, out_specs=P("model", "fsdp"), check_vma=False)(
        sums_SVD
    )


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
    return _run(spec, (), hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT)[:2]


def _weighted_fwd(spec, hs_BTD, ws_VD, *constants):
    # A head that nothing is asked of, such as a frozen one, has no gradient of its size.
    wanted = _BOTH if ws_VD.perturbed else _BOTH[:1]
    values = jax.tree.map(lambda x: x.value, (hs_BTD, ws_VD, *constants), is_leaf=_is_primal)
    result = _run(spec, wanted, *values)
    return result[:2], result[2:]


def _is_primal(x) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _weighted_bwd(spec, residuals, cotangents):
    scale = cotangents[0]  # those of the TokenKL are dropped: it is a measurement
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        scale = jnp.zeros(())
    found = [x * scale.astype(x.dtype) for x in residuals]
    return (*found, *[None] * (7 - len(found)))


_weighted.defvjp(_weighted_fwd, _weighted_bwd, symbolic_zeros=True)


def _run(spec, wanted, hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT, sums_SVD=None):
    """Dispatch to the local loop, once per shard where there is a mesh.

    ``wanted`` are the gradients that follow loss and measurements, of ``_BOTH`` all or the first.
    With ``sums_SVD`` that of the head is added to them, and is not summed over shards.
    """
    local = functools.partial(_local, spec, wanted, mesh.is_active())
    inputs = (hs_BTD, ws_VD, ht_BTE, wt_VE, weight_BT, keep_BT, labels_BT, sums_SVD)
    if not mesh.is_active():
        return local(*inputs)
    rows, tokens, heads = P(mesh.BATCH, None, None), P(mesh.BATCH, None), P("model", None)
    sums = P(mesh.BATCH, "model", None)
    # One spec stands for every leaf of the TokenKL.
    outs: tuple = (P(), tokens, rows, heads if sums_SVD is None else sums)
    return jax.shard_map(
        local,
        in_specs=(rows, heads, rows, heads, tokens, tokens, tokens, sums),
        out_specs=outs[: 2 + len(wanted)],
        check_vma=False,
    )(*inputs)


def _local(
    spec,
    wanted,
    is_sharded,
    hs_BTD,
    ws_VD,
    ht_BTE,
    wt_VE,
    weight_BT,
    keep_BT,
    labels_BT,
    sums_1VD,
):
    """Loop over the kept rows of one shard."""
    shape = weight_BT.shape
    num_rows, num_ids = weight_BT.size, ws_VD.shape[0]
    hs_RD = hs_BTD.reshape(num_rows, -1)
    ht_RE = None if ht_BTE is None else ht_BTE.reshape(num_rows, -1)
    weight_R, keep_R = weight_BT.ravel(), keep_BT.ravel()
    labels_R = None if labels_BT is None else labels_BT.ravel()
    chunk = min(spec.chunk or auto_chunk(num_ids), num_rows)
    first_id = lax.axis_index("model") * num_ids if is_sharded else 0
    over_vocab = ("model",) if is_sharded else ()
    beside = spec.beside if ht_RE is not None else ()
    order_R, num_kept = kept_first(keep_R, chunk)

    def body(i, carry):
        stats_RN, dhs_RD, dws_VD = carry
        index_C = lax.dynamic_slice(order_R, (i * chunk,), (chunk,))
        pick = functools.partial(jnp.take, indices=index_C, axis=0, mode="fill", fill_value=0)
        hs_CD = pick(hs_RD)
        zs_CV = project(hs_CD, ws_VD)
        zt_CV = None if ht_RE is None else project(pick(ht_RE), wt_VE)
        label_C = None if labels_R is None else pick(labels_R)
        rows = VocabSweep(spec, zs_CV, zt_CV, label_C, first_id, over_vocab)
        stats_CN = rows.stats_C6
        if beside:
            top_C, log_sum_C = rows.norms[-1]
            more_CN = agreement.measured(
                beside,
                zs_CV,
                rows.logits[-1],
                top_C + log_sum_C,
                first_id=first_id,
                vocab_size=spec.vocab_size,
                over_vocab=over_vocab,
            )
            stats_CN = jnp.concatenate([stats_CN, more_CN], axis=1)
        stats_RN = stats_RN.at[index_C].set(stats_CN, mode="drop")
        if wanted:
            both = () if dws_VD is None else (hs_CD, dws_VD)
            dz_CV, dws_VD = rows.gradient(pick(weight_R), *both)
            dh_CD = jnp.matmul(dz_CV.astype(hs_CD.dtype), ws_VD, preferred_element_type=jnp.float32)
            dh_CD = lax.psum(dh_CD, over_vocab) if over_vocab else dh_CD
            dhs_RD = dhs_RD.at[index_C].set(dh_CD.astype(dhs_RD.dtype), mode="drop")
        return stats_RN, dhs_RD, dws_VD

    sums_VD = None if sums_1VD is None else sums_1VD[0]
    if sums_VD is None and wanted == _BOTH:
        sums_VD = jnp.zeros(ws_VD.shape, jnp.float32)
    carry = (
        jnp.zeros((num_rows, 6 + len(beside)), jnp.float32),
        jnp.zeros_like(hs_RD) if wanted else None,
        sums_VD,
    )
    with rounds.expected(-(-num_rows // chunk), scored=True):
        stats_RN, dhs_RD, dws_VD = lax.fori_loop(0, -(-num_kept // chunk), body, carry)

    loss_R = stats_RN[:, 0]
    if spec.ce > 0:
        loss_R = (1 - spec.ce) * loss_R - spec.ce * stats_RN[:, 4]
    loss = jnp.sum(weight_R * loss_R)
    if is_sharded:
        loss = lax.psum(loss, mesh.BATCH)
    own, more = stats_RN[:, :6].T, stats_RN[:, 6:].T
    further = {f"{name}_BT": x_R.reshape(shape) for name, x_R in zip(beside, more, strict=True)}
    tokens = TokenKL(*(x_R.reshape(shape) for x_R in own), **further)
    if not wanted:
        return loss, tokens
    found = (loss, tokens, dhs_RD.reshape(hs_BTD.shape))
    if sums_1VD is not None:
        return *found, dws_VD[None]
    if dws_VD is not None and is_sharded:
        dws_VD = lax.psum(dws_VD, mesh.BATCH)
    return found if dws_VD is None else (*found, dws_VD.astype(ws_VD.dtype))


def kept_first(keep_R, chunk: int):
    """Indices [R + chunk] of the kept rows, in their own order, and their number.

    The rest points past the end, where gathers fill with 0 and scatters drop, so that the last
    chunk may be cut whole.
    """
    num_rows = keep_R.size
    order_R = jnp.argsort(~keep_R, stable=True)
    num_kept = jnp.sum(keep_R, dtype=jnp.int32)
    order_R = jnp.where(jnp.arange(num_rows) < num_kept, order_R, num_rows)
    return jnp.pad(order_R, (0, chunk), constant_values=num_rows), num_kept


def auto_chunk(num_ids: int) -> int:
    """Largest power of two of rows whose [C, V] f32 buffer fits the budget, within 256 to 1024.

    Each trip reads both heads and reads and writes the head's gradient. A CPU multiplies by them
    for longer than that from 256 rows on, an accelerator from about 1024 (LOG.md).
    """
    budget = _CHUNK_BYTES if mesh.platform() == "cpu" else _CHUNK_BYTES_ON_ACCELERATORS
    rows = max(budget // (4 * num_ids), 1)
    return min(max(1 << (rows.bit_length() - 1), 256), 1024)
