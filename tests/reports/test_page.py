"""The page about a run: complete in one file, and shown by a real browser."""

import base64
import csv
import functools
import html.parser
import io
import re
import xml.etree.ElementTree

import pytest

from tests.browser import check, look_at, needs_browser
from tests.reports.runs import (
    EXPORTS,
    GRAMS,
    HISTORY,
    MADE,
    PROFILE,
    grid,
    whole_summary,
)
from tpp_jax import style
from tpp_jax.headline import Headline
from tpp_jax.reports import canvas, grids, page, plots, story

LINKS = {("TPP", "0.9", seed): f"cells/tpp_0.9_{seed}/report.html" for seed in (0, 1)}
LINKS["L2", "0.9", 0] = "cells/l2_0.9_0/report.html"


def rendered(drawings):
    return {name: canvas.render(drawing) for name, drawing in drawings.items()}


def stopped_summary():
    """The summary of a run that was stopped before its cut."""
    whole = whole_summary()
    begun = {"name": "regularize", "steps": 3, "seconds": None, "accuracy": None}
    return whole | {
        "status": "stopped",
        "phases": [whole["phases"][0], begun],
        "dense": {"accuracy": 90.0},
        "pruned": None,
        "speedup": None,
        "layers": {},
    }


@functools.cache
def written(name):
    if name == "sweep":
        failed = {"l1_0.9_0": "TPPError: <b>no</b>"}
        pictures = rendered(plots.of_grid(grid()))
        return page.of_grid(grid(), pictures, failed, LINKS, {}, {"seed": 0})
    if name == "stopped":
        drawings = plots.of_run(HISTORY[:3], stopped_summary(), {})
        return page.of_run(stopped_summary(), rendered(drawings))
    drawings = plots.of_run(HISTORY, whole_summary(), GRAMS, PROFILE)
    table = "../../report.html"
    files = page.Files(HISTORY, PROFILE, EXPORTS, made=MADE, table=table)
    return page.of_run(whole_summary(), rendered(drawings), files)


PAGES = {"run": 5, "sweep": 1, "stopped": 2}  # and the number of their pictures


