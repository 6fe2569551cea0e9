"""Models by name, opened one way in every command: one alone, or a student and its teacher.

A *model reference* is one of

* a Hugging Face folder,
* ``owner/name`` or ``hub:owner/name@REVISION``: a model of the Hub, see :mod:`hub`,
* ``embedded:student`` or ``embedded:teacher``, the package's own pair,
* ``RUN@STEP``: the student of a training workdir at a checkpoint; ``RUN@last``, or ``RUN`` alone,
  is the newest one, ``RUN@0`` the student before training.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import divergence
from opd_jax import mesh as meshlib
from opd_jax.data import tokenizer as tokenizers
from opd_jax.files import EMBEDDED, path_of
from opd_jax.kl import KLSpec
from opd_jax.models import architecture, hf, hf_config, lora, params, transformer
from opd_jax.models.lora import LoraSpec
from opd_jax.models.params import Specs
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Params
from opd_jax.rollout.sampling import Sampler
from opd_jax.spec import DTYPES, ModelSpec
from opd_jax.store import checkpoint, checkpoint_record, fingerprint, hub
from opd_jax.store import workdir as workdirs

LAST = "last"


class ModelError(ValueError):
    """A model reference cannot be used; the message says why and what to give."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a model reference means.

    Attributes:
      name: the reference with its step as a number, and a Hub name with its commit, for tables.
      folder: Hugging Face folder with config and tokenizer (and the weights where ``run`` is None).
      run: workdir whose checkpoint holds the weights.
      step: of that checkpoint.
      param_dtype: of the checkpoint's parameters, or what a run's step 0 is stored in.
      stop_ids: that end the answers of the run; empty without one.
      started: when the run was; None without one.
      lora: the adapters that the checkpoint holds instead of parameters; None: it holds these.
      base: what they belong to.
    """

    name: str
    folder: str
    run: Path | None = None
    step: int = 0
    param_dtype: str | None = None
    stop_ids: tuple[int, ...] = ()
    started: str | None = None
    lora: LoraSpec | None = None
    base: Reference | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A student and a teacher on one mesh, ready to be run.

    Attributes:
      cfg: what ``steps.eval_step`` takes: reverse KL at temperature 1, no gate.
      mesh: devices; run programs under ``jax.set_mesh(pair.mesh)``.
      tokenizer: the student's.
      sampler: temperature 1, no filter.
      student, teacher: parameters; the teacher's vocabulary rows are fitted to the student's.
      student_name, teacher_name: their references.
    """

    cfg: ObjectiveConfig
    mesh: Mesh
    tokenizer: Any
    sampler: Sampler
    student: Params
    teacher: Params
    student_name: str
    teacher_name: str

    @property
    def vocab_size(self) -> int:
        """Real ids; those from here to ``cfg.student.vocab_size`` are padding."""
        return self.sampler.vocab_size

    @property
    def max_positions(self) -> int:
        """Most ids of prompt and answer that both models have positions for."""
        assert self.cfg.teacher is not None
        return min(self.cfg.student.max_positions, self.cfg.teacher.max_positions)

    def text(self, token_id: int) -> str:
        """Printable text of one id."""
        return tokenizers.token_text(self.tokenizer, token_id)


