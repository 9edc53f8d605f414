"""Figures in the style of :mod:`tpp_jax.style`: panels, axes, labels, files."""

import io
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.figure
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tpp_jax.style import FONT, LIGHT, PHONE, WIDE, Canvas

_UNIT = 72  # units in an inch
_DPI = 110  # of PNG files

_SETTINGS: dict[Any, Any] = {  # Matplotlib's type of the keys is private
    "font.family": "DejaVu Sans",
    "text.color": LIGHT.ink,
    "axes.edgecolor": LIGHT.line,
    "axes.labelcolor": LIGHT.soft,
    "xtick.color": LIGHT.line,
    "ytick.color": LIGHT.line,
    "xtick.labelcolor": LIGHT.soft,
    "ytick.labelcolor": LIGHT.soft,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "figure.facecolor": LIGHT.paper,
    "lines.solid_capstyle": "round",
    # Names are text: `literal` escapes the characters of formulas.
    "text.usetex": False,
    "text.parse_math": True,
    # SVG files contain text instead of outlines and are reproducible.
    "svg.fonttype": "none",
    "svg.hashsalt": "tpp_jax",
}

Drawing = Callable[[Canvas], Figure]
"""Draws a picture on a canvas of a given size."""


class Picture(NamedTuple):
    """A picture in the colors of a light page, as SVG.

    Attributes:
      wide: Drawing for a page on a desktop.
      phone: Drawing for a phone.
    """

    wide: str
    phone: str


def render(drawing: Drawing) -> Picture:
    """Returns a picture for both widths."""
    with matplotlib.rc_context(_SETTINGS):
        return Picture(*(_svg(drawing(canvas)) for canvas in (WIDE, PHONE)))


def save(drawings: Mapping[str, Drawing], folder: pathlib.Path) -> dict[str, Picture]:
    """Saves pictures as ``<name>.png`` and, with a transparent background, as SVG.

    Args:
      drawings: Functions that draw the pictures, by name.
      folder: Folder to write to.

    Returns:
      The pictures by name, also as they are drawn for a phone.
    """
    found = {}
    for name, drawing in drawings.items():
        with matplotlib.rc_context(_SETTINGS):
            figure = drawing(WIDE)
            figure.savefig(folder / f"{name}.png", dpi=_DPI)
            found[name] = Picture(_svg(figure), _svg(drawing(PHONE)))
        (folder / f"{name}.svg").write_text(found[name].wide, encoding="utf-8")
    return found


def _svg(figure: Figure) -> str:
    """Returns a figure as compact SVG in the fonts of the style sheet."""
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="none", metadata={"Date": None})
    svg = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", text.getvalue(), flags=re.DOTALL
    )
    svg = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', svg, count=2)
    return re.sub(r"<[^<>]*>\s*", lambda tag: _compact(tag[0]), svg)


def _compact(tag: str) -> str:
    """Returns a tag of SVG in the library's fonts and with two decimals."""
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", FONT, tag)
    tag = re.sub(r"(?<=[ \"(,-])(\d+\.\d\d)\d+", r"\1", tag)
    return re.sub(r"\s*\n\s*", "\n", tag)


def literal(text: str) -> str:
    r"""Returns text that Matplotlib shows literally: no ``$`` begins a formula.

    Characters that are not printable, which SVG does not allow, become ``�``.

    Args:
      text: Text to show.

    Example:
      >>> literal(r"$\frac$")
      '\\$\\frac\\$'
    """
    printable = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return printable.replace("$", r"\$")


def width_of(text: str, size: float) -> float:
    """Returns the width of a line of text in units, with a small reserve."""
    return 0.6 * size * len(text)


def shortened(text: str, size: float, width: float) -> str:
    """Returns a text that fits a width: in the middle of a longer one is an ellipsis.

    Args:
      text: Text to shorten.
      size: Size of the text in units.
      width: Width in units.

    Example:
      >>> shortened("encoder.layers.11.mlp.fc1", 10, 90)
      'encoder…mlp.fc1'
    """
    most = max(int(width / (0.6 * size)), 3)
    if len(text) <= most:
        return text
    return f"{text[: (most - 1) // 2]}…{text[-(most - 1 - (most - 1) // 2) :]}"


