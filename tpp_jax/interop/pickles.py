"""A pickle read as data: no class is built, no function called, nothing imported.

A pickle is a program. Python's unpickler runs it, so the author of the file decides
what is called. The reader here executes only the instructions that assemble containers
and constants; for an instruction that names a global, calls it or builds an object with
it, the reader only makes a record.

A pickle may also be written to exhaust memory or time, by repeating one of its values
many times. Therefore nothing is copied except into containers, and the number of copies
is limited to a small multiple of the pickle's length. Numbers of hundreds of digits and
globals of hundreds of characters, which no file of weights has, are errors.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A class or function that the pickle names, such as ``torch.nn.Linear``."""

    name: str


@dataclasses.dataclass(eq=False, slots=True)
class Record:
    """An object that the pickle would have created by a call.

    Attributes:
      callee: Callable of the call, a :class:`Global` in all valid files.
      args: Positional arguments of the call; keyword arguments are dropped.
      state: State that the object would have been given afterwards.
    """

    callee: Any
    args: Any
    state: Any = None


_LONGEST_NAME = 200  # characters of a module and of a class or function in it
_LARGEST_NUMBER = 2**256
# Largest number of entries copied into dicts by calls, per instruction read so far. A
# pair that Python 2 writes takes at least four instructions.
_COPIES = 2

_MARK = object()  # marks the place on the stack where an instruction's arguments begin

# Instructions that push their argument, which pickletools reads, on the stack.
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_ORDERED = Global("collections.OrderedDict")
# Python 2 and 3 differ in the module; set() is called only below protocol 4.
_SETS = [
    Global(f"{m}.{s}")
    for m in ("__builtin__", "builtins")
    for s in ("set", "frozenset")
]


