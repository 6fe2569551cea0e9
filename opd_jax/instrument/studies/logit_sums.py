r"""Sums of the exact gradient of the reverse KL with respect to the student's logits.

At a position with student distribution :math:`p` and teacher distribution :math:`q` over the full
vocabulary the gradient is, entry by entry (arXiv 2605.09253, section 2),

.. math:: g_u = p_u \left(\log\frac{p_u}{q_u} - KL(p\|q)\right), \qquad \sum_u g_u = 0,

and that of the output head is the outer product :math:`g h^\top` with the final hidden state. With
a tied embedding it is the part that comes through the output.

The largest arrays are the chunk [C, V] of :mod:`opd_jax.divergence` and the sums asked for.
Everything is summed in f32 from f32 products, whatever the dtype of the models.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from opd_jax import kl, mesh, objective
from opd_jax.divergence import KLSpec, VocabSweep, project
from opd_jax.models import transformer
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Params, Rollout

# What can be summed, and where it lies:
#   global_V    sum of g                    balanced_V  sum of g / occurrences of its type
#   types_KV    sum of g by slot            head_VD     sum of g h^T
Sums = dict[str, jax.Array]
_PLACE = {
    "global_V": P("model"),
    "balanced_V": P("model"),
    "types_KV": P(None, "model"),
    "head_VD": P("model", None),
}
DROPPED = -1  # slot of a position that is not looked at
_PRECISION = "float32"  # of products of f32 on accelerators, which else round their inputs


@functools.partial(jax.jit, static_argnames=("names", "cfg", "slots"))
def zeros(names: tuple[str, ...], *, cfg: ObjectiveConfig, slots: int = 0) -> Sums:
    """Empty sums of these names, in place."""
    ids = cfg.student.vocab_size
    shapes = {
        "global_V": (ids,),
        "balanced_V": (ids,),
        "types_KV": (slots, ids),
        "head_VD": (ids, cfg.student.width),
    }
    return {n: mesh.constrain(jnp.zeros(shapes[n], jnp.float32), *_PLACE[n]) for n in names}


@functools.partial(jax.jit, static_argnames=("cfg",))
def states(
    student: Params, teacher: Params, rollout: Rollout, *, cfg: ObjectiveConfig
) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
    """Final hidden states of both models at the predicting positions."""
    hs_BTD, _ = transformer.hidden(student, *objective.inputs(rollout), cfg=cfg.student)
    return hs_BTD, objective.teacher_states(teacher, rollout, cfg=cfg)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("sums",))
def add_rollout(
    sums: Sums,
    student: Params,
    teacher: Params,
    rollout: Rollout,
    slot_BT: Int[Array, "B T"],
    inverse_BT: Float[Array, "B T"],
    *,
    cfg: ObjectiveConfig,
) -> tuple[Sums, Float[Array, "B T"]]:
    """Run both models over a batch and :func:`add` its positions (T here is one less than ids)."""
    hs_BTD, ht_BTE = states(student, teacher, rollout, cfg=cfg)
    heads = _heads(student, teacher, cfg)
    return add(sums, hs_BTD, heads[0], ht_BTE, heads[1], slot_BT, inverse_BT, spec=cfg.kl)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("sums",))
def add_states(
    sums: Sums,
    student: Params,
    teacher: Params,
    hs_RD: Float[Array, "R D"],
    ht_RE: Float[Array, "R E"],
    slot_R: Int[Array, " R"],
    *,
    cfg: ObjectiveConfig,
) -> Sums:
    """:func:`add` positions whose hidden states are there, with weight 1 in every sum."""
    heads = _heads(student, teacher, cfg)
    inverse_R1 = jnp.ones_like(slot_R, jnp.float32)[:, None]
    rows = hs_RD[:, None], heads[0], ht_RE[:, None], heads[1], slot_R[:, None], inverse_R1
    return add(sums, *rows, spec=cfg.kl)[0]


def _heads(student: Params, teacher: Params, cfg: ObjectiveConfig):
    assert cfg.teacher is not None
    return transformer.head(student, cfg.student), transformer.head(teacher, cfg.teacher)


def add(
    sums: Sums,
    hs_BTD: Float[Array, "B T D"],
    ws_VD: Float[Array, "V D"],
    ht_BTE: Float[Array, "B T E"],
    wt_VE: Float[Array, "V E"],
    slot_BT: Int[Array, "B T"],
    inverse_BT: Float[Array, "B T"],
    *,
    spec: KLSpec,
) -> tuple[Sums, Float[Array, "B T"]]:
    """Add the positions whose slot is not ``DROPPED`` to every sum that is there.

    Args:
      sums: see ``Sums``.
      hs_BTD, ws_VD, ht_BTE, wt_VE: final hidden states and heads.
      slot_BT: row of ``types_KV``; without that sum any number from 0 on.
      inverse_BT: f32, weight in ``balanced_V``.
      spec: which ids are real, and the size of a chunk; the divergence is the reverse KL at
        temperature 1.

    Returns:
      The sums, and the squared norm of g at every position, 0 where dropped.

    **Sharding**: hidden states and positions over the batch axes, vocabulary over ``model``; each
    sum is reduced over the batch once per call.
    """
    if not spec.is_default_divergence:
        raise ValueError(
            f"kl is {spec.direction!r} at temperature {spec.temperature} with ce {spec.ce}: "
            "expected 'reverse' at 1 without cross-entropy, whose gradient this is; pass "
            "KLSpec(vocab_size=)"
        )
    local = functools.partial(_local, spec, mesh.is_active())
    if not mesh.is_active():
        return local(sums, hs_BTD, ws_VD, ht_BTE, wt_VE, slot_BT, inverse_BT)
    rows, tokens, heads = P(mesh.BATCH, None, None), P(mesh.BATCH, None), P("model", None)
    places = {name: _PLACE[name] for name in sums}
    return jax.shard_map(
        local,
        in_specs=(places, rows, heads, rows, heads, tokens, tokens),
        out_specs=(places, tokens),
        check_vma=False,
    )(sums, hs_BTD, ws_VD, ht_BTE, wt_VE, slot_BT, inverse_BT)


def _local(spec, is_sharded, sums, hs_BTD, ws_VD, ht_BTE, wt_VE, slot_BT, inverse_BT):
    """Loop over the kept rows of one shard."""
    num_rows, num_ids = slot_BT.size, ws_VD.shape[0]
    hs_RD, ht_RE = hs_BTD.reshape(num_rows, -1), ht_BTE.reshape(num_rows, -1)
    slot_R, inverse_R = slot_BT.ravel(), inverse_BT.ravel()
    chunk = min(spec.chunk or kl.auto_chunk(num_ids), num_rows)
    first_id = lax.axis_index("model") * num_ids if is_sharded else 0
    over_vocab = ("model",) if is_sharded else ()
    order_R, num_kept = kl.kept_first(slot_R != DROPPED, chunk)

    def body(i, carry):
        sums, square_R = carry
        index_C = lax.dynamic_slice(order_R, (i * chunk,), (chunk,))
        pick = functools.partial(jnp.take, indices=index_C, axis=0, mode="fill", fill_value=0)
        hs_CD = pick(hs_RD)
        logits = project(hs_CD, ws_VD), project(pick(ht_RE), wt_VE)
        rows = VocabSweep(spec, *logits, first_id=first_id, over_vocab=over_vocab)
        weight_C = (index_C < num_rows).astype(jnp.float32)
        new = dict(sums)
        if "head_VD" in sums:
            g_CV, new["head_VD"] = rows.gradient(
                weight_C, hs_CD.astype(jnp.float32), sums["head_VD"]
            )
        else:
            g_CV, _ = rows.gradient(weight_C)
        if "global_V" in sums:
            new["global_V"] += jnp.sum(g_CV, axis=0)
        if "balanced_V" in sums:
            new["balanced_V"] += pick(inverse_R) @ g_CV
        if "types_KV" in sums:
            new["types_KV"] = sums["types_KV"].at[pick(slot_R)].add(g_CV, mode="drop")
        square_C = jnp.sum(jnp.square(g_CV), axis=1)
        square_C = lax.psum(square_C, over_vocab) if over_vocab else square_C
        return new, square_R.at[index_C].set(square_C, mode="drop")

    if is_sharded:  # the sums so far are counted by one batch shard
        is_first = lax.axis_index(mesh.BATCH) == 0
        sums = jax.tree.map(lambda x: jnp.where(is_first, x, 0.0), sums)
    with jax.default_matmul_precision(_PRECISION):
        carry = sums, jnp.zeros(num_rows, jnp.float32)
        sums, square_R = lax.fori_loop(0, -(-num_kept // chunk), body, carry)
    if is_sharded:
        sums = lax.psum(sums, mesh.BATCH)
    return sums, square_R.reshape(slot_BT.shape)


@jax.jit
def compare_types(
    types_KV: Float[Array, "K V"], scale_K: Float[Array, " K"], whole_V: Float[Array, " V"]
) -> dict[str, Float[Array, " K"]]:
    """Each type's part, ``scale_K * types_KV``, beside the whole it is a part of.

    Returns:
      ``norm`` of the part, its inner product ``dot`` with the whole and ``rest_dot`` with the whole
      less the part, and the latter's norm ``rest_norm``.
    """
    part_KV = types_KV * scale_K[:, None]
    rest_KV = whole_V[None, :] - part_KV
    return {
        "norm": jnp.sqrt(jnp.sum(jnp.square(part_KV), axis=1)),
        "dot": jnp.sum(part_KV * whole_V[None, :], axis=1),
        "rest_dot": jnp.sum(part_KV * rest_KV, axis=1),
        "rest_norm": jnp.sqrt(jnp.sum(jnp.square(rest_KV), axis=1)),
    }


@jax.jit
def norm_and_dot(
    part_VD: Float[Array, "V D"], whole_VD: Float[Array, "V D"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Norm of one head gradient, and its inner product with another."""
    return jnp.sqrt(jnp.sum(jnp.square(part_VD))), jnp.sum(part_VD * whole_VD)
