"""Imports point one way: the packages stand in an order."""

import ast
import functools
import graphlib
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parents[1] / "tpp_jax"
# Each may import those before it; docs/architecture.md says what they are for.
ORDER = [
    *("errors", "callbacks", "loggers", "headline", "style", "xla", "graph", "pruning"),
    *("models", "data", "method", "interop", "analysis", "storage", "saving"),
    *("reports", "training", "experiment", "fitting", "commands", "__main__"),
]


@functools.cache
def imports() -> dict[str, set[str]]:
    """Returns the modules of the package that each of its modules imports."""
    modules = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = ast.parse(file.read_text(encoding="utf-8"))
    found = {}
    for name, tree in modules.items():
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} has a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {x if x in modules else node.module for x in names}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] &= modules.keys()
    return found


def test_imports_point_one_way():
    def place(module: str) -> int:
        return ORDER.index(module.split(".")[1])

    below = {name: used for name, used in imports().items() if name != "tpp_jax"}
    assert len(below) > 100
    up = [
        f"{name} imports {other}"
        for name, used in below.items()
        for other in used
        if place(other) > place(name)
    ]
    assert not up


def test_no_modules_form_a_circle():
    graphlib.TopologicalSorter(imports()).prepare()


def test_the_page_lists_every_module():
    page = (PACKAGE.parents[0] / "docs" / "architecture.md").read_text("utf-8")
    tree = re.search(r"^tpp_jax/\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    listed, folders = set(), []
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2 - 1
        if name.endswith("/"):
            folders[depth:] = [name]
        elif name.endswith(".py"):
            listed.add("".join([*folders[:depth], name]))
    modules = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")}
    assert listed == {x for x in modules if not x.endswith("/__init__.py")}
