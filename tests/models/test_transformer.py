import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import gradient, spread
from jax.sharding import PartitionSpec as P

from opd_jax import mesh
from opd_jax.models import kv_cache, params, rope, transformer

CFG = transformer.ModelConfig(
    model_type="qwen3",
    vocab_size=24,
    width=16,
    ffn=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=rope.Rope(theta=100.0),
    qkv_bias=True,
    qk_norm=True,
)
B, T = 4, 9
STARTS = np.array([0, 2, 5, 8])
VALID = np.arange(T)[None] >= STARTS[:, None]
IDS = np.random.default_rng(0).integers(CFG.vocab_size, size=(B, T), dtype=np.int32)
GRID = {"data": 2, "fsdp": 2, "model": 2}


def wide(cfg, seed=0):
    """Parameters in which every tensor matters: no zero biases, norms off 1."""
    declared = jax.tree.map(lambda s: dataclasses.replace(s, std=0.3), transformer.specs(cfg))
    return params.init(declared, jax.random.key(seed))


@functools.cache
def weights():
    return wide(CFG)


logits = jax.jit(transformer.logits, static_argnames="cfg")


@functools.cache
def expected():
    return np.asarray(logits(weights(), IDS, cfg=CFG, valid_BT=VALID))


@functools.cache
def plain_gradient():
    return gradient(weights(), IDS, VALID, cfg=CFG)[0]


def test_invalid_tail_is_not_read():
    ended = VALID & (np.arange(T) < 7)
    out = np.asarray(logits(weights(), IDS, cfg=CFG, valid_BT=ended))
    np.testing.assert_array_equal(out[ended], expected()[ended])
    assert np.isfinite(out).all()


def test_positions_count_valid_tokens_from_zero():
    np.testing.assert_array_equal(transformer.positions(VALID)[1], [0, 0, 0, 1, 2, 3, 4, 5, 6])


def cached(tree, ids_BT, valid_BT, *, split=5, copies=1):
    """Hidden states by one prefill and token-by-token decoding."""
    position_BT = transformer.positions(valid_BT)
    room = ids_BT.shape[1] + 2
    run = functools.partial(transformer.hidden, cfg=CFG)
    first, rest = np.s_[:, :split], np.s_[:, split:]
    h_BTD, cache = run(tree, ids_BT[first], position_BT[first], valid_BT[first], room=room)
    cache = kv_cache.repeat(cache, copies)
    tree = transformer.for_decoding(tree, cfg=CFG)

    def decode(carry, xs):
        h_B1D, carry = run(tree, *(x[:, None] for x in xs), cache=carry)
        return carry, h_B1D[:, 0]

    again = [jnp.repeat(x[rest], copies, axis=0).T for x in (ids_BT, position_BT, valid_BT)]
    cache, h_TBD = jax.lax.scan(decode, cache, tuple(again))
    return h_BTD, h_TBD.swapaxes(0, 1), cache.length


@functools.cache
def whole():
    run = jax.jit(functools.partial(transformer.hidden, cfg=CFG))
    return np.asarray(run(weights(), IDS, transformer.positions(VALID), VALID)[0])


def test_samples_of_one_prompt_share_its_prefill():
    run = jax.jit(functools.partial(cached, copies=2))
    _, after, _ = run(weights(), IDS, jnp.asarray(VALID))
    twice, kept = np.repeat(whole(), 2, axis=0)[:, 5:], np.repeat(VALID, 2, axis=0)[:, 5:]
    np.testing.assert_allclose(np.asarray(after)[kept], twice[kept], atol=2e-5)


def test_decoding_works_on_a_mesh():
    def run(tree, ids_BT, valid_BT):
        position_BT = transformer.positions(valid_BT)
        cache, out = None, []
        for part in (np.s_[:, :6], np.s_[:, 6:7], np.s_[:, 7:]):
            inputs = (ids_BT[part], position_BT[part], valid_BT[part])
            if cache is None:
                h_BTD, cache = transformer.hidden(tree, *inputs, cfg=CFG, room=T)
            else:
                loose = transformer.for_decoding(tree, cfg=CFG)
                h_BTD, cache = transformer.hidden(loose, *inputs, cfg=CFG, cache=cache)
            out.append(h_BTD)
        return jnp.concatenate(out, axis=1), cache

    with jax.set_mesh(mesh.make(**GRID)):
        h_BTD, cache = jax.jit(run)(spread(weights(), CFG), IDS, VALID)
    np.testing.assert_allclose(np.asarray(h_BTD)[VALID], whole()[VALID], atol=2e-5)
    assert {x.sharding.spec for x in (*cache.keys, *cache.values)} == {
        P(mesh.BATCH, "model", None, None)
    }


def test_a_loop_over_tokens_updates_the_cache_in_place():
    """A copy of the cache per token would cost more than the token itself."""

    def run(tree, cache):
        tree = transformer.for_decoding(tree, cfg=CFG)

        def body(state):
            ids_B1, cache = state
            here_B1 = jnp.broadcast_to(cache.length, (B, 1))
            h_B1D, cache = transformer.hidden(
                tree, ids_B1, here_B1, jnp.ones((B, 1), bool), cfg=CFG, cache=cache
            )
            return jnp.argmax(h_B1D, axis=-1).astype(jnp.int32), cache

        return jax.lax.while_loop(lambda s: s[1].length < 8, body, (IDS[:, :1], cache))

    shape = (B, CFG.num_kv_heads, CFG.head_dim, 333)
    keys = jnp.zeros((CFG.num_layers, *shape))
    cache = kv_cache.start(keys, keys.swapaxes(3, 4), jnp.ones((B, 333), bool), 333)
    cache = dataclasses.replace(cache, length=jnp.int32(1))
    text = jax.jit(run, donate_argnums=1).lower(weights(), cache).compile().as_text()
    for sizes in (shape, (*shape[:2], shape[3], shape[2])):
        array = f"f32[{','.join(map(str, sizes))}]"
        assert f"{array}{{" in text
        assert not [line for line in text.splitlines() if f"{array}{{" in line and " copy(" in line]


def test_a_cache_needs_parameters_for_decoding():
    loose = transformer.for_decoding(weights(), cfg=CFG)
    inputs = IDS, transformer.positions(VALID), VALID
    with pytest.raises(ValueError, match="without a cache and with per-layer"):
        transformer.hidden(loose, *inputs, cfg=CFG)
    _, cache = transformer.hidden(weights(), *inputs, cfg=CFG, room=T + 1)
    with pytest.raises(ValueError, match=r"with a cache and with stacked.*for_decoding"):
        transformer.hidden(weights(), *inputs, cfg=CFG, cache=cache)


def test_every_parameter_gets_a_finite_gradient():
    for path, grad in jax.tree_util.tree_leaves_with_path(plain_gradient()):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


