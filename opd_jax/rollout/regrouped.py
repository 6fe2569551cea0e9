"""Sampling on another arrangement of the devices than that of training.

A token's step reads all weights that a device has: of a model that is split by ``fsdp`` and
gathered, all of them, whatever the number of devices. With more devices along ``model`` each reads
a part, and exchanges a row's state twice a layer. An update is the other way round. So a phase of
sampling begins with the weights laid out anew, in the dtype that they are computed in, and ends
with the answers brought back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from opd_jax import mesh as meshlib
from opd_jax.models.linear import Adapted
from opd_jax.models.transformer import ModelConfig
from opd_jax.pytrees import Params, Prompt, Rollout
from opd_jax.rollout import decode


def policy(
    params: Params,
    *,
    cfg: ModelConfig,
    on: Mesh | None,
    run: Callable[..., Any] | None = None,
) -> Params:
    """The parameters where :func:`sample` takes them; as they are where ``on`` is their place.

    Args:
      params: of the model that samples.
      cfg: its.
      on: devices in the arrangement of sampling; None: that of the parameters.
      run: as :func:`mesh.moved` takes it.
    """
    if on is None or _home(params) == on:
        return params
    return meshlib.moved(params, on, _dtypes(params, cfg), run)


def _dtypes(params: Params, cfg: ModelConfig) -> Any:
    """Of each parameter the dtype in which sampling begins to compute with it, so: no more bits."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Adapted):  # its scale is taken in while it has all its bits
            return leaf.replace(w=of(leaf.w), a=leaf.a.dtype, b=leaf.b.dtype)
        return cfg.compute_dtype

    found = jax.tree.map(of, params, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    return found | {"final_norm": params["final_norm"].dtype}


def sample(
    params: Params, prompt: Prompt, key: jax.Array, *, on: Mesh | None, **how: Any
) -> Rollout:
    """``decode.sample`` on the devices in the arrangement ``on``.

    Args:
      params: of :func:`policy`.
      prompt: where training has it; the answers are brought there.
      key: of the draws.
      on: see there.
      how: what ``decode.sample`` is told.
    """
    home = _home(prompt)
    if on is None or home in (None, on):
        return decode.sample(params, prompt, key, **how)
    given = {name: how[name] for name in ("bias_V", "rows_B") if how.get(name) is not None}
    prompt, key, given = meshlib.moved((prompt, key, given), on)
    with jax.set_mesh(on):
        answers = decode.sample(params, prompt, key, **(how | given))
    return meshlib.moved(answers, home)


def _home(tree: Any) -> Any:
    """The mesh that arrays lie on; None: they lie on none."""
    return getattr(getattr(jax.tree.leaves(tree)[0], "sharding", None), "mesh", None)
