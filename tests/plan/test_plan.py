"""The command ``opd-jax plan``, as users meet it, and what it says of runs that do not fit."""

import dataclasses
import importlib.util
import json
import math

import jax
import pytest
import tiny_run

from opd_jax import cli, config
from opd_jax.models import memory, params, transformer
from opd_jax.plan import chips, estimate, known_models, printout, programs, search
from opd_jax.run import assemble, initial

tiny = tiny_run.tiny
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.model=2")
STEP = ("prefill", "decode", "teacher", "train")


def command(folder, *more, topology="cpu:8"):
    return cli.main(["plan", f"--config={folder / 'config.py'}", f"--topology={topology}", *more])


@pytest.fixture(scope="module")
def planned(tiny, tmp_path_factory):
    """The plan of the tiny run on eight virtual devices, as JSON; its models have no weights."""
    folder = tiny_run.copy_folder(tiny, tmp_path_factory.mktemp("plan") / "run")
    for path in [
        *folder.glob("*/*.safetensors"),
        *folder.glob("*/tokenizer*"),
        folder / "prompts.jsonl",
    ]:
        path.unlink()
    out, made, real = folder / "plan.json", [], estimate.plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            estimate, "plan", lambda *args, **more: made.append(real(*args, **more)) or made[0]
        )
        assert command(folder, *MESH, f"--out={out}") == 0
    return folder, json.loads(out.read_text()), made[0]


def test_every_program_of_a_step_is_planned(planned):
    _, plan, _ = planned
    assert plan["topology"] == "cpu:8"
    assert plan["fits"] is True
    assert plan["mesh"] == {"data": 2, "fsdp": 2, "model": 2}
    assert set(plan["programs"]) == set(STEP)
    for part in plan["programs"].values():
        assert part["bytes_per_chip"] == pytest.approx(sum(part["memory"].values()), abs=8)
        assert part["compile_seconds"] > 0
        assert part["seconds"] >= part["bound_seconds"] > 0
        assert 0 < part["peak_share"] < 1
        assert all(each["axes"] != "?" for each in part["collectives"])
    seconds = sum(plan["programs"][name]["seconds"] for name in STEP)
    assert plan["seconds_per_step"] == pytest.approx(seconds)
    assert plan["chip_hours"] == pytest.approx(8 * 4 * seconds / 3600)  # 4 steps


def test_flops_are_those_of_parameters_and_tokens(planned):
    folder, plan, _ = planned
    student, teacher = (
        known_models.shapes(str(folder / who), "float32", "").cfg for who in ("student", "teacher")
    )
    rows, prompt, new = 8, 48, 6

    def layers(cfg):
        tree = transformer.specs(cfg)["layers"]
        return sum(math.prod(spec.shape) for name, spec in tree.items() if "norm" not in name)

    def squares(cfg, columns):  # of attention, whole
        return 4 * columns**2 * cfg.num_heads * cfg.head_dim * cfg.num_layers

    flops = {name: part["flops"] for name, part in plan["programs"].items()}
    columns = prompt + new - 1
    least = 2 * rows * columns * layers(teacher)
    assert least <= flops["teacher"] <= least + rows * squares(teacher, columns)
    # Each token after the first: all layers and the head, and attention over all of the cache.
    head = student.vocab_size * student.width
    each = (
        2 * (layers(student) + head)
        + 4 * (prompt + new) * student.num_heads * student.head_dim * student.num_layers
    )
    assert flops["decode"] == pytest.approx(rows * (new - 1) * each, rel=0.02)
    # Forward and twice that backward, no less; at most everything again.
    forward = 2 * rows * columns * layers(student) + rows * squares(student, columns) / 2
    assert 3 * forward <= flops["train"]


def test_weights_are_counted_as_they_lie_on_a_chip(planned):
    folder, plan, _ = planned
    held = plan["programs"]["train"]["memory"]
    given, _ = config.load([f"--config={folder / 'config.py'}", *MESH])
    parts = programs.assembly(config.resolve(given), chips.machine("cpu:8"))
    wanted = memory.weights(parts.cfg.student, "float32", parts.mesh)
    assert held["student"] == wanted
    assert 2 * wanted <= held["optimizer"] <= 2 * wanted + 64
    assert held["teacher"] == memory.weights(parts.cfg.teacher, "float32", parts.mesh)
    cache = memory.cache(parts.cfg.student, 8, parts.prompt_widths[-1] + 6, parts.mesh)
    assert plan["programs"]["decode"]["memory"]["cache"] == cache


