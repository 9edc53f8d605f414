"""The pictures of docs/images and the pages of docs/tables, from recorded results.

    python -m benchmarks.pictures

Draws the hero and the curves and groups of the demo from
``benchmarks/results/demo_cpu.json`` (``python -m benchmarks.demo``), the tables from
``docs/tables/*/table.csv``, and the costs at scale from
``benchmarks/results/scaling_cpu.json``. A picture follows the theme of the page that it
is on; the hero is in two files. Nothing is measured.
"""

import functools
import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.patches
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tpp_jax as tpp
from benchmarks import machine, scaling_plots
from tpp_jax import style
from tpp_jax.analysis.groups_svg import picture_of
from tpp_jax.commands.sweep import cells_of
from tpp_jax.reports import canvas, grids, page, plots

DOCS = pathlib.Path(__file__).parents[1] / "docs"
IMAGES = DOCS / "images"
# Metric and name of the picture of a recorded table in docs/results.md, if any.
TABLES = {
    "digits": ("cut_accuracy", "digits_table"),
    "table1_cpu": ("best_accuracy", "table1_cpu"),
    "mlp7": ("jsv_mean", "mlp7_jsv_mean"),
    "recovery": ("", ""),
    "recovery_cpu": ("", ""),
}


def main() -> None:
    demo = json.loads((machine.RESULTS / "demo_cpu.json").read_text())["runs"]
    run = demo["0.5"]
    of_demo = plots.of_run(run["history"], run["summary"], {})
    drawings = {"hero": functools.partial(_hero, demo)}
    drawings["digits_curves"] = of_demo["curves"]
    for name, (metric, picture) in TABLES.items():
        grid = _recorded(name)
        of_grid = plots.of_grid(grid)
        if metric:
            drawings[picture] = of_grid[metric]
        pictures = {key: canvas.render(one) for key, one in of_grid.items()}
        text = page.of_grid(grid, pictures, {})
        (DOCS / "tables" / name / "report.html").write_text(text, encoding="utf-8")
    scaling = json.loads((machine.RESULTS / "scaling_cpu.json").read_text())
    drawings |= scaling_plots.of_result(scaling)
    svgs = {name: canvas.render(drawing).wide for name, drawing in drawings.items()}
    svgs["digits_groups"] = _groups(run["summary"]["config"])
    for name, wide in svgs.items():
        versions = {name: style.adaptive(wide)}
        if name == "hero":  # GitHub's README names one for each theme
            versions = {"hero_light": wide, "hero_dark": style.on_dark(wide)}
        for file, svg in versions.items():
            (IMAGES / f"{file}.svg").write_text(svg, encoding="utf-8")
            print(IMAGES / f"{file}.svg", len(svg))


def _groups(config: Mapping[str, Any]) -> str:
    """Returns the drawing of the demo's groups."""
    name, shape = config["model"]["name"], (1, 8, 8, 1)
    rngs = nnx.Rngs(0)
    model = tpp.models.create(name, image_shape=shape[1:], rngs=rngs)
    groups = tpp.channel_groups(model, jax.ShapeDtypeStruct(shape, jnp.float32))
    plan = tpp.make_plan(groups, model, config["prune"]["ratios"])
    return picture_of(groups, plan)


def _recorded(name: str) -> grids.Grid:
    """Returns a recorded table."""
    config = importlib.import_module(f"configs.tables.{name}").get_config()
    text = (DOCS / "tables" / name / "table.csv").read_text(encoding="utf-8")
    return grids.read_csv(text, config.title, len(cells_of(config)))


def _hero(demo: Mapping[str, Any], size: style.Canvas) -> Figure:
    """Draws the accuracy right after the cut: TPP, and cut at once."""
    light, gap = style.LIGHT, 60
    figure = canvas.blank(size, 262)
    title = "Test accuracy right after the cut, before any fine-tuning"
    canvas.write(figure, 8, 24, title, fontsize=17, fontweight="bold")
    across = (size.width - 16 - gap) / 2
    parts = {
        "0.5": "half of the channels in the blocks removed",
        "0.9": "nine in ten removed",
    }
    for i, (ratio, words) in enumerate(parts.items()):
        left = 8 + i * (across + gap)
        canvas.write(figure, left, 56, words, fontsize=15, color=light.soft)
        axes = canvas.place(figure, left, 66, across, 162)
        axes.set(xlim=(0, 112), ylim=(2.15, -0.85))
        axes.axis("off")
        _bars(axes, demo[ratio]["summary"])
    summary = demo["0.5"]["summary"]
    prepared = ("regularize", "stabilize")
    steps = sum(x["steps"] for x in summary["phases"] if x["name"] in prepared)
    foot = "ResNet-8 on scikit-learn's digits, seed 0 (python -m benchmarks.demo); "
    foot += f"TPP: after {steps:,} more steps of training"
    canvas.write(figure, 8, 252, foot, fontsize=11, color=light.soft)
    return figure


def _bars(axes: Axes, summary: Mapping[str, Any]) -> None:
    """Draws a bar for TPP and one for a cut at once, and a line for no cut."""
    light = style.LIGHT
    [cut] = [phase for phase in summary["phases"] if phase["name"] == "slice"]
    dense, at_once = summary["dense"]["accuracy"], summary["one_shot"]["accuracy_after"]
    rows = (("TPP", cut["accuracy_after"]), ("cut at once", at_once))
    for i, (name, value) in enumerate(rows):
        color, y = light.rival if i else light.strong, 1.3 * i
        bar = matplotlib.patches.Rectangle((0, y), value, 0.65, color=color)
        axes.add_patch(bar)
        label = {"fontsize": 15, "color": color, "va": "bottom"}
        axes.text(0, y - 0.06, name, fontweight="normal" if i else "bold", **label)
        inside = value > 50
        axes.annotate(
            f"{value:.1f} %",
            (value, y + 0.32),
            (-8 if inside else 8, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            color=light.paper if inside else color,
            fontsize=18,
            fontweight="bold",
        )
    axes.plot([dense, dense], [-0.42, 2.1], "--", color=light.ink, linewidth=1.2)
    style_of_text = {"ha": "right", "va": "bottom", "fontsize": 12}
    axes.text(dense + 0.5, -0.45, f"unpruned {dense:.1f} %", **style_of_text)


if __name__ == "__main__":
    main()
