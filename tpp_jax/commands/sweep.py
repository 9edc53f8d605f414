"""A table from one command: a grid of runs that share their dense training.

The config of a table has a base config and, by name, the changes of each row and each
column. A cell is a run: a row, a column and a seed, in its own folder. It can resume,
and its failure does not stop the others.
"""

import dataclasses
import functools
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

from tpp_jax import data
from tpp_jax.commands.report import tabulate, write_report
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.config import (
    RunConfig,
    default_config,
    near_fields,
    with_defaults,
)
from tpp_jax.experiment.dotted import is_dotted
from tpp_jax.experiment.fields import build, flat
from tpp_jax.experiment.methods import find_method
from tpp_jax.experiment.records import folders
from tpp_jax.experiment.records.history import is_number
from tpp_jax.experiment.records.terminal import say
from tpp_jax.experiment.tasks import Load, headline_of_task
from tpp_jax.headline import Headline
from tpp_jax.reports.grids import metrics_about
from tpp_jax.storage import processes

Change = tuple[str, Mapping[str, Any]]
"""Name of a row or column, and the fields that it changes, as a nested dict."""


class Cell(NamedTuple):
    """A run of the grid.

    Attributes:
      row: Name of the row.
      column: Name of the column.
      seed: Seed of the run.
      config: Config of the run, which trains its own dense network.
    """

    row: str
    column: str
    seed: int
    config: ml_collections.ConfigDict

    @property
    def name(self) -> str:
        """Name of the folder, ``<row>_<column>_<seed>`` in [a-z0-9.-]."""
        texts = self.row.lower(), self.column.lower(), str(self.seed)
        return "_".join(re.sub(r"[^a-z0-9.]+", "-", text).strip("-") for text in texts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The config of a table, checked.

    Attributes:
      title: Title of the table.
      base: Config that rows and columns change.
      rows: Rows of the table.
      columns: Columns of the table.
      seeds: Seeds of the runs in each row and column.
      metrics: Names of the metrics to show, see :mod:`tpp_jax.reports.grids`.
      paper: Published values: row, column, metric, mean, and standard deviation or
        None.
      replicas: Largest number of cells whose steps run as one program; 0 for one on
        the CPU and eight elsewhere.
      only: Pattern of the names of the cells to run; "" for all.
      headline: Metric by which the runs are judged; that of the base's task.
    """

    title: str
    base: ml_collections.ConfigDict
    rows: Sequence[Change]
    columns: Sequence[Change]
    seeds: Sequence[int]
    metrics: Sequence[str]
    paper: Sequence[tuple[str, str, str, float, float | None]]
    replicas: int
    only: str
    headline: Headline


def default_table() -> ml_collections.ConfigDict:
    """Returns the config of a table with all fields of :class:`Table`."""
    table = ml_collections.ConfigDict()
    table.title = ""
    table.base = default_config()
    table.rows = ()
    table.columns = ()
    table.seeds = (0, 1, 2)
    table.metrics = ("best_accuracy", "last_accuracy")
    table.paper = ()
    table.replicas = 0
    table.only = ""
    return table


def sweep(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> None:
    """Runs all remaining cells of a table.

    Args:
      config: Config of a table, from a file in configs/tables/.
      workdir: Folder of the sweep. ``cells/<name>`` are the runs, ``dense/<name>`` the
        dense networks that they share; ``table.md`` and ``table.csv`` are the results,
        which are updated after every cell.

    Raises:
      TPPError: The config is unusable, which is found before any training; or cells
        have failed, after all others are finished. Their errors are in
        ``cells/<name>/error.txt``.
    """
    workdir, table = pathlib.Path(workdir), _checked(config)
    cells = _cells(table)
    chosen = [c for c in cells if fnmatchcase(c.name, table.only or "*")]
    if not chosen:
        names = ", ".join(cell.name for cell in cells[:3])
        raise TPPError(
            f"config.only={table.only!r} matches no cell of the table; their names are "
            f"{names}…"
        )
    folders.make(workdir)
    with folders.errors_explained(workdir):
        if processes.is_first():
            described = json.dumps(_description(table, cells), indent=2)
            folders.write(workdir / "table.json", described)
        _sweep(chosen, table.replicas, workdir)


def _sweep(chosen: Sequence[Cell], replicas: int, workdir: pathlib.Path) -> None:
    first = processes.is_first()  # the process that writes
    failed, number = [], 0
    # On the CPU, joined steps save less than their compilation costs, see
    # benchmarks/replicas.py.
    size = replicas or (1 if jax.default_backend() == "cpu" else 8)
    # The cells have the same data, which take a while to decode.
    load = functools.lru_cache(maxsize=1)(data.load)
    for cells in bundles(chosen, size):
        numbers = "–".join(map(str, sorted({number + 1, number + len(cells)})))
        if first:
            what = "; ".join(f"{c.row}, {c.column}, seed {c.seed}" for c in cells)
            say(f"\n[{numbers}/{len(chosen)}] {what}")
        number += len(cells)
        for cell, end in zip(cells, _run(cells, workdir, load), strict=True):
            if isinstance(end, processes.LostProcess):
                raise end
            if isinstance(end, BaseException):
                failed.append(cell.name)
            if first:
                _record_end(workdir / "cells" / cell.name, end)
        jax.clear_caches()  # otherwise the programs of all cells remain in memory
        if first:
            tabulate(workdir)
    if first:
        say(f"\n{tabulate(workdir)}\nThe report is {write_report(workdir)}.")
    if failed:
        raise TPPError(
            f"{len(failed)} of {len(chosen)} cells failed: {', '.join(failed)}. "
            f"{workdir / 'cells' / failed[0] / 'error.txt'} contains the error; the "
            "same command tries them again"
        )


def _record_end(folder: pathlib.Path, end: Any) -> None:
    """Writes the error of a failed cell; removes an earlier error."""
    file = folder / "error.txt"
    file.unlink(missing_ok=True)
    if isinstance(end, BaseException):
        folder.mkdir(parents=True, exist_ok=True)
        folders.write(file, "".join(traceback.format_exception(end)))
        say(f"{folder.name} failed: {end}")


def cells_of(config: ml_collections.ConfigDict) -> list[Cell]:
    """Returns the cells of a table, by column, row and seed.

    Args:
      config: Config of a table.

    Raises:
      TPPError: A field of the config is missing or wrong, or a row or column changes an
        unknown field.
    """
    return _cells(_checked(config))


def _cells(table: Table) -> list[Cell]:
    cells = []
    for column, row, seed in itertools.product(table.columns, table.rows, table.seeds):
        config = ml_collections.ConfigDict(table.base.to_dict()).lock()
        for name, changes in (row, column):
            try:
                config.update(dict(changes))
            except KeyError as error:
                key = str(error).partition('Key "')[2].partition('"')[0]
                raise TPPError(
                    f"{name!r} of the table changes an unknown field {key!r}"
                    f"{near_fields(key)}"
                ) from error
            except (TypeError, AttributeError) as error:
                raise TPPError(
                    f"{name!r} of the table changes a field to an unusable value: "
                    f"{' '.join(str(error).split())[:200]}"
                ) from error
        config.seed = seed
        cells.append(Cell(row[0], column[0], seed, config))
    names = [cell.name for cell in cells]
    for cell in cells:
        if names.count(cell.name) > 1:
            raise TPPError(
                f"two cells of the table would share the folder {cell.name}, one of "
                f"them {cell.row!r}, {cell.column!r}: choose names that differ in more "
                "than capitals and signs"
            )
    return cells


def bundles(cells: Sequence[Cell], size: int) -> Iterator[list[Cell]]:
    """Yields the cells that run together.

    They are in one column and have equal fine-tuning, so that at least its steps may
    share a program. The seeds of a row share all steps and remain together if they fit.

    Args:
      cells: Cells from :func:`cells_of`.
      size: Largest number of cells that run together.
    """
    rows_of: dict[Any, list[list[Cell]]] = {}
    for _, seeds in itertools.groupby(cells, lambda cell: (cell.row, cell.column)):
        row = list(seeds)
        fields = flat(row[0].config).items()
        finetune = {name: x for name, x in fields if name.startswith("finetune.")}
        key = row[0].column, json.dumps(finetune, sort_keys=True)
        rows_of.setdefault(key, []).append(row)
    for rows in rows_of.values():
        bundle: list[Cell] = []
        for row in rows:
            if bundle and len(bundle) + len(row) > size:
                yield bundle
                bundle = []
            bundle += row
            while len(bundle) >= size:
                yield bundle[:size]
                bundle = bundle[size:]
        if bundle:
            yield bundle


def _checked(config: ml_collections.ConfigDict) -> Table:
    """Returns the typed form of a table's config.

    Raises:
      TPPError: A field is missing or wrong.
    """
    if missing := set(default_table()) - set(config):
        raise TPPError(
            f"the config has no field {min(missing)}, so it is not that of a table: "
            "use one of configs/tables/, or start from "
            "tpp_jax.commands.sweep.default_table()"
        )
    _check_values(dict(config.items()))
    names = [one.name for one in dataclasses.fields(Table)]
    values: dict[str, Any] = {name: config[name] for name in names if name in config}
    values["headline"] = headline_of_task(
        build(RunConfig, with_defaults(values["base"]))
    )
    table = Table(**values)
    for what in ("rows", "columns", "seeds"):
        keys = [x if what == "seeds" else x[0] for x in values[what]]
        if not keys or len(set(keys)) < len(keys):
            raise TPPError(
                f"the {what} of the table are {keys}: there must be at least one, and "
                "none twice"
            )
    known = metrics_about(table.headline)
    if odd := {*table.metrics, *(entry[2] for entry in table.paper)} - known.keys():
        raise TPPError(
            f"unknown metric {min(odd)!r} of the table: choose from {', '.join(known)}"
        )
    rows, columns = ({name for name, _ in x} for x in (table.rows, table.columns))
    for row, column, *_ in table.paper:
        if row not in rows or column not in columns:
            raise TPPError(
                f"the table has a published value of {row!r}, {column!r}, but no such "
                "row and column"
            )
    return table


def _check_values(table: Mapping[str, Any]) -> None:
    """Checks the form of the fields of a table.

    Raises:
      TPPError: A field has another form.
    """
    if not isinstance(table["base"], ml_collections.ConfigDict):
        raise TPPError(f"the base of the table is {table['base']!r}, must be a config")

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
    if type(replicas := table["replicas"]) is not int or replicas < 0:
        raise TPPError(
            f"the table's replicas is {replicas!r}, must be a whole number of at least "
            "0"
        )


def _description(table: Table, cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "title": table.title,
        "metrics": table.metrics,
        "headline": table.headline.to_dict(),
        "paper": table.paper,
        "base": table.base.to_dict(),
        "cells": [
            {"row": c.row, "column": c.column, "seed": c.seed, "name": c.name}
            for c in cells
        ],
    }


def _run(cells: Sequence[Cell], workdir: pathlib.Path, load: Load) -> list[Any]:
    """Runs cells together, after the dense training that they need.

    Returns:
      The summary of each cell, or the exception that ended it.
    """
    configs = [cell.config for cell in cells]
    dense_folders = [_dense_folder(config, workdir) for config in configs]
    pairs = list(zip(configs, dense_folders, strict=True))
    needed = {folder: _dense(config) for config, folder in pairs if folder}
    try:
        trained = run.train_together(needed.values(), needed, load)
        dense = dict(zip(needed, trained, strict=True))
        ends: list[Any] = []  # of the cells that cannot start
        for config, folder in pairs:
            ends.append(dense[folder] if folder else None)
            if folder:
                config.update({"init": {"model": str(folder / "dense")}})
        ready = [i for i, end in enumerate(ends) if not isinstance(end, BaseException)]
        finished = run.train_together(
            [configs[i] for i in ready],
            [workdir / "cells" / cells[i].name for i in ready],
            load,
        )
    except Exception as error:  # the other cells can still run
        return [error] * len(cells)
    for i, end in zip(ready, finished, strict=True):
        ends[i] = end
    return ends


def _dense_folder(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> pathlib.Path | None:
    """Returns the folder of a cell's dense training; None if it needs none."""
    fields = flat(config)
    try:
        method = find_method(fields["prune.method"])
    except TPPError:
        return None  # the run of the cell reports what is wrong
    pretrained = "pretrain" in method.stages.split()
    if not pretrained or fields["init.model"] or fields["init.torch"]:
        return None
    dense = _dense(config)
    number = zlib.crc32(dense.to_json(sort_keys=True).encode())
    own = is_dotted(fields["task.name"])
    network = fields["task.name"] if own else fields["model.name"]
    network = re.sub(r"[^a-zA-Z0-9.]+", "_", network)
    name = f"{network}_{number:08x}_{fields['seed']}"
    return workdir / "dense" / name


def _dense(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config of the dense training, equal for all cells that share it."""
    dense = ml_collections.ConfigDict(default_config().to_dict())
    shared = ("task", "model", "data", "pretrain", "seed", "num_devices", "parallel")
    shared += ("accumulate", "sync_bn", "skip_nonfinite", "steps_per_dispatch")
    shared += ("log_every", "eval_every", "checkpoint_every")
    dense.update({name: value for name, value in config.items() if name in shared})
    dense.update({"prune": {"method": "none", "ratios": "*:0.5", "skip": ""}})
    return dense
