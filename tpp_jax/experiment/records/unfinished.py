"""The summary of a run that is not finished, from what it has written so far."""

import json
import pathlib
from typing import Any

from tpp_jax.errors import TPPError
from tpp_jax.experiment.position import Position, Result
from tpp_jax.experiment.records import origin
from tpp_jax.experiment.records.folders import own_config
from tpp_jax.experiment.records.history import read_history
from tpp_jax.headline import ACCURACY


def summarize(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns a summary of the stages so far; the counts of networks are missing.

    Args:
      workdir: Folder of the run.

    Raises:
      TPPError: The folder is not that of a run.
    """
    if (config := own_config(workdir)) is None:
        raise TPPError(f"{workdir} is not the folder of a run")
    headline = origin.read_headline(workdir) or ACCURACY
    position, name = _position(workdir, config), headline.name
    phases = [renamed(result, name) for result in position.results]
    phases += _running(workdir, name, [phase["name"] for phase in phases])
    return {
        "status": "stopped",
        "method": config["prune"].get("method", ""),
        "headline": headline.to_dict(),
        "phases": phases,
        "dense": {name: position.dense},
        "pruned": None,
        "one_shot": {f"{name}_after": position.one_shot},
        "speedup": None,
        "layers": {},
        "config": config,
    }


def renamed(result: Result, name: str) -> dict[str, Any]:
    """Returns a finished stage as a summary has it.

    Args:
      result: Outcome of the stage.
      name: Name of the headline.
    """
    names = {"score": name, "best": f"best_{name}"}
    cut = ("before", "after", "compensated", "recalibrated")
    names |= {key: f"{name}_{key}" for key in cut}
    return {names.get(key, key): x for key, x in result.to_json().items()}


def _position(workdir: pathlib.Path, config: dict[str, Any]) -> Position:
    """Returns the position of the last checkpoint that can be read."""
    found = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    for folder in sorted(found, key=lambda path: int(path.name), reverse=True):
        try:
            content = json.loads((folder / "meta" / "metadata").read_bytes())
            return Position.from_json(content)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return Position(config)


def _running(
    workdir: pathlib.Path, name: str, finished: list[str]
) -> list[dict[str, Any]]:
    """Returns the stages after the last checkpoint, by the rows of their metrics."""
    phases: dict[str, dict[str, Any]] = {}
    before = 0
    for row in read_history(workdir / "metrics.jsonl"):
        stage = row.get("phase")
        if not isinstance(stage, str):
            continue
        if stage in finished:
            before = row["step"]
            continue
        found = phases.setdefault(
            stage, {"name": stage, "start": before, "seconds": None, name: None}
        )
        before = row["step"]
        found["steps"] = before - found["start"]
        found[name] = row.get(f"test_{name}", found[name])
    return list(phases.values())