def test_a_tied_head_is_the_embedding_and_gets_both_gradients():
    tied = dataclasses.replace(CFG, tied=True)
    tree = wide(tied)
    assert "head" not in tree
    np.testing.assert_array_equal(transformer.head(tree, tied), tree["embed"])
    loose = {**tree, "head": tree["embed"]}
    parts, _ = gradient(loose, IDS, VALID, cfg=CFG)
    both = gradient(tree, IDS, VALID, cfg=tied)[0]["embed"]
    np.testing.assert_allclose(both, parts["embed"] + parts["head"], atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat):
    again, _ = gradient(weights(), IDS, VALID, cfg=dataclasses.replace(CFG, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, plain_gradient())


def test_bf16_compute_over_f32_parameters():
    half = dataclasses.replace(CFG, dtype=jnp.bfloat16)
    assert half.dtype == "bfloat16"
    run = functools.partial(transformer.hidden, cfg=half)
    h_BTD, _ = jax.eval_shape(run, weights(), IDS, transformer.positions(VALID), VALID)
    assert h_BTD.dtype == transformer.head(weights(), half).dtype == jnp.bfloat16
    grads, out = gradient(weights(), IDS, VALID, cfg=half)
    assert out.dtype == grads["embed"].dtype == jnp.float32
    error = np.abs(np.asarray(out) - expected())[VALID]
    assert error.mean() < 0.02 * np.abs(expected()).mean()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_embeddings_are_scaled_by_a_number_of_the_compute_dtype(dtype):
    """As the models were trained: 4.46875 in bfloat16, whose root of 20 that is."""
    cfg = dataclasses.replace(CFG, width=20, scaled_embed=True, dtype=dtype)
    table = jax.random.normal(jax.random.key(0), (24, 20))
    found, _ = transformer._embedded({"embed": table}, IDS, cfg)
    scale = jnp.asarray(4.46875 if dtype == "bfloat16" else 20**0.5, dtype)
    np.testing.assert_array_equal(found, table[IDS].astype(dtype) * scale)


def test_a_pattern_must_fit_its_model():
    slides = (transformer.LayerKind(is_sliding=True), transformer.LayerKind())
    assert dataclasses.replace(CFG, pattern=(transformer.LayerKind(),) * 2) == CFG
    with pytest.raises(ValueError, match="has 3 layers, the model 2"):
        dataclasses.replace(CFG, pattern=(*slides, slides[0]), window=3)
    with pytest.raises(ValueError, match="a window of None tokens"):
        dataclasses.replace(CFG, pattern=slides)
    with pytest.raises(ValueError, match=r"ModelConfig\.experts"):
        dataclasses.replace(CFG, pattern=(transformer.LayerKind(is_sparse=True),) * 2)


def test_config_is_hashable_and_refuses_what_it_does_not_know():
    assert hash(CFG) == hash(dataclasses.replace(CFG, dtype=jnp.float32))
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        dataclasses.replace(CFG, model_type="gpt2")
    with pytest.raises(ValueError, match="remat 'some' is not known"):
        dataclasses.replace(CFG, remat="some")
    with pytest.raises(ValueError, match="4 query heads do not divide over 3"):
        dataclasses.replace(CFG, num_kv_heads=3)


def long_batch():
    """16,384 tokens, most of them of a few ids, and a cotangent that leans one way."""
    rng = np.random.default_rng(3)
    ids = rng.choice(24, p=np.r_[0.6, np.full(23, 0.4 / 23)], size=(32, 512)).astype(np.int32)
    return ids, (1.0 + rng.normal(size=(32, 512, 16))).astype(np.float32)


def long_gradient(tree, cfg, axes=None):
    """Gradient of a weighted sum of hidden states; each leaf in f32."""
    ids_BT, weight_BTD = long_batch()
    valid_BT = np.ones(ids_BT.shape, bool)

    @jax.jit
    def run(tree):
        def loss(tree):
            h_BTD, head_VD = transformer.hidden_and_head(
                tree, ids_BT, transformer.positions(valid_BT), valid_BT, cfg=cfg
            )
            return jnp.sum(h_BTD.astype(jnp.float32) * weight_BTD) + jnp.sum(head_VD * 0.0)

        return jax.grad(loss)(tree)

    if axes is None:
        found = run(tree)
    else:
        with jax.set_mesh(mesh.make(**axes)):
            found = run(spread(tree, cfg))
    return jax.tree.map(lambda x: np.asarray(x, np.float32), found)


@pytest.mark.parametrize("axes", [None, GRID], ids=["one device", "2x2x2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sums_over_tokens_are_taken_in_f32_whatever_the_dtype(tied, axes):
    """In bfloat16 a sum of 16,384 terms stands still long before its end."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16", tied=tied)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide(cfg))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    expected = long_gradient(exact, dataclasses.replace(cfg, dtype="float32"))
    found = long_gradient(half, cfg, axes)
    for path, want in jax.tree_util.tree_leaves_with_path(expected):
        name = jax.tree_util.keystr(path)
        got = found
        for key in path:
            got = got[key.key]
        rows = zip(got, want, strict=True) if "embed" in name else [(got, want)]
        for row, (a, b) in enumerate(rows):
            if scale := np.linalg.norm(b):
                assert np.linalg.norm(a - b) / scale < 0.06, (name, row)
