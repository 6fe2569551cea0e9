"""The weights and the state that a run begins with, on its mesh, and their shapes without reading.

Reads what ``assemble`` has checked: the student's folder, or another run's step, and the teacher's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import mesh as meshlib
from opd_jax import optim, steps
from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf, lora, params, resting, transformer
from opd_jax.pytrees import Params, Teacher, TrainState
from opd_jax.run import assemble, precision
from opd_jax.run.assemble import Assembly
from opd_jax.spec import ConfigError, RunConfig, teacher_title
from opd_jax.store import checkpoint, hub
from opd_jax.store import pair as pairs
from opd_jax.store.checkpoint import Checkpoints
from opd_jax.store.pair import Reference

# Folded into the key of a run for fresh adapters; steps of the run fold it by smaller numbers, and
# ``steps`` and evaluations by the two above.
_ADAPTERS = 2**32 - 3


def teacher_params(parts: Assembly) -> Teacher | None:
    """Load the frozen teacher onto the mesh, its vocabulary rows fitted to the student's.

    Of several all; None where nothing compares with one.
    """
    found = []
    for cfg, (name, spec) in zip(parts.cfg.teachers, parts.run.teachers.items(), strict=True):
        dtype = spec.stored_dtype(cfg.dtype)
        tree = _load(parts, teacher_title(name), hub.folder(spec.path), jnp.dtype(dtype))
        with jax.set_mesh(parts.mesh):
            fitted = transformer.with_vocab_rows(tree, cfg.vocab_size)
        del tree
        found.append(resting.rested(fitted) if parts.run.teacher.offload else fitted)
    return _one_or_all(found, parts)


def teacher_template(parts: Assembly) -> Teacher | None:
    """Shapes and placements of what :func:`teacher_params` gives, without reading it."""
    spec, found = parts.run.teacher, []
    for cfg in parts.cfg.teachers:
        dtype = jnp.dtype(spec.stored_dtype(cfg.dtype))
        shapes = params.abstract(transformer.specs(cfg), dtype, parts.mesh)
        found.append(resting.rested(shapes) if spec.offload else shapes)
    return _one_or_all(found, parts)


def _one_or_all(found: Sequence[Params], parts: Assembly) -> Teacher | None:
    return tuple(found) if parts.cfg.others else next(iter(found), None)


def state(parts: Assembly) -> TrainState:
    """Load the student onto the mesh and wrap it into a fresh train state.

    Of the run that ``init_from`` names come the weights, and what ``init_keep`` adds: the
    optimizer's moments or the rock state. Their schedules start anew, as the run does.

    Raises:
      ConfigError: ``init_from`` is no run, or one of another model.
    """
    template, origin = state_template(parts), origin_of(parts.run)
    tree, kept = _weights(parts, origin, template, parts.run.kept)
    with jax.set_mesh(parts.mesh):
        key = jax.random.key(parts.run.seed)
        if not parts.run.lora.rank:
            precision.check(parts.run, tree)
        else:
            draw = jax.jit(lora.init, static_argnames=("cfg", "spec"))
            spec = parts.run.lora
            fresh = draw(cfg=parts.cfg.student, spec=spec, key=jax.random.fold_in(key, _ADAPTERS))
            tree = lora.attached(tree, fresh, spec)
        placed = jax.tree.map(lambda leaf: leaf.sharding, template)
        init = jax.jit(_init(parts), donate_argnums=0, out_shardings=placed)
        return init(tree, jax.random.clone(key)).replace(**kept)


def saved(state: TrainState) -> TrainState:
    """What a checkpoint holds of a state, or of its template: of the parameters what is trained."""
    return state.replace(params=lora.trained(state.params))


def restored(
    parts: Assembly, saves: Checkpoints, base: Reference | None
) -> tuple[TrainState, Any, int]:
    """The newest good checkpoint as :meth:`Checkpoints.restore` gives it, the state made whole.

    Args:
      parts: of the run.
      saves: its checkpoints.
      base: what the adapters belong to, see ``entry.base_of``; None where there are none.
    """
    template = state_template(parts)
    state, beside, step = saves.restore(saved(template))
    if base is not None:
        tree, _ = _weights(parts, base, template, ())
        state = state.replace(params=lora.attached(tree, state.params, parts.run.lora))
    return state, beside, step


def _weights(
    parts: Assembly, source: Reference | None, template: TrainState, keep: Sequence[str]
) -> tuple[Params, dict[str, Any]]:
    """The student's own weights, of its folder or of a step of another run, and what is kept."""
    dtype = jnp.dtype(parts.run.student_dtype(parts.cfg.student.dtype))
    if source is None or source.run is None:
        folder = hub.folder(parts.run.student.path) if source is None else source.folder
        return _load(parts, "student", folder, dtype), {}
    kept = _taken_over(parts, source, template, keep)
    return jax.tree.map(lambda x: x.astype(dtype), kept.pop("params")), kept


