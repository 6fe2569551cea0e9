"""What more than one benchmark of this library runs: the KL on random inputs, a training step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import kl, optim, steps
from opd_jax.models import params, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Rollout

LOGIT_STD = 2.0
FROZEN = tuple(range(10))  # the ids that half of the positions of :func:`half_frozen` predict


def fused_loss(hs_RD, ws_VD, ht_RE, wt_VE, weight_R):
    """Weighted reverse KL by ``opd_jax``."""
    batch = (hs_RD[None], ws_VD, ht_RE[None], wt_VE, weight_R[None])
    return kl.weighted_kl(*batch, spec=kl.KLSpec())[0]


def gradient(loss) -> Callable:
    """Jitted value and gradient with respect to the student's states and head."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def shapes(rows: int, dtype, vocab: int, student: int, teacher: int):
    """Abstract inputs of a loss, at the widths of a student and a teacher."""
    sizes = ((rows, student), (vocab, student), (rows, teacher), (vocab, teacher))
    return (
        *(jax.ShapeDtypeStruct(size, dtype) for size in sizes),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )


def draw(inputs, seed: int = 0):
    """Values for :func:`shapes`: logits with standard deviation ``LOGIT_STD``, weights 1 / rows."""
    rng = np.random.default_rng(seed)  # numpy: several times faster than jax.random on a CPU
    values = []
    for index, like in enumerate(inputs[:4]):
        # States have unit entries, and a logit is a sum of `width` products.
        scale = LOGIT_STD / like.shape[1] ** 0.5 if index % 2 else 1.0
        value = rng.standard_normal(like.shape, np.float32) * np.float32(scale)
        values.append(jnp.asarray(value, like.dtype))
    rows = inputs[4].shape[0]
    return (*values, jnp.full((rows,), 1.0 / rows, jnp.float32))


def half_frozen(rng: np.random.Generator, batch: int, length: int, vocab_size: int) -> Rollout:
    """Rows of random ids, every one after the first scored, exactly half of those in ``FROZEN``.

    ``length`` positions predict something, so that rows hold one id more.
    """
    count = batch * length
    ids = rng.integers(len(FROZEN), vocab_size, count)
    ids[: count // 2] = rng.integers(0, len(FROZEN), count // 2)
    ids = rng.permutation(ids).reshape(batch, length)
    ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=len(FROZEN)).astype(np.int32)
    mask = np.ones(ids.shape, bool)
    mask[:, 0] = False
    return Rollout(
        ids_BT=jnp.asarray(ids),
        start_B=jnp.zeros((batch,), jnp.int32),
        mask_BT=jnp.asarray(mask),
        logp_BT=jnp.zeros(ids.shape, jnp.float32),
        truncated_B=jnp.ones((batch,), bool),
        policy_step=jnp.zeros((), jnp.int32),
    )


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    r"""Fit ``seconds = a sizes^k`` in logarithms.

    Returns:
      The exponent k, and R^2: the share of the variance of log seconds that the fit explains.

    Raises:
      ValueError: fewer than two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(
            f"sizes {list(sizes)}: expected at least two different ones; measure another size"
        )
    x, y = np.log(sizes), np.log(seconds)
    exponent, offset = np.polyfit(x, y, 1)
    scatter = np.sum((y - np.mean(y)) ** 2)
    left = np.sum((y - exponent * x - offset) ** 2)
    return float(exponent), float(1.0 - left / scatter) if scatter else 1.0


def llama(vocab: int, width: int, layers: int) -> ModelConfig:
    """A model of the proportions of small Llamas, 64 to a head."""
    heads = max(width // 64, 1)
    return ModelConfig("llama", vocab, width, 3 * width, layers, heads, heads, 64, tied=True)


class Training:
    """A run on random weights: its state, which each step donates, and the teacher."""

    def __init__(self, cfg: ObjectiveConfig):
        assert cfg.teacher is not None
        self.cfg, self.tx = cfg, optim.make(optim.OptimSpec())
        student = params.init(transformer.specs(cfg.student), jax.random.key(0))
        self.teacher = params.init(transformer.specs(cfg.teacher), jax.random.key(1))
        self.state = steps.init(student, jax.random.key(2), cfg=cfg, tx=self.tx)


class Phases:
    """Seconds of what follows each other, each from the end of the one before."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def done(self, tree):
        """What was computed, once it is there."""
        jax.block_until_ready(tree)
        self.times.append(time.perf_counter())
        return tree

    def seconds(self, *names: str) -> dict[str, float]:
        """By name, the last of ``names`` where fewer were done."""
        spans = [after - before for before, after in itertools.pairwise(self.times)]
        return dict(zip(names[-len(spans) :], spans, strict=True))


class Step(Training):
    """A training step to call over and over; it keeps the state that each call donates."""

    def __init__(self, cfg: ObjectiveConfig, batch: Rollout):
        super().__init__(cfg)
        self.batch = batch

    def __call__(self):
        self.state, metrics = steps.distill_step(
            self.state, self.teacher, self.batch, cfg=self.cfg, tx=self.tx
        )
        return self.state.params, metrics
