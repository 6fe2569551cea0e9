"""What ends a run, or warns: numbers that are not finite, answers that never end, full memory."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence

from opd_jax.models import memory
from opd_jax.run import assemble
from opd_jax.run.assemble import Assembly
from opd_jax.spec import RunConfig

# Share of answers cut by length from which they seldom have an end to learn (arXiv 2604.08527).
_MANY_TRUNCATED = 0.5


class NonFiniteError(RuntimeError):
    """Loss or gradients are NaN or infinite; nothing of this step has been saved."""


class RunawayError(RuntimeError):
    """Answers are cut by length as a rule; the run has stopped, and is saved."""


def check_finite(
    values: Mapping[str, float],
    step: int,
    names: Callable[[], Sequence[str]],
    saved: Callable[[], Sequence[int]],
) -> None:
    """Check a step's loss and gradients.

    Args:
      values: reduced metrics of the step.
      step: finished updates before it.
      names: gives those of the parameter tensors, in the order that ``nonfinite`` counts them.
      saved: gives the steps of the checkpoints; neither is asked in a step that is fine.

    Raises:
      NonFiniteError: they are not finite.
    """
    index = int(values["nonfinite"])
    if index == -1:
        return
    what = f"the gradient of {names()[index]}" if index >= 0 else "the loss"
    found = saved()
    kept = f"step {found[-1]} is the newest checkpoint" if found else "there is no checkpoint"
    raise NonFiniteError(
        f"step {step}: {what} is not finite (loss {values['loss']:.4g}, gradient norm "
        f"{values['grad_norm']:.4g}); stopped before saving, {kept}; lower --config.optim.lr, "
        "or compute in float32 (--config.student.dtype=float32)"
    )


class Truncation:
    """How many answers are cut by length: warned of once, and an error where it goes on."""

    def __init__(self, run: RunConfig, say: Callable[[str], None]):
        self._run, self._say, self._has_warned = run, say, False
        self._shares: collections.deque[float] = collections.deque(maxlen=run.train.truncated_steps)

    def see(self, share: float) -> None:
        """Note the share of a step's answers that were cut."""
        self._shares.append(share)
        if share > _MANY_TRUNCATED and not self._has_warned:
            self._has_warned = True
            self._say(
                f"warning: {share:.0%} of the answers are cut at rollout.max_new "
                f"({self._run.rollout.max_new} tokens), so the student seldom learns to end; "
                "raise --config.rollout.max_new if answers should be shorter than that, or let "
                "--config.train.max_truncated end such a run"
            )

    @property
    def share(self) -> float:
        """Mean over the last steps."""
        return sum(self._shares) / max(len(self._shares), 1)

    @property
    def is_too_much(self) -> bool:
        """Whether it is more than ``train.max_truncated``, over as many steps as that asks for."""
        train = self._run.train
        return len(self._shares) == train.truncated_steps and self.share > train.max_truncated

    def error(self, step: int) -> RunawayError:
        """What to say of it after a step."""
        limit = self._run.train.max_truncated
        return RunawayError(
            f"step {step}: {self.share:.0%} of the answers of the last {len(self._shares)} steps "
            f"are cut at rollout.max_new ({self._run.rollout.max_new} tokens): expected at most "
            f"train.max_truncated ({limit:.0%}); the run is saved. The student may be losing its "
            "stop id: look at samples.jsonl, set --config.kl.merge_stops=on where its teacher "
            "stops by another, raise --config.rollout.max_new, or go on with "
            "--config.train.max_truncated=1"
        )


# Who ran out of memory: in words, and what lowers its part.
_FITTING = {
    "": ("loading the models", "raise --config.mesh.fsdp or .model, which split them"),
    "rollout": (
        "sampling answers",
        "lower --config.train.prompts, --config.rollout.samples or .max_new",
    ),
    "teacher": ("the teacher read the answers", "raise --config.train.microbatches"),
    "update": (
        "updating the student",
        "raise --config.train.microbatches, set --config.student.remat=full, or lower "
        "--config.rollout.max_new",
    ),
    "eval": ("evaluating", "lower --config.eval.batch or .samples, or --config.rollout.max_new"),
}
_FITTING |= {"data": _FITTING["rollout"], "samples": _FITTING["teacher"]}


def memory_advice(parts: Assembly, phase: str, error: BaseException) -> str:
    """What to change where memory ran out in a phase of the run; empty: while loading."""
    what, change = _FITTING.get(phase, _FITTING[""])
    is_scoring = phase in ("teacher", "samples", "eval")
    needs = assemble.needs(parts, is_scoring=is_scoring)
    resident = [need for need in needs if need.what != assemble.CELLS]
    return memory.advice(what, error, resident if phase else [], change)
