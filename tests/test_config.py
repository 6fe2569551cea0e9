"""Configs, overrides and the messages about what cannot be used."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from opd_jax import config
from opd_jax.models import hf_config, params, transformer
from opd_jax.spec import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
DEMO = Path(__file__).parents[1] / "configs" / "demo.py"


def load(*argv, path=DEMO):
    given, _ = config.load([f"--config={path}", *argv], workdir=None)
    return given


def resolve(**keys):
    """The demo's config with ``group__name=value`` set, resolved."""
    given = load()
    with given.unlocked():
        for key, value in ({"data__max_prompt": 128, "rollout__max_new": 96} | keys).items():
            given.update_from_flattened_dict({key.replace("__", "."): value})
    return config.resolve(given)


def write(folder, body):
    file = folder / "mine.py"
    lines = ["from opd_jax import config", "def get_config(arg=''):", "    c = config.defaults()"]
    file.write_text("\n".join([*lines, *(f"    {line}" for line in body), "    return c\n"]))
    return file


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_resolves(path):
    run = config.resolve(load(path=path))
    assert run.train.steps > 0
    assert run.optim.steps == run.train.steps
    for spec in (run.student, run.teacher):
        if not (Path(spec.path) / "config.json").is_file():
            assert "demo_pair" not in spec.path
            continue
        tree = params.abstract(transformer.specs(hf_config.read_config(spec.path)), jnp.float32)
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def test_a_config_takes_its_argument():
    run = config.resolve(load(path=f"{DEMO}:steps=7,lr=5e-4"))
    assert (run.train.steps, run.optim.lr) == (7, 5e-4)


def test_a_run_hashes_and_describes_itself():
    run = resolve()
    assert hash(run) == hash(resolve())
    flat = config.describe(run)
    assert flat["train.steps"] == run.train.steps
    assert flat["rock.mode"] == "off"
    assert json.loads(json.dumps(flat))["data.max_prompt"] == 128


def test_overrides_are_typed():
    given = load(
        "--config.train.steps=3",
        "--config.optim.lr=1",
        "--config.data.shuffle=false",
        "--config.rollout.buckets=(8, 96)",
        "--config.kl.direction=forward",
    )
    run = config.resolve(given)
    assert run.train.steps == 3
    assert type(run.optim.lr) is float
    assert run.data.shuffle is False
    assert run.rollout.buckets == (8, 96)
    assert run.kl.direction == "forward"


def test_pairs_are_set_one_by_one(tmp_path):
    given = [f"c.{name} = 'x'" for name in ("student.path", "teacher.path", "data.prompts")]
    path = write(
        tmp_path, [*given, "c.data.template = (('enable_thinking', True), ('style', 'x'))"]
    )
    flags = [
        "--config.data.template.enable_thinking=false",
        "--config.data.template.budget=12",
        "--config.data.template.date_string",
        "26 Nov",
        "--config.data.columns.prompt=question",
        "--config.data.columns.answer=reward_model.ground_truth",
        "--config.data.columns.completion=1",
    ]
    run = config.resolve(load(*flags, path=path))
    wanted = {"style": "x", "enable_thinking": False, "budget": 12, "date_string": "26 Nov"}
    assert dict(run.data.template) == wanted
    assert run.data.template[1][1] is False
    assert run.data.columns == (
        ("prompt", "question"),
        ("answer", "reward_model.ground_truth"),
        ("completion", "1"),
    )
    whole = load("--config.data.template=(('a', 1),)", "--config.data.template.b=2", path=path)
    assert config.resolve(whole).data.template == (("a", 1), ("b", 2))
    with pytest.raises(ConfigError, match=r"data\.columns is .*pairs of one of .*'prompt'"):
        config.resolve(load("--config.data.columns.question=prompt"))
    with pytest.raises(ConfigError, match=r"has no value: expected --config.data.template.NAME"):
        load("--config.data.template.x", path=path)
    bad = write(tmp_path, ["c.data.template = (1, 2)"])
    with pytest.raises(ConfigError, match=r"data.template is \(1, 2\)"):
        load("--config.data.template.x=1", path=bad)


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--config.optim.lrr=1", ("'optim.lrr'", "'optim.lr'", "--config.optim.lrr")),
        ("--config.rollot.samples=1", ("'rollot.samples'", "'rollout.samples'")),
        ("--config.train.steps=abc", ("config.train.steps", "abc")),
        ("--config.data.shuffle=perhaps", ("config.data.shuffle", "perhaps")),
        ("--wrkdir=x", ("wrkdir",)),
        ("extra", ("extra", "--name=value")),
    ],
)
def test_a_bad_flag_is_named(flag, parts):
    with pytest.raises(ConfigError) as error:
        load(flag)
    for part in parts:
        assert part in str(error.value)


