"""Mesh construction and its errors, placement with and without a mesh, and process start-up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opd_jax import mesh


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        (dict(), (8, 1, 1)),
        (dict(fsdp=2, model=2), (2, 2, 2)),
        (dict(data=1, fsdp=-1, model=2), (1, 4, 2)),
        (dict(data=4, fsdp=2), (4, 2, 1)),
    ],
    ids=str,
)
def test_one_axis_takes_what_is_left(asked, sizes):
    made = mesh.make(**asked)
    assert made.axis_names == mesh.AXES
    assert tuple(made.shape.values()) == sizes


def test_a_subset_of_the_devices_will_do():
    assert mesh.make(2, 1, 1, devices=jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (dict(data=3), "found 8"),
        (dict(data=16), "found 8"),
        (dict(data=-1, fsdp=3), "found 8"),
        (dict(data=-1, fsdp=-1), "at most one -1"),
        (dict(data=0), "positive sizes"),
        (dict(model=-2), "positive sizes"),
    ],
    ids=str,
)
def test_axes_that_do_not_fit_are_errors(asked, found):
    with pytest.raises(ValueError, match=found) as error:
        mesh.make(**asked)
    assert "--config.mesh.data / .fsdp / .model" in str(error.value)


def test_without_a_mesh_nothing_is_placed():
    x = jnp.arange(4.0)
    assert not mesh.is_active()
    assert mesh.out(mesh.BATCH, None) is None
    assert mesh.constrain(x, mesh.BATCH) is x
    assert mesh.replicated([x])[0] is x
    assert (mesh.size("model"), mesh.size(mesh.BATCH)) == (1, 1)
    assert mesh.platform() == "cpu"


def test_under_a_mesh_types_carry_the_placement():
    with jax.set_mesh(mesh.make(2, 2, 2)):
        assert mesh.is_active()
        assert mesh.platform() == "cpu"
        assert mesh.out(mesh.BATCH, None) == P(mesh.BATCH, None)
        assert (mesh.size("model"), mesh.size(mesh.BATCH), mesh.size("absent")) == (2, 4, 1)
        split = mesh.constrain(jnp.arange(8.0), mesh.BATCH)
        assert jax.typeof(split).sharding.spec == P(mesh.BATCH)
        assert jax.typeof(mesh.replicated({"x": split})["x"]).sharding.spec == P(None)
        np.testing.assert_array_equal(split, np.arange(8.0))


def test_rows_are_split_over_the_batch_shards_and_come_back():
    made = mesh.make(2, 2, 2)
    rows = {"ids": np.arange(24).reshape(8, 3), "step": np.int32(5)}
    placed = mesh.to_global(rows, made)
    assert placed["ids"].sharding.spec == P(mesh.BATCH, None)
    assert {shard.data.shape for shard in placed["ids"].addressable_shards} == {(2, 3)}
    assert placed["step"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, mesh.to_host(placed), rows)


def test_rows_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match=r"6 rows .* 4 batch shards .*--config\.train\.prompts"):
        mesh.to_global(np.zeros((6, 3)), mesh.make(2, 2, 2))


def test_processes_share_out_the_rows_of_a_batch(monkeypatch):
    grid = mesh.make(data=2, fsdp=2, model=2)
    assert mesh.batch_shards(grid) == 4
    assert [mesh.batch_rows(n, grid) for n in (1, 4, 5)] == [4, 4, 8]
    batch = {"ids": np.arange(12).reshape(6, 2), "step": np.int32(7)}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    parts = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        own = mesh.own_rows(batch)
        assert own["step"] == 7
        assert own["ids"].shape == (2, 2)
        parts.append(own["ids"])
    np.testing.assert_array_equal(np.concatenate(parts), batch["ids"])
