"""Rows added up by id, in pieces as on a TPU, beside one row after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh, rock, sums
from opd_jax.models import embedding
from opd_jax.rock import RockConfig

IDS = 37


def _given(num: int, seed: int, *shape: int):
    """Ids of which some come often, and rows of several magnitudes."""
    rng = np.random.default_rng(seed)
    ids_N = np.minimum(rng.geometric(0.2, num) - 1, IDS - 1).astype(np.int32)
    scale = 10.0 ** rng.integers(-3, 4, (num, *[1] * len(shape)))
    return ids_N, (rng.normal(size=(num, *shape)) * scale).astype(np.float32)


def _summed(begin: np.ndarray, ids_N: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One row after the other, in f32."""
    out = begin.copy()
    for number, row in zip(ids_N, rows, strict=True):
        if number < len(out):
            out[number] += row
    return out


@pytest.fixture
def in_pieces(monkeypatch):
    """As on a TPU, with pieces that a test can fill."""
    monkeypatch.setattr(mesh, "platform", lambda: "tpu")
    monkeypatch.setattr(sums, "_PIECE", 16)


@pytest.mark.parametrize("num", [1, 15, 16, 17, 64, 101])
@pytest.mark.parametrize("shape", [(), (5,)])
def test_pieces_add_what_one_row_after_the_other_adds_bit_for_bit(num, shape, in_pieces):
    ids_N, rows = _given(num, 0, *shape)
    begin = _given(IDS, 1, *shape)[1]
    found = jax.jit(sums.by_id)((begin, -begin), ids_N, (rows, rows))
    np.testing.assert_array_equal(found[0], _summed(begin, ids_N, rows))
    np.testing.assert_array_equal(found[1], _summed(-begin, ids_N, rows))


def test_ids_that_have_no_sum_are_left_out(in_pieces):
    ids_N, rows = _given(50, 2)
    ids_N[::7] = IDS + np.arange(len(ids_N[::7]))
    zeros = np.zeros(IDS, np.float32)
    found = jax.jit(sums.by_id)(zeros, ids_N, rows)
    np.testing.assert_array_equal(found, _summed(zeros, ids_N, rows))


def test_the_rock_state_is_the_same_in_pieces(in_pieces, monkeypatch):
    ids_N, kl_N = _given(8 * 11, 3)
    given = ids_N.reshape(8, 11), np.abs(kl_N).reshape(8, 11), np.arange(88).reshape(8, 11) % 3 > 0
    cfg = RockConfig()

    def updated():
        def update(*given):
            return rock.update(rock.init(IDS, cfg=cfg), *given, cfg=cfg)

        return jax.tree.leaves(jax.jit(update)(*given))

    found = updated()
    monkeypatch.undo()
    for ours, whole in zip(found, updated(), strict=True):
        np.testing.assert_array_equal(ours, whole)


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2), (4, 1, 2), (1, 8, 1), (1, 2, 4)])
@pytest.mark.parametrize("pieces", [True, False])
def test_the_gradient_of_a_table_is_the_sum_of_its_rows_on_every_mesh(axes, pieces, request):
    """Ids of every device's part of the table, the first and the last of each among them."""
    if pieces:
        request.getfixturevalue("in_pieces")
    table_VD, dtable_VD = _given(40, 4, 16)[1], _given(40, 7, 16)[1]
    ids_BT = np.random.default_rng(5).permutation(np.arange(8 * 20) % 40).reshape(8, 20)
    drows_BTD = _given(160, 6, 16)[1].reshape(8, 20, 16)

    def gradient(table_VD, ids_BT, drows_BTD, dtable_VD):
        _, back = jax.vjp(lambda t: embedding.look_up(t, ids_BT), table_VD)
        return back((drows_BTD, dtable_VD))[0]

    given = [jnp.asarray(x) for x in (table_VD, ids_BT.astype(np.int32), drows_BTD, dtable_VD)]
    wanted = dtable_VD.astype(np.float64)
    np.add.at(wanted, ids_BT, drows_BTD.astype(np.float64))
    if np.prod(axes) == 1:
        found = jax.jit(gradient)(*given)
    else:
        with jax.set_mesh(mesh.make(*axes)):
            table = ("model", "fsdp")
            places = [table, ("data", None), ("data", None, "fsdp"), table]
            given = [mesh.constrain(x, *place) for x, place in zip(given, places, strict=True)]
            found = jax.jit(gradient)(*given)
    largest = np.abs(drows_BTD).max() + np.abs(dtable_VD).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * largest)
