"""Every file in configs/ is a config that runs, and prunes what it says."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tpp_jax as tpp
from tests.reference import filled
from tpp_jax.training import phases
from tpp_jax.training.config import check_fields
from tpp_jax.training.setup import plan_for

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# What the papers' tables say of each: classes, images, speedup.
EXPECTED = {
    "cifar10_resnet20_cpu": (10, (32, 32, 3), 3.531),
    "cifar10_resnet56_tpp": (10, (32, 32, 3), 11.578),
    "cifar100_vgg19_tpp": (100, (32, 32, 3), 8.891),
    "digits_resnet8_tpp": (10, (8, 8, 1), 1.974),
    "mnist_mlp7_tpp": (10, (32, 32, 1), 6.764),
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_no_config_is_forgotten():
    assert {file.stem for file in CONFIGS.glob("*.py")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_gives_the_speedup_of_its_table_and_phases_that_can_run(name):
    classes, shape, speedup = EXPECTED[name]
    config = load(name)
    check_fields(config)

    def create():
        return tpp.models.create(
            config.model.name, num_classes=classes, image_shape=shape, rngs=nnx.Rngs(0)
        )

    model = filled(create)
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    plan = plan_for(config, tpp.channel_groups(model, x), model)
    small = tpp.prune(model, plan)
    assert tpp.count(model, x).flops / tpp.count(small, x).flops == pytest.approx(
        speedup, abs=6e-4
    )
    schedule = phases.strength_schedule(config.prune.schedule)
    regularize, stabilize = phases.tpp_phases(config.prune, plan, schedule)
    assert regularize.steps + stabilize.steps == schedule.total_steps
    for part in ("pretrain", "finetune"):
        phase = phases.training_phase(part, config[part], steps_per_epoch=10)
        assert phase.steps == 10 * config[part].epochs
        assert float(phase.learning_rate(phase.steps - 1)) >= 0