def _load(parts: Assembly, who: str, folder: str, dtype: jnp.dtype) -> Params:
    try:
        num_ids = parts.policy.vocab_size
        return hf.load(folder, dtype=dtype, mesh=parts.mesh, num_ids=num_ids)[1]
    except ValueError as error:
        raise ValueError(f"the {who} cannot be used: {error}") from error


def origin_of(run: RunConfig) -> Reference | None:
    """The step of another run that this one starts from; None without ``init_from``.

    Raises:
      ConfigError: it is no step of a run.
    """
    if not run.init_from:
        return None
    try:
        if hub.parse(run.init_from):
            raise pairs.ModelError(f"{run.init_from!r} is no run here: expected RUN or RUN@STEP")
        found = pairs.resolve(run.init_from)
    except pairs.ModelError as error:
        raise ConfigError(f"init_from: {error}; set --config.init_from") from error
    if found.param_dtype is None or (run.kept and found.run is None):
        raise ConfigError(
            f"init_from is {run.init_from!r}, which has weights only: expected a RUN or RUN@STEP"
            f"{' that was trained' * bool(run.kept)}; models belong into --config.student.path"
        )
    return found


def _taken_over(
    parts: Assembly, origin: Reference, template: TrainState, keep: Sequence[str]
) -> dict[str, Any]:
    """Weights of a step of another run, on this run's mesh, and the kept parts of its state."""
    assert origin.run is not None
    cfg = parts.cfg.student
    stored = jnp.dtype(origin.param_dtype)
    wanted: dict[str, Any] = {}
    if origin.lora is None:  # one reading for all
        wanted = {"params": params.abstract(transformer.specs(cfg), stored, parts.mesh)}
    fields = {"optimizer": "opt", "rock": "rock"}
    wanted |= {fields[name]: getattr(template, fields[name]) for name in keep}
    other = tokenizers.load(origin.folder)
    rows = cfg.vocab_size
    try:
        tokenizers.compare(parts.tokenizer, other, rows, rows)
        with checkpoint.open(origin.run) as saves:
            kept = saves.restore(wanted, origin.step, partial=True)[0] if wanted else {}
        if origin.lora is not None:
            kept["params"] = pairs.parameters(origin, cfg, parts.mesh, parts.policy.vocab_size)
    except ValueError as error:
        raise ConfigError(
            f"init_from: {origin.name} does not fit student.path {parts.run.student.path} "
            f"({error}); give a run of the same model and optimizer"
        ) from error
    if "opt" in kept:
        kept["opt"] = optim.restarted(kept["opt"])
    if "rock" in kept:  # the gate's own schedule counts from the start of this run
        kept["rock"] = kept["rock"].replace(step=_zeros(template.rock.step))
    return kept


def _zeros(leaf: Any) -> jax.Array:
    """Zeros as an abstract leaf describes them, on its devices."""
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)


def state_template(parts: Assembly) -> TrainState:
    """Shapes and placements of the train state, for restoring without reading the student.

    A fresh state has the very same, so that a resumed run compiles what a new one does.
    """
    cfg, run = parts.cfg.student, parts.run
    dtype = jnp.dtype(run.student_dtype(cfg.dtype))
    tree = params.abstract(transformer.specs(cfg), dtype, parts.mesh)
    if adapters := assemble.adapter_specs(run, cfg):
        fresh = params.abstract(adapters, jnp.float32, parts.mesh)
        tree = lora.attached(tree, fresh, run.lora)
    with jax.set_mesh(parts.mesh):
        key = jax.eval_shape(jax.random.key, 0)
        made = jax.eval_shape(_init(parts), tree, key)
    return meshlib.placed(made, parts.mesh)


def _init(parts: Assembly):
    return functools.partial(steps.init, cfg=parts.cfg, tx=parts.tx)
