"""Experts: the grouped products and their gradients, and a layer of them, against plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import mesh
from opd_jax.models import grouped, moe
from opd_jax.models.architecture import Experts

R, D, F, X, K = 24, 8, 6, 4, 2
EXPERTS = Experts(num=X, top_k=K, ffn=F)
SIZES = {
    "even": (6, 6, 6, 6),
    "empty groups": (0, 17, 0, 7),
    "one group": (0, 0, 24, 0),
    "rows of no group": (3, 0, 9, 1),
    "nothing": (0, 0, 0, 0),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- products ------------------------------------------------------------------------------------


def loop(x, w, sizes):
    """Group by group in float64; rows of no group give 0."""
    out, ends = np.zeros((len(x), w.shape[2])), np.cumsum(sizes)
    for group, end in enumerate(ends):
        rows = slice(end - sizes[group], end)
        out[rows] = x[rows].astype(np.float64) @ w[group]
    return out


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_products_equal_a_loop_and_ragged_dot(sizes):
    """Where the kernel of a TPU is not, its rule in jax says what it gives."""
    x, w, sizes = draw(0, R, D), draw(1, X, D, F), np.array(sizes, np.int32)
    expected = loop(x, w, sizes)
    np.testing.assert_allclose(jax.jit(grouped.by_blocks)(x, w, sizes), expected, atol=1e-5)
    kernel = grouped._first_rows(jax.lax.ragged_dot(x, w, sizes), sizes.sum())
    np.testing.assert_allclose(kernel, expected, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 200])
def test_products_at_the_edges_of_blocks(num_rows):
    rng = np.random.default_rng(num_rows)
    x, w = draw(0, num_rows, D), draw(1, X, D, F)
    for _ in range(3):
        cuts = np.sort(rng.integers(0, num_rows + 1, size=X))
        sizes = np.diff(cuts, prepend=0).astype(np.int32)
        found = jax.jit(grouped.by_blocks)(x, w, sizes)
        np.testing.assert_allclose(found, loop(x, w, sizes), atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients_of_products_equal_a_loop(sizes):
    x, w, weight = draw(0, R, D), draw(1, X, D, F), draw(2, R, F)
    sizes = np.array(sizes, np.int32)

    def loss(x, w):
        return jnp.sum(grouped.times(x, w, jnp.asarray(sizes)) * weight)

    dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, w)
    np.testing.assert_allclose(dx, loop(weight, w.swapaxes(1, 2), sizes), atol=1e-5)
    for group, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[group], end)
        np.testing.assert_allclose(dw[group], x[rows].T @ weight[rows], atol=1e-5)


def test_blocks_are_few_and_each_is_whole():
    for num_rows, num_groups in [(1, 128), (64, 128), (512, 8), (65_536 * 8, 128)]:
        size = grouped.block_size(num_rows, num_groups)
        assert 1 <= size <= min(num_rows, grouped.LARGEST_BLOCK)
        most = num_rows / size + num_groups
        assert most * size <= max(1.25 * num_rows + 1, 8 * (num_groups + num_rows))


def test_sums_over_rows_are_taken_in_f32():
    """In bfloat16 a sum of thousands of ones stands still at 256."""
    num = 4096
    ones, dy = jnp.ones((num, D), jnp.bfloat16), jnp.ones((num, F), jnp.bfloat16)
    sizes = jnp.array([num, 0, 0, 0])
    _, back = jax.vjp(lambda w: grouped.times(ones, w, sizes), jnp.zeros((X, D, F), jnp.bfloat16))
    (dw,) = back(dy)
    assert dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(dw, np.float32)[0], num)


# --- a layer of experts ---------------------------------------------------------------------------


def layer(seed=0, scale=1.0):
    return {
        "router": scale * draw(seed, D, X),
        "expert_gate": draw(seed + 1, X, D, F),
        "expert_up": draw(seed + 2, X, D, F),
        "expert_down": draw(seed + 3, X, F, D),
    }


def dense(layer, x, experts):
    """Every expert computes every row, and what was not chosen counts 0."""
    prob = jax.nn.softmax(x @ layer["router"], axis=-1)
    kept = prob >= jnp.sort(prob, axis=-1)[:, -experts.top_k][:, None]
    weight = prob * kept
    if experts.is_normalised:
        weight /= weight.sum(-1, keepdims=True)
    gate = jnp.einsum("RD,XDF->RXF", x, layer["expert_gate"])
    up = jnp.einsum("RD,XDF->RXF", x, layer["expert_up"])
    each = jnp.einsum("RXF,XFD->RXD", jax.nn.silu(gate) * up, layer["expert_down"])
    return jnp.einsum("RX,RXD->RD", weight, each)


def both(function, layer, x):
    """The result, and the gradient of a weighted sum of it to all that goes in."""
    weight = draw(9, *x.shape)

    def loss(layer, x):
        out = function(layer, x)
        return jnp.sum(out * weight), out

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(layer, x)


def ours(experts=EXPERTS):
    return functools.partial(moe.ffn, experts=experts, activation=jax.nn.silu)


def assert_same(found, expected, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


@pytest.mark.parametrize("is_normalised", [True, False])
def test_a_layer_and_its_gradient_equal_all_experts_computed(is_normalised):
    experts = dataclasses.replace(EXPERTS, is_normalised=is_normalised)
    x = draw(7, R, D)
    found = both(ours(experts), layer(), x)
    expected = both(functools.partial(dense, experts=experts), layer(), x)
    assert_same(found, expected)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found))


def test_no_token_is_dropped_where_all_want_the_same_experts():
    one = layer()
    one["router"][:] = 0
    one["router"][0] = (50, 40, -50, -50)
    x = np.abs(draw(7, R, D))
    out = jax.jit(ours())(one, x)
    np.testing.assert_allclose(out, dense(one, x, EXPERTS), atol=1e-5)
    assert (np.abs(out).max(axis=1) > 1e-3).all()


def spread(tree, specs):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec)), tree, specs
    )


@pytest.mark.parametrize("axes", [(2, 1, 4), (2, 2, 2)])
def test_experts_on_a_mesh_give_the_same_with_one_sum(axes):
    x, parts = draw(7, R, D), P("model", None, None)
    specs = {name: P(None, None) if name == "router" else parts for name in layer()}
    expected = both(ours(), layer(), x)
    with jax.set_mesh(mesh.make(*axes, devices=jax.devices())):
        placed, x = spread(layer(), specs), spread(x, P(mesh.BATCH, None))
        found = both(ours(), placed, x)
        text = jax.jit(ours()).lower(placed, x).compile().as_text()
    assert_same(found, expected)
    assert text.count(" all-reduce(") == 1
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def test_more_experts_than_there_are_cannot_be_chosen():
    with pytest.raises(ValueError, match="5 experts per token of 4"):
        Experts(num=4, top_k=5, ffn=8)


# --- how evenly they are used ---------------------------------------------------------------------


def balance_loss(logits_LRX, counted_R, top_k):
    """Switch Transformers' loss over all layers and counted rows, in float64."""
    logits = np.asarray(logits_LRX, np.float64)[:, counted_R]
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-prob, axis=-1)[..., :top_k]
    num = prob.shape[-1]
    share = np.stack([(chosen == x).any(-1) for x in range(num)], -1).mean((0, 1))
    return num * (share * prob.mean((0, 1))).sum()


