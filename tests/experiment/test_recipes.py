"""Every file in configs/ is a valid config with the sizes of the table it names.

Networks are counted from their shapes alone: which channels go needs no weights.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tpp_jax as tpp
from tpp_jax.errors import TPPError
from tpp_jax.experiment import phases
from tpp_jax.experiment.config import check_fields, check_values
from tpp_jax.experiment.planning import plan_for

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

CIFAR10, CIFAR100 = (10, (32, 32, 3)), (100, (32, 32, 3))
IMAGENET = (1000, (224, 224, 3))

# Values of each row in the tables: classes and images; FLOPs reduction; GMACs of the
# dense and of the pruned network; their millions of parameters.
RESNET50 = ("4.0892", "25.557")
ROWS = {
    "cifar10_resnet20_cpu": (CIFAR10, "3.531", None, None),
    "cifar10_resnet56_tpp": (CIFAR10, "11.578", ("0.1255", "0.853"), None),
    "cifar100_vgg19_tpp": (CIFAR100, "8.891", ("0.3982", "20.081"), None),
    "digits_resnet8_tpp": ((10, (8, 8, 1)), "1.974", None, None),
    "mnist_mlp7_tpp": ((10, (32, 32, 1)), "6.764", None, None),
    "imagenet_resnet34_tpp": (
        *(IMAGENET, "1.3168", ("3.6638", "21.798"), ("2.7823", "19.469")),
    ),
    "imagenet_resnet50_tpp:1.49": (IMAGENET, "1.4894", RESNET50, (None, "19.637")),
    "imagenet_resnet50_tpp:2.31": (IMAGENET, "2.3081", RESNET50, (None, "15.934")),
    "imagenet_resnet50_tpp:2.56": (IMAGENET, "2.5641", RESNET50, (None, "15.788")),
    "imagenet_resnet50_tpp:3.06": (IMAGENET, "3.0634", RESNET50, (None, "11.081")),
    "imagenet_resnet50_scratch": (IMAGENET, "2.3081", RESNET50, (None, "15.934")),
    "imagenet_resnet50_advanced:2g": (IMAGENET, "2.05", RESNET50, ("1.997", None)),
    "imagenet_resnet50_advanced:1g": (IMAGENET, "4.09", RESNET50, ("0.9997", None)),
    "tiny_imagenet_resnet18": ((200, (64, 64, 3)), "1.86", None, None),
}
# Configs for text are run by tests/end_to_end/test_own_task.py and
# tests/experiment/test_trained_decoders.py.
TEXT = {"chars_transformer_tpp", "smollm2_135m_tpp"}
FILES = {row.partition(":")[0] for row in ROWS} | TEXT


def load(row):
    """Returns the config of ``--config=configs/<file>.py:<argument>``."""
    name, *argument = row.split(":")
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


@functools.cache
def dense(name, num_classes, shape):
    """Returns an abstract model, its groups, constant weights and its count."""
    model = nnx.eval_shape(
        lambda: tpp.models.create(
            name, num_classes=num_classes, image_shape=shape, rngs=nnx.Rngs(0)
        )
    )
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    groups = tpp.channel_groups(model, x)
    one = np.float32(1)
    weights = {name: np.broadcast_to(one, dims) for name, dims in groups.shapes.items()}
    return model, groups, weights, tpp.count(model, x)


def pruned(config, num_classes, shape):
    """Returns the counts of the dense and the pruned network, and the plan."""
    model, groups, weights, before = dense(config.model.name, num_classes, shape)
    plan = plan_for(config.prune, groups, weights, config.seed)
    graphdef, state = nnx.split(model)
    small = nnx.merge(graphdef, tpp.slice_tree(plan, state))
    return (
        before,
        tpp.count(small, jax.ShapeDtypeStruct((1, *shape), jnp.float32)),
        plan,
    )


def assert_rounds_to(value, text):
    """Returns whether a number rounds to the number printed in a table."""
    if text is not None:
        assert f"{value:.{len(text.partition('.')[2])}f}" == text


def test_no_file_is_forgotten():
    assert {file.stem for file in CONFIGS.glob("*.py")} == FILES


@pytest.mark.parametrize("row", ROWS)
def test_a_config_has_the_sizes_of_its_row_and_phases_that_can_run(row):
    data, speedup, large, small = ROWS[row]
    config = load(row)
    check_fields(config)
    check_values(config)
    before, after, plan = pruned(config, *data)
    assert_rounds_to(before.flops / after.flops, speedup)
    for count, expected in ((before, large), (after, small)):
        macs, params = expected or (None, None)
        assert_rounds_to(count.flops / 2e9, macs)
        assert_rounds_to(count.params / 1e6, params)
    schedule = phases.strength_schedule(config.prune.schedule)
    regularize, stabilize = phases.tpp_phases(config.prune, plan, schedule)
    assert regularize.steps + stabilize.steps == schedule.total_steps
    for part in ("pretrain", "finetune"):
        phase = phases.training_phase(part, config[part], steps_per_epoch=10)
        assert phase.steps == 10 * config[part].epochs
        assert float(phase.learning_rate(phase.steps - 1)) >= 0


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("imagenet")])
def test_imagenet_s_rows_are_pruned_on_the_paper_s_schedule(row):
    config = load(row)
    schedule = phases.strength_schedule(config.prune.schedule)
    assert (schedule.regularize_steps, schedule.total_steps) == (50_000, 90_001)
    assert (config.prune.learning_rate, config.prune.weight_decay) == (1e-3, 1e-4)
    assert config.data.batch_size == 256
    if "advanced" not in row:
        rate = phases.training_phase("finetune", config.finetune, 10).learning_rate
        found = [float(rate(10 * epoch)) for epoch in (0, 29, 30, 60, 75, 89)]
        expected = [1e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-5]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_scratch_run_is_the_row_at_231_without_weights_to_start_from():
    ours, theirs = load("imagenet_resnet50_scratch"), load("imagenet_resnet50_tpp")
    assert theirs.init.torch and not ours.init.torch
    for part in ("model", "data", "prune", "finetune"):
        assert ours[part] == theirs[part]


@pytest.mark.parametrize(
    "name", ["imagenet_resnet50_tpp", "imagenet_resnet50_advanced"]
)
def test_a_row_that_no_table_has_is_refused_with_those_there_are(name):
    rows = [row.partition(":")[2] for row in ROWS if row.startswith(f"{name}:")]
    message = f"{name}.py has no row '9': choose one of {', '.join(rows)}"
    with pytest.raises(TPPError, match=message):
        load(f"{name}:9")


def test_every_file_tells_the_command_that_runs_it():
    for name in FILES:
        text = (CONFIGS / f"{name}.py").read_text()
        assert f"python launch.py --config=configs/{name}.py" in text
