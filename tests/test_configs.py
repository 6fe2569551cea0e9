"""The config files: each resolves, and the flagship's arms set what their names say."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_run

from opd_jax import cli, config
from opd_jax.instrument import controls
from opd_jax.rock import RockConfig
from opd_jax.spec import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
OPD = CONFIGS / "opd.py"
HELDOUT = "embedded:prompts/heldout.jsonl"
LISTS = {
    "rock": [5, 3, 8],
    "next_ranks": [1],
    "hungarian": [2, 4],
    "share_matched": [9, 11, 13],
    "complement": [1, 2, 4, 9],
    "top_freq": [3, 7],
    "top_mean_kl": [21],
    "top_gradient_norm": [22],
    "top_gradient_alignment": [23],
}
# What each arm gates: ids, share of the positions, or whatever the run finds.
GATED = {
    "rock": LISTS["rock"],
    "rock_input_key": LISTS["rock"],
    "random_types": LISTS["share_matched"],
    "complement": LISTS["complement"],
    "top_freq": LISTS["top_freq"],
    "top_mean_kl": LISTS["top_mean_kl"],
    "top_gradient_norm": LISTS["top_gradient_norm"],
    "top_gradient_alignment": LISTS["top_gradient_alignment"],
    "hungarian": LISTS["hungarian"],
    "next_ranks": LISTS["next_ranks"],
    "soft_0.3": LISTS["rock"],
    "soft_0.5": LISTS["rock"],
    "soft_0.7": LISTS["rock"],
    "ramp": LISTS["rock"],
}
POSITIONS = (
    *("half_random", "random_window", "first", "last", "entropy", "tip", "lowest_logp"),
    *("fire", "selectkd", "ta", "iw"),
)
# What each of these sets: whose answers are trained on, by which divergence.
ANSWERS = {
    "forward_on": {"kl.direction": "forward"},
    "reverse_off": {"train.stage": "off_policy"},
    "forward_off": {"train.stage": "off_policy", "kl.direction": "forward"},
    "reverse_mixed": {"train.stage": "mixed"},
    "imitation": {"train.stage": "off_policy", "kl.direction": "forward", "kl.ce": 0.5},
}
ARMS = ("full", *GATED, "random_positions", "ema", "adaptive", *POSITIONS, "rock_window", "cut")
tiny, one_device = tiny_run.tiny, tiny_run.one_device


@pytest.fixture(scope="module")
def rocks(tmp_path_factory):
    """What ``opd-jax rocks`` leaves for the arms."""
    folder = tmp_path_factory.mktemp("rocks")
    (folder / "lists").mkdir()
    for name, ids in LISTS.items():
        (folder / "lists" / f"{name}.json").write_text(json.dumps(ids))
    about = {"rock": {"types": 3, "token_share": 0.25, "kl_share": 0.5, "residual": None}}
    (folder / "lists" / "lists.json").write_text(json.dumps(about))
    return folder


def resolve(path, arg="", *flags):
    given, _ = config.load([f"--config={path}:{arg}", *flags], workdir=None)
    return config.resolve(given)


def test_the_table_of_arms_is_whole(rocks):
    with pytest.raises(ConfigError) as error:
        resolve(OPD, "arm=none")
    named = str(error.value).partition("one of ")[2].partition(";")[0].split(", ")
    assert sorted(named) == sorted((*ARMS, *ANSWERS))


def test_the_lists_are_those_that_the_analysis_writes():
    gradients = {"top_gradient_norm", "top_gradient_alignment"}
    assert {*LISTS} == {"rock", *controls.CONTROLS} | gradients


@pytest.mark.parametrize("base", ["demo", "smollm2"])
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_differs_from_its_base_in_the_gate_alone(arm, base, rocks):
    plain = config.describe(resolve(CONFIGS / f"{base}.py"))
    found = config.describe(resolve(OPD, f"arm={arm},base={base},rocks={rocks}"))
    changed = {key for key in plain if plain[key] != found[key]}
    assert plain.keys() == found.keys()
    groups = {key.partition(".")[0] for key in changed}
    assert groups <= {"rollout", "eval"} if arm == "cut" else groups <= {"rock", "position"}
    assert bool(changed) == (arm != "full")


@pytest.mark.parametrize("arm", ANSWERS)
def test_an_arm_sets_whose_answers_are_trained_on(arm):
    plain = config.describe(resolve(OPD, "completions=a.jsonl"))
    found = config.describe(resolve(OPD, f"arm={arm},completions=a.jsonl"))
    assert {key: found[key] for key in plain if plain[key] != found[key]} == ANSWERS[arm]
    assert plain["data.prompts"] == "a.jsonl"  # of all arms, so that they compare
    if "train.stage" in ANSWERS[arm]:
        with pytest.raises(ConfigError, match=r"without completions.*generate.*:completions=FILE"):
            resolve(OPD, f"arm={arm}")


@pytest.mark.parametrize("base", ["demo", "smollm2"])
def test_two_stages_take_half_of_the_steps_each(base):
    path = CONFIGS / "two_stages.py"
    whole = resolve(CONFIGS / f"{base}.py")
    first, second = (resolve(path, f"base={base},stage={n},answers=a,first=b") for n in (1, 2))
    assert first.train.steps + second.train.steps == whole.train.steps
    assert (first.train.stage, first.kl.direction, first.kl.ce) == ("off_policy", "forward", 0.5)
    assert (second.train.stage, second.kl) == ("on_policy", whole.kl)
    assert (first.data.prompts, first.init_from, second.init_from) == ("a", "", "b")
    assert second.data == whole.data


@pytest.mark.parametrize("stage", [1, 2])
def test_the_published_setting(stage):
    """Batch, rates, lengths and steps of arXiv 2605.09253, app. B, on four devices."""
    run = resolve(CONFIGS / "qwen3_30b_to_4b.py", f"stage={stage}")
    rows = run.train.prompts * run.rollout.samples
    assert run.optim.lr == (2e-5, 2e-6)[stage - 1]
    assert rows == (128, 4)[stage - 1]
    assert run.train.steps == (156, 10_000)[stage - 1]
    assert (run.optim.warmup, run.optim.clip, run.optim.b2) == (0.05, 1.0, 0.98)
    assert run.data.max_prompt + run.rollout.max_new == (16_384, 8800)[stage - 1]
    shards = 4 // run.mesh.model
    assert rows // run.train.microbatches == shards
    assert run.train.prompts % shards == 0
    assert bool(run.init_from) == (stage == 2)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gsm8k(stage):
    run = resolve(CONFIGS / "gsm8k_qwen.py", f"stage={stage}")
    assert (run.train.stage == "off_policy") == (stage == 1) == bool(run.kl.ce)
    assert bool(run.init_from) == (stage == 2)
    assert run.data.columns == (("prompt", "question"),)


@pytest.mark.parametrize("devices", [4, 8, 16, 32, 64])
def test_a_larger_qwen_on_many_devices(devices):
    run = resolve(CONFIGS / "qwen3_4b.py", f"teacher=Qwen3-32B,devices={devices}")
    assert run.teacher.path.endswith("Qwen3-32B")
    assert (run.train.prompts * run.rollout.samples, run.rollout.max_new) == (256, 8192)
    assert run.train.microbatches * devices == 256
    assert devices % run.mesh.rollout_model == run.train.prompts % devices == 0


@pytest.mark.parametrize("devices", [0, 6, 128])
def test_rows_that_do_not_divide_over_the_devices_are_refused(devices):
    with pytest.raises(ConfigError, match=rf"devices is {devices}: expected .* set :devices="):
        resolve(CONFIGS / "qwen3_4b.py", f"devices={devices}")


@pytest.mark.parametrize("name", ["two_stages", "qwen3_30b_to_4b", "gsm8k_qwen"])
def test_there_is_no_third_stage(name):
    with pytest.raises(ConfigError, match=r"stage is 3: expected .* set :stage="):
        resolve(CONFIGS / f"{name}.py", "stage=3")


@pytest.mark.parametrize(("arm", "ids"), GATED.items())
def test_a_list_arm_gates_its_list(arm, ids, rocks):
    rock = resolve(OPD, f"arm={arm},rocks={rocks}").rock
    assert (rock.mode, list(rock.ids)) == ("static", ids)
    inside = float(arm[5:]) if arm.startswith("soft") else 0.0
    assert rock.inside == inside
    assert rock.key == ("input" if arm == "rock_input_key" else "label")
    assert rock.ramp == (60 if arm == "ramp" else 0)


def test_random_positions_take_the_rocks_share_of_the_tokens(rocks):
    rock = resolve(OPD, f"arm=random_positions,rocks={rocks}").rock
    assert (rock.mode, rock.share) == ("random", 0.25)


@pytest.mark.parametrize("arm", ["ema", "adaptive"])
def test_a_run_finds_as_many_rocks_as_the_list_holds(arm, rocks):
    assert resolve(OPD, f"arm={arm}").rock == RockConfig(mode=arm, top_k=100)
    assert resolve(OPD, f"arm={arm},rocks={rocks}").rock == RockConfig(mode=arm, top_k=3)
    assert resolve(OPD, f"arm={arm},rocks={rocks},k=7").rock == RockConfig(mode=arm, top_k=7)


@pytest.mark.parametrize("arm", ["rock", "random_positions", "ema"])
def test_rocks_that_were_selected_on_the_held_out_prompts_are_refused(arm, rocks, tmp_path):
    folder = tmp_path / "rocks"
    shutil.copytree(rocks, folder)
    for prompts in ("embedded:prompts/train.jsonl", "elsewhere.jsonl"):
        (folder / "rocks.json").write_text(json.dumps({"prompts": prompts}))
        assert resolve(OPD, f"arm={arm},rocks={folder}").rock.mode
    for prompts in (HELDOUT, config.path_of(HELDOUT)):  # as a name, or as older runs have it
        (folder / "rocks.json").write_text(json.dumps({"prompts": prompts}))
        with pytest.raises(ConfigError, match=r"held-out prompts .* --prompts=embedded:prompts/tr"):
            resolve(OPD, f"arm={arm},rocks={folder}")
        assert resolve(OPD, f"arm=full,rocks={folder}").rock.mode == "off"


def test_arguments_reach_their_keys(rocks):
    run = resolve(OPD, f"arm=ramp,rocks={rocks},steps=30,lr=5e-4,norm=per_sequence")
    assert (run.train.steps, run.optim.lr, run.rock.ramp) == (30, 5e-4, 15)
    assert run.train.normaliser == "per_sequence"
    assert resolve(OPD).train.normaliser == "tokens"
    assert resolve(OPD, "steps=30", "--config.train.steps=20").train.steps == 20


@pytest.mark.parametrize(
    ("arg", "parts"),
    [
        ("arm=rock", ("arm rock without rocks", "opd-jax rocks", "set :rocks=DIR")),
        ("arm=rock,rocks=absent", ("absent/lists/rock.json does not exist", "--out=absent`")),
        ("arm=top_gradient_norm,rocks=absent", ("--out=absent --with=gradients`",)),
        ("arm=random_positions,rocks=absent", ("absent/lists/lists.json does not exist",)),
        ("arm=ema,rocks=absent", ("absent/lists/rock.json does not exist",)),
        ("base=none", ("base is 'none'", "demo, smollm2", "set :base=NAME")),
        ("norm=rows", ("train.normaliser", "per_sequence")),
        ("amr=rock", ("'amr'", "nearest known: 'arm'")),
    ],
)
def test_what_cannot_be_is_said_in_three_parts(arg, parts):
    with pytest.raises(ConfigError) as error:
        resolve(OPD, arg)
    for part in parts:
        assert part in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_damaged_table_of_lists_is_named(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "lists.json").write_text("{")
    with pytest.raises(ConfigError, match=r"lists.json is not JSON .* run it again"):
        resolve(OPD, f"arm=random_positions,rocks={tmp_path}")


@pytest.mark.parametrize("arm", ["rock", "random_positions"])
def test_an_arm_trains_on_any_base(arm, rocks, tiny, one_device, tmp_path):
    argument = f"arm={arm},base={tiny / 'config.py'},rocks={rocks},steps=1"
    workdir = tmp_path / "run"
    assert cli.main(["train", f"--config={OPD}:{argument}", f"--workdir={workdir}"]) == 0
    (line,) = tiny_run.read_lines(workdir / "metrics.jsonl")
    assert 0 <= line["gated_share"] < 1


def test_windows_and_cuts_are_parts_of_an_answer():
    base = resolve(CONFIGS / "demo.py")
    assert resolve(OPD, "arm=first").position.window == base.rollout.max_new / 4
    cut = resolve(OPD, "arm=cut")
    assert (cut.rollout.max_new, cut.eval.max_new) == (
        base.rollout.max_new / 4,
        base.rollout.max_new,
    )
    assert resolve(OPD, "arm=tip").rock.mode == "off"