def read_pickle(
    stream: BinaryIO, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Reads one pickle of any protocol, and leaves the stream directly after it.

    Args:
      stream: Stream with ``read``, ``readline`` and ``tell``.
      persistent: Function from a *persistent id*, by which a pickle refers to an object
        outside of it, to the object; None to reject pickles with such ids.

    Returns:
      The object, made of Python's constants and containers, :class:`Global` and
      :class:`Record`. An ``OrderedDict`` becomes a dict, a set becomes a list; entries
      of a dict are dropped if their key is neither text nor a number of 64 bits.

    Raises:
      ValueError, TypeError, AttributeError, LookupError: If the pickle is damaged, or
        written to exhaust memory.

    Example:
      >>> import fractions, io, pickle
      >>> record = read_pickle(io.BytesIO(pickle.dumps(fractions.Fraction(1, 2))))
      >>> record.callee, record.args
      (Global(name='fractions.Fraction'), (1, 2))
    """
    machine = _Machine([], {}, persistent)
    for opcode, arg, _ in pickletools.genops(stream):
        machine.read += 1
        name = opcode.name
        if name == "STOP":
            [result] = machine.stack
            return result
        if name in _VALUES:
            if type(arg) is int and abs(arg) >= _LARGEST_NUMBER:
                raise ValueError("the pickle has a number of hundreds of digits")
            machine.stack.append(arg)
        elif name in _HANDLERS:
            _HANDLERS[name](machine, name, arg)
        else:
            raise ValueError(f"the pickle's instruction {name} is not one of data")
    raise ValueError("the pickle has no end")


@dataclasses.dataclass(slots=True)
class _Machine:
    """The state between two instructions.

    Attributes:
      stack: Values that later instructions use.
      memo: Values by number, which instructions store and fetch.
      persistent: Function that resolves persistent ids, if any.
      read: Number of instructions read so far.
      copied: Number of entries copied into dicts by calls so far.
    """

    stack: list[Any]
    memo: dict[int, Any]
    persistent: Callable[[Any], Any] | None
    read: int = 0
    copied: int = 0

    def since_mark(self) -> list[Any]:
        """Pops the values above the last mark, and the mark."""
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:  # an IndexError if there is none
            start -= 1
        found = self.stack[start + 1 :]
        del self.stack[start:]
        return found

    def call(self, callee: Any, args: Any) -> None:
        """Pushes the container or the record that stands for a call."""
        if callee == _ORDERED and isinstance(args, tuple):
            self.copied += len(args[0]) if args else 0
            if self.copied > _COPIES * self.read:
                raise ValueError("the pickle fills dicts with one list repeatedly")
            self.stack.append(_ordered(args))
        elif callee in _SETS and isinstance(args, tuple):
            self.stack.append(_set(args))
        else:
            self.stack.append(Record(callee, args))

    def refer(self, identity: Any) -> None:
        """Pushes the object that a persistent id refers to."""
        if self.persistent is None:
            raise ValueError("the pickle refers to something outside of it")
        self.stack.append(self.persistent(identity))


def _on_memo(machine: _Machine, name: str, arg: Any) -> None:
    """Executes an instruction that stores or fetches a value."""
    stack, memo = machine.stack, machine.memo
    match name:
        case "BINPUT" | "LONG_BINPUT" | "PUT":
            memo[arg] = stack[-1]
        case "MEMOIZE":
            memo[len(memo)] = stack[-1]
        case _:
            stack.append(memo[arg])


def _on_stack(machine: _Machine, name: str, _: Any) -> None:
    """Executes an instruction that changes only the stack."""
    stack = machine.stack
    match name:
        case "MARK":
            stack.append(_MARK)
        case "POP":
            stack.pop()
        case "POP_MARK":
            machine.since_mark()
        case "DUP":
            stack.append(stack[-1])
        case "NONE":
            stack.append(None)
        case "NEWTRUE" | "NEWFALSE":
            stack.append(name == "NEWTRUE")


def _on_new_container(machine: _Machine, name: str, _: Any) -> None:
    """Executes an instruction that creates a container."""
    stack = machine.stack
    match name:
        case "EMPTY_TUPLE":
            stack.append(())
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack.append(tuple(_last(stack, int(name[-1]))))
        case "TUPLE":
            stack.append(tuple(machine.since_mark()))
        case "EMPTY_LIST" | "EMPTY_SET":
            stack.append([])
        case "LIST" | "FROZENSET":
            stack.append(machine.since_mark())
        case "EMPTY_DICT":
            stack.append({})
        case "DICT":
            stack.append(_pairs(machine.since_mark()))


def _on_container(machine: _Machine, name: str, _: Any) -> None:
    """Executes an instruction that fills a container.

    Containers of other types are records, whose entries are dropped.
    """
    stack = machine.stack
    match name:
        case "APPEND" | "APPENDS" | "ADDITEMS":
            added = [stack.pop()] if name == "APPEND" else machine.since_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(added)
        case "SETITEM" | "SETITEMS":
            added = machine.since_mark() if name == "SETITEMS" else _last(stack, 2)
            if isinstance(stack[-1], dict):
                stack[-1].update(_pairs(added))


def _on_object(machine: _Machine, name: str, arg: Any) -> None:
    """Executes an instruction that names, calls or builds something."""
    stack = machine.stack
    match name:
        case "GLOBAL":
            stack.append(_global(*arg.split(" ", 1)))
        case "STACK_GLOBAL":
            stack.append(_global(*_last(stack, 2)))
        case "REDUCE" | "NEWOBJ":
            machine.call(*_last(stack, 2))
        case "NEWOBJ_EX":
            callee, args, _ = _last(stack, 3)
            machine.call(callee, args)
        case "OBJ":
            callee, *args = machine.since_mark()
            machine.call(callee, tuple(args))
        case "INST":
            callee = _global(*arg.split(" ", 1))
            machine.call(callee, tuple(machine.since_mark()))
        case "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Record):  # attributes of a dict are dropped
                stack[-1].state = state
        case "PERSID":
            machine.refer(arg)
        case "BINPERSID":
            machine.refer(stack.pop())


def _ignored(machine: _Machine, name: str, arg: Any) -> None:
    """Executes an instruction that has no effect."""
    del machine, name, arg


_HANDLERS: dict[str, Callable[[_Machine, str, Any], None]] = {
    name: handler
    for handler, names in (
        (_ignored, "PROTO FRAME"),
        (_on_memo, "BINPUT LONG_BINPUT PUT MEMOIZE BINGET LONG_BINGET GET"),
        (_on_stack, "MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE"),
        (_on_new_container, "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST"),
        (_on_new_container, "EMPTY_SET LIST FROZENSET EMPTY_DICT DICT"),
        (_on_container, "APPEND APPENDS ADDITEMS SETITEM SETITEMS"),
        (_on_object, "GLOBAL STACK_GLOBAL REDUCE NEWOBJ NEWOBJ_EX OBJ INST BUILD"),
        (_on_object, "PERSID BINPERSID"),
    )
    for name in names.split()
}


def _last(stack: list[Any], count: int) -> list[Any]:
    """Pops the last values from the stack."""
    if len(stack) < count:
        raise IndexError("the pickle's stack is empty")
    found = stack[-count:]
    del stack[-count:]
    return found


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    # Hashing deeply nested keys would overflow the interpreter's stack, and many large
    # numbers may have the same hash.
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {key: value for key, value in pairs if _is_key(key)}


def _is_key(key: Any) -> bool:
    return isinstance(key, str | float) or (
        isinstance(key, int) and -(2**63) <= key < 2**63
    )


def _global(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("the pickle names a global by something other than text")
    if len(module) + len(name) > _LONGEST_NAME:
        raise ValueError("the pickle has a global whose name is too long")
    return Global(f"{module}.{name}")


def _ordered(args: tuple[Any, ...]) -> dict[Any, Any]:
    """Returns an OrderedDict as a dict.

    Python 2 passes the entries in one list; Python 3 sets them later.
    """
    if not args:
        return {}
    [entries] = args
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in entries):
        raise ValueError("the pickle has an OrderedDict of something other than pairs")
    return _pairs([item for pair in entries for item in pair])


def _set(args: tuple[Any, ...]) -> list[Any]:
    """Returns a set as the list of its elements, without a copy."""
    if not args:
        return []
    [elements] = args
    if not isinstance(elements, list):
        raise TypeError("the pickle has a set of something other than a list")
    return elements
