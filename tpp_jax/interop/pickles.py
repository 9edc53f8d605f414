"""A pickle read as data: no class is built, no function called, nothing imported.

A pickle is a program. Python's own unpickler runs it, and whoever wrote the file
decides what it calls. Here its instructions are followed only as far as they put
containers and constants together; where one names a global, calls it or builds an
object with it, a record of that is all that is made.

A pickle may also be written to exhaust memory or time: by naming one thing in it many
times over. So nothing is copied here, except where a container is filled, and what is
copied is no more than a few times what the pickle spells out; numbers of hundreds of
digits and globals of hundreds of characters, which no file of weights has, are errors.
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
    """An object that the pickle would have made by calling something.

    Attributes:
      what: What would have been called, a :class:`Global` unless the file is odd.
      args: What it would have been called with; keywords are left out.
      state: What would have been put into the object afterwards.
    """

    what: Any
    args: Any
    state: Any = None


_LONGEST_NAME = 200  # characters of a module and of a class or function in it
_LARGEST_NUMBER = 2**256
# Entries copied into dicts by calls, for each instruction that was read until then. A
# pair that Python 2 writes takes four instructions at least.
_COPIES = 2

_MARK = object()  # stands on the stack where an instruction's arguments begin

# The instructions that put their argument, which pickletools reads, on the stack.
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
    """Reads one pickle of any protocol, and leaves the stream just behind it.

    Args:
      stream: With ``read``, ``readline`` and ``tell``.
      persistent: What stands for a *persistent id*, by which a pickle refers to things
        that are kept outside of it; a pickle with any is refused without.

    Returns:
      The object, of Python's constants and containers, :class:`Global` and
      :class:`Record`. An ``OrderedDict`` is a dict, a set a list; entries of a dict
      whose key is neither text nor a number of 64 bits are left out.

    Raises:
      ValueError, TypeError, AttributeError, LookupError: the pickle is damaged, or
        written to exhaust memory.

    Example:
      >>> import fractions, io, pickle
      >>> read_pickle(io.BytesIO(pickle.dumps({"half": fractions.Fraction(1, 2)})))
      {'half': Record(what=Global(name='fractions.Fraction'), args=(1, 2), state=None)}
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    read = copied = 0  # instructions, entries

    def since_mark() -> list[Any]:
        start = len(stack) - 1
        while stack[start] is not _MARK:  # ends in an IndexError if there is none
            start -= 1
        found = stack[start + 1 :]
        del stack[start:]
        return found

    def called(what: Any, args: Any) -> Any:
        nonlocal copied
        if what == _ORDERED and isinstance(args, tuple):
            copied += len(args[0]) if args else 0
            if copied > _COPIES * read:
                raise ValueError("the pickle fills dicts with one list over and over")
            return _ordered(args)
        if what in _SETS and isinstance(args, tuple):
            return _set(args)
        return Record(what, args)

    for opcode, arg, _ in pickletools.genops(stream):
        read += 1
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[arg])
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                [result] = stack
                return result
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_last(stack, int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                stack.append(since_mark())
            case "APPEND" | "APPENDS" | "ADDITEMS" as name:
                added = [stack.pop()] if name == "APPEND" else since_mark()
                if isinstance(stack[-1], list):  # else a record of some kind of list
                    stack[-1].extend(added)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append(_pairs(since_mark()))
            case "SETITEM" | "SETITEMS" as name:
                added = since_mark() if name == "SETITEMS" else _last(stack, 2)
                if isinstance(stack[-1], dict):  # else a record of some kind of dict
                    stack[-1].update(_pairs(added))
            case "GLOBAL":
                stack.append(_global(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_global(*_last(stack, 2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(called(*_last(stack, 2)))
            case "NEWOBJ_EX":
                what, args, _ = _last(stack, 3)
                stack.append(called(what, args))
            case "OBJ":
                what, *args = since_mark()
                stack.append(called(what, tuple(args)))
            case "INST":
                what = _global(*arg.split(" ", 1))
                stack.append(called(what, tuple(since_mark())))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Record):  # attributes of a dict are left out
                    stack[-1].state = state
            case "PERSID":
                stack.append(_refer(persistent, arg))
            case "BINPERSID":
                stack.append(_refer(persistent, stack.pop()))
            case name if name in _VALUES:
                if type(arg) is int and abs(arg) >= _LARGEST_NUMBER:
                    raise ValueError("the pickle has a number of hundreds of digits")
                stack.append(arg)
            case name:
                raise ValueError(f"the pickle's instruction {name} is not one of data")
    raise ValueError("the pickle has no end")


def _last(stack: list[Any], count: int) -> list[Any]:
    """Takes the last few values off the stack."""
    if len(stack) < count:
        raise IndexError("the pickle's stack is empty")
    found = stack[-count:]
    del stack[-count:]
    return found


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    # Deeply nested keys would overflow the interpreter's stack when they are hashed,
    # and large numbers can be made to have one hash.
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {key: value for key, value in pairs if _is_key(key)}


def _is_key(key: Any) -> bool:
    return isinstance(key, str | float) or (
        isinstance(key, int) and -(2**63) <= key < 2**63
    )


def _global(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("the pickle names a global by something else than text")
    if len(module) + len(name) > _LONGEST_NAME:
        raise ValueError("the pickle has a global whose name is too long")
    return Global(f"{module}.{name}")


def _ordered(args: tuple[Any, ...]) -> dict[Any, Any]:
    """Returns an OrderedDict as a dict.

    Python 2 passes the entries, in one list; Python 3 sets them later.
    """
    if not args:
        return {}
    [entries] = args
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in entries):
        raise ValueError("the pickle has an OrderedDict of something else than pairs")
    return _pairs([part for pair in entries for part in pair])


def _set(args: tuple[Any, ...]) -> list[Any]:
    """Returns a set as the list that it would have been made of, without a copy."""
    if not args:
        return []
    [elements] = args
    if not isinstance(elements, list):
        raise TypeError("the pickle has a set of something else than a list")
    return elements


def _refer(persistent: Callable[[Any], Any] | None, identity: Any) -> Any:
    if persistent is None:
        raise ValueError("the pickle refers to something outside of it")
    return persistent(identity)
