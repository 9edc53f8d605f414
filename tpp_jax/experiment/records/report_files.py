"""What a report shows besides the summary: what other modes left in a run's folder."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from tpp_jax import style
from tpp_jax.analysis.groups_svg import picture_of
from tpp_jax.experiment.records import origin
from tpp_jax.experiment.records.folders import read_if_legible, write
from tpp_jax.experiment.records.history import is_number, read_history
from tpp_jax.graph.groups import Groups
from tpp_jax.pruning.plan import Plan
from tpp_jax.reports.canvas import Picture
from tpp_jax.reports.page import Files

_GROUPS = {"groups.svg": style.WIDE, "groups_phone.svg": style.PHONE}
_PAIR = ("dense_seconds", "pruned_seconds", "dense_flops", "pruned_flops")
_EXPORT = ("bytes", "params", "flops", "difference")


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
        found = read_if_legible(file)
        if _has_numbers(found, _EXPORT) and "runtime" in found:
            exports[file.stem] = found
    above = workdir.absolute().parent
    cell = above.name in ("cells", "dense") and (above.parent / "table.json").is_file()
    return Files(
        history=read_history(workdir / "metrics.jsonl"),
        profile=_profile(workdir / "profile.json"),
        exports=exports,
        groups=_groups(workdir),
        made=origin.read(workdir),
        table="../../report.html" if cell else "",
    )


def _profile(file: pathlib.Path) -> dict[str, Any] | None:
    """Returns the times in a file of ``--mode=profile``; None if there are none."""
    found = read_if_legible(file)
    parts: dict[str, Any] = {}
    for part in ("networks", "layers"):
        pairs = found.get(part)
        pairs = pairs.items() if isinstance(pairs, dict) else ()
        parts[part] = {name: x for name, x in pairs if _has_numbers(x, _PAIR)}
    device = str(found.get("device", ""))
    return {"device": device, **parts} if parts["networks"] else None


def _has_numbers(content: Any, names: Sequence[str]) -> bool:
    """Returns whether a dict has positive numbers, or a difference, of these names."""
    return isinstance(content, dict) and all(
        is_number(content.get(name)) and (content[name] > 0 or name == "difference")
        for name in names
    )


def _groups(workdir: pathlib.Path) -> Picture | None:
    drawn = []
    for name in _GROUPS:
        try:
            drawn.append((workdir / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return Picture(drawn[0], drawn[-1]) if drawn else None
