"""A sweep runs a grid, shares dense training, survives failed cells and reports."""

import csv
import importlib
import io
import itertools
import json
import pathlib
import shutil
import statistics

import numpy as np
import pytest

from tests.end_to_end.runs import arrays_of, summary_of
from tests.experiment.test_errors import small_config
from tpp_jax.commands.report import read_grid, write_report
from tpp_jax.commands.sweep import bundles, cells_of, default_table, sweep
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.config import check_fields, check_values
from tpp_jax.experiment.setup import make_setup

pytestmark = pytest.mark.usefixtures("sketches")

TABLES = sorted(
    file.stem
    for file in (pathlib.Path(__file__).parents[2] / "configs" / "tables").glob("*.py")
    if file.stem != "methods"
)


def small_table(**fields):
    """Returns a table of two methods, two seeds and two columns; one column fails."""
    table = default_table()
    table.title = "small"
    table.base = small_config()
    table.rows = (("L1", {"prune": {"method": "oneshot"}}), ("TPP", {}))
    table.columns = (
        ("half", {"prune": {"ratios": "*net*:0.5"}}),
        ("none", {"prune": {"ratios": "*conv*:0.5"}}),
    )
    table.seeds = (0, 1)
    table.paper = (("L1", "half", "best_accuracy", 90.0, 0.5),)
    table.update(fields)
    return table


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Folder and error message of a sweep in which one column failed."""
    workdir = tmp_path_factory.mktemp("sweep")
    with pytest.raises(TPPError) as error:
        sweep(small_table(), workdir)
    return workdir, str(error.value)


def test_a_cell_that_fails_stops_no_other(swept):
    workdir, said = swept
    done = {file.parent.name for file in workdir.glob("cells/*/summary.json")}
    assert done == {f"{row}_half_{seed}" for row in ("l1", "tpp") for seed in (0, 1)}
    assert said.startswith("4 of 8 cells failed: l1_none_0")
    error = (workdir / "cells" / "l1_none_0" / "error.txt").read_text()
    assert "'*conv*' matches no layer" in error


@pytest.mark.usefixtures("no_pictures")
def test_dense_training_is_shared_and_changes_nothing(swept, tmp_path):
    workdir, _ = swept
    assert len(list((workdir / "dense").iterdir())) == 2  # one for each seed
    [cell] = [c for c in cells_of(small_table()) if c.name == "tpp_half_1"]
    run.train(cell.config, tmp_path)  # with its own dense training
    shared, alone = workdir / "cells" / cell.name, tmp_path
    for name, array in arrays_of(alone).items():
        np.testing.assert_array_equal(array, arrays_of(shared)[name], err_msg=name)
    ours, own = summary_of(shared)["phases"], summary_of(alone)["phases"]
    assert own[0]["name"] == "pretrain"
    assert ours == own[1:]


def test_cells_that_fine_tune_alike_run_together_and_seeds_stay_together():
    rows = (
        ("Scratch", {"prune": {"method": "scratch"}, "finetune": {"epochs": 2}}),
        ("L1", {"prune": {"method": "oneshot"}}),
        ("Other", {"prune": {"method": "scratch"}, "finetune": {"epochs": 2}}),
        ("TPP", {}),
        ("Extra", {"prune": {"method": "extra"}}),
    )
    half = (("half", {"prune": {"ratios": "*net*:0.5"}}),)
    cells = cells_of(small_table(rows=rows, columns=half, seeds=(0, 1)))

    def grouped(size):
        return [[(c.row, c.seed) for c in group] for group in bundles(cells, size)]

    both = {row: [(row, 0), (row, 1)] for row, _ in rows}
    assert grouped(1) == [[one] for one in itertools.chain.from_iterable(grouped(100))]
    assert grouped(100) == [
        both["Scratch"] + both["Other"],
        both["L1"] + both["TPP"] + both["Extra"],
    ]
    assert grouped(5) == [
        both["Scratch"] + both["Other"],
        both["L1"] + both["TPP"],
        both["Extra"],
    ]


@pytest.mark.usefixtures("no_pictures")
def test_cells_may_share_a_program(tmp_path):
    table = small_table(only="*_half_*", replicas=4)
    sweep(table, tmp_path)
    assert len(read_grid(tmp_path).results) == 4


def test_run_again_it_trains_only_what_is_missing(swept, capsys):
    workdir, _ = swept
    before = {f: f.stat().st_mtime_ns for f in workdir.glob("cells/*/summary.json")}
    with pytest.raises(TPPError, match="4 of 8 cells failed"):
        sweep(small_table(), workdir)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert "finetune" not in capsys.readouterr().out.partition("##")[0]


def test_the_tables_hold_mean_and_spread_beside_what_is_published(swept):
    workdir, _ = swept
    found = [
        json.loads((workdir / "cells" / f"l1_half_{i}" / "summary.json").read_text())
        for i in (0, 1)
    ]
    accuracies = [summary["best_accuracy"] for summary in found]
    mean, std = statistics.fmean(accuracies), statistics.pstdev(accuracies)
    rows = list(csv.DictReader(io.StringIO((workdir / "table.csv").read_text())))
    [row] = [r for r in rows if r["paper"]]
    assert (row["row"], row["column"], row["runs"]) == ("L1", "half", "2")
    assert float(row["mean"]) == pytest.approx(mean)
    assert float(row["std"]) == pytest.approx(std)
    assert float(row["difference"]) == pytest.approx(mean - 90)
    text = (workdir / "table.md").read_text()
    assert (
        f"| L1 | {mean:.2f} ± {std:.2f} [90.00 ± 0.50, {mean - 90:+.2f}] | – |" in text
    )
    assert "4 of 8 runs are done" in text


def test_a_report_can_be_made_at_any_time(swept):
    workdir, _ = swept
    page = write_report(workdir).read_text()
    assert "4 of 8 runs are done" in page
    assert "tpp_none_1" in page and "matches no layer" in page
    for name in ("l1_half_0", "l1_half_1", "tpp_half_0", "tpp_half_1"):
        assert f'href="cells/{name}/report.html"' in page
    assert page.count('href="cells/') == 4 * len(read_grid(workdir).metrics)
    page = write_report(workdir / "cells" / "tpp_half_0").read_text()
    assert "regularized, after the cut" in page
    assert 'href="../../report.html"' in page and "tpp_jax" in page


@pytest.mark.usefixtures("no_pictures")
def test_some_of_the_cells_can_be_chosen(tmp_path):
    sweep(small_table(only="l1_half_1"), tmp_path)
    assert read_grid(tmp_path).results.keys() == {("L1", "half", 1)}
    with pytest.raises(TPPError, match=r"'tpp-\*' matches no cell .* l1_half_0"):
        sweep(small_table(only="tpp-*"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": ()}, "the rows of the table are \\[\\]"),
        ({"seeds": (1, 1)}, "the seeds of the table are \\[1, 1\\]"),
        ({"metrics": ("speed",)}, "unknown metric 'speed' .* speedup"),
        ({"rows": (("L1", {"prune": {"ratois": "x"}}),)}, "'L1' of the table changes"),
        ({"rows": (("L1", {"seed": "x"}),)}, "'L1' of the table changes"),
        ({"paper": (("a", "b", "speedup", 1.0, None),)}, "published value of 'a', 'b'"),
        ({"paper": (("L1", "half", "speed", 1.0, None),)}, "unknown metric 'speed'"),
        ({"paper": (("L1", "half", "speedup", "2", None),)}, "the paper of the table"),
        ({"paper": (("L1", "half"),)}, "the paper of the table .* must be a list"),
        ({"rows": ("L1", "TPP")}, "the rows of the table are \\['L1'\\], must be"),
        ({"rows": (("L1",),)}, "the rows of the table are .* must be a list or tuple"),
        ({"columns": (("half", "0.5"),)}, "the columns of the table are .* must be"),
        ({"rows": (("L1", {}), ("l1", {}))}, "cells .* share the folder l1_half_0"),
        (
            {"rows": (("L1", {"prune": 3}),)},
            "'L1' of the table changes a field to",
        ),
        ({"seeds": ("0",)}, "seeds of the table are .* must be .* whole numbers"),
        ({"seeds": (True,)}, "seeds of the table are .* must be .* whole numbers"),
        ({"metrics": (1,)}, "metrics of the table are .* must be .* names"),
        ({"replicas": -1}, "the table's replicas is -1, must be"),
    ],
)
def test_a_wrong_table_is_told_before_any_training(tmp_path, fields, message):
    with pytest.raises(TPPError, match=message):
        sweep(small_table(**fields), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_folder_of_neither_a_sweep_nor_a_run_has_no_report(tmp_path):
    with pytest.raises(TPPError, match="neither the folder of a sweep nor that of"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": [{}]}', "\x00"])
def test_a_table_json_that_is_none_is_named(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(
        TPPError, match=r"table.json is damaged, or not that of a sweep"
    ):
        write_report(tmp_path)


def test_a_cell_of_a_damaged_summary_is_named(swept, tmp_path):
    workdir = shutil.copytree(swept[0], tmp_path / "copy")
    (workdir / "cells" / "l1_half_0" / "summary.json").write_text('{"phases": [')
    with pytest.raises(TPPError, match=r"l1_half_0/summary.json cannot be read"):
        write_report(workdir)


@pytest.mark.parametrize("name", ["table.json", "cells", "report.html"])
def test_what_is_of_the_wrong_kind_in_the_folder_of_a_sweep_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_text("mine") if name == "cells" else path.mkdir()
    with pytest.raises(TPPError, match=f"{name} is not a .* move it away"):
        sweep(small_table(), tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_of_a_sweep_may_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TPPError, match="the folder of the run cannot be created"):
        sweep(small_table(), tmp_path / "file")


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_cells_that_are_configs(name):
    cells = cells_of(importlib.import_module(f"configs.tables.{name}").get_config())
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        check_fields(cell.config)
        check_values(cell.config)


def test_every_method_of_the_small_table_can_start():
    table = importlib.import_module("configs.tables.digits").get_config()
    for cell in cells_of(table):
        if (cell.column, cell.seed) == ("0.9", 0):
            make_setup(cell.config)
