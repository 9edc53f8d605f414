"""Pages of the site that are not files below docs/, and links that leave it.

The same Markdown is read on GitHub, where these links lead to files of the repository.
"""

import html
import json
import logging
import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]
_LOG = logging.getLogger("mkdocs.plugins.tpp_jax")  # its warnings end a strict build
_LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")
_NAMED = re.compile(
    r"\[([\w/]+\.md)\](?=\(([\w/.]+\.md))"
)  # by the file, not by a title
_FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(
    r"(<pre.*?</pre>|<a .*?</a>|<h\d.*?</h\d>)"  # left alone
    r"|<code>((?:tpp\.)?([\w.]+)(?:\([^<]*\))?)</code>",
    re.DOTALL,
)
_DRAWING = re.compile(r'<img alt="([^"]*)" src="[^"]*?(images/how_\w+\.svg)" />')


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Adds a page for each notebook."""
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = f"notebooks/{file.stem}.md"
        files.append(File.generated(config, page, content=_notebook(file)))


def on_page_markdown(text: str, *, page: Page, config: MkDocsConfig, **_) -> str:
    """Puts the changelog into its page, and finds where links that leave docs/ lead."""
    folder = ROOT / "docs" / pathlib.Path(page.file.src_uri).parent
    changes = ROOT / "CHANGELOG.md"
    if page.file.src_uri == "changelog.md" and changes.exists():
        text, folder = changes.read_text(encoding="utf-8"), ROOT
    parts = _FENCE.split(text)
    parts[::2] = [
        _NAMED.sub(lambda m: f"[{_title(folder / m[2]) or m[1]}]", part)
        for part in parts[::2]
    ]
    parts[::2] = [
        _LINK.sub(lambda m: m[1] + _target(m[2], folder, page, config) + m[3], part)
        for part in parts[::2]
    ]
    return "".join(parts)


def on_page_content(content: str, *, page: Page, **_) -> str:
    """Links names in the text to their entries, and takes drawings into the page.

    A drawing that is a part of the page has the page's colours, light or dark.
    """
    content = _DRAWING.sub(lambda m: _drawing(m[2], m[1]), content)
    entries = _entries()
    up = "../" * page.file.src_uri.count("/")

    def link(match: re.Match) -> str:
        if match[1]:
            return match[0]
        written, name = match[2], match[3]
        entry = entries.get(f"tpp_jax.{name}") or entries.get(name)
        # A word alone may mean something else.
        if entry is None or not (written.startswith("tpp") or "_" in name):
            return match[0]
        return f'<a href="{up}{entry}"><code>{written}</code></a>'

    return _CODE.sub(link, content)


def _target(link: str, folder: pathlib.Path, page: Page, config: MkDocsConfig) -> str:
    """Returns where a link leads on the site; ``folder`` is that of the file."""
    if re.match(r"[a-z]+:", link):
        return link
    path = (folder / link).resolve()
    if not path.exists() or not path.is_relative_to(ROOT):
        if folder.is_relative_to(ROOT / "docs"):
            return link  # a page that is made here, or MkDocs' own warning
        _LOG.warning("%s links to %s, which is not there", page.file.src_uri, link)
    inside = path.relative_to(ROOT)
    up = "../" * page.file.src_uri.count("/")
    if inside.parts[:1] == ("docs",) and inside != pathlib.Path("docs"):
        return up + inside.relative_to("docs").as_posix()
    if inside.parts[:1] == ("notebooks",) and path.suffix == ".ipynb":
        return up + inside.with_suffix(".md").as_posix()
    kind = "tree" if path.is_dir() else "blob"
    return f"{config.repo_url}/{kind}/main/{inside.as_posix()}"


def _title(page: pathlib.Path) -> str:
    """Returns the title of a page, "" if there is none."""
    if not page.resolve().is_relative_to(ROOT / "docs") or not page.exists():
        return ""
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _entries() -> dict[str, str]:
    """Returns the address of the entry of each name on the pages of the API."""
    found = {}
    for file in sorted((ROOT / "docs" / "api").glob("*.md")):
        for name in re.findall(r"^::: (\S+)", file.read_text(), re.MULTILINE):
            found[name] = f"api/{file.stem}.html#{name}"
    return found


def _drawing(path: str, description: str) -> str:
    text = (ROOT / "docs" / path).read_text(encoding="utf-8")
    text = re.sub(r"<\?xml.*?\?>\s*", "", text)
    label = f'role="img" aria-label="{html.escape(html.unescape(description))}"'
    return text.replace("<svg ", f"<svg {label} ", 1)


def _notebook(file: pathlib.Path) -> str:
    """Returns a notebook's text and code as Markdown."""
    parts = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        code = cell["cell_type"] == "code"
        # The badge is a picture on another server.
        source = re.sub(r"\[!\[(.*?)\]\(.*?\)\]", r"[\1]", source)
        parts.append(f"```python\n{source}\n```" if code else source)
    return "\n\n".join(parts) + "\n"
