"""The training and evaluation steps: pure, module-level, jitted, the state donated.

Order inside a step: weights from the old rock state, loss and gradient over
scanned micro-batches, optimizer, then ``rock.update`` and, on its cadence, ``rock.refresh``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from opd_jax import mesh, objective, pieces, rock, routes
from opd_jax.models import lora, moe
from opd_jax.objective import ObjectiveConfig, Targets
from opd_jax.pytrees import Mean, Packing, Params, Rollout, Teacher, TokenKL, TrainState

# Folded into the key of a run for the draws of its steps. The run folds the same key by step for
# rollouts and by 2^32 - 1 for evaluations, and a split key is the same as one folded by 0 or 1.
_STEPS = 2**32 - 2
_PROGRAMS = ("teacher_states", "distill_step", "off_policy_step", "eval_step")
# Each program counts itself while it is traced. jit's own cache would not do: under a mesh it also
# counts new entries that share a compiled program.
_traced: collections.Counter[str] = collections.Counter()


def init(
    params: Params, key: jax.Array, *, cfg: ObjectiveConfig, tx: optax.GradientTransformation
) -> TrainState:
    """Wrap student parameters into a fresh state at step 0 (call under jit to place it).

    Of parameters with adapters those alone are trained, see :mod:`opd_jax.models.lora`.

    The state's key is derived from ``key``, whose folds by step remain for the caller's rollouts.

    **Sharding**: optimizer state follows the parameters, the rest is replicated.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt=tx.init(lora.trained(params)),
        rock=rock.init(cfg.student.vocab_size, cfg=cfg.rock),
        key=jax.random.fold_in(key, _STEPS),
    )


@functools.partial(jax.jit, static_argnames=("cfg",))
def teacher_states(
    teacher: Teacher | None,
    rollout: Rollout,
    seen: Rollout | None = None,
    *,
    cfg: ObjectiveConfig,
    packing: Packing | None = None,
) -> Float[Array, "B T E"] | Float[Array, "P B T E"] | None:
    """Run the teacher over a batch, in micro-batches; see ``objective.teacher_states``.

    ``seen`` is the batch behind prompts of the teacher's own. With a packing, which is that of the
    student's rows and knows no ``seen``, the states are piece by piece, see
    ``pieces.teacher_states``, and so they are handed on. None where ``cfg.kl.ce`` is 1 and no
    weight by position is measured: then nothing compares with the teacher.
    """
    _traced["teacher_states"] += 1
    if teacher is None or (cfg.kl.ce == 1 and not cfg.position.is_measured):
        return None
    if packing is not None:
        assert seen is None
        assert not isinstance(teacher, tuple)
        return pieces.teacher_states(teacher, pieces.of(rollout, None, packing, cfg=cfg), cfg=cfg)
    return _in_pieces(
        lambda piece: objective.teacher_states(teacher, *piece, cfg=cfg),
        (_rows_of(rollout), _rows_of(seen)),
        cfg,
    )


@functools.partial(jax.jit, static_argnames=("cfg", "tx"), donate_argnames=("state",))
def distill_step(
    state: TrainState,
    teacher: Teacher | None,
    rollout: Rollout,
    *,
    cfg: ObjectiveConfig,
    tx: optax.GradientTransformation,
    states_BTE: Float[Array, "B T E"] | Float[Array, "P B T E"] | None = None,
    packing: Packing | None = None,
) -> tuple[TrainState, dict[str, Mean]]:
    """One optimizer step on rollouts of the student, or on completions laid out as such.

    Args:
      state: donated.
      teacher: parameters of the frozen teacher; None where ``cfg.kl.ce`` is 1.
      rollout: the batch; its ids are constants of the gradient.
      cfg, tx: static.
      states_BTE: what :func:`teacher_states` gave for this batch; computed here where None, the
        teacher reading the prompts of the batch.
      packing: of the batch's rows, where they are computed packed; nothing else differs.

    Returns:
      The new state, and measurements as (total, weight) pairs: see :func:`measure` and
      :func:`membership`, with ``loss``, ``grad_norm``, of a student with experts
      ``load_balance_loss`` and ``fullest_expert_share``, where parameters have 16 bits
      ``rounded_share`` (of the entries, updates lost to rounding), and ``nonfinite`` (index in
      :func:`leaf_names` of the first tensor whose gradient is not finite; -1: all are; -2: only the
      loss is not).
    """
    _traced["distill_step"] += 1
    return _step(state, teacher, rollout, states_BTE, packing, cfg, tx)


