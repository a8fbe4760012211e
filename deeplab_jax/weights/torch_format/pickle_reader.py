"""Reads the pickles in PyTorch's files as plain data, without executing anything.

Python's `pickle` imports the names in a file and calls them. Even with `find_class` closed, a memo
index of a few bytes allocates gigabytes, and a deeply nested tuple used as a key overflows the C
stack. So this module interprets the few instructions that a state dict needs, on plain values
only. `pickletools` decodes the instructions and documents them. A file gives a value or
`Unreadable`, at a cost linear in its size. Values that are not needed are `Opaque`: what a file
does with one (calls it, fills it, sets its state) is dropped.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable
from typing import IO, Any

# Instructions run and items copied before a file is refused. A state dict takes about 40 per array;
# ResNet-152 with its optimizer's state stays under 200 000.
MAX_STEPS = 4_000_000


class Unreadable(Exception):
    """The file is damaged or asks for something forbidden; the message continues "FILE ..."."""


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
    """Stands for a value that is not needed, and for its type, whose name it has."""

    name: str


class Machine:
    """The stack machine that runs a pickle's instructions.

    Args:
      find_global: Returns for a dotted name a function, which makes plain data of the arguments
        with which the file calls the name; or `Opaque`.
      load_persistent: Returns the object for a persistent id, which is any plain value.
    """

    def __init__(
        self, find_global: Callable[[str], Any], load_persistent: Callable[[Any], Any]
    ) -> None:
        self.find_global = find_global
        self.load_persistent = load_persistent
        self.stack: list[Any] = []
        self.outer_stacks: list[list[Any]] = []  # one per mark
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def run(self, file: IO[bytes]) -> Any:
        """Returns the value pickled at the file's position, and moves the position behind it.

        Raises:
          Unreadable: The pickle is damaged, too large, or uses an unsupported instruction.
        """
        instructions = pickletools.genops(file)
        while True:
            try:
                opcode, argument, position = next(instructions)
            except ValueError as error:
                reason = str(error)[:200]
                raise Unreadable(f"has a damaged or truncated pickle: {reason}") from error
            if opcode.name != "STOP" and opcode.name not in _INSTRUCTIONS:
                raise Unreadable(
                    f"uses the pickle instruction {opcode.name} at byte {position}, which no "
                    "state dict needs"
                )
            try:
                if opcode.name == "STOP":
                    return self.stack.pop()
                _INSTRUCTIONS[opcode.name](self, argument)
            # Wrong operands in a damaged file: an empty stack, an unknown memo index, arguments of
            # the wrong number or type.
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise Unreadable(
                    f"is damaged: the pickle makes no sense at byte {position}"
                ) from error
            self.charge(1)

    def charge(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise Unreadable(f"holds a pickle of more than {MAX_STEPS} steps: no state dict")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def pop_to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.outer_stacks.pop()
        return values

    def push_text(self, text: str) -> None:
        text.encode()  # raises ValueError for lone surrogates, which cannot be printed
        self.push(text)

    def push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError
        self.push(self.find_global(f"{module}.{name}"))

    def push_mark(self) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def push_frozenset(self) -> None:
        self.pop_to_mark()
        self.push(Opaque("frozenset"))

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def call(self, *keywords: Any) -> None:
        function, arguments = self.pop(2)
        if type(arguments) is not tuple or any(type(each) is not dict for each in keywords):
            raise TypeError
        if type(function) is Opaque:
            return self.push(function)
        if not callable(function) or keywords:
            raise TypeError
        # The arguments may be in the memo and be copied by every call.
        copied = (len(value) for value in arguments if type(value) in (list, dict))
        self.charge(len(arguments) + sum(copied))
        return self.push(function(*arguments))

    def extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(values)
        elif type(self.stack[-1]) is not Opaque:
            raise TypeError

    def set_items(self, pairs: list[Any]) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(self.stack[-1]) is not Opaque:
                assign(self.stack[-1], key, value)


def assign(target: dict[Any, Any], key: Any, value: Any) -> None:
    if type(target) is not dict or type(key) in (list, dict):
        raise TypeError
    # Hashing a deeply nested tuple overflows the C stack, so no keys are hashed but a state dict's.
    is_plain = type(key) in (str, int, float, bool, type(None), Opaque)
    target[key if is_plain else Opaque(type(key).__name__)] = value


# Protocol 2, which `torch.save` writes; Python 2's strings, found in files of 2017; and what
# `torch.save(..., pickle_protocol=4)` adds, such as bytes and sets.
_INSTRUCTIONS: dict[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    "NONE": Machine.push,  # its argument is None
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES"), Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), Machine.push_text),
    # `pickletools` decodes these as Latin-1; PyTorch reads UTF-8.
    **dict.fromkeys(
        ("BINSTRING", "SHORT_BINSTRING"), lambda m, text: m.push(text.encode("latin-1").decode())
    ),
    "MARK": lambda m, _: m.push_mark(),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop(3))),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "APPEND": lambda m, _: m.extend(m.pop(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "EMPTY_SET": lambda m, _: m.push(Opaque("set")),
    "ADDITEMS": lambda m, _: m.extend(m.pop_to_mark()),
    "FROZENSET": lambda m, _: m.push_frozenset(),
    "GLOBAL": lambda m, names: m.push_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.push_global(*m.pop(2)),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.call(),
    "NEWOBJ_EX": lambda m, _: m.call(*m.pop(1)),
    "BUILD": lambda m, _: m.push(m.pop(2)[0]),  # the state is dropped
    "BINPERSID": lambda m, _: m.push(m.load_persistent(m.pop(1)[0])),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Machine.memoize),
    "MEMOIZE": lambda m, _: m.memoize(len(m.memo)),
}