COUNTED = np.arange(R) % 3 != 1


def loads(layers, x, counted):
    """Of some layers that all read the same rows."""
    each = [moe.load(one, x, counted, experts=EXPERTS) for one in layers]
    return functools.reduce(lambda a, b: a + b, each)


def loss_of(layers, x, counted):
    load = loads(layers, x, counted)
    return moe.imbalance(load, load)


def test_the_load_balancing_loss_is_that_of_the_formula():
    layers, x = [layer(0), layer(20, scale=2.0)], draw(7, R, D)
    logits = np.stack([x @ one["router"] for one in layers])
    expected = balance_loss(logits, COUNTED, K)
    assert jax.jit(loss_of)(layers, x, COUNTED) == pytest.approx(expected, rel=1e-5)
    assert balance_loss(logits, np.ones(R, bool), K) != pytest.approx(expected, rel=1e-3)
    even = [{"router": np.zeros((D, X), np.float32)}]
    assert loss_of(even, x, COUNTED) == pytest.approx(K)  # at its least


@pytest.mark.ci
def test_the_load_balancing_loss_is_that_of_transformers():
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    layers, x = [layer(0), layer(20, scale=2.0)], draw(7, R, D)
    mask = torch.tensor(COUNTED.reshape(2, R // 2)).long()
    logits = tuple(torch.tensor(x @ one["router"]) for one in layers)
    theirs = load_balancing_loss_func(logits, X, K, mask)
    assert jax.jit(loss_of)(layers, x, COUNTED) == pytest.approx(float(theirs), rel=1e-5)
    for one in logits:
        one.requires_grad_()
    load_balancing_loss_func(logits, X, K, mask).backward()
    grads = jax.grad(loss_of)(layers, x, COUNTED)
    for ours, one in zip(grads, logits, strict=True):
        np.testing.assert_allclose(ours["router"], x.T @ one.grad.numpy(), atol=1e-5)


def test_pieces_and_shards_do_not_change_the_load_balancing_loss():
    layers, x = [layer(0), layer(20)], draw(7, R, D)
    expected = jax.value_and_grad(loss_of)(layers, x, COUNTED)

    def in_pieces(layers, x, counted):
        halves = [loads(layers, x[i::2], counted[i::2]) for i in range(2)]
        whole = halves[0] + halves[1]
        return sum(moe.imbalance(half, whole) for half in halves)

    assert_same(jax.value_and_grad(in_pieces)(layers, x, COUNTED), expected)
    with jax.set_mesh(mesh.make(2, 2, 2, devices=jax.devices())):
        placed = spread(x, P(mesh.BATCH, None)), spread(COUNTED, P(mesh.BATCH))
        specs = {name: P(*[None] * leaf.ndim) for name, leaf in layers[0].items()}
        found = jax.jit(jax.value_and_grad(loss_of))(
            [spread(one, specs) for one in layers], *placed
        )
    assert_same(found, expected)
