"""A decoder-only transformer as functions over a nested dict of arrays stacked by layer.

RMSNorm, rotary positions, grouped-query attention, a gated feed-forward or one of experts, tied or
untied head; :class:`ModelConfig` has the switches and ``families`` what each family chooses. Layers
run under ``lax.scan``: one program for all, which looks up what kind of layer it is. Layers with
experts and without have other parameters, so there is a scan for each run of either.

**Sharding**: the width dimension of every weight over ``fsdp``, key/value heads, feed-forward,
experts and vocabulary over ``model``, batch rows over ``data`` and ``fsdp``. A weight is gathered
over ``fsdp`` inside its layer, already in the compute dtype.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opd_jax import mesh
from opd_jax.models import attention, embedding, kernels, kv_cache, linear, moe, paged
from opd_jax.models.architecture import REMAT, LayerKind, ModelConfig, layers_with, specs
from opd_jax.models.arranged import for_decoding, gathered, sliced, with_vocab_rows
from opd_jax.models.attention import Span
from opd_jax.models.kv_cache import Cache
from opd_jax.models.rope import rotate, rotations
from opd_jax.pytrees import Params

__all__ = [
    "REMAT",
    "LayerKind",
    "ModelConfig",
    "for_decoding",
    "head",
    "hidden",
    "hidden_and_head",
    "hidden_head_and_load",
    "logits",
    "positions",
    "specs",
    "with_vocab_rows",
]

# Mixes the values of [B, T, ...] queries, keys and values, and says what to keep of them.
_Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def rms_norm(x: Float[Array, "*rows D"], weight_D: jax.Array, cfg: ModelConfig):
    r"""``x / sqrt(mean(x^2) + eps) * weight`` in f32; keeps the dtype of ``x``.

    The mean is over the dimensions that the weight has.
    """
    axes = tuple(range(-weight_D.ndim, 0))
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + cfg.norm_eps)
    weight = weight_D.astype(jnp.float32)
    weight = 1.0 + weight if cfg.norm_offset else weight
    weight = jnp.expand_dims(weight, tuple(range(x.ndim - weight.ndim)))
    return (x32 * scale * weight).astype(x.dtype)


def _attention(layer: Params, x_RD, rotation, attend: _Attend, cfg: ModelConfig):
    tokens = rotation[0].shape[:2]
    q_BTKGH = _unflat(linear.times(x_RD, layer["q"]), tokens)
    k_BTKH = _unflat(linear.times(x_RD, layer["k"]), tokens)
    v_BTKH = _unflat(linear.times(x_RD, layer["v"]), tokens)
    if cfg.qkv_bias:
        q_BTKGH = _biased(q_BTKGH, layer["q_bias"])
        k_BTKH = _biased(k_BTKH, layer["k_bias"])
        v_BTKH = _biased(v_BTKH, layer["v_bias"])
    if cfg.qk_norm:
        q_BTKGH = rms_norm(q_BTKGH, layer["q_norm"], cfg)
        k_BTKH = rms_norm(k_BTKH, layer["k_norm"], cfg)
    q_BTKGH = rotate(q_BTKGH, rotation)
    k_BTKH = rotate(k_BTKH, rotation)
    mixed_BTKGH, kept = attend(q_BTKGH, k_BTKH, v_BTKH)
    mixed_RKGH = _flat(mixed_BTKGH, "model", None, None)
    return linear.times(mixed_RKGH, layer["o"], mesh.out(mesh.BATCH, None)), kept


def _biased(x_BT: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a bias to every token, in f32, so that its gradient sums over them in f32 as well."""
    return (x_BT.astype(jnp.float32) + bias.astype(jnp.float32)[None, None]).astype(x_BT.dtype)


def _ffn(layer: Params, x_RD, cfg: ModelConfig):
    activation = _ACTIVATIONS[cfg.activation]
    if "router" in layer and cfg.experts is not None:
        return moe.ffn(layer, x_RD, experts=cfg.experts, activation=activation)
    gate_RF = activation(linear.times(x_RD, layer["gate"]))
    up_RF = linear.times(x_RD, layer["up"])
    return linear.times(gate_RF * up_RF, layer["down"], mesh.out(mesh.BATCH, None))