def test_an_unknown_key_in_the_file_has_a_nearest_one(tmp_path):
    path = write(tmp_path, ["c.train.step = 5"])
    with pytest.raises(ConfigError, match=r"'train.step' \(nearest known: 'train.steps'\)"):
        config.resolve(load(path=path))


def test_an_unknown_group_in_the_file_is_refused(tmp_path):
    path = write(tmp_path, ["c.trian = dict(steps=5)"])
    with pytest.raises(ConfigError, match=r"unknown config key 'trian.steps'.*'train.steps'"):
        config.resolve(load(path=path))


@pytest.mark.parametrize("spelling", [["--config={}"], ["--config", "{}"]])
def test_a_missing_file_says_what_to_give(tmp_path, spelling):
    path = tmp_path / "absent.py"
    with pytest.raises(ConfigError) as error:
        config.load([part.format(path) for part in spelling], workdir=None)
    assert str(path) in str(error.value)
    assert "does not exist" in str(error.value)
    assert "get_config" in str(error.value)
    assert "change --config" in str(error.value)


def test_a_file_that_reads_a_missing_file_is_not_called_missing(tmp_path):
    path = write(tmp_path, ["open('/nowhere/at/all')"])
    with pytest.raises(ConfigError, match=r"failed.*nowhere"):
        load(path=path)


def test_what_a_file_refuses_is_said_without_a_traceback(tmp_path):
    path = write(tmp_path, ["raise config.ConfigError('x is 1: expected 2; set x')"])
    with pytest.raises(ConfigError, match=r"^x is 1: expected 2; set x$"):
        load(path=path)
    with pytest.raises(ConfigError, match=r"^config argument 'step' is not known"):
        load(path=f"{DEMO}:step=3")


def test_a_command_line_without_config_is_refused():
    with pytest.raises(ConfigError, match=r"no --config given: expected --config=FILE"):
        config.load([], workdir=None)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("student.path", "", "a Hugging Face model folder"),
        ("student.dtype", "int8", "float32"),
        ("student.remat", "some", "dots"),
        ("teacher.attention", "splash", "auto"),
        ("seed", -1, "0 to 2"),
        ("profile", "5:3", "FIRST:LAST"),
        ("profile", "0", "steps from 1"),
        ("profile", "1000000", "train.steps"),
        ("profile", "3:", "FIRST:LAST"),
        ("data.prompts", "", "JSONL"),
        ("data.too_long", "cut", "left_truncate"),
        ("data.epochs", -1, "at least 0"),
        ("data.buckets", (64, 32), "increasing widths that reach 128"),
        ("data.buckets", (64,), "increasing widths that reach 128"),
        ("rollout.buckets", (0, 96), "increasing widths that reach 96"),
        ("rollout.samples", 0, "at least 1"),
        ("rollout.max_new", 0, "at least 1"),
        ("rollout.temperature", 0.0, "above 0"),
        ("rollout.top_p", 1.5, "top_p"),
        ("kl.direction", "backward", "reverse"),
        ("rock.mode", "frozen", "static"),
        ("rock.inside", 2.0, "from 0 to 1"),
        ("rock.mode", "static", "the gated ids"),
        ("rock.ids_file", "rock.json", "static"),
        ("optim.lr", -1.0, "lr"),
        ("optim.name", "adam", "sgd"),
        ("train.steps", -1, "at least 0"),
        ("train.prompts", 0, "at least 1"),
        ("train.microbatches", 7, "a divisor of"),
        ("train.normaliser", "rows", "tokens"),
        ("eval.every", -1, "at least 0"),
        ("eval.prompts", 0, "at least 1"),
        ("eval.temperature", -0.5, "0: greedy"),
        ("eval.batch", -16, "at least 0"),
        ("log.samples", -1, "at least 0"),
        ("data.heldout", "", "eval.every is above 0"),
        ("checkpoint.keep", 0, "at least 1"),
        ("checkpoint.best", "loss", "kl_nats"),
        ("log.every", 0, "at least 1"),
    ],
)
def test_a_value_out_of_range_is_named(key, value, expected):
    with pytest.raises(ConfigError) as error:
        resolve(**{key.replace(".", "__"): value})
    message = str(error.value)
    assert expected in message
    assert key.rpartition(".")[2] in message
    assert "--config." in message


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("c.train = dict(steps='5')", "train.steps", "int"),
        ("c.data.shuffle = None", "data.shuffle", "bool"),
        ("c.optim = dict(lr=True)", "optim.lr", "float"),
        ("c.rollout = dict(buckets=4)", "rollout.buckets", "tuple"),
    ],
)
def test_a_value_of_another_type_in_the_file_is_named(tmp_path, line, key, expected):
    path = write(tmp_path, ["c.unlock()", line])
    with pytest.raises(ConfigError) as error:
        config.resolve(load(path=path))
    assert f"{key} is " in str(error.value)
    assert f"expected a {expected}" in str(error.value)
    assert f"--config.{key}" in str(error.value)


