"""The site is whole: its links lead somewhere, and it needs nothing from outside.

In a browser it fits on a phone, can be read in light and dark colours, and is searched
without a server.
"""

import functools
import html.parser
import inspect
import pathlib
import pkgutil
import re
import runpy
import urllib.parse
from typing import NamedTuple

import pytest

import tpp_jax as tpp
from tests.browser import needs_browser
from tests.docs.conftest import ROOT
from tests.docs.devtools import open_browser
from tests.docs.questions import CONTRAST, SEARCH

# Pages that are looked at in a browser.
SHOWN = ("index.html", "groups.html", "plans.html", "errors.html", "api/plans.html")
SHOWN += ("notebooks/recover.html",)

# Attributes whose addresses a browser fetches by itself.
_FETCHED = {"src", "srcset", "poster", "data"}
_FETCHED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "manifest"}


class Read(NamedTuple):
    """What a page consists of."""

    ids: set[str]
    links: list[str]
    fetched: list[str]


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.read = Read(set(), [], [])

    def handle_starttag(self, tag, attrs):
        own = {name: value or "" for name, value in attrs}
        self.read.ids.update(own[name] for name in ("id", "name") if name in own)
        self.read.fetched.extend(own[name] for name in _FETCHED & own.keys())
        if tag == "a" and "href" in own:
            self.read.links.append(own["href"])
        if tag == "link" and _FETCHED_LINKS & set(own.get("rel", "").split()):
            self.read.fetched.append(own["href"])


@functools.cache
def read(file: pathlib.Path) -> Read:
    reader = _Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    return reader.read


def pages(site):
    return sorted(file for file in site.rglob("*.html") if file.name != "404.html")


def entries(site):
    """Returns the names that the pages of the API explain."""
    ids = set().union(*(read(file).ids for file in site.glob("api/*.html")))
    return {x for x in ids if re.fullmatch(r"tpp_jax(\.\w+)+", x)}


def missing(site, file, address):
    """Says whether an address of this site leads nowhere."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme or parts.netloc:
        return False
    path = urllib.parse.unquote(parts.path)
    target = (file.parent / path).resolve() if path else file
    if target.is_dir():
        target /= "index.html"
    if not target.is_file() or not target.is_relative_to(site):
        return True
    fragment = urllib.parse.unquote(parts.fragment)
    checked = fragment and target.suffix == ".html"
    return bool(checked) and fragment not in read(target).ids


def test_every_link_leads_to_a_page_and_a_place_on_it(site):
    found = pages(site)
    assert len(found) > 30
    wrong = [
        f"{file.relative_to(site)}: {address}"
        for file in found
        for address in read(file).links + read(file).fetched
        if not address.startswith("data:") and missing(site, file, address)
    ]
    assert not wrong


def test_nothing_is_fetched_from_elsewhere(site):
    elsewhere = re.compile(r"(https?:)?//")
    wrong = [
        f"{file.relative_to(site)}: {address}"
        for file in pages(site)
        for address in read(file).fetched
        if elsewhere.match(address)
    ]
    for file in site.rglob("*.css"):
        for address in re.findall(
            r"(?:url\(|@import)\s*['\"]?([^'\")]+)", file.read_text()
        ):
            if elsewhere.match(address.strip()):
                wrong.append(f"{file.relative_to(site)}: {address}")
    assert not wrong


def test_every_public_name_has_an_entry(site):
    names = {f"tpp_jax.{name}" for name in tpp.__all__} - {
        f"tpp_jax.{module}" for module in ("data", "models")
    }
    for module in (tpp.data, tpp.models):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert not names - entries(site)


def test_what_the_guides_import_has_an_entry(site):
    """What they show beyond the public names can be looked up as well."""
    shown = [pkgutil.resolve_name(name) for name in entries(site)]
    used = {}
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = page.read_text(encoding="utf-8")
        found = re.findall(
            r"^from (tpp_jax[.\w]*) import ([\w, ]+)$", text, re.MULTILINE
        )
        for module, names in found:
            for name in names.split(", "):
                used[name] = pkgutil.resolve_name(f"{module}.{name}")
    assert len(used) > 10
    modules = {name for name, thing in used.items() if inspect.ismodule(thing)}
    assert modules == {"plots", "run"}  # of which the guides call what has an entry
    assert not {
        x for x in used.keys() - modules if not any(used[x] is y for y in shown)
    }


def test_the_entries_say_what_the_docstrings_say(site):
    text = "".join(file.read_text() for file in sorted(site.glob("api/*.html")))
    assert text.count("doc-signature") > 100
    left = re.findall(r":(?:func|class|meth|mod|attr|data):|&gt;&gt;&gt; </?p>", text)
    assert not left
    visible = re.sub(
        r"<pre.*?</pre>|<code.*?</code>|<script.*?</script>", "", text, flags=re.S
    )
    assert not re.findall(
        r"\]\[[\w.]*\]", visible
    )  # cross-references that lead nowhere


def test_the_drawings_are_those_of_their_script():
    # To draw them again: python docs/_site/drawings.py
    script = runpy.run_path(str(ROOT / "docs" / "_site" / "drawings.py"))
    for name in script["DRAWINGS"]:
        file = ROOT / "docs" / "images" / f"{name}.svg"
        assert file.read_text(encoding="utf-8") == script["drawn"](name)


@pytest.fixture(scope="module")
def tab():
    with open_browser() as tab:
        yield tab


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_and_can_be_read(width, dark, site, tab):
    tab.size(width, dark=dark)
    tab.open((site / "index.html").as_uri())
    tab.ask("localStorage.clear()")  # the colours of the test before
    for page in SHOWN:
        tab.open((site / page).as_uri())
        scheme = tab.ask("document.body.dataset.mdColorScheme")
        assert scheme == ("slate" if dark else "default")
        wide = "document.documentElement.scrollWidth - innerWidth"
        assert tab.ask(wide) <= 0, page
        assert tab.ask(CONTRAST) == [], page
        sizes = "[...document.images].map((image) => image.naturalWidth)"
        assert all(tab.ask(sizes)), page
    assert tab.complaints == []
    outside = [
        x for x in tab.requests if not x.startswith(("file:", "data:", "about:"))
    ]
    assert not outside


@needs_browser
def test_the_search_finds_a_function_without_a_server(site, tab):
    tab.size(1280)
    tab.open((site / "index.html").as_uri())
    hits = tab.ask(SEARCH)
    assert any("/api/plans.html" in hit for hit in hits), hits
    assert tab.complaints == []


@needs_browser
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