def blank(canvas: Canvas, height: float) -> Figure:
    """Returns an empty figure.

    Args:
      canvas: Canvas, which is as wide as the figure.
      height: Height in units.
    """
    return matplotlib.figure.Figure(figsize=(canvas.width / _UNIT, height / _UNIT))


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Adds axes at a place that is given in units from the top left corner."""
    whole, tall = figure.get_size_inches() * _UNIT
    rectangle = left / whole, 1 - (top + height) / tall, width / whole, height / tall
    return figure.add_axes(rectangle)


def write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Writes text at a place in units from the top left corner, by its baseline."""
    whole, tall = figure.get_size_inches() * _UNIT
    figure.text(x / whole, 1 - y / tall, text, va="baseline", **style)


def dress(axes: Axes, size: float, *, ticks: int = 4, below: bool = True) -> None:
    """Gives axes their ticks, in plain numbers.

    Args:
      axes: Axes to change; their scales and limits are set.
      size: Size of the text.
      ticks: Largest number of intervals on the vertical axis.
      below: Whether the horizontal axis has numbers.
    """
    axes.tick_params(labelsize=size, length=3, pad=3)
    axes.tick_params(axis="x", labelbottom=below)
    axes.minorticks_off()
    for axis, most in ((axes.yaxis, ticks), (axes.xaxis, 6)):
        if axis.get_scale() == "log":
            axis.set_major_locator(_Decades(most))
        else:
            axis.set_major_locator(matplotlib.ticker.MaxNLocator(most))
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(_label))


def _label(value: float, place: int | None) -> str:
    del place
    return plain(value)


class _Decades(matplotlib.ticker.Locator):
    """Ticks at powers of ten or, where there are few, at 1, 2 and 5 times them."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __call__(self) -> list[float]:
        assert self.axis is not None
        low, high = sorted(self.axis.get_view_interval())
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        first, last = math.floor(math.log10(vmin)), math.ceil(math.log10(vmax))
        every = max(1, math.ceil((last - first) / self._most))
        steps = [1] if last - first > 2 else [1, 2, 5]
        decades = range(first, last + 1, every)
        found = [s * 10.0**power for power in decades for s in steps]
        return [x for x in found if vmin <= x <= vmax]


def plain(value: float) -> str:
    """Returns a number as it stands at an axis.

    Args:
      value: Number to write.

    Example:
      >>> plain(0.05), plain(20000.0), plain(-0.5), plain(1e-6)
      ('0.05', '20,000', '−0.5', '1e−6')
    """
    size = abs(value)
    if size and size < 1e-3:
        number, power = f"{value:.0e}".split("e")
        return f"{number}e{int(power)}".replace("-", "−")
    if size >= 1e6:
        return f"{value / 1e6:g} M".replace("-", "−")
    number = f"{value:,.4f}".rstrip("0").rstrip(".") if size < 100 else f"{value:,.0f}"
    return number.replace("-", "−")


def spread(places: Sequence[float], least: float) -> list[float]:
    """Returns places that are at least some distance apart, near the given ones.

    Args:
      places: Places of labels.
      least: Smallest distance between two.

    Example:
      >>> spread([1.0, 1.2, 5.0], 1.0)
      [0.6, 1.6, 5.0]
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[list[int]] = []
    middles: list[float] = []
    for i in order:
        blocks.append([i])
        middles.append(places[i])
        while len(blocks) > 1:
            half = (len(blocks[-1]) + len(blocks[-2])) / 2 * least
            if middles[-1] - middles[-2] >= half - 1e-9:
                break
            blocks[-2:] = [blocks[-2] + blocks[-1]]
            mean = sum(places[j] for j in blocks[-1]) / len(blocks[-1])
            middles[-2:] = [mean]
    found = [0.0] * len(places)
    for block, middle in zip(blocks, middles, strict=True):
        for k, i in enumerate(block):
            found[i] = round(middle + (k - (len(block) - 1) / 2) * least, 9)
    return found


def label_ends(
    axes: Axes, labels: Sequence[tuple[float, str, str]], size: float
) -> None:
    """Writes names of lines at their right ends, none over another.

    Args:
      axes: Axes with the lines, whose limits are set.
      labels: End of each line, its name and its color.
      size: Size of the text.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((axes.get_xlim()[0], y))[1] for y, _, _ in labels]
    height = axes.get_window_extent().height / axes.figure.dpi * _UNIT
    heights = spread([min(max(h, 0.0), 1.0) for h in heights], 1.15 * size / height)
    for (_, text, color), at in zip(labels, heights, strict=True):
        axes.annotate(
            text,
            (1, at),
            (6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=color,
            annotation_clip=False,
        )
