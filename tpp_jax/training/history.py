"""The metrics of a run, a line of JSON each: what the plots are drawn from."""

import json
import pathlib
from typing import Any


class History:
    """A growing file of metrics that forgets what a resumed run will do again."""

    def __init__(self, file: pathlib.Path, step: int) -> None:
        """Opens ``file``, dropping what was recorded after ``step``."""
        self._file = file
        kept = [row for row in self.read() if row["step"] <= step]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row; ``step`` counts over the whole run."""
        with self._file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Returns all rows; a last line that a kill cut short is left out."""
        if not self._file.exists():
            return []
        rows = []
        for line in self._file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows
