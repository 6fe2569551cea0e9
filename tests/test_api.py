"""The library in Python: lists of prompts, a callback, and the results of the commands."""

import collections
import json
import subprocess
import sys

import pytest
import tiny_run

import opd_jax
from opd_jax import api, cli
from opd_jax.evaluate import results
from opd_jax.instrument.knockout import ledger

tiny, one_device = tiny_run.tiny, tiny_run.one_device
pytestmark = pytest.mark.usefixtures("one_device")
SETTINGS = {
    "train.steps": 2,
    "train.prompts": 4,
    "data.max_prompt": 48,
    "rollout.samples": 2,
    "rollout.max_new": 6,
    "eval.prompts": 4,
    "eval.kl_prompts": 4,
}


def distil(tiny, workdir, prompts, **more):
    settings = SETTINGS | more.pop("settings", {})
    return opd_jax.distill(
        f"{tiny}/student", f"{tiny}/teacher", prompts, workdir, settings=settings, **more
    )


def test_lists_of_prompts_are_kept_and_the_call_resumes(tiny, tmp_path):
    prompts = ["1 + 1 = ?", {"prompt": "2 + 2 = ?", "answer": "4"}] * 3
    seen = []
    result = distil(tiny, tmp_path / "run", prompts, on_step=lambda n, v: seen.append((n, v)))
    assert [n for n, _ in seen] == [1, 2]
    assert all(values["loss"] > 0 for _, values in seen)
    assert result["is_finished"]
    kept = tiny_run.read_lines(tmp_path / "run" / "prompts.jsonl")
    assert kept == [{"prompt": "1 + 1 = ?"}, {"prompt": "2 + 2 = ?", "answer": "4"}] * 3
    assert distil(tiny, tmp_path / "run", prompts, settings={"train.steps": 3})["steps"] == 3
    with pytest.raises(FileExistsError, match="holds other prompts"):
        distil(tiny, tmp_path / "run", prompts[1:])


