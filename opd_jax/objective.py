r"""The one place that aligns "the hidden state at t predicts the id at t+1".

.. math:: L = \frac{1}{Z} \sum_{b,t} w(y_{b,t})\; m_{b,t}\;
          D\big(\pi_\theta(\cdot|y_{b,<t})\,\|\,\pi_T(\cdot|y_{b,<t})\big)

with m marking ids that the student sampled, w the rock gate keyed on the *predicted* id, D the
divergence of :mod:`opd_jax.kl`, and Z one number for the whole optimizer step. Two settings depart
from this to reproduce published code: ``rock.key="input"`` and ``normaliser="per_sequence"``.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from opd_jax import kl, mesh, position, rock, routes, rules
from opd_jax.kl import KLSpec
from opd_jax.models import moe, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.position import PositionSpec
from opd_jax.pytrees import Mean, Params, RockState, Rollout, Teacher, TokenKL
from opd_jax.rock import RockConfig

NORMALISERS = ("tokens", "weight", "per_sequence")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Everything static that the loss depends on.

    Attributes:
      student, teacher: model configurations; the teacher may be None where ``kl.ce`` is 1.
      kl: the divergence.
      rock: the gate of types.
      position: weights by position, which multiply those of the gate.
      normaliser: Z: ``tokens``, all scored tokens, so that gating does not change the step size;
        ``weight``, the sum of the weights; or ``per_sequence``, the mean over sequences of
        sum(w D) / max(sum w, 1), where a token of a short or much gated answer counts more: what
        the code published with arXiv 2605.09253 does, for comparison only. Sequences without a
        scored token do not count.
      microbatches: equal pieces the batch is scanned in; does not change the result.
      load_balance: what the load-balancing loss of a student with experts is multiplied by before
        it is added to the loss (``models.moe``): over all layers and tokens that are no padding, of
        prompts too.
      stop_ids: that end an answer, whose share of the KL is measured.
      others: further teachers; ``Rollout.teacher_B`` says whose a row is, ``teacher`` being 0.
      names: of all teachers, where there are several.
    """

    student: ModelConfig
    teacher: ModelConfig | None
    kl: KLSpec = KLSpec()  # noqa: RUF009 (frozen)
    rock: RockConfig = RockConfig()  # noqa: RUF009 (frozen)
    position: PositionSpec = PositionSpec()  # noqa: RUF009 (frozen)
    normaliser: str = "tokens"
    microbatches: int = 1
    load_balance: float = 0.0
    stop_ids: tuple[int, ...] = ()
    others: tuple[ModelConfig, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def teachers(self) -> tuple[ModelConfig, ...]:
        """All teachers, in order; () without one."""
        return () if self.teacher is None else (self.teacher, *self.others)

    def __post_init__(self):
        rules.check(
            self,
            "train",
            ("normaliser", self.normaliser in NORMALISERS, f"one of {NORMALISERS}"),
            ("microbatches", self.microbatches >= 1, "at least 1"),
            ("load_balance", self.load_balance >= 0, "at least 0 (0: not trained on)"),
        )


class Predicted(struct.PyTreeNode):
    """What the T-1 positions that predict something predict; numpy or JAX, as the rollout was."""

    ids_BT: jax.Array  # [B, T-1] i32, the predicted id
    given_BT: jax.Array  # [B, T-1] i32, the id that stands at the position
    mask_BT: jax.Array  # [B, T-1] bool, the predicted id was sampled and is scored


def predicted(rollout: Rollout) -> Predicted:
    """The alignment: position t stands for the id at t+1, whether it is one of the answer's."""
    ids_BT = rollout.ids_BT
    return Predicted(ids_BT[:, 1:], ids_BT[:, :-1], rollout.mask_BT[:, 1:])


class Targets(struct.PyTreeNode):
    """What is predicted at each of the T-1 positions that predict something."""

    ids_BT: jax.Array  # [B, T-1] i32, the predicted id
    mask_BT: jax.Array  # [B, T-1] bool, that id was sampled and is scored
    gated_BT: jax.Array  # [B, T-1] bool, the gate means this position, whatever its weight now
    weight_BT: jax.Array  # [B, T-1] f32, gate weight, 0 off the mask
    importance_BT: jax.Array  # [B, T-1] f32, what a measurement there stands for, 0: not measured


def inputs(
    rollout: Rollout,
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Bool[Array, "B T"]]:
    """Model inputs of the predicting positions: ids, positions and validity, each [B, T-1]."""
    ids_BT = predicted(rollout).given_BT
    valid_BT = jnp.arange(ids_BT.shape[1])[None, :] >= rollout.start_B[:, None]
    return ids_BT, transformer.positions(valid_BT), valid_BT


def targets(
    rollout: Rollout,
    state: RockState,
    key: jax.Array,
    *,
    cfg: ObjectiveConfig,
    tokens: TokenKL | None = None,
) -> Targets:
    """Shift ids and mask by one, and look up weights from the rock state as it was before.

    Args:
      rollout: the batch.
      state: of the rocks.
      key: draws the randomly gated and the probed positions; draw once per optimizer step, before
        any split.
      cfg: static.
      tokens: measurements of all scored positions, where weights by position follow from them;
        without them those weights are 1.
    """
    next_ = predicted(rollout)
    ids_BT, mask_BT = next_.ids_BT, next_.mask_BT
    gate_key, probe_key = jax.random.split(key)
    key_BT = ids_BT if cfg.rock.key == "label" else next_.given_BT
    gated_BT = rock.gated(state, key_BT, cfg=cfg.rock, key=gate_key) & mask_BT
    weight_BT = rock.weights(state, key_BT, cfg=cfg.rock, gated_BT=gated_BT) * mask_BT
    is_known = not cfg.position.is_measured or tokens is not None
    if cfg.position.mode != "off" and is_known:
        own_key = jax.random.fold_in(gate_key, 1)  # another than that of the gate
        weight_BT *= position.weights(cfg.position, mask_BT, gated_BT, own_key, tokens)
    if tokens is not None:
        importance_BT = (weight_BT != 0).astype(jnp.float32)  # all are measured already
    else:
        importance_BT = rock.importance(weight_BT, mask_BT, probe_key, cfg=cfg.rock)
    return Targets(ids_BT, mask_BT, gated_BT, weight_BT, importance_BT)


def written(rollout: Rollout) -> Bool[Array, "B T"]:
    """Which predicting positions hold a token of the prompt or the answer: no padding."""
    _, _, valid_BT = inputs(rollout)
    return valid_BT & (jnp.arange(valid_BT.shape[1])[None, :] < ends(rollout)[:, None])


def ends(rollout: Rollout) -> Int[Array, " B"]:
    """Column behind the last sampled id of each row; 0 where there is none."""
    slots = rollout.ids_BT.shape[1]
    return jnp.max(jnp.where(rollout.mask_BT, jnp.arange(1, slots + 1)[None, :], 0), axis=1)


def teacher_states(
    teacher: Teacher, rollout: Rollout, seen: Rollout | None = None, *, cfg: ObjectiveConfig
) -> Float[Array, "B T E"]:
    """Hidden states of the frozen teacher at the predicting positions, without gradient.

    Args:
      teacher: its parameters; those of all where there are several.
      rollout: the batch, whose columns the result has.
      seen: the same answers as the teacher reads them, behind prompts of its own: as wide as those
        need, with the answers in the last columns as in the batch. None: it reads the batch.
      cfg: static.

    Returns:
      [B, T-1, E]. Behind prompts of the teacher's own, the columns of an answer are the teacher's
      of the same answer; those of the student's prompt mean nothing, and are never scored. Where
      there are several teachers, each row's are its own teacher's, see :func:`routes.hidden`.

    **Sharding**: batch rows over ``data`` and ``fsdp``.
    """
    assert cfg.teacher is not None
    read = rollout if seen is None else seen
    if isinstance(teacher, tuple):
        assert read.teacher_B is not None
        states_BTE = routes.hidden(teacher, read.teacher_B, inputs(read), cfgs=cfg.teachers)
    else:
        states_BTE, _ = transformer.hidden(teacher, *inputs(read), cfg=cfg.teacher)
    missing = rollout.ids_BT.shape[1] - read.ids_BT.shape[1]
    if missing > 0:
        states_BTE = jnp.pad(states_BTE, ((0, 0), (missing, 0), (0, 0)))
    return jax.lax.stop_gradient(states_BTE[:, max(-missing, 0) :])


def normaliser(goal: Targets, *, cfg: ObjectiveConfig) -> Float[Array, ""]:
    """Z of this batch: scored tokens, summed weights, or sequences with a scored token."""
    counted = {
        "tokens": goal.mask_BT,
        "weight": goal.weight_BT,
        "per_sequence": jnp.any(goal.mask_BT, axis=1),
    }[cfg.normaliser]
    return jnp.sum(counted, dtype=jnp.float32)


def row_weights(goal: Targets, *, cfg: ObjectiveConfig) -> Float[Array, "B T"]:
    """What each divergence is multiplied by: the weight, of its row's where that normalises."""
    weight_BT = goal.weight_BT
    if cfg.normaliser == "per_sequence":
        weight_BT /= jnp.maximum(jnp.sum(weight_BT, axis=1, keepdims=True), 1.0)
    return weight_BT


def weighted_loss(
    params: Params,
    teacher: Teacher | None,
    states_BTE: Float[Array, "B T E"] | None,
    rollout: Rollout,
    goal: Targets,
    *,
    cfg: ObjectiveConfig,
) -> tuple[Float[Array, ""], TokenKL]:
    """:func:`weighted_loss_and_load` without the load."""
    return weighted_loss_and_load(params, teacher, states_BTE, rollout, goal, cfg=cfg)[:2]


def weighted_loss_and_load(
    params: Params,
    teacher: Teacher | None,
    states_BTE: Float[Array, "B T E"] | None,
    rollout: Rollout,
    goal: Targets,
    *,
    cfg: ObjectiveConfig,
    is_counted: bool = False,
) -> tuple[Float[Array, ""], TokenKL, moe.Load | None]:
    """Sum of weight x divergence over (a micro-batch of) the batch, not yet divided by Z.

    The load of the student's experts is with it where ``is_counted``.

    ``per_sequence`` divides each row's weights by their sum first: rows are never split.
    Gradients flow to ``params`` only; ``states_BTE`` are the teacher's from :func:`teacher_states`.
    """
    counted_BT = written(rollout) if is_counted else None
    hs_BTD, head_VD, load = transformer.hidden_head_and_load(
        params, *inputs(rollout), counted_BT, cfg=cfg.student
    )
    head_VE = None
    if cfg.teacher is not None and teacher is not None and states_BTE is not None:
        head_VE = _head(teacher, cfg)
    weight_BT = row_weights(goal, cfg=cfg)
    measured = {"measure_BT": goal.importance_BT > 0, "labels_BT": goal.ids_BT}
    if isinstance(head_VE, tuple):
        assert states_BTE is not None
        assert rollout.teacher_B is not None
        to_each = (states_BTE, head_VE, rollout.teacher_B, weight_BT)
        total, tokens = routes.weighted_kl(hs_BTD, head_VD, *to_each, spec=cfg.kl, **measured)
    else:
        total, tokens = kl.weighted_kl(
            hs_BTD, head_VD, states_BTE, head_VE, weight_BT, spec=cfg.kl, **measured
        )
    return total, tokens, load


def _head(teacher: Teacher, cfg: ObjectiveConfig):
    """Of the frozen teacher; those of all where there are several."""
    if not isinstance(teacher, tuple):
        assert cfg.teacher is not None
        return jax.lax.stop_gradient(transformer.head(teacher, cfg.teacher))
    pairs = zip(teacher, cfg.teachers, strict=True)
    return tuple(jax.lax.stop_gradient(transformer.head(*pair)) for pair in pairs)


def loss(
    params: Params,
    teacher: Teacher,
    batch: Rollout,
    rock_state: RockState,
    *,
    cfg: ObjectiveConfig,
    key: jax.Array | None = None,
) -> tuple[Mean, TokenKL]:
    """Loss of one batch as ``Mean(sum of weight x divergence, Z)`` with its per-token measurements.

    ``key`` is that of :func:`targets`; without one it is that of seed 0.
    """
    goal = targets(batch, rock_state, jax.random.key(0) if key is None else key, cfg=cfg)
    states_BTE = teacher_states(teacher, batch, cfg=cfg) if cfg.kl.ce < 1 else None
    total, tokens = weighted_loss(params, teacher, states_BTE, batch, goal, cfg=cfg)
    return Mean(total, normaliser(goal, cfg=cfg)), tokens


def split(tree, pieces: int):
    """Reshape ``[B, ...]`` leaves to ``[pieces, B / pieces, ...]``, rows dealt out in turn.

    Dealing keeps every piece spread over all batch shards.

    Raises:
      ValueError: the batch does not divide into the pieces, or a piece over the shards.
    """

    def deal(x):
        rows, shards = x.shape[0], mesh.size(mesh.BATCH)
        if rows % (pieces * shards):
            raise ValueError(
                f"a batch of {rows} rows does not divide into {pieces} micro-batches over {shards} "
                "batch shards: change --config.train.microbatches, --config.train.prompts, "
                "--config.rollout.samples or the mesh"
            )
        rest = x.shape[1:]
        placed = mesh.out(mesh.BATCH, *([None] * x.ndim))
        return jnp.reshape(x, (rows // pieces, pieces, *rest), out_sharding=placed).swapaxes(0, 1)

    return jax.tree.map(deal, tree)


def join(tree):
    """Undo :func:`split`."""

    def gather(x):
        x = x.swapaxes(0, 1)
        placed = mesh.out(mesh.BATCH, *([None] * (x.ndim - 2)))
        return jnp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=placed)

    return jax.tree.map(gather, tree)