def _layer(
    h_RD, layer: Params, rotation, attend: _Attend, cfg: ModelConfig, counted_R=None
) -> tuple[jax.Array, Any, moe.Load | None]:
    """The stream after a layer, what ``attend`` keeps, and the load of its experts if counted."""

    def norm(x_RD, name: str):
        return rms_norm(x_RD, layer[name], cfg) if name in layer else x_RD

    out_RD, kept = _attention(layer, norm(h_RD, "attn_norm"), rotation, attend, cfg)
    h_RD += norm(out_RD, "attn_post_norm")
    x_RD, load = norm(h_RD, "ffn_norm"), None
    if counted_R is not None and "router" in layer and cfg.experts is not None:
        load = moe.load(layer, x_RD, counted_R, experts=cfg.experts)
    h_RD += norm(_ffn(layer, x_RD, cfg), "ffn_post_norm")
    return h_RD, kept, load


def _flat(x_BT: jax.Array, *axes) -> jax.Array:
    """Merge batch and time into rows, ``axes`` being the mesh axes of the rest.

    XLA multiplies [R, D] faster than [B, T, D] on a CPU, in the backward pass above all.
    """
    shape = (x_BT.shape[0] * x_BT.shape[1], *x_BT.shape[2:])
    return jax.lax.reshape(x_BT, shape, out_sharding=mesh.out(mesh.BATCH, *axes))


def _unflat(x_R: jax.Array, tokens: tuple[int, ...]) -> jax.Array:
    """Undo :func:`_flat` on what heads were projected to: [R, K, ...] to [B, T, K, ...]."""
    rest = [None] * (x_R.ndim - 2)
    return jax.lax.reshape(
        x_R, (*tokens, *x_R.shape[1:]), out_sharding=mesh.out(mesh.BATCH, None, "model", *rest)
    )


def _rematerialised(step, cfg: ModelConfig):
    if cfg.remat == "none":
        return step
    policy = None
    if cfg.remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(step, policy=policy, prevent_cse=False)


def _embedded(params: Params, ids_BT: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Token embeddings in the compute dtype, and the table for its other uses.

    **Sharding**: rows are looked up where the table lies (width over ``fsdp``) and then exchanged,
    so the table is never gathered; its gradient is summed in f32.
    """
    x_BTD, table_VD = embedding.look_up(params["embed"], mesh.constrain(ids_BT, "data", None))
    x_BTD = mesh.constrain(x_BTD.astype(cfg.compute_dtype), mesh.BATCH, None, None)
    if cfg.scaled_embed:  # by a number of the compute dtype, as these models were trained
        x_BTD *= jnp.asarray(math.sqrt(cfg.width), cfg.compute_dtype)
    return x_BTD, table_VD


def hidden(
    params: Params,
    ids_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    *,
    cfg: ModelConfig,
    cache: Cache | None = None,
    room: int = 0,
    is_paged: bool = False,
    first_BT: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Hidden states after the final norm, in the compute dtype.

    Args:
      params: as declared by :func:`specs`; with a cache, as :func:`for_decoding` gives them.
      ids_BT: token ids; anything where invalid.
      positions_BT: index among the row's valid tokens, from 0 (:func:`positions`).
      valid_BT: False on padding.
      cfg: static.
      cache: with one, the T tokens are appended at its cursor and read all that came before; there
        must be room for them (the caller sizes the cache).
      room: static; without a cache, slots of a new one to return with these tokens in it.
      is_paged: static; whether that is in pages, for which rows begin with their first token.
      first_BT: without a cache, where several sequences lie in a row, the column of the first token
        of each token's own; positions count from there.

    Raises:
      ValueError: a cache with parameters that are not for decoding, or the other way round.

    **Sharding**: batch rows over ``data`` and ``fsdp`` throughout.
    """
    if (cache is None) == isinstance(params["layers"], tuple):
        raise ValueError(
            f"hidden was called {'without' if cache is None else 'with'} a cache and with "
            f"{'per-layer' if cache is None else 'stacked'} parameters: expected "
            "model.for_decoding(params) with a cache, params themselves without"
        )
    h_BTD, _ = _embedded(params, ids_BT, cfg)
    return _through_layers(
        params,
        h_BTD,
        positions_BT,
        valid_BT,
        cfg,
        cache,
        room,
        first_BT=first_BT,
        is_paged=is_paged,
    )[:2]


def hidden_and_head(
    params: Params,
    ids_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    *,
    cfg: ModelConfig,
) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
    """:func:`hidden` and :func:`head` for a gradient to both: a tied table's is one array.

    **Sharding**: as theirs.
    """
    h_BTD, head_VD, _ = hidden_head_and_load(params, ids_BT, positions_BT, valid_BT, None, cfg=cfg)
    return h_BTD, head_VD


def hidden_head_and_load(
    params: Params,
    ids_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    counted_BT: Bool[Array, "B T"] | None,
    *,
    cfg: ModelConfig,
    first_BT: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "V D"], moe.Load | None]:
    """:func:`hidden_and_head`, and how the counted tokens spread over the experts of all layers.

    The load is None where nothing is counted or no layer has experts. ``first_BT`` is as in
    :func:`hidden`.

    **Sharding**: as theirs; the load everywhere.
    """
    h_BTD, table_VD = _embedded(params, ids_BT, cfg)
    h_BTD, _, load = _through_layers(
        params, h_BTD, positions_BT, valid_BT, cfg, counted_BT=counted_BT, first_BT=first_BT
    )
    return h_BTD, head({**params, "embed": table_VD}, cfg), load


