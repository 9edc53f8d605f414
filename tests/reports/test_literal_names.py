"""Names are shown as they are: no formula, no markup, no row left out."""

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import matplotlib
import pytest
import rich.console

import tpp_jax as tpp
from tpp_jax.analysis.groups_text import group_report
from tpp_jax.pruning.flops import Count, LayerCount
from tpp_jax.reports import grids, plots, tables

NAMES = [r"$\frac$", "$x$", "a$b", r"\$5$", r"\alpha", "$$", "_hidden", "a_b^c", "100%"]
TEXT = "{http://www.w3.org/2000/svg}text"


def summary_of(name):
    return {
        "config": {"model": {"name": name}, "data": {"name": name}},
        "method": "tpp",
        "one_shot": {"accuracy_after": 50.0},
        "dense": {"params": 1, "flops": 1, "accuracy": 90.0},
        "pruned": {"params": 1, "flops": 1, "accuracy": 89.0},
        "phases": [
            {"name": name, "steps": 2, "seconds": 1.0, "accuracy": 90.0,
             "best_accuracy": 90.0,
             "jacobian": {"mean": 1.0, "std": 0.1, "min": 0.5, "max": 2.0,
                          "condition": None, "edges": [0, 1, 2], "counts": [1, 2]}}
        ],
        "speedup": 1.0,
        "layers": {name: {"kept": 1, "total": 2}},
    }  # fmt: skip


GRAMS = {"chosen": [[1.0, 0.0], [0.0, 1.0]], "pruned": [False, True]}


def texts_of(pictures):
    """All texts of some SVGs."""
    found = []
    for picture in pictures.values():
        root = ElementTree.fromstring(picture.wide)
        found += ["".join(element.itertext()) for element in root.iter(TEXT)]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_titles_of_a_run_show_names_as_they_are(tmp_path, name):
    rows = [{"step": n, "phase": name, "test_accuracy": 90.0} for n in (1, 2)]
    drawings = plots.of_run(rows, summary_of(name), {**GRAMS, "layer": name})
    assert list(drawings) == ["curves", "channels", "jacobian", "gram"]
    titled = {title: drawings[title] for title in ("curves", "gram")}
    texts = texts_of(plots.save(titled, tmp_path))
    assert any(text.startswith(f"{name} on {name}: 1.00×") for text in texts)
    assert f"W Wᵀ of {name}" in texts


def test_bars_and_histograms_of_a_run_show_names_as_they_are(tmp_path):
    run = summary_of("a")
    run["phases"] = [phase for name in NAMES for phase in summary_of(name)["phases"]]
    run["layers"] = {name: run["layers"]["a"] for name in NAMES}
    drawings = plots.of_run([], run, {})
    listed = {title: drawings[title] for title in ("channels", "jacobian")}
    texts = texts_of(plots.save(listed, tmp_path))
    for name in NAMES:
        assert texts.count(name) == 1  # the layer's bar
        assert texts.count(f"after {name}") == 1


def grid_of(names, columns=("0.5",)):
    entries = [(row, column) for row in names for column in columns]
    return grids.Grid(
        title="a table",
        rows=tuple(names),
        columns=tuple(columns),
        metrics=("best_accuracy",),
        results={(r, c, 0): {"best_accuracy": 90.0} for r, c in entries},
        planned=len(entries),
        paper={(names[0], columns[0], "best_accuracy"): (91.0, None)},
    )


def test_pictures_of_a_sweep_show_every_row_and_column_as_it_is(tmp_path):
    grid = grid_of(NAMES, columns=["$1$", "_2"])
    texts = texts_of(plots.save(plots.of_grid(grid), tmp_path))
    for name in [*NAMES, "$1$", "_2", "◇ published value"]:
        assert texts.count(name) == 1


def curves(rows):
    """The only picture of a run that depends on the rows of its log."""
    return {"curves": plots.of_run(rows, summary_of("a"), {})["curves"]}


