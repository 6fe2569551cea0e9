"""What a compiled program moves: through a device's memory, and between devices by collectives."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from opd_jax import rounds
from opd_jax.plan.hlo import Operation, Program

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What gives an array another name, and moves nothing.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "iota",
}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?)\))?"
    r"\s*\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind, axis and size.

    Attributes:
      kind: as XLA names it.
      axes: of the mesh that it runs over, joined by ``+``; ``?`` where they are no axes.
      num_bytes: of a device's larger side, each time.
      count: how often it runs.
      moved: bytes that a device sends, all together, by a ring.
      in_open: inside of a loop that ends when rows do, such as that over tokens.
    """

    kind: str
    axes: str
    num_bytes: float
    count: int
    moved: float
    in_open: bool = False


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one device: bytes through its memory, cycles as its compiler estimates them (0: none),
    how often a kernel runs of whose cycles it says nothing, and the bytes of those kernels."""

    num_bytes: float
    cycles: float
    silent: int = 0
    silent_bytes: float = 0.0


def traffic(runs: Iterable[tuple[str, Operation, float, bool]], program: Program) -> Traffic:
    """Add up the operations of :meth:`Program.runs`.

    An operand that is only sliced counts by its slices and a buffer that is updated in place by the
    update; what a kernel is given by the share that its scopes tell (:mod:`opd_jax.rounds`). What
    stays in memories inside the chip counts nothing.
    """
    num_bytes, cycles, silent, silent_bytes = 0.0, 0.0, 0, 0.0
    for where, op, times, _ in runs:
        moved = times * _bytes(program, where, op)
        num_bytes += moved
        if found := _CYCLES.search(op.rest):
            cycles += times * int(found[1])
        elif op.kind == "custom-call" and "tpu_custom_call" in op.rest:
            silent += times
            silent_bytes += moved
    return Traffic(num_bytes, cycles, round(silent), silent_bytes)


def _bytes(program: Program, where: str, op: Operation) -> float:
    if op.kind in _FREE or op.kind.endswith(("-done", "-update")):
        return 0.0
    known = program.computations[where]
    operands = [known[name] for name in op.operands if name in known]
    if op.kind == "fusion" and op.called:
        return _fused(program, op, operands)
    if op.kind in ("dynamic-slice", "slice", "gather"):
        return 2 * _in_memory(op.arrays)
    if op.kind in ("slice-start", "dynamic-slice-start"):  # ((operands), result, context)
        result = op.arrays[1]
        return bool(_in_memory(operands[0].arrays)) * result.num_bytes + _in_memory([result])
    if op.kind == "dynamic-update-slice":
        return 2 * _in_memory(operands[1].arrays)
    results = op.arrays[:1] if op.kind.endswith("-start") else op.arrays
    whole = _in_memory(results) + sum(_in_memory(operand.arrays) for operand in operands)
    return whole * (rounds.share(op.op_name) if op.kind == "custom-call" else 1.0)


def _in_memory(arrays) -> float:
    return sum(array.num_bytes for array in arrays if array.in_memory)


def _fused(program: Program, op: Operation, operands: Sequence[Operation]) -> float:
    """Bytes of a fusion: of each parameter what is read, of each result what is written."""
    inside = program.computations[op.called[0]]
    total = 0.0
    for index, (size, is_given_on) in _read(program, inside).items():
        if index < len(operands) and (whole := _in_memory(operands[index].arrays)):
            total += whole if is_given_on else size
    updates = [each for each in inside.values() if each.kind == "dynamic-update-slice"]
    in_place = {each.arrays[0].dims: each for each in updates}
    for array in op.arrays:
        if not array.in_memory:
            continue
        update = in_place.get(array.dims)
        size = inside[update.operands[1]].arrays[0].num_bytes if update else array.num_bytes
        total += size
    return total


def _read(program: Program, inside: dict[str, Operation]) -> dict[int, tuple[float, bool]]:
    """Bytes that a fusion reads of each of its parameters, by a fusion in the fusion as well.

    And whether it gives the parameter on as it is, under another name, to who reads it then.
    """
    users: dict[str, list[Operation]] = {}
    for each in inside.values():
        for name in each.operands:
            users.setdefault(name, []).append(each)

    def read(parameter: Operation) -> tuple[float, bool]:
        whole = sum(array.num_bytes for array in parameter.arrays)
        total, left, is_given_on = 0.0, [parameter.name], False
        while left:
            name = left.pop()
            is_given_on |= inside[name].is_root
            for user in users.get(name, []):
                if user.kind == "bitcast":
                    left.append(user.name)
                elif user.kind in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                    total += sum(array.num_bytes for array in user.arrays)
                elif user.kind == "dynamic-update-slice" and user.operands[0] == name:
                    continue  # written in place
                elif user.kind == "fusion" and user.called:
                    within = _read(program, program.computations[user.called[0]])
                    for index, given in enumerate(user.operands):
                        if given == name:
                            total += within[index][0]
                            left += [user.name] * within[index][1]
                else:
                    return whole, is_given_on
        return min(total, whole), is_given_on

    parameters = (each for each in inside.values() if each.kind == "parameter")
    return {int(each.operands[0]): read(each) for each in parameters}


def collectives(
    runs: Iterable[tuple[str, Operation, float, bool]], program: Program, mesh: Any
) -> list[Collective]:
    """The collectives of :meth:`Program.runs`, those of one kind added up, largest share first.

    Those that a TPU overlaps with a product stand in its fusion, and in several where it is spread
    over them: within a computation a channel counts once.
    """
    seen: set[tuple[str, str]] = set()
    sums: dict[tuple[str, str, float, bool], list[float]] = {}
    shape = dict(mesh.shape)
    for where, op, times, in_open in runs:
        inside = [op]
        if op.kind == "fusion":
            inside = [
                each for name in op.called for each in program.computations.get(name, {}).values()
            ]
        for each in inside:
            kind = each.kind.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = _CHANNEL.search(each.rest)
            key = (where, channel[1] if channel else each.name)
            if key in seen:
                continue
            seen.add(key)
            axes, size = axes_of(each.rest, shape)
            if size == 1:
                continue
            num_bytes = _payload(each, kind, size)
            entry = sums.setdefault((kind, axes, num_bytes, in_open), [0, 0.0])
            entry[0] += times
            entry[1] += times * num_bytes * _sent(kind, size)
    found = [
        Collective(kind, axes, num_bytes, int(count), moved, in_open)
        for (kind, axes, num_bytes, in_open), (count, moved) in sums.items()
    ]
    return sorted(found, key=lambda each: -each.moved)


def _payload(op: Operation, kind: str, size: int) -> float:
    """Bytes of the larger side: what a gather makes, and what the others take."""
    total = sum(array.num_bytes for array in op.arrays if array.dims or len(op.arrays) == 1)
    if op.kind == "all-gather-start":  # its operands, which are a part of the size, stand before
        return total * size / (size + 1)
    if op.kind == "collective-permute-start":
        return total / 2
    return total * (size if kind == "reduce-scatter" else 1)


def _sent(kind: str, size: int) -> float:
    """Share of the payload that each of ``size`` devices sends in a ring."""
    part = (size - 1) / size
    return {"all-reduce": 2 * part, "collective-permute": 1.0}.get(kind, part)


def axes_of(attributes: str, shape: dict[str, int]) -> tuple[str, int]:
    """The mesh axes that the groups of a collective run over, and the devices of a group.

    Args:
      attributes: of the operation, as XLA writes them.
      shape: sizes of the mesh by axis; devices are numbered through it in order.
    """
    number = int(np.prod(list(shape.values())))
    ids = np.arange(number).reshape(tuple(shape.values()))
    if pairs := _PAIRS.search(attributes):
        ends = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\d+,\d+", pairs[1])]
        moved = {
            axis
            for source, target in ends
            for axis, a, b in zip(
                shape,
                np.unravel_index(source, ids.shape),
                np.unravel_index(target, ids.shape),
                strict=True,
            )
            if a != b
        }
        return "+".join(axis for axis in shape if axis in moved) or "?", 2 if moved else 1
    groups = _groups(attributes, number)
    size = len(next(iter(groups))) if groups else number
    names = [axis for axis, length in shape.items() if length > 1]
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            places = [list(shape).index(axis) for axis in chosen]
            last = np.moveaxis(ids, places, range(-count, 0))
            rows = last.reshape(-1, int(np.prod([shape[axis] for axis in chosen])))
            if {frozenset(map(int, row)) for row in rows} == groups:
                return "+".join(chosen), size
    return "?", size


def _groups(attributes: str, number: int) -> set[frozenset[int]]:
    """The groups of devices; all devices where none are named."""
    if found := _IOTA.search(attributes):
        dims, source = (tuple(map(int, found[i].split(","))) for i in (1, 2))
        table = np.arange(number).reshape(source)
        if found[3]:
            table = table.transpose(tuple(map(int, found[3].split(","))))
        return {frozenset(map(int, row)) for row in table.reshape(dims)}
    if found := _NAMED.search(attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        table = np.arange(number)
        if found[2]:
            table = table.reshape(tuple(map(int, found[2].split(","))))
            if found[3]:
                table = table.transpose(tuple(map(int, found[3].split(","))))
        table = table.reshape(tuple(map(int, sizes.values())))
        chosen = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", found[4])]
        rows = np.moveaxis(table, chosen, range(-len(chosen), 0))
        width = int(np.prod([table.shape[i] for i in chosen]))
        return {frozenset(map(int, row)) for row in rows.reshape(-1, width)}
    if found := _LISTED.search(attributes):
        rows = re.findall(r"\{([\d,]+)\}", found[1])
        groups = {frozenset(map(int, row.split(","))) for row in rows}
        return groups or {frozenset(range(number))}
    return {frozenset(range(number))}
