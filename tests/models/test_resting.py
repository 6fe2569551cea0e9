"""A teacher that rests in the host's memory: the same numbers, and room on the devices."""

import dataclasses
import gc

import jax
import layouts
import numpy as np
import pytest
import tiny_run
from layouts import LAYOUTS

from opd_jax import cli, mesh
from opd_jax.models import memory, params, resting, transformer
from opd_jax.plan import chips, programs
from opd_jax.run import assemble, guards, initial, iteration, train
from opd_jax.spec import ConfigError

tiny = tiny_run.tiny
CFG = tiny_run.MODEL
PLAN = {
    "train__steps": 2,
    "eval__every": 1,
    "eval__prompts": 4,
    "eval__kl_prompts": 4,
    "log__samples_every": 1,
    "checkpoint__every": 1,
}
BARE = {"train__steps": 2}
# 4 prompts, over 4 parts of the batch.
GRID = {"mesh__fsdp": 2, "mesh__model": 2}


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "model": 2, "data": 2}])
def test_all_but_the_head_rests_and_comes_back_as_it_was(is_tied, axes):
    specs = transformer.specs(dataclasses.replace(CFG, tied=is_tied))
    grid = mesh.make(**axes) if axes else mesh.make(devices=jax.devices()[:1])
    places = params.shardings(specs, grid)
    rng = np.random.default_rng(0)
    expected = jax.tree.map(
        lambda spec: rng.random(spec.shape, np.float32),
        specs,
        is_leaf=lambda x: isinstance(x, params.ParamSpec),
    )
    tree = jax.device_put(expected, places)
    rested = resting.rested(tree)
    head = rested.pop("embed" if is_tied else "head")
    assert kinds(head) == {"device"}
    assert kinds(rested) == {"pinned_host"}
    # What rests holds no memory of the devices any more.
    assert all(leaf.is_deleted() for name in rested for leaf in jax.tree.leaves(tree[name]))
    awake = resting.awake(rested)
    assert kinds(awake) == {"device"}
    for name, leaf in awake.items():
        jax.tree.map(np.testing.assert_array_equal, leaf, expected[name])
        assert jax.tree.map(lambda x: x.sharding, leaf) == places[name]
    # On a device nothing moves, and shapes say the same as arrays.
    assert resting.awake(awake)["final_norm"] is awake["final_norm"]
    shapes = resting.rested(params.abstract(specs, np.float32, grid))
    assert jax.tree.map(lambda x: x.sharding, shapes) == jax.tree.map(
        lambda x: x.sharding, {**rested, ("embed" if is_tied else "head"): head}
    )
    assert kinds(resting.awake(shapes)) == {"device"}


@pytest.fixture
def watched(monkeypatch):
    """Bytes of the devices that hold the teacher's layers, at the beginning of each program."""
    seen = []

    def watching(name):
        real = getattr(iteration.Programs(), name)

        def call(*args, **kwargs):
            gc.collect()  # what nobody can reach is not held
            kinds_now = [
                leaf.sharding.memory_kind
                for leaf in jax.live_arrays()
                if leaf.shape == SHAPE and leaf.dtype == np.float32 and not leaf.is_deleted()
            ]
            seen.append((name, kinds_now.count("device")))
            return real(*args, **kwargs)

        return call

    SHAPE = (CFG.num_layers, CFG.width, CFG.ffn)  # of gate and up
    monkeypatch.setattr(train.answering, "sample", watching("sample"))
    monkeypatch.setattr(train.steps, "teacher_states", watching("teacher_states"))
    monkeypatch.setattr(train.steps, "distill_step", watching("distill_step"))
    return seen


@pytest.mark.usefixtures("one_device")
def test_a_run_gives_the_same_bits_with_less_on_its_devices(tiny, tmp_path, watched):
    held = {}
    for offload in (False, True):
        watched.clear()
        assert tiny_run.train(tiny, tmp_path / str(offload), teacher__offload=offload, **PLAN) == 0
        held[offload] = dict(watched)
    assert tiny_run.curve(tmp_path / "True") == tiny_run.curve(tmp_path / "False")
    pair = [tiny_run.saved(tiny, tmp_path / name, **PLAN)[0] for name in ("True", "False")]
    assert pair[0].keys() == pair[1].keys()
    jax.tree.map(np.testing.assert_array_equal, *pair)
    for name in ("samples.jsonl", "teacher.json"):
        texts = [(tmp_path / which / name).read_text() for which in ("True", "False")]
        assert texts[0] == texts[1]
    # gate and up of the teacher are there while it reads, and at no other time
    assert held[False]["sample"] - held[True]["sample"] == 2
    assert held[False]["distill_step"] - held[True]["distill_step"] == 2
    assert held[False]["teacher_states"] == held[True]["teacher_states"]


one_device = tiny_run.one_device


