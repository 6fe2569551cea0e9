"""Damaged JSON, drawn by hypothesis from a document that is good."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

DEEP: Any = 1
for _ in range(250):
    DEEP = [DEEP]
# What may stand where something else was expected.
WRONG = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        3,
        2**63,
        10**400,
        1.5,
        -1e308,
        "",
        "x",
        "../../etc/passwd",
        "\ud800",
        "é" * 3000,
        [],
        {},
        [1, "a", None],
        {"a": {"b": []}},
        DEEP,
    ]
)


def paths(value: Any, here: tuple = ()) -> list[tuple]:
    """Where every part of a document is."""
    found = [here]
    items: Any = ()
    if len(here) > 8:
        return found
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:5])
    for key, part in items:
        found += paths(part, (*here, key))
    return found


@st.composite
def documents(draw, good: Any) -> bytes:
    """A damaged text: parts removed, replaced or repeated, bytes cut off or changed."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(value)))
        if not path:
            value = copy.deepcopy(draw(WRONG))
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        act = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if act == "replace":
            owner[path[-1]] = copy.deepcopy(draw(WRONG))
        elif act == "remove":
            del owner[path[-1]]
        elif isinstance(owner, list):
            owner.append(owner[path[-1]])
    data = json.dumps(value).encode("utf-8", "surrogatepass")
    cut = draw(st.sampled_from(["whole", "whole", "whole", "cut", "byte", "garbage"]))
    if cut == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    elif cut == "byte" and data:
        place = draw(st.integers(0, len(data) - 1))
        data = data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
    elif cut == "garbage":
        data = draw(st.binary(max_size=200))
    return data