def resolve(ref: str) -> Reference:
    """Find what a model reference means, without reading weights.

    Every process must call it, where it may be a Hub name.

    Raises:
      ModelError: neither a model folder nor a step of a run.
      HubError: a name of the Hub that cannot be fetched.
      WorkdirError: a damaged ``run.json``, or a run whose student's files have changed since.
    """
    folder = Path(path_of(ref))
    if ref.startswith(EMBEDDED) or (folder / "config.json").is_file():
        return Reference(ref, str(folder))
    if hub.parse(ref):
        name = hub.pin(ref)
        return Reference(name, hub.folder(name))
    run, at, step = ref.rpartition("@")
    if (folder / "run.json").is_file():
        run, at, step = ref, "@", LAST
    if not at:
        raise ModelError(
            f"{ref!r} is no model: expected a Hugging Face folder (with config.json), "
            "owner/name on the Hub, embedded:student, embedded:teacher, or RUN[@STEP] with the "
            "workdir of a run; correct it"
        )
    workdir = Path(path_of(run))
    record = workdirs.read_run(workdir)
    if record is None:
        raise ModelError(
            f"{run} has no run.json: expected the workdir of a run before the @ of {ref!r}; "
            "give that folder"
        )
    stored = ModelSpec(param_dtype=workdirs.setting(record, "student.param_dtype")).stored_dtype(
        "float32"
    )
    part = "model" if step == "0" else "tokenizer"
    folder = hub.folder(workdirs.setting(record, "student.path"), part)
    # The weights come from the checkpoint; of the folder only the rest is used.
    workdirs.check_model(workdir, record, "student", folder, weights=step == "0")
    of_run = {"stop_ids": tuple(record["stop_ids"]), "started": record.get("time")}
    if step == "0":
        return Reference(ref, folder, param_dtype=stored, **of_run)
    with checkpoint.open(workdir) as saves:
        found = saves.steps()
    if step == LAST and found:
        step = str(found[-1])
    if not step.isdecimal() or int(step) not in found:
        raise ModelError(
            f"{run} has no checkpoint of step {step!r}: expected one of {[0, *found]} or {LAST}; "
            "give one of them"
        )
    if adapters := adapters_of(record):
        of_run |= {"lora": adapters, "base": base_of(workdir, record)}
    return Reference(f"{run}@{int(step)}", folder, workdir, int(step), stored, **of_run)


def adapters_of(record: Mapping[str, Any]) -> LoraSpec | None:
    """The adapters that a ``run.json`` says its run has; None: it has none."""
    names = [f.name for f in dataclasses.fields(LoraSpec)]
    spec = LoraSpec(**{name: workdirs.setting(record, f"lora.{name}") for name in names})
    return spec if spec.rank else None


def base_of(workdir: Path, record: Mapping[str, Any]) -> Reference:
    """What the adapters of a run belong to: its student's folder, or the step that it began from.

    Args:
      workdir: of the run.
      record: its ``run.json``.

    Raises:
      WorkdirError: it is not what it was.
      ModelError: the step is gone.
    """
    origin = record.get("init_from")
    if not origin:
        path = workdirs.setting(record, "student.path")
        folder = hub.folder(path)
        workdirs.check_model(workdir, record, "student", folder)
        return Reference(path, folder)
    needed = f"{workdir} holds adapters of {origin['name']} and no weights of its own"
    try:
        found = resolve(origin["name"])
    except ModelError as error:
        raise ModelError(f"{needed}: {error}") from error
    if told := fingerprint.changes(origin["files"], identity(found)):
        raise workdirs.WorkdirError(
            f"{needed}, which has changed since: {'; '.join(told[:3])}; expected that step as it "
            "was; put it back, or start a new run"
        )
    return found


