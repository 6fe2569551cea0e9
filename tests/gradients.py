"""A model's gradient, on one device and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import params, transformer


def spread(tree, cfg):
    """The same parameters on the current mesh."""
    places = params.shardings(transformer.specs(cfg), jax.sharding.get_mesh())
    return jax.tree.map(jax.device_put, jax.tree.map(np.asarray, tree), places)


@functools.partial(jax.jit, static_argnames="cfg")
def gradient(tree, ids_BT, valid_BT, *, cfg):
    """Gradient of the mean squared logit, and the logits (one compilation for both)."""

    def loss(tree):
        out_BTV = transformer.logits(tree, ids_BT, cfg=cfg, valid_BT=valid_BT)
        return jnp.mean(jnp.square(out_BTV) * valid_BT[:, :, None]), out_BTV

    return jax.grad(loss, has_aux=True)(tree)
