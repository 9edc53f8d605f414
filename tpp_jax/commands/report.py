"""The tables and the report of a sweep, or the report of a run: --mode=report."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from tpp_jax.errors import TPPError
from tpp_jax.experiment.records import folders, origin
from tpp_jax.experiment.records.summary import draw, read_summary
from tpp_jax.headline import headline_of
from tpp_jax.reports import grids, page, plots


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes the report of a sweep or of a run, at its current state.

    Args:
      workdir: Folder of the sweep or of the run.

    Returns:
      The path of ``report.html``, next to which its plots are.

    Raises:
      TPPError: The folder belongs neither to a sweep nor to a run.
    """
    workdir = pathlib.Path(workdir)
    folders.check_layout(workdir)
    with folders.errors_explained(workdir):
        if (workdir / "summary.json").exists() or _begun(workdir):
            return draw(workdir)
        grid = read_grid(workdir)
        tabulate(workdir)
        pictures = plots.save(plots.of_grid(grid), workdir)
        failed = {
            file.parent.name: _last_line(file)
            for file in sorted(workdir.glob("cells/*/error.txt"))
        }
        described = json.loads((workdir / "table.json").read_bytes())
        names = _names(described)
        links = {
            key: f"cells/{quote(name)}/report.html"
            for key, name in names.items()
            if (workdir / "cells" / name / "report.html").is_file()
        }
        file = workdir / "report.html"
        made = _made(workdir / "cells" / names[key] for key in grid.results)
        base = described.get("base")
        folders.write(file, page.of_grid(grid, pictures, failed, links, made, base))
        return file


def _begun(workdir: pathlib.Path) -> bool:
    """Returns whether a folder holds a run that is not finished."""
    files = (workdir / folders.CONFIG, workdir / "metrics.jsonl")
    return all(file.is_file() for file in files)


def _names(described: Mapping[str, Any]) -> dict[tuple[str, str, int], str]:
    """Returns the names of the cells of ``table.json``, by row, column and seed."""
    return {
        (cell["row"], cell["column"], cell["seed"]): cell["name"]
        for cell in described["cells"]
    }


def _made(runs: Iterable[pathlib.Path]) -> Mapping[str, str]:
    """Returns what made the last of some finished runs."""
    found = [origin.read(run) for run in runs]
    return max(found, key=lambda made: made.get("date", ""), default={})


def tabulate(workdir: pathlib.Path) -> str:
    """Writes ``table.md`` and ``table.csv`` of the finished cells of a sweep.

    Returns:
      The content of ``table.md``.

    Raises:
      TPPError: The folder does not belong to a sweep.
    """
    grid = read_grid(workdir)
    markdown = grids.markdown(grid)
    with folders.errors_explained(workdir):
        folders.write(workdir / "table.md", markdown)
        folders.write(workdir / "table.csv", grids.csv(grid))
    return markdown


def read_grid(workdir: pathlib.Path) -> grids.Grid:
    """Reads the results of the finished cells of a sweep.

    Raises:
      TPPError: The folder does not belong to a sweep, or a file in it is damaged.
    """
    try:
        described = json.loads((workdir / "table.json").read_bytes())
        names = _names(described)
        grid = grids.Grid(
            title=described["title"],
            rows=tuple(dict.fromkeys(row for row, _, _ in names)),
            columns=tuple(dict.fromkeys(column for _, column, _ in names)),
            metrics=tuple(described["metrics"]),
            results={},
            planned=len(names),
            paper={
                (row, column, metric): (mean, std)
                for row, column, metric, mean, std in described["paper"]
            },
            headline=headline_of(described),
        )
    except OSError as error:
        raise TPPError(
            f"{workdir} is neither the folder of a sweep nor that of a run"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TPPError(
            f"{workdir / 'table.json'} is damaged, or not that of a sweep: run "
            "--mode=sweep with the same config, which writes it again"
        ) from error
    results = {}
    for key, name in names.items():
        file = workdir / "cells" / name / "summary.json"
        if file.exists():
            summary = read_summary(file)
            results[key] = grids.metrics_of(summary)
            grid = grid._replace(headline=headline_of(summary))
    return grid._replace(results=results)


def _last_line(file: pathlib.Path) -> str:
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    return text.splitlines()[-1] if text else "(it gives no reason)"
