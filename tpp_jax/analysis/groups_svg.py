"""A picture of a model's groups: which layers each runs through, drawn as SVG.

Layers are listed in order of execution; a group is a coloured lane next to them, from
the first layer that produces its channels to the last that reads them. A layer is a
line from the lanes that it reads to the lanes that it writes.
"""

import pathlib
import textwrap
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape, quoteattr

from tpp_jax import style
from tpp_jax.analysis.groups_layout import Lane, Row, place_groups
from tpp_jax.analysis.groups_text import headline, member_lines, size_change
from tpp_jax.graph.groups import Group, Groups
from tpp_jax.pruning.plan import Plan

_COLORS = style.LANES
_FIXED = style.LIGHT.line  # color of lanes that cannot be pruned
_INK, _FAINT, _RULE = style.LIGHT.ink, style.LIGHT.soft, style.LIGHT.surface
_PAPER, _BORDER = style.LIGHT.paper, style.LIGHT.line

# Sizes in pixels.
_SIZE = 11  # font size
_LETTER = 0.63 * _SIZE  # width of a letter, with a reserve
_LINE = 16  # height of a line of text
_MARGIN = 20
_GAP = 18  # space between the columns of the picture
_LANE = 24  # distance between lanes
_BAR = 12  # width of a lane's bar

_LEAST_NOTE, _MOST_NOTE = 30, 76  # numbers of letters in a line of a note


def draw_groups(
    groups: Groups, path: str | pathlib.Path, plan: Plan | None = None
) -> None:
    """Draws the groups of a model into an SVG file.

    Args:
      groups: Groups from :func:`tpp_jax.channel_groups`.
      path: Path of the file; its folder must exist.
      plan: Plan whose pruned share of the channels is drawn empty, if any.

    Raises:
      OSError: If the file cannot be written.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from tpp_jax import channel_groups
      >>> def mlp(p, x):
      ...     return jnp.tanh(x @ p["w1"]) @ p["w2"]
      >>> p = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "groups.svg"
      >>> draw_groups(channel_groups(mlp, jnp.ones((1, 4)), params=p), file)
      >>> file.read_text()[:4]
      '<svg'
    """
    pathlib.Path(path).write_text(picture_of(groups, plan), encoding="utf-8")


def picture_of(
    groups: Groups, plan: Plan | None = None, canvas: style.Canvas = style.WIDE
) -> str:
    """Returns a drawing of the groups as SVG.

    For a phone it has no shapes of kernels, and the notes on the groups are below the
    layers. A drawing is wider than its canvas where names and lanes need that.

    Args:
      groups: Groups from :func:`tpp_jax.channel_groups`.
      plan: Plan whose pruned share of the channels is drawn empty, if any.
      canvas: Canvas of the drawing.
    """
    rows, lanes = place_groups(groups, plan)
    columns = 1 + max((lane.column for lane in lanes), default=0)
    if canvas.narrow:
        room = canvas.width - 2 * _MARGIN - _GAP - _LANE * columns
        rows = [row._replace(name=_shortened(row.name, room)) for row in rows]
    # From left to right: layers, shapes of their kernels, lanes, notes on the groups.
    shapes_x = _MARGIN + _width(row.name for row in rows) + _GAP
    shapes = 0 if canvas.narrow else _width(row.shape for row in rows) + 2 * _GAP
    lanes_x = shapes_x + shapes
    ends = lanes_x + _LANE * columns
    notes_x = _MARGIN if canvas.narrow else ends + _GAP
    letters = int((canvas.width - notes_x - _GAP - _MARGIN) / _LETTER)
    letters = min(max(letters, _LEAST_NOTE), _MOST_NOTE)
    notes = [_note(lane.group, plan, letters) for lane in lanes]
    words = textwrap.wrap(headline(groups), 30 if canvas.narrow else 200)
    width = _MARGIN + max(
        *(notes_x + _GAP + _width(line for note in notes for line in note), ends),
        *(_MARGIN + 1.4 * _width(words), canvas.width - _MARGIN),
    )
    legend, top = _legend(lanes, plan, width, 20.0 * (len(words) - 1))
    row_y, note_y, bottom = _heights(rows, lanes, notes, top, canvas.narrow)
    xs = [lanes_x + _LANE * (lane.column + 0.5) for lane in lanes]
    elements = [*_frame(width, bottom), *_title(words), *legend]
    for i, (row, y) in enumerate(zip(rows, row_y, strict=True)):
        if row.is_layer and i:
            rule = y - _LINE / 2 - 3
            elements.append(_line(_MARGIN, rule, ends, rule, _RULE))
        elements.append(_text(_MARGIN, y, row.name, _INK if row.is_layer else _FAINT))
        if row.shape and not canvas.narrow:
            elements.append(_text(shapes_x, y, row.shape, _FAINT))
        elements += _connection(i, y, lanes, xs, lanes_x - _GAP / 2)
    for lane, color, x, note, y in zip(
        lanes, _colors(lanes), xs, notes, note_y, strict=True
    ):
        tip = _tooltip(lane.group, groups, plan)
        elements += _group(lane, color, plan, tip, x, row_y)
        elements += [*_noted(lane.group, note, color, notes_x, y), "</g>"]
    return "\n".join([*elements, "</svg>", ""])


