"""Pages as a real browser shows them, where there is one."""

import html
import json
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

PHONE, DESKTOP = 390, 1280
THEMES = "light", "dark"

# A frame has its own width, and the theme of its `color-scheme`, so that one start of
# the browser shows all. Folded parts are opened.
_MEASURE = """<script>
const channel = (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
const light = (c) => [0.2126, 0.7152, 0.0722].reduce(
  (sum, weight, i) => sum + weight * channel(c[i] / 255), 0);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const ratio = (a, b) => {
  const [high, low] = [light(a), light(b)].sort((x, y) => y - x);
  return (high + 0.05) / (low + 0.05);
};
function paper(view, element) {
  for (let e = element; e; e = e.parentElement) {
    const color = parse(view.getComputedStyle(e).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
}
function measure(frame) {
  const view = frame.contentWindow, page = view.document;
  const all = [...page.body.querySelectorAll("*")];
  const seen = {text: [], lines: []}, images = [...page.images];
  seen.pictures = images.map((i) => i.naturalWidth);
  seen.shown = images.map((i) => [...i.parentElement.children].findIndex(
    (one) => (one.srcset || one.src) === i.currentSrc));
  const root = page.documentElement;
  const edges = all.map((e) => e.getBoundingClientRect().right - view.innerWidth);
  seen.wider = Math.max(root.scrollWidth - root.clientWidth, ...edges, 0);
  seen.scrolled = all.filter((e) => e.scrollWidth > e.clientWidth + 1
    && /auto|scroll/.test(view.getComputedStyle(e).overflowX)).length;
  const texts = page.createTreeWalker(page.body, 4);
  while (texts.nextNode()) {
    const words = texts.currentNode.data.trim(), e = texts.currentNode.parentElement;
    if (!words || !e.getClientRects().length) continue;
    const color = parse(view.getComputedStyle(e).color);
    seen.text.push([ratio(color, paper(view, e)), words.slice(0, 60)]);
  }
  for (const e of all) {
    const look = view.getComputedStyle(e);
    for (const side of ["Top", "Right", "Bottom", "Left"]) {
      const wide = parseFloat(look[`border${side}Width`]);
      if (!wide || !e.getClientRects().length) continue;
      const color = parse(look[`border${side}Color`]);
      seen.lines.push([ratio(color, paper(view, e)), e.tagName]);
    }
  }
  return seen;
}
addEventListener("load", async () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument;
    page.querySelectorAll("details").forEach((part) => { part.open = true; });
    await Promise.all([...page.images].map((image) => image.decode().catch(() => 0)));
    found[frame.title] = measure(frame);
  }
  document.body.textContent = "MEASURED" + JSON.stringify(found) + "MEASURED";
})</script>"""


class Look(NamedTuple):
    """What was seen of a page at one width and in one theme.

    Attributes:
      pictures: their widths in pixels; 0 for one that is not shown.
      shown: which of the sources of each picture was chosen, from 0.
      wider: pixels that something extends beyond the window.
      scrolled: number of parts that can be scrolled sideways.
      text: contrast of each text with its background, and its beginning.
      lines: contrast of each border with its background, and its element.
      complaints: lines of the console, while all pages were shown.
    """

    pictures: list[int]
    shown: list[int]
    wider: float
    scrolled: int
    text: list[tuple[float, str]]
    lines: list[tuple[float, str]]
    complaints: list[str]


def look_at(pages: Mapping[str, str]) -> dict[tuple[str, int, str], Look]:
    """Opens pages, given as their text by name, as a phone and a desktop show them."""
    frames = [
        f'<iframe title="{name} {width} {theme}" srcdoc="{html.escape(page)}" '
        f'style="border:0;width:{width}px;height:900px;color-scheme:{theme}"></iframe>'
        for name, page in pages.items()
        for width in (PHONE, DESKTOP)
        for theme in THEMES
    ]
    whole = f'<meta charset="utf-8"><link rel="icon" href="data:,">{_MEASURE}'
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "page.html"
        file.write_text(whole + "".join(frames), encoding="utf-8")
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"]
        command += ["--dump-dom", "--virtual-time-budget=10000"]
        command += ["--window-size=1400,1000", f"--user-data-dir={folder}/profile"]
        command += ["--enable-logging=stderr", "--no-first-run"]
        command += ["--disable-background-networking"]
        done = subprocess.run(
            [*command, f"file://{file}"], capture_output=True, text=True, timeout=180
        )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    [found] = re.findall("<body>MEASURED(.*)MEASURED</body>", done.stdout, re.DOTALL)
    looks = {}
    for title, seen in json.loads(html.unescape(found)).items():
        name, width, theme = title.rsplit(" ", 2)
        looks[name, int(width), theme] = Look(**seen, complaints=complaints)
    return looks


# Place of a picture's source in a report, by width and theme.
_SOURCES = {(PHONE, "dark"): 0, (PHONE, "light"): 1, (DESKTOP, "dark"): 2}


def check(looks: Mapping[tuple[str, int, str], Look]) -> None:
    """Checks what is true of every page, at every width and in every theme."""
    for place, seen in looks.items():
        assert seen.complaints == []
        assert seen.pictures and min(seen.pictures) > 100, place
        assert set(seen.shown) == {_SOURCES.get(place[1:], 3)}, place
        assert (seen.wider, seen.scrolled) == (0, 0), place
        assert min(seen.text)[0] >= 4.5, (place, min(seen.text))
        assert min(seen.lines, default=(3.0, ""))[0] >= 3, (place, min(seen.lines))
