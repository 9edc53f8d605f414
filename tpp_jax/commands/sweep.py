"""A table from one command: a grid of runs that share their dense training.

A table's config has a base config and, by name, what each row and column changes of it.
A cell is a row, a column and a seed, and a run in a folder of its own: it resumes, and
one that fails does not stop the others.
"""

import itertools
import json
import pathlib
import re
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import ml_collections

from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.config import default_config, near_fields
from tpp_jax.experiment.methods import find_method
from tpp_jax.experiment.records import folders
from tpp_jax.experiment.records.history import is_number
from tpp_jax.experiment.records.summary import draw, read_summary
from tpp_jax.experiment.records.terminal import say
from tpp_jax.reports import grids, page, plots
from tpp_jax.reports.headline import headline_of
from tpp_jax.storage import processes


class Cell(NamedTuple):
    """A run of the grid.

    Attributes:
      row, column: names.
      seed: of the run.
      config: of the run, which trains its own dense network.
    """

    row: str
    column: str
    seed: int
    config: ml_collections.ConfigDict

    @property
    def name(self) -> str:
        """The cell's folder: ``<row>_<column>_<seed>``, of letters, digits and dots."""
        texts = self.row.lower(), self.column.lower(), str(self.seed)
        return "_".join(re.sub(r"[^a-z0-9.]+", "-", text).strip("-") for text in texts)


def default_table() -> ml_collections.ConfigDict:
    """Returns all fields of a table."""
    table = ml_collections.ConfigDict()
    table.title = ""
    table.base = default_config()
    # Pairs of a name and a nested dict of what it changes of the base.
    table.rows = ()
    table.columns = ()
    table.seeds = (0, 1, 2)
    table.metrics = ("best_accuracy", "last_accuracy")  # see tpp_jax.reports.grids
    # What is published: (row, column, metric, mean, standard deviation or None).
    table.paper = ()
    # Cells whose steps run as one program; 0: one on the CPU, up to 8 elsewhere.
    table.replicas = 0
    table.only = ""  # pattern of the names of the cells to run; "" for all
    return table


