"""Reports whose pictures nobody looks at, since making files of them is slow."""

import pathlib
from collections.abc import Mapping

import matplotlib

from tpp_jax.reports import canvas
from tpp_jax.style import WIDE


def sketched(
    drawings: Mapping[str, canvas.Drawing], folder: pathlib.Path
) -> dict[str, canvas.Picture]:
    """Draws pictures like ``plots.save``, and writes empty ones."""
    for name, drawing in drawings.items():
        with matplotlib.rc_context(canvas._SETTINGS):
            drawing(WIDE)
        (folder / f"{name}.svg").write_text("<svg/>")
    return dict.fromkeys(drawings, canvas.Picture("<svg/>", "<svg/>"))
