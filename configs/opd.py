r"""The flagship: one student, one teacher, and every way to gate the objective, as an arm.

    opd-jax train --config=configs/demo.py --workdir=runs/demo
    opd-jax rocks --run=runs/demo --prompts=embedded:prompts/train.jsonl --k=10 --out=runs/rocks \
        --with=gradients
    opd-jax train --config=configs/opd.py:arm=rock,rocks=runs/rocks --workdir=runs/rock
    opd-jax sweep --config=configs/opd.py:rocks=runs/rocks --arms=full,rock,random_positions \
        --seeds=3 --workdir=runs/arms

Arguments:
  arm    a name of ``ARMS`` below
  base   whose models, prompts and sizes: demo, smollm2, or the path of another config file
  completions  what ``opd-jax generate`` wrote (or any file with completions), for all arms: those
         that train off-policy imitate them, the others answer their prompts
  rocks  what ``opd-jax rocks --out`` wrote: the arms with a list, and random_positions, read it;
         selected on other prompts than the held-out ones, which the arms are compared on
  steps  optimizer steps; 0: as in the base; the arm ramp follows this, not --config.train.steps
  lr     peak learning rate; 0: as in the base
  k      rocks of ema and adaptive; 0: as many as the list of rocks holds, without one 100
  norm   what the sum of losses is divided by: tokens, weight or per_sequence

To add an arm: give it a name and its settings in ``ARMS``; an arm that weighs positions needs a
mode in ``opd_jax/position.py`` first (its formula in ``_kept``, its line in the table of that
docstring; if it needs the batch measured, its name in ``MEASURED``). What it may differ in from the
others is ``_OF_AN_ARM`` in ``opd_jax/run/comparable.py``. Write down what you expect before you run
it: ``--config.prediction="..."`` for one run, or ``c.prediction`` in a file; the sweep prints it
beside the result. ``tests/test_configs.py`` has the list of all arms.

The arms and their controls follow the experiments asked for in the discussion of arXiv 2605.09253:
an arm that is better than ``full`` has to be better than its controls too.

Expected of the demo's pair, 100 steps, 3 seeds, 256 held-out problems: full 55.7 % and 0.258 nats,
rock 33.2 % and 0.630, random_types 57.8 % and 0.261, random_positions 56.1 % and 0.269 (LOG.md,
"the Rock Tokens of the embedded pair"). On two CPU cores one arm of one seed takes as long as its
base, for the demo two and a half to four minutes; rocks of 400 prompts took 87 seconds before it.
"""

import json
import runpy
from pathlib import Path

from opd_jax import config
from opd_jax.spec import ConfigError

# What each arm sets in the group ``rock``. ``list`` names the file LIST.json of gated ids, and
# ``share_of`` the list whose share of the tokens is gated at random. ``position`` is set in the
# group of that name; opd-jax sweep adds the control of such an arm. ``window_share`` and
# ``cut_share`` are parts of rollout.max_new. ``kl`` and ``train`` are set in those groups.
ARMS = {
    "full": {"mode": "off"},  # plain distillation, the baseline
    # The Rock Tokens, frozen; and by the token before the predicted one, as in the published code.
    "rock": {"mode": "static", "list": "rock"},
    "rock_input_key": {"mode": "static", "list": "rock", "key": "input"},
    # Controls: as many tokens of other types, as many positions of any type, all other types.
    "random_types": {"mode": "static", "list": "share_matched"},
    "random_positions": {"mode": "random", "share_of": "rock"},
    "complement": {"mode": "static", "list": "complement"},
    # As many types by one property alone: is it frequency, loss, or the gradient?
    "top_freq": {"mode": "static", "list": "top_freq"},
    "top_mean_kl": {"mode": "static", "list": "top_mean_kl"},
    "top_gradient_norm": {"mode": "static", "list": "top_gradient_norm"},
    "top_gradient_alignment": {"mode": "static", "list": "top_gradient_alignment"},
    # Weak controls, for they mask fewer tokens than the rocks: the published ones.
    "hungarian": {"mode": "static", "list": "hungarian"},
    "next_ranks": {"mode": "static", "list": "next_ranks"},
    # The rocks with less weight instead of none, and with weight that goes in half of the steps.
    "soft_0.3": {"mode": "static", "list": "rock", "inside": 0.3},
    "soft_0.5": {"mode": "static", "list": "rock", "inside": 0.5},
    "soft_0.7": {"mode": "static", "list": "rock", "inside": 0.7},
    "ramp": {"mode": "static", "list": "rock", "ramp_share": 0.5},
    # Rocks that the run itself finds; ``adaptive`` leaves its gradient to a type that still learns.
    "ema": {"mode": "ema"},
    "adaptive": {"mode": "adaptive"},
    # Weights by position (opd_jax/position.py has formulas and sources).
    "half_random": {"position": {"mode": "random", "keep": 0.5}},
    "random_window": {"position": {"mode": "random_window", "window_share": 0.25}},
    "first": {"position": {"mode": "first", "window_share": 0.25}},
    "last": {"position": {"mode": "last", "window_share": 0.25}},
    "entropy": {"position": {"mode": "entropy", "keep": 0.2}},
    "tip": {"position": {"mode": "tip", "keep": 0.5}},
    "lowest_logp": {"position": {"mode": "lowest_logp", "keep": 0.2}},
    "fire": {"position": {"mode": "fire"}},
    "selectkd": {"position": {"mode": "selectkd", "floor": 0.01}},
    "ta": {"position": {"mode": "ta", "keep": 0.05}},
    "iw": {"position": {"mode": "iw", "boost": 0.5}},
    "rock_window": {
        "mode": "static",
        "list": "rock",
        "position": {"mode": "rock_window", "window": 1},
    },
    # Direction of the KL x whose answers: full is reverse, on-policy. Off-policy arms need
    # completions=FILE, of which the others answer the prompts; imitation is the published first
    # stage (arXiv 2605.09253, app. B).
    "forward_on": {"kl": {"direction": "forward"}},
    "reverse_off": {"train": {"stage": "off_policy"}},
    "forward_off": {"train": {"stage": "off_policy"}, "kl": {"direction": "forward"}},
    "reverse_mixed": {"train": {"stage": "mixed"}},
    "imitation": {"train": {"stage": "off_policy"}, "kl": {"direction": "forward", "ce": 0.5}},
    # Answers that are sampled no further than where the first positions end: less sampling too.
    "cut": {"cut_share": 0.25},
}


