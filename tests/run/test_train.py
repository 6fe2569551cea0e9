"""The run end to end: what it writes, what it compiles, and when it stops by itself."""

import collections
import gzip
import json

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file

from opd_jax import cli
from opd_jax.evaluate import heldout
from opd_jax.models import hf_weights
from opd_jax.run import answering, assemble, initial
from opd_jax.store import checkpoint
from opd_jax.store import workdir as workdirs

tiny, one_device = tiny_run.tiny, tiny_run.one_device
STEP_FIELDS = {
    "step",
    "loss",
    "kl_nats",
    "kl_gated",
    "kl_ungated",
    "divergence",
    "grad_norm",
    "gated_share",
    "projected_share",
    "gated_kl_share",
    "gate_weight",
    "rock_members",
    "rock_entries",
    "rock_exits",
    "rock_jaccard",
    "student_entropy_nats",
    "teacher_entropy_nats",
    "mean_length",
    "truncated_share",
    "padding_share",
    "tokens_per_s",
    "lr",
    "data_s",
    "rollout_s",
    "teacher_s",
    "update_s",
    "host_s",
    "step_s",
}
# All that a step's seconds are split into; evaluating and saving happen between steps.
PHASES = ("data_s", "rollout_s", "samples_s", "teacher_s", "update_s", "host_s")


def compiled_since(before):
    return {name: n - before[name] for name, n in assemble.programs().items()}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of four steps with everything on: (workdir, programs it compiled)."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    before = assemble.programs()
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        status = tiny_run.train(
            tiny,
            workdir,
            train__steps=4,
            eval__every=2,
            eval__batch=8,
            checkpoint__every=2,
            log__samples_every=2,
            profile="2:3",
        )
    assert status == 0
    return workdir, compiled_since(before)


