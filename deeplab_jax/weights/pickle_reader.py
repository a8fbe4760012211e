"""Reads the pickles inside PyTorch's files as data: plain containers, and nothing is executed.

Python's own `pickle` imports what a file names and calls it. Even with `find_class` closed it
leaves doors open: a memo index of a few bytes allocates gigabytes, a deeply nested tuple used as
a key overflows the C stack. So the few instructions that a state dict needs are interpreted here,
over plain values alone; a file gives an object or `Unreadable`, at a cost linear in its size.

The instructions are described in the standard library's `pickletools`.
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
from collections.abc import Callable
from typing import Any

# Instructions run and items copied before a file is taken for a trap. A state dict takes about 40
# an array; ResNet-152 with its optimizer's state stays under 200 000.
MAX_STEPS = 4_000_000
_MAX_NAME = 1024  # bytes of a global's module or attribute


class Unreadable(Exception):
    """The file is damaged, or asks for what it may not have; the message says which."""


@dataclasses.dataclass(frozen=True)
class Global:
    """What a name such as `torch.FloatStorage` stands for while a file is read.

    Attributes:
      name: module and attribute, joined by a dot.
      call: makes plain data of the arguments that the file calls it with; None: not callable.
    """

    name: str
    call: Callable[..., Any] | None = None


class Opaque:
    """Stands for a value that is known to be harmless and of no use to us; its state is dropped."""


class Machine:
    """The stack machine that a pickle is written for.

    Args:
      data: holds the pickle; bytes after its end are left alone.
      position: of its first byte.
      find_global: gives the meaning of a dotted name, or raises `Unreadable`.
      load_persistent: gives the object of a persistent id, which is any plain value.
      attributed: types, beside dictionaries, that may carry attributes; these are dropped.
    """

    def __init__(
        self,
        data: memoryview,
        position: int,
        find_global: Callable[[str], Global],
        load_persistent: Callable[[Any], Any],
        attributed: tuple[type, ...] = (),
    ) -> None:
        self.data = data
        self.position = position
        self.find_global = find_global
        self.load_persistent = load_persistent
        self.attributed = (dict, Opaque, *attributed)
        self.stack: list[Any] = []
        self.outer_stacks: list[list[Any]] = []  # one a mark
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def run(self) -> Any:
        """The pickled value; `position` is left behind its last byte.

        Raises:
          Unreadable: the pickle is damaged, too large, or uses an instruction not known here.
        """
        while True:
            start = self.position
            opcode = self.read(1)
            try:
                if opcode == pickle.STOP:
                    return self.stack.pop()
                if opcode not in _INSTRUCTIONS:
                    raise Unreadable(
                        f"uses the pickle instruction {opcode!r} at byte {start}, which no state "
                        "dict needs"
                    )
                _INSTRUCTIONS[opcode](self)
            # What wrong operands of a damaged file end in: an empty stack, an unknown memo index,
            # bytes that are no text, arguments of the wrong number or type.
            except (IndexError, KeyError, UnicodeDecodeError, TypeError, ValueError) as error:
                raise Unreadable(
                    f"is damaged: the pickle makes no sense at byte {start}"
                ) from error
            self.charge(1)

    def charge(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise Unreadable(f"holds a pickle of more than {MAX_STEPS} steps: no state dict")

    def read(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise Unreadable("ends in the middle of its pickle: it is truncated")
        taken = bytes(self.data[self.position : end])
        self.position = end
        return taken

    def read_line(self) -> str:
        window = bytes(self.data[self.position : self.position + _MAX_NAME])
        line, newline, _ = window.partition(b"\n")
        if not newline:
            raise Unreadable("is damaged: a name in its pickle has no end")
        self.position += len(line) + 1
        return line.decode()

    def read_number(self, layout: str) -> Any:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def pop_to_mark(self) -> list[Any]:
        taken, self.stack = self.stack, self.outer_stacks.pop()
        return taken


def assign(target: dict[Any, Any], key: Any, value: Any) -> None:
    # Hashing a deeply nested tuple overflows the C stack, so keys are of the types that state
    # dicts have.
    if type(target) is not dict or type(key) not in (str, int, float, bool, type(None)):
        raise TypeError
    target[key] = value


def _call(machine: Machine) -> None:
    function, arguments = machine.pop(2)
    if type(function) is not Global or function.call is None or type(arguments) is not tuple:
        raise TypeError
    # The arguments may sit in the memo, to be copied by call after call.
    machine.charge(sum(len(value) for value in arguments if type(value) in (list, dict)))
    machine.stack.append(function.call(*arguments))


def _drop_attributes(machine: Machine) -> None:
    target, _ = machine.pop(2)
    if type(target) not in machine.attributed:
        raise TypeError
    machine.stack.append(target)


def _append(machine: Machine) -> None:
    _extend_top(machine, machine.pop(1))


def _extend_top(machine: Machine, values: list[Any]) -> None:
    if type(machine.stack[-1]) is not list:
        raise TypeError
    machine.stack[-1].extend(values)


def _set_items(machine: Machine, pairs: list[Any]) -> None:
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        assign(machine.stack[-1], key, value)


def _mark(machine: Machine) -> None:
    machine.outer_stacks.append(machine.stack)
    machine.stack = []


def _remember(machine: Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _find(machine: Machine, module: Any, name: Any) -> None:
    if type(module) is not str or type(name) is not str:
        raise TypeError
    machine.stack.append(machine.find_global(f"{module}.{name}"))


def _push(make: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def push(machine: Machine) -> None:
        value = make(machine)  # first: it may go back to the stack below a mark
        machine.stack.append(value)

    return push


def _text(length_layout: str) -> Callable[[Machine], None]:
    return _push(lambda machine: machine.read(machine.read_number(length_layout)).decode())


def _skip(size: int) -> Callable[[Machine], None]:
    def skip(machine: Machine) -> None:
        machine.read(size)

    return skip


# Protocol 2, which `torch.save` writes; Python 2's strings, found in files of 2017; and what
# `torch.save(..., pickle_protocol=4)` adds.
_INSTRUCTIONS: dict[bytes, Callable[[Machine], None]] = {
    pickle.PROTO: _skip(1),
    pickle.FRAME: _skip(8),
    pickle.NONE: _push(lambda m: None),
    pickle.NEWTRUE: _push(lambda m: True),
    pickle.NEWFALSE: _push(lambda m: False),
    pickle.BININT: _push(lambda m: m.read_number("<i")),
    pickle.BININT1: _push(lambda m: m.read_number("<B")),
    pickle.BININT2: _push(lambda m: m.read_number("<H")),
    pickle.LONG1: _push(lambda m: pickle.decode_long(m.read(m.read_number("<B")))),
    pickle.BINFLOAT: _push(lambda m: m.read_number(">d")),
    pickle.BINUNICODE: _text("<I"),
    pickle.SHORT_BINUNICODE: _text("<B"),
    pickle.BINSTRING: _text("<I"),
    pickle.SHORT_BINSTRING: _text("<B"),
    pickle.MARK: _mark,
    pickle.EMPTY_TUPLE: _push(lambda m: ()),
    pickle.TUPLE1: _push(lambda m: tuple(m.pop(1))),
    pickle.TUPLE2: _push(lambda m: tuple(m.pop(2))),
    pickle.TUPLE3: _push(lambda m: tuple(m.pop(3))),
    pickle.TUPLE: _push(lambda m: tuple(m.pop_to_mark())),
    pickle.EMPTY_LIST: _push(lambda m: []),
    pickle.APPEND: _append,
    pickle.APPENDS: lambda m: _extend_top(m, m.pop_to_mark()),
    pickle.EMPTY_DICT: _push(lambda m: {}),
    pickle.SETITEM: lambda m: _set_items(m, m.pop(2)),
    pickle.SETITEMS: lambda m: _set_items(m, m.pop_to_mark()),
    pickle.GLOBAL: lambda m: _find(m, m.read_line(), m.read_line()),
    pickle.STACK_GLOBAL: lambda m: _find(m, *m.pop(2)),
    pickle.REDUCE: _call,
    pickle.NEWOBJ: _call,
    pickle.BUILD: _drop_attributes,
    pickle.BINPERSID: _push(lambda m: m.load_persistent(m.pop(1)[0])),
    pickle.BINGET: _push(lambda m: m.memo[m.read_number("<B")]),
    pickle.LONG_BINGET: _push(lambda m: m.memo[m.read_number("<I")]),
    pickle.BINPUT: lambda m: _remember(m, m.read_number("<B")),
    pickle.LONG_BINPUT: lambda m: _remember(m, m.read_number("<I")),
    pickle.MEMOIZE: lambda m: _remember(m, len(m.memo)),
}
