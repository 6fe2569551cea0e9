"""Attention masks and the attention products, with a cache and without.

Queries stay grouped by the key/value head they read (``q_BTKGH``, G queries per head), so the head
axis that a mesh splits is never reshaped.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from opd_jax import rounds

# Large and negative, not -inf: a row with no visible key gets a uniform distribution, not NaN.
MASKED = -0.7 * float(np.finfo(np.float32).max)
_LARGEST_BLOCK = 512  # queries whose scores are held at a time
_WINDOW_START = 128  # the first key of a windowed block is a multiple of this: a whole TPU tile


@dataclasses.dataclass(frozen=True)
class Span:
    """How scores are made, beside queries and keys.

    Attributes:
      scale: they are multiplied by it.
      window: tokens that a query reads, its own included; None: all before it.
    """

    scale: float
    window: int | None = None


def causal_mask(
    valid_BS: Bool[Array, "B S"],
    first: jax.Array | int,
    num_queries: int,
    window: int | None = None,
):
    """Which slot each query may read, [B, T, S] bool: a valid one, not after the query's own slot.

    Args:
      valid_BS: slots that hold a real token.
      first: slot of the first query; of each row where it is [B].
      num_queries: T.
      window: the last slots up to the query's own that it reads; None: all.
    """
    slot_11S = jnp.arange(valid_BS.shape[1])[None, None]
    query_xT1 = jnp.atleast_1d(first)[:, None, None] + jnp.arange(num_queries)[None, :, None]
    seen_xTS = slot_11S <= query_xT1  # x: B, or 1
    if window is not None:
        seen_xTS &= slot_11S > query_xT1 - window
    return valid_BS[:, None, :] & seen_xTS


def attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float | None = None,
) -> Float[Array, "B T K G H"]:
    r"""Grouped-query attention over a cache, ``softmax(scale q k^T) v``, the softmax in f32.

    ``scale`` is ``1 / sqrt(H)`` where not given.

    A query that may read nothing gets the mean of all values: finite, and to be ignored.

    **Sharding**: rows and heads are independent, so nothing is communicated.
    """
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    scores_BKGTS = _product(q_BKGTH, k_BKHS, (4, 2))
    masked_BKGTS = _masked(scores_BKGTS, mask_BTS, scale or q_BKGTH.shape[-1] ** -0.5)
    probs_BKGTS = jax.nn.softmax(masked_BKGTS, axis=-1)
    out_BKGTH = _product(probs_BKGTS.astype(v_BKSH.dtype), v_BKSH, (4, 2))
    return out_BKGTH.astype(v_BKSH.dtype).transpose(0, 3, 1, 2, 4)


def attend_live(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BTS: Bool[Array, "B T S"],
    size: int,
    scale: float,
) -> Float[Array, "B T K G H"]:
    """:func:`attend` that reads only the blocks of a cache from the first to the last slot in use.

    A block adds to a running softmax (Milakov and Gimelshein 2018, "Online normalizer calculation
    for softmax"): one in which a row may read nothing changes nothing of that row.

    Args:
      size: slots of a block, of which the cache has a whole number.

    **Sharding**: of one device, whose rows decide which blocks are in use.
    """
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    num = mask_BTS.shape[-1] // size
    in_use_n = mask_BTS.reshape(*mask_BTS.shape[:2], num, size).any((0, 1, 3))
    begin, end = jnp.argmax(in_use_n), num - jnp.argmax(in_use_n[::-1])  # none in use: all

    def block(x: jax.Array, n: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, n * size, size, axis)

    def add(n: jax.Array, done):
        top_BKGT, total_BKGT, out_BKGTH = done
        scores_BKGTn = _product(q_BKGTH, block(k_BKHS, n, 3), (4, 2))
        scores_BKGTn = _masked(scores_BKGTn, block(mask_BTS, n, 2), scale)
        new_BKGT = jnp.maximum(top_BKGT, scores_BKGTn.max(-1))
        kept_BKGT = jnp.exp(top_BKGT - new_BKGT)
        exp_BKGTn = jnp.exp(scores_BKGTn - new_BKGT[..., None])
        mixed_BKGTH = _product(exp_BKGTn.astype(v_BKSH.dtype), block(v_BKSH, n, 2), (4, 2))
        return (
            new_BKGT,
            total_BKGT * kept_BKGT + exp_BKGTn.sum(-1),
            out_BKGTH * kept_BKGT[..., None] + mixed_BKGTH,
        )

    zero_BKGTH = jnp.zeros(q_BKGTH.shape, jnp.float32)
    nothing = (jnp.full(q_BKGTH.shape[:-1], MASKED), zero_BKGTH[..., 0], zero_BKGTH)
    with rounds.filled(num, mask_BTS.shape[-1]):
        _, total_BKGT, out_BKGTH = jax.lax.fori_loop(begin, end, add, nothing)
    out_BKGTH = out_BKGTH / total_BKGT[..., None]
    return out_BKGTH.astype(v_BKSH.dtype).transpose(0, 3, 1, 2, 4)


def causal(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    valid_BT: Bool[Array, "B T"],
    *,
    span: Span | None = None,
    is_sliding: Bool[Array, ""] | bool = True,
    first_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T K G H"]:
    r"""Grouped-query attention of T tokens over themselves, in blocks of queries.

    Each block reads the keys up to its own end only, from the start of its first query's window,
    which skips most of what is masked, and its scores are the largest array there is: [B, K, G,
    block, T], never [.., T, T]. The gradient computes them again from the log normaliser of each
    query (as FlashAttention does, arXiv 2205.14135), so nothing of that size is kept either.

    A query that may read nothing gets the mean of some values: finite, and to be ignored.

    Args:
      q_BTKGH, k_BTKH, v_BTKH, valid_BT: as the names say.
      span: static; None: all tokens, scaled by ``1 / sqrt(H)``.
      is_sliding: whether the window of ``span`` holds; traced where layers differ.
      first_BT: the first token that each may read; None: that of the row. Where several sequences
        lie in a row, each reads itself alone.

    **Sharding**: rows and heads are independent, so nothing is communicated.
    """
    span = Span(q_BTKGH.shape[-1] ** -0.5) if span is None else span
    span, varies = settled(span, is_sliding)
    return _causal(span, q_BTKGH, k_BTKH, v_BTKH, (valid_BT, first_BT), varies)


def settled(span: Span, is_sliding: Bool[Array, ""] | bool) -> tuple[Span, Bool[Array, ""] | None]:
    """The span of a layer, and what says whether its window holds; None where that is settled."""
    if isinstance(is_sliding, bool):
        return span if is_sliding else dataclasses.replace(span, window=None), None
    return span, None if span.window is None else is_sliding


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(span: Span, q_BTKGH, k_BTKH, v_BTKH, read, is_sliding):
    return _causal_forward(span, q_BTKGH, k_BTKH, v_BTKH, read, is_sliding)[0]


def either(function, span: Span, is_sliding: Bool[Array, ""] | None, *args):
    """``function(span, *args)``, or that without the window where a layer does not slide.

    ``span`` and ``is_sliding`` are :func:`settled`.
    """
    if is_sliding is None:
        return function(span, *args)
    whole = dataclasses.replace(span, window=None)
    return jax.lax.cond(
        is_sliding, functools.partial(function, span), functools.partial(function, whole), *args
    )


def _causal_forward(span: Span, q_BTKGH, k_BTKH, v_BTKH, read, is_sliding):
    q_BKGTH, k_BKTH, v_BKTH = _heads_first(q_BTKGH, k_BTKH, v_BTKH)
    out_BTKGH, norm_BKGT = either(_mixed, span, is_sliding, q_BKGTH, k_BKTH, v_BKTH, read)
    return out_BTKGH, (q_BTKGH, k_BTKH, v_BTKH, read, is_sliding, out_BTKGH, norm_BKGT)


def _mixed(span: Span, q_BKGTH, k_BKTH, v_BKTH, read):
    """The mixed values, and the log normaliser of each query."""
    outs, norms = [], []
    for begin, end in blocks(k_BKTH.shape[2]):
        first = _first_key(span, begin)
        scores_BKGQS = _block_scores(span, q_BKGTH, k_BKTH, read, begin, end)
        top_BKGQ = jnp.max(scores_BKGQS, axis=-1)
        exp_BKGQS = jnp.exp(scores_BKGQS - top_BKGQ[..., None])
        sum_BKGQ = jnp.sum(exp_BKGQS, axis=-1)
        probs_BKGQS = (exp_BKGQS / sum_BKGQ[..., None]).astype(v_BKTH.dtype)
        mixed_BKGQH = _product(probs_BKGQS, v_BKTH[:, :, first:end], (4, 2))
        outs.append(mixed_BKGQH.astype(v_BKTH.dtype))
        norms.append(top_BKGQ + jnp.log(sum_BKGQ))
        k_BKTH = _after(outs[-1], k_BKTH, end - begin)
    out_BTKGH = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return out_BTKGH, jnp.concatenate(norms, axis=3)


def _causal_backward(span: Span, residuals, dout_BTKGH):
    q_BTKGH, k_BTKH, v_BTKH, read, is_sliding, out_BTKGH, norm_BKGT = residuals
    dtype = q_BTKGH.dtype
    heads_first = _heads_first(q_BTKGH, k_BTKH, v_BTKH)
    dout_BKGTH = dout_BTKGH.transpose(0, 2, 3, 1, 4)
    # sum_s p_s dp_s, which the softmax takes off each dp, is also out . dout.
    dot_BTKG = jnp.sum(out_BTKGH.astype(jnp.float32) * dout_BTKGH.astype(jnp.float32), axis=-1)
    dot_BKGT = dot_BTKG.transpose(0, 2, 3, 1)
    dq_BKGTH, dk_BKTH, dv_BKTH = either(
        _mixed_backward, span, is_sliding, *heads_first, read, norm_BKGT, dout_BKGTH, dot_BKGT
    )
    dq_BTKGH = dq_BKGTH.astype(dtype).transpose(0, 3, 1, 2, 4)
    dk_BTKH, dv_BTKH = (x.astype(dtype).transpose(0, 2, 1, 3) for x in (dk_BKTH, dv_BKTH))
    return dq_BTKGH, dk_BTKH, dv_BTKH, None, None


def _mixed_backward(span: Span, q_BKGTH, k_BKTH, v_BKTH, read, norm_BKGT, dout_BKGTH, dot_BKGT):
    num_tokens, dtype = k_BKTH.shape[2], q_BKGTH.dtype
    dqs, dk_BKTH, dv_BKTH = [], *(jnp.zeros_like(x, jnp.float32) for x in (k_BKTH, v_BKTH))
    for begin, end in blocks(num_tokens):
        first = _first_key(span, begin)
        scores_BKGQS = _block_scores(span, q_BKGTH, k_BKTH, read, begin, end)
        probs_BKGQS = jnp.exp(scores_BKGQS - norm_BKGT[..., begin:end, None])
        dout_BKGQH = dout_BKGTH[..., begin:end, :]
        dprobs_BKGQS = _product(dout_BKGQH, v_BKTH[:, :, first:end], (4, 3))
        dscores_BKGQS = probs_BKGQS * (dprobs_BKGQS - dot_BKGT[..., begin:end, None]) * span.scale
        dscores_BKGQS = dscores_BKGQS.astype(dtype)
        dqs.append(_product(dscores_BKGQS, k_BKTH[:, :, first:end], (4, 2)))
        around = ((0, 0), (0, 0), (first, num_tokens - end), (0, 0))
        dk_BKTH += jnp.pad(_sum_queries(dscores_BKGQS, q_BKGTH[..., begin:end, :]), around)
        dv_BKTH += jnp.pad(_sum_queries(probs_BKGQS.astype(dtype), dout_BKGQH), around)
        k_BKTH, v_BKTH, dk_BKTH, dv_BKTH = _after(
            dqs[-1], (k_BKTH, v_BKTH, dk_BKTH, dv_BKTH), end - begin
        )
    return jnp.concatenate(dqs, axis=3), dk_BKTH, dv_BKTH


_causal.defvjp(_causal_forward, _causal_backward)


def blocks(num_tokens: int) -> list[tuple[int, int]]:
    """Begin and end of each block of queries.

    Four blocks leave 5/8 of the scores to compute and many 1/2; small products are slow, and the
    scores of a block have to fit, hence between 32 and 512 queries a block.
    """
    size = min(max(-(-num_tokens // (4 * 32)) * 32, 32), _LARGEST_BLOCK)
    return [(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size)]


def _after(done, inputs, size: int):
    """The inputs of the next block, not to be used before this one is done where both are large.

    Else XLA may run the blocks side by side and hold the scores of all.
    """
    return jax.lax.optimization_barrier((done, inputs))[1] if size == _LARGEST_BLOCK else inputs


def _heads_first(q_BTKGH, k_BTKH, v_BTKH):
    return (
        q_BTKGH.transpose(0, 2, 3, 1, 4),
        k_BTKH.transpose(0, 2, 1, 3),
        v_BTKH.transpose(0, 2, 1, 3),
    )


def _first_key(span: Span, begin: int) -> int:
    """The first key that a block of queries reads."""
    if span.window is None:
        return 0
    return max(begin - span.window + 1, 0) // _WINDOW_START * _WINDOW_START


def _block_scores(span: Span, q_BKGTH, k_BKTH, read, begin: int, end: int):
    """Masked scores of queries ``begin:end`` over the keys up to there, f32 [B, K, G, Q, S]."""
    first = _first_key(span, begin)
    scores_BKGQS = _product(q_BKGTH[..., begin:end, :], k_BKTH[:, :, first:end], (4, 3))
    valid_BT, first_BT = read
    mask_BQS = causal_mask(valid_BT[:, first:end], begin - first, end - begin, span.window)
    if first_BT is not None:
        mask_BQS &= jnp.arange(first, end)[None, None] >= first_BT[:, begin:end, None]
    return _masked(scores_BKGQS, mask_BQS, span.scale)


def _masked(scores_BKGTS, mask_BTS, scale: float):
    return jnp.where(mask_BTS[:, None, None], scores_BKGTS * scale, MASKED)


def _product(x_BKGTn, y_BK, contract: tuple[int, int]):
    """Batched over rows and heads, contracting one dimension of each, summed in f32."""
    numbers = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x_BKGTn, y_BK, numbers, preferred_element_type=jnp.float32)


def _sum_queries(x_BKGQS, y_BKGQH):
    """x^T y over the queries of a group, f32 [B, K, S, H]."""
    numbers = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x_BKGQS, y_BKGQH, numbers, preferred_element_type=jnp.float32)
