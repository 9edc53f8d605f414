"""The metrics of a run, one row of JSON per line, from which plots are drawn."""

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tpp_jax.errors import TPPError

Row = dict[str, Any]


class History:
    """A growing file of metrics, from which a resumed run drops the rows to repeat.

    Attributes:
      odd: Numbers, from 1, of the lines that are not rows of metrics. They are kept in
        the file and ignored when it is read.
    """

    def __init__(self, file: pathlib.Path, step: int, *, quiet: bool = False) -> None:
        """Opens a file of metrics.

        Args:
          file: Path of the file, which is created if it is missing.
          step: Step of the run; rows of later steps are dropped.
          quiet: Whether to write nothing.

        Raises:
          TPPError: Something other than a file is in its place.
        """
        self._file, self._quiet = file, quiet
        self.odd: list[int] = []
        if quiet:
            return
        kept = []
        for number, (line, row, complete) in enumerate(_lines(file), start=1):
            if row is None and (not complete or not line.strip()):
                continue  # truncated by a kill, or empty
            if row is None:
                self.odd.append(number)
            if row is None or row["step"] <= step:
                kept.append(line)
        partial = file.with_name(file.name + ".partial")
        partial.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(partial, file)

    def append(self, row: Row) -> None:
        """Adds a row, whose ``step`` counts from the start of the run."""
        if self._quiet:
            return
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def read(self) -> list[Row]:
        """Returns all rows."""
        return read_history(self._file)


def read_history(file: pathlib.Path) -> list[Row]:
    """Returns the rows of a run's metrics, without invalid lines.

    A row is a JSON object whose ``step`` is a number. A kill can truncate the last
    line, and a person can edit others.

    Raises:
      TPPError: Something other than a file is in its place.
    """
    return [row for _, row, _ in _lines(file) if row is not None]


def _lines(file: pathlib.Path) -> list[tuple[bytes, Row | None, bool]]:
    """Returns each line, its row if it is valid, and whether a newline ends it."""
    if not file.exists():
        return []
    if not file.is_file():
        raise TPPError(
            f"{file} is not a file, but a run has its metrics there: move it away, or "
            "use another --workdir"
        )
    *lines, last = file.read_bytes().split(b"\n")
    return [(x, _row(x), True) for x in lines] + [(last, _row(last), False)]


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (
        ValueError,
        RecursionError,
    ):  # not JSON, not UTF-8, or a number that is too long
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
      recent: Number of steps and mean metrics of each dispatch. ``skipped`` is the
        share of steps whose other metrics are zero.

    Returns:
      The share of skipped steps, if there is one, and the means of the other metrics
      over the steps that were not skipped.

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