def test_it_is_the_run_of_the_command(tiny, tmp_path):
    path = f"{tiny}/prompts.jsonl"
    settings = {"checkpoint.every": 0, "log.samples_every": 0, "optim.lr": 1e-2}
    result = distil(tiny, tmp_path / "a", path, heldout=path, settings=settings)
    keys = {"train__steps": 2, "eval__every": 2, "eval__prompts": 4, "eval__kl_prompts": 4}
    assert tiny_run.train(tiny, tmp_path / "b", **keys) == 0
    assert tiny_run.curve(tmp_path / "a") == tiny_run.curve(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert (result["before"], result["after"]) == (written["before"], written["after"])
    assert result["after"]["kl_nats"] is not None


def test_every_function_does_what_its_command_does(tiny, tmp_path):
    assert {*opd_jax.__all__} - {"distill"} <= {*cli.COMMANDS}
    run, path = tmp_path / "run", f"{tiny}/prompts.jsonl"
    distil(tiny, run, path)
    assert opd_jax.export(str(run), str(tmp_path / "model")) == 2
    assert opd_jax.table(str(run), str(tmp_path / "table.csv")) == 2
    said = opd_jax.generate(str(tmp_path / "model"), path, str(tmp_path / "a.jsonl"), max_new=4)
    assert "wrote 12 answers" in said
    result = opd_jax.rocks(str(tmp_path / "rocks"), run=str(run), k=3, say=lambda line: None)
    assert result == json.loads((tmp_path / "rocks" / "summary.json").read_text())
    api.report([run], tmp_path / "page.html", rocks=tmp_path / "rocks")
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_models_are_evaluated_and_knocked_out_as_by_the_commands(tiny, tmp_path):
    task = tmp_path / "sums.jsonl"
    tiny_run.write_lines(
        task, [{"question": f"{i} + 2 = ?", "answer": str(i + 2)} for i in range(24)]
    )
    model, quiet = f"{tiny}/student", {"say": lambda line: None}
    flags = {"max_new": 8, "temperature": 0.6, "samples": 2, "format": "raw"}
    found = opd_jax.eval(model, str(task), tmp_path / "eval", grader="exact", **flags, **quiet)
    argv = ["--max-new=8", "--temperature=0.6", "--samples=2", "--format=raw", "--grader=exact"]
    assert cli.main(["eval", model, f"--tasks={task}", f"--out={tmp_path / 'b'}", *argv]) == 0
    assert (tmp_path / "eval" / results.LINES).read_bytes() == (
        tmp_path / "b" / results.LINES
    ).read_bytes()
    assert found["sums"]["pass@1"].value is not None
    # Several models, and paths in the place of texts.
    models = [tiny / "student", tiny / "teacher"]
    flags["limit"] = 4
    several = opd_jax.eval(models, [task], tmp_path / "several", **flags, **quiet)
    argv_several = [*argv[:-1], "--limit=4", f"--out={tmp_path / 'd'}", f"--tasks={task}"]
    assert cli.main(["eval", *map(str, models), *argv_several]) == 0
    del flags["limit"]
    inside = {path.relative_to(tmp_path / "d") for path in (tmp_path / "d").rglob(results.LINES)}
    assert len(inside) == len(several["models"]) == 2
    for path in [*inside, results.SEEDS]:
        assert (tmp_path / "several" / path).read_bytes() == (tmp_path / "d" / path).read_bytes()
    assert several["mean"]["sums"]["pass@1"].low is not None
    with pytest.raises(ValueError, match="none of 1 types occurs"):  # the answers are kept
        opd_jax.knockout(model, str(task), "5", tmp_path / "none", **flags, effect=1.0, **quiet)
    ids = held(tmp_path / "none")
    more = {"effect": 1.0, "power": 0.2, "batch": 16, "families": ("single",)}
    result = opd_jax.knockout(model, str(task), ids, tmp_path / "k", **flags, **more, **quiet)
    listed = [int(i) for i in ids.split(",")]  # and paths, and arms as the command has them
    again = flags | more | {"families": "single"}
    told = opd_jax.knockout(models[0], [task], listed, tmp_path / "k", **again, **quiet)
    assert {k: v for k, v in told.items() if k != "time"} == {
        k: v for k, v in result.items() if k != "time"
    }
    argv = [*argv[:-1], "--effect=1", "--power=0.2", "--batch=16", "--arms=single"]
    argv += [f"--model={model}", f"--tasks={task}", f"--types={ids}", f"--out={tmp_path / 'c'}"]
    assert cli.main(["knockout", *argv]) == 0
    written = json.loads((tmp_path / "c" / "summary.json").read_text())
    own = json.loads(json.dumps(result))
    assert {k: v for k, v in own.items() if k != "time"} == {
        k: v for k, v in written.items() if k != "time"
    }
    with pytest.raises(TypeError, match="tempreature"):
        opd_jax.knockout(model, str(task), ids, tmp_path / "d", tempreature=1.0)


def held(folder):
    """The ids that most answers hold."""
    lines = tiny_run.read_lines(folder / ledger.LINES)
    found = collections.Counter(i for line in lines for i in {*line["ids"]})
    return ",".join(str(i) for i, _ in found.most_common(3))


@pytest.mark.parametrize("also", ["", "; cli.main(['--help'])", "; cli.main(['nothing'])"])
def test_importing_the_package_imports_nothing_else(also):
    """Nor does what a command line without a command is answered."""
    code = f"import opd_jax, sys; from opd_jax import cli{also}"
    code += "; print([n for n in ('jax', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_what_is_wrong_is_an_error_and_leaves_no_run(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"unknown config key 'train\.stepz'"):
        distil(tiny, tmp_path / "run", ["1"] * 4, settings={"train.stepz": 3})
    with pytest.raises(FileNotFoundError):
        distil(tiny, tmp_path / "run", str(tmp_path / "none.jsonl"))
    with pytest.raises(AttributeError, match="distil"):
        _ = opd_jax.distil  # type: ignore[attr-defined]
    assert not (tmp_path / "run" / "checkpoints").exists()
