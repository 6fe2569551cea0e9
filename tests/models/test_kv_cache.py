import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh
from opd_jax.models import kv_cache

B, K, H, SLOTS, LAYERS = 4, 2, 4, 6, 2


def draw(seed, num):
    """Keys and values of ``num`` tokens, as a layer computes them."""
    rng = np.random.default_rng(seed)
    pair = (rng.normal(size=(B, num, K, H)).astype(np.float32) for _ in range(2))
    return tuple(mesh.constrain(jnp.asarray(x), mesh.BATCH, None, "model", None) for x in pair)


def valid(num):
    is_real = jnp.asarray(np.arange(num)[None] >= (np.arange(B)[:, None] % num))
    return mesh.constrain(is_real, mesh.BATCH, None)


def fill():
    """A cache of six slots after a prefill of three and one decoded token, and what went in."""
    news = [draw(seed, 3) for seed in range(LAYERS)]
    keys = jnp.stack([k.transpose(0, 2, 3, 1) for k, _ in news])
    values = jnp.stack([v.transpose(0, 2, 1, 3) for _, v in news])
    cache = kv_cache.extend(kv_cache.start(keys, values, valid(3), SLOTS), valid(1))
    for layer in range(LAYERS):
        news.append(draw(10 + layer, 1))
        cache = kv_cache.write(cache, layer, *news[-1])
    return cache, news


def test_cache_starts_with_the_prefill_and_writes_at_the_cursor():
    cache, news = fill()
    assert int(cache.length) == 4
    for layer in range(LAYERS):
        k, v = cache.keys[layer].transpose(0, 3, 1, 2), cache.values[layer].transpose(0, 2, 1, 3)
        for read, which in ((k, 0), (v, 1)):
            np.testing.assert_array_equal(read[:, :3], news[layer][which])
            np.testing.assert_array_equal(read[:, 3:4], news[LAYERS + layer][which])
            np.testing.assert_array_equal(read[:, 4:], 0)
    np.testing.assert_array_equal(cache.valid_BS[2], [0, 0, 1, 1, 0, 0])


def test_a_cache_that_is_read_in_blocks_has_a_whole_number_of_them(monkeypatch):
    assert kv_cache.whole(9000) == kv_cache.block(9000) == 9000  # on a CPU all is read
    monkeypatch.setattr(mesh, "platform", lambda: "tpu")
    for slots in [*range(1, 9000, 7), *range(9000, 200_000, 997)]:
        whole = kv_cache.whole(slots)
        size = kv_cache.block(whole)
        assert slots <= whole <= 1.1 * slots
        if slots < 23 * 128:
            assert whole == size == slots  # one block
        else:
            assert 1500 < size < 3000
            assert (whole % size, size % 128) == (0, 0)
    assert kv_cache.block(9001) == 9001


def test_a_cache_without_room_is_refused():
    keys = jnp.zeros((LAYERS, B, K, H, 3))
    with pytest.raises(ValueError, match="2 slots for 3 tokens"):
        kv_cache.start(keys, keys.swapaxes(3, 4), valid(3), 2)


def test_repeat_puts_copies_side_by_side_and_on_the_same_device():
    cache, _ = fill()
    thrice = kv_cache.repeat(cache, 3)
    np.testing.assert_array_equal(thrice.keys[1], np.repeat(cache.keys[1], 3, axis=0))
    np.testing.assert_array_equal(thrice.values[1], np.repeat(cache.values[1], 3, axis=0))
    np.testing.assert_array_equal(thrice.valid_BS, np.repeat(cache.valid_BS, 3, axis=0))
    assert int(thrice.length) == int(cache.length)
    with jax.set_mesh(mesh.make(data=2, fsdp=2, model=2)):
        spread = jax.jit(lambda: kv_cache.repeat(fill()[0], 3))
        text = spread.lower().compile().as_text()
        jax.tree.map(np.testing.assert_array_equal, spread(), thrice)
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