def test_metrics_has_every_step_once_with_all_fields(finished):
    workdir, _ = finished
    lines = tiny_run.read_lines(workdir / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert line.keys() >= STEP_FIELDS
        assert line["loss"] == pytest.approx(line["kl_nats"], rel=1e-5)
        assert line["kl_gated"] is None
        assert line["kl_ungated"] == line["kl_nats"]
    evaluations = [line for line in lines if "eval/accuracy" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]


def test_the_phases_of_a_step_add_up(finished):
    lines = [x for x in tiny_run.read_lines(finished[0] / "metrics.jsonl") if "loss" in x]
    for line in lines:
        assert sum(line.get(name, 0) for name in PHASES) == pytest.approx(line["step_s"])
        assert all(line[name] >= 0 for name in PHASES if name in line)
    assert "samples_s" in lines[0]
    assert "samples_s" not in lines[1]
    summary = json.loads((finished[0] / "summary.json").read_text())
    steps = sorted(line["step_s"] for line in lines)
    assert summary["median_s"]["step"] == pytest.approx(sum(steps[1:3]) / 2)
    assert set(summary["phase_share"]) == {x[:-2] for x in PHASES} | {"eval", "save"}
    assert sum(summary["phase_share"].values()) == pytest.approx(1)
    assert lines[0]["step_s"] < summary["first_step_s"] < summary["seconds"] + 60


def test_the_profile_holds_the_asked_steps_with_their_phases(finished):
    (file,) = (finished[0] / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = collections.Counter(event["name"] for event in events if "name" in event)
    assert [names[name] for name in ("train", "rollout", "teacher", "update")] == [2] * 4
    assert names["data"] == names["crop"] == 2
    assert names["samples"] == 1


def test_samples_pair_every_id_with_its_kl(finished):
    lines = tiny_run.read_lines(finished[0] / "samples.jsonl")
    assert [line["step"] for line in lines] == [0, 2]
    for sample in (sample for line in lines for sample in line["samples"]):
        assert len(sample["ids"]) == len(sample["kl_nats"]) > 0
        assert min(sample["kl_nats"]) >= -1e-5
        assert "=" in sample["prompt"]


def test_summary_has_the_agreed_keys(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary.keys() >= {"before", "after", "steps", "seconds", "compiles"}
    for side in ("before", "after"):
        assert tuple(summary[side]) == heldout.FIELDS
    assert summary["steps"] == 4
    assert summary["after"]["kl_nats"] < summary["before"]["kl_nats"]
    assert summary["rocks"]
    assert sum(row["share"] for row in summary["rocks"]) <= 1


def test_evaluations_and_summary_agree(finished):
    workdir, _ = finished
    summary = json.loads((workdir / "summary.json").read_text())
    lines = [x for x in tiny_run.read_lines(workdir / "metrics.jsonl") if "eval/accuracy" in x]
    for side, line in (("before", lines[0]), ("after", lines[-1])):
        assert summary[side] == {name: line[f"eval/{name}"] for name in heldout.FIELDS}


def test_right_answers_add_up_to_the_accuracy(finished):
    workdir, _ = finished
    lines = [x for x in tiny_run.read_lines(workdir / "metrics.jsonl") if "eval/accuracy" in x]
    graded = tiny_run.read_lines(workdir / "graded.jsonl")
    assert [line["step"] for line in graded] == [0, 2, 4]
    for line, evaluation in zip(graded, lines, strict=True):
        assert line["index"] == list(range(12))
        right = [x for row in line["correct"] for x in row]
        assert len(right) == 12
        assert np.mean(right) == evaluation["eval/accuracy"]


def test_without_a_gate_rocks_are_written_with_evaluations(finished):
    lines = tiny_run.read_lines(finished[0] / "rocks.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert len(lines[-1]["top"]) == len(summary["rocks"]) == 10
    shares = [row["share"] for row in summary["rocks"]]
    assert shares == sorted(shares, reverse=True)
    assert summary["rocks_steps"] == 10  # about the end of the run, not about all of it
    assert lines[-1]["members"] == lines[-1]["gated_share"] == 0
    assert lines[-1]["jaccard"] is None


def test_a_gate_writes_its_rocks_on_every_refresh(tiny, tmp_path, one_device, capsys):
    keys = {"rock__mode": "ema", "rock__every": 2, "rock__top_k": 8, "eval__every": 4}
    keys |= {"eval__batch": 8, "rock__probe": 1.0}  # by fewer probes a share may come out as 0
    assert tiny_run.train(tiny, tmp_path / "run", **keys) == 0
    lines = tiny_run.read_lines(tmp_path / "run" / "rocks.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    first, last = lines
    assert (first["members"], first["entered"], first["left"]) == (8, 8, 0)
    assert first["jaccard"] == first["gated_share"] == 0
    assert last["members"] == 8 + last["entered"] - last["left"]
    assert last["jaccard"] == pytest.approx((8 - last["left"]) / (8 + last["entered"]))
    assert 0 < last["gated_share"] <= 1
    assert 0 < last["gated_kl_share"] <= 1
    assert sum(row["member"] for row in first["top"]) == 8
    moves = f"rocks {last['members']} (+{last['entered']} -{last['left']} at step 4)"
    held_out = [x for x in capsys.readouterr().out.splitlines() if x.startswith("held out, step")]
    assert "rocks" not in held_out[0]
    assert held_out[-1].endswith(moves)


def test_checkpoints_are_at_the_asked_steps(finished):
    with checkpoint.open(finished[0]) as saves:
        assert saves.steps() == [2, 4]


def test_each_program_is_compiled_at_most_once(finished):
    # Three samplers: the policy on 8 rows (training) and on one answer a prompt, the greedy grader.
    most = {"teacher_states": 1, "distill_step": 1, "eval_step": 2, "sample": 3}
    for name, number in finished[1].items():  # none if a test before has compiled the same
        assert number <= most.get(name, 0), name


def test_run_json_is_there_before_the_first_step(tiny, tmp_path, one_device, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stopped

    monkeypatch.setattr(initial, "state", stop)
    with pytest.raises(Stopped):
        tiny_run.train(tiny, tmp_path / "run")
    record = workdirs.read_run(tmp_path / "run")
    assert record is not None
    assert record["config"]["train.steps"] == 4
    assert record["stop_ids"] == [2]
    assert record["command"][:2] == ["opd-jax", "train"]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_evaluation_the_sides_are_null(tiny, tmp_path, one_device):
    assert tiny_run.train(tiny, tmp_path / "run", train__steps=0) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"] == summary["after"] == dict.fromkeys(heldout.FIELDS)
    assert summary["steps"] == 0
    assert summary["rocks"] == []


def test_answer_buckets_compile_once_each(tiny, tmp_path, one_device, monkeypatch):
    """Batches whose answers all end early are cropped, and every width is compiled once."""

    widths = []

    def spy(answers, *limits, crop=answering.crop):
        cut = len(widths) % 2 * 3  # every second batch ends after three tokens
        width = answers.ids_BT.shape[1] - 6
        if cut:
            mask = np.asarray(answers.mask_BT).copy()
            mask[:, width + cut :] = False
            answers = answers.replace(mask_BT=jax.device_put(mask, answers.mask_BT.sharding))
        answers = crop(answers, *limits)
        widths.append(answers.ids_BT.shape[1])
        return answers

    monkeypatch.setattr(answering, "crop", spy)
    before = assemble.programs()
    keys = {"rollout__buckets": "(3, 6)"}
    assert tiny_run.train(tiny, tmp_path / "run", **keys) == 0
    assert widths == [22, 19, 22, 19]  # the longest of the prompts has 16 ids
    assert compiled_since(before)["distill_step"] <= 2


def test_a_profile_ends_with_the_run_and_may_differ_on_resume(tiny, tmp_path, one_device):
    workdir = tmp_path / "run"
    bad = {"profile": "9:12"}
    assert tiny_run.train(tiny, workdir, **bad) == 1
    assert not workdir.exists()
    # 12 prompts are 3 steps: the run ends inside the range, and the trace is written all the same.
    assert tiny_run.train(tiny, workdir, data__epochs=1, profile="3:4") == 0
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1
    assert tiny_run.train(tiny, workdir, data__epochs=1, profile="4") == 0


def test_a_student_equal_to_its_teacher_has_no_kl(tiny, tmp_path, one_device):
    assert tiny_run.train(tiny, tmp_path / "run", student__path=tiny / "teacher") == 0
    first = tiny_run.read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert abs(first["loss"]) < 1e-6
    assert abs(first["kl_nats"]) < 1e-6


def test_a_static_gate_splits_the_kl(tiny, tmp_path, one_device):
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(list(range(0, 640, 2))))
    keys = {"rock__mode": "static", "rock__ids_file": ids, "rock__inside": 0.5}
    status = tiny_run.train(tiny, tmp_path / "run", eval__every=4, **keys)
    assert status == 0
    line = next(x for x in tiny_run.read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in x)
    assert line["rock_members"] == 320
    assert 0 < line["gated_share"] < 1
    gated = line["gated_share"]
    # Both halves together are the whole, and the loss weighs the gated half by one half.
    parts = gated * line["kl_gated"], (1 - gated) * line["kl_ungated"]
    assert sum(parts) == pytest.approx(line["kl_nats"], rel=1e-4)
    assert 0.5 * parts[0] + parts[1] == pytest.approx(line["loss"], rel=1e-4)
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["after"]
    assert after["kl_gated"] > 0
    assert after["kl_ungated"] > 0


def test_the_mesh_does_not_change_the_loss(tiny, tmp_path, monkeypatch):
    keys = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2}
    assert tiny_run.train(tiny, tmp_path / "sharded", **keys) == 0
    with monkeypatch.context() as patch:
        tiny_run.use_one_device(patch)
        assert tiny_run.train(tiny, tmp_path / "alone") == 0
    sharded, alone = (
        tiny_run.read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("sharded", "alone")
    )
    for name in ("loss", "grad_norm"):
        assert sharded[name] == pytest.approx(alone[name], rel=1e-5), name


def test_a_gradient_that_is_not_finite_stops_the_run_before_a_save(
    tiny, tmp_path, one_device, capsys, monkeypatch
):
    # Else it would not be loaded.
    monkeypatch.setattr(hf_weights, "_is_finite", lambda values: True)
    folder = tiny_run.copy_folder(tiny, tmp_path / "copy")
    file = folder / "student" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = np.nan
    save_file(tensors, file)
    workdir = tmp_path / "run"
    assert tiny_run.train(folder, workdir, checkpoint__every=1) == 1
    message = capsys.readouterr().err
    assert "step 0" in message
    assert "not finite" in message
    assert "no checkpoint" in message
    assert "--config.optim.lr" in message
    assert "Traceback" not in message
    with checkpoint.open(workdir) as saves:
        assert saves.steps() == []


def test_the_objective_is_said_before_the_first_step(tiny, tmp_path, one_device, capsys):
    assert cli.main(tiny_run.argv(tiny, tmp_path / "run", train__steps=0)) == 0
    out = capsys.readouterr().out
    assert "KL(student || teacher)" in out
    assert "stop ids: 2 '<|im_end|>'" in out
