"""Whether the steps of a run are larger than what its weights resolve."""

from __future__ import annotations

import jax

from opd_jax import optim
from opd_jax.pytrees import Params
from opd_jax.spec import ConfigError, RunConfig

# Share of 16-bit weights that the largest step may leave where they are.
_MOST_UNMOVED = 0.1


def check(run: RunConfig, tree: Params) -> None:
    """Refuse parameters in which the steps of a run would be rounded away; under its mesh.

    Raises:
      ConfigError: they would be.
    """
    spec = run.optim
    stored = jax.tree.leaves(tree)[0].dtype
    if stored.itemsize >= 4 or run.train.steps == 0:
        return
    key, change = "student.param_dtype", "set --config.student.param_dtype=float32"
    why = "computing in 16 bits (student.dtype) needs no parameters in 16 bits"
    if spec.name == "sgd":
        raise ConfigError(
            f"{key} is {stored.name} and optim.name sgd: expected float32 parameters, since most "
            f"of SGD's steps are smaller than 16 bits resolve ({why}); {change}"
        )
    share = optim.unmoved_share(tree, spec.lr)
    if share > _MOST_UNMOVED:
        raise ConfigError(
            f"{key} is {stored.name} and optim.lr {spec.lr:g}: a step of that size rounds back to "
            f"nothing in {share:.1%} of the weights; expected float32 parameters, or a rate that "
            f"16 bits resolve ({why}); {change}"
        )