@functools.partial(jax.jit, static_argnames=("cfg", "tx"), donate_argnames=("state",))
def off_policy_step(
    state: TrainState,
    teacher: Teacher | None,
    batch: Rollout,
    *,
    cfg: ObjectiveConfig,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Mean]]:
    """One optimizer step on given completions: ``cfg.kl`` mixed with ``cfg.kl.ce`` cross-entropy.

    The same computation as :func:`distill_step`; only the origin of the ids differs. With
    ``cfg.kl.ce == 1`` this is supervised fine-tuning and ``teacher`` may be None.
    """
    _traced["off_policy_step"] += 1
    return _step(state, teacher, batch, None, None, cfg, tx)


@functools.partial(jax.jit, static_argnames=("cfg",))
def eval_step(
    params: Params,
    teacher: Teacher,
    rollout: Rollout,
    state: rock.RockState,
    seen: Rollout | None = None,
    *,
    cfg: ObjectiveConfig,
) -> tuple[dict[str, Mean], TokenKL]:
    """Measure KL on rollouts without gradient, every scored position, gated or not.

    ``seen`` is as in :func:`teacher_states`. ``cfg.kl.ce`` does not matter: it belongs to training.
    """
    _traced["eval_step"] += 1
    cfg = dataclasses.replace(cfg, kl=dataclasses.replace(cfg.kl, ce=0.0))
    goal = objective.targets(rollout, state, jax.random.key(0), cfg=cfg)
    # Plain measurement: no position is skipped, whatever the gate would do in training.
    goal = goal.replace(importance_BT=goal.mask_BT.astype(jnp.float32))
    tokens = _measured(params, teacher, rollout, None, goal, None, cfg, seen)
    return measure(rollout, goal, tokens, cfg=cfg), tokens


def _step(state, teacher, rollout, states_BTE, packing, cfg: ObjectiveConfig, tx):
    key = jax.random.fold_in(jax.random.clone(state.key), state.step)
    goal = objective.targets(rollout, state.rock, key, cfg=cfg)
    before = None
    if cfg.position.is_measured:
        before = _measured(state.params, teacher, rollout, states_BTE, goal, packing, cfg)
        goal = objective.targets(rollout, state.rock, jax.random.clone(key), cfg=cfg, tokens=before)
    norm = objective.normaliser(goal, cfg=cfg)
    scale = 1.0 / jnp.maximum(norm, 1e-9)
    grads, loss, tokens, load = _gradients(
        state.params, teacher, rollout, states_BTE, goal, packing, scale, cfg
    )
    num_trained = jnp.sum(goal.importance_BT > 0, dtype=jnp.float32)
    if before is not None:  # of all positions, and not only of those that are trained on
        tokens, goal = before, goal.replace(importance_BT=goal.mask_BT.astype(jnp.float32))
    trained = lora.trained(state.params)
    updates, opt = tx.update(grads, state.opt, trained)
    new_rock = rock.update(state.rock, goal.ids_BT, tokens.kl_BT, goal.importance_BT, cfg=cfg.rock)
    if cfg.rock.is_refreshed:
        new_rock = jax.lax.cond(
            new_rock.step % cfg.rock.every == 0,
            functools.partial(rock.refresh, cfg=cfg.rock),
            lambda r: r,
            new_rock,
        )
    metrics = measure(rollout, goal, tokens, cfg=cfg, packing=packing)
    metrics |= membership(state.rock, new_rock)
    metrics |= {
        "loss": Mean(loss * norm, norm),
        "grad_norm": Mean.of(optax.tree.norm(grads)),
        "nonfinite": Mean.of(_first_nonfinite(loss, grads)),
    }
    if load is not None:
        metrics |= _spread(load)
    if cfg.position.mode != "off":
        metrics |= _budget(goal, num_trained, is_measured=before is not None)
    moved = optax.apply_updates(trained, updates)
    if any(p.dtype.itemsize < 4 for p in jax.tree.leaves(trained)):
        metrics["rounded_share"] = _rounded(trained, updates, moved)
    state = state.replace(
        step=state.step + 1,
        params=lora.with_trained(state.params, moved),
        opt=opt,
        rock=new_rock,
    )
    return state, metrics