def _shortened(name: str, width: float) -> str:
    """Returns a name with an ellipsis in its middle if it is wider."""
    letters = max(int(width / _LETTER), 12)
    if len(name) <= letters:
        return name
    start = letters // 3
    return f"{name[:start]}…{name[start + 1 - letters :]}"


def _frame(width: float, height: float) -> list[str]:
    """Returns the opening tag, and a background that is legible on a dark page."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="{style.MONO}" font-size="{_SIZE}">',
        f'<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" '
        f'rx="8" fill="{_PAPER}" stroke="{_BORDER}"/>',
    ]


def _title(lines: Sequence[str]) -> list[str]:
    return [
        f'<text x="{_MARGIN}" y="{_MARGIN + 12 + 20 * i}" font-size="14" '
        f'font-weight="bold" fill="{_INK}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]


def _group(
    lane: Lane,
    color: str,
    plan: Plan | None,
    tooltip: str,
    x: float,
    row_y: Sequence[float],
) -> list[str]:
    """Returns the lane of a group with its marks, as a group of elements to close."""
    return [
        f"<g data-group={quoteattr(lane.group.name)}>",
        f"<title>{escape(tooltip)}</title>",
        *_bar(lane, x, row_y, color, plan),
        *(mark for i, some in lane.roles.items() for mark in _marks(some, x, row_y[i])),
    ]


def _noted(
    group: Group, note: Sequence[str], color: str, x: float, y: float
) -> list[str]:
    """Returns the note on a group, with a square in its color."""
    ink = _INK if group.reason is None else _FAINT
    lines = [_text(x + _GAP, y + i * _LINE, line, ink) for i, line in enumerate(note)]
    return [_rect(x, y - 5, 10, 10, color), *lines]


def _connection(
    row: int, y: float, lanes: Sequence[Lane], lane_x: Sequence[float], input_x: float
) -> list[str]:
    """Returns the line of a row from the lanes that it reads to those it writes.

    A row that reads no lane reads the input of the model, which is at ``input_x``.
    """
    here = [
        (x, lane.roles[row])
        for x, lane in zip(lane_x, lanes, strict=True)
        if row in lane.roles
    ]
    reads = [x for x, roles in here if "contracted" in roles]
    writes = [x for x, roles in here if "produced" in roles]
    if writes and not reads:
        reads = [input_x]
    ends = reads + writes
    return [_line(min(ends), y, max(ends), y, _INK)] if len(ends) > 1 else []


def _heights(
    rows: Sequence[Row],
    lanes: Sequence[Lane],
    notes: Sequence[list[str]],
    top: float,
    below: bool,
) -> tuple[list[float], list[float], float]:
    """Returns the middle of every row, that of every note's first line, the bottom.

    A note begins in the row where its group begins, and may extend over rows without a
    note; a row with a note is moved down. Or all notes are ``below`` the rows.
    """
    row_y: list[float] = []
    note_y: list[float] = []
    y = free = top
    for i, row in enumerate(rows):
        y += 6 if row.is_layer and i else 0
        mine = [
            note
            for lane, note in zip(lanes, notes, strict=True)
            if lane.first == i and not below
        ]
        y = max(y, free) if mine else y
        row_y.append(y + _LINE / 2)
        at = y
        for note in mine:
            note_y.append(at + _LINE / 2)
            at += _LINE * len(note)
        free = max(free, at)
        y += _LINE
    y = max(y, free)
    for note in notes if below else ():
        note_y.append(y + 1.5 * _LINE)
        y += _LINE * len(note)
    return row_y, note_y, y + _MARGIN + (_LINE if below else 0)


def _colors(lanes: Sequence[Lane]) -> list[str]:
    """Returns colours in turn, different for parallel lanes; grey for fixed groups."""
    colors: list[str] = []
    turn = 0
    for i, lane in enumerate(lanes):
        if lane.group.reason is not None:
            colors.append(_FIXED)
            continue
        taken = {colors[j] for j in range(i) if lanes[j].last >= lane.first}
        order = [*_COLORS[turn:], *_COLORS[:turn]]
        colors.append(next((c for c in order if c not in taken), order[0]))
        turn = (_COLORS.index(colors[-1]) + 1) % len(_COLORS)
    return colors


def _note(group: Group, plan: Plan | None, letters: int) -> list[str]:
    """Returns the lines of the note next to the first row of a group."""
    size = f"{group.name}  {size_change(group, plan)}"
    if group.reason is None:
        return [size]
    reason = f"kept: {group.reason}"
    if len(size) + 2 + len(reason) <= letters:
        return [f"{size}  {reason}"]
    return [size, *textwrap.wrap(reason, letters)]


def _tooltip(group: Group, groups: Groups, plan: Plan | None) -> str:
    """Returns the full description of a group, shown when the pointer rests on it."""
    lines = [f"{group.name}: {size_change(group, plan)} channels"]
    lines += [f"{word} {names}" for word, names in member_lines(group, groups)]
    if group.reduced:
        lines.append("a sum or maximum runs over them")
    if group.reason is not None:
        lines.append(f"kept: {group.reason}")
    return "\n".join(lines)


def _legend(
    lanes: Sequence[Lane], plan: Plan | None, width: float, down: float
) -> tuple[list[str], float]:
    """Returns the legend of the symbols in the picture, and its lower end."""
    roles = {role for lane in lanes for some in lane.roles.values() for role in some}
    entries = [
        (_marks({role}, 8, 0), text)
        for role, text in (
            ("produced", "the layer produces these channels"),
            ("contracted", "the layer reads them"),
            ("along", "a norm, a bias… acts on each"),
            ("depthwise", "a depthwise kernel acts on each"),
        )
        if role in roles
    ]
    if plan is not None and plan.pruned_groups:
        pale = [
            _outline(2, -5, _BAR, 10, _COLORS[0]),
            _rect(5, -5, 6, 10, _COLORS[0]),
        ]
        entries.append((pale, "empty: the share that is pruned"))
    if any(lane.group.reason is not None for lane in lanes):
        entries.append(([_rect(2, -5, _BAR, 10, _FIXED)], "cannot be pruned"))
    elements = []
    x, y = _MARGIN, _MARGIN + 36 + down
    for drawing, text in entries:
        needed = 20 + _width([text]) + _GAP
        if x + needed > width and x > _MARGIN:
            x, y = _MARGIN, y + _LINE + 2
        elements.append(f'<g transform="translate({x:.0f} {y:.0f})">')
        elements += [*drawing, _text(20, 0, text, _FAINT), "</g>"]
        x += needed
    return elements, y + _LINE + 8


def _bar(
    lane: Lane, x: float, row_y: Sequence[float], color: str, plan: Plan | None
) -> list[str]:
    """Returns the bar of a lane, empty but for the share that is kept."""
    top, height = row_y[lane.first] - 8, row_y[lane.last] - row_y[lane.first] + 16
    group = lane.group
    if group.reason is not None:
        return [_rect(x - _BAR / 2, top, _BAR, height, color)]
    kept = group.size if plan is None else plan.kept_count(group)
    inner = max(2, _BAR * kept / group.size)
    empty = [_outline(x - _BAR / 2, top, _BAR, height, color)]
    return [
        *(empty if inner < _BAR else []),
        _rect(x - inner / 2, top, inner, height, color),
    ]


def _marks(roles: Iterable[str], x: float, y: float) -> list[str]:
    """Returns the symbols of a layer in a lane: a dot produces, a ring reads."""
    marks = []
    if "contracted" in roles:
        marks.append(_circle(x, y, 5.5, _PAPER))
    if "produced" in roles:
        marks.append(_circle(x, y, 3 if marks else 5.5, _INK))
    if "depthwise" in roles:
        marks.append(_rect(x - 5, y - 5, 10, 10, _INK))
    return marks or [_rect(x - 7, y - 1.5, 14, 3, _INK)]


def _width(texts: Iterable[str]) -> float:
    return _LETTER * max(map(len, texts), default=0)


def _text(x: float, y: float, text: str, color: str) -> str:
    place = f'x="{x:.1f}" y="{y + 0.35 * _SIZE:.1f}"'
    return f'<text {place} fill="{color}" xml:space="preserve">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="1.3"/>'


def _circle(x: float, y: float, r: float, fill: str) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{r}"'
    return f'<circle {place} fill="{fill}" stroke="{_INK}" stroke-width="1.3"/>'


def _rect(x: float, y: float, width: float, height: float, color: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} rx="1.5" fill="{color}"/>'


def _outline(x: float, y: float, width: float, height: float, color: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} rx="1.5" fill="{_PAPER}" stroke="{color}"/>'
