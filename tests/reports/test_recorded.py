"""The pictures of the documentation show what was recorded."""

import json
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tpp_jax.style import DARK, LIGHT

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = sorted((ROOT / "docs" / "images").glob("*.svg"))


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_a_picture_of_the_documentation_is_small_and_knows_both_themes(file):
    text = file.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg") and len(text) < 60_000
    inks = [color in text for color in (LIGHT.ink, DARK.ink)]
    expected = {"hero_light.svg": [True, False], "hero_dark.svg": [False, True]}
    assert inks == expected.get(file.name, [True, True])


def test_the_hero_shows_the_recorded_numbers():
    record = ROOT / "benchmarks" / "results" / "demo_cpu.json"
    expected = set()
    for run in json.loads(record.read_text())["runs"].values():
        summary = run["summary"]
        [cut] = [phase for phase in summary["phases"] if phase["name"] == "slice"]
        scores = cut["accuracy_after"], summary["one_shot"]["accuracy_after"]
        expected |= {
            f"{score:.1f} %" for score in (*scores, summary["dense"]["accuracy"])
        }
    text = (ROOT / "docs" / "images" / "hero_light.svg").read_text(encoding="utf-8")
    assert set(re.findall(r"[\d.]+ %", text)) == expected and len(expected) == 5


@pytest.mark.parametrize("name", ["digits", "table1_cpu", "mlp7", "recovery"])
def test_the_page_of_a_recorded_table_has_its_csv(name):
    folder = ROOT / "docs" / "tables" / name
    page = (folder / "report.html").read_text(encoding="utf-8")
    table = (folder / "table.md").read_text(encoding="utf-8")
    numbers = re.findall(r"\d+\.\d+ ± \d+\.\d+", table)
    assert numbers and all(number in page for number in numbers)
