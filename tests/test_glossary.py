"""The help on configuration keys: every key has a text, and it is that of the dataclasses."""

import dataclasses
import re
from pathlib import Path

import pytest

from opd_jax import cli, config, glossary, objective, rock
from opd_jax.run import launch
from opd_jax.spec import GROUPS, ConfigError


def test_every_key_that_can_be_set_has_a_text():
    known = glossary.keys()
    assert set(known) == set(config.flatten(config.defaults()))
    assert [name for name, key in known.items() if len(key.meaning) < 4] == []
    assert all(
        key.default == config.flatten(config.defaults())[name] for name, key in known.items()
    )


def test_texts_come_from_comments_docstrings_and_rules():
    known = glossary.keys()
    assert known["rollout.samples"].meaning == "answers per prompt"  # beside the field
    assert known["rock.top_k"].meaning == "number of types that may enter."  # Attributes:
    assert known["rock.fast_decay"].meaning == known["rock.decay"].meaning  # of both
    assert known["rock.mode"].expected == f"one of {', '.join(rock.MODES)}"
    assert known["train.normaliser"].expected == f"one of {', '.join(objective.NORMALISERS)}"
    assert known["rock.fast_decay"].expected == "above 0, up to rock.decay"  # whatever that is
    assert known["rock.share"].expected.startswith("a share from 0 to 1; above 0 where")  # 2 rules
    assert known["data.buckets"].type == "tuple[int, ...]"
    assert "name (str, 'adamw')\n      one of adamw, sgd, signsgd;" in glossary.text("optim.name")


def test_attributes_with_lines_and_lists():
    @dataclasses.dataclass
    class Spec:
        """One.

        Attributes:
          a, b: first
            and second: here.
          c: third.

        Raises:
          d: not a field.
        """

        a: int = 1
        b: int = 2
        c: int = 3  # beside it

    both = "first and second: here."
    assert glossary.meanings(Spec) == {"a": both, "b": both, "c": "beside it"}


def test_one_key_one_group_or_the_nearest():
    assert glossary.text("rock.top_k").count("\n") == 2  # group, key, meaning
    assert glossary.text("config.rock.top_k") == glossary.text("rock.top_k")
    assert set(GROUPS) <= {line.partition(":")[0] for line in glossary.text().split("\n")}
    assert "rollout." not in glossary.text("rock")
    with pytest.raises(ConfigError, match=r"no key 'rock.topk'.*such as rock.top_k"):
        glossary.text("rock.topk")


def test_the_commands_print_it(capsys):
    assert launch.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert [name for name in glossary.keys() if f"  {name} (" not in told] == []  # noqa: SIM118
    assert max(map(len, told.split("\n"))) <= 100
    assert cli.main(["help", "--config.train.steps"]) == 0
    assert "optimizer steps" in capsys.readouterr().out
    assert cli.main(["help", "nothing"]) == 2
    assert "no key 'nothing'" in capsys.readouterr().err


def test_the_page_is_current(capsys):
    """``opd-jax help --markdown > configs/README.md`` makes it so."""
    assert cli.main(["help", "--markdown"]) == 0
    told = capsys.readouterr().out
    assert told == (Path(__file__).parents[1] / "configs" / "README.md").read_text(encoding="utf-8")


def test_the_page_has_every_key_with_all_that_is_known():
    rows = {}
    for line in glossary.page().splitlines():
        if line.startswith("| `"):
            cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[cells[0].strip("`")] = cells[1:]
    assert set(rows) == set(glossary.keys())
    for name, (kind, default, meaning, values) in rows.items():
        key = glossary.keys()[name]
        assert (kind, default, values) == (f"`{key.type}`", f"`{key.default!r}`", key.expected)
        assert len(meaning) >= 4
