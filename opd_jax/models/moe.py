"""A feed-forward of experts: each token uses its top few of many.

No token is dropped and no buffer has a capacity: the pairs of token and expert are sorted by expert
and multiplied group by group (``grouped``). How evenly they spread is measured by :func:`load`, of
which :func:`imbalance` makes the loss that a student's router may be trained on too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from opd_jax import mesh
from opd_jax.models import grouped
from opd_jax.models.architecture import Experts
from opd_jax.pytrees import Params


def ffn(
    layer: Params,
    x_RD: Float[Array, "R D"],
    *,
    experts: Experts,
    activation: Callable[[jax.Array], jax.Array],
) -> Float[Array, "R D"]:
    """The weighted sum of what each row's experts say, chosen by a softmax over all.

    **Sharding**: rows over the batch axes, experts over ``model``: every device computes its own
    experts for all its rows, and one sum over ``model`` adds them up.
    """
    prob_RX = _probabilities(layer, x_RD)
    weights = tuple(layer[name] for name in ("expert_gate", "expert_up", "expert_down"))
    local = functools.partial(_local, experts, activation, mesh.is_active())
    if not mesh.is_active():
        return local(x_RD, prob_RX, *weights)
    rows, parts = P(mesh.BATCH, None), P("model", None, None)
    specs = (rows, rows, parts, parts, parts)
    summed = jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)
    return summed(x_RD, prob_RX, *weights)


def _probabilities(layer: Params, x_RD: jax.Array) -> jax.Array:
    logits_RX = jnp.dot(x_RD, layer["router"], preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits_RX, axis=-1)


class Load(struct.PyTreeNode):
    """What fell on each expert, summed over tokens and layers; add up those of micro-batches."""

    count_X: jax.Array  # [X] f32, times that it was chosen; without gradient
    prob_X: jax.Array  # [X] f32, its probabilities
    num: jax.Array  # [] f32, pairs of token and layer

    def __add__(self, other: Load) -> Load:
        return jax.tree.map(jnp.add, self, other)


def load(
    layer: Params, x_RD: Float[Array, "R D"], counted_R: Bool[Array, " R"], *, experts: Experts
) -> Load:
    """How the counted rows spread over the experts of a layer.

    **Sharding**: rows over the batch axes, the result everywhere.
    """
    prob_RX, counted_R = _probabilities(layer, x_RD), counted_R.astype(jnp.float32)

    def counts(prob_RX, counted_R):
        _, choice_RK = choose(prob_RX, experts)
        counted_RK = jnp.broadcast_to(counted_R[:, None], choice_RK.shape)
        count_X = jnp.zeros(experts.num, jnp.float32).at[choice_RK].add(counted_RK)
        return jax.lax.psum(count_X, mesh.BATCH) if is_sharded else count_X

    if is_sharded := mesh.is_active():
        specs = P(mesh.BATCH, None), P(mesh.BATCH)
        counts = jax.shard_map(counts, in_specs=specs, out_specs=P(None), check_vma=False)
    return Load(
        count_X=counts(jax.lax.stop_gradient(prob_RX), counted_R),
        prob_X=jnp.sum(prob_RX * counted_R[:, None], axis=0),
        num=jnp.sum(counted_R),
    )


def imbalance(load: Load, whole: Load) -> Float[Array, ""]:
    r"""The load-balancing loss :math:`X \sum_x f_x P_x`, of which this is the part of ``load``.

    f is the mean number of times that a token chose expert x, P its mean probability, both over all
    tokens and layers with experts of ``whole``; the gradient flows through P. At its least, where
    all experts get the same, it is the number of experts per token. Switch Transformers, eq. 4, as
    ``load_balancing_loss_func`` of transformers has it; f and P there are those of a micro-batch,
    here those of the whole batch, so that pieces and shards do not change it (arXiv 2501.11873).

    Args:
      load: of some of the tokens.
      whole: of all of them; only its counts are used.
    """
    num = jnp.maximum(whole.num, 1.0)
    share_X = jax.lax.stop_gradient(whole.count_X) / num
    return share_X.shape[0] * jnp.sum(share_X * load.prob_X) / num


def choose(
    prob_RX: Float[Array, "R X"], experts: Experts
) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """The experts of each row, the most probable ones, and their weights, f32.

    **Sharding**: of one device; XLA would gather all rows to find the largest.
    """
    weight_RK, choice_RK = jax.lax.top_k(prob_RX, experts.top_k)
    if experts.is_normalised:
        weight_RK /= jnp.sum(weight_RK, axis=-1, keepdims=True)
    return weight_RK, choice_RK


def _local(
    experts: Experts, activation, is_sharded: bool, x_RD, prob_RX, gate_XDE, up_XDE, down_XED
):
    """The experts that lie here, for the rows that lie here."""
    weight_RK, choice_RK = choose(prob_RX, experts)
    num = gate_XDE.shape[0]
    first = jax.lax.axis_index("model") * num if is_sharded else 0
    here_N = choice_RK.ravel() - first
    here_N = jnp.where((here_N >= 0) & (here_N < num), here_N, num)  # others' pairs come last
    order_N = jnp.argsort(here_N, stable=True)
    place_N = jnp.argsort(order_N)
    sizes_X = jnp.bincount(here_N, length=num).astype(jnp.int32)
    x_ND = _sorted(x_RD, order_N, place_N)
    act_NE = activation(grouped.times(x_ND, gate_XDE, sizes_X))
    y_ND = grouped.times(act_NE * grouped.times(x_ND, up_XDE, sizes_X), down_XED, sizes_X)
    y_RKD = _permuted(y_ND, place_N, order_N).reshape(*weight_RK.shape, -1)
    out_RD = jnp.sum(y_RKD.astype(jnp.float32) * weight_RK[:, :, None], axis=1)
    out_RD = jax.lax.psum(out_RD, "model") if is_sharded else out_RD
    return out_RD.astype(x_RD.dtype)


@jax.custom_vjp
def _sorted(x_RD: jax.Array, order_N: jax.Array, place_N: jax.Array) -> jax.Array:
    """A copy of its row for every pair, in their order; the gradient adds them up in f32."""
    return x_RD[order_N // (order_N.shape[0] // x_RD.shape[0])]


def _sorted_backward(residuals, dy_ND):
    place_N, num_rows = residuals
    dy_RKD = dy_ND[place_N].reshape(num_rows, -1, dy_ND.shape[1])
    return jnp.sum(dy_RKD, axis=1, dtype=jnp.float32).astype(dy_ND.dtype), None, None


@jax.custom_vjp
def _permuted(x_ND: jax.Array, order_N: jax.Array, place_N: jax.Array) -> jax.Array:
    """``x[order]``; the gradient looks up ``place``, the inverse, where autodiff would scatter."""
    return x_ND[order_N]


def _sorted_forward(x_RD, order_N, place_N):
    return _sorted(x_RD, order_N, place_N), (place_N, x_RD.shape[0])


def _permuted_forward(x_ND, order_N, place_N):
    return _permuted(x_ND, order_N, place_N), place_N


_sorted.defvjp(_sorted_forward, _sorted_backward)
_permuted.defvjp(_permuted_forward, lambda place_N, dy_ND: (dy_ND[place_N], None, None))
