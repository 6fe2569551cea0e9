"""Rotary position embeddings, plain and stretched."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding and how it is stretched past the length it was trained on.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: ``plain``, ``linear`` (all wavelengths alike), ``llama3`` (Llama 3.1 report) or ``yarn``
        (arXiv 2309.00071).
      factor: by how much long wavelengths are stretched.
      original_positions: context length before stretching.
      low_freq_factor, high_freq_factor: ends of the llama3 blend, in turns per original context.
      beta_fast, beta_slow: ends of the yarn blend, in turns per original context.
      truncate: round the ends of the yarn blend to whole dimensions.
      attention_factor: yarn's multiplier of cosine and sine; None takes ``0.1 ln(factor) + 1``.
    """

    theta: float = 10_000.0
    kind: Literal["plain", "linear", "llama3", "yarn"] = "plain"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in ("plain", "linear", "llama3", "yarn"):
            raise ValueError(
                f"rope kind {self.kind!r} is not known: expected 'plain', 'linear', 'llama3' or "
                "'yarn'; choose a model whose rope_scaling is one of these"
            )
        if self.kind not in ("plain", "linear") and self.original_positions < 1:
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
    if rope.kind == "linear":
        return freq / np.float32(rope.factor), 1.0
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
