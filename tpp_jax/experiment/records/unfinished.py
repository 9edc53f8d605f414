"""The summary of a run that is not finished, from what it has written so far."""

import json
import pathlib
from typing import Any

from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import RunConfig, with_defaults
from tpp_jax.experiment.dotted import is_dotted
from tpp_jax.experiment.fields import build
from tpp_jax.experiment.position import Position
from tpp_jax.experiment.records.folders import own_config
from tpp_jax.experiment.records.history import read_history
from tpp_jax.experiment.tasks import headline_of_task
from tpp_jax.headline import Headline


def summarize(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns a summary of the stages so far; the counts of networks are missing.

    A user's own task is not imported: its run is summarized by its loss.

    Args:
      workdir: Folder of the run.

    Raises:
      TPPError: The folder is not that of a run.
    """
    if (config := own_config(workdir)) is None:
        raise TPPError(f"{workdir} is not the folder of a run")
    typed = build(RunConfig, with_defaults(config))
    headline = Headline("loss", better="lower")
    if not is_dotted(typed.task.name):
        headline = headline_of_task(typed)
    position, name = _position(workdir, config), headline.name
    scored = not is_dotted(typed.task.name)  # as the position's scores are
    phases = [_result(entry, name, scored) for entry in _results(position)]
    phases += _running(workdir, name, [phase["name"] for phase in phases])
    dense = position.dense if scored else None
    return {
        "status": "stopped",
        "method": typed.prune.method,
        "headline": headline.to_dict(),
        "phases": phases,
        "dense": {name: dense},
        "pruned": None,
        "one_shot": {f"{name}_after": position.one_shot if scored else None},
        "speedup": None,
        "layers": {},
        "config": config,
    }


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


def _results(position: Position) -> list[dict[str, Any]]:
    return [result.to_json() for result in position.results]


def _result(entry: dict[str, Any], name: str, scored: bool) -> dict[str, Any]:
    """Returns a finished stage as it is in the summary of a finished run."""
    scores = {"score": name, "best": f"best_{name}"}
    scores |= {x: f"{name}_{x}" for x in ("before", "after")}
    scores |= {x: f"{name}_{x}" for x in ("compensated", "recalibrated")}
    found = {scores.get(key, key): value for key, value in entry.items()}
    return found if scored else found | dict.fromkeys(scores.values())


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
