"""Criteria and methods of a user's own, named in a config by a dotted path."""

import json
import sys

import numpy as np
import pytest
from flax import nnx

from tests.experiment.test_errors import small_config
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.dotted import load_object
from tpp_jax.experiment.methods import find_method, stages_of
from tpp_jax.experiment.setup import make_setup
from tpp_jax.graph.naming import named_leaves

MODULE = """
import dataclasses
import numpy as np
import optax
from tpp_jax.experiment.methods import Method
from tpp_jax.experiment.phases import Phase, extra_phase
from tpp_jax.pruning.criteria import Criterion


def widest(filters):
    return np.ptp(filters, axis=1)


sensitive = Criterion(
    lambda filters, gradients: np.abs(gradients).sum(1), statistics="loss_gradient"
)
strange = Criterion(lambda filters, x: x.sum(1), statistics="astrology")
number = 3


def wait_phase(prune, plan, schedule):
    [extra] = extra_phase(prune, plan, schedule)
    return (dataclasses.replace(extra, kind="wait", steps=4),)


WAIT = Method("pretrain dense choose wait slice finetune", (wait_phase,))
LOST = Method("pretrain dense choose wander slice finetune")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A package of the user's, in a folder that Python finds modules in."""
    folder = tmp_path / "user" / "my_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "mine.py").write_text(MODULE)
    (folder / "broken.py").write_text("import no_such_package_at_all\n")
    (folder / "failing.py").write_text("raise KeyError('half-way')\n")
    monkeypatch.syspath_prepend(tmp_path / "user")
    yield "my_package.mine"
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]


def test_an_object_is_found_by_its_path(module):
    assert load_object(f"{module}:number", "config.x") == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_package.mine:nothing", "my_package.mine defines no nothing"),
        ("my_package.other:x", "no module my_package.other: start in the folder"),
        ("no_package.mine:x", "there is no module no_package: start in the folder"),
        ("my_package.mine.py:x", "no module my_package.mine.py|failed with Module"),
        ("my_package/mine.py:x", "write a dotted path as package.module:name"),
        ("my_package.mine:", "write a dotted path as package.module:name"),
        (":x", "write a dotted path as package.module:name"),
        ("my_package.mine:x:y", "write a dotted path as package.module:name"),
        ("my_package.broken:x", "failed with ModuleNotFoundError: .*no_such_package"),
        ("my_package.failing:x", "failed with KeyError: 'half-way'"),
    ],
)
@pytest.mark.usefixtures("module")
def test_what_cannot_be_loaded_is_one_sentence(path, message):
    with pytest.raises(TPPError, match=f"config.x is '{path}'.*({message})"):
        load_object(path, "config.x")


def test_a_function_of_one_s_own_chooses_the_channels(module):
    setup = make_setup(small_config(**{"prune.criterion": f"{module}:widest"}))
    leaves = named_leaves(nnx.state(setup.model))
    for group in setup.plan.pruned_groups:
        [member] = [m for m in group.members if m.role == "produced"]
        kernel = leaves[member.leaf]
        scores = np.ptp(np.asarray(kernel), axis=0)
        kept = setup.plan.kept[group.name]
        lost = np.setdiff1d(np.arange(group.size), kept)
        assert scores[lost].max() <= scores[kept].min()


@pytest.mark.usefixtures("no_pictures")
def test_a_criterion_of_one_s_own_gets_its_statistics(module, tmp_path):
    config = small_config(**{"prune.criterion": f"{module}:sensitive"})
    summary = run.train(config, tmp_path / "run")
    assert summary["config"]["prune"]["criterion"] == f"{module}:sensitive"


@pytest.mark.usefixtures("no_pictures")
def test_a_method_of_one_s_own_is_run_stage_by_stage(module, tmp_path):
    config = small_config(**{"prune.method": f"{module}:WAIT"})
    summary = run.train(config, tmp_path / "run")
    phases = {phase["name"]: phase["steps"] for phase in summary["phases"]}
    assert list(phases) == ["pretrain", "wait", "slice", "finetune"]
    assert phases["wait"] == 4
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    stages = stages_of(f"{module}:WAIT", given=True)
    assert [s.kind for s in stages] == ["dense", "choose", "wait", "slice", "finetune"]


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("prune.criterion", "number", "of type int; it must be a function"),
        ("prune.criterion", "strange", "'astrology': a run measures only loss_grad"),
        ("prune.criterion", "gone", "my_package.mine defines no gone"),
        ("prune.method", "number", "of type int; it must be a .*Method"),
        ("prune.method", "gone", "my_package.mine defines no gone"),
        ("prune.method", "LOST", "a stage 'wander', but makes no phase of that kind"),
    ],
)
def test_what_does_not_fit_is_named_before_any_training(module, field, name, message):
    with pytest.raises(TPPError, match=message):
        make_setup(small_config(**{field: f"{module}:{name}"}))


def test_an_unknown_method_is_named():
    with pytest.raises(TPPError, match="unknown method 'magic': choose one of tpp"):
        find_method("magic")
    with pytest.raises(TPPError, match=r"unknown config.*'magic'.* or a dotted path"):
        make_setup(small_config(**{"prune.method": "magic"}))
