"""What a config asks for, checked and loaded: mistakes are found before training."""

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from tpp_jax import data, models
from tpp_jax.errors import TPPError
from tpp_jax.experiment import phases
from tpp_jax.experiment.config import check_fields, check_values
from tpp_jax.experiment.measures import report_layer
from tpp_jax.experiment.methods import Stage, stages_of
from tpp_jax.experiment.phases import Phase
from tpp_jax.graph.groups import Groups
from tpp_jax.interop.torch_weights import load_torch
from tpp_jax.method.schedule import GrowingSchedule
from tpp_jax.pruning.activations import activation_means
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.criteria import CRITERIA
from tpp_jax.pruning.plan import Plan
from tpp_jax.pruning.planning import make_plan
from tpp_jax.pruning.statistics import hessian_diagonal, loss_gradient
from tpp_jax.saving import load_model
from tpp_jax.training import parallel
from tpp_jax.training.feeds import open_data
from tpp_jax.training.step import StepConfig


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a run starts from; the same at every resumption."""

    config: ml_collections.ConfigDict
    dataset: data.Dataset | data.Stream
    devices: list[jax.Device]
    model: nnx.Module
    groups: Groups
    plan: Plan  # of the untrained weights: it prunes the groups that will be pruned
    schedule: GrowingSchedule
    stages: tuple[Stage, ...]
    steps_per_epoch: int

    @property
    def rounds(self) -> int:
        """How often channels are chosen, cut out and the rest fine-tuned."""
        return max(stage.round for stage in self.stages)

    def phases(self, plan: Plan) -> dict[str, Phase]:
        """Returns the phases of training, by kind, that prune by a plan."""
        return phases.make_phases(
            self.config,
            [stage.kind for stage in self.stages],
            plan=plan,
            schedule=self.schedule,
            steps_per_epoch=self.steps_per_epoch,
            model=self.model,
            rounds=self.rounds,
        )

    def likeness(self, kind: str) -> Any:
        """Returns what is equal for runs that may take a phase's steps in one program.

        Their states are to have equal shapes besides. A phase reads its own part of the
        config, and those of the rest that have no phase of their own.
        """
        parts = {"pretrain", "finetune", "prune"}
        own = kind if kind in parts else "prune"
        left_out = parts - {own} | {"seed", "init"}
        fields = self.config.to_dict()
        read = {name: x for name, x in fields.items() if name not in left_out}
        return kind, self.rounds, read

    def step_config(self, kind: str = "") -> StepConfig:
        """Returns how to compute: in a phase of some kind, or else to evaluate."""
        config, dataset = self.config, self.dataset
        recipe = config.get(kind, {}) if kind in ("pretrain", "finetune") else {}
        names = "label_smoothing", "mixup", "cutmix", "ema"
        return StepConfig(
            dataset.mean,
            dataset.std,
            dataset.num_classes,
            config.model.dtype,
            config.model.remat,
            config.accumulate,
            config.skip_nonfinite,
            config.sync_bn,
            **{name: recipe[name] for name in names if name in recipe},
        )


def check(config: ml_collections.ConfigDict) -> Setup:
    """Loads the data, builds the model and tries the plan, to find errors early.

    Raises:
      TPPError: whatever is wrong with the config.
    """
    check_fields(config)
    check_values(config)
    devices = jax.devices()
    if config.num_devices > len(devices):
        raise TPPError(
            f"config.num_devices is {config.num_devices}, but there are only "
            f"{len(devices)} devices; set it to 0 for all of them"
        )
    if jax.process_count() > 1 and config.num_devices not in (0, len(devices)):
        raise TPPError(
            f"config.num_devices is {config.num_devices}, but a run of several "
            f"processes uses all their {len(devices)} devices; set it to 0"
        )
    devices = devices[: config.num_devices or None]
    recipes = config.pretrain, config.finetune
    parallel.check_batch_size(
        config.data.batch_size,
        devices,
        config.accumulate,
        pairs=any(recipe.mixup or recipe.cutmix for recipe in recipes),
    )
    dataset = open_data(config.data)
    if not 1 <= config.data.batch_size <= dataset.num_train:
        raise TPPError(
            f"config.data.batch_size is {config.data.batch_size}, but "
            f"{config.data.name} has {dataset.num_train} training images"
        )
    steps_per_epoch = dataset.num_train // config.data.batch_size
    model = initial_model(config, dataset.num_classes, dataset.image_shape)
    example = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
    groups = channel_groups(model, example)
    schedule = phases.strength_schedule(config.prune.schedule)
    plan = plan_for(config, groups, model)
    if not plan.pruned_groups:
        raise TPPError(
            f"config.prune.ratios={config.prune.ratios!r} prunes nothing: raise a "
            "ratio, or lower config.prune.min_channels, round_to, flops or params"
        )
    stages = stages_of(
        config.prune.method,
        config.prune.rounds,
        given=bool(config.init.model or config.init.torch),
    )
    if config.prune.scope != "local" and Stage("grow") in stages:
        # Any of the groups may lose channels once there are weights to compare.
        plan = plan_for(config, groups, model, scope="local")
    setup = Setup(
        config=config,
        dataset=dataset,
        devices=devices,
        model=model,
        groups=groups,
        plan=plan,
        schedule=schedule,
        stages=stages,
        steps_per_epoch=steps_per_epoch,
    )
    setup.phases(plan)
    report_layer(config, plan)
    return setup


def initial_model(
    config: ml_collections.ConfigDict,
    num_classes: int,
    image_shape: tuple[int, int, int],
) -> nnx.Module:
    """Returns the network that a run starts from: saved, PyTorch's, or random.

    Raises:
      TPPError: a saved network is not of the config's architecture and data.
    """
    if config.init.torch:
        model = nnx.eval_shape(lambda: random_model(config, num_classes, image_shape))
        return load_torch(config.init.torch, model)
    if not config.init.model:
        return random_model(config, num_classes, image_shape)
    name, model = config.model.name, load_model(config.init.model)
    spec = model.spec
    wanted = models.ModelSpec(name, num_classes, tuple(image_shape))
    if dataclasses.replace(spec, image_shape=tuple(spec.image_shape)) != wanted:
        raise TPPError(
            f"config.init.model is a {spec.name} for {spec.num_classes} classes of "
            f"images {spec.image_shape}, the config wants {name} for {num_classes} "
            f"classes of {image_shape}"
        )
    return model


def random_model(
    config: ml_collections.ConfigDict,
    num_classes: int,
    image_shape: tuple[int, int, int],
) -> nnx.Module:
    """Returns the config's network with random weights."""
    return models.create(
        config.model.name,
        num_classes=num_classes,
        image_shape=image_shape,
        rngs=nnx.Rngs(config.seed),
    )