class Page(html.parser.HTMLParser):
    """What is in a page: tags, pictures, links and text."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.tags, self.links, self.text = [], [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        self.pictures += [x for k, x in attributes if k in ("src", "srcset")]
        if tag == "a":
            self.links[named["href"]] = named.get("download")

    def handle_data(self, data):
        self.text += data


def decoded(address):
    return base64.b64decode(address.partition("base64,")[2]).decode()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_nothing_but_itself(name):
    text = written(name)
    found = Page(text)
    # Each picture is there for both themes and both widths.
    assert len(found.pictures) == 4 * PAGES[name]
    for picture in found.pictures:
        assert picture.startswith("data:image/svg+xml;base64,")
        assert xml.etree.ElementTree.fromstring(decoded(picture)).tag.endswith("svg")
    assert len(set(found.pictures)) == len(found.pictures)
    assert "script" not in found.tags
    assert not re.search(r'(?:src|srcset)="(?!data:)', text)
    near = {link for link in found.links if not link.startswith("data:")}
    expected = {"run": {"../../report.html"}, "sweep": set(LINKS.values())}
    assert near == expected.get(name, set())


def test_the_page_of_a_run_begins_with_the_figures_that_matter():
    text = Page(written("run")).text
    before = text.partition("What happened")[0]
    for figure in ("90.00 → 89.00 %", "−1.00 points", "4.00× fewer", "60.0 % less"):
        assert figure in before
    for figure in ("2.00× faster", "20.00 → 10.00 ms", "4.00 kB → 1.60 kB"):
        assert figure in before
    assert "1,000 → 400" in before and "--mode=profile" not in before


def test_the_page_of_a_run_tells_its_story():
    text = Page(written("run")).text
    titles = re.findall(r"<b>(.*?)</b>", written("run").partition("<ol")[2])
    expected = ["Dense training", "Choice of the channels", "Regularizing", "Settling"]
    assert titles == [*expected, "Cut", "Fine-tuning"]
    for told in ("net on data", "TPP", "30.00 %", "88.00 % before the cut, 87.50 %"):
        assert told in text
    for told in ("python launch.py --workdir='a b'", "2026-11-30", "a runtime"):
        assert told in text
    assert "<script>alert(1)</script>" in text  # as text


@pytest.mark.parametrize("weight", [0.0, 1000.0])
def test_filters_are_said_to_be_decorrelated_only_by_a_gram_penalty(weight):
    summary = whole_summary()
    summary["config"] = summary["config"] | {"prune": {"gram_weight": weight}}
    [text] = [x.text for x in story.chapters(summary) if x.stage == "regularize"]
    assert ("decorrelates" in text) == bool(weight)


def test_the_data_of_a_page_can_be_downloaded():
    links = Page(written("run")).links
    files = {name: decoded(link) for link, name in links.items() if name}
    assert list(files) == ["metrics.csv", "scores.csv", "channels.csv", "profile.csv"]
    rows = list(csv.DictReader(io.StringIO(files["metrics.csv"])))
    assert len(rows) == len(HISTORY) and rows[1]["test_accuracy"] == "90.0"
    assert rows[1]["loss"] == "" and files["channels.csv"].splitlines()[1] == "a,8,4"
    [(link, name)] = [x for x in Page(written("sweep")).links.items() if x[1]]
    assert name == "table.csv" and decoded(link) == grids.csv(grid())


def of_another_task(content):
    """What a run would record whose task is judged by an error in metres."""
    if isinstance(content, dict):
        return {
            k.replace("accuracy", "rms"): of_another_task(x) for k, x in content.items()
        }
    return [*map(of_another_task, content)] if isinstance(content, list) else content


def test_a_report_speaks_of_the_task_s_own_metric():
    headline = Headline("rms", "m", better="lower")
    summary = of_another_task(whole_summary()) | {"headline": headline.to_dict()}
    pictures = rendered(plots.of_run(of_another_task(HISTORY), summary, GRAMS))
    text = Page(page.of_run(summary, pictures)).text
    assert "test rms" in text and "30.00 m" in text and "rms 89.00 m at the end" in text
    assert "test rms, m" in pictures["curves"].wide
    for shown in (text, *pictures["curves"]):
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
    assert "test rms, m" in rendered(plots.of_grid(table))["best_rms"].wide


def test_the_page_of_a_sweep_tells_what_is_done_and_what_failed():
    text = Page(written("sweep")).text
    assert "3 of 5 runs are done" in text
    assert "80.50 ± 0.50" in text and re.search(r"–\s*\[75.00\]", text)
    assert "TPPError: <b>no</b>" in text
    assert "1 of the rows did not run" in text and "pruning ratio" in text
    assert re.search(r"★\s*80.50", text) and text.count("★") == 2  # and what it means


def test_the_best_is_the_lowest_where_lower_is_better():
    headline = Headline("rms", "m", better="lower")
    results = {
        (row, "a", 0): {"best_rms": x, "speedup": x} for row, x in (("A", 1), ("B", 2))
    }
    rows, metrics = ("A", "B"), ("best_rms", "speedup", "sparsity")
    table = grids.Grid("t", rows, ("a",), metrics, results, 2, {}, headline)
    best = {metric: grids.best_rows(table, "a", metric) for metric in metrics}
    assert best == {"best_rms": ["A"], "speedup": ["B"], "sparsity": []}


def test_a_table_is_read_from_its_csv_as_it_was():
    again = grids.read_csv(grids.csv(grid()), "a table", 5)
    rows = [row for row in grid().rows]
    for row in rows:
        one, other = (
            grids.entry(g, row, "0.9", "best_accuracy") for g in (grid(), again)
        )
        assert other == pytest.approx(one, nan_ok=True)
    assert (again.done, again.planned, again.seeds) == (3, 5, 2)


def test_a_run_that_was_stopped_has_a_page():
    text = Page(written("stopped")).text
    assert "This run is not finished" in text and "Regularizing" in text
    assert "None" not in text and "nan" not in text


def test_figures_are_those_of_what_is_known():
    summary = whole_summary()
    none = summary | {"pruned": None, "one_shot": {"accuracy_after": None}}
    names = [figure.name for figure in story.figures(none, None)]
    assert names == ["test accuracy", "parameters", "FLOPs of one example"]
    untrained = summary | {"dense": summary["dense"] | {"accuracy": None}}
    first = next(story.figures(untrained, None))
    assert first.value == "89.00 %" and first.detail == "of the pruned network"


@needs_browser
def test_a_browser_shows_every_page_on_a_phone_and_in_the_dark():
    looks = look_at({name: written(name) for name in PAGES})
    assert len(looks) == 4 * len(PAGES)
    check(looks)
    for (name, width, _), seen in looks.items():
        drawn = style.PHONE.width if width < 500 else style.WIDE.width
        assert seen.pictures == [drawn] * PAGES[name]


@needs_browser
def test_what_a_browser_measures_is_seen():
    bad = '<body style="color:#aaa;background:#fff"><p style="width:2000px">text</p>'
    bad += (
        '<p style="border:1px solid #ddd">x</p><img src="data:image/png;base64,AAAA">'
    )
    bad += '<script>console.error("no")</script></body>'
    for seen in look_at({"bad": bad}).values():
        assert seen.wider > 500 and seen.pictures == [0]
        assert min(seen.text)[0] < 3 and min(seen.lines)[0] < 2
        assert len(seen.complaints) >= 4
