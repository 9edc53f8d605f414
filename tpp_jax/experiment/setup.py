"""What a config asks for, checked and loaded: mistakes are found before training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from tpp_jax import data, models
from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import RunConfig
from tpp_jax.experiment.fields import Tree
from tpp_jax.experiment.measures import report_layer
from tpp_jax.experiment.methods import (
    UNTRAINED,
    Method,
    Stage,
    find_method,
    stages_of,
)
from tpp_jax.experiment.phases import Phase, strength_schedule, training_phase
from tpp_jax.experiment.planning import plan_for
from tpp_jax.experiment.sections import InitConfig, TrainingConfig
from tpp_jax.experiment.tasks import make_tasks, open_data
from tpp_jax.graph.groups import Groups
from tpp_jax.interop.torch_weights import load_torch
from tpp_jax.method.schedule import GrowingSchedule
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.plan import Plan
from tpp_jax.saving import load_model
from tpp_jax.training import parallel
from tpp_jax.training.step import StepConfig
from tpp_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a run starts from; the same at every resumption.

    Attributes:
      config: The run's config, checked.
      tasks: Task of each part of the config that changes its loss; of ``criteria``, in
        float32; and of ``""`` for everything else.
      devices: Devices that it trains on.
      model: The network at the start.
      groups: Groups of that network.
      plan: Plan of the weights at the start: it prunes the groups that will be pruned.
      schedule: Schedule of TPP's strength.
      stages: Stages of the run, in order.
    """

    config: RunConfig
    tasks: Mapping[str, Task]
    devices: list[jax.Device]
    model: nnx.Module
    groups: Groups
    plan: Plan
    schedule: GrowingSchedule
    stages: tuple[Stage, ...]

    @property
    def method(self) -> Method:
        """The row of the run's method."""
        return find_method(self.config.prune.method)

    @property
    def rounds(self) -> int:
        """Number of times that channels are chosen and cut, and the rest fine-tuned."""
        return max(stage.round for stage in self.stages)

    def recipe(self, part: str) -> TrainingConfig | None:
        """Returns a part of the config if it is that of a phase of plain training."""
        config = self.config
        return {"pretrain": config.pretrain, "finetune": config.finetune}.get(part)

    def phases(self, plan: Plan) -> dict[str, Phase]:
        """Returns the phases of training, by kind, that prune by a plan.

        Raises:
          TPPError: A field of the config is wrong.
        """
        config, steps = self.config, self.task().steps_per_epoch
        found = [
            training_phase("pretrain", config.pretrain, steps, self.model),
            training_phase("finetune", config.finetune, steps, self.model, self.rounds),
        ]
        for make in self.method.phases:
            found += make(config.prune, plan, self.schedule)
        return {phase.kind: phase for phase in found}

    def groups_of(self, model: nnx.Module, plans: Sequence[Plan]) -> Groups:
        """Returns the groups of a network, which was cut by some plans."""
        return channel_groups(model, *self.groups.inputs) if plans else self.groups

    def likeness(self, phase: Phase) -> Any:
        """Returns what is equal for runs that may take a phase's steps in one program.

        Their states must have equal shapes too. A phase reads its own part of the
        config, and those of the rest that no other phase has for itself.
        """
        left_out = {"pretrain", "finetune", "prune"} - {phase.part} | {"seed", "init"}
        fields = dataclasses.asdict(self.config)
        read = {name: x for name, x in fields.items() if name not in left_out}
        return phase.kind, self.rounds, read

    def task(self, part: str = "") -> Task:
        """Returns the task as phases of a part of the config train it."""
        return self.tasks.get(part, self.tasks[""])

    def step_config(self, part: str = "") -> StepConfig:
        """Returns how to compute: in phases of a part of the config, or elsewhere."""
        config, recipe = self.config, self.recipe(part)
        return StepConfig(
            config.model.dtype,
            config.model.remat,
            config.accumulate,
            config.skip_nonfinite,
            config.sync_bn,
            0.0 if recipe is None else recipe.ema,
        )