def test_a_best_checkpoint_needs_evaluations():
    with pytest.raises(ConfigError, match=r"checkpoint.best is 'accuracy': expected empty"):
        resolve(eval__every=0, checkpoint__best="accuracy")


@pytest.mark.parametrize("keys", [{}, {"train__steps": 9, "rock__until": 5}], ids=str)
def test_a_gate_whose_types_are_found_after_the_run_is_refused(keys):
    keys = {"rock__mode": "ema", "train__steps": 5} | keys
    with pytest.raises(ConfigError, match=r"rock.every is 5: expected below 5 \(the end"):
        resolve(**keys, rock__every=5)
    assert resolve(**keys, rock__every=4).rock.every == 4
    others = {"rock__mode": "random", "rock__share": 0.5, "rock__every": 5}  # it is not refreshed
    assert resolve(**keys | others).rock.every == 5


def test_a_gate_that_starts_after_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"rock.start is 5: expected below train.steps \(5\)"):
        resolve(rock__mode="ema", rock__start=5, train__steps=5)
    assert resolve(rock__mode="ema", rock__start=4, train__steps=5).rock.start == 4
    assert resolve(rock__start=5, train__steps=5).rock.start == 5
    assert resolve(rock__mode="ema", rock__start=5, train__steps=0).train.steps == 0


def test_ids_file_becomes_the_gated_ids(tmp_path):
    file = tmp_path / "ids.json"
    file.write_text("[5, 3]")
    assert resolve(rock__mode="static", rock__ids_file=str(file)).rock.ids == (5, 3)


@pytest.mark.parametrize("text", ['{"ids": [1]}', "[1, 2.5]", "[true]", "[1,", None])
def test_a_bad_ids_file_is_refused(tmp_path, text):
    file = tmp_path / "ids.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as error:
        resolve(rock__mode="static", rock__ids_file=str(file))
    assert str(file) in str(error.value)
    assert "expected a JSON list of token ids" in str(error.value)
    assert "--config.rock.ids_file" in str(error.value)


def test_parse_arg_gives_the_types_of_the_defaults():
    args = config.parse_arg("steps=3, fast,name=x,lr=1", steps=1, fast=False, name="", lr=0.1)
    assert args.to_dict() == {"steps": 3, "fast": True, "name": "x", "lr": 1.0}
    assert type(args.lr) is float
    assert config.parse_arg("", steps=1).steps == 1
    assert config.parse_arg("fast=false", fast=True).fast is False


@pytest.mark.parametrize(
    ("arg", "parts"),
    [
        ("step=3", ("'step'", "nearest known: 'steps'", "['fast', 'steps']")),
        ("steps=x", ("steps='x'", "expected a int", "such as 1")),
        ("steps", ("steps=''", "expected a int")),
        ("fast=2", ("fast='2'", "expected a bool")),
    ],
)
def test_parse_arg_refuses_what_it_does_not_know(arg, parts):
    with pytest.raises(ConfigError) as error:
        config.parse_arg(arg, steps=1, fast=False)
    for part in parts:
        assert part in str(error.value)


def test_path_of_finds_the_embedded_pair():
    assert (Path(config.path_of("embedded:teacher")) / "config.json").is_file()
    assert config.path_of("models/x") == "models/x"


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (["x = 1", "y = x / 0"], "in line 5, 'y = x / 0': ZeroDivisionError: division by zero"),
        (["raise SystemExit(3)"], "in line 4, 'raise SystemExit(3)': SystemExit: 3"),
        (["int('x')"], "ValueError: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_a_file_that_fails_shows_its_own_line(tmp_path, lines, shown):
    with pytest.raises(ConfigError) as error:
        load(path=write(tmp_path, lines))
    assert shown in str(error.value)
    assert "site-packages" not in str(error.value)
