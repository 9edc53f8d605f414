"""Every public name is documented in one template."""

import dataclasses
import inspect
import re
import types
from collections.abc import Callable
from typing import Any

import pytest

import tpp_jax as tpp

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Warns", "Example", "References")
# No noun phrase begins so.
_NOT_NOUNS = re.compile(
    r"(As|At|For|From|How|If|In|Is|Like|Likewise|Must|Of|On|Only|See|That|To|What|When"
    r"|Where|Which|Whose|With|Without)\b"
)
# They raise nothing of their own.
QUIET = {"describe_groups", "names"}


def public() -> dict[str, Any]:
    """All public names but the modules, those of ``data`` and ``models`` included."""
    found = {f"tpp.{name}": getattr(tpp, name) for name in tpp.__all__}
    for module in (tpp.data, tpp.models):
        short = module.__name__.removeprefix("tpp_jax.")
        found |= {f"tpp.{short}.{x}": getattr(module, x) for x in module.__all__}
    kinds = type | types.FunctionType
    return {name: value for name, value in found.items() if isinstance(value, kinds)}


FUNCTIONS = {n: x for n, x in public().items() if isinstance(x, types.FunctionType)}
CLASSES = {n: x for n, x in public().items() if isinstance(x, type)}
RECORDS = {n: x for n, x in CLASSES.items() if dataclasses.is_dataclass(x)}
RECORDS |= {n: x for n, x in CLASSES.items() if hasattr(x, "_fields")}


def sections(thing: Any) -> dict[str, str]:
    """Returns the sections of a docstring by their titles, what stands first by ''."""
    text = inspect.getdoc(thing) or ""
    pattern = rf"^({'|'.join(SECTIONS)}):\n"
    first, *rest = re.split(pattern, text, flags=re.MULTILINE)
    return {"": first} | dict(
        zip(rest[::2], map(inspect.cleandoc, rest[1::2]), strict=True)
    )


def entries(section: str) -> dict[str, str]:
    """Returns the names that a section explains, and what it says of each."""
    first, *rest = re.split(r"^([*\w]+(?:, [*\w]+)*): ", section, flags=re.MULTILINE)
    assert not first.strip(), f"not an entry: {first!r}"
    return dict(zip(rest[::2], rest[1::2], strict=True))


def check_phrases(explained: dict[str, str]) -> None:
    for name, text in explained.items():
        assert not _NOT_NOUNS.match(text), f"{name}: {text}"
        assert re.match(r"[A-Z0-9`\"{(∑Σλ]", text), f"{name}: {text}"
        assert text.rstrip().endswith((".", ".)")), f"{name}: {text}"


@pytest.mark.parametrize("name", public())
def test_it_has_a_summary_of_one_line(name):
    summary, *rest = sections(public()[name])[""].splitlines()
    assert re.fullmatch(r"[A-Z`].{9,82}\.", summary), summary
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_explains_its_parameters_and_what_it_returns(name):
    found = sections(FUNCTIONS[name])
    signature = inspect.signature(FUNCTIONS[name])
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    names = [stars.get(p.kind, "") + p.name for p in signature.parameters.values()]
    explained = entries(found.get("Args", ""))
    assert list(explained) == names
    check_phrases(explained)
    nothing = signature.return_annotation in (None, "None")
    assert nothing == ("Returns" not in found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_raises_and_shows_an_example(name):
    found = sections(FUNCTIONS[name])
    assert ("Raises" in found) != (name.rpartition(".")[2] in QUIET)
    assert ">>> " in found.get("Example", "")


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_explains_its_fields(name):
    record = RECORDS[name]
    fields = getattr(record, "_fields", None)
    fields = fields or [field.name for field in dataclasses.fields(record)]
    explained = entries(sections(record).get("Attributes", ""))
    assert [x for x in explained if x in fields] == list(fields)
    check_phrases(explained)


def test_the_types_that_functions_return_are_public():
    def ours(annotation: Any) -> Callable | None:
        module = getattr(annotation, "__module__", "") or ""
        return module.startswith("tpp_jax") and isinstance(annotation, type)

    for name, function in FUNCTIONS.items():
        returned = inspect.signature(function).return_annotation
        if ours(returned):
            assert returned in CLASSES.values(), f"{name} returns {returned}"


def test_the_list_of_public_names_is_sorted_and_complete():
    assert tpp.__all__ == sorted(tpp.__all__)
    classes = {n for n, x in vars(tpp).items() if callable(x) and not n.startswith("_")}
    assert classes <= set(tpp.__all__)