def plan_for(
    config: ml_collections.ConfigDict,
    groups: Groups,
    model: nnx.Module,
    dataset: data.Dataset | data.Stream | None = None,
    scope: str = "",
    counts: Mapping[str, int] | None = None,
) -> Plan:
    """Makes the plan that ``config.prune`` asks for, from a model's weights.

    Args:
      config: of the run.
      groups: of the model.
      model: with its weights.
      dataset: for the criteria that measure something on the first training images of a
        random order. Without it ``l1`` stands in for them, to try the rest.
      scope: in place of the config's.
      counts: how many channels of each group stay, in place of ratios and targets.
    """
    fields = config.prune
    target = fields.flops or fields.params
    statistics, criterion = None, fields.criterion
    if criterion in CRITERIA and CRITERIA[criterion].statistics:
        if dataset is None:
            criterion = "l1"
        else:
            statistics = _statistics(config, model, dataset)
    amount: dict[str, Any] = {"counts": counts}
    if counts is None:
        amount = dict(
            ratios=None if target and not fields.ratios else fields.ratios,
            flops=fields.flops or None,
            params=fields.params or None,
            skip=fields.skip,
            scope=scope or fields.scope,
            round_to=fields.round_to,
            min_channels=fields.min_channels,
        )
    return make_plan(
        groups,
        model,
        criterion=criterion,
        statistics=statistics,
        reduce=fields.reduce,
        seed=config.seed,
        **amount,
    )


def _statistics(
    config: ml_collections.ConfigDict,
    model: nnx.Module,
    dataset: data.Dataset | data.Stream,
) -> Any:
    """Measures what the criterion needs, on the first training batches."""
    if isinstance(dataset, data.Stream):  # all of it, in every process
        dataset = dataclasses.replace(dataset, shard=(0, 1))
    batches = dataset.train_batches(config.data.batch_size, config.seed)
    steps = min(config.prune.batches, dataset.num_train // config.data.batch_size)
    with contextlib.closing(batches):
        images, labels = zip(*itertools.islice(batches, steps), strict=True)
    images = [data.normalize(x, dataset.mean, dataset.std) for x in images]

    def loss(model: nnx.Module, batch: tuple[Any, Any]) -> Any:
        logits = model(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    match CRITERIA[config.prune.criterion].statistics:
        case "loss_gradient":
            return loss_gradient(loss, model, zip(images, labels, strict=True))
        case "hessian_diagonal":
            pairs = zip(images, labels, strict=True)
            return hessian_diagonal(loss, model, pairs, seed=config.seed)
        case "activation_means":
            return activation_means(model, images)
