"""Configuration: an ml_collections file becomes one frozen, checked ``RunConfig``.

A config file defines ``get_config(arg="")`` and starts from :func:`defaults`; what can be set is
written in ``spec``. Beyond :func:`resolve` nothing sees a ``ConfigDict``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import math
import re
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
from absl import flags
from ml_collections import ConfigDict, config_flags

from opd_jax import between, records, rules
from opd_jax.files import path_of as path_of  # config files ask here
from opd_jax.spec import GROUPS, ConfigError, RunConfig

_MAX_CONFIG = 1 << 20  # bytes of a config file
_Ids = list[pydantic.StrictInt]
_TOP = ("profile", "prediction", "init_from", "init_keep")  # text that belongs to no group
# Fields that follow from others and are therefore not set by hand.
_DERIVED = {("kl", "vocab_size"), ("kl", "stop_ids"), ("kl", "beside"), ("rock", "never")}
_DERIVED |= {("optim", "steps")}
# Fields of (name, value) pairs; on the command line each name may be set as a key of its own.
_PAIRS = ("data.template", "data.columns", "teacher.paths")


def defaults() -> ConfigDict:
    """All groups with their default values; ``rock.ids_file`` may name a JSON list of ids."""
    groups = {
        name: {f.name: f.default for f in dataclasses.fields(cls) if (name, f.name) not in _DERIVED}
        for name, cls in GROUPS.items()
    }
    groups["rock"]["ids_file"] = ""
    return ConfigDict({"seed": 0, **dict.fromkeys(_TOP, ""), **groups})


def parse_arg(arg: str, **allowed: Any) -> ConfigDict:
    """Parse a config file's argument ``key=value,flag``; values take the type of their default.

    Raises:
      ConfigError: an unknown key (with the nearest known one), or a value of another type.
    """
    values = dict(allowed)
    for part in filter(None, (p.strip() for p in arg.split(","))):
        name, _, text = part.partition("=")
        if name not in allowed:
            raise ConfigError(
                f"config argument {name!r} is not known{_nearest(name, allowed)}; expected one of "
                f"{sorted(allowed)}; write FILE:{'key=value' if allowed else ''}"
            )
        default = allowed[name]
        try:
            if isinstance(default, bool):
                values[name] = {"": True, "true": True, "false": False}[text.lower()]
            elif isinstance(default, str):
                values[name] = text
            else:
                values[name] = type(default)(text)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"config argument {name}={text!r}: expected a {type(default).__name__} such as "
                f"{default!r}"
            ) from error
    return ConfigDict(values)


def load(argv: Sequence[str], **flag_values: str | None) -> tuple[ConfigDict, dict[str, Any]]:
    """Read ``--config=FILE[:arg]`` with its ``--config.a.b=value`` overrides from a command line.

    Args:
      argv: the arguments after the command.
      flag_values: further string flags and their defaults.

    Raises:
      ConfigError: an unknown key, flag or value, or a config file that does not load.
    """
    named, rest = _config_flag(argv)
    rest, pairs = _pair_flags(rest)
    config = _from_file(named)
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=True, sys_argv=["opd-jax", *rest]
        )
        for name, default in flag_values.items():
            flags.DEFINE_string(name, default, "", flag_values=values)
        left = values(["opd-jax", *rest])
        for key, name, value in pairs:
            given = flatten(config).get(key, ())
            check_type(key, given)
            kept = [pair for pair in given if pair[0] != name]
            config.update_from_flattened_dict({key: (*kept, (name, value))})
    except (AttributeError, KeyError) as error:
        raise ConfigError(_unknown_key(rest, error)) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(f"{error}; see opd-jax train --help") from error
    if left[1:]:
        raise ConfigError(f"unexpected arguments {left[1:]}: expected flags --name=value")
    return config, {name: values[name].value for name in flag_values}


def _config_flag(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of ``--config``, and the other arguments."""
    named, rest, items = "", [], list(argv)
    while items:
        item = items.pop(0)
        name, equals, value = item.lstrip("-").partition("=")
        if item.startswith("-") and name == "config":
            named = value if equals else (items.pop(0) if items else "")
        else:
            rest.append(item)
    if not named:
        raise ConfigError("no --config given: expected --config=FILE[:arg], e.g. configs/demo.py")
    return named, rest


