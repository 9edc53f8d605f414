"""Pictures are in the colors of the style sheet, whose contrast is computed."""

import functools
import itertools
import re
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest

import tpp_jax as tpp
from tests.reports.runs import GRAMS, HISTORY, PROFILE, grid, whole_summary
from tpp_jax import style
from tpp_jax.analysis.groups_svg import picture_of
from tpp_jax.reports import canvas, plots

SVG = "{http://www.w3.org/2000/svg}"
THEMES = {"light": style.LIGHT, "dark": style.DARK}


def luminance(color: str) -> float:
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in values
    ]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_guidelines():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("theme", THEMES)
def test_text_and_lines_stand_out_from_their_background(theme):
    palette = THEMES[theme]
    for name, paper in itertools.product(
        ("ink", "soft", "strong", "second"), (palette.paper, palette.surface)
    ):
        assert contrast(getattr(palette, name), paper) >= 4.5, name
    assert contrast(palette.rival, palette.paper) >= 4.5
    for color in (palette.line, *style.LANES):
        assert contrast(color, palette.paper) >= 3
    for lane in style.LANES:  # the marks of layers are drawn on them
        assert contrast(palette.ink, lane) >= 3
    for i, cell in enumerate(palette.heat):
        assert contrast(palette.ink if i < 3 else palette.paper, cell) >= 4.5
    assert [luminance(c) for c in palette.heat] == sorted(
        map(luminance, palette.heat), reverse=theme == "light"
    )
    for hue in (style.POSITIVE, style.NEGATIVE):
        assert contrast("#{:02x}{:02x}{:02x}".format(*hue), palette.paper) >= 3


def test_every_color_of_the_light_theme_has_one_counterpart():
    light, dark = style.LIGHT.colors(), style.DARK.colors()
    assert light.keys() == dark.keys() and len(set(light.values())) == len(light)
    everything = " ".join(light.values())
    assert style.on_dark(everything) == " ".join(dark.values())


@functools.cache
def all_pictures() -> dict[str, canvas.Picture]:
    """Every kind of picture that the library draws."""

    def mlp(p, x):
        return jnp.tanh(x @ p["w1"]) @ p["w2"]

    params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
    groups = tpp.channel_groups(mlp, jnp.ones((1, 4)), params=params)
    plan = tpp.make_plan(groups, params, {"w1": 0.5})
    costs = tpp.Sensitivity(
        groups=("w1",),
        sizes=(8,),
        ratios=(0.25, 0.5, 0.75),
        removed=np.array([[2, 4, 6]]),
        costs=np.array([[1e-4, 0.05, 1.0]]),
        baseline=0.25,
    )
    drawings = plots.of_run(HISTORY, whole_summary(), GRAMS, PROFILE)
    drawings |= plots.of_grid(grid()) | plots.of_sensitivity(costs)
    found = {name: canvas.render(drawing) for name, drawing in drawings.items()}
    return found | {
        "groups": canvas.Picture(
            *(picture_of(groups, plan, size) for size in (style.WIDE, style.PHONE))
        )
    }


KINDS = ("curves", "channels", "profile", "jacobian", "gram", "best_accuracy")
KINDS += ("sensitivity", "groups")


def test_no_kind_of_picture_is_missing():
    assert set(all_pictures()) == set(KINDS)


def painted(element) -> dict[str, str]:
    """The colors of an element, by property."""
    found = {key: element.get(key) for key in ("fill", "stroke")}
    for part in (element.get("style") or "").split(";"):
        key, _, value = part.partition(":")
        if key.strip() in found:
            found[key.strip()] = value.strip()
    return {key: x for key, x in found.items() if x and x.startswith("#")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_has_only_colors_of_the_sheet_and_none_is_faint(kind):
    for svg, theme in itertools.product(all_pictures()[kind], THEMES):
        palette = THEMES[theme]
        known = {*palette.colors().values(), *style.LANES}
        root = ElementTree.fromstring(svg if theme == "light" else style.on_dark(svg))
        texts = 0
        for element in root.iter():
            colors = painted(element)
            assert set(colors.values()) <= known, (kind, theme, colors)
            assert not re.search(r"opacity: (?!0[;\s]|1)", element.get("style") or "")
            assert element.get("fill-opacity") is None
            if element.tag == f"{SVG}text":
                texts += 1
                color = colors.get("fill", palette.ink)
                on_cell = kind == "sensitivity" and color == palette.paper
                assert on_cell or contrast(color, palette.paper) >= 4.5
            elif "stroke" in colors and kind != "sensitivity":
                line = colors["stroke"] not in (palette.paper, palette.surface)
                assert not line or contrast(colors["stroke"], palette.paper) >= 3
        assert texts > 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_for_a_phone_is_as_wide_as_the_screen_and_legible(kind):
    for svg, size in zip(all_pictures()[kind], (style.WIDE, style.PHONE), strict=True):
        root = ElementTree.fromstring(svg)
        assert float(root.get("width")) == size.width
        for text in root.iter(f"{SVG}text"):
            look = f"font-size: {text.get('font-size', '11')} {text.get('style')}"
            sizes = [float(x) for x in re.findall(r"font-size: ([\d.]+)", look)]
            assert sizes[-1] >= 9.5
            assert -1 <= float(text.get("x")) <= size.width


def test_numbers_in_texts_are_not_rounded_with_those_of_the_drawing():
    drawing = functools.partial(plots.of_run, HISTORY)
    summary = whole_summary()
    summary["phases"][3] |= {"accuracy_after": 87.512}
    summary["config"] = {"model": {"name": "a 1.23456"}, "data": {"name": "b"}}
    svg = canvas.render(drawing(summary, {})["curves"]).wide
    assert "a 1.23456 on b" in svg and not re.search(r'x="\d+\.\d{3}', svg)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.001, "0.001"), (1e-7, "1e−7"), (12000, "12,000"), (0, "0"), (2.5e6, "2.5 M")],
)
def test_numbers_at_axes_are_plain(value, text):
    assert canvas.plain(value) == text


def test_labels_keep_their_distance_and_stay_near_their_lines():
    places = [0.5, 0.5, 0.51, 0.9]
    found = canvas.spread(places, 0.1)
    gaps = np.diff(sorted(found))
    assert gaps.min() >= 0.1 - 1e-6
    assert np.abs(np.subtract(found, places)).max() <= 0.2


def test_an_adaptive_picture_has_both_themes_and_its_own_paper():
    svg = style.adaptive(all_pictures()["channels"].wide)
    root = ElementTree.fromstring(svg)
    assert root.find(f"{SVG}rect").get("width") == "100%"
    for color in (style.LIGHT.ink, style.DARK.ink, style.LIGHT.paper, style.DARK.paper):
        assert color in svg
