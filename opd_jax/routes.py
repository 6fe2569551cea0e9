"""Several teachers of one vocabulary: each row of a batch has its own, ``Rollout.teacher_B``.

A teacher that has no row of a micro-batch is not run over it; one that has any reads all its rows,
of which only its own are kept. What is measured of a row is measured against its teacher alone: one
sweep over the vocabulary for each, over the positions of its rows.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from opd_jax import kl, mesh
from opd_jax.models import transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.pytrees import Params, TokenKL


def hidden(
    teachers: Sequence[Params],
    teacher_B: Int[Array, " B"],
    inputs: tuple[Int[Array, "B T"], Int[Array, "B T"], Bool[Array, "B T"]],
    *,
    cfgs: Sequence[ModelConfig],
) -> Float[Array, "B T E"]:
    """Hidden states of each row under its own teacher.

    Args:
      teachers: parameters of all.
      teacher_B: place of each row's teacher among them.
      inputs: ids, positions and validity, as ``transformer.hidden`` takes them.
      cfgs: static, of all teachers, of one compute dtype.

    Returns:
      [B, T, E] as wide as the widest teacher; of a narrower one zeros follow its states.

    **Sharding**: batch rows over ``data`` and ``fsdp``.
    """
    shape = (*inputs[0].shape, max(cfg.width for cfg in cfgs))
    found_BTE = mesh.constrain(jnp.zeros(shape, cfgs[0].compute_dtype), mesh.BATCH, None, None)
    for place, (params, cfg) in enumerate(zip(teachers, cfgs, strict=True)):
        is_own_B = teacher_B == place
        run = functools.partial(_with_own, params, inputs, is_own_B, cfg=cfg)
        found_BTE = jax.lax.cond(jnp.any(is_own_B), run, lambda x: x, found_BTE)
    return found_BTE


def _with_own(params: Params, inputs, is_own_B, found_BTE, *, cfg: ModelConfig):
    """The states found so far, and in the rows of one teacher its own."""
    own_BTE, _ = transformer.hidden(params, *inputs, cfg=cfg)
    missing = found_BTE.shape[-1] - cfg.width
    if missing:
        own_BTE = jnp.pad(own_BTE, ((0, 0), (0, 0), (0, missing)))
    own_BTE = mesh.constrain(own_BTE, mesh.BATCH, None, None)
    return jnp.where(is_own_B[:, None, None], own_BTE, found_BTE)


def weighted_kl(
    hs_BTD: Float[Array, "B T D"],
    ws_VD: Float[Array, "V D"],
    ht_BTE: Float[Array, "B T E"],
    heads: Sequence[Float[Array, "V E"]],
    teacher_B: Int[Array, " B"],
    weight_BT: Float[Array, "B T"],
    *,
    spec: kl.KLSpec,
    measure_BT: Bool[Array, "B T"],
    labels_BT: Int[Array, "B T"],
) -> tuple[Float[Array, ""], TokenKL]:
    """:func:`kl.weighted_kl` of each row against its own teacher, added up.

    Args:
      hs_BTD, ws_VD, weight_BT, spec, measure_BT, labels_BT: see there.
      ht_BTE: states that :func:`hidden` gave.
      heads: of all teachers.
      teacher_B: place of each row's teacher among them.

    Sharding: as there.
    """
    parts = []
    for place, head_VE in enumerate(heads):
        is_own_BT = (teacher_B == place)[:, None]
        parts.append(
            kl.weighted_kl(
                hs_BTD,
                ws_VD,
                ht_BTE[..., : head_VE.shape[1]],
                head_VE,
                jnp.where(is_own_BT, weight_BT, 0.0),
                spec=spec,
                measure_BT=measure_BT & is_own_BT,
                labels_BT=labels_BT,
            )
        )
    # What one sweep does not measure reads 0 in it, so that sums hold the measured value itself.
    return functools.reduce(functools.partial(jax.tree.map, operator.add), parts)


def order(teacher_B: Int[Array, " B"], pieces: int) -> Int[Array, " B"]:
    """Places of rows in an order in which micro-batches have the rows of few teachers.

    Of each batch shard's own rows, as :func:`objective.split` deals them: piece by piece their
    teachers follow each other. Undone by the same of ``argsort``: see :func:`taken`.

    **Sharding**: rows over ``data`` and ``fsdp``, as they were; places are within a shard.
    """

    def local(teacher_B):
        by_teacher_B = jnp.argsort(teacher_B, stable=True)
        return by_teacher_B.reshape(pieces, -1).T.reshape(-1)

    rows = P(mesh.BATCH)
    return mesh.on_shards(local, (rows,), rows)(teacher_B)


def taken(tree, order_B: Int[Array, " B"], *, back: bool = False):
    """Rows of arrays in an order that :func:`order` gave, or ``back`` in the one before."""
    row = P(mesh.BATCH)
    if back:
        order_B = mesh.on_shards(jnp.argsort, (row,), row)(order_B)

    def of(x):
        rows = P(mesh.BATCH, *[None] * (x.ndim - 1))
        return mesh.on_shards(lambda order_B, x: x[order_B], (row, rows), rows)(order_B, x)

    return jax.tree.map(of, tree)