def sweep(table: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> None:
    """Runs all cells of a table, or what is left of them.

    Args:
      table: from a file in configs/tables/.
      workdir: folder of the sweep: ``cells/<name>`` are the runs, ``dense/<name>`` the
        dense networks that they share, ``table.md`` and ``table.csv`` the results, anew
        after every cell.

    Raises:
      TPPError: the table cannot be read, before any training; or cells have failed,
        after all others are done. What they said is in ``cells/<name>/error.txt``.
    """
    workdir = pathlib.Path(workdir)
    cells = cells_of(table)
    chosen = [c for c in cells if fnmatchcase(c.name, table.only or "*")]
    if not chosen:
        names = ", ".join(cell.name for cell in cells[:3])
        raise TPPError(
            f"config.only={table.only!r} matches no cell of the table; they are named "
            f"{names}…"
        )
    folders.make(workdir)
    with folders.errors_explained(workdir):
        _sweep(table, cells, chosen, workdir)


def _sweep(
    table: ml_collections.ConfigDict,
    cells: Sequence[Cell],
    chosen: Sequence[Cell],
    workdir: pathlib.Path,
) -> None:
    first = processes.is_first()  # of several processes, the one that writes
    if first:
        folders.write(
            workdir / "table.json", json.dumps(_description(table, cells), indent=2)
        )
    failed, number = [], 0
    # On the CPU too little is gained to compile so much: benchmarks/replicas.py
    size = table.replicas or (1 if jax.default_backend() == "cpu" else 8)
    for cells in groups_of(chosen, size):
        numbers = "–".join(map(str, sorted({number + 1, number + len(cells)})))
        if first:
            what = "; ".join(f"{c.row}, {c.column}, seed {c.seed}" for c in cells)
            say(f"\n[{numbers}/{len(chosen)}] {what}")
        number += len(cells)
        for cell, end in zip(cells, _run(cells, workdir), strict=True):
            if isinstance(end, processes.LostProcess):
                raise end
            if isinstance(end, BaseException):
                failed.append(cell.name)
            if first:
                _tell(workdir / "cells" / cell.name, end)
        jax.clear_caches()  # else the programs of all cells stay in memory
        if first:
            tabulate(workdir)
    if first:
        say(f"\n{tabulate(workdir)}\n{write_report(workdir)} shows it.")
    if failed:
        raise TPPError(
            f"{len(failed)} of {len(chosen)} cells failed: {', '.join(failed)}. "
            f"{workdir / 'cells' / failed[0] / 'error.txt'} says why; the same command "
            "tries them again"
        )


def _tell(folder: pathlib.Path, end: Any) -> None:
    """Writes down why a cell failed, if it did."""
    file = folder / "error.txt"
    file.unlink(missing_ok=True)
    if isinstance(end, BaseException):
        folder.mkdir(parents=True, exist_ok=True)
        folders.write(file, "".join(traceback.format_exception(end)))
        say(f"{folder.name} failed: {end}")


def cells_of(table: ml_collections.ConfigDict) -> list[Cell]:
    """Returns the cells of a table, by column, row and seed.

    Raises:
      TPPError: a field of the table is missing or wrong, or a row or column changes a
        field that there is not.
    """
    _check(table)
    cells = []
    for column, row, seed in itertools.product(table.columns, table.rows, table.seeds):
        config = ml_collections.ConfigDict(table.base.to_dict()).lock()
        for name, changes in (row, column):
            try:
                config.update(dict(changes))
            except KeyError as error:
                key = str(error).partition('Key "')[2].partition('"')[0]
                raise TPPError(
                    f"{name!r} of the table changes a field {key!r} that no config "
                    f"has{near_fields(key)}"
                ) from error
            except (TypeError, AttributeError) as error:
                raise TPPError(
                    f"{name!r} of the table changes a field to what it cannot be: "
                    f"{' '.join(str(error).split())[:200]}"
                ) from error
        config.seed = seed
        cells.append(Cell(row[0], column[0], seed, config))
    names = [cell.name for cell in cells]
    for cell in cells:
        if names.count(cell.name) > 1:
            raise TPPError(
                f"two cells of the table would share the folder {cell.name}, one of "
                f"them {cell.row!r}, {cell.column!r}: give names that differ in more "
                "than capitals and signs"
            )
    return cells


def groups_of(cells: Sequence[Cell], size: int) -> Iterator[list[Cell]]:
    """Yields the cells that run together.

    They are of one column and fine-tune alike, so that at least those steps may share
    a program; the seeds of a row share all, and are kept together where they fit.

    Args:
      cells: from :func:`cells_of`.
      size: how many at the most.
    """
    alike: dict[Any, list[list[Cell]]] = {}
    for _, seeds in itertools.groupby(cells, lambda cell: (cell.row, cell.column)):
        row = list(seeds)
        key = row[0].column, row[0].config.finetune.to_json(sort_keys=True)
        alike.setdefault(key, []).append(row)
    for rows in alike.values():
        group: list[Cell] = []
        for row in rows:
            if group and len(group) + len(row) > size:
                yield group
                group = []
            group += row
            while len(group) >= size:
                yield group[:size]
                group = group[size:]
        if group:
            yield group


def tabulate(workdir: pathlib.Path) -> str:
    """Writes ``table.md`` and ``table.csv`` of the cells that are done so far.

    Returns:
      The Markdown.

    Raises:
      TPPError: the folder is not of a sweep.
    """
    grid = read_grid(workdir)
    markdown = grids.markdown(grid)
    with folders.errors_explained(workdir):
        folders.write(workdir / "table.md", markdown)
        folders.write(workdir / "table.csv", grids.csv(grid))
    return markdown


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes ``report.html`` and the pictures of a sweep, as it is now, or of a run.

    Returns:
      The page's path.

    Raises:
      TPPError: the folder is neither that of a sweep nor that of a finished run.
    """
    workdir = pathlib.Path(workdir)
    folders.check_kinds(workdir)
    with folders.errors_explained(workdir):
        if (workdir / "summary.json").exists():
            return draw(workdir)
        grid = read_grid(workdir)
        tabulate(workdir)
        pictures = plots.save(plots.of_grid(grid), workdir)
        failed = {
            file.parent.name: _last_line(file)
            for file in sorted(workdir.glob("cells/*/error.txt"))
        }
        file = workdir / "report.html"
        folders.write(file, page.of_grid(grid, pictures, failed))
        return file


def _last_line(file: pathlib.Path) -> str:
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    return text.splitlines()[-1] if text else "(it does not say why)"


def read_grid(workdir: pathlib.Path) -> grids.Grid:
    """Reads what the cells of a sweep have come to.

    Raises:
      TPPError: the folder is not of a sweep, or a file in it is damaged.
    """
    try:
        described = json.loads((workdir / "table.json").read_bytes())
        names = {
            (cell["row"], cell["column"], cell["seed"]): cell["name"]
            for cell in described["cells"]
        }
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
        )
    except OSError as error:
        raise TPPError(
            f"{workdir} is neither the folder of a sweep nor that of a finished run"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TPPError(
            f"{workdir / 'table.json'} is damaged, or not that of a sweep: run "
            "--mode=sweep again with the same config, which writes it again"
        ) from error
    results = {}
    for key, name in names.items():
        file = workdir / "cells" / name / "summary.json"
        if file.exists():
            summary = read_summary(file)
            results[key] = grids.metrics_of(summary)
            grid = grid._replace(headline=headline_of(summary))
    return grid._replace(results=results)


def _check(table: ml_collections.ConfigDict) -> None:
    if missing := set(default_table()) - set(table):
        raise TPPError(
            f"the config has no field {min(missing)}, so it is not one of a table: "
            "take one of configs/tables/, or start it from "
            "tpp_jax.commands.sweep.default_table()"
        )
    if not isinstance(table.base, ml_collections.ConfigDict):
        raise TPPError(f"the base of the table is {table.base!r}, must be a config")
    _check_shapes(table)
    for what in ("rows", "columns", "seeds"):
        names = [x if what == "seeds" else x[0] for x in table[what]]
        if not names or len(set(names)) < len(names):
            raise TPPError(f"the {what} of the table are {names}: name each, and once")
    metrics = {*table.metrics, *(entry[2] for entry in table.paper)}
    if odd := metrics - set(grids.METRICS):
        raise TPPError(
            f"unknown metric {min(odd)!r} of the table: choose of "
            f"{', '.join(grids.METRICS)}"
        )
    rows, columns = ({name for name, _ in x} for x in (table.rows, table.columns))
    for row, column, *_ in table.paper:
        if row not in rows or column not in columns:
            raise TPPError(
                f"the table has a published value of {row!r}, {column!r}, but no such "
                "row and column"
            )


def _check_shapes(table: ml_collections.ConfigDict) -> None:
    """Raises a TPPError unless the table's fields are of the form they are to have."""

    def pair(entry: Any) -> bool:
        named = isinstance(entry, Sequence) and not isinstance(entry, str)
        return named and len(entry) == 2 and isinstance(entry[0], str)

    def changes(entry: Any) -> bool:
        return pair(entry) and isinstance(entry[1], Mapping | ml_collections.ConfigDict)

    def published(entry: Any) -> bool:
        listed = isinstance(entry, Sequence) and len(entry) == 5
        texts = listed and all(isinstance(x, str) for x in entry[:3])
        return (
            texts and is_number(entry[3]) and (entry[4] is None or is_number(entry[4]))
        )

    forms: dict[str, tuple[Callable[[Any], bool], str]] = {
        "rows": (changes, "pairs of a name and a dict of what it changes"),
        "columns": (changes, "pairs of a name and a dict of what it changes"),
        "seeds": (lambda x: type(x) is int, "whole numbers"),
        "metrics": (lambda x: isinstance(x, str), "names"),
        "paper": (published, "row, column, metric, mean, standard deviation or None"),
    }
    for name, (fits, form) in forms.items():
        entries = table[name]
        listed = isinstance(entries, Sequence) and not isinstance(entries, str)
        odd = entries if not listed else [x for x in entries if not fits(x)][:1]
        if odd or not listed:
            raise TPPError(
                f"the {name} of the table are {str(odd)[:100]}, must be a list or "
                f"tuple of {form}"
            )
    for name in ("title", "only"):
        if not isinstance(table[name], str):
            raise TPPError(f"the table's {name} is {table[name]!r}, must be text")
    if type(table.replicas) is not int or table.replicas < 0:
        raise TPPError(
            f"the table's replicas is {table.replicas!r}, must be a whole number, and "
            "at least 0"
        )


def _description(
    table: ml_collections.ConfigDict, cells: Sequence[Cell]
) -> dict[str, Any]:
    return {
        "title": table.title,
        "metrics": table.metrics,
        "paper": table.paper,
        "base": table.base.to_dict(),
        "cells": [
            {"row": c.row, "column": c.column, "seed": c.seed, "name": c.name}
            for c in cells
        ],
    }


def _run(cells: Sequence[Cell], workdir: pathlib.Path) -> list[Any]:
    """Runs cells together, and before them the dense training that they need.

    Returns:
      The summary of each, or the exception that ended it.
    """
    configs = [cell.config for cell in cells]
    folders = [_dense_folder(config, workdir) for config in configs]
    needed = {f: _dense(c) for f, c in zip(folders, configs, strict=True) if f}
    try:
        dense = dict(
            zip(needed, run.train_together(needed.values(), needed), strict=True)
        )
        for config, folder in zip(configs, folders, strict=True):
            if folder:
                config.init.model = str(folder / "dense")
        ends = {i: dense.get(folder) for i, folder in enumerate(folders)}
        ready = [i for i, end in ends.items() if not isinstance(end, BaseException)]
        done = run.train_together(
            [configs[i] for i in ready],
            [workdir / "cells" / cells[i].name for i in ready],
        )
    except Exception as error:  # whatever it is, the other cells can still run
        return [error] * len(cells)
    return [dict(zip(ready, done, strict=True)).get(i, ends[i]) for i in ends]


def _dense_folder(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> pathlib.Path | None:
    """Returns the folder of the dense training that a cell starts from, if of any."""
    try:
        pretrained = "pretrain" in find_method(config.prune.method).stages.split()
    except TPPError:
        return None  # the run of the cell says what is wrong
    if not pretrained or config.init.model or config.init.torch:
        return None
    dense = _dense(config)
    number = zlib.crc32(dense.to_json(sort_keys=True).encode())
    return workdir / "dense" / f"{dense.model.name}_{number:08x}_{dense.seed}"


def _dense(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config of the dense training alone, equal for all that share it."""
    dense = ml_collections.ConfigDict(default_config().to_dict())
    shared = ("model", "data", "pretrain", "seed", "num_devices", "parallel")
    shared += ("accumulate", "sync_bn", "skip_nonfinite", "steps_per_dispatch")
    shared += ("log_every", "eval_every", "checkpoint_every")
    dense.update({name: value for name, value in config.items() if name in shared})
    dense.prune.update({"method": "none", "ratios": "*:0.5", "skip": ""})
    return dense
