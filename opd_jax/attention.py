"""Rotary positions, attention masks, the key/value cache, and the attention product itself.

Queries stay grouped by the key/value head they read (``q_BTKGH``, G queries per head), so the head
axis that a mesh splits is never reshaped.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from opd_jax import mesh

# Large and negative, not -inf: a row with no visible key gets a uniform distribution, not NaN.
MASKED = -0.7 * float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding and how it is stretched past the length it was trained on.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: ``plain``, ``llama3`` (Llama 3.1 report) or ``yarn`` (arXiv 2309.00071).
      factor: by how much long wavelengths are stretched.
      original_positions: context length before stretching.
      low_freq_factor, high_freq_factor: ends of the llama3 blend, in turns per original context.
      beta_fast, beta_slow: ends of the yarn blend, in turns per original context.
      truncate: round the ends of the yarn blend to whole dimensions.
      attention_factor: yarn's multiplier of cosine and sine; None takes ``0.1 ln(factor) + 1``.
    """

    theta: float = 10_000.0
    kind: Literal["plain", "llama3", "yarn"] = "plain"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in ("plain", "llama3", "yarn"):
            raise ValueError(
                f"rope kind {self.kind!r} is not known: expected 'plain', 'llama3' or 'yarn'; "
                "choose a model whose rope_scaling is one of these"
            )
        if self.kind != "plain" and self.original_positions < 1:
            raise ValueError(
                f"rope kind {self.kind!r} with original_positions={self.original_positions}: "
                "expected the context length before stretching; set "
                "original_max_position_embeddings"
            )


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position for each rotated pair, [H/2] f32, and the multiplier of cosine and sine.

    Computed in float32 as transformers does, since that is what the weights were trained with.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freq = np.float32(1.0) / np.float32(rope.theta) ** exponent
    if rope.kind == "plain":
        return freq, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, freq), 1.0
    scale = rope.attention_factor
    if scale is None:
        scale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return _yarn(rope, freq, head_dim), scale


def _llama3(rope: Rope, freq: np.ndarray) -> np.ndarray:
    turns = rope.original_positions * freq / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * freq / rope.factor + blend * freq).astype(np.float32)


def _yarn(rope: Rope, freq: np.ndarray, head_dim: int) -> np.ndarray:
    def dimension(turns: float) -> float:
        """Index of the pair that makes this many turns over the original context."""
        wavelength = rope.original_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp finite
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low)
    stretched = np.clip(ramp, 0.0, 1.0)
    return (freq / rope.factor * stretched + freq * (1 - stretched)).astype(np.float32)