def test_what_is_planned_is_what_training_compiles(tiny, planned):
    """Shapes and placements of a run with its files are those of a plan without them."""
    given, _ = config.load([f"--config={tiny / 'config.py'}", *MESH])
    run = config.resolve(given)
    real = assemble.assemble(run, say=lambda line: None)
    described = programs.assembly(run, chips.machine("cpu:8"), say=lambda line: None)
    for state in (initial.state_template, initial.teacher_template):
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state(real)) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), state(described)
        )
    same = dataclasses.replace(described.cfg.student, max_positions=real.cfg.student.max_positions)
    assert same == real.cfg.student


def test_what_a_stage_does_not_run_is_not_planned(planned):
    folder, _, _ = planned
    given, _ = config.load([f"--config={folder / 'config.py'}", *MESH, "--config.eval.every=2"])
    run = config.resolve(given)
    for stage, wanted in {
        "off_policy": ["teacher", "train", "answers", "evaluation"],
        "mixed": ["sample", "teacher", "train", "answers", "evaluation"],
    }.items():
        own = dataclasses.replace(run, train=dataclasses.replace(run.train, stage=stage))
        parts = programs.assembly(own, chips.machine("cpu:8"))
        with jax.set_mesh(parts.mesh):
            assert [each.name for each in programs.of_run(parts)] == wanted


def test_sampling_in_another_arrangement_is_planned_in_it(tiny):
    keys = ("mesh.data=1", "mesh.fsdp=8", "mesh.rollout_model=2", "train.prompts=8", "eval.every=2")
    flags = [f"--config.{key}" for key in keys]
    given, _ = config.load([f"--config={tiny / 'config.py'}", *flags])
    machine = chips.machine("cpu:8")
    parts = programs.assembly(config.resolve(given), machine, say=str)
    with jax.set_mesh(parts.mesh):
        found = {each.name: each for each in programs.of_run(parts)}
    assert [*found] == ["switch", "sample", "teacher", "train", "answers", "evaluation"]
    meshes = {name: each.mesh.shape["model"] for name, each in found.items()}
    assert meshes == dict.fromkeys(found, 1) | dict.fromkeys(("switch", "sample", "answers"), 2)
    held = {name: each.alive["policy"] for name, each in found.items()}
    assert held["sample"] == held["answers"] > 0 == held["train"] == held["teacher"]


@pytest.fixture
def small(monkeypatch):
    """Machines whose devices have little memory."""

    def of(num_bytes):
        monkeypatch.setattr(chips.memory, "device_bytes", lambda mesh: num_bytes)

    return of


def test_what_does_not_fit_is_told_with_what_helps(planned, capsys, monkeypatch):
    folder, _, made = planned
    limit = made.programs["train"].bytes_per_chip - 1
    less = {name: dataclasses.replace(p, limit=limit) for name, p in made.programs.items()}
    monkeypatch.setattr(
        estimate, "plan", lambda *args, **_: dataclasses.replace(made, programs=less)
    )
    assert command(folder, *MESH) == 1
    out = capsys.readouterr().out
    assert out.count("does not fit") == 1
    assert "train does not fit" in out
    assert "most of it: temporaries, " in out
    assert "raise --config.train.microbatches" in out