def test_the_scale_of_a_logarithm_is_still_a_formula(tmp_path):
    rows = [{"step": n, "phase": "pretrain", "loss": 10.0**-n} for n in range(9)]
    pictures = plots.save(curves(rows), tmp_path)
    assert not [text for text in texts_of(pictures) if "mathdefault" in text]


def test_characters_that_no_svg_may_hold_are_replaced(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font may lack
        pictures = plots.save(plots.of_grid(grid_of(["a\x01b", "c\udcff"])), tmp_path)
    assert {"a\ufffdb", "c\ufffd"} <= set(texts_of(pictures))


@pytest.mark.parametrize("setting", [{"text.usetex": True}, {"text.parse_math": False}])
def test_pictures_do_not_depend_on_the_settings_of_whoever_draws_them(
    tmp_path, setting
):
    drawings = plots.of_run([], summary_of("$x$"), {})
    plain = plots.save(drawings, tmp_path)
    with matplotlib.rc_context(setting):
        assert plots.save(drawings, tmp_path) == plain


ROWS = [
    {"step": 1, "phase": "pretrain", "loss": math.nan, "test_accuracy": math.nan},
    {"step": 2, "phase": "pretrain", "loss": math.inf, "test_accuracy": 10**400},
    {"step": 3, "phase": "pretrain", "loss": "high", "test_accuracy": None},
    {"step": 4, "phase": "pretrain", "loss": 1.0, "test_accuracy": 50.0},
    {"step": 5, "loss": 1.0},
    {"step": 6, "phase": ["pretrain"], "loss": 1.0},
    {"phase": "pretrain", "loss": 1.0, "test_accuracy": 1.0},
    {"step": math.nan, "phase": "pretrain", "gram": -1.0, "pruned_norm": math.nan},
]


@pytest.mark.parametrize("rows", [ROWS, *([row] for row in ROWS), []], ids=str)
def test_curves_are_drawn_of_any_rows(tmp_path, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = plots.save(curves(rows), tmp_path)
    svg = pictures["curves"].wide
    assert "test_accuracy" not in svg and len(svg) > 1000


@pytest.mark.parametrize("name", [*NAMES, "a|b", "<b>", "`x`", "*bold*", "two\nlines"])
def test_a_markdown_table_keeps_its_columns(name):
    text = grids.markdown(grid_of([name], columns=[name, "0.9"]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    bars = [len(re.findall(r"(?<!\\)\|", line.replace(r"\\", ""))) for line in lines]
    assert bars == [4, 4, 4]
    assert not re.search(r"(?<!\\)[$<*`]", text.replace(r"\\", "").partition("##")[2])


@pytest.mark.parametrize("name", ["[old]", "[/b]x", "layer[0]", "[red]y", ":smile:"])
def test_tables_show_names_as_they_are_on_any_console(name):
    layer = LayerCount(channels=2, params=4, flops=8)
    count = Count(params=4, flops=8, layers={name: layer})
    out = io.StringIO()
    rich.console.Console(file=out, width=80).print(tables.layer_table(count, count))
    assert f" {name} " in out.getvalue()


def test_a_long_name_is_folded_and_not_cut():
    name = "a" * 150
    layer = LayerCount(channels=2, params=4, flops=8)
    count = Count(params=4, flops=8, layers={name: layer})
    out = io.StringIO()
    rich.console.Console(file=out, width=60).print(tables.layer_table(count, count))
    assert out.getvalue().count("a") >= 150 and "…" not in out.getvalue()


def test_groups_with_brackets_are_shown_as_they_are():
    def mlp(p, x):
        return jnp.tanh(x @ p["[old]"]) @ p["[/b]"]

    params = {"[old]": jnp.ones((4, 8)), "[/b]": jnp.ones((8, 2))}
    groups = tpp.channel_groups(mlp, jnp.ones((1, 4)), params=params)
    out = io.StringIO()
    rich.console.Console(file=out, width=100).print(group_report(groups, None, 100))
    assert "[old]" in out.getvalue() and "[/b]" in out.getvalue()
