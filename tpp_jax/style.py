"""The style sheet: colors, sizes and fonts of all pictures and pages of the library.

Pictures are drawn in the colors of :data:`LIGHT`; :func:`on_dark` exchanges each for
its counterpart in :data:`DARK`. On their background, text has a contrast of at least
4.5:1 and lines have one of at least 3:1, in both palettes.
"""

import dataclasses
import re

FONT = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, "
    "'DejaVu Sans', sans-serif"
)
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Palette:
    """Colors of one theme, by their role.

    Attributes:
      paper: Background of pictures and pages.
      surface: Background of cards and of marked cells.
      ink: Text, and what is neither TPP nor a rival.
      soft: Text of axes and remarks.
      line: Axes, borders and rules.
      strong: TPP, and only TPP.
      rival: Other methods, and training batches.
      second: What is kept, where something else is removed.
      heat: Cells of a table from low to high; text on the first three is in the color
        of the ink, on the others in that of the paper.
    """

    paper: str
    surface: str
    ink: str
    soft: str
    line: str
    strong: str
    rival: str
    second: str
    heat: tuple[str, ...]

    def colors(self) -> dict[str, str]:
        """Returns all colors by name; those of ``heat`` are numbered."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        steps = named.pop("heat")
        return named | {f"heat{i}": color for i, color in enumerate(steps)}


LIGHT = Palette(
    paper="#ffffff",
    surface="#f3f5f7",
    ink="#1b1f24",
    soft="#57606a",
    line="#7a848e",
    strong="#c2410c",
    rival="#66707a",
    second="#1f66c7",
    heat=("#fff3e6", "#ffdcb8", "#ffbe85", "#bd4d12", "#993309", "#6b2103"),
)
DARK = Palette(
    paper="#14171c",
    surface="#1f242b",
    ink="#e8eaed",
    soft="#a9b2bc",
    line="#76808b",
    strong="#ff9156",
    rival="#9ba5b0",
    second="#74b3ff",
    heat=("#2b1c12", "#4a2a14", "#6b3a17", "#d9763a", "#ff9f66", "#ffd0ad"),
)

# Hues of positive and negative entries of a matrix, legible on both papers; an entry
# is as opaque as it is large, so that zero has the color of the paper.
POSITIVE, NEGATIVE = (0xD9, 0x54, 0x1E), (0x2F, 0x7D, 0xE1)

# Of groups in a drawing, on both papers. Paper and ink both have a contrast of 3:1.
LANES = ("#3a7fd5", "#c9661c", "#2e8f57", "#8a6fd1", "#c9528f", "#1a8a9c")


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Size of a picture; a unit is a pixel where it is shown in its own size.

    Attributes:
      width: Width in units.
      size: Size of the text in units.
    """

    width: float
    size: float

    @property
    def narrow(self) -> bool:
        """Whether the picture is for a phone."""
        return self.width < 500


WIDE = Canvas(760, 12)
PHONE = Canvas(343, 11)


def _counterparts() -> dict[str, str]:
    return {color: DARK.colors()[name] for name, color in LIGHT.colors().items()}


_DARK_OF = _counterparts()
_ANY = re.compile("|".join(_DARK_OF))


def on_dark(svg: str) -> str:
    """Returns a picture of the library for a page with a dark background.

    Args:
      svg: Picture in the colors of :data:`LIGHT`.

    Example:
      >>> on_dark('<rect fill="#1b1f24"/>')
      '<rect fill="#e8eaed"/>'
    """
    return _ANY.sub(lambda found: _DARK_OF[found[0]], svg)


def adaptive(svg: str) -> str:
    """Returns a picture that follows the theme of who looks at it, on its own paper.

    A program that does not know the theme shows it on light paper.

    Args:
      svg: Picture in the colors of :data:`LIGHT`.
    """
    names = {color: f"c{i}" for i, color in enumerate(_DARK_OF)}
    light = "".join(f"--{name}:{color};" for color, name in names.items())
    dark = "".join(f"--{name}:{_DARK_OF[color]};" for color, name in names.items())
    css = f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    paper = f'<rect width="100%" height="100%" style="fill:{LIGHT.paper}"/>'
    body = _ANY.sub(lambda c: f"var(--{names[c[0]]},{c[0]})", paper)
    start = svg.index(">", svg.index("<svg")) + 1
    rest = _ANY.sub(lambda c: f"var(--{names[c[0]]},{c[0]})", svg[start:])
    return f"{svg[:start]}<style>{css}</style>{body}{rest}"
