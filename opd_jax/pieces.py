"""A step in pieces, each through both models on its own: micro-batches, or rows packed into fewer.

What a batch shares is done once and not for every piece: both heads are gathered before the first,
and the gradient of the student's is added up over the shards after the last. Packed pieces
(:mod:`opd_jax.data.packing`) hold the predicting positions of several rows end to end; targets,
weights and measurements keep the rows of the batch, so that nothing but the models sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from opd_jax import kl, mesh, objective, rounds
from opd_jax.models import lora, moe, transformer
from opd_jax.objective import ObjectiveConfig, Targets
from opd_jax.pytrees import Packing, Params, Rollout, TokenKL


class Pieces(struct.PyTreeNode):
    """What the models are given, piece by piece: P pieces of B rows.

    All are [P, B, T]. ``number`` is how many hold something, the first ones; None: all.
    """

    ids: jax.Array  # i32
    positions: jax.Array  # i32
    valid: jax.Array  # bool
    first: jax.Array | None  # i32, where sequences begin, see transformer.hidden
    labels: jax.Array | None = None  # i32, the predicted ids
    weight: jax.Array | None = None  # f32
    measure: jax.Array | None = None  # bool
    written: jax.Array | None = None  # bool, what counts where experts are balanced
    number: jax.Array | None = None  # [] i32


def of(
    rollout: Rollout,
    goal: Targets | None,
    packing: Packing | None,
    *,
    cfg: ObjectiveConfig,
) -> Pieces:
    """A batch in pieces; without targets what the teacher's states need.

    **Sharding**: the rows of every piece over ``data`` and ``fsdp``. Ids and weights of a batch
    that is packed are gathered on every device, a few bytes a token, and each takes its rows'.
    """
    ids_BT, positions_BT, valid_BT = objective.inputs(rollout)
    wanted: dict[str, jax.Array] = {"ids": ids_BT}
    if goal is not None:
        if cfg.student.has_experts:
            wanted["written"] = objective.written(rollout)
        wanted |= {
            "labels": goal.ids_BT,
            "weight": objective.row_weights(goal, cfg=cfg),
            "measure": goal.importance_BT > 0,
        }
    if packing is None:
        wanted |= {"positions": positions_BT, "valid": valid_BT}
        return Pieces(**objective.split(wanted, cfg.microbatches), first=None)
    source, first = (_pieces_first(x) for x in (packing.source_RPL, packing.first_RPL))
    column_L = jnp.arange(first.shape[2])[None, None, :]
    return Pieces(
        **{name: _taken(x_BT, source) for name, x_BT in wanted.items()},
        positions=column_L - first,
        valid=source >= 0,
        first=first,
        number=packing.num_pieces,
    )


def _pieces_first(x_RPL: jax.Array) -> jax.Array:
    return mesh.constrain(x_RPL, mesh.BATCH, None, None).swapaxes(0, 1)


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Entries of the flattened array, 0 where the index is -1; placed as the index is."""
    flat = mesh.replicated(x).reshape(-1)
    spec = [mesh.BATCH, None] if index.ndim == 2 else [None, mesh.BATCH, None]
    found = flat.at[jnp.maximum(index, 0)].get(out_sharding=mesh.out(*spec))
    return jnp.where(index >= 0, found, jnp.zeros((), flat.dtype))


def _rows(tree: Any, packing: Packing | None) -> Any:
    """What was found piece by piece, [P, B, T], as rows of the batch; 0 where nothing was."""
    if packing is None:
        return objective.join(tree)
    return jax.tree.map(lambda x: _taken(x, packing.place_BT), tree)


def teacher_states(
    teacher: Params, pieces: Pieces, *, cfg: ObjectiveConfig
) -> Float[Array, "P B T E"]:
    """The teacher's hidden states at all positions of all pieces, without gradient."""
    return _scan(lambda carry, piece: (carry, _teacher(teacher, piece, cfg)), None, pieces)[1]


def _teacher(teacher: Params, piece: Pieces, cfg: ObjectiveConfig):
    assert cfg.teacher is not None
    inputs = (piece.ids, piece.positions, piece.valid)
    states_BTE, _ = transformer.hidden(teacher, *inputs, cfg=cfg.teacher, first_BT=piece.first)
    return lax.stop_gradient(states_BTE)


def _student(params: Params, piece: Pieces, cfg: ObjectiveConfig):
    """Hidden states and the load of the experts, None where there are none."""
    inputs = (piece.ids, piece.positions, piece.valid, piece.written)
    hs_BTD, _, load = transformer.hidden_head_and_load(
        params, *inputs, cfg=cfg.student, first_BT=piece.first
    )
    return hs_BTD, load


def measured(
    params: Params,
    teacher: Params,
    pieces: Pieces,
    packing: Packing | None,
    states: Float[Array, "P B T E"] | None,
    *,
    cfg: ObjectiveConfig,
) -> TokenKL:
    """Measurements of all positions that the pieces ask for, in rows of the batch, no gradient."""
    assert cfg.teacher is not None
    heads = transformer.head(params, cfg.student), transformer.head(teacher, cfg.teacher)

    def one(carry, given):
        piece, states_BTE = given
        if states_BTE is None:
            states_BTE = _teacher(teacher, piece, cfg)
        hs_BTD, _ = _student(params, piece, cfg)
        _, tokens = kl.weighted_kl(
            hs_BTD,
            heads[0],
            states_BTE,
            heads[1],
            piece.weight,
            spec=cfg.kl,
            measure_BT=piece.measure,
            labels_BT=piece.labels,
        )
        return carry, tokens

    return _rows(_scan(one, None, pieces, states)[1], packing)


