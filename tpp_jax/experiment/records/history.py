"""The metrics of a run, one line of JSON per row; the plots are drawn from them."""

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tpp_jax.errors import TPPError

Row = dict[str, Any]


class History:
    """A growing file of metrics, from which a resumed run drops what it will repeat.

    Attributes:
      odd: Numbers of the lines that are no rows of metrics, from 1. They are kept in
        the file, and left out when it is read.
    """

    def __init__(self, file: pathlib.Path, step: int, *, quiet: bool = False) -> None:
        """Opens a file of metrics.

        Args:
          file: The file; made if missing.
          step: Step of the run; rows of later steps are dropped.
          quiet: Whether nothing is ever written.

        Raises:
          TPPError: Something other than a file is in its place.
        """
        self._file, self._quiet = file, quiet
        self.odd: list[int] = []
        if quiet:
            return
        kept = []
        for number, (line, row, whole) in enumerate(_lines(file), start=1):
            if row is None and (not whole or not line.strip()):
                continue  # cut short by a kill, or empty
            if row is None:
                self.odd.append(number)
            if row is None or row["step"] <= step:
                kept.append(line)
        partial = file.with_name(file.name + ".partial")
        partial.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(partial, file)

    def append(self, row: Row) -> None:
        """Adds a row; ``step`` counts over the whole run."""
        if self._quiet:
            return
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def read(self) -> list[Row]:
        """Returns all rows."""
        return read_history(self._file)


def read_history(file: pathlib.Path) -> list[Row]:
    """Returns the rows of a run's metrics, without the lines that are none.

    A row is a JSON object with a number as ``step``. A kill can cut the last line
    short, and others can have been edited.

    Raises:
      TPPError: Something other than a file is in its place.
    """
    return [row for _, row, _ in _lines(file) if row is not None]


def _lines(file: pathlib.Path) -> list[tuple[bytes, Row | None, bool]]:
    """Returns each line, its row if it is one, and whether it ends with a newline."""
    if not file.exists():
        return []
    if not file.is_file():
        raise TPPError(
            f"{file} is no file, but a run has its metrics there: move it away, or use "
            "another --workdir"
        )
    *lines, last = file.read_bytes().split(b"\n")
    return [(x, _row(x), True) for x in lines] + [(last, _row(last), False)]


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number without end
        return None
    return row if isinstance(row, dict) and is_number(row.get("step")) else None


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def means(recent: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, float]:
    """Returns the means of metrics over several dispatches.

    Args:
      recent: Number of steps of each dispatch and the mean metrics over these.
        ``skipped`` is the share of steps whose other metrics count as zero.

    Returns:
      The share of steps that were skipped, if it is counted, and the means of the other
      metrics over the steps that were not.

    Example:
      >>> step = {"loss": 2.0, "accuracy": 0.5}
      >>> means([(3, step), (1, {"loss": 6.0, "accuracy": 0.5})])
      {'loss': 3.0, 'accuracy': 0.5}
    """
    total = sum(n for n, _ in recent)
    found = {
        name: sum(n * float(metrics[name]) for n, metrics in recent) / total
        for name in recent[-1][1]
    }
    counted = 1 - found.get("skipped", 0.0)
    return {name: x if name == "skipped" else x / counted for name, x in found.items()}
