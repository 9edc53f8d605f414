"""A page as a real browser shows it, where there is one."""

import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

_MEASURE = """<script>addEventListener("load", () => {
  const sizes = [...document.images].map((image) => image.naturalWidth);
  document.body.dataset.sizes = sizes.join(" ");
  const page = document.documentElement;
  document.body.dataset.wide = page.scrollWidth - page.clientWidth;
})</script>"""


class Look(NamedTuple):
    """What was seen.

    Attributes:
      pictures: their widths in pixels; 0 for one that is not shown.
      wider: pixels that the page is wider than the window.
      complaints: lines of the console.
    """

    pictures: list[int]
    wider: int
    complaints: list[str]


def look_at(page: str, *, dark: bool = False) -> Look:
    """Opens a page, given as its text, in a window as wide as a phone's screen."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "page.html"
        file.write_text(page.replace("</body>", f"{_MEASURE}</body>"))
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--dump-dom", "--virtual-time-budget=5000", "--window-size=500,900"]
        command += ["--enable-logging=stderr", f"--user-data-dir={folder}/profile"]
        command += ["--no-first-run", "--disable-background-networking"]
        command += ["--blink-settings=preferredColorScheme=0"] if dark else []
        done = subprocess.run(
            [*command, f"file://{file}"], capture_output=True, text=True, timeout=120
        )
    [sizes] = re.findall(r'data-sizes="([^"]*)"', done.stdout)
    [wider] = re.findall(r'data-wide="([^"]*)"', done.stdout)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Look([int(size) for size in sizes.split()], int(wider), complaints)
