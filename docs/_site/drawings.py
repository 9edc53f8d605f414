"""Draws the pictures of docs/groups.md: python docs/_site/drawings.py.

Each is a file that is as wide as a phone's screen and has a light and a dark look. The
site puts it into the page, whose style sheet then decides (docs/assets/site.css).
"""

import html
import pathlib
from collections.abc import Callable, Sequence

from tpp_jax.style import DARK, LIGHT, Palette

FOLDER = pathlib.Path(__file__).parents[1] / "images"
WIDTH = 360
CELL = 22


def _of(palette: Palette) -> str:
    names = "ink", "soft", "line", "paper"
    return " ".join(f"--{name}: {getattr(palette, name)};" for name in names)


_STYLE = f"""<style>
svg.drawing {{ {_of(LIGHT)}
  --one: #b3541e; --two: #1f6f8b; --one-pale: #f3ddd0; --two-pale: #d3e6ec; }}
@media (prefers-color-scheme: dark) {{ svg.drawing {{ {_of(DARK)}
  --one: #f0a36b; --two: #7cc4dc; --one-pale: #573a29; --two-pale: #24444f; }} }}
"""
_STYLE += """svg.drawing text { font: 13px system-ui, sans-serif; fill: var(--ink); }
svg.drawing text.code { font: 12px ui-monospace, monospace; }
svg.drawing text.soft { fill: var(--soft); }
svg.drawing text.one { fill: var(--one); }
svg.drawing text.two { fill: var(--two); }
svg.drawing .cell { fill: var(--paper); stroke: var(--line); }
svg.drawing .cell.one { fill: var(--one-pale); stroke: var(--one); }
svg.drawing .cell.two { fill: var(--two-pale); stroke: var(--two); }
svg.drawing path { fill: none; stroke: var(--line); stroke-width: 1.5; }
svg.drawing path.one { stroke: var(--one); stroke-width: 2.5; }
</style>"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Returns a line of text whose baseline is at y."""
    words = html.escape(words)
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "") -> str:
    """Returns a rectangle."""
    size = f'width="{width}" height="{height}"'
    return f'<rect x="{x}" y="{y}" {size} rx="2" class="cell {kind}"/>'


def cells(x: float, y: float, marks: Sequence[str], words: Sequence[str] = ()) -> str:
    """Returns a row of cells, each of a kind and with its words."""
    parts = [box(x + i * CELL, y, CELL, CELL, kind) for i, kind in enumerate(marks)]
    for i, word in enumerate(words):
        middle = x + (i + 0.5) * CELL
        parts.append(text(middle, y + 15.5, word, f"code {marks[i]}", "middle"))
    return "".join(parts)


def path(steps: str, kind: str = "") -> str:
    """Returns a line."""
    return f'<path d="{steps}" class="{kind}"/>'


def channel() -> tuple[int, str]:
    """One channel: a column, an entry of each vector, a row."""
    parts = [text(0, 14, "One channel is"), text(0, 52, "conv1.kernel", "code")]
    marks = ["", "", "one", ""]
    parts += [cells(150, 28 + i * CELL, marks) for i in range(3)]
    parts.append(text(250, 64, "a column,", "one"))
    for i, name in enumerate(("norm1.scale", "norm1.bias")):
        y = 116 + i * 32
        parts += [text(0, y + 15, name, "code"), cells(150, y, marks)]
    parts.append(text(250, 147, "an entry,", "one"))
    parts.append(text(0, 229, "conv2.kernel", "code"))
    parts += [cells(150, 192 + i * CELL, [marks[i]] * 4) for i in range(4)]
    parts.append(text(250, 251, "and a row.", "one"))
    return 290, "".join(parts)


def stream() -> tuple[int, str]:
    """A residual stream: what is added must lose the same channels."""
    places = [40 + 14 * i for i in range(4)]
    top, bottom = 40, 296
    parts = [box(20, 12, 84, 28), text(62, 31, "stem", "code", "middle")]
    for i, x in enumerate(places):
        kind = "one" if i == 2 else ""
        parts.append(path(f"M{x} {top}V{bottom}", kind))
    for row, name in enumerate(("block1", "block2")):
        y = 74 + row * 100
        parts += [path(f"M{places[2]} {y}H150", "one"), box(150, y - 14, 96, 68)]
        parts.append(text(198, y + 4, f"{name}.conv1", "code", "middle"))
        parts.append(text(198, y + 22, "⋮", "soft", "middle"))
        parts.append(text(198, y + 42, f"{name}.conv2", "code", "middle"))
        parts.append(path(f"M150 {y + 38}H{places[2]}", "one"))
        parts.append(text(254, y + 4, "reads it", "soft"))
        parts.append(text(254, y + 42, "adds to it", "soft"))
        parts.append(text(places[2] + 6, y + 33, "+", "one"))
    parts += [box(20, bottom, 84, 28), text(62, bottom + 19, "head", "code", "middle")]
    parts.append(text(118, 31, "writes the stream", "soft"))
    parts.append(text(118, bottom + 19, "reads it", "soft"))
    return 332, "".join(parts)


def labels() -> tuple[int, str]:
    """Labels of positions, operation by operation."""
    one, two, none = ["one"] * 4, ["two"] * 2, [""] * 6
    all_of = ["0", "1", "2", "3", "4", "5"]
    rows = [
        ("a = x @ A", one, all_of[:4], "new"),
        ("a = relu(a)", one, all_of[:4], "as before"),
        ("b = x @ B", two, all_of[4:], "new"),
        ("c = concat(a, b)", one + two, all_of, "in a row"),
        ("d = x @ D", none, ["6", "7", "8", "9", "10", "11"], "new"),
        ("e = c + d", one + two, all_of, "6 is 0, …"),
        ("y = e @ W", one + two, all_of, "rows of W"),
    ]
    parts = []
    for i, (words, marks, shown, note) in enumerate(rows):
        y = 4 + i * 34
        parts += [text(0, y + 16, words, "code"), cells(132, y, marks, shown)]
        parts.append(text(142 + CELL * len(marks), y + 16, note, "soft"))
    return 238, "".join(parts)


def trial() -> tuple[int, str]:
    """A trial: the same operations, on narrower arrays."""
    rows = [
        ("dot", "[n, 8]", "[n, 4]", "as wide as expected"),
        ("relu", "[n, 8]", "[n, 4]", "as wide as expected"),
        ("reshape", "[n, 2, 4]", "error", "the model says (2, 4)"),
    ]
    parts = [text(0, 14, "operation", "soft"), text(96, 14, "8 channels", "soft")]
    parts.append(text(196, 14, "4 channels", "soft"))
    for i, (name, wide, narrow, verdict) in enumerate(rows):
        y, kind = 44 + i * 48, "one" if narrow == "error" else "two"
        parts += [text(0, y, name, "code"), text(96, y, wide, "code")]
        parts.append(text(196, y, narrow, f"code {kind}"))
        parts.append(text(196, y + 18, verdict, kind))
    parts.append(path("M0 22H360"))
    return 166, "".join(parts)


DRAWINGS: dict[str, Callable[[], tuple[int, str]]] = {
    "how_channel": channel,
    "how_stream": stream,
    "how_labels": labels,
    "how_trial": trial,
}


def drawn(name: str) -> str:
    """Returns the text of an SVG file."""
    height, content = DRAWINGS[name]()
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" {size}>'
    return f"{head}{_STYLE}{content}</svg>\n".replace("><", ">\n<")


if __name__ == "__main__":
    for name in DRAWINGS:
        (FOLDER / f"{name}.svg").write_text(drawn(name), encoding="utf-8")