def _pair_flags(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str, Any]]]:
    """The other arguments, and (key, name, value) of each ``--config.data.template.NAME=VALUE``."""
    rest, pairs, items = [], [], list(argv)
    while items:
        item = items.pop(0)
        flag, equals, text = item.lstrip("-").partition("=")
        key = next((k for k in _PAIRS if flag.startswith(f"config.{k}.")), None)
        if key is None or not item.startswith("-"):
            rest.append(item)
            continue
        if not equals and items and not items[0].startswith("-"):
            text, equals = items.pop(0), "="
        name = flag.removeprefix(f"config.{key}.")
        if not (name and equals):
            raise ConfigError(f"{item} has no value: expected --config.{key}.NAME=VALUE; give one")
        pairs.append((key, name, _value(text) if key == "data.template" else text))
    return rest, pairs


def _value(text: str) -> Any:
    """A boolean, a number, None or a quoted text as Python or JSON spells it; else the text."""
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, int | float | str) else text


def _from_file(named: str) -> ConfigDict:
    """Run ``get_config`` of a config file: ``FILE`` or ``FILE:arg``.

    Raises:
      ConfigError: there is no such file, or it fails; shows the line of the file that did.
    """
    name, colon, arg = named.partition(":")
    path = path_of(name)
    expected = "expected a Python file with get_config(arg), e.g. configs/demo.py"
    try:
        records.regular(Path(path), _MAX_CONFIG)
        source = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"config file {name!r} does not exist: {expected}; change --config"
        ) from error
    except (OSError, records.RecordError) as error:
        raise ConfigError(f"config file {name!r} cannot be read ({error}): {expected}") from error
    module = types.ModuleType("config_file")
    module.__file__ = path
    try:
        exec(compile(source, path, "exec"), module.__dict__)
        get_config = module.get_config
        found = get_config(arg) if colon else get_config()
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(
            f"config file {name!r} is not Python: line {error.lineno}: "
            f"{(error.text or '').strip()!r}: {error.msg}: {expected}; mend it"
        ) from error
    except AttributeError as error:
        if not hasattr(module, "get_config"):
            raise ConfigError(
                f"config file {name!r} has no get_config: {expected}; add one"
            ) from error
        raise ConfigError(_failed(name, path, error)) from error
    except (Exception, SystemExit) as error:  # a config file may raise anything
        raise ConfigError(_failed(name, path, error)) from error
    if not isinstance(found, ConfigDict):
        raise ConfigError(
            f"config file {name!r} returned a {type(found).__name__}: expected what "
            "opd_jax.config.defaults() gives, with changed values; return that"
        )
    return found


