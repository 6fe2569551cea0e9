"""Training whose answers are sampled in another arrangement of the devices."""

import dataclasses
import json
from typing import Any

import adapters
import jax
import numpy as np
import pytest
import tiny_run
from random_models import drawn_weights

from opd_jax import mesh
from opd_jax.models import lora, params, transformer
from opd_jax.pytrees import Prompt
from opd_jax.rollout import decode, regrouped
from opd_jax.rollout.sampling import Sampler

tiny = tiny_run.tiny
SHORT = {"train__steps": 2, "train__prompts": 8, "eval__every": 2, "checkpoint__best": ""}
KEYS = {"mesh__fsdp": 8, "mesh__data": 1}


@pytest.fixture(scope="module")
def as_trained(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alike") / "run"
    assert tiny_run.train(tiny, workdir, **SHORT, **KEYS) == 0
    return workdir


def compare(found, expected, *, steps):
    """Two curves of as many steps are one up to rounding."""
    assert len(found) == len(expected)
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() & {"loss", "kl_nats", "mean_length", "eval/kl_nats"}:
            np.testing.assert_allclose(line[name], other[name], rtol=1e-3, err_msg=name)
    assert [line["step"] for line in found if "loss" in line] == [*range(1, steps + 1)]


def test_a_run_learns_what_it_learns_in_one_arrangement(tiny, as_trained, tmp_path, capsys):
    assert tiny_run.train(tiny, tmp_path / "run", **SHORT, **KEYS, mesh__rollout_model=2) == 0
    said = capsys.readouterr().out
    assert "data 1 x fsdp 4 x model 2 while the student samples" in said
    compare(tiny_run.curve(tmp_path / "run"), tiny_run.curve(as_trained), steps=2)
    graded = [(folder / "graded.jsonl").read_text() for folder in (tmp_path / "run", as_trained)]
    assert [json.loads(line) for line in graded[0].splitlines()] == [
        json.loads(line) for line in graded[1].splitlines()
    ]


def test_a_run_goes_on_in_another_arrangement(tiny, as_trained, tmp_path):
    """Devices may change from one start to the next, and with them the arrangement."""
    curves = []
    for model in (0, 2):
        run = tiny_run.copy_folder(as_trained, tmp_path / f"run{model}")
        keys = SHORT | KEYS | {"train__steps": 3, "mesh__rollout_model": model}
        assert tiny_run.train(tiny, run, **keys) == 0
        curves.append(tiny_run.curve(run))
    compare(*curves, steps=3)


@pytest.mark.optimized
@pytest.mark.parametrize("has_adapters", [False, True], ids=["whole", "adapters"])
def test_what_is_moved_has_all_bits_that_are_used(has_adapters):
    """Parameters that were moved in 16 bits answer as those of 32 bits do on that arrangement."""
    cfg = dataclasses.replace(tiny_run.MODEL, dtype="bfloat16")
    declared, weights = transformer.specs(cfg), drawn_weights(cfg)
    if has_adapters:
        weights = adapters.grown(weights, cfg)
        declared = lora.attached(declared, lora.specs(cfg, adapters.SPEC), adapters.SPEC)
    home = mesh.make(1, 8, 1)
    on = mesh.regrouped(home, 2)
    ids_BP: Any = np.arange(64, dtype=np.int32).reshape(8, 8)
    start_B: Any = np.arange(8, dtype=np.int32) % 5
    prompt = Prompt(ids_BP, start_B)
    how = {"cfg": cfg, "sampler": Sampler(vocab_size=600), "max_new": 8}

    def placed(where):
        return jax.device_put(weights, params.shardings(declared, where))

    with jax.set_mesh(home):
        moved = regrouped.policy(placed(home), cfg=cfg, on=on)
        found = regrouped.sample(
            moved, mesh.to_global(prompt, home), jax.random.key(3), on=on, **how
        )
        place: Any = found.ids_BT.sharding
        assert place.mesh == home
    with jax.set_mesh(on):
        expected = decode.sample(placed(on), mesh.to_global(prompt, on), jax.random.key(3), **how)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    bits = {x.dtype.itemsize for x in jax.tree.leaves(moved["layers"]["q"])}
    assert bits == ({2, 4} if has_adapters else {2})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"mesh__rollout_model": 3}, "mesh.rollout_model is 3 for a mesh of data 1 x fsdp 8"),
        ({"mesh__rollout_model": -1}, "mesh.rollout_model is -1"),
        ({"mesh__rollout_model": 8}, "choose --config.mesh.rollout_model"),  # two heads
        ({"mesh__rollout_model": 16}, "mesh.rollout_model is 16"),
        ({"mesh__model": 2, "mesh__fsdp": 4, "mesh__rollout_model": 1}, "2 times a number"),
    ],
    ids=str,
)
def test_an_arrangement_that_cannot_be_is_refused(tiny, tmp_path, capsys, keys, words):
    assert tiny_run.train(tiny, tmp_path / "run", **(SHORT | KEYS | keys)) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("shape", "model", "wanted"),
    [((1, 8, 1), 4, (1, 2, 4)), ((2, 2, 2), 4, (2, 1, 4)), ((4, 2, 1), 8, (1, 1, 8)),
     ((4, 2, 1), 4, (2, 1, 4)), ((2, 4, 1), 0, (2, 4, 1))],
)  # fmt: skip
def test_devices_keep_their_order(shape, model, wanted):
    made = mesh.make(*shape)
    found = mesh.regrouped(made, model)
    assert tuple(found.shape.values()) == wanted
    assert found.devices.ravel().tolist() == made.devices.ravel().tolist()
