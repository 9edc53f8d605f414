"""Text on a terminal or in a pipe, printed as it is.

Rich reads ``[old]`` in a text as a style, and a stream of ASCII refuses ``×``. Names of
folders, layers and runs are the user's, so both have to be printed.
"""

import os
import sys
from typing import IO, Any

import rich.console

# Characters of the messages and tables of this package in ASCII; one for one, so that
# columns are still aligned.
_PLAIN = dict(zip("×→…–±·∞Σλᵀ", "x>~-~*8SLT", strict=True))


class Terminal(rich.console.Console):
    """A rich console that reads no markup and writes what its stream can encode."""

    def __init__(self, **options: Any) -> None:
        """Makes a console.

        Args:
          **options: Options of ``rich.console.Console``.
        """
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def file(self) -> IO[str]:
        """The stream written to: standard output, as it is at the moment."""
        return _Printable(super().file)  # type: ignore[return-value]

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def on_broken_pipe(self) -> None:
        """Prints no more if the reader of a pipe has closed it, as ``head`` does."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Prints text to standard output, as :class:`Terminal` does."""
    Terminal(soft_wrap=True).print(text)


def printable(text: str, encoding: str | None) -> str:
    r"""Returns a text in characters that an encoding has.

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
    """A stream to write to that never raises UnicodeEncodeError."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(printable(text, self.encoding))