def _through_layers(
    params: Params,
    h_BTD,
    positions_BT,
    valid_BT,
    cfg: ModelConfig,
    cache=None,
    room=0,
    counted_BT=None,
    first_BT=None,
    is_paged=False,
):
    """All layers and the final norm."""
    positions_BT = mesh.constrain(positions_BT, mesh.BATCH, None)
    valid_BT = mesh.constrain(valid_BT, mesh.BATCH, None)
    rotation = rotations(positions_BT, cfg.rope, cfg.head_dim)
    local = rotations(positions_BT, cfg.local_rope, cfg.head_dim) if cfg.local_rope else rotation
    h_RD, layers = _flat(h_BTD, None), params["layers"]
    load = None
    if cache is None:
        counted_R = None if counted_BT is None else _rows(counted_BT)
        read = (valid_BT, None if first_BT is None else mesh.constrain(first_BT, mesh.BATCH, None))
        h_RD, cache, load = _from_start(
            h_RD, layers, rotation, local, read, room, cfg, counted_R, is_paged
        )
    else:
        assert not room  # the cache that is there has its size
        assert first_BT is None
        h_RD, cache = _continued(h_RD, layers, rotation, local, valid_BT, cache, cfg)
    final_D = mesh.constrain(params["final_norm"], None)
    h_BTD = jax.lax.reshape(h_RD, h_BTD.shape, out_sharding=mesh.out(mesh.BATCH, None, None))
    return rms_norm(h_BTD, final_D, cfg), cache, load


def _rows(x_BT: jax.Array) -> jax.Array:
    """[B, T] to [R], as :func:`_flat` does with states."""
    placed_BT = mesh.constrain(x_BT, mesh.BATCH, None)
    return jax.lax.reshape(placed_BT, (x_BT.size,), out_sharding=mesh.out(mesh.BATCH))


def _from_start(
    h_RD, layers, rotation, local, read, room: int, cfg: ModelConfig, counted_R=None, is_paged=False
):
    """All layers over tokens that have none before them."""
    valid_BT, first_BT = read
    span = Span(cfg.score_scale, cfg.window)
    kernel = None if cfg.attention == "auto" else cfg.attention

    def step(h_RD, inputs, is_sliding):
        layer, is_sliding = inputs if is_sliding is None else (inputs, is_sliding)

        def attend(q_BTKGH, k_BTKH, v_BTKH):
            mixed_BTKGH = kernels.causal(
                q_BTKGH,
                k_BTKH,
                v_BTKH,
                valid_BT,
                span=span,
                is_sliding=is_sliding,
                first_BT=first_BT,
                name=kernel,
            )
            if not room:
                return mixed_BTKGH, None
            as_read = (0, 2, 1, 3) if is_paged else (0, 2, 3, 1)
            return mixed_BTKGH, (k_BTKH.transpose(as_read), v_BTKH.transpose(0, 2, 1, 3))

        turn = _chosen(is_sliding, local, rotation)
        h_RD, kept, load = _layer(h_RD, gathered(layer, cfg), turn, attend, cfg, counted_R)
        return h_RD, (kept, load)

    kept, loads = [], []
    for first, kinds in _runs(cfg):
        part = _part(layers, first, kinds, cfg)
        slides = [kind.is_sliding for kind in kinds]
        if all(slides) or not any(slides):
            body = functools.partial(step, is_sliding=slides[0])
        else:
            body, part = functools.partial(step, is_sliding=None), (part, jnp.array(slides))
        h_RD, (more, load_L) = jax.lax.scan(_rematerialised(body, cfg), h_RD, part)
        kept.append(more)
        if load_L is not None:
            loads.append(jax.tree.map(lambda x_L: jnp.sum(x_L, axis=0), load_L))
    load = functools.reduce(operator.add, loads) if loads else None
    if not room:
        return h_RD, None, load
    k_LBKHT, v_LBKTH = kept[0] if len(kept) == 1 else jax.tree.map(_joined, *kept)
    return h_RD, kv_cache.start(k_LBKHT, v_LBKTH, valid_BT, room, is_paged), load


