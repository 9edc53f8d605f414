"""The core needs few packages; what needs more says which extra has it."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import pytest

import tpp_jax as tpp
from tpp_jax.errors import TPPError, require

ROOT = pathlib.Path(__file__).parents[1]

# Some packages cannot be imported in a process that begins so.
REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""
# A network is pruned; then what needs an extra is called.
CORE = """
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import tpp_jax as tpp

model = tpp.models.create("cifar_resnet8", image_shape=(8, 8, 3), rngs=nnx.Rngs(0))
images = jnp.ones((2, 8, 8, 3))
groups = tpp.channel_groups(model, images)
assert "layer2.0.conv1" in tpp.describe_groups(groups)
plan = tpp.make_plan(groups, model, "*layer*.conv1:0.5")
schedule = tpp.growing_schedule(
    granularity=0.5, every=1, stabilize=10, zero_out_every=1
)
tx = optax.chain(
    tpp.add_tpp_penalties(plan, schedule),
    optax.sgd(1e-3),
    tpp.zero_pruned(plan, schedule),
)
params = nnx.state(model, nnx.Param)
state = tx.init(params)
update = jax.jit(tx.update)
for _ in range(schedule.total_steps):
    updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
    params = optax.apply_updates(params, updates)
nnx.update(model, params)
assert tpp.status(state, plan, params).ready
small = tpp.prune(model, plan)
assert tpp.count(small, images).params < tpp.count(model, images).params
tpp.slice_tree(plan, state)
for call in (
    lambda: tpp.save_model("somewhere", small),
    lambda: tpp.load_model("."),
    lambda: tpp.save_torch(small, "small.pth"),
    lambda: tpp.data.load("digits"),
    lambda: tpp.data.load("mnist"),
    lambda: __import__("tpp_jax.experiment.run"),
    lambda: __import__("tpp_jax.reports.plots"),
):
    try:
        call()
        print("nothing was raised")
    except tpp.TPPError as error:
        print(error)
"""


def extras() -> dict[str, list[str]]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["optional-dependencies"]


# What a package is imported as, if not as it is called.
MODULES = {
    "absl-py": "absl",
    "etils": "etils",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
}


# Compiled programs are found where those of the tests are.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": os.environ["XLA_FLAGS"],
}


def without(refused, program, cwd):
    """Runs a program where some packages cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", REFUSE.format(refused=refused) + program],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "", **SETTINGS},
        text=True,
        capture_output=True,
    )


def test_the_core_works_without_the_extras_and_says_what_is_missing(tmp_path):
    lines = [line for name in ("train", "plots", "torch") for line in extras()[name]]
    names = [re.split(r"[\[>=<]", line)[0] for line in lines]
    refused = {MODULES.get(name, name.replace("-", "_")) for name in names}
    refused -= {"absl", "etils"}  # optax and Orbax, which Flax requires, bring them
    assert {"orbax", "grain", "matplotlib", "torch", "ml_collections"} <= refused
    assert "jinja2" in refused
    done = without(refused, CORE, tmp_path)
    assert done.returncode == 0, done.stderr
    missing = [
        ("orbax.checkpoint", "train"),
        ("orbax.checkpoint", "train"),
        ("torch", "torch"),
        ("sklearn", "train"),
        ("array_record", "train"),
        ("ml_collections", "train"),
        ("matplotlib", "plots"),
    ]
    assert done.stdout.splitlines() == [
        f"the package {package}, which is needed here, is not installed: "
        f"pip install -e '{ROOT}[{extra}]'"
        for package, extra in missing
    ]


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("ml_collections", "train"),
        ("tensorboardX", "train"),
        ("matplotlib", "plots"),
        ("jinja2", "plots"),
    ],
)
def test_the_command_line_names_the_extra_that_it_needs(package, extra, tmp_path):
    program = "from tpp_jax.commands.command_line import main; "
    program += "sys.argv[1:] = ['--workdir=run']; main()"
    done = without({package}, program, tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: the package {package}, which is needed here, is not installed: "
        f"pip install -e '{ROOT}[{extra}]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_package_inside_a_missing_one_is_missing():
    require("train", "json", "xml.dom")
    with pytest.raises(TPPError, match=r"package no_such\.inner,.*\[train\]'"):
        require("train", "json", "no_such.inner")


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"orbax", "matplotlib", "tensorflow", "grain", "torch", "sklearn", "PIL"}
    heavy |= {"tensorboardX", "ml_collections", "tensorflow_datasets", "jinja2"}
    heavy |= {"scipy"}  # two fifths of the time
    code = "import sys, jax, optax, flax.nnx, flax.linen; before = set(sys.modules)"
    code += "; import tpp_jax; print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "tpp_jax" in loaded and not loaded & heavy


def test_dir_lists_the_public_names():
    assert set(tpp.__all__) <= set(dir(tpp))
    assert not hasattr(tpp, "__getattr__")
