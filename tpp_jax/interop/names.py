"""Names and texts from foreign files, made safe for a message."""

_LONGEST = 80  # characters of a name


def shown(text: object, most: int = _LONGEST) -> str:
    r"""Returns a text on one line, without control characters and of bounded length.

    Args:
      text: Text or number from a foreign file.
      most: Number of characters after which the text is cut.

    Example:
      >>> shown("\x1b[2Jname")
      '\\x1b[2Jname'
      >>> shown("a" * 1000, 5)
      'aaaaa…'
    """
    start = str(text)[: most + 1]
    line = "".join(c if c.isprintable() else _escaped(c) for c in start)
    return line if len(line) <= most else f"{line[:most]}…"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