def get_config(arg: str = ""):
    """Return the base's config with the arm's gate."""
    args = config.parse_arg(
        arg,
        arm="full",
        base="demo",
        rocks="",
        completions="",
        steps=0,
        lr=0.0,
        k=0,
        norm="tokens",
    )
    if args.arm not in ARMS:
        raise ConfigError(f"arm is {args.arm!r}: expected one of {', '.join(ARMS)}; set :arm=NAME")
    c = _base(args.base)
    c.train.steps = args.steps or c.train.steps
    c.optim.lr = args.lr or c.optim.lr
    c.train.normaliser = args.norm
    rock = dict(ARMS[args.arm])
    c.kl.update(rock.pop("kl", {}))
    c.train.update(rock.pop("train", {}))
    if c.train.stage != "on_policy" and not args.completions:
        raise ConfigError(
            f"arm {args.arm} without completions: expected a file of them, such as `opd-jax "
            f"generate --model={c.teacher.path} --prompts={c.data.prompts} --out=FILE` writes; set "
            ":completions=FILE"
        )
    c.data.prompts = args.completions or c.data.prompts
    if name := rock.pop("list", ""):
        rock["ids_file"] = str(_made(args, c.data, f"{name}.json"))
    if name := rock.pop("share_of", ""):
        rock["share"] = _read(_made(args, c.data, "lists.json"))[name]["token_share"]
    if share := rock.pop("ramp_share", 0):
        rock["ramp"] = max(round(share * c.train.steps), 1)
    if rock.get("mode") in ("ema", "adaptive"):
        listed = _read(_made(args, c.data, "rock.json")) if args.rocks and not args.k else ()
        rock["top_k"] = args.k or len(listed) or 100
    cut = rock.pop("cut_share", 0.0)
    place = dict(rock.pop("position", {}))
    if share := place.pop("window_share", 0.0):
        place["window"] = max(round(share * c.rollout.max_new), 1)
    if cut:  # graded on whole answers all the same
        c.eval.max_new = c.rollout.max_new
        c.rollout.max_new = max(round(cut * c.rollout.max_new), 1)
    c.position.update(place)
    c.rock.update(rock)
    return c


def _base(name: str):
    """The config of a file beside this one, or of any other."""
    beside = Path(__file__).parent / f"{name}.py"
    path = beside if beside.is_file() else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"base is {name!r}: expected demo, smollm2 or the path of a config file; set :base=NAME"
        )
    return runpy.run_path(str(path))["get_config"]()


def _made(args, data, name: str) -> Path:
    """A file that ``opd-jax rocks`` left in its folder of lists."""
    command = f"opd-jax rocks --run=RUN --prompts={data.prompts} --out=DIR"
    if name.startswith("top_gradient"):
        command += " --with=gradients"
    if not args.rocks:
        raise ConfigError(
            f"arm {args.arm} without rocks: expected the folder that `{command}` wrote; "
            "set :rocks=DIR"
        )
    path = Path(args.rocks) / "lists" / name
    if not path.is_file():
        raise ConfigError(
            f"arm {args.arm}: {path} does not exist; expected what "
            f"`{command.replace('DIR', args.rocks)}` writes; run it, or set :rocks=DIR"
        )
    about = Path(args.rocks) / "rocks.json"
    used = _read(about).get("prompts", "") if about.is_file() else ""
    if used and _same_file(used, data.heldout):
        raise ConfigError(
            f"arm {args.arm}: {args.rocks} was selected on {used}, the held-out prompts that arms "
            f"are compared on; expected others, or selection leaks into evaluation; run `{command}`"
            " and set :rocks=DIR"
        )
    return path


def _same_file(one: str, other: str) -> bool:
    return Path(config.path_of(one)).resolve() == Path(config.path_of(other)).resolve()


def _read(path: Path):
    """JSON that ``opd-jax rocks`` wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON ({error}): expected what opd-jax rocks wrote; run it again"
        ) from error
