"""Reports whose pictures nobody looks at, since making files of them is slow."""

import pathlib
from collections.abc import Mapping

import matplotlib

from tpp_jax.reports import plots


def sketched(
    drawings: Mapping[str, plots.Drawing], folder: pathlib.Path
) -> dict[str, str]:
    """Draws pictures like ``plots.save``, and writes empty ones."""
    for name, drawing in drawings.items():
        with matplotlib.rc_context(plots._SETTINGS):
            drawing()
        (folder / f"{name}.svg").write_text("<svg/>")
    return dict.fromkeys(drawings, "<svg/>")