def rotations(
    positions_BT: Int[Array, "B T"], rope: Rope, head_dim: int
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """Cosine and sine of every rotated pair at every position, [B, T, H/2] f32."""
    freq, scale = inverse_frequencies(rope, head_dim)
    angle_BTh = positions_BT.astype(jnp.float32)[:, :, None] * jnp.asarray(freq)[None, None, :]
    return jnp.cos(angle_BTh) * scale, jnp.sin(angle_BTh) * scale


def rotate(
    x: Float[Array, "B T *heads H"],
    rotation: tuple[Float[Array, "B T h"], Float[Array, "B T h"]],
) -> Float[Array, "B T *heads H"]:
    """Rotate pair (i, i + H/2) of every head by its angle, in f32; keeps the dtype of ``x``."""
    heads = tuple(range(2, x.ndim - 1))
    cos, sin = (jnp.expand_dims(part, heads) for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


@struct.dataclass
class Cache:
    """Keys and values of earlier tokens; one cursor serves all rows (prompts are left-padded).

    **Sharding**: rows over the batch axes, heads over ``model``.
    """

    k_LBSKH: jax.Array  # [L, B, S, K, H]
    v_LBSKH: jax.Array  # [L, B, S, K, H]
    valid_BS: jax.Array  # [B, S] bool, slots that hold a real token
    length: jax.Array  # [] i32, slots written so far


_CACHE_AXES = (None, mesh.BATCH, None, "model", None)


def init_cache(
    num_layers: int, batch: int, size: int, num_kv_heads: int, head_dim: int, dtype=jnp.float32
) -> Cache:
    """An empty cache with room for ``size`` tokens per row."""
    shape = (num_layers, batch, size, num_kv_heads, head_dim)
    return Cache(
        k_LBSKH=mesh.constrain(jnp.zeros(shape, dtype), *_CACHE_AXES),
        v_LBSKH=mesh.constrain(jnp.zeros(shape, dtype), *_CACHE_AXES),
        valid_BS=mesh.constrain(jnp.zeros((batch, size), bool), mesh.BATCH, None),
        length=jnp.zeros((), jnp.int32),
    )


def repeat(cache: Cache, n: int) -> Cache:
    """Each row ``n`` times in a row (b0, b0, b1, b1, ...), for several samples of one prompt.

    **Sharding**: every copy stays on the device of its row.
    """

    def copies(x: jax.Array, axis: int, *axes) -> jax.Array:
        shape = (*x.shape[: axis + 1], n, *x.shape[axis + 1 :])
        spread = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
        merged = (*x.shape[:axis], x.shape[axis] * n, *x.shape[axis + 1 :])
        return jax.lax.reshape(spread, merged, out_sharding=mesh.out(*axes))

    return Cache(
        k_LBSKH=copies(cache.k_LBSKH, 1, *_CACHE_AXES),
        v_LBSKH=copies(cache.v_LBSKH, 1, *_CACHE_AXES),
        valid_BS=copies(cache.valid_BS, 0, mesh.BATCH, None),
        length=cache.length,
    )


def extend(cache: Cache, valid_BT: Bool[Array, "B T"]) -> Cache:
    """Move the cursor over ``T`` more slots; each layer then fills them with :func:`write`."""
    valid_BS = jax.lax.dynamic_update_slice_in_dim(cache.valid_BS, valid_BT, cache.length, axis=1)
    return dataclasses.replace(cache, valid_BS=valid_BS, length=cache.length + valid_BT.shape[1])


def write(
    cache: Cache,
    layer: jax.Array | int,
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
) -> Cache:
    """Put one layer's keys and values into the last ``T`` slots (in place once compiled)."""
    start = cache.length - k_BTKH.shape[1]
    at = (layer, 0, start, 0, 0)

    def put(cache_LBSKH, new_BTKH):
        return jax.lax.dynamic_update_slice(
            cache_LBSKH, new_BTKH[None].astype(cache_LBSKH.dtype), at
        )

    return dataclasses.replace(
        cache, k_LBSKH=put(cache.k_LBSKH, k_BTKH), v_LBSKH=put(cache.v_LBSKH, v_BTKH)
    )


def read(cache: Cache, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values, [B, S, K, H] each."""
    return tuple(
        jax.lax.dynamic_index_in_dim(x, layer, axis=0, keepdims=False)
        for x in (cache.k_LBSKH, cache.v_LBSKH)
    )


def causal_mask(valid_BS: Bool[Array, "B S"], first: jax.Array | int, num_queries: int):
    """Which slot each query may read, [B, T, S] bool: a valid one, not after the query's own slot.

    Args:
      valid_BS: slots that hold a real token.
      first: slot of the first query.
      num_queries: T.
    """
    slot_S = jnp.arange(valid_BS.shape[1])
    query_T = first + jnp.arange(num_queries)
    return valid_BS[:, None, :] & (slot_S[None, :] <= query_T[:, None])[None]


def attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T K G H"]:
    r"""Grouped-query attention, ``softmax(q k^T / sqrt(H)) v``, with the softmax in f32.

    A query that may read nothing gets the mean of all values: finite, and to be ignored.

    **Sharding**: rows and heads are independent, so nothing is communicated.
    """
    scale = q_BTKGH.shape[-1] ** -0.5
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS * scale, MASKED)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
