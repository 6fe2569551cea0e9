"""What a run is: the frozen groups of a configuration, and ``RunConfig``, which holds one of each.

The groups and their fields are the dataclasses here and in the modules that own them, so a default,
its type and its meaning are written once. Frozen and hashable, they may enter traced code.
"""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction

from opd_jax import rules
from opd_jax.data.prompts import DataSpec
from opd_jax.kl import KLSpec
from opd_jax.models.architecture import ATTENTION, REMAT
from opd_jax.models.lora import LoraSpec
from opd_jax.objective import NORMALISERS
from opd_jax.optim import OptimSpec
from opd_jax.position import PositionSpec
from opd_jax.rock import RockConfig

STAGES = ("on_policy", "off_policy", "mixed")
_NAME = re.compile(r"[\w-]+", re.ASCII)  # of one of several teachers
DTYPES = ("auto", "float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key and what to set."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model folder and how to run it: groups ``student`` and ``teacher``."""

    path: str = ""  # Hugging Face folder, owner/name[@REVISION] on the Hub, or embedded:NAME
    param_dtype: str = "auto"  # of stored weights; auto: float32 if trained, dtype if frozen
    dtype: str = "auto"  # compute dtype; auto: bfloat16 on accelerators, float32 on CPU
    remat: str = "dots"  # what the backward pass keeps: none (all), dots, full (least memory)
    attention: str = "auto"  # auto: kernels of TPU and GPU where they fit; blocks: our own

    def __post_init__(self):
        rules.check(
            self,
            "",  # of two groups
            ("remat", self.remat in REMAT, f"one of {REMAT}"),
            ("attention", self.attention in ATTENTION, f"one of {ATTENTION}"),
            ("dtype", self.dtype in DTYPES, f"one of {DTYPES}"),
            ("param_dtype", self.param_dtype in DTYPES, f"one of {DTYPES}"),
        )

    def stored_dtype(self, auto: str) -> str:
        """Dtype of the parameters, ``auto`` where the spec leaves it open."""
        return auto if self.param_dtype == "auto" else self.param_dtype


@dataclasses.dataclass(frozen=True)
class TeacherSpec(ModelSpec):
    """The frozen model that is learned from, or several: group ``teacher``.

    Several have one vocabulary, the student's. Each prompt has one of them, which its row names.

    Raises:
      RuleError: a field is outside its range, or there is both one teacher and several.
    """

    paths: tuple[
        tuple[str, str], ...
    ] = ()  # (name, model) of several teachers, which the column teacher names; not with path
    offload: bool = False  # rests in host memory between its passes; its head stays on the devices

    def __post_init__(self):
        super().__post_init__()
        rules.check(
            self,
            "teacher",
            (
                "paths",
                all(len(pair) == 2 and _NAME.fullmatch(pair[0]) and pair[1] for pair in self.paths)
                and len({pair[0] for pair in self.paths}) == len(self.paths),
                "pairs of a name (letters, digits, _ and -), each once, and a model",
            ),
            (
                "path",
                not (self.path and self.paths),
                "nothing beside teacher.paths, which name all teachers (--config.teacher.path=)",
            ),
        )
        # Their order means nothing: the same run whichever flag comes first.
        object.__setattr__(self, "paths", tuple(sorted(self.paths)))


def teacher_title(name: str) -> str:
    """What a teacher is called in messages and records: ``teacher``, or one of several by name."""
    return f"teacher {name}".strip()


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Devices along each axis; -1 takes what is left."""

    data: int = -1  # copies of the models, each with rows of its own; -1: all that are left
    fsdp: int = 1  # devices, 1 or more, that share rows' weights, gathered layer by layer
    model: int = 1  # devices, 1 or more, that split heads, features and the vocabulary
    rollout_model: int = 0  # the same while the student samples, a multiple of model; 0: as model

    def __post_init__(self):
        rules.check(
            self,
            "mesh",
            ("rollout_model", self.rollout_model >= 0, "0 (as mesh.model) or a multiple of it"),
        )


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """How the student samples its answers."""

    samples: int = 4  # answers per prompt
    max_new: int = 512  # most ids of an answer
    temperature: float = 1.0  # divides the logits
    top_k: int = 0  # most likely ids to draw from; 0: all
    top_p: float = 1.0  # probability mass to draw from; 1: all
    min_p: float = 0.0  # share of the largest probability that an id needs; 0: none
    bias: tuple[tuple[int, float], ...] = ()  # (id, logit bias) pairs
    buckets: tuple[int, ...] = ()  # answer widths the update is cropped to; (): by the answers
    segments: int = 1  # pieces in which the cache of rows in step grows; each is compiled
    slots: int = 0  # rows decoded at a time, where one ends the next begins; 0: all, in step

    def __post_init__(self):
        rules.check(
            self,
            "rollout",
            ("samples", self.samples >= 1, "at least 1"),
            ("max_new", self.max_new >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0: a policy that samples"),
            ("top_k", self.top_k >= 0, "0 (off) or a number of ids"),
            ("top_p", 0 < self.top_p <= 1, "a probability mass above 0, up to 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "a share of the largest probability from 0 (off) to 1"),
            rules.widths("buckets", self.buckets, self.max_new),
            (
                "segments",
                1 <= self.segments <= 8 and (self.segments == 1 or not self.slots),
                "from 1 to 8, and 1 with rollout.slots, whose rows begin at different times",
            ),
            ("slots", self.slots >= 0, "0 (all rows) or a number of rows"),
        )


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """The loop."""

    steps: int = 1000  # optimizer steps
    prompts: int = 16  # prompts per step; rows per step are prompts x rollout.samples
    microbatches: int = 1  # equal pieces a step's rows are scanned in
    pack: bool = False  # rows lie end to end in fewer; for one teacher that reads the same prompts
    stage: str = "on_policy"  # off_policy: completions of the file of prompts; mixed: both by turns
    on_policy_share: float = 0.5  # of the steps, where the stage is mixed
    normaliser: str = "tokens"  # or weight; per_sequence for comparison
    load_balance: float = 0.0  # weight of the load-balancing loss of a student with experts
    max_truncated: float = 1.0  # share of answers cut by length above which the run stops
    truncated_steps: int = 20  # steps over which that share is averaged

    def __post_init__(self):
        rules.check(
            self,
            "train",
            ("steps", self.steps >= 0, "at least 0"),
            ("prompts", self.prompts >= 1, "at least 1"),
            ("microbatches", self.microbatches >= 1, "at least 1"),
            ("normaliser", self.normaliser in NORMALISERS, f"one of {NORMALISERS}"),
            ("load_balance", self.load_balance >= 0, "at least 0 (0: not trained on)"),
            ("stage", self.stage in STAGES, f"one of {STAGES}"),
            ("on_policy_share", 0 < self.on_policy_share < 1, "a share between 0 and 1"),
            ("max_truncated", 0 < self.max_truncated <= 1, "a share above 0, up to 1 (never)"),
            ("truncated_steps", self.truncated_steps >= 1, "at least 1"),
        )

    def is_on_policy(self, step: int) -> bool:
        """Whether the step after ``step`` updates trains on the student's own answers.

        In a mix, floor(n x share) of the first n steps do: spread evenly, and the same whenever a
        run is resumed.
        """
        if self.stage != "mixed":
            return self.stage == "on_policy"
        share = Fraction(str(self.on_policy_share))
        return math.floor((step + 1) * share) > math.floor(step * share)


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """Evaluation on held-out prompts, before, during and after."""

    every: int = 0  # steps; 0: never
    prompts: int = 64  # held-out prompts whose answers are graded
    temperature: float = 0.0  # of graded answers; 0: greedy
    samples: int = 1  # graded answers per prompt
    kl_prompts: int = 32  # held-out prompts for KL, on fresh samples of the policy itself
    batch: int = 0  # prompts at a time; 0: train.prompts x rollout.samples
    max_new: int = 0  # most ids of an answer; 0: rollout.max_new
    teacher: bool = True  # grade the teacher's answers too, once: what can be reached
    margin: float = 0.02  # smallest difference of accuracy that counts, in comparisons of runs
    margin_kl: float = 0.05  # the same of the KL, as a share of the baseline's
    grader: str = "math"  # numeric, choice, exact, or one's own: module:function, file.py:function

    def __post_init__(self):
        rules.check(
            self,
            "eval",
            ("every", self.every >= 0, "at least 0 (0: never)"),
            ("prompts", self.prompts >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0 (0: greedy)"),
            ("samples", self.samples >= 1, "at least 1"),
            ("kl_prompts", self.kl_prompts >= 0, "at least 0 (0: not measured)"),
            ("batch", self.batch >= 0, "at least 0 (0: prompts x samples of a step)"),
            ("max_new", self.max_new >= 0, "at least 0 (0: rollout.max_new)"),
            ("margin", 0 < self.margin < 1, "a share between 0 and 1, ends excluded"),
            ("margin_kl", 0 < self.margin_kl < 1, "a share between 0 and 1, ends excluded"),
        )


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    """What is kept of a run."""

    every: int = 100  # steps; 0: only at the end
    keep: int = 3  # newest checkpoints
    best: str = ""  # also keep the best by accuracy or kl_nats, from evaluation

    def __post_init__(self):
        rules.check(
            self,
            "checkpoint",
            ("every", self.every >= 0, "at least 0 (0: only at the end)"),
            ("keep", self.keep >= 1, "at least 1"),
            ("best", self.best in ("", "accuracy", "kl_nats"), "accuracy, kl_nats or nothing"),
        )


@dataclasses.dataclass(frozen=True)
class LogSpec:
    """What a run writes."""

    every: int = 1  # steps per progress line; metrics.jsonl has every step
    samples_every: int = 50  # steps between decoded samples with per-token KL; 0: never
    samples: int = 2  # answers each time
    rocks: int = 10  # top types printed at the end
    tensorboard: bool = False  # also write events for TensorBoard into the workdir
    wandb: str = ""  # project name; empty: off

    def __post_init__(self):
        rules.check(
            self,
            "log",
            ("every", self.every >= 1, "at least 1"),
            ("samples_every", self.samples_every >= 0, "at least 0 (0: never)"),
            ("samples", self.samples >= 0, "at least 0"),
            ("rocks", self.rocks >= 0, "at least 0"),
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run, checked; see the group classes for the fields."""

    seed: int
    student: ModelSpec
    teacher: TeacherSpec
    mesh: MeshSpec
    data: DataSpec
    rollout: RolloutSpec
    kl: KLSpec
    rock: RockConfig
    position: PositionSpec
    lora: LoraSpec
    optim: OptimSpec
    train: TrainSpec
    eval: EvalSpec
    checkpoint: CheckpointSpec
    log: LogSpec
    profile: str = ""  # steps to trace, FIRST:LAST or one number, counted from 1; empty: none
    init_from: str = ""  # RUN[@STEP]: start from the weights of another run, not from student.path
    prediction: str = ""  # what the run is expected to show, written down before it is known
    init_keep: str = ""  # what else to take over of it: optimizer, rock, or optimizer,rock

    def student_dtype(self, compute: str) -> str:
        """Dtype that the student's own weights are held in: a base is frozen, as a teacher is.

        ``compute`` is the student's compute dtype.
        """
        return self.student.stored_dtype(compute if self.lora.rank else "float32")

    @property
    def rows_read(self) -> int:
        """Rows of the file of prompts that a step reads: prompts to answer, or completions.

        Of a mix each step reads as many as there are completions; where the student answers, it
        answers the prompts of every ``rollout.samples``-th.
        """
        is_on_policy = self.train.stage == "on_policy"
        return self.train.prompts * (1 if is_on_policy else self.rollout.samples)

    @property
    def compared_by(self) -> tuple[str, ...]:
        """Keys by which something compares with a teacher, those of the loss first.

        Cross-entropy alone (``kl.ce`` 1) does not, but weights by position may, and an evaluation
        that measures the KL or what the teacher itself reaches.
        """
        is_evaluated = self.eval.every > 0
        asked = {
            "kl.ce": self.kl.ce < 1,
            "position.mode": self.position.is_measured,
            "eval.kl_prompts": is_evaluated and self.eval.kl_prompts > 0,
            "eval.teacher": is_evaluated and self.eval.teacher,
        }
        return tuple(key for key, is_asked in asked.items() if is_asked)

    @property
    def has_teacher(self) -> bool:
        """Whether anything compares with a teacher; else it is neither asked for nor loaded."""
        return bool(self.compared_by)

    @property
    def teachers(self) -> dict[str, ModelSpec]:
        """The teachers by the names that rows give them; one, "", where they name none; or none."""
        if not self.has_teacher:
            return {}
        if not self.teacher.paths:
            return {"": self.teacher}
        return {
            name: dataclasses.replace(self.teacher, path=path, paths=())
            for name, path in self.teacher.paths
        }

    @property
    def models(self) -> tuple[str, ...]:
        """References of the models that the run names."""
        return (self.student.path, self.teacher.path, *(path for _, path in self.teacher.paths))

    @property
    def kept(self) -> tuple[str, ...]:
        """Parts of the state of ``init_from`` that are taken over beside its weights.

        Raises:
          ConfigError: an unknown part, or a part of no run.
        """
        names = tuple(filter(None, (name.strip() for name in self.init_keep.split(","))))
        if not {*names} <= {*KEPT} or (names and not self.init_from):
            raise ConfigError(
                f"init_keep is {self.init_keep!r} and init_from {self.init_from!r}: expected some "
                f"of {', '.join(KEPT)}, of the run that init_from names; set --config.init_keep"
            )
        return names

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First and last training step to trace, both included; None: no trace.

        Raises:
          ConfigError: not a step or a range of steps.
        """
        if not self.profile:
            return None
        first, _, last = self.profile.partition(":")
        try:
            steps = int(first), int(last if ":" in self.profile else first)
        except ValueError:
            steps = (0, 0)
        if not 1 <= steps[0] <= steps[1] <= self.train.steps:
            raise ConfigError(
                f"profile is {self.profile!r}: expected FIRST:LAST or one number, steps from 1 to "
                f"train.steps ({self.train.steps}), e.g. 3:5; set --config.profile"
            )
        return steps


KEPT = ("optimizer", "rock")
GROUPS: dict[str, type] = {
    "student": ModelSpec,
    "teacher": TeacherSpec,
    "mesh": MeshSpec,
    "data": DataSpec,
    "rollout": RolloutSpec,
    "kl": KLSpec,
    "rock": RockConfig,
    "position": PositionSpec,
    "lora": LoraSpec,
    "optim": OptimSpec,
    "train": TrainSpec,
    "eval": EvalSpec,
    "checkpoint": CheckpointSpec,
    "log": LogSpec,
}
