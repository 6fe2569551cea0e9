import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opd_jax import mesh
from opd_jax.models import architecture, params, transformer
from opd_jax.models.architecture import Experts, LayerKind
from opd_jax.models.params import ParamSpec

SPECS = {
    "embed": ParamSpec((8, 6), ("model", "fsdp"), std=0.5),
    "layers": {
        "norm": ParamSpec((3, 6), (None, "fsdp"), mean=1.0),
        "bias": ParamSpec((3, 4), (None, "model")),
    },
}


def test_one_declaration_gives_shapes_placements_and_values():
    values = params.init(SPECS, jax.random.key(0), jnp.bfloat16)
    shapes = params.abstract(SPECS, jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), values) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    places = params.shardings(SPECS, mesh.make(data=2, fsdp=2, model=2))
    assert places["embed"].spec == P("model", "fsdp")
    assert places["layers"]["bias"].spec == P(None, "model")
    assert params.count(SPECS) == 8 * 6 + 3 * 6 + 3 * 4


def test_initial_values_follow_mean_and_std():
    specs = {"w": ParamSpec((200, 50), (None, None), std=0.5, mean=2.0)} | SPECS
    values = params.init(specs, jax.random.key(1))
    assert np.std(values["w"]) == pytest.approx(0.5, rel=0.05)
    assert np.mean(values["w"]) == pytest.approx(2.0, abs=0.03)
    np.testing.assert_array_equal(values["layers"]["norm"], 1.0)
    np.testing.assert_array_equal(values["layers"]["bias"], 0.0)


def test_leaves_are_drawn_independently():
    specs = {name: ParamSpec((4, 4), (None, None), std=1.0) for name in ("a", "b")}
    values = params.init(specs, jax.random.key(0))
    assert not np.allclose(values["a"], values["b"])


def test_initial_values_do_not_depend_on_the_mesh():
    alone = params.init(SPECS, jax.random.key(3))
    grid = mesh.make(data=2, fsdp=2, model=2)
    with jax.set_mesh(grid):
        spread = jax.jit(lambda key: params.init(SPECS, key))(jax.random.key(3))
    assert jax.tree.map(lambda x: x.sharding, spread) == params.shardings(SPECS, grid)
    jax.tree.map(np.testing.assert_array_equal, alone, spread)


def test_abstract_with_a_mesh_carries_the_placement():
    grid = mesh.make(data=2, fsdp=2, model=2)
    shapes = params.abstract(SPECS, jnp.float32, grid)
    assert shapes["embed"].sharding == params.shardings(SPECS, grid)["embed"]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"fsdp": 1, "model": 8}, ["layers/k", "size 2", "8 shards", "--config.mesh.model"]),
        ({"fsdp": 8, "model": 1}, ["size 12", "8 shards", "--config.mesh.fsdp"]),
    ],
)
def test_a_mesh_that_does_not_divide_is_named(sizes, words):
    cfg = transformer.ModelConfig("llama", 16, 12, 16, 2, 4, 2, 8)
    with pytest.raises(ValueError, match="does not divide") as error:
        params.shardings(transformer.specs(cfg), mesh.make(data=1, **sizes))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("experts", [0, 3, 4])
def test_what_is_told_in_words_is_what_does_not_divide(experts):
    """A mesh is refused where, and only where, some parameter does not divide."""
    more = {"experts": Experts(max(experts, 2), 2, 4), "pattern": (LayerKind(is_sparse=True),)}
    cfg = transformer.ModelConfig("llama", 16, 12, 6, 1, 4, 4, 8, **(more if experts else {}))
    refused = 0
    for model in (1, 2, 3, 4):
        for fsdp in (1, 2):
            grid = mesh.make(1, fsdp, model, devices=jax.devices()[: fsdp * model])
            found = []
            for check in (
                lambda grid: params.shardings(transformer.specs(cfg), grid),
                lambda grid: architecture.check_mesh(cfg, grid),
            ):
                try:
                    check(grid)
                    found.append("")
                except ValueError as error:
                    found.append(re.findall(r"--config\.mesh\.\w+", str(error))[0])
            assert found[0] == found[1], (fsdp, model)
            refused += bool(found[0])
    assert 0 < refused < 8


def test_a_spec_needs_one_axis_per_dimension():
    with pytest.raises(ValueError, match="one mesh axis"):
        ParamSpec((2, 3), (None,))