def identity(ref: Reference) -> dict[str, str]:
    """Fingerprints of all files that make a model: :mod:`fingerprint`, by name."""
    found = fingerprint.of_model(Path(ref.folder), weights=ref.run is None)
    if ref.run is not None:
        record = ref.run / "checkpoints" / str(ref.step) / checkpoint_record.RECORD
        found[f"checkpoint {ref.step}"] = fingerprint.of_file(record)  # it has all checksums
    if ref.base is not None:
        found |= {f"base: {name}": code for name, code in identity(ref.base).items()}
    return found


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that was looked at and not loaded yet.

    Attributes:
      reference: what names it.
      cfg: with the compute dtype.
      mesh: devices that :meth:`load` puts it on.
      tokenizer: of its folder.
      num_ids: real ids; rows of the embedding from there on are padding.
      stop_ids: end an answer.
      started: when its run was, which is the date that chat templates write; None without a run.
    """

    reference: Reference
    cfg: ModelConfig
    mesh: Mesh
    tokenizer: Any
    num_ids: int
    stop_ids: tuple[int, ...]
    started: str | None

    @property
    def stored(self) -> jnp.dtype:
        """Dtype of its parameters."""
        return _stored(self.reference, self.cfg)

    def sampler(self, **filters: Any) -> Sampler:
        """How it answers: ``temperature``, ``top_k``, ``top_p``, ``min_p``."""
        return Sampler(
            vocab_size=self.num_ids,
            stop_ids=self.stop_ids,
            pad_id=tokenizers.pad_id(self.tokenizer),
            **filters,
        )

    def load(self) -> Params:
        """Read its parameters onto the mesh."""
        return parameters(self.reference, self.cfg, self.mesh, self.num_ids)


def open_model(ref: str, *, mesh: Mesh | None = None, dtype: str | None = None) -> Model:
    """Look at a model: all that can be known and checked without its weights.

    Args:
      ref: a model reference.
      mesh: default: all devices along ``data``.
      dtype: compute dtype; default: float32 on CPU, bfloat16 elsewhere. A student of a run is
        stored as the run does.

    Raises:
      ModelError, FileNotFoundError: a reference that means nothing.
      ValueError: a config or a tokenizer that cannot be used, more ids than the model has rows, or
        a mesh that does not divide it.
    """
    found = resolve(ref)
    cfg, tokenizer = _config(found, dtype), tokenizers.load(found.folder)
    mesh = meshlib.make() if mesh is None else mesh
    architecture.check_mesh(cfg, mesh)
    return Model(
        reference=found,
        cfg=cfg,
        mesh=mesh,
        tokenizer=tokenizer,
        num_ids=tokenizers.num_ids(tokenizer, cfg.vocab_size, "model"),
        stop_ids=found.stop_ids
        or tokenizers.stop_ids(tokenizer, hf_config.generation_eos(found.folder)),
        started=found.started,
    )


def open_pair(
    student: str,
    teacher: str,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = print,
) -> Pair:
    """Check two models against each other and load them.

    Args:
      student, teacher: model references.
      mesh: default: all devices along ``data``.
      dtype: compute dtype of both; default: float32 on CPU, bfloat16 elsewhere. The teacher is
        stored in it; a student of a run is stored as the run does.
      say: receives a line where the two stop on different ids.

    Raises:
      ModelError, FileNotFoundError: a reference that means nothing.
      ValueError: tokenizers that differ, or a model that does not fit the mesh.
      CheckpointError: a damaged checkpoint.
    """
    mesh = meshlib.make() if mesh is None else mesh
    ours, theirs = resolve(student), resolve(teacher)
    ours_cfg, theirs_cfg = _config(ours, dtype), _config(theirs, dtype)
    architecture.check_mesh(ours_cfg, mesh, "the student")
    architecture.check_mesh(theirs_cfg, mesh, "the teacher")
    tokenizer, other = tokenizers.load(ours.folder), tokenizers.load(theirs.folder)
    tokenizers.lend_template(tokenizer, other)  # as the run did
    vocab_size = tokenizers.compare(tokenizer, other, ours_cfg.vocab_size, theirs_cfg.vocab_size)
    stop_ids, message = tokenizers.stop_set(
        tokenizer,
        hf_config.generation_eos(ours.folder),
        other,
        hf_config.generation_eos(theirs.folder),
    )
    if message:
        say(f"warning: {message}")
    student_params = parameters(ours, ours_cfg, mesh, vocab_size)
    teacher_params = parameters(theirs, theirs_cfg, mesh, vocab_size)
    with jax.set_mesh(mesh):
        teacher_params = transformer.with_vocab_rows(
            jax.tree.map(lambda x: x.astype(theirs_cfg.dtype), teacher_params), ours_cfg.vocab_size
        )
    return Pair(
        cfg=ObjectiveConfig(
            student=ours_cfg,
            teacher=dataclasses.replace(theirs_cfg, vocab_size=ours_cfg.vocab_size),
            kl=KLSpec(
                vocab_size=vocab_size,
                stop_ids=divergence.merged_stops("auto", stop_ids, are_equal=not message),
            ),
            stop_ids=stop_ids,
        ),
        mesh=mesh,
        tokenizer=tokenizer,
        sampler=Sampler(
            vocab_size=vocab_size, stop_ids=stop_ids, pad_id=tokenizers.pad_id(tokenizer)
        ),
        student=student_params,
        teacher=teacher_params,
        student_name=ours.name,
        teacher_name=theirs.name,
    )


def load(ref: str, pair: Pair) -> Params:
    """Load another student for the programs of ``pair``: same architecture, same tokenizer.

    Raises:
      ModelError: another architecture, or a reference that means nothing.
      ValueError: another tokenizer.
    """
    found = resolve(ref)
    cfg = _config(found, pair.cfg.student.dtype)
    expected = dataclasses.replace(pair.cfg.student, remat=cfg.remat, attention=cfg.attention)
    if cfg != expected:
        fields = [f.name for f in dataclasses.fields(cfg)]
        named = "; ".join(
            f"{n} {getattr(cfg, n)!r} instead of {getattr(expected, n)!r}"
            for n in fields
            if getattr(cfg, n) != getattr(expected, n)
        )
        raise ModelError(
            f"{ref} is another architecture than {pair.student_name}: {named}; expected a student "
            "of the same shape; give another reference"
        )
    other = tokenizers.load(found.folder)
    tokenizers.compare(pair.tokenizer, other, expected.vocab_size, cfg.vocab_size)
    return parameters(found, cfg, pair.mesh, pair.vocab_size)


def compute_dtype(given: str | None = None) -> jnp.dtype:
    """The dtype that models compute in: as given, else float32 on CPU and bfloat16 elsewhere.

    Raises:
      ModelError: no dtype that models are computed in.
    """
    if given in (None, "auto"):
        given = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if given not in DTYPES:
        raise ModelError(f"dtype is {given!r}: expected one of {DTYPES}; set --dtype")
    return jnp.dtype(given)


def _config(ref: Reference, dtype: str | None) -> ModelConfig:
    return hf_config.read_config(ref.folder, dtype=compute_dtype(dtype))


def _stored(ref: Reference, cfg: ModelConfig) -> jnp.dtype:
    return jnp.dtype(ref.param_dtype or cfg.dtype)


def parameters(ref: Reference, cfg: ModelConfig, mesh: Mesh, num_ids: int) -> Params:
    """Read the parameters of a reference onto a mesh; adapters are merged, with sums in f32.

    Raises:
      CheckpointError: a damaged checkpoint.
      ValueError: another model than ``cfg`` says, or one that does not fit the mesh.
    """
    architecture.check_mesh(cfg, mesh)
    tree = apart(ref, cfg, functools.partial(params.abstract, mesh=mesh), num_ids)
    if ref.lora is None:
        return tree
    with jax.set_mesh(mesh):
        dtype = jnp.promote_types(_stored(ref, cfg), cfg.dtype)
        return jax.jit(lora.merged, static_argnames="dtype")(tree, dtype=dtype)


def apart(
    ref: Reference, cfg: ModelConfig, place: Callable[[Specs, Any], Params], num_ids: int | None
) -> Params:
    """The same where ``place`` puts declared parameters of a dtype, adapters left unmerged."""
    stored = _stored(ref, cfg)
    if ref.lora is not None:
        assert ref.base is not None
        base = apart(dataclasses.replace(ref.base, param_dtype=stored.name), cfg, place, num_ids)
        wanted = place(lora.specs(cfg, ref.lora), jnp.float32)
        return lora.attached(base, _restored(ref, wanted), ref.lora)
    wanted = place(transformer.specs(cfg), stored)
    if ref.run is not None:
        return _restored(ref, wanted)
    placed = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    return hf.load(ref.folder, dtype=stored, placed=placed, num_ids=num_ids)[1]


def _restored(ref: Reference, wanted: Params) -> Params:
    assert ref.run is not None
    with checkpoint.open(ref.run) as saves:
        return saves.restore({"params": wanted}, ref.step, partial=True)[0]["params"]
