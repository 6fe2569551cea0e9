"""Parameters as programs want them: a layer's, those of a loop over tokens, other vocabularies'."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from opd_jax import mesh
from opd_jax.models import linear
from opd_jax.models.architecture import NUM_INPUTS, ModelConfig, layers_with, specs
from opd_jax.models.linear import Adapted
from opd_jax.pytrees import Params


def for_decoding(params: Params, *, cfg: ModelConfig) -> Params:
    """The same parameters for a loop over tokens: ``layers`` as a tuple of per-layer dicts, in the
    compute dtype, off the ``fsdp`` axis, and turned; adapted weights merged, in f32.

    Done once before the loop: inside, every token would slice, cast and gather all weights. In 16
    bits adapted weights stay apart: a change below the last bit of its weight would be lost, and
    with it the policy that is trained.
    """
    layers = params["layers"]
    place = {name: {i: at for at, i in enumerate(layers_with(cfg, name))} for name in layers}

    def of_layer(name: str, i: int):
        w = sliced(layers[name], place[name][i])
        is_exact = isinstance(w, Adapted) and cfg.compute_dtype.itemsize >= 4
        return w.merged(NUM_INPUTS[name]) if is_exact else w

    split = [
        gathered({name: of_layer(name, i) for name in layers if i in place[name]}, cfg)
        for i in range(cfg.num_layers)
    ]
    return {**params, "layers": tuple(_turned(layer, cfg) for layer in split)}


def sliced(w, at: int | slice):
    """Of a stacked weight, whatever its form, one layer or some."""
    return jax.tree.map(lambda x: x[at], w)


def _turned(layer: Params, cfg: ModelConfig) -> Params:
    declared = specs(cfg)["layers"]

    def turned(w, name: str):
        if isinstance(w, Adapted):
            return w.replace(w=turned(w.w, name))
        return linear.turn(w, NUM_INPUTS[name], axes=declared[name].axes[1:])

    return layer | {name: turned(layer[name], name) for name in NUM_INPUTS if name in layer}


def _unsharded(w: jax.Array, axes: tuple, cfg: ModelConfig) -> jax.Array:
    kept = (None if axis == "fsdp" else axis for axis in axes)
    return mesh.constrain(w.astype(cfg.compute_dtype), *kept)


def gathered(layer: Params, cfg: ModelConfig) -> Params:
    """A layer's parameters in the compute dtype, off the ``fsdp`` axis."""
    declared, move = specs(cfg)["layers"], functools.partial(_unsharded, cfg=cfg)

    def moved(w, name: str):
        axes = declared[name].axes[1:]
        return w.placed(move, axes, NUM_INPUTS[name]) if isinstance(w, Adapted) else move(w, axes)

    return {name: moved(w, name) for name, w in layer.items()}


def with_vocab_rows(params: Params, rows: int) -> Params:
    """The same parameters with ``rows`` vocabulary rows: padding cut off, or zero rows added.

    For a teacher whose table is padded to another size than the student's; the caller masks the
    padded ids, and has checked that no real id is cut.

    Sharding: as in :func:`specs`.
    """

    def fit(w_VD):
        extra = max(rows - w_VD.shape[0], 0)
        whole_VD = mesh.constrain(w_VD, None, "fsdp")
        return mesh.constrain(jnp.pad(whole_VD[:rows], ((0, extra), (0, 0))), "model", "fsdp")

    if params["embed"].shape[0] == rows:
        return params
    tables = {name: fit(params[name]) for name in ("embed", "head") if name in params}
    return {**params, **tables}