def test_the_search_names_the_fastest_that_fits(planned, small, capsys, monkeypatch):
    folder, plan, _ = planned
    largest = max(part["bytes_per_chip"] for part in plan["programs"].values())
    small(largest - 1)
    seen = []

    def cheap(parts, machine, say=print, only=()):
        """Half the temporaries with each doubling of micro-batches, and no compiling."""
        seen.append(parts.run.train.microbatches)
        size = largest / parts.run.train.microbatches
        spec = parts.run.mesh
        seconds = {
            "train": float(parts.run.train.microbatches + spec.fsdp + 10 * spec.model),
            "decode": 8.0 / (spec.rollout_model or spec.model),  # fastest along the model alone
        }
        made = {
            name: estimate.ProgramPlan(
                name, {"temporaries": size}, machine.chip.memory, 1.0, 1.0,
                estimate.Cost(1.0, 1.0, value, (), {"compute": 1.0}),
            )
            for name, value in seconds.items()
            if not only or name == "decode"
        }  # fmt: skip
        axes, other = dict(parts.mesh.shape), dict(parts.rollout_mesh.shape)
        return estimate.Plan(
            machine.name, machine.chip, axes, other, made, 8, 6, 4, (0, 0, 0), is_whole=not only
        )

    monkeypatch.setattr(search.estimate, "plan", cheap)
    flags = (*MESH, "--config.train.prompts=8")
    given, _ = config.load([f"--config={folder / 'config.py'}", *flags])
    found = search.search(config.resolve(given), chips.machine("cpu:8"), say=lambda line: None)
    assert seen[:2] == [1, 2]  # doubled until it fits, and no further
    chosen = search.best(found)
    fitting = [each for each in found if each.plan and each.plan.fits]
    assert chosen in fitting
    assert all(each.plan.seconds_per_step >= chosen.plan.seconds_per_step for each in fitting)
    assert len({tuple(each.keys.values()) for each in found}) == len(found)
    assert chosen.keys["mesh.rollout_model"] == 2  # of two heads
    assert chosen.plan.rollout_mesh["model"] == 2
    assert chosen.plan.programs["decode"].cost.seconds == 4.0
    assert found[-1].problem.startswith("the student has 2 key/value heads")  # 4 do not divide them
    text = search.lines(found)
    assert text[-1].startswith("best: --config.mesh.data=")
    assert printout.as_json(chosen.plan)["fits"]


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v7x:4x4", "no chip 'v7x' is known; expected one such as v5e:4x4, v5p:2x2x4"),
        ("cpu", "found the shape ''"),
        ("v5e:4xfour", "found the shape '4xfour'"),
        ("h100:2x4", "expected h100:N"),
        ("cpu:64", "needs 64 virtual devices"),
        ("v5e:4x4", "pip install 'opd-jax[plan]'"),
        ("h100:8", "pip install 'opd-jax[cuda]'"),
    ],
)
def test_an_unknown_machine_or_a_missing_extra_is_one_message(
    tiny, topology, said, capsys, monkeypatch
):
    find = importlib.util.find_spec
    hidden = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )
    assert command(tiny, topology=topology) == 1
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert "--topology" in message


def test_a_model_may_be_a_known_name_or_another_folder(planned, capsys):
    folder, _, _ = planned
    given, _ = config.load([f"--config={folder / 'config.py'}", *MESH])
    run, machine = config.resolve(given), chips.machine("cpu:8")
    said = []
    parts = programs.assembly(
        run, machine, student="Qwen3-4B", teacher="x/Qwen3-30B-A3B", say=said.append
    )
    assert said == ["student: Qwen3-4B as published", "teacher: Qwen3-30B-A3B as published"]
    assert params.count(transformer.specs(parts.cfg.student)) == pytest.approx(4.02e9, rel=0.01)
    assert params.count(transformer.specs(parts.cfg.teacher)) == pytest.approx(30.5e9, rel=0.01)
    assert command(folder, *MESH, "--student-config=Qwen3-5B") == 1
    message = capsys.readouterr().err
    assert "'Qwen3-5B' has no config.json and is not known by name" in message
    assert "Qwen3-4B" in message
    assert "--student-config" in message


def test_some_of_the_programs_say_nothing_of_a_step(tiny, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert command(tiny, *MESH, "--only=teacher", f"--out={out}") == 0
    plan = json.loads(out.read_text())
    assert set(plan["programs"]) == {"teacher"}
    assert plan["seconds_per_step"] is None
    assert plan["chip_hours"] is None
    assert command(tiny, *MESH, "--only=teachers") == 1
    assert "no program 'teachers': expected some of switch, sample" in capsys.readouterr().err