def test_a_run_may_go_on_with_the_other_setting(tiny, tmp_path, monkeypatch):
    tiny_run.use_one_device(monkeypatch)
    plan = BARE | {"checkpoint__every": 1}
    assert tiny_run.train(tiny, tmp_path / "run", **plan | {"train__steps": 1}) == 0
    assert tiny_run.train(tiny, tmp_path / "run", teacher__offload=True, **plan) == 0
    assert tiny_run.train(tiny, tmp_path / "whole", **plan | {"train__steps": 1}) == 0
    assert tiny_run.train(tiny, tmp_path / "whole", **plan) == 0
    assert tiny_run.curve(tmp_path / "run") == tiny_run.curve(tmp_path / "whole")


# The command runs twice, in the same processes: without and with.
TWICE = """
import dataclasses
from opd_jax.run import train

real = train.train

def twice(run, workdir, **given):
    for offload in (False, True):
        teacher = dataclasses.replace(run.teacher, offload=offload)
        own = dataclasses.replace(run, teacher=teacher)
        result = real(own, f"{workdir}-{offload}", **given)
    return result

train.train = twice
"""


def test_two_processes_rest_their_own_parts(tiny, tmp_path):
    layout = LAYOUTS["two-processes"]
    argv = [*tiny_run.argv(tiny, tmp_path / "run", **BARE), *layout.flags]
    text = layouts.run(layout, argv, code=TWICE)
    assert text.count("rests in host memory (pinned_host)") == 1
    assert tiny_run.curve(tmp_path / "run-True") == tiny_run.curve(tmp_path / "run-False")


# --- what it saves --------------------------------------------------------------------------------


def parts_of(tiny, **keys):
    return assemble.assemble(tiny_run.resolved(tiny, **GRID, **keys), say=lambda line: None)


def test_needs_count_the_teacher_only_while_it_is_asked(tiny):
    whole = {need.what: need for need in assemble.needs(parts_of(tiny))}
    parts = parts_of(tiny, teacher__offload=True)
    rests, asked = (
        {need.what: need for need in assemble.needs(parts, is_scoring=now)} for now in (False, True)
    )
    assert "teacher.offload=True" in whole["the teacher"].change
    teacher = initial.teacher_template(parts)
    assert rests["the teacher's head"].num_bytes == sum(
        programs.on_device(x) for x in jax.tree.leaves(teacher) if not resting.is_resting(x)
    )
    assert "the teacher" not in rests
    assert asked["the teacher"].num_bytes == whole["the teacher"].num_bytes
    assert asked["keys and values"].num_bytes == 0 < rests["keys and values"].num_bytes


def test_what_fits_only_with_a_resting_teacher_is_started(tiny, monkeypatch):
    parts = parts_of(tiny, teacher__offload=True)
    room = max(
        sum(need.num_bytes for need in assemble.needs(parts, is_scoring=now))
        for now in (False, True)
    )
    monkeypatch.setattr(memory, "device_bytes", lambda _: room)
    parts_of(tiny, teacher__offload=True)
    with pytest.raises(memory.FitError, match=r"at least .* are needed"):
        parts_of(tiny)
    monkeypatch.setattr(memory, "device_bytes", lambda _: room - 1)
    with pytest.raises(memory.FitError):
        parts_of(tiny, teacher__offload=True)


def test_advice_names_what_is_there_in_the_phase(tiny):
    parts = parts_of(tiny, teacher__offload=True)
    error = MemoryError("no room")
    assert "the teacher's head" in guards.memory_advice(parts, "rollout", error)
    assert "the teacher's head" not in guards.memory_advice(parts, "teacher", error)


def test_a_plan_has_the_teacher_where_it_is_asked(tiny):
    found = {}
    for offload in (False, True):
        run = tiny_run.resolved(tiny, **GRID, teacher__offload=offload, eval__every=1)
        parts = programs.assembly(run, chips.machine("cpu:8"), say=lambda line: None)
        with jax.set_mesh(parts.mesh):
            found[offload] = {each.name: each.alive for each in programs.of_run(parts)}
    whole = memory.weights(parts.cfg.teacher, np.float32, parts.mesh)
    head = memory.weights(parts.cfg.teacher, np.float32, parts.mesh, part=resting.head)
    for name, alive in found[True].items():
        expected = whole if name in ("teacher", "evaluation") else head
        assert alive["teacher"] == expected, name
        assert found[False][name]["teacher"] == whole
        rest = {key: value for key, value in alive.items() if key != "teacher"}
        assert rest == {k: v for k, v in found[False][name].items() if k != "teacher"}


def test_a_platform_without_such_memory_is_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resting, "is_possible", lambda device: False)
    with pytest.raises(ConfigError, match=r"teacher\.offload.*pinned_host.*offload=False"):
        parts_of(tiny, teacher__offload=True)
    assert cli.main(tiny_run.argv(tiny, tmp_path / "run", teacher__offload=True, **GRID)) == 1
    assert "--config.teacher.offload=False" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
