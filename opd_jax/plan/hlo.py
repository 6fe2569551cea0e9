"""The text of a compiled program, as XLA prints it, read into operations and how often each runs.

It is the program of one device: shapes are its own parts. Loops are followed by their rounds, which
stand in the name of a loop that ends when rows do (:mod:`opd_jax.rounds`), and else in what the
compiler knows of it or in the constant that its counter is compared with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from opd_jax import rounds

_BITS = re.compile(r"(\d+)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_END = re.compile(r"^\}(, [\w=\"]+)*$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type: its bytes, and whether it lies in the device's main memory."""

    dims: tuple[int, ...]
    num_bytes: float
    in_memory: bool


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation."""

    name: str
    kind: str  # fusion, all-gather-start, ...
    shape: str
    operands: tuple[str, ...]
    rest: str  # attributes, as text
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """What it results in."""
        return arrays(self.shape)

    @property
    def called(self) -> list[str]:
        """Names of the computations it runs."""
        found = []
        for one, several in _CALLED.findall(self.rest):
            found += [one] if one else [n.strip().lstrip("%") for n in several.split(",")]
        return [name for name in found if name]

    def computation(self, role: str) -> str:
        """The computation in a role: ``body`` or ``condition``."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """Scopes and primitive of the traced program that it comes from; empty where unknown."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, each a dict of operations by name."""

    computations: dict[str, dict[str, Operation]]
    entry: str

    def runs(self, scored_share: float = 1.0) -> Iterator[tuple[str, Operation, float, bool]]:
        """Every operation that runs by itself: where it stands, itself, how often, and whether
        inside of a loop that ends when rows do. What is fused is part of its fusion.

        Args:
          scored_share: of a batch's positions, see :mod:`opd_jax.rounds`.
        """
        yield from self._runs(self.entry, 1, False, scored_share)

    def _runs(self, where: str, times: float, in_open: bool, share: float):
        for op in self.computations.get(where, {}).values():
            if op.kind == "while":
                body, named = op.computation("body"), rounds.of(op.op_name, share)
                number = named if named is not None else self.counted(op)
                is_open = named is not None or in_open
                yield from self._runs(
                    body, times * (1 if number is None else number), is_open, share
                )
            elif op.kind in ("call", "conditional", "async-start"):
                for name in op.called:
                    yield from self._runs(name, times, in_open, share)
            else:
                yield where, op, times, in_open

    def counted(self, loop: Operation) -> int | None:
        """Rounds of a counted loop; None where its counter is not compared with a constant."""
        if known := _KNOWN.search(loop.rest):
            return int(known[1])
        found, left = set(), [loop.computation("condition")]
        while left:
            for op in self.computations.get(left.pop(), {}).values():
                left += op.called
                if op.kind == "constant" and op.shape.startswith("s32[]"):
                    found.add(int(op.operands[0]))
        return max(found) if len(found) == 1 else None

    def uncounted(self) -> int:
        """Loops whose rounds nothing tells, which are counted as one."""
        loops = [op for ops in self.computations.values() for op in ops.values()]
        return sum(
            op.kind == "while" and rounds.of(op.op_name) is None and self.counted(op) is None
            for op in loops
        )


def read(text: str) -> Program:
    """Read what ``compiled.as_text()`` gives.

    Raises:
      ValueError: there is no program in it.
    """
    computations: dict[str, dict[str, Operation]] = {}
    entry, inside = "", None
    for line in _lines(text):
        if head := _HEAD.match(line):
            inside = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif _END.match(line):
            inside = None
        elif inside is not None and (found := _LINE.match(line)):
            op = _operation(found[2], found[3], bool(found[1]))
            inside[op.name] = op
    if not entry:
        raise ValueError("the text holds no compiled program: expected what as_text() gives")
    return Program(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """Lines of the text; an operation that is printed over several, as kernels are, is one."""
    held: str | None = None
    for line in text.splitlines():
        begins = _LINE.match(line) or _END.match(line) or _HEAD.match(line)
        if held is not None and not begins:
            held += f" {line}"
            continue
        if held is not None:
            yield held
        held = line if _LINE.match(line) else None
        if held is None:
            yield line
    if held is not None:
        yield held


def _operation(name: str, text: str, is_root: bool) -> Operation:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    kind, inner = rest[:opens], rest[opens + 1 : closes]
    names = tuple(_NAME.findall(inner)) or tuple(x.strip() for x in inner.split(",") if x.strip())
    return Operation(name, kind, shape, names, rest[closes + 1 :], is_root)


def _closing(text: str, at: int) -> int:
    depth = 0
    for index in range(at, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text) - 1


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a type as XLA writes it; ``S(1)`` and the like are memories inside the chip."""
    found = []
    for kind, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
        bits = 8 if kind == "pred" else int((_BITS.search(kind) or ["", "0"])[1])
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(sizes, math.prod(sizes) * bits / 8, not space or space[1] == "0"))
    return tuple(found)
