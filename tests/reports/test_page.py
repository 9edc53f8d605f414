"""The page about a run: whole in one file, and whole in a real browser."""

import base64
import functools
import html.parser
import pathlib
import re
import tempfile
import xml.etree.ElementTree

import numpy as np
import pytest

from tests.browser import look_at, needs_browser
from tests.reports.test_tables_plots import SUMMARY
from tpp_jax.headline import Headline
from tpp_jax.reports import grids, page, plots

JACOBIAN = {
    "mean": 0.5,
    "std": 0.1,
    "min": 0.0,
    "max": 0.9,
    "condition": None,
    "edges": [0.0, 0.5, 1.0],
    "counts": [3, 5],
}
GRAMS = {
    "chosen": np.eye(4),
    "regularized": np.eye(4),
    "cut": np.eye(2),
    "pruned": np.array([True, False, True, False]),
    "layer": np.asarray("conv1"),
}
HISTORY = [
    {"step": 5, "phase": "pretrain", "loss": 1.0, "accuracy": 50.0},
    {"step": 10, "phase": "pretrain", "test_accuracy": 90.0},
    {"step": 15, "phase": "regularize", "strength": 1.0, "gram": 0.1, "loss": 1.0}
    | {"accuracy": 70.0, "pruned_norm": 3.0},
    {"step": 20, "phase": "finetune", "test_accuracy": 89.0},
]


def whole_summary():
    phases = [
        {"seconds": 1.0, "best_accuracy": 91.0, **phase} for phase in SUMMARY["phases"]
    ]
    phases[0]["jacobian"] = JACOBIAN
    config = {**SUMMARY["config"], "note": "</pre><script>alert(1)</script>"}
    return {**SUMMARY, "method": "tpp", "phases": phases, "config": config}


def grid():
    results = {("TPP", "0.9", seed): {"best_accuracy": 80.0 + seed} for seed in (0, 1)}
    paper = {("L1", "0.9", "best_accuracy"): (75.0, None)}
    metrics = ("best_accuracy",)
    return grids.Grid("a table", ("L1", "TPP"), ("0.9",), metrics, results, 4, paper)


@functools.cache
def written(name):
    with tempfile.TemporaryDirectory() as folder:
        if name == "run":
            drawings = plots.of_run(HISTORY, whole_summary(), GRAMS)
            pictures = plots.save(drawings, pathlib.Path(folder))
            return page.of_run(whole_summary(), pictures)
        pictures = plots.save(plots.of_grid(grid()), pathlib.Path(folder))
        return page.of_grid(grid(), pictures, {"l1_0.9_0": "TPPError: <b>no</b>"})


PAGES = "run", "sweep"


class Page(html.parser.HTMLParser):
    """What is in a page: tags, pictures and text."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset"):
                self.pictures.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_nothing_beside_it(name):
    text = written(name)
    found = Page(text)
    assert len(found.pictures) == {"run": 8, "sweep": 2}[name]  # each light and dark
    for picture in found.pictures:
        kind, _, content = picture.partition("base64,")
        assert kind == "data:image/svg+xml;"
        root = xml.etree.ElementTree.fromstring(base64.b64decode(content))
        assert root.tag.endswith("svg")
    assert "script" not in found.tags
    assert not re.search(r'(?:src|href)="(?!data:)', text)


def test_the_page_of_a_run_tells_what_came_of_it():
    text = Page(written("run")).text
    for told in ("net on data", "4.00× fewer FLOPs", "one-shot", "30.00 %", "89.00 %"):
        assert told in text
    for phase in ("pretrain", "regularize", "stabilize", "slice", "finetune"):
        assert phase in text
    assert "<script>alert(1)</script>" in text  # as text


def of_another_task(content):
    """What a run would record whose task is judged by an error in metres."""
    if isinstance(content, dict):
        return {
            k.replace("accuracy", "rms"): of_another_task(x) for k, x in content.items()
        }
    return [*map(of_another_task, content)] if isinstance(content, list) else content


def test_a_report_speaks_of_the_task_s_own_metric(tmp_path):
    headline = Headline("rms", "m", better="lower")
    summary = of_another_task(whole_summary()) | {"headline": headline.to_dict()}
    pictures = plots.save(
        plots.of_run(of_another_task(HISTORY), summary, GRAMS), tmp_path
    )
    text = Page(page.of_run(summary, pictures)).text
    assert "test rms" in text and "30.00 m" in text and "rms at its end" in text
    assert "Rms, loss" in text and "rms, m" in pictures["curves"]
    for shown in (text, pictures["curves"]):
        assert "accuracy" not in shown and "89.00 %" not in shown
    scores = {"best_rms": 1.5, "last_rms": 2.0, "trainability_rms": None}
    found = grids.metrics_of({**summary, **scores})
    names = {"best_rms", "last_rms", "cut_rms", "dense_rms", "speedup", "sparsity"}
    assert found.keys() == names and found["dense_rms"] == 90.0
    metrics, results = ("best_rms", "speedup"), {("TPP", "0.9", 0): found}
    table = grid()._replace(
        metrics=metrics, results=results, paper={}, headline=headline
    )
    assert "## Best test rms of the fine-tuning, m" in grids.markdown(table)
    plots.save(plots.of_grid(table), tmp_path)


def test_the_page_of_a_sweep_tells_what_is_done_and_what_failed():
    text = Page(written("sweep")).text
    assert "2 of 4 runs are done" in text
    assert "80.50 ± 0.50" in text and "– [75.00]" in text
    assert "TPPError: <b>no</b>" in text


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_shows_every_picture_and_complains_of_nothing(name, dark):
    seen = look_at(written(name), dark=dark)
    assert len(seen.pictures) == {"run": 4, "sweep": 1}[name]
    assert all(width > 100 for width in seen.pictures)
    assert seen.wider == 0  # a phone need not scroll the page sideways
    assert seen.complaints == []