def _gradients(
    params, teacher, rollout, states_BTE, goal: Targets, packing, scale, cfg: ObjectiveConfig
):
    """Gradient of the scaled loss, that loss, the measurements of each position, and the load."""
    states_BTE = states_BTE if cfg.kl.ce < 1 else None
    # On one batch shard nothing is gathered, and nothing is won by keeping the head apart. Several
    # teachers have a head each, of which a piece needs those of its rows.
    is_apart = cfg.microbatches > 1 and mesh.size(mesh.BATCH) > 1 and not cfg.others
    if packing is not None or is_apart:
        assert not isinstance(teacher, tuple)
        if packing is None and states_BTE is not None:
            states_BTE = objective.split(states_BTE, cfg.microbatches)
        parts = pieces.of(rollout, goal, packing, cfg=cfg)
        return pieces.gradients(params, teacher, parts, packing, states_BTE, scale, cfg=cfg)
    trained = lora.trained(params)
    has_experts = cfg.student.has_experts
    whole = None
    if cfg.load_balance and cfg.microbatches > 1:  # every piece needs the counts of all
        whole = pieces.counted(params, pieces.of(rollout, goal, None, cfg=cfg), cfg=cfg)

    def micro(grads, piece):
        rollout, goal, states_BTE = piece
        if states_BTE is None and teacher is not None and cfg.kl.ce < 1:
            states_BTE = objective.teacher_states(teacher, rollout, cfg=cfg)

        def scaled(moved):
            total, tokens, load = objective.weighted_loss_and_load(
                lora.with_trained(params, moved), teacher, states_BTE, rollout, goal,
                cfg=cfg, is_counted=has_experts,
            )  # fmt: skip
            loss = total * scale
            if cfg.load_balance:
                assert load is not None
                loss += cfg.load_balance * moe.imbalance(load, load if whole is None else whole)
            return loss, (tokens, load)

        (loss, (tokens, load)), new = jax.value_and_grad(scaled, has_aux=True)(trained)
        grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new)
        return grads, (loss, tokens, load)

    batch = (_rows_of(rollout), goal, states_BTE)
    if cfg.microbatches == 1:
        zeros = jax.tree.map(lambda p: jnp.zeros((), p.dtype), trained)
        grads, (loss, tokens, load) = micro(zeros, batch)
        return grads, loss, tokens, load
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), trained)
    grads, (losses, tokens, loads) = jax.lax.scan(
        micro, zeros, objective.split(batch, cfg.microbatches)
    )
    load = jax.tree.map(lambda x_N: jnp.sum(x_N, axis=0), loads)
    return grads, jnp.sum(losses), objective.join(tokens), load


def _measured(
    params, teacher, rollout, states_BTE, goal: Targets, packing, cfg: ObjectiveConfig, seen=None
) -> TokenKL:
    """Measure all scored positions, without gradient."""
    cfg = dataclasses.replace(cfg, kl=dataclasses.replace(cfg.kl, beside=cfg.position.beside))
    goal = goal.replace(importance_BT=goal.mask_BT.astype(jnp.float32))
    if packing is not None:
        assert seen is None
        assert not isinstance(teacher, tuple)
        parts = pieces.of(rollout, goal, packing, cfg=cfg)
        return pieces.measured(params, teacher, parts, packing, states_BTE, cfg=cfg)

    def piece_of(piece):
        rollout, goal, states_BTE, seen = piece
        if states_BTE is None:
            states_BTE = objective.teacher_states(teacher, rollout, seen, cfg=cfg)
        return objective.weighted_loss(params, teacher, states_BTE, rollout, goal, cfg=cfg)[1]

    return _in_pieces(piece_of, (_rows_of(rollout), goal, states_BTE, _rows_of(seen)), cfg)


