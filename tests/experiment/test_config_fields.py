"""Fields are declared once: bounds are checked, the page and the help list them."""

import dataclasses
import json
import math
import re

import pytest

from tests.end_to_end.runs import launch
from tests.end_to_end.starts import ROOT
from tests.experiment.test_config_values import with_field
from tpp_jax.errors import TPPError
from tpp_jax.experiment import config_docs
from tpp_jax.experiment.config import (
    FIELDS,
    SECTIONS,
    RunConfig,
    check_values,
    default_config,
)
from tpp_jax.experiment.fields import Field, flat
from tpp_jax.experiment.sections import PruneConfig, ScheduleConfig


def edges(one: Field) -> tuple[list[float], list[float]]:
    """Returns the extreme valid values of a field, and values just outside."""
    whole = float not in one.types

    def lower(x: float) -> float:
        return x - 1 if whole else math.nextafter(x, -math.inf)

    def higher(x: float) -> float:
        return x + 1 if whole else math.nextafter(x, math.inf)

    if one.above is None:
        inside, outside = [one.least], [lower(one.least)]
    else:
        inside, outside = [higher(one.above)], [one.above, lower(one.above)]
    if one.below is not None:
        inside.append(lower(one.below))
        outside += [one.below, higher(one.below)]
    else:
        most = one.most or (2**31 - 1 if whole else 3e38)
        inside.append(most)
        outside.append(higher(most))
    if one.least_above_zero is not None:
        inside.append(one.least_above_zero)
        outside.append(lower(one.least_above_zero))
    return inside, outside


NUMBERS = {name: one for name, one in FIELDS.items() if {int, float} & set(one.types)}
CHOICES = {name: one for name, one in FIELDS.items() if one.choices}
PATHS = [name for name, one in FIELDS.items() if one.is_path]


@pytest.mark.parametrize("name", NUMBERS)
def test_the_bounds_of_a_number_are_inside_and_their_neighbours_outside(name):
    inside, outside = edges(NUMBERS[name])
    for value in inside:
        NUMBERS[name].check(value)
    for value in outside:
        with pytest.raises(TPPError, match=rf"config\.{name} is .*, must be "):
            check_values(with_field(name, value))


@pytest.mark.parametrize("name", CHOICES)
def test_all_choices_of_a_text_are_taken_and_no_others(name):
    for value in CHOICES[name].choices:
        check_values(with_field(name, value))
    for value in ("nothing", *(choice + " " for choice in CHOICES[name].choices)):
        with pytest.raises(TPPError, match=rf"unknown config\.{name} .*: choose '"):
            check_values(with_field(name, value))


@pytest.mark.parametrize("name", PATHS)
def test_what_cannot_be_a_path_is_refused(name):
    check_values(with_field(name, "/nowhere/in/particular"))
    with pytest.raises(TPPError, match=rf"config\.{name} is .*, which is not a path"):
        check_values(with_field(name, "a\0b"))


def test_numbers_choices_and_paths_are_found():
    """The tests above depend on finding every rule."""
    rules = {rule for one in FIELDS.values() for rule, _ in rules_of(one)}
    assert rules == {f.name for f in dataclasses.fields(Field)} - {
        "name", "default", "types", "doc"
    }  # fmt: skip
    assert len(NUMBERS) > 40 and len(CHOICES) > 10 and len(PATHS) == 4


def rules_of(one):
    unset = Field(name="", default=0, types=(int,), doc="")
    names = {rule.name for rule in dataclasses.fields(Field)}
    for name in sorted(names - {"name", "default", "types", "doc"}):
        if getattr(one, name) != getattr(unset, name):
            yield name, getattr(one, name)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_accepts_its_default_and_is_documented_in_one_line(name):
    one = FIELDS[name]
    one.check(one.default)
    greek = r"\u0391-\u03a9\u03b1-\u03c9"
    assert re.fullmatch(rf"[A-Z{greek}].*\.", one.doc), one.doc
    assert len(one.doc) < 200 and "|" not in one.doc


def test_the_default_config_holds_the_defaults_and_their_types():
    values = flat(default_config())
    assert values == {name: one.default for name, one in FIELDS.items()}
    assert all(type(values[name]) is type(FIELDS[name].default) for name in FIELDS)


def test_a_config_is_read_typed():
    config = default_config()
    config.prune.schedule.every = 7
    config.finetune.learning_rate = "0.5"
    typed = RunConfig.from_dict(config)
    schedule = dataclasses.replace(ScheduleConfig(), every=7)
    assert typed.prune == dataclasses.replace(PruneConfig(), schedule=schedule)
    assert typed.finetune.learning_rate == "0.5"
    assert typed.pretrain == RunConfig().pretrain
    assert dataclasses.asdict(typed) == config.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        typed.seed = 1


def test_a_config_is_read_from_json():
    text = default_config().to_json()
    assert RunConfig.from_dict(json.loads(text)) == RunConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "config.seed is -1, must be at least 0"),
        ({"sead": 1}, "unknown field sead; did you mean seed"),
        ({"prune": {}}, "the config has no field prune.batches"),
        ({"seed": {"a": 1}}, "unknown field seed.a"),
    ],
)
def test_a_wrong_config_is_not_read(change, message):
    with pytest.raises(TPPError, match=message):
        RunConfig.from_dict(default_config().to_dict() | change)


def test_the_page_of_all_fields_is_current():
    # Written by: python -m tpp_jax.experiment.config_docs > docs/config.md
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == config_docs.page()


def test_the_links_of_the_page_lead_somewhere():
    links = set(re.findall(r"\]\((.+?)\)", config_docs.page()))
    assert len(links) > 5
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_the_help_lists_every_field_with_its_default():
    shown = launch("--helpfull")
    assert "Python file whose function get_config()" in shown.stdout
    repeated = {name for name in FIELDS if name.startswith("finetune.")}
    own = {f"finetune.{name}" for name in ("epochs", "learning_rate")}
    own |= {name for name in repeated if ".distillation." in name}
    for name in FIELDS.keys() - repeated | own:
        assert f"--config.{name}={FIELDS[name].default!r}:" in shown.stdout
    assert "Of finetune: the same fields as pretrain" in shown.stdout
    assert "](" not in config_docs.flag_help()


def test_every_section_is_introduced():
    for section in SECTIONS:
        assert re.fullmatch(r"[A-Z].*\.", section.doc), section.name
