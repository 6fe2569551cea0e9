"""A plan for a TPU that is not there: libtpu compiles the run's programs for its topology."""

import json

import pytest
import tiny_run

from opd_jax import cli
from opd_jax.models import memory
from opd_jax.plan import chips, estimate, known_models, programs

pytestmark = [pytest.mark.ci, pytest.mark.optimized]

tiny = tiny_run.tiny


def test_a_run_is_planned_for_a_tpu(tiny, tmp_path, capsys):
    out = tmp_path / "plan.json"
    flags = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.model=1")
    argv = ["plan", f"--config={tiny / 'config.py'}", "--topology=v5e:2x2", f"--out={out}", *flags]
    assert cli.main(argv) == 0
    plan = json.loads(out.read_text())
    assert plan["chips"] == 4
    for part in plan["programs"].values():
        assert part["cycles_seconds"] > 0
        assert part["seconds"] >= part["cycles_seconds"]
    # In bfloat16, as models are held there; the student's own weights are float32.
    teacher = known_models.shapes(str(tiny / "teacher"), "bfloat16", "").cfg
    held = plan["programs"]["teacher"]["memory"]["teacher"]
    assert held == 2 * memory.weights(teacher, "int8", _Half())
    gathers = [c for c in plan["programs"]["teacher"]["collectives"] if c["kind"] == "all-gather"]
    assert gathers
    assert {c["axes"] for c in gathers} == {"fsdp"}
    assert sum(c["count"] for c in gathers) % teacher.num_layers <= 2  # a layer's, and the ends'
    assert "a step: " in capsys.readouterr().out


class _Half:
    """A mesh of two devices that share parameters."""

    shape = {"data": 2, "fsdp": 2, "model": 1}  # noqa: RUF012


def test_a_shape_that_no_tpu_has_is_one_message(tiny, capsys):
    argv = ["plan", f"--config={tiny / 'config.py'}", "--topology=v5e:3x5x7"]
    assert cli.main(argv) == 1
    assert "libtpu describes no such machine" in capsys.readouterr().err


def test_a_program_that_the_compiler_refuses_does_not_fit():
    import jax
    import jax.numpy as jnp

    machine = chips.machine("v5e:2x2")
    mesh = programs.meshlib.make(devices=machine.devices)
    one = jax.ShapeDtypeStruct((), jnp.float32)
    with jax.set_mesh(mesh), chips.afresh():
        huge = jax.jit(
            lambda x: jnp.cumsum(jnp.full((2**17, 2**17), x), axis=0).T @ jnp.ones((2**17, 8))
        )
        traced = programs.Traced("train", huge.trace(one), {"student": 4.0}, mesh)
        (found,) = estimate.compiled(traced, machine, mesh, say=lambda line: None)
    assert not found.fits
    assert found.cost is None
    assert "finds no room" in found.problem
    assert found.bytes_per_chip > machine.chip.memory