def _rows_of(rollout: Rollout | None) -> Rollout | None:
    """What has rows of a batch, to be split into pieces."""
    return None if rollout is None else rollout.replace(policy_step=None)


def _spread(load: moe.Load) -> dict[str, Mean]:
    """Of a student with experts: the load-balancing loss, and the share that the fullest one got.

    Both over all tokens and layers of the step; the share is 1 / experts at its least.
    """
    most = jnp.max(load.count_X)
    return {
        "load_balance_loss": Mean.of(moe.imbalance(load, load)),
        "fullest_expert_share": Mean(most, jnp.sum(load.count_X)),
    }


def _in_pieces(function, whole, cfg: ObjectiveConfig):
    """The function of a batch, row by row the same in micro-batches, which are one loop.

    ``whole`` begins with the rollout. Where there are several teachers, a piece has rows of few of
    them, so that few are run over it.

    A loop of one round is none: XLA for TPU takes the layers out of it and keeps them in it, too.
    """
    if cfg.microbatches == 1:
        return function(whole)
    order_B = None
    if whole[0].teacher_B is not None:
        order_B = routes.order(whole[0].teacher_B, cfg.microbatches)
        whole = routes.taken(whole, order_B)
    found = objective.join(jax.lax.map(function, objective.split(whole, cfg.microbatches)))
    return found if order_B is None else routes.taken(found, order_B, back=True)


def _budget(goal: Targets, num_trained, *, is_measured: bool) -> dict[str, Mean]:
    """What weights by position cost: the kept share, and products with the heads.

    Training takes four products per projected position (both heads, and the student's twice more
    for the gradient), measuring before two for each scored one; 1 is training on all of them.
    """
    num_scored = jnp.sum(goal.mask_BT, dtype=jnp.float32)
    kept = jnp.sum(goal.weight_BT != 0, dtype=jnp.float32)
    products = 4 * num_trained + (2 * num_scored if is_measured else 0)
    return {"kept_share": Mean(kept, num_scored), "head_products": Mean(products, 4 * num_scored)}


