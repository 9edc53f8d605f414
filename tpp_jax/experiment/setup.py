"""Setup of a run: its config checked, and its data, model, groups and plan made."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
from flax import nnx

from tpp_jax import data, models
from tpp_jax.callbacks import Callback
from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import RunConfig
from tpp_jax.experiment.dotted import is_dotted
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
from tpp_jax.experiment.sections import InitConfig, ModelConfig, TrainingConfig
from tpp_jax.experiment.tasks import Load, make_task, make_tasks
from tpp_jax.graph.groups import Groups
from tpp_jax.interop.torch_weights import load_torch
from tpp_jax.method.schedule import GrowingSchedule
from tpp_jax.pruning import cutting
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.plan import Plan
from tpp_jax.saving import load_model
from tpp_jax.training import parallel
from tpp_jax.training.distillation import activation_loss
from tpp_jax.training.own import check_task
from tpp_jax.training.step import StepConfig
from tpp_jax.training.task import Task
from tpp_jax.training.watching import watch


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that a run starts from, which is the same at every resumption.

    Attributes:
      config: Checked config of the run.
      tasks: Variants of the task from :func:`tpp_jax.experiment.tasks.make_tasks`.
      devices: Devices to train on.
      model: Initial network.
      groups: Groups of that network.
      plan: Plan for the initial weights. It prunes the groups that the run will prune.
      schedule: Schedule of TPP's strength.
      stages: Stages of the run, in order.
    """

    config: RunConfig
    tasks: Mapping[str, Task]
    devices: list[parallel.Device]
    model: nnx.Module
    groups: Groups
    plan: Plan
    schedule: GrowingSchedule
    stages: tuple[Stage, ...]

    @property
    def method(self) -> Method:
        """Row of the run's method."""
        return find_method(self.config.prune.method)

    @property
    def repairs(self) -> tuple[bool, bool]:
        """Whether the cut refits layers, and whether it renews batch statistics."""
        prune, always = self.config.prune, self.method.repairs
        return prune.compensate or always, prune.recalibrate or always

    @property
    def rounds(self) -> int:
        """Number of rounds of choosing, cutting and fine-tuning."""
        return max(stage.round for stage in self.stages)

    def recipe(self, section: str) -> TrainingConfig | None:
        """Returns a section of the config; None if it is not of plain training."""
        return _recipes(self.config).get(section)

    def phases(self, plan: Plan) -> dict[str, Phase]:
        """Returns the phases of training for a plan, by kind.

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

    def distils(self, section: str) -> bool:
        """Returns whether the dense network teaches in phases of a section."""
        teaching = self.config.finetune.distillation
        asked = teaching.weight > 0 or bool(teaching.activations)
        return section == "finetune" and asked

    def groups_of(self, model: nnx.Module, plans: Sequence[Plan]) -> Groups:
        """Returns the groups of a network that was cut by some plans."""
        return channel_groups(model, *self.groups.inputs) if plans else self.groups

    def likeness(self, phase: Phase) -> Any:
        """Returns a value that is equal for runs whose steps of a phase may be joined.

        Their states must have equal shapes too. A phase depends on its own section of
        the config and on the fields outside the sections of other phases.
        """
        others = {"pretrain", "finetune", "prune"} - {phase.section}
        left_out = others | {"seed", "init"}
        fields = dataclasses.asdict(self.config)
        read = {name: x for name, x in fields.items() if name not in left_out}
        return phase.kind, self.rounds, read

    def task(self, section: str = "") -> Task:
        """Returns the task in phases of a section of the config; "" for elsewhere."""
        return self.tasks.get(section, self.tasks[""])

    def step_config(self, section: str = "") -> StepConfig:
        """Returns the arithmetic in phases of a section of the config, or elsewhere."""
        config, recipe = self.config, self.recipe(section)
        return StepConfig(
            config.model.dtype,
            config.model.remat,
            config.accumulate,
            config.skip_nonfinite,
            config.sync_bn,
            0.0 if recipe is None else recipe.ema,
        )


def _recipes(config: RunConfig) -> dict[str, TrainingConfig]:
    """Returns the sections of the phases of plain training."""
    return {"pretrain": config.pretrain, "finetune": config.finetune}


@dataclasses.dataclass(frozen=True)
class Given:
    """What the caller of a run passes as objects, in addition to the config.

    Attributes:
      task: Task in place of the config's; None for the config's.
      callbacks: Objects that are called during the run.
      checkpoints: Whether checkpoints are written.
    """

    task: Task | None = None
    callbacks: tuple[Callback, ...] = ()
    checkpoints: bool = True


def make_setup(tree: Tree, load: Load = data.load, given: Task | None = None) -> Setup:
    """Loads the data, builds the model and tries the plan, to find errors early.

    Args:
      tree: Config of a run, see :func:`tpp_jax.experiment.config.default_config`.
      load: Function that loads data into memory.
      given: Task in place of the config's.

    Raises:
      TPPError: The config or the data are unusable.
    """
    config = RunConfig.from_dict(tree)
    prune, method = config.prune, find_method(config.prune.method)
    devices = _devices(config.num_devices)
    recipes = _recipes(config)
    tasks = make_tasks(given or make_task(config, load), recipes)
    parallel.check_batch_size(
        tasks[""].batch_size,
        devices,
        config.accumulate,
        pairs=any(recipe.mixup or recipe.cutmix for recipe in recipes.values()),
        field="the batch_size of the task"
        if is_dotted(config.task.name)
        else "config.data.batch_size",
    )
    model = initial_model(tasks[""], config.model, config.seed, config.init)
    if is_dotted(config.task.name):
        check_task(tasks[""], model, config.task.name)
    groups = channel_groups(model, *tasks[""].example_inputs())
    schedule = strength_schedule(prune.schedule)
    plan = plan_for(prune, groups, model, config.seed)
    if not plan.pruned_groups:
        raise TPPError(
            f"config.prune.ratios={prune.ratios!r} prunes nothing: raise a "
            "ratio, or lower config.prune.min_channels, round_to, flops or params"
        )
    if prune.scope != "local" and method.penalizes_first:
        # With trained weights, any of the groups may lose channels.
        plan = plan_for(prune, groups, model, config.seed, scope="local")
    trained = bool(config.init.model or config.init.torch)
    setup = Setup(
        config=config,
        tasks=tasks,
        devices=devices,
        model=model,
        groups=groups,
        plan=plan,
        schedule=schedule,
        stages=stages_of(prune.method, prune.rounds, given=trained),
    )
    _check_stages(setup.stages, setup.phases(plan), prune.method)
    _check_repairs(setup)
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


def _check_repairs(setup: Setup) -> None:
    """Raises a TPPError for a repair or a teacher that the method has no use for."""
    prune, kinds = setup.config.prune, {stage.kind for stage in setup.stages}
    asked = [name for name in ("compensate", "recalibrate") if getattr(prune, name)]
    if asked and setup.method.random_weights:
        raise TPPError(
            f"config.prune.{asked[0]} is set, but the method {prune.method!r} starts "
            "from random weights after the cut: set it to False"
        )
    if prune.reinitialize and any(setup.repairs):
        raise TPPError(
            f"config.prune.reinitialize={prune.reinitialize!r} replaces the weights "
            f"that config.prune.{asked[0] if asked else f'method={prune.method!r}'} "
            "fits to the data: leave one of them out"
        )
    if setup.distils("finetune") and kinds >= {"finetune"} and "dense" not in kinds:
        raise TPPError(
            "config.finetune.distillation asks for a teacher, but the method "
            f"{prune.method!r} has no dense network to learn from: set its weight to 0 "
            "and leave its activations empty"
        )
    patterns = setup.config.finetune.distillation.activations
    if patterns:
        _check_activations(setup, patterns)


def _check_activations(setup: Setup, patterns: str) -> None:
    """Raises a TPPError if distilled activations are not of the same shape."""
    cut = cutting.prune(setup.model, setup.plan)

    (dense, state), (small, rest) = map(nnx.split, (setup.model, cut))

    def compare(state: Any, rest: Any, *inputs: Any) -> Any:
        models = nnx.merge(dense, state), nnx.merge(small, rest)
        theirs, ours = (watch(model, patterns) for model in models)
        for model in models:
            model(*inputs)
        return activation_loss(ours, theirs)

    jax.eval_shape(compare, state, rest, *setup.groups.inputs)


def _devices(number: int) -> list[parallel.Device]:
    """Returns the first devices of some number; 0 for all devices."""
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


def initial_model(
    task: Task, network: ModelConfig, seed: int, init: InitConfig
) -> nnx.Module:
    """Returns the initial network of a run: saved, from PyTorch, or random.

    Args:
      task: Task that makes the network.
      network: Section ``model`` of the config.
      seed: Seed of random weights.
      init: Section ``init`` of the config.

    Raises:
      TPPError: A saved network has another architecture, or is for other data.
    """
    if not (init.torch or init.model):
        return task.model(nnx.Rngs(seed))
    model = abstract_model(task, seed)
    if init.torch:
        return load_torch(init.torch, model)
    return saved_model(init.model, model, network.name)


def abstract_model(task: Task, seed: int) -> nnx.Module:
    """Returns the network of a task, without arrays if that is possible."""
    model = nnx.eval_shape(lambda: task.model(nnx.Rngs(seed)))
    attributes = [x for _, part in nnx.iter_modules(model) for x in vars(part).values()]
    if any(isinstance(x, jax.core.Tracer) for x in attributes):
        # Under a trace, Flax loses arrays that are in no variable.
        return task.model(nnx.Rngs(seed))
    return model


def start_of(task: Task, config: RunConfig) -> nnx.Module:
    """Returns the network of a run's start, whose shapes its saved networks refer to.

    Args:
      task: Task of the run.
      config: Config of the run. A saved network that it started from may have been
        pruned before; if it is no longer there, it counts as unpruned.
    """
    saved = config.init.model
    if saved and pathlib.Path(saved).is_dir():
        return initial_model(task, config.model, config.seed, config.init)
    return abstract_model(task, config.seed)


def saved_model(folder: str, model: nnx.Module, name: str) -> nnx.Module:
    """Returns the network in a folder, which must be that of a config.

    Args:
      folder: Folder of the saved network.
      model: Network of the config.
      name: Its name in the config.

    Raises:
      TPPError: They differ.
    """
    wanted = getattr(model, "spec", None)
    if not isinstance(wanted, models.ModelSpec):
        loaded = load_model(folder, model)
        loaded.train()
        return loaded
    loaded = load_model(folder)
    spec = models.spec_of(loaded)
    if spec != wanted:
        raise TPPError(
            f"config.init.model is a {spec.name} for {spec.num_classes} classes of "
            f"images {spec.image_shape}, but the config needs {name} for "
            f"{wanted.num_classes} classes of images {wanted.image_shape}"
        )
    return loaded
