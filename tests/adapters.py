"""Adapters of tiny models, for several tests."""

from pathlib import Path

import jax
import numpy as np

from opd_jax.models import hf, lora
from opd_jax.models.families import FAMILIES
from opd_jax.models.lora import LoraSpec

SPEC = LoraSpec(rank=2, alpha=3.0)
GOLDENS = Path(__file__).parent / "goldens"
# One of each family, and one with layers of either kind.
FOLDERS = {
    name: hf.read_config(GOLDENS / name)
    for name in (*(f"{family}_tied" for family in FAMILIES), "qwen3_moe_untied_mixed_sharded")
}


def fresh(tree, cfg, spec=SPEC):
    """A model with new adapters, whose B is 0."""
    return lora.attached(tree, lora.init(cfg, spec, jax.random.key(1)), spec)


def grown(tree, cfg, spec=SPEC):
    """A model with adapters as they are after some training."""
    rng = np.random.default_rng(2)
    pairs = jax.tree.map(
        lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32),
        lora.trained(fresh(tree, cfg, spec)),
    )
    return lora.attached(tree, pairs, spec)
