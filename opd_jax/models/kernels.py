"""Attention over whole sequences by the kernels that accelerators have for it, and over a cache.

Both kernels hold no array of T x T scores, in the gradient neither. On a TPU it is splash
attention, a Pallas kernel of jax; on a GPU what cuDNN has, by ``jax.nn.dot_product_attention``.
Where neither fits, and on a CPU, it is :func:`attention.causal`, which both are tested against.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from opd_jax import mesh, rounds
from opd_jax.models import attention, kv_cache
from opd_jax.models.attention import Span

Name = Literal["blocks", "splash", "cudnn"]
FEWEST_TOKENS = 512  # below, scores are small and a kernel's blocks are mostly padding
_LANES = 128  # of a TPU's registers: heads and blocks are multiples of it
_BLOCK = 512  # queries, and keys, that splash attention holds at a time
_GPU_HEADS = 256  # the widest that cuDNN has, in multiples of 8
_HEADS = P(mesh.BATCH, None, "model", None, None)


def chosen(
    platform: str, num_tokens: int, head_dim: int, dtype, *, is_packed: bool = False
) -> Name:
    """What mixes rows of ``num_tokens`` on devices of a platform (``tpu``, ``cuda``, ...).

    Of rows that hold several sequences (``is_packed``) cuDNN's is not used.
    """
    if num_tokens < FEWEST_TOKENS:
        return "blocks"
    if platform == "tpu":
        return "splash"
    if is_packed:
        return "blocks"
    is_half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if platform in ("gpu", "cuda") and is_half and head_dim <= _GPU_HEADS and head_dim % 8 == 0:
        return "cudnn" if has_cudnn() else "blocks"
    return "blocks"


@functools.cache
def has_cudnn() -> bool:
    """Whether jax finds cuDNN, a library of its own; without it nothing of it can be traced."""
    x_BTNH = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.eval_shape(attend, x_BTNH, x_BTNH, x_BTNH)
    except RuntimeError:
        return False
    return True


def causal(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    valid_BT: Bool[Array, "B T"],
    *,
    span: Span,
    is_sliding: Bool[Array, ""] | bool = True,
    first_BT: Int[Array, "B T"] | None = None,
    name: Name | None = None,
) -> Float[Array, "B T K G H"]:
    """:func:`attention.causal` by the kernel ``name``, or else that of the devices.

    A query that may read nothing gets something finite, to be ignored.

    **Sharding**: rows over the batch axes, key/value heads over ``model``; nothing is communicated.
    """
    num_tokens, head_dim, is_packed = q_BTKGH.shape[1], q_BTKGH.shape[-1], first_BT is not None
    if name is None:
        name = chosen(mesh.platform(), num_tokens, head_dim, q_BTKGH.dtype, is_packed=is_packed)
    if name == "blocks":
        return attention.causal(
            q_BTKGH, k_BTKH, v_BTKH, valid_BT, span=span, is_sliding=is_sliding, first_BT=first_BT
        )
    kernel, read_BT = by_cudnn, valid_BT
    if name == "splash":
        kernel, read_BT = by_splash, jnp.where(valid_BT, 0 if first_BT is None else first_BT, -1)
    keys = P(*_HEADS[:3], None)

    def on_shards(span, *given):  # each device's rows and heads: XLA cannot split a kernel
        mixed = functools.partial(kernel, span=span)
        return mesh.on_shards(mixed, (_HEADS, keys, keys, P(mesh.BATCH, None)), _HEADS)(*given)

    span, varies = attention.settled(span, is_sliding)
    return attention.either(on_shards, span, varies, q_BTKGH, k_BTKH, v_BTKH, read_BT)


def cached(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T K G H"]:
    """:func:`attention.attend`, in blocks where :func:`kv_cache.block` finds it worth it.

    **Sharding**: rows over the batch axes, key/value heads over ``model``; nothing is communicated,
    and each device reads as far as its own rows do.
    """
    size = kv_cache.block(mask_BTS.shape[-1])
    if size == mask_BTS.shape[-1]:
        return attention.attend(q_BTKGH, k_BKHS, v_BKSH, mask_BTS, scale)
    mixed = functools.partial(attention.attend_live, size=size, scale=scale)
    held = P(*kv_cache.AXES)
    return mesh.on_shards(mixed, (_HEADS, held, held, P(mesh.BATCH, None, None)), _HEADS)(
        q_BTKGH, k_BKHS, v_BKSH, mask_BTS
    )


def by_splash(q_BTKGH, k_BTKH, v_BTKH, segment_BT, *, span: Span, interpret: bool = False):
    """Splash attention of tokens over those of their own segment (i32); -1 is padding.

    Tokens of padding fill up the last block.

    **Sharding**: of one device.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    rows, num_tokens, num_kv, group, head_dim = q_BTKGH.shape
    size, padded = _tiles(num_tokens)
    heads = -(-head_dim // _LANES) * _LANES - head_dim

    def placed(x_BTNH):  # heads first, whole blocks, whole registers
        widths = ((0, 0), (0, padded - num_tokens), (0, 0), (0, heads))
        return jnp.pad(x_BTNH, widths).transpose(0, 2, 1, 3)

    q_BTNH = q_BTKGH.reshape(rows, num_tokens, num_kv * group, head_dim)
    q_BNTH = placed((q_BTNH * span.scale).astype(q_BTNH.dtype))
    around = ((0, 0), (0, padded - num_tokens))
    segment_BT = jnp.pad(segment_BT, around, constant_values=-1)
    kernel = _splash(padded, num_kv * group, span.window, size, interpret)
    pairs = _pairs(padded // size, size, span.window)
    with rounds.visits(rows * num_kv * group * pairs):
        segments = splash_attention.SegmentIds(segment_BT, segment_BT)
        mixed_BNTH = jax.vmap(kernel)(q_BNTH, placed(k_BTKH), placed(v_BTKH), segments)
    assert isinstance(mixed_BNTH, jax.Array)  # and no residuals, which were not asked for
    mixed_BTNH = mixed_BNTH[:, :, :num_tokens, :head_dim].transpose(0, 2, 1, 3)
    return mixed_BTNH.astype(v_BTKH.dtype).reshape(q_BTKGH.shape)


def _tiles(num_tokens: int) -> tuple[int, int]:
    """Tokens of a block, and of a row of whole blocks."""
    tokens = -(-num_tokens // _LANES) * _LANES
    size = min(_BLOCK, tokens)
    return size, -(-tokens // size) * size


def _pairs(num: int, size: int, window: int | None) -> int:
    """Of ``num`` x ``num`` pairs of blocks, those that hold a key that a query may read."""
    furthest = num if window is None else -(-(window - 1) // size)  # blocks before a query's own
    return sum(min(at, furthest) + 1 for at in range(num))


def _splash(num_tokens: int, num_heads: int, window: int | None, size: int, interpret: bool):
    # Here and not above: Pallas takes a third of a second to import, and a CPU never calls it.
    from jax.experimental.pallas.ops.tpu import splash_attention
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    shape = (num_tokens, num_tokens)
    if window is None:
        mask = splash_attention_mask.CausalMask(shape)
    else:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash_attention.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    return splash_attention.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        interpret=interpret,
    )


def by_cudnn(
    q_BTKGH,
    k_BTKH,
    v_BTKH,
    valid_BT,
    *,
    span: Span,
    implementation: Literal["cudnn", "xla"] = "cudnn",
):
    """cuDNN's fused attention, which wants padding on the right: rows are shifted there and back.

    **Sharding**: of one device.
    """
    rows, num_tokens, num_kv, group, head_dim = q_BTKGH.shape
    order_BT = jnp.argsort(~valid_BT, axis=1, stable=True)  # valid tokens first, as they came
    place_BT = jnp.argsort(order_BT, axis=1)
    length_B = jnp.sum(valid_BT, axis=1, dtype=jnp.int32)
    mixed_BTNH = jax.nn.dot_product_attention(
        _moved(q_BTKGH.reshape(rows, num_tokens, num_kv * group, head_dim), order_BT),
        _moved(k_BTKH, order_BT),
        _moved(v_BTKH, order_BT),
        scale=span.scale,
        is_causal=True,
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        local_window_size=None if span.window is None else (span.window - 1, 0),
        implementation=implementation,
    )
    return _moved(mixed_BTNH, place_BT).reshape(q_BTKGH.shape)


def _moved(x_BTNH, order_BT):
    return jnp.take_along_axis(x_BTNH, order_BT[:, :, None, None], axis=1)