def make_setup(tree: Tree) -> Setup:
    """Loads the data, builds the model and tries the plan, to find errors early.

    Args:
      tree: Config of a run, see :func:`tpp_jax.experiment.config.default_config`.

    Raises:
      TPPError: Something is wrong with the config.
    """
    config = RunConfig.from_dict(tree)
    prune, method = config.prune, find_method(config.prune.method)
    devices = _devices(config.num_devices)
    dataset = _dataset(config, devices)
    tasks = make_tasks(dataclasses.asdict(config), dataset)
    model = initial_model(
        config.model.name,
        config.seed,
        dataset.num_classes,
        dataset.image_shape,
        config.init,
    )
    groups = channel_groups(model, *tasks[""].example_inputs())
    schedule = strength_schedule(prune.schedule)
    plan = plan_for(prune, groups, model, config.seed)
    if not plan.pruned_groups:
        raise TPPError(
            f"config.prune.ratios={prune.ratios!r} prunes nothing: raise a "
            "ratio, or lower config.prune.min_channels, round_to, flops or params"
        )
    if prune.scope != "local" and method.penalizes_first:
        # Any of the groups may lose channels once there are weights to compare.
        plan = plan_for(prune, groups, model, config.seed, scope="local")
    given = bool(config.init.model or config.init.torch)
    setup = Setup(
        config=config,
        tasks=tasks,
        devices=devices,
        model=model,
        groups=groups,
        plan=plan,
        schedule=schedule,
        stages=stages_of(prune.method, prune.rounds, given=given),
    )
    _check_stages(setup.stages, setup.phases(plan), prune.method)
    report_layer(config.report_layer, plan)
    return setup


def _check_stages(
    stages: Sequence[Stage], phases: Mapping[str, Phase], method: str
) -> None:
    """Raises a TPPError unless each stage that trains has a phase."""
    for kind in {stage.kind: None for stage in stages}:
        if kind not in phases and kind not in UNTRAINED:
            raise TPPError(
                f"the method {method!r} has a stage {kind!r}, but makes no phase of "
                f"that kind; it has the phases {', '.join(phases)}"
            )


def _devices(number: int) -> list[jax.Device]:
    """Returns the devices to train on: all for 0, or the first ones."""
    devices = jax.devices()
    if number > len(devices):
        raise TPPError(
            f"config.num_devices is {number}, but there are only "
            f"{len(devices)} devices; set it to 0 for all of them"
        )
    if jax.process_count() > 1 and number not in (0, len(devices)):
        raise TPPError(
            f"config.num_devices is {number}, but a run of several "
            f"processes uses all their {len(devices)} devices; set it to 0"
        )
    return devices[: number or None]


def _dataset(
    config: RunConfig, devices: Sequence[jax.Device]
) -> data.Dataset | data.Stream:
    """Opens the data, whose batches must split over the devices."""
    size, recipes = config.data.batch_size, (config.pretrain, config.finetune)
    parallel.check_batch_size(
        size,
        devices,
        config.accumulate,
        pairs=any(recipe.mixup or recipe.cutmix for recipe in recipes),
    )
    dataset = open_data(dataclasses.asdict(config.data))
    if not 1 <= size <= dataset.num_train:
        raise TPPError(
            f"config.data.batch_size is {size}, but {config.data.name} has "
            f"{dataset.num_train} training images"
        )
    return dataset


def initial_model(
    name: str,
    seed: int,
    num_classes: int,
    image_shape: tuple[int, int, int],
    init: InitConfig,
) -> nnx.Module:
    """Returns the network that a run starts from: saved, PyTorch's, or random.

    Args:
      name: Name of the architecture.
      seed: Seed of random weights.
      num_classes: Number of classes of the data.
      image_shape: Height, width and channels of its images.
      init: The config's ``init`` part.

    Raises:
      TPPError: A saved network is not of that architecture and data.
    """
    if init.torch:
        model = nnx.eval_shape(
            lambda: random_model(name, seed, num_classes, image_shape)
        )
        return load_torch(init.torch, model)
    if not init.model:
        return random_model(name, seed, num_classes, image_shape)
    model = load_model(init.model)
    spec = model.spec
    found = spec.name, spec.num_classes, tuple(spec.image_shape)
    if found != (name, num_classes, tuple(image_shape)):
        raise TPPError(
            f"config.init.model is a {spec.name} for {spec.num_classes} classes of "
            f"images {spec.image_shape}, the config wants {name} for {num_classes} "
            f"classes of {image_shape}"
        )
    return model


def random_model(
    name: str, seed: int, num_classes: int, image_shape: tuple[int, int, int]
) -> nnx.Module:
    """Returns a network with random weights; see :func:`initial_model`."""
    return models.create(
        name,
        num_classes=num_classes,
        image_shape=image_shape,
        rngs=nnx.Rngs(seed),
    )
