"""What a report shows besides the summary: what other modes left in a run's folder."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from tpp_jax import style
from tpp_jax.analysis.groups_svg import picture_of
from tpp_jax.experiment.records import origin
from tpp_jax.experiment.records.folders import write
from tpp_jax.experiment.records.history import read_history
from tpp_jax.graph.groups import Groups
from tpp_jax.pruning.plan import Plan
from tpp_jax.reports.canvas import Picture
from tpp_jax.reports.page import Files

_GROUPS = {"groups.svg": style.WIDE, "groups_phone.svg": style.PHONE}
_PROFILE = {"networks", "layers", "device"}
_EXPORT = {"bytes", "params", "flops", "runtime", "difference"}


def draw_groups(workdir: pathlib.Path, groups: Groups, plans: Sequence[Plan]) -> None:
    """Draws the groups and what is pruned of them, for a desktop and for a phone.

    Args:
      workdir: Folder of the run.
      groups: Groups of the unpruned network.
      plans: Plans of all rounds.
    """
    plan = functools.reduce(Plan.then, plans)
    for name, canvas in _GROUPS.items():
        write(workdir / name, picture_of(groups, plan, canvas))


def read(workdir: pathlib.Path) -> Files:
    """Reads the metrics of a run and what ``--mode=profile`` and others have added.

    A file that is missing or not what these modes write is left out.

    Args:
      workdir: Folder of the run.

    Raises:
      TPPError: Something other than a file is in the place of the metrics.
    """
    exports = {}
    for file in sorted((workdir / "export").glob("*.json")):
        if (found := _read(file, _EXPORT)) is not None:
            exports[file.stem] = found
    above = workdir.absolute().parent
    cell = above.name in ("cells", "dense") and (above.parent / "table.json").is_file()
    return Files(
        history=read_history(workdir / "metrics.jsonl"),
        profile=_read(workdir / "profile.json", _PROFILE),
        exports=exports,
        groups=_groups(workdir),
        made=origin.read(workdir),
        table="../../report.html" if cell else "",
    )


def _read(file: pathlib.Path, keys: set[str]) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and keys <= found.keys() else None


def _groups(workdir: pathlib.Path) -> Picture | None:
    drawn = []
    for name in _GROUPS:
        try:
            drawn.append((workdir / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return Picture(drawn[0], drawn[-1]) if drawn else None
