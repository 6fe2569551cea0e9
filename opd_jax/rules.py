"""Rules on the fields of a config group: one way to check them, and to say what to change."""

from __future__ import annotations

from typing import Any


class RuleError(ValueError):
    """A field of a config group cannot have its value; the message says what is expected."""

    def __init__(self, group: str, name: str, value: Any, expected: str):
        self._parts = (name, value, expected)
        super().__init__(self.of(group))

    def of(self, group: str) -> str:
        """The message, for a spec that serves several groups."""
        name, value, expected = self._parts
        key = f"{group}.{name}" if group else name
        return f"{key} is {value!r}: expected {expected}; set --config.{key}"


def check(spec: Any, group: str, *rules: tuple[str, bool, str]) -> None:
    """Check the fields of ``spec``, of the config group ``group``.

    Args:
      rules: (field, whether it is as it should be, what is expected) of each.

    Raises:
      RuleError: the first that is not.
    """
    for name, ok, expected in rules:
        if not ok:
            raise RuleError(group, name, getattr(spec, name), expected)


def widths(name: str, buckets: tuple[int, ...], limit: int) -> tuple[str, bool, str]:
    """The rule for the padded widths of something of at most ``limit`` ids; (): that one width."""
    is_sorted = list(buckets) == sorted({*buckets})
    is_enough = not buckets or (buckets[0] >= 1 and buckets[-1] >= limit)
    return name, is_sorted and is_enough, f"increasing widths that reach {limit}"
