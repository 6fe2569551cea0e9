"""FLOPs of traced programs: loops by their rounds, models as their parameters say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from opd_jax import mesh, rounds
from opd_jax.models import attention, kernels, paged, params, transformer
from opd_jax.models.architecture import Experts, LayerKind
from opd_jax.models.attention import Span
from opd_jax.models.transformer import ModelConfig
from opd_jax.plan import products

DENSE = ModelConfig("qwen3", 96, 32, 48, 5, 4, 2, 8, tied=True, qk_norm=True)
ONE = 2 * 8 * 16 * 16  # of a product [8, 16] x [16, 16]
X, W = jnp.ones((8, 16)), jnp.ones((16, 16))


def count(function, *args, **kwargs):
    return products.flops(jax.jit(function).trace(*args).jaxpr, **kwargs)


def looped(x, w, body):
    return jax.lax.while_loop(lambda x: jnp.max(x) < 9, body, x)


def test_without_loops_it_is_what_xla_counts():
    def function(x, w):
        return jnp.einsum("bi,io->bo", x, w), jnp.einsum("bi,bo->io", x, x)

    compiled = jax.jit(function).lower(X, W).compile()
    assert count(function, X, W) == pytest.approx(compiled.cost_analysis()["flops"], rel=1e-3)


def test_a_loop_counts_by_its_rounds():
    def scanned(x, w):
        return jax.lax.scan(
            lambda x, _: (jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x), 0), x, length=7
        )

    assert count(scanned, X, W) == 21 * ONE
    # The compiler's own count of the same program does not know of rounds.
    assert jax.jit(scanned).lower(X, W).compile().cost_analysis()["flops"] < 21 * ONE / 2


def test_a_loop_that_ends_when_rows_do_counts_as_it_says():
    def function(x, w, scored=False):
        with rounds.expected(10, scored=scored):
            return jax.lax.while_loop(lambda x: jnp.max(x) < 9, lambda x: x @ w, x)

    assert count(function, X, W) == 10 * ONE
    assert count(functools.partial(function, scored=True), X, W, scored_share=0.42) == 5 * ONE
    assert products.split(jax.jit(lambda x, w: function(x @ w, w)).trace(X, W).jaxpr) == (
        10 * ONE,
        ONE,
    )
    assert rounds.of("jit(f)/scan/body/add") is None


def test_the_gradient_of_a_loop_counts_and_rematerialisation_does_too():
    def layer(x, w):
        return jnp.tanh(x @ w)

    def total(w, remat):
        step = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jax.lax.scan(lambda x, _: (step(x, w), None), X, length=4)[0])

    plain, again = (count(jax.grad(functools.partial(total, remat=r)), W) for r in (False, True))
    assert (plain, again) == (12 * ONE, 16 * ONE)


def test_of_two_branches_the_larger_counts():
    def function(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count(function, X, W) == 2 * ONE


def test_all_devices_of_a_shard_map_count():
    with jax.set_mesh(mesh.make(2, 2, 2)):
        rows, outputs = P(mesh.BATCH, None), P(None, "model")
        x, w = jax.reshard(X, rows), jax.reshard(W, outputs)
        local = jax.shard_map(
            jnp.matmul, in_specs=(rows, outputs), out_specs=P(mesh.BATCH, "model")
        )
        assert count(local, x, w) == ONE


def states(tree, ids, valid, cfg):
    return transformer.hidden(tree, ids, transformer.positions(valid), valid, cfg=cfg)[0]


def model_flops(cfg, rows, columns):
    tree = params.abstract(transformer.specs(cfg), jnp.float32)
    ids, valid = (jax.ShapeDtypeStruct((rows, columns), kind) for kind in (jnp.int32, bool))
    return count(functools.partial(states, cfg=cfg), tree, ids, valid)


def weights(cfg, used=lambda name: 1.0):
    """Parameters that a token is multiplied by, norms left out."""
    layers = transformer.specs(cfg)["layers"]
    return sum(math.prod(s.shape) * used(n) for n, s in layers.items() if "norm" not in n)


def attention_flops(cfg, rows, columns):
    """Operations of scores and mixtures, whole squares."""
    return 4 * rows * columns**2 * cfg.num_heads * cfg.head_dim * cfg.num_layers


def test_a_model_takes_two_operations_a_parameter_and_token():
    rows, columns = 4, 40
    found = model_flops(DENSE, rows, columns)
    plain = 2 * rows * columns * weights(DENSE)
    assert plain + attention_flops(DENSE, rows, columns) / 2 <= found
    assert found <= plain + attention_flops(DENSE, rows, columns)


def test_of_a_model_with_experts_the_active_ones_count():
    sparse = dataclasses.replace(
        DENSE,
        model_type="qwen3_moe",
        experts=Experts(num=16, top_k=2, ffn=48),
        pattern=(LayerKind(is_sparse=True),) * DENSE.num_layers,
    )
    rows, columns = 8, 64
    stacks = {
        n
        for n, s in transformer.specs(sparse)["layers"].items()
        if len(s.shape) == 4 and 16 in s.shape[:2]
    }
    assert len(stacks) >= 3
    active = 2 * rows * columns * weights(sparse, lambda n: 2 / 16 if n in stacks else 1.0)
    found = model_flops(sparse, rows, columns) - attention_flops(sparse, rows, columns) / 2
    assert active <= found <= 2 * active  # blocks of rows are not quite full, see models/grouped


def test_a_kernel_counts_by_its_grid():
    from jax.experimental import pallas

    def body(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    kernel = pallas.pallas_call(
        body,
        grid=(4,),
        in_specs=[
            pallas.BlockSpec((2, 16), lambda i: (i, 0)),
            pallas.BlockSpec((16, 16), lambda i: (0, 0)),
        ],
        out_specs=pallas.BlockSpec((2, 16), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 16), jnp.float32),
        interpret=True,
    )
    assert count(kernel, X, W) == ONE


@pytest.mark.parametrize("window", [None, 200])
def test_kernels_of_attention_count_what_they_compute(window):
    """Blocks that splash attention skips do not count."""
    rows, length, heads, group, head_dim = 2, 640, 2, 3, 128
    shapes = (rows, length, heads, group, head_dim), (rows, length, heads, head_dim)
    q, k = (jnp.zeros(shape, jnp.bfloat16) for shape in shapes)
    valid = jnp.ones((rows, length), bool)
    span = Span(1.0, window)

    def total(function, q, k, v, span=span):
        return jnp.sum(function(q, k, v, valid, span=span), dtype=jnp.float32)

    mix = lambda q, k, v, valid, span: kernels.by_splash(  # noqa: E731
        q, k, v, jnp.where(valid, 0, -1), span=span
    )
    splash = functools.partial(total, mix)
    grad = jax.grad(splash, argnums=(0, 1, 2))
    block = 2 * 2 * rows * heads * group * head_dim * 512 * 512  # 640 tokens fill two blocks
    assert count(splash, q, k, k) == 3 * block  # of four pairs one is never read
    inside = count(grad, q, k, k, of_kernels=True)
    assert inside == 3 * block * (1 + 7 / 2)  # scores twice more: for dq, and for dk and dv
    assert inside <= count(grad, q, k, k) < 1.001 * inside  # out . dout is not in a kernel
    ours = functools.partial(total, attention.causal)
    assert count(ours, q, k, k, of_kernels=True) == 0

    # cuDNN cannot be traced without its library: by the shapes that its operation is given.
    exact = products.fused_attention([(rows, length, heads * group, head_dim)], window, False)
    seen = sum(min(t + 1, window or length) for t in range(length))
    assert exact == 4 * rows * heads * group * head_dim * seen
    back = products.fused_attention([(rows, length, heads * group, head_dim)], window, True)
    assert back == 2.5 * exact


@pytest.mark.parametrize("begin", [0, 1024])
def test_a_kernel_over_pages_counts_those_that_hold_something(begin):
    rows, heads, group, slots, head_dim = 4, 2, 3, 4096, 128
    shapes = (rows, 1, heads, group, head_dim), (rows, heads, slots, head_dim)
    q, k = (jnp.zeros(shape, jnp.bfloat16) for shape in shapes)

    def answer(q, k, length_B):
        def step(carry):
            q, length_B = carry
            return paged.attend(q, k, k, length_B, 1.0), length_B + 1

        with rounds.expected(slots - begin, begin=begin):
            return jax.lax.while_loop(lambda carry: carry[1][0] < slots, step, (q, length_B))

    pages = 4 * (1 + begin / slots) / 2 + 0.5  # of 1,024 slots, the last one half full
    wanted = (slots - begin) * rows * heads * pages * 2 * 2 * group * 1024 * head_dim
    length_B = jnp.full(rows, begin + 1)
    assert count(answer, q, k, length_B) == wanted
    assert count(answer, q, k, length_B, of_kernels=True) == wanted
    inside, outside = products.split(jax.make_jaxpr(answer)(q, k, length_B), of_kernels=True)
    assert (inside, outside) == (wanted, 0)
