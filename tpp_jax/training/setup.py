"""What a config asks for, checked and loaded: mistakes are found before training."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from tpp_jax import data, models
from tpp_jax.errors import TPPError
from tpp_jax.method.schedule import GrowingSchedule
from tpp_jax.pruning.channels import channel_groups
from tpp_jax.pruning.groups import Groups
from tpp_jax.pruning.plan import Plan, make_plan
from tpp_jax.training import parallel, phases
from tpp_jax.training.checkpoints import load_model
from tpp_jax.training.config import check_fields, check_values
from tpp_jax.training.phases import Phase


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a run starts from; the same at every resumption."""

    config: ml_collections.ConfigDict
    dataset: data.Dataset
    devices: list[jax.Device]
    model: nnx.Module
    groups: Groups
    plan: Plan  # of the untrained weights: its counts are final, its indices are not
    schedule: GrowingSchedule
    pretrain: Phase
    finetune: Phase
    steps_per_epoch: int


def check(config: ml_collections.ConfigDict) -> Setup:
    """Loads the data, builds the model and tries the plan, to find errors early.

    Raises:
      TPPError: whatever is wrong with the config.
    """
    try:
        return _check(config)
    except TPPError:
        raise
    except ValueError as error:  # the core's own messages: a pattern, a ratio, a name
        raise TPPError(str(error)) from error


def _check(config: ml_collections.ConfigDict) -> Setup:
    check_fields(config)
    check_values(config)
    devices = jax.local_devices()
    if config.num_devices > len(devices):
        raise TPPError(
            f"config.num_devices is {config.num_devices}, but there are only "
            f"{len(devices)} local devices; set it to 0 for all of them"
        )
    devices = devices[: config.num_devices or None]
    parallel.check_batch_size(config.data.batch_size, devices)
    dataset = data.load(config.data.name, config.data.dir or None, config.data.pad_to)
    n = len(dataset.train_images)
    if not 1 <= config.data.batch_size <= n:
        raise TPPError(
            f"config.data.batch_size is {config.data.batch_size}, but "
            f"{config.data.name} has {n} training images"
        )
    steps_per_epoch = n // config.data.batch_size
    image_shape = dataset.train_images.shape[1:]
    if config.init.model:
        model = load_model(config.init.model)
        spec = model.spec
        wanted = (config.model.name, dataset.num_classes, tuple(image_shape))
        if (spec.name, spec.num_classes, tuple(spec.image_shape)) != wanted:
            raise TPPError(
                f"config.init.model is a {spec.name} for {spec.num_classes} classes of "
                f"images {spec.image_shape}, the config wants {wanted}"
            )
    else:
        model = models.create(
            config.model.name,
            num_classes=dataset.num_classes,
            image_shape=image_shape,
            rngs=nnx.Rngs(config.seed),
        )
    example = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    groups = channel_groups(model, example)
    schedule = phases.strength_schedule(config.prune.schedule)
    plan = plan_for(config, groups, model)
    if not plan.pruned_groups:
        raise TPPError(
            f"config.prune.ratios={config.prune.ratios!r} prunes nothing: raise a ratio"
        )
    phases.tpp_phases(config.prune, plan, schedule)
    return Setup(
        config=config,
        dataset=dataset,
        devices=devices,
        model=model,
        groups=groups,
        plan=plan,
        schedule=schedule,
        pretrain=phases.training_phase("pretrain", config.pretrain, steps_per_epoch),
        finetune=phases.training_phase("finetune", config.finetune, steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
    )


def plan_for(
    config: ml_collections.ConfigDict, groups: Groups, model: nnx.Module
) -> Plan:
    """Makes the plan that ``config.prune`` asks for, from a model's weights."""
    fields = config.prune
    return make_plan(
        groups,
        model,
        fields.ratios,
        skip=fields.skip,
        criterion=fields.criterion,
        scope=fields.scope,
        seed=config.seed,
        round_to=fields.round_to,
    )
