"""Collective operations of a compiled program, parsed from its HLO text."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all"),
    *("ragged-all-to-all", "collective-broadcast"),
)

_Key = tuple[str, int, bool]  # kind, group size, whether between slices

_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c64|c128)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collective operations of one kind among groups of one size."""

    kind: str  # one of `KINDS`
    group_size: int  # number of devices in a group; 2 for collective-permute
    count: int  # executions in a step
    # Total of all executions: the size of the unsharded array that is reduced, gathered, scattered
    # or sent, for one device.
    bytes: int
    # Whether it uses the data centre's network and connects the corresponding devices of all
    # slices. XLA splits an operation that spans slices into one of these and others within each.
    between_slices: bool = False

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends with ring algorithms, which is the minimum.

        With n devices and b bytes: collective-permute and broadcast b; all-reduce 2 (n - 1) / n b,
        which is a reduce-scatter and an all-gather; the others (n - 1) / n b.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        times = 2 if self.kind == "all-reduce" else 1
        return times * (self.group_size - 1) / self.group_size * self.bytes


def find_collectives(
    hlo: str, num_devices: int, num_slices: int = 1
) -> tuple[tuple[Collective, ...], int]:
    """Adds up the collective operations of a program; those in a loop count once per iteration.

    The TPU compiler overlaps a collective with several other operations and then repeats it in
    each of their fusions: operations of the same channel count as one. `hlo` is the text of the
    compiled module, whose devices form a number of slices.

    Returns:
      One entry per kind and group size, most bytes first; and the number of loops with collectives
      and an unknown trip count, whose operations count once.
    """
    computations, entry = _computations(hlo)
    unknown: set[str] = set()
    seen: set[tuple[str, str]] = set()

    @functools.cache
    def operations(name: str) -> Counter[tuple[_Key, int]]:
        """Counts the operations, by kind and bytes, of a computation and of those it calls."""
        found: Counter[tuple[_Key, int]] = Counter()
        for opcode, result, rest in _instructions(computations.get(name, ())):
            one = _collective(opcode, result, rest, name, num_devices, num_slices)
            if one is not None:
                channel = re.search(r"channel_id=\d+", rest)
                if channel is None or (opcode, channel[0]) not in seen:
                    found[one] += 1
                if channel is not None:
                    seen.add((opcode, channel[0]))
                continue
            inner = sum(map(operations, _called(rest)), Counter[tuple[_Key, int]]())
            iterations = _trip_count(rest, computations) if opcode == "while" and inner else 1
            if iterations is None:
                unknown.add(rest)
            for one, count in inner.items():
                found[one] += count * (iterations or 1)
        return found

    counts, sizes = Counter[_Key](), Counter[_Key]()
    for (key, num_bytes), count in operations(entry).items():
        counts[key] += count
        sizes[key] += count * num_bytes
    collectives = (
        Collective(kind, group_size, counts[kind, group_size, between], total, between)
        for (kind, group_size, between), total in sizes.most_common()
    )
    return tuple(collectives), len(unknown)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by its name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return computations, entry


def _instructions(lines: Iterable[str]) -> Iterable[tuple[str, str, str]]:
    """Yields opcode, result shape, and operands with attributes of each instruction."""
    for line in lines:
        _, equals, text = line.partition(" = ")
        opcode = re.search(r"(?<=[)}\]]) ([a-z][a-z0-9\-]*)\(", text) if equals else None
        if opcode is not None:
            yield opcode[1], text[: opcode.start()], text[opcode.end() :]


def _collective(
    opcode: str, result: str, rest: str, computation: str, num_devices: int, num_slices: int
) -> tuple[_Key, int] | None:
    """Returns kind and bytes of an instruction that is, or starts, a collective operation."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', rest)
    if opcode == "send" and transfer:
        kind = transfer[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
        parts = num_slices if kind == "all-gather" else 1
        return (kind, num_slices, True), array_bytes(result)[0] * parts
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    group_size = 2 if kind == "collective-permute" else _group_size(rest, num_devices)
    sizes = array_bytes(result)
    if opcode.endswith("-start") and kind != "all-reduce":
        # The shape lists operands, then results, then possibly two counters.
        sizes = array_bytes(re.sub(r"(, u32\[\](\{[^{}]*\})?){2}\)$", ")", result))
        sizes = sizes[len(sizes) // 2 :]
    parts = group_size if kind == "reduce-scatter" else 1
    # A fusion that the TPU runs as a reduce-scatter holds an all-reduce and a slice of its result.
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return (kind, group_size, False), sum(sizes) * parts


def _called(rest: str) -> Iterable[str]:
    """Yields the names of computations that an instruction calls, including a loop's condition."""
    yield from re.findall(
        r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", rest
    )
    for names in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", rest):
        yield from re.findall(r"%?([\w.\-]+)", names)


def _trip_count(rest: str, computations: dict[str, list[str]]) -> int | None:
    """Returns a loop's iterations from its annotation or from the upper bound of its counter."""
    annotated = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    if annotated:
        return int(annotated[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [match[1] for line in lines if (match := re.search(r" constant\((\d+)\)", line))]
    is_upper = any("direction=LT" in line for line in lines)
    return int(bounds[0]) if len(bounds) == 1 and is_upper else None


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array of a shape such as `(f32[8,3]{1,0}, u8[])`."""
    sizes = []
    for dtype, dims in _SHAPE.findall(shape):
        bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
        sizes.append(-(-bits * math.prod(int(side) for side in dims.split(",") if side) // 8))
    return sizes


def _group_size(rest: str, num_devices: int) -> int:
    """Returns the devices of a group, in any of HLO's notations for replica groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sides = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sides[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return num_devices