def measure(
    rollout: Rollout,
    goal: Targets,
    tokens: TokenKL,
    *,
    cfg: ObjectiveConfig,
    packing: Packing | None = None,
) -> dict[str, Mean]:
    """Per-token means of a batch, each an unbiased estimate where positions were skipped.

    ``kl_nats`` is the reverse KL at temperature 1 over all scored tokens, whatever is trained on
    and whatever is gated; ``kl_gated`` and ``kl_ungated`` split it by what the gate means, from the
    first step on. ``gated_share`` (of positions) and ``gated_kl_share`` (of that KL) count what it
    acts on now; ``gate_weight`` is the mean weight; ``stop_kl_share`` is the share of that KL where
    an answer ends; ``padding_share`` that of the batch's columns which hold neither prompt nor
    answer, or of the packed columns that are computed. Where cross-entropy is trained on,
    ``cross_entropy_nats`` is that; without a teacher (``cfg.kl.ce == 1``) what compares with one is
    left out. Where there are several, ``kl_nats/NAME`` is that of the rows of each.
    """
    seen_BT = goal.importance_BT
    is_stop_BT = jnp.isin(goal.ids_BT, jnp.array(cfg.stop_ids, jnp.int32))
    is_changed_BT = goal.weight_BT != goal.mask_BT

    def mean(x_BT, over_BT=seen_BT):
        return Mean(jnp.sum(x_BT * over_BT), jnp.sum(over_BT))

    scored_BT = goal.mask_BT.astype(jnp.float32)
    num_rows = jnp.asarray(scored_BT.shape[0], jnp.float32)
    slots = rollout.ids_BT.shape[1]
    used = jnp.sum(jnp.maximum(objective.ends(rollout) - rollout.start_B, 0), dtype=jnp.float32)
    columns = num_rows * slots
    if packing is not None:
        used = jnp.sum(packing.place_BT >= 0, dtype=jnp.float32)
        rows, _, width = packing.source_RPL.shape
        columns = packing.num_pieces.astype(jnp.float32) * (rows * width)
    against_teacher = {
        "kl_nats": mean(tokens.reverse_BT),
        "kl_gated": mean(tokens.reverse_BT, seen_BT * goal.gated_BT),
        "kl_ungated": mean(tokens.reverse_BT, seen_BT * ~goal.gated_BT),
        "gated_kl_share": mean(is_changed_BT.astype(jnp.float32), seen_BT * tokens.reverse_BT),
        "stop_kl_share": mean(is_stop_BT.astype(jnp.float32), seen_BT * tokens.reverse_BT),
        "teacher_entropy_nats": mean(tokens.teacher_entropy_BT),
    }
    if rollout.teacher_B is not None:
        for place, name in enumerate(cfg.names):
            is_own_BT = (rollout.teacher_B == place)[:, None]
            against_teacher[f"kl_nats/{name}"] = mean(tokens.reverse_BT, seen_BT * is_own_BT)
    imitated = {"cross_entropy_nats": mean(-tokens.logp_BT)} if cfg.kl.ce > 0 else {}
    return (
        (against_teacher if cfg.kl.ce < 1 else {})
        | imitated
        | {
            "divergence": mean(tokens.kl_BT),
            "student_entropy_nats": mean(tokens.entropy_BT),
            "gated_share": mean(is_changed_BT.astype(jnp.float32), scored_BT),
            "gate_weight": mean(goal.weight_BT, scored_BT),
            "projected_share": mean((seen_BT > 0).astype(jnp.float32), scored_BT),
            "length_tokens": Mean(jnp.sum(scored_BT), num_rows),
            "truncated_share": Mean(jnp.sum(rollout.truncated_B, dtype=jnp.float32), num_rows),
            "padding_share": Mean(columns - used, columns),
        }
    )


def membership(old: rock.RockState, new: rock.RockState) -> dict[str, Mean]:
    """How the set of gated types moved: its size, who came, who went, Jaccard of both sets.

    The Jaccard index is that of two sets of which at least one has members, else without weight.
    """
    count = lambda chosen_V: jnp.sum(chosen_V, dtype=jnp.float32)  # noqa: E731
    was_V, is_V = old.member_V, new.member_V
    return {
        "rock_members": Mean.of(count(is_V)),
        "rock_entries": Mean.of(count(is_V & ~was_V)),
        "rock_exits": Mean.of(count(was_V & ~is_V)),
        "rock_jaccard": Mean(count(is_V & was_V), count(is_V | was_V)),
    }


def leaf_names(params: Params) -> list[str]:
    """Names of the trained tensors in the order that ``nonfinite`` counts them."""
    paths = jax.tree_util.tree_leaves_with_path(lora.trained(params))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def _rounded(old, updates, new) -> Mean:
    """Share of the entries that an update was to move and that are where they were."""
    total = weight = jnp.zeros((), jnp.float32)
    for x, u, y in zip(*(jax.tree.leaves(tree) for tree in (old, updates, new)), strict=True):
        total += jnp.sum((u != 0) & (x == y), dtype=jnp.float32)
        weight += jnp.sum(u != 0, dtype=jnp.float32)
    return Mean(total, weight)


def _first_nonfinite(loss, grads):
    """Index of the first gradient tensor with a NaN or infinity; -1: none; -2: the loss alone."""
    bad = jnp.stack([~jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)])
    rest = jnp.where(jnp.isfinite(loss), -1, -2)
    return jnp.where(jnp.any(bad), jnp.argmax(bad), rest)


def programs() -> dict[str, int]:
    """How often each step has been traced, hence compiled, in this process."""
    return {name: _traced[name] for name in _PROGRAMS}
