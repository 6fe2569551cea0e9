"""The kernels against attention.causal on a CPU: Pallas interpreted, and products of jax.nn.

``tests/test_tpu.py`` compiles them for the machines that they are for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh as meshlib
from opd_jax.models import attention, kernels, transformer
from opd_jax.models.architecture import LayerKind
from opd_jax.models.attention import Span

B, K, G = 4, 2, 3
KERNELS = {
    "splash": lambda q, k, v, valid, **flags: kernels.by_splash(
        q, k, v, jnp.where(valid, 0, -1), interpret=True, **flags
    ),
    "cudnn": functools.partial(kernels.by_cudnn, implementation="xla"),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(length, head_dim):
    """Queries, keys, values of rows with no padding, some, much, and nothing but padding."""
    padding = np.array([0, 1, length - 2, length])[:, None]
    valid = jnp.asarray(np.arange(length)[None] >= padding)
    shape = B, length, K
    q = draw(0, *shape, G, head_dim)
    return (q, draw(1, *shape, head_dim), draw(2, *shape, head_dim)), valid


def value_and_grads(function, qkv, valid, **flags):
    """Sum of what valid queries get, weighted by noise, and its gradient to q, k and v."""
    weight = draw(3, *qkv[0].shape) * np.asarray(valid)[..., None, None, None]
    loss = lambda *qkv: jnp.sum(function(*qkv, valid, **flags) * weight)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*qkv)


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("length", "head_dim", "window"), [(150, 16, None), (150, 128, 40)])
def test_a_kernel_gives_what_blocks_give(name, length, head_dim, window):
    qkv, valid = inputs(length, head_dim)
    span = Span(0.3, window)
    found = value_and_grads(KERNELS[name], qkv, valid, span=span)
    expected = value_and_grads(attention.causal, qkv, valid, span=span)
    close(found, expected)
    assert all(np.abs(grad).max() > 1e-2 for grad in expected[1])
    out = KERNELS[name](*qkv, valid, span=span)
    assert out.shape == qkv[0].shape
    assert np.isfinite(out).all()  # of rows that are padding alone too


@pytest.mark.parametrize("name", KERNELS)
def test_half_precision_stays(name):
    qkv, valid = inputs(140, 128)
    half = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    out = KERNELS[name](*half, valid, span=Span(128**-0.5))
    exact = attention.causal(*qkv, valid, span=Span(128**-0.5))
    assert out.dtype == jnp.bfloat16
    sees = np.asarray(valid)
    np.testing.assert_allclose(np.asarray(out, np.float32)[sees], exact[sees], atol=0.04)


@pytest.mark.parametrize("window", [None, 30])
def test_packed_rows_read_their_own_sequence(monkeypatch, window):
    """On a TPU by segments, on a GPU by blocks."""
    length = 150
    qkv, _ = inputs(length, 16)
    first = np.zeros((B, length), np.int32)
    for row, at in enumerate((0, 1, 70, 149)):
        first[row, at:] = at
    valid = jnp.asarray(np.arange(length)[None] < np.array([150, 150, 120, 150])[:, None])
    flags = {"span": Span(0.3, window), "first_BT": jnp.asarray(first)}
    expected = value_and_grads(attention.causal, qkv, valid, **flags)
    apart = value_and_grads(attention.causal, qkv, valid, span=Span(0.3, window))
    assert abs(apart[0] - expected[0]) > 1e-2
    for name, platform in (("splash", "tpu"), ("blocks", "cuda")):
        assert kernels.chosen(platform, 8192, 128, "bfloat16", is_packed=True) == name
        kernel = functools.partial(kernels.by_splash, interpret=True)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "by_splash", kernel)
            mix = functools.partial(kernels.causal, name=name)
            close(value_and_grads(mix, qkv, valid, **flags), expected)


def test_tiles_are_whole_and_few():
    for length in (1, 128, 129, 511, 512, 513, 8320):
        size, padded = kernels._tiles(length)
        assert padded % size == size % 128 == 0
        assert length <= padded < length + max(size, 128)


@pytest.mark.parametrize(
    ("platform", "length", "head_dim", "dtype", "expected"),
    [
        ("cpu", 8192, 128, "float32", "blocks"),
        ("tpu", 8192, 128, "bfloat16", "splash"),
        ("tpu", 8192, 64, "float32", "splash"),
        ("tpu", 64, 128, "bfloat16", "blocks"),
        ("cuda", 8192, 128, "bfloat16", "cudnn"),
        ("gpu", 8192, 128, "float16", "cudnn"),
        ("cuda", 8192, 128, "float32", "blocks"),  # cuDNN has halves alone
        ("cuda", 8192, 100, "bfloat16", "blocks"),
        ("cuda", 8192, 512, "bfloat16", "blocks"),
        ("cuda", 64, 128, "bfloat16", "blocks"),
    ],
)
def test_the_kernel_of_a_platform(monkeypatch, platform, length, head_dim, dtype, expected):
    monkeypatch.setattr(kernels, "has_cudnn", lambda: True)
    assert kernels.chosen(platform, length, head_dim, dtype) == expected


def test_without_cudnn_a_gpu_has_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "has_cudnn", lambda: False)
    assert kernels.chosen("cuda", 8192, 128, "bfloat16") == "blocks"


CFG = transformer.ModelConfig(
    model_type="gemma3_text",
    vocab_size=32,
    width=32,
    ffn=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    pattern=(LayerKind(True), LayerKind(False), LayerKind(True)),
    window=20,
)


@pytest.mark.parametrize("name", ["splash", "cudnn"])
@pytest.mark.parametrize("axes", [None, (2, 1, 2)])
def test_a_model_computes_the_same_with_a_kernel(monkeypatch, name, axes):
    """Local and global layers in one scan, where which is which is data; on a mesh too."""
    rows, length = 4, 140
    ids = np.random.default_rng(0).integers(0, 32, (rows, length))
    valid = jnp.asarray(np.arange(length)[None] >= np.array([0, 3, 100, 120])[:, None])
    mesh = meshlib.make(*axes, devices=jax.devices()[:4]) if axes else None
    rng = np.random.default_rng(1)
    weights = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32),
        transformer.specs(CFG),
        is_leaf=lambda leaf: hasattr(leaf, "shape"),
    )

    def loss(weights, cfg):
        h = transformer.hidden(weights, ids, transformer.positions(valid), valid, cfg=cfg)[0]
        return jnp.sum(jnp.square(h) * valid[:, :, None])

    def computed(cfg):
        return jax.jit(jax.value_and_grad(functools.partial(loss, cfg=cfg)))(weights)

    expected = computed(CFG)
    used = []

    own = {"interpret": True} if name == "splash" else {"implementation": "xla"}
    by_kernel = getattr(kernels, f"by_{name}")

    def kernel(*args, **flags):
        used.append(flags["span"].window)
        return by_kernel(*args, **flags, **own)

    monkeypatch.setattr(kernels, f"by_{name}", kernel)
    monkeypatch.setattr(kernels, "chosen", lambda *_, **__: name)
    assert not used
    if mesh is None:
        found = computed(CFG)
    else:
        with jax.set_mesh(mesh):
            found = computed(CFG)
    assert {20, None} == {*used}
    close(found, expected)
    used.clear()
    computed(dataclasses.replace(CFG, attention="blocks"))
    assert not used
