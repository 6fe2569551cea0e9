r"""Low-rank adapters: what is trained where a student's own weights are frozen (arXiv 2106.09685).

.. math:: W' = W + \frac{\alpha}{r} A B,
          \qquad A \in \mathbb{R}^{I \times r}, B \in \mathbb{R}^{r \times O}

``B`` starts at 0, so a fresh student is its base, bit for bit. Parameters with adapters are the
tree that they are without, with a :class:`linear.Adapted` in the place of each weight that has one;
all functions of a model take it. What is trained, has gradients and moments and is checkpointed is
:func:`trained` of it: all of a plain tree, and the adapters alone where there are any.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import rules
from opd_jax.models import params
from opd_jax.models.architecture import NUM_INPUTS, ModelConfig
from opd_jax.models.architecture import specs as model_specs
from opd_jax.models.families import FAMILIES
from opd_jax.models.linear import Adapted
from opd_jax.models.params import ParamSpec, Specs
from opd_jax.pytrees import Params

ALL = ("all", "all-linear")


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters of the student, whose own weights are frozen then.

    Attributes:
      rank: of the adapters; 0: off, the whole student is trained. Adapters want a higher
        ``optim.lr``, often tenfold.
      alpha: adapters count ``alpha / rank``.
      rslora: they count ``alpha / sqrt(rank)`` instead (arXiv 2312.03732).
      targets: weights that have adapters, by their Hugging Face names and separated by commas, such
        as ``q_proj,v_proj``; all: every projection of attention and of feed-forwards without
        experts.
    """

    rank: int = 0
    alpha: float = 16.0
    rslora: bool = False
    targets: str = "all"

    def __post_init__(self):
        rules.check(
            self,
            "lora",
            ("rank", self.rank >= 0, "at least 0 (0: off)"),
            ("alpha", self.alpha > 0, "above 0"),
            ("targets", bool(self.names), "names of weights, or all"),
        )

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else max(self.rank, 1))

    @property
    def names(self) -> tuple[str, ...]:
        """The targets as they are given."""
        return tuple(filter(None, (name.strip() for name in self.targets.split(","))))


def leaves(cfg: ModelConfig) -> dict[str, str]:
    """Weights of a model that may have adapters: Hugging Face name -> leaf of ``layers``."""
    declared, rows = model_specs(cfg)["layers"], FAMILIES[cfg.model_type].rows
    return {
        row.name.split(".")[-2]: row.leaf[-1]
        for row in rows
        if row.leaf[-1] in NUM_INPUTS and row.leaf[-1] in declared
    }


def targets(cfg: ModelConfig, spec: LoraSpec) -> dict[str, str]:
    """Those of :func:`leaves` that the spec asks for, in the order of the model.

    Raises:
      ValueError: the model has no such weight, or one that the rank is too large for.
    """
    known = leaves(cfg)
    wanted = [*known] if {*spec.names} & {*ALL} else spec.names
    unknown = [name for name in wanted if name not in known]
    if unknown:
        experts = ", the router and the weights of its experts having none" * bool(cfg.experts)
        raise ValueError(
            f"lora.targets names {', '.join(unknown)}: expected all or some of "
            f"{', '.join(known)}, the weights of a {cfg.model_type} student that can have "
            f"adapters{experts}; set --config.lora.targets"
        )
    for name in wanted:
        inputs, outputs = _sides(cfg, known[name])
        most = min(math.prod(inputs), math.prod(outputs))
        if spec.rank > most:
            raise ValueError(
                f"lora.rank is {spec.rank}: expected at most {most}, the smaller side of {name} "
                f"({math.prod(inputs)} x {math.prod(outputs)}); lower --config.lora.rank, or leave "
                f"{name} out of --config.lora.targets"
            )
    return {name: leaf for name, leaf in known.items() if name in wanted}


def _sides(cfg: ModelConfig, leaf: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Inputs and outputs of a weight, without the layers."""
    shape, num = model_specs(cfg)["layers"][leaf].shape[1:], NUM_INPUTS[leaf]
    return shape[:num], shape[num:]


def specs(cfg: ModelConfig, spec: LoraSpec) -> Specs:
    """Declare the adapters: in ``layers`` ``a`` [L, inputs..., rank], ``b`` [L, rank, outputs...].

    ``a`` is drawn with the variance that PEFT draws with, 1 / (3 inputs).

    Raises:
      ValueError: as :func:`targets`.
    """
    declared, found = model_specs(cfg)["layers"], {}
    for leaf in targets(cfg, spec).values():
        (inputs, outputs), num = _sides(cfg, leaf), NUM_INPUTS[leaf]
        layers, axes = declared[leaf].shape[0], declared[leaf].axes[1:]
        std = (3 * math.prod(inputs)) ** -0.5
        found[leaf] = {
            "a": ParamSpec((layers, *inputs, spec.rank), (None, *axes[:num], None), std),
            "b": ParamSpec((layers, spec.rank, *outputs), (None, None, *axes[num:])),
        }
    return {"layers": found}


def init(cfg: ModelConfig, spec: LoraSpec, key: jax.Array) -> Params:
    """Draw fresh adapters, f32: see ``params.init``."""
    return params.init(specs(cfg, spec), key, jnp.float32)


def attached(base: Params, adapters: Params, spec: LoraSpec) -> Params:
    """The parameters of a model with adapters: arrays are shared, nothing is computed."""
    layers = {
        leaf: Adapted(base["layers"][leaf], pair["a"], pair["b"], spec.scale)
        for leaf, pair in adapters["layers"].items()
    }
    return {**base, "layers": base["layers"] | layers}


def merged(tree: Params, dtype=None) -> Params:
    """Plain parameters of the same function, sums in f32; ``dtype`` of merged ones, default f32."""
    layers = {
        name: w.merged(NUM_INPUTS[name], 1).astype(dtype or jnp.float32) if _is_adapted(w) else w
        for name, w in tree["layers"].items()
    }
    return {**tree, "layers": layers}


def trained(tree: Any) -> Any:
    """What is trained of a model's parameters: its adapters where it has some, else all of them."""
    pairs = {name: w for name, w in _layers(tree).items() if _is_adapted(w)}
    if not pairs:
        return tree
    return {"layers": {name: {"a": w.a, "b": w.b} for name, w in pairs.items()}}


def with_trained(tree: Any, new: Any) -> Any:
    """The same parameters with others in the place of :func:`trained`."""
    if not any(map(_is_adapted, _layers(tree).values())):
        return new
    layers = {name: _layers(tree)[name].replace(**pair) for name, pair in new["layers"].items()}
    return {**tree, "layers": tree["layers"] | layers}


def _layers(tree: Any) -> dict[str, Any]:
    found = tree.get("layers") if isinstance(tree, dict) else None
    return found if isinstance(found, dict) else {}


def _is_adapted(w: Any) -> bool:
    return isinstance(w, Adapted)