def _failed(name: str, path: str, error: BaseException) -> str:
    """A failed config file in words: its own line, not ours."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    where = ""
    if own:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        number = own[-1].lineno or 1
        where = f" in line {number}, {lines[number - 1].strip()!r}"
    message = " ".join(str(error).split())[:300]
    known = flatten(defaults())
    key = re.search(r'"(\w+)"', message)
    near = _nearest(key[1], {k.rpartition(".")[2]: 0 for k in known}) if key else ""
    return (
        f"config file {name!r} failed{where}: {type(error).__name__}: {message}{near}: expected it "
        "to return a config; mend it"
    )


def _unknown_key(argv: Sequence[str], error: Exception) -> str:
    known = flatten(defaults())
    groups = {*GROUPS, *known}
    for item in argv:
        key = item.lstrip("-").partition("=")[0]
        if key.startswith("config.") and key[7:] not in groups:
            return (
                f"unknown config key {key[7:]!r}{_nearest(key[7:], known)}; expected a key of the "
                f"config file; change --{key}"
            )
    return f"a flag failed: {type(error).__name__}: {error}; see opd-jax train --help"


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f" (nearest known: {found[0]!r})" if found else ""


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A flat dict with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def describe(run: RunConfig) -> dict[str, Any]:
    """The resolved run as a flat dict with dotted keys, for ``run.json``."""
    return flatten(dataclasses.asdict(run))


def resolve(config: ConfigDict) -> RunConfig:
    """Check every group and every rule between groups.

    Raises:
      ConfigError: an unknown or missing key, a value of the wrong type or out of range.
    """
    given = config.to_dict()
    known = flatten(defaults())
    unknown = [k for k in flatten(given) if k not in known]
    if unknown:
        raise ConfigError(
            f"unknown config key {unknown[0]!r}{_nearest(unknown[0], known)}; remove it from the "
            "config file, or correct it"
        )
    merged = {k: v for k, v in known.items()} | flatten(given)
    for key in known:
        check_type(key, merged[key])
        _check_range(key, merged[key])
    groups = {name: {} for name in GROUPS}
    for key, value in merged.items():
        group, _, name = key.partition(".")
        if name:
            groups[group][name] = _frozen(value)
    ids_file = groups["rock"].pop("ids_file")
    if ids_file:
        if groups["rock"]["mode"] != "static":
            raise ConfigError(
                f"rock.ids_file is {ids_file!r} and rock.mode {groups['rock']['mode']!r}: expected "
                "static, the mode that gates given ids; set --config.rock.mode=static, or "
                "--config.rock.ids_file=''"
            )
        groups["rock"]["ids"] = _read_ids(ids_file)
    groups["optim"]["steps"] = max(groups["train"]["steps"], 1)
    made = {name: _made(name, cls, groups[name]) for name, cls in GROUPS.items()}
    run = RunConfig(seed=merged["seed"], **{name: merged[name] for name in _TOP}, **made)
    between.check(run)
    return run


def _made(group: str, cls: type, values: Mapping[str, Any]) -> Any:
    try:
        return cls(**values)
    except rules.RuleError as error:
        raise ConfigError(error.of(group)) from error


@functools.cache
def recorded() -> dict[str, tuple[Any, Any]]:
    """Every key that ``run.json`` has, with its type and its default."""
    found = {"seed": (int, 0), **{name: (str, "") for name in _TOP}}
    for group, cls in GROUPS.items():
        hints = typing.get_type_hints(cls)
        found |= {f"{group}.{f.name}": (hints[f.name], f.default) for f in dataclasses.fields(cls)}
    return found


def check_type(key: str, value: Any) -> None:
    """Check the type of one value; lists will do for tuples.

    Raises:
      ConfigError: it is of another type, or something inside it is.
    """
    kind, default = recorded().get(key, (str, ""))
    try:
        records.check(_frozen(value), kind, where=key, change="")
    except records.RecordError as error:
        name = "tuple" if isinstance(default, tuple) else type(default).__name__
        inside = str(error).partition(" is damaged: ")[2].partition(";")[0]
        more = f" ({inside})" if inside.startswith("field") else ""
        raise ConfigError(
            f"{key} is {value!r}{more}: expected a {name} such as {_example(key, default)}; set "
            f"--config.{key}"
        ) from error


def _check_range(key: str, value: Any) -> None:
    """What no key may be: numbers that the devices have no room for, or that are none."""
    if isinstance(value, int) and not isinstance(value, bool) and key != "seed":
        ok, expected = -(2**31) <= value < 2**31, "a number of at most 2^31 - 1"
    elif isinstance(value, float):
        ok, expected = math.isfinite(value), "a finite number"
    else:
        return
    if not ok:
        raise ConfigError(f"{key} is {value!r}: expected {expected}; set --config.{key}")


def _example(key: str, default: Any) -> str:
    examples = {
        "rollout.bias": "((5, -2.0),), pairs of id and bias",
        "data.template": "(('enable_thinking', False),), pairs of name and value",
        "data.columns": "(('prompt', 'question'),), pairs of our name and the file's",
        "teacher.paths": "(('math', 'FOLDER'),), pairs of a name and a model",
    }
    return examples.get(key) or repr(default or (64, 128) if key.endswith("buckets") else default)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, tuple | list) else value


def _read_ids(path: str) -> tuple[int, ...]:
    change = "set --config.rock.ids_file"
    try:
        ids = records.read(Path(path_of(path)), _Ids, change=change)
    except (OSError, records.RecordError) as error:
        raise ConfigError(
            f"rock.ids_file {path}: found {error}; expected a JSON list of token ids; {change}"
        ) from error
    return tuple(ids)