def _joined(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts)


def _chosen(is_sliding, local, rotation):
    """The rotation of a layer."""
    if local is rotation or isinstance(is_sliding, bool):
        return local if is_sliding is True else rotation
    return jax.tree.map(functools.partial(jnp.where, is_sliding), local, rotation)


def _runs(cfg: ModelConfig) -> list[tuple[int, list[LayerKind]]]:
    """First layer and kinds of each run of layers whose parameters are alike."""
    runs, first = [], 0
    for _, group in itertools.groupby(cfg.kinds, key=lambda kind: kind.is_sparse):
        kinds = list(group)
        runs.append((first, kinds))
        first += len(kinds)
    return runs


def _part(layers: Params, first: int, kinds: list[LayerKind], cfg: ModelConfig) -> Params:
    """The parameters of a run of layers."""
    if len(kinds) == cfg.num_layers:
        return layers
    part = {}
    for name, w in layers.items():
        held = layers_with(cfg, name)
        if first in held:
            at = held.index(first)
            part[name] = sliced(w, slice(at, at + len(kinds)))
    return part


def _continued(h_RD, layers, rotation, local, valid_BT, cache: Cache, cfg: ModelConfig):
    """All layers over tokens that come after those in the cache."""
    first = cache.length
    cache = kv_cache.extend(cache, valid_BT)
    kinds = cfg.kinds
    if cache.valid_BS is None:  # a row that has ended reads no more than it must
        reach: Any = jnp.where(valid_BT[:, 0], cache.length, 1)
        reaches = {False: mesh.constrain(reach, mesh.BATCH)}
    else:
        reaches = {
            slides: attention.causal_mask(
                cache.valid_BS, first, valid_BT.shape[1], cfg.window if slides else None
            )
            for slides in sorted({kind.is_sliding for kind in kinds})
        }
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        attend = functools.partial(_attend_cached, cache, index, reaches[kind.is_sliding], cfg)
        turn = local if kind.is_sliding else rotation
        h_RD, cache, _ = _layer(h_RD, layer, turn, attend, cfg)
    return h_RD, cache


def _attend_cached(cache: Cache, index: int, reach, cfg, q_BTKGH, k_BTKH, v_BTKH):
    """Attention over a cache: as far as ``reach`` says, a mask or, in pages, a number of slots."""
    cache = kv_cache.write(cache, index, k_BTKH, v_BTKH)
    attend = paged.attend if cache.is_paged else kernels.cached
    return attend(q_BTKGH, cache.keys[index], cache.values[index], reach, cfg.score_scale), cache


def head(params: Params, cfg: ModelConfig) -> Float[Array, "V D"]:
    """Output projection in the compute dtype: the embedding itself when tied.

    **Sharding**: vocabulary over ``model``, width whole.
    """
    w_VD = params["embed"] if cfg.tied else params["head"]
    return mesh.constrain(w_VD.astype(cfg.compute_dtype), "model", None)


def positions(valid_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of each token among its row's valid tokens, 0 on left padding."""
    return jnp.maximum(jnp.cumsum(valid_BT.astype(jnp.int32), axis=1) - 1, 0)


def logits(
    params: Params,
    ids_BT: Int[Array, "B T"],
    *,
    cfg: ModelConfig,
    valid_BT: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Next-token logits in f32; builds all of [B, T, V], so for tests and small inputs only."""
    valid_BT = jnp.ones(ids_BT.shape, bool) if valid_BT is None else valid_BT
    h_BTD, head_VD = hidden_and_head(params, ids_BT, positions(valid_BT), valid_BT, cfg=cfg)
    return jnp.einsum("BTD,VD->BTV", h_BTD, head_VD, preferred_element_type=jnp.float32)
