"""The site as a real browser shows it: on a phone and a desk, light and dark."""

import pytest

from tests.browser import needs_browser
from tests.docs.devtools import open_browser

pytestmark = needs_browser

PAGES = ("index.html", "groups.html", "plans.html", "errors.html", "api/plans.html")
PAGES += ("notebooks/recover.html",)

# Ratios of contrast below 4.5, of texts and what is behind them.
_CONTRAST = """(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const parts = [r, g, b].map((x) => x / 255).map(
      (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const over = (top, below) => {
    const alpha = top[3] ?? 1;
    return [0, 1, 2].map((i) => alpha * top[i] + (1 - alpha) * below[i]);
  };
  const behind = (node) => {
    if (!node) return [255, 255, 255];
    const own = channels(getComputedStyle(node).backgroundColor);
    return (own[3] ?? 1) === 1 ? own : over(own, behind(node.parentElement));
  };
  const found = [];
  const article = document.querySelector("article");
  const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    const shown = texts.currentNode.data.trim() && node.getClientRects().length;
    if (!shown || node.closest("style, .headerlink, button")) continue;
    const style = getComputedStyle(node);
    const below = node.closest("svg") ? behind(node.closest("svg")) : behind(node);
    const color = node.closest("svg") ? style.fill : style.color;
    const pair = [light(over(channels(color), below)), light(below)];
    pair.sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) found.push([texts.currentNode.data.trim(), color, ratio]);
  }
  return found;
})()"""

_SEARCH = """new Promise((resolve, reject) => {
  const input = document.querySelector("input.md-search__input");
  input.focus();
  input.value = "latency_table";
  input.dispatchEvent(new Event("input", { bubbles: true }));
  input.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }));
  let tries = 0;
  const timer = setInterval(() => {
    const hits = [...document.querySelectorAll("a.md-search-result__link")];
    if (hits.length || ++tries > 100) {
      clearInterval(timer);
      resolve(hits.map((hit) => hit.href));
    }
  }, 50);
})"""


@pytest.fixture(scope="module")
def tab():
    with open_browser() as tab:
        yield tab


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_and_can_be_read(width, dark, site, tab):
    tab.size(width, dark=dark)
    tab.open((site / "index.html").as_uri())
    tab.ask("localStorage.clear()")  # the colours of the test before
    for page in PAGES:
        tab.open((site / page).as_uri())
        scheme = tab.ask("document.body.dataset.mdColorScheme")
        assert scheme == ("slate" if dark else "default")
        wide = "document.documentElement.scrollWidth - innerWidth"
        assert tab.ask(wide) <= 0, page
        assert tab.ask(_CONTRAST) == [], page
        sizes = "[...document.images].map((image) => image.naturalWidth)"
        assert all(tab.ask(sizes)), page
    assert tab.complaints == []
    outside = [
        x for x in tab.requests if not x.startswith(("file:", "data:", "about:"))
    ]
    assert not outside


def test_the_search_finds_a_function_without_a_server(site, tab):
    tab.size(1280)
    tab.open((site / "index.html").as_uri())
    hits = tab.ask(_SEARCH)
    assert any("/api/plans.html" in hit for hit in hits), hits
    assert tab.complaints == []


def test_a_drawing_follows_the_switch_of_colours(site, tab):
    tab.size(1280)
    tab.open((site / "groups.html").as_uri())
    tab.ask("localStorage.clear()")
    tab.open((site / "groups.html").as_uri())
    ink = "getComputedStyle(document.querySelector('svg.drawing text')).fill"
    before = tab.ask(ink)
    tab.ask("document.querySelector('label[for=__palette_1]').click()")
    assert tab.ask("document.body.dataset.mdColorScheme") == "slate"
    assert tab.ask(ink) != before