def gradients(
    params: Params,
    teacher: Params | None,
    pieces: Pieces,
    packing: Packing | None,
    states: Float[Array, "P B T E"] | None,
    scale: jax.Array,
    *,
    cfg: ObjectiveConfig,
) -> tuple[Params, Float[Array, ""], TokenKL, moe.Load | None]:
    """Gradient of the loss, the loss, what was measured on the way in rows of the batch, the load.

    Args:
      params: of the student.
      teacher: None where nothing compares with it.
      pieces: see :func:`of`.
      packing: of the batch.
      states: of the teacher, from :func:`teacher_states`; computed piece by piece where None.
      scale: what every weight is multiplied by.
      cfg: static.

    **Sharding**: the gradient as the parameters. The gathered heads and the sums of the head's
    gradient, f32, stay on every device throughout; a frozen head has none.
    """
    trained, name = lora.trained(params), "embed" if cfg.student.tied else "head"
    head_VD, head_VE = transformer.head(params, cfg.student), None
    if cfg.teacher is not None and teacher is not None and cfg.kl.ce < 1:
        head_VE = transformer.head(teacher, cfg.teacher)
    body = {key: w for key, w in trained.items() if key != "head"}
    apart = {key: w for key, w in trained.items() if key == "head"}
    # Every piece needs the counts of all, which a single one has.
    is_first_counted = cfg.load_balance > 0 and pieces.ids.shape[0] > 1
    whole = counted(params, pieces, cfg=cfg) if is_first_counted else None

    def one(carry, given):
        grads, sums_SVD, loss, load = carry
        piece, states_BTE = given
        if states_BTE is None and teacher is not None and cfg.kl.ce < 1:
            states_BTE = _teacher(teacher, piece, cfg)

        def forward(moved):
            hs_BTD, more = _student(lora.with_trained(params, moved | apart), piece, cfg)
            added = jnp.zeros((), jnp.float32)
            if cfg.load_balance:
                assert more is not None
                added += cfg.load_balance * moe.imbalance(more, more if whole is None else whole)
            return (hs_BTD, added), more

        (hs_BTD, added), back, new_load = jax.vjp(forward, body, has_aux=True)
        total, tokens, dhs_BTD, sums_SVD = kl.accumulated_kl(
            hs_BTD,
            head_VD,
            states_BTE,
            head_VE,
            piece.weight * scale,
            sums_SVD,
            spec=cfg.kl,
            measure_BT=piece.measure,
            labels_BT=piece.labels,
        )
        (new,) = back((dhs_BTD, jnp.ones((), jnp.float32)))
        grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new)
        load = None if load is None else load + new_load
        return (grads, sums_SVD, loss + total + added, load), tokens

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), body)
    sums_SVD = kl.head_sums(head_VD) if name in trained else None
    begin = (zeros, sums_SVD, jnp.zeros((), jnp.float32), _no_load(cfg))
    (grads, sums_SVD, loss, load), tokens = _scan(one, begin, pieces, states)
    if sums_SVD is not None:
        gradient_VD = kl.head_gradient(sums_SVD)
        grads[name] = grads[name] + gradient_VD if name in grads else gradient_VD
    return grads, loss, _rows(tokens, packing), load


def counted(params: Params, pieces: Pieces, *, cfg: ObjectiveConfig) -> moe.Load:
    """How all pieces spread over the student's experts, without gradient.

    **Sharding**: the result everywhere.
    """

    def one(load, piece):
        return load + _student(params, piece, cfg)[1], ()

    load = _scan(one, _no_load(cfg), pieces)[0]
    return jax.tree.map(lax.stop_gradient, load)


def _no_load(cfg: ObjectiveConfig) -> moe.Load | None:
    experts = cfg.student.experts
    if not cfg.student.has_experts or experts is None:
        return None
    none_X, zero = jnp.zeros(experts.num, jnp.float32), jnp.zeros((), jnp.float32)
    return moe.Load(count_X=none_X, prob_X=none_X, num=zero)


def _scan(function: Callable[..., Any], carry: Any, pieces: Pieces, *states: Any):
    """``lax.scan`` over the pieces that hold something; results of the others are 0.

    The function is given a piece, or a tuple of it and ``states``. A loop of one round is none:
    XLA for TPU takes the layers out of it and keeps them in it, too.
    """
    number, whole = pieces.number, (pieces.replace(number=None), *states)
    whole = whole if states else whole[0]
    total = pieces.ids.shape[0]
    if total == 1:
        carry, out = function(carry, jax.tree.map(lambda x: x[0], whole))
        return carry, jax.tree.map(lambda x: x[None], out)
    if number is None:
        return lax.scan(function, carry, whole)

    def at(i):
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), whole)

    def room(out):
        rest = [None] * (out.ndim - 1)
        place = mesh.out(None, mesh.BATCH, *rest)
        return jnp.zeros((total, *out.shape), out.dtype, out_sharding=place)

    def body(i, state):
        carry, outs = state
        carry, out = function(carry, at(i))
        put = lambda x, new: lax.dynamic_update_index_in_dim(x, new, i, 0)  # noqa: E731
        return carry, jax.tree.map(put, outs, out)

    outs = jax.tree.map(room, jax.eval_shape(lambda c: function(c, at(0))[1], carry))
    with rounds.expected(total):
        return lax.fori_loop(0, number, body, (carry, outs))
