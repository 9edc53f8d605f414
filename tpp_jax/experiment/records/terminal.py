"""Literal text on a terminal or in a pipe.

Rich treats ``[old]`` in a text as a style, and an ASCII stream cannot encode ``×``.
Users choose the names of folders, layers and runs, so both must be printable.
"""

import os
import sys
from typing import IO, Any, cast

import rich.console

# ASCII replacements for the characters in messages and tables of this package. Each is
# one character, so that columns remain aligned.
_PLAIN = dict(zip("×→…–±·∞Σλᵀ", "x>~-~*8SLT", strict=True))


class Terminal(rich.console.Console):
    """A rich console that ignores markup and writes what its stream can encode."""

    def __init__(self, **options: Any) -> None:
        """Creates a console.

        Args:
          **options: Options of ``rich.console.Console``.
        """
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def file(self) -> IO[str]:
        """Stream to write to: the current standard output."""
        return cast(IO[str], _Printable(super().file))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def on_broken_pipe(self) -> None:
        """Stops printing if the reader of a pipe has closed it, as ``head`` does."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Prints text to standard output, as :class:`Terminal` does."""
    Terminal(soft_wrap=True).print(text)


def printable(text: str, encoding: str | None) -> str:
    r"""Returns a text in characters of an encoding.

    Example:
      >>> printable("3×3, 16 → 8, 語", "ascii")
      '3x3, 16 > 8, \\u8a9e'
    """
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_one(character, encoding) for character in text)
    return text


def _one(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        plain = _PLAIN.get(character)
        return plain or character.encode("ascii", "backslashreplace").decode()
    return character


class _Printable:
    """A writable stream that never raises UnicodeEncodeError."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(printable(text, self.encoding))
